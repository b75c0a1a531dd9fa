"""What torch sees: three opaque operators with fakes and autograd. No arithmetic here.

The mask travels as the tensors of a `BlockMask`, so backward cannot lose it, and a new mask with the same shapes never
recompiles. An empty list of tensors means every pair. Operators are defined by schema and not by
`torch.library.custom_op`, whose checks at every call take more host time than a small pass takes on a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from anymask import backends
from anymask.block_mask import BlockMask
from anymask.mask.program import mask_from_program
from anymask.packing import pack
from anymask.tiles import TILE, WORDS, tiles_over

torch.library.define(
    "anymask::forward",
    "(Tensor q, Tensor k, Tensor v, Tensor[] mask, float sm_scale, str? backend, bool deterministic) -> "
    "(Tensor, Tensor)",
)
torch.library.define(
    "anymask::backward",
    "(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, Tensor? dlse, Tensor[] mask, float sm_scale, "
    "str? backend, bool deterministic) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "anymask::pack",
    "(int[] nodes, SymInt[] numbers, Tensor[] tensors, SymInt q_len, SymInt kv_len, Device device) -> Tensor[]",
)

# `(o, lse)` of validated inputs by the named backend, or by the first that can
forward = torch.ops.anymask.forward.default
# `(dq, dk, dv)`, contiguous
backward = torch.ops.anymask.backward.default
# tensors of `pack(mask_from_program(nodes, numbers, tensors), ...)`: packing inside a compiled function
pack_op = torch.ops.anymask.pack.default


@torch.library.impl("anymask::forward", "CompositeExplicitAutograd")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: list[Tensor], sm_scale: float, backend: str | None, deterministic: bool
) -> tuple[Tensor, Tensor]:
    return _forward_now(q, k, v, _block_mask(mask, q.shape[2], k.shape[2]), sm_scale, backend)


def _forward_now(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or k.shape[2] == 0 or v.shape[3] == 0:
        o, lse = _forward_fake(q, k, v)
        return o.zero_(), lse.fill_(-float("inf"))
    q, k, v = _unit_last_stride(q), _unit_last_stride(k), _unit_last_stride(v)
    chosen = backends.choose(q, k, v, block_mask, backend)
    with _no_autocast(q):
        outputs: tuple[Tensor, Tensor] = chosen.forward(q, k, v, block_mask, sm_scale)
    return outputs


@torch.library.register_fake("anymask::forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _backward_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    mask: list[Tensor],
    sm_scale: float,
    backend: str | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        dq, dk, dv = _backward_fake(q, k, v)
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, do = (_unit_last_stride(t) for t in (q, k, v, do))
    block_mask = _block_mask(mask, q.shape[2], k.shape[2])
    chosen = backends.choose(q, k, v, block_mask, backend)
    repeatable = deterministic or torch.are_deterministic_algorithms_enabled()
    with _no_autocast(q):
        grads: tuple[Tensor, Tensor, Tensor] = chosen.backward(
            q, k, v, o, lse, do, dlse, block_mask, sm_scale, repeatable
        )
    return grads


torch.library.impl("anymask::backward", "CompositeExplicitAutograd", _backward_now)


@torch.library.register_fake("anymask::backward")
def _backward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.sm_scale, ctx.backend, ctx.deterministic = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *mask)


def _gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, o, lse, *mask = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    # a gradient that is recorded would be differentiated again: the operator says no
    call = _backward_now if _is_unwatched(q) and not torch.is_grad_enabled() else backward
    grads = call(q, k, v, o, lse, do, dlse, mask, ctx.sm_scale, ctx.backend, ctx.deterministic)
    return *grads, [None] * len(mask), None, None, None


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("anymask has first derivatives only; attention was differentiated twice")


torch.library.register_autograd("anymask::forward", _gradients, setup_context=_setup_context)
torch.library.register_autograd("anymask::backward", _no_second_derivative)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None,
    sm_scale: float,
    backend: str | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """`forward` for eager calls; where nothing records, without autograd."""
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if recorded or not _is_unwatched(q) or forward_ad._current_level >= 0 or _C._are_functorch_transforms_active():
        apply: Any = Attention.apply
        output: tuple[Tensor, Tensor] = apply(q, k, v, block_mask, sm_scale, backend, deterministic)
        return output
    return _forward_now(q, k, v, block_mask, sm_scale, backend)


class Attention(torch.autograd.Function):
    """`forward` with the same autograd for eager calls, in a third of its host time.

    Takes the `BlockMask` itself, and its `ctx` first: torch binds the arguments of the newer form by `inspect` at every
    call. Where nothing watches torch's dispatcher, the backend is called without it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_mask: BlockMask | None,
        sm_scale: float,
        backend: str | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        """`(o, lse)`."""
        if _is_unwatched(q):
            output = _forward_now(q, k, v, block_mask, sm_scale, backend)
        else:
            output = forward(q, k, v, mask_tensors(block_mask), sm_scale, backend, deterministic)
        if any(ctx.needs_input_grad):
            _setup_context(ctx, (q, k, v, mask_tensors(block_mask), sm_scale, backend, deterministic), output)
        return output

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        """Gradients of q, k and v; the mask has none."""
        return *_gradients(ctx, do, dlse)[:3], None, None, None, None


def _is_unwatched(t: Tensor) -> bool:
    """Whether a call means the same without torch's dispatcher: no subclass, no mode, no tracing."""
    return type(t) in _PLAIN and not _C._len_torch_dispatch_stack() and not torch.compiler.is_compiling()


_PLAIN = (Tensor, torch.nn.Parameter)


@torch.library.impl("anymask::pack", "CompositeExplicitAutograd")
def _pack(
    nodes: list[int], numbers: list[int], tensors: list[Tensor], q_len: int, kv_len: int, device: torch.device
) -> list[Tensor]:
    packed = pack(mask_from_program(nodes, numbers, tensors), q_len=q_len, kv_len=kv_len, device=device)
    # what an operator returns may not share memory, as all but the words, the large ones, may
    return [t if t is packed.rows.words or t is packed.cols.words else t.clone() for t in packed.tensors()]


@torch.library.register_fake("anymask::pack")
def _pack_fake(
    nodes: list[int], numbers: list[int], tensors: list[Tensor], q_len: int, kv_len: int, device: torch.device
) -> list[Tensor]:
    batch, heads = mask_from_program(nodes, numbers, tensors).planes
    context = torch.library.get_ctx()
    n_full, n_partial = context.new_dynamic_size(), context.new_dynamic_size()

    def empty(*shape: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def lists(length: int) -> list[Tensor]:
        offsets = batch * heads * tiles_over(length) + 1
        return [
            empty(offsets),
            empty(n_full),
            empty(offsets),
            empty(n_partial),
            empty(n_partial, TILE, WORDS),
            empty(batch, heads, tiles_over(length)),
            empty(context.new_dynamic_size(), dtype=torch.uint8),
        ]

    return lists(q_len) + lists(kv_len)


def mask_tensors(block_mask: BlockMask | None) -> list[Tensor]:
    """The mask as the operators take it."""
    return [] if block_mask is None else block_mask.tensors()


def _block_mask(tensors: list[Tensor], q_len: int, kv_len: int) -> BlockMask | None:
    return BlockMask.from_tensors(tensors, q_len, kv_len) if tensors else None


def _no_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """No cast inside a backend; nothing to do, at no cost, where none is asked for."""
    kind = t.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _unit_last_stride(t: Tensor) -> Tensor:
    """`t`, or a contiguous copy of it if its last dimension is not dense in memory."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
