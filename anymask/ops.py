"""What torch sees: three opaque operators with fakes, autograd and vmap. No arithmetic here.

The mask travels as the tensors of a `BlockMask`, so backward cannot lose it, and a new mask with the same shapes never
recompiles. An empty list of tensors means every pair. Operators are defined by schema and not by
`torch.library.custom_op`, whose checks at every call take more host time than a small pass takes on a GPU.

`dispatch` is the way in. Where nothing watches torch's dispatcher it calls `run_forward`, under `Attention` if
gradients are recorded; else the operator, whose autograd kernel uses the same `Attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import _C, Tensor
from torch._library.fake_impl import allocate_size
from torch._ops import _get_dispatch_mode_pre_dispatch
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from anymask import backends, flops, formats, validate
from anymask.block_mask import BlockMask
from anymask.mask import Mask
from anymask.mask.program import mask_from_program, program_of
from anymask.packing import cache, pack
from anymask.tiles import TILE, WORDS, tiles_over

_LIBRARY = torch.library.Library("anymask", "FRAGMENT")
_LIBRARY.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor[] mask, float sm_scale, str? backend, bool deterministic) -> "
    "(Tensor, Tensor)"
)
_LIBRARY.define(
    "backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, Tensor? dlse, Tensor[] mask, "
    "float sm_scale, str? backend, bool deterministic) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "pack(int[] nodes, SymInt[] numbers, Tensor[] tensors, SymInt q_len, SymInt kv_len, Device device) -> Tensor[]"
)
_LIBRARY.define("attended(Tensor mask) -> Tensor")
_LIBRARY.define("seen(Tensor additive) -> Tensor")

# `(o, lse)` of validated inputs by the named backend, or by the first that can
forward_op = torch.ops.anymask.forward.default
# `(dq, dk, dv)`, contiguous
backward_op = torch.ops.anymask.backward.default
# tensors of `pack(mask_from_program(nodes, numbers, tensors), ...)`: packing inside a compiled function
pack_op = torch.ops.anymask.pack.default
# `mask != 0` of a mask that is not an additive one: `check_not_additive` inside a compiled function
attended_op = torch.ops.anymask.attended.default
# `additive == 0` of a mask of 0 and minus infinity: `formats.from_additive` inside a compiled function
seen_op = torch.ops.anymask.seen.default

_PLAIN = (Tensor, torch.nn.Parameter)


def dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None,
    sm_scale: float,
    backend: str | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """`(o, lse)` of validated inputs: through torch's dispatcher only where something watches it.

    Without it a call takes a third of the host time.
    """
    compiling = torch.compiler.is_compiling()
    if compiling or not _is_unwatched(q, k, v):
        if not compiling:
            flops.register()
        if backend == "reference" and not compiling and forward_ad._current_level >= 0:
            # operations of torch, which have the derivatives that ours have not
            output = run_forward(q, k, v, block_mask, sm_scale, backend)
        else:
            output = forward_op(q, k, v, mask_tensors(block_mask), sm_scale, backend, deterministic)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        output = _apply(Attention, None, q, k, v, block_mask, sm_scale, backend, deterministic)
    else:
        output = run_forward(q, k, v, block_mask, sm_scale, backend)
    outputs: tuple[Tensor, Tensor] = output
    return outputs


def _is_unwatched(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a call means the same without torch's dispatcher: no subclass, mode, transform or forward derivative."""
    return (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and not q.is_meta
        and not _C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and not _C._are_functorch_transforms_active()
    )


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """`(o, lse)` by a backend."""
    if q.numel() == 0 or k.shape[2] == 0 or v.shape[3] == 0:
        o, lse = _forward_fake(q, k, v)
        return o.zero_(), lse.fill_(-float("inf"))
    q, k, v = _unit_last_stride(q), _unit_last_stride(k), _unit_last_stride(v)
    chosen = backends.choose(q, k, v, block_mask, backend)
    with _no_autocast(q):
        outputs: tuple[Tensor, Tensor] = chosen.forward(q, k, v, block_mask, sm_scale)
    return outputs


def run_backward(
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
    """`(dq, dk, dv)` by a backend; the arguments are those of the operator."""
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        dq, dk, dv = _backward_fake(q, k, v)
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, do = (_unit_last_stride(t) for t in (q, k, v, do))
    block_mask = _block_mask(mask, q, k)
    chosen = backends.choose(q, k, v, block_mask, backend)
    repeatable = deterministic or torch.are_deterministic_algorithms_enabled()
    with _no_autocast(q):
        grads: tuple[Tensor, Tensor, Tensor] = chosen.backward(
            q, k, v, o, lse, do, dlse, block_mask, sm_scale, repeatable
        )
    return grads


class Attention(_SingleLevelFunction):
    """The autograd of attention.

    Takes the `BlockMask` itself, and its `ctx` first: torch binds the arguments of the newer form by `inspect` at every
    call. `keyset` None calls a backend, else the operator below autograd. torch.func's transforms record through the
    operator, one level at a time, so this is a function of a single level.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_mask: BlockMask | None,
        sm_scale: float,
        backend: str | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        """`(o, lse)`."""
        mask = mask_tensors(block_mask)
        if keyset is None:
            o, lse = run_forward(q, k, v, block_mask, sm_scale, backend)
        else:
            with _outer_levels_record():
                o, lse = _below_autograd(forward_op, keyset, q, k, v, mask, sm_scale, backend, deterministic)
        ctx.rest = sm_scale, backend, deterministic
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, o, lse, *mask)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        """Gradients of q, k and v; the mask has none."""
        q, k, v, o, lse, *mask = ctx.saved_tensors
        for grad in (do, dlse):
            if grad is not None and _C._functorch.is_legacy_batchedtensor(grad):
                raise NotImplementedError(
                    "attention has no batched gradients (is_grads_batched=True, vectorize=True); allowed are a loop, "
                    "and torch.func.vmap over the function of torch.func.vjp"
                )
        if do is None:
            do = torch.zeros_like(o)
        # a gradient that is recorded would be differentiated again: the operator says no, and operations of torch yes
        direct = ctx.rest[1] == "reference" if torch.is_grad_enabled() else _is_unwatched(q, k, do)
        direct = direct and not torch.compiler.is_compiling()
        grads = (run_backward if direct else backward_op)(q, k, v, o, lse, do, dlse, mask, *ctx.rest)
        return None, *grads, None, None, None, None


class _Once(_SingleLevelFunction):
    """The gradients of attention, which have none."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        """`(dq, dk, dv)`."""
        with _outer_levels_record():
            return _below_autograd(backward_op, keyset, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Raise NotImplementedError."""
        raise NotImplementedError(
            "attention was differentiated twice; allowed is one derivative, or backend='reference'"
        )


def _forward_autograd(
    keyset: Any, q: Tensor, k: Tensor, v: Tensor, mask: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
    if _is_recorded(q, k, v):
        with _one_level():
            output: tuple[Tensor, Tensor] = _apply(Attention, keyset, q, k, v, _block_mask(mask, q, k), *rest)
            return output
    outputs: tuple[Tensor, Tensor] = _below_autograd(forward_op, keyset, q, k, v, mask, *rest)
    return outputs


def _backward_autograd(keyset: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _is_recorded(*[t for t in args if isinstance(t, Tensor)]):
        with _one_level():
            output: tuple[Tensor, Tensor, Tensor] = _apply(_Once, keyset, *args)
            return output
    grads: tuple[Tensor, Tensor, Tensor] = _below_autograd(backward_op, keyset, *args)
    return grads


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def _is_recorded(*tensors: Tensor) -> bool:
    """Whether gradients are recorded; raises NotImplementedError for a forward-mode derivative, which would be lost."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "attention has no forward-mode derivative (jvp); allowed is reverse mode, or backend='reference'"
        )
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _below_autograd(op: Any, keyset: Any, *args: Any) -> Any:
    with _C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _C._after_autograd_keyset, *args)


def _one_level() -> AbstractContextManager[Any]:
    """What torch.func asks for where one of its transforms reaches an autograd function of a single level."""
    if not _C._are_functorch_transforms_active():
        return nullcontext()
    from torch._functorch import autograd_function

    context: AbstractContextManager[Any] = cast(Any, autograd_function).enable_single_level_autograd_function()
    return context


def _outer_levels_record() -> AbstractContextManager[Any]:
    """Inside an autograd function, where torch records nothing: the outer transforms of torch.func do, at their level.

    Without it a second derivative by two of them would be 0.
    """
    return torch.enable_grad() if _C._are_functorch_transforms_active() else nullcontext()


def _forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: list[Tensor], sm_scale: float, backend: str | None, deterministic: bool
) -> tuple[Tensor, Tensor]:
    return run_forward(q, k, v, _block_mask(mask, q, k), sm_scale, backend)


@torch.library.register_fake("anymask::forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.register_fake("anymask::backward")
def _backward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attended_kernel(mask: Tensor) -> Tensor:
    validate.check_not_additive(mask)
    return mask != 0


torch.library.register_fake("anymask::attended", lambda mask: mask.new_empty(mask.shape, dtype=torch.bool))


def _seen_kernel(additive: Tensor) -> Tensor:
    formats.from_additive(additive)
    return additive == 0


torch.library.register_fake("anymask::seen", lambda additive: additive == 0)

_KERNELS = {"forward": _forward_kernel, "backward": run_backward, "attended": _attended_kernel, "seen": _seen_kernel}
for _name, _kernel in _KERNELS.items():
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("forward", _forward_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("backward", _backward_autograd, "Autograd", with_keyset=True)


def _vmap(op: Any, n_tensors: int) -> Callable[..., Any]:
    """The rule of an operator under `torch.vmap`: the mapped dimension becomes a part of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        tensors, (mask, *rest), n = args[:n_tensors], args[n_tensors:], info.batch_size
        if any(d is not None for d in in_dims[n_tensors]):
            raise NotImplementedError("mask is mapped by torch.vmap; allowed is one mask, or a batch instead of vmap")
        dims = in_dims[:n_tensors]
        stacked = [
            None if t is None else t.expand(n, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, dims, strict=True)
        ]
        if not mask or mask[ORDER].shape[0] == 1:
            outputs = op(*[None if t is None else t.flatten(0, 1) for t in stacked], mask, *rest)
            results = tuple(t.unflatten(0, (n, t.shape[0] // n)) for t in outputs)
        else:
            # each sample has a plane of its own
            calls = [op(*[None if t is None else t[i] for t in stacked], mask, *rest) for i in range(n)]
            results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule


# where the operators' list of tensors has `rows.order [mask_batch, mask_heads, lines]`
ORDER = 5

torch.library.register_vmap("anymask::forward", _vmap(forward_op, 3))
torch.library.register_vmap("anymask::backward", _vmap(backward_op, 7))


def pack_for(q: Tensor, mask: Mask | BlockMask | None, kv_len: int, check: Any = None) -> BlockMask | None:
    """The mask as `dispatch` takes it for these queries, packed now or by an earlier call.

    `check` is called before a mask is packed that was not remembered, and may raise.
    """
    if mask is None:
        return None
    if is_traced():
        if isinstance(mask, BlockMask):
            return mask
        program, q_len = program_of(mask), q.shape[2]
        if program is None:
            raise ValueError("mask is a from_function mask inside a traced function; allowed is its BlockMask")
        return BlockMask.from_tensors(pack_op(*program, q_len, kv_len, q.device), q_len, kv_len)
    if has_no_values(q):
        # nothing to mask, and sizes do not depend on it
        return None
    if isinstance(mask, BlockMask):
        return mask
    return cache.masks.pack(mask, q.shape[2], kv_len, q.device, check)


def is_traced() -> bool:
    """Whether operations are written down to be run again, with other values.

    Not where dynamo asks a function that it does not look into, such as that of `nn.MultiheadAttention`, for sizes.
    """
    if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return True
    if not _C._len_torch_dispatch_stack():
        return False
    keys = _C._TorchDispatchModeKey.PROXY, _C._TorchDispatchModeKey.FUNCTIONAL
    return any(_C._get_dispatch_mode(key) or _get_dispatch_mode_pre_dispatch(key) for key in keys)


def has_no_values(t: Tensor) -> bool:
    """Whether a tensor is of the device meta, or a fake of another."""
    if t.is_meta or type(t) in _PLAIN:
        return t.is_meta
    from torch._subclasses.fake_tensor import is_fake

    return bool(is_fake(t))


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
    n_full, n_partial = _unknown_size(), _unknown_size()

    def empty(*shape: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def lists(length: int) -> list[Tensor]:
        # torch asks whether a dimension is 1, and an answer would tie a symbol to lengths beyond a tile, or within one
        lines = _unknown_size() if isinstance(length, torch.SymInt) else tiles_over(length)
        offsets = batch * heads * lines + 1
        return [
            empty(offsets),
            empty(n_full),
            empty(offsets),
            empty(n_partial),
            empty(n_partial, TILE, WORDS),
            empty(batch, heads, lines),
            empty(_unknown_size(), dtype=torch.uint8),
        ]

    return lists(q_len) + lists(kv_len)


def _unknown_size() -> torch.SymInt:
    """A size that depends on values, in a fake.

    `new_dynamic_size` of torch's context refuses it outside of `fullgraph=True`, and the graph would break.
    """
    shape_env = torch.library.get_ctx()._shape_env
    if shape_env is None:
        raise NotImplementedError("a mask inside fake tensors without symbolic sizes; allowed is its BlockMask")
    size: torch.SymInt = allocate_size(shape_env)
    return size


def mask_tensors(block_mask: BlockMask | None) -> list[Tensor]:
    """The mask as the operators take it."""
    return [] if block_mask is None else block_mask.tensors()


def _block_mask(tensors: list[Tensor], q: Tensor, k: Tensor) -> BlockMask | None:
    return BlockMask.from_tensors(tensors, q.shape[2], k.shape[2]) if tensors else None


def _no_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """No cast inside a backend; nothing to do, at no cost, where none is asked for."""
    kind = t.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _unit_last_stride(t: Tensor) -> Tensor:
    """`t`, or a contiguous copy of it if its last dimension is not dense in memory."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
