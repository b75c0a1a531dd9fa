"""What torch sees: two opaque operators with fakes, autograd and vmap. No arithmetic here.

The mask travels as the tensors of a `BlockMask`, so backward cannot lose it, and a new mask with the same shapes never
recompiles. An empty list of tensors means every pair. Operators are defined by schema and not by
`torch.library.custom_op`, whose checks at every call take more host time than a small pass takes on a GPU.

`dispatch` is the way in. Where nothing watches torch's dispatcher it calls a backend, under `Attention` if
gradients are recorded; else the operator, whose autograd kernel uses the same `Attention`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from anymask import calls, flops, validate, vmap
from anymask.block_mask import BlockMask
from anymask.layout import dense_strides

_LIBRARY = torch.library.Library("anymask", "FRAGMENT")
_LIBRARY.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor[] mask, float sm_scale, str? backend, bool deterministic, "
    "Tensor? scale=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, Tensor? dlse, Tensor[] mask, "
    "float sm_scale, str? backend, bool deterministic, Tensor? scale=None) -> (Tensor, Tensor, Tensor)"
)
# `(o, lse)` of validated inputs by the named backend, or by the first that can; `scale`, a float64 number on the CPU,
# stands for `sm_scale` where that is no constant of a compiled function, which would be compiled for each value
forward_op = torch.ops.anymask.forward.default
# `(dq, dk, dv)`, in the layouts of q, k and v
backward_op = torch.ops.anymask.backward.default
_PLAIN = (Tensor, torch.nn.Parameter)
_NO_FORWARD_MODE = "attention has no forward-mode derivative (jvp); allowed is reverse mode, or backend='reference'"
_TWICE = "attention was differentiated twice; allowed is one derivative, or backend='reference'"


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
    if compiling or not is_unwatched(q, k, v):
        if not compiling:
            flops.register()
        if backend == "reference" and not compiling and forward_ad._current_level >= 0:
            # operations of torch, which have the derivatives that ours have not
            output = calls.forward(q, k, v, block_mask, sm_scale, backend)
        else:
            sm_scale, scale = _number_and_tensor(sm_scale) if compiling else (sm_scale, None)
            output = forward_op(q, k, v, mask_tensors(block_mask), sm_scale, backend, deterministic, scale)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        output = apply(Attention, None, q, k, v, block_mask, sm_scale, backend, deterministic, None)
    else:
        output = calls.forward(q, k, v, block_mask, sm_scale, backend)
    outputs: tuple[Tensor, Tensor] = output
    return outputs


def _number_and_tensor(sm_scale: Any) -> tuple[float, Tensor | None]:
    """`sm_scale` and `scale` of the operators, inside a compiled function."""
    if validate.has_static_value(sm_scale):
        return sm_scale, None
    # torch makes the number an input of the graph where it is a factor of a tensor, and this product is exact
    return 1.0, torch.ones((), dtype=torch.float64, device="cpu") * sm_scale


def is_unwatched(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    """Whether a call means the same without torch's dispatcher: no subclass, mode, transform or forward derivative."""
    return (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and not (others and any(type(t) not in _PLAIN for t in others))
        and not q.is_meta
        and not _C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and not _C._are_functorch_transforms_active()
    )


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
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)` by a backend; the arguments are those of the operator."""
    repeatable = deterministic or torch.are_deterministic_algorithms_enabled()
    block_mask, sm_scale = block_mask_of(mask, q, k), _scale(sm_scale, scale)
    return calls.backward(q, k, v, o, lse, do, dlse, block_mask, sm_scale, backend, repeatable)


class Attention(_SingleLevelFunction):
    """The autograd of attention.

    Takes its `ctx` first: torch binds the arguments of the newer form by `inspect` at every call. `keyset` None calls a
    backend, with the `BlockMask`, else the operator below autograd, with the tensors that it was given. torch.func's
    transforms record through the operator, one level at a time, so this is a function of a single level.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: BlockMask | list[Tensor] | None,
        sm_scale: float,
        backend: str | None,
        deterministic: bool,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`(o, lse)`."""
        if isinstance(mask, list):
            tensors = mask
            with outer_levels_record():
                o, lse = below_autograd(forward_op, keyset, q, k, v, tensors, sm_scale, backend, deterministic, scale)
        else:
            tensors = mask_tensors(mask)
            o, lse = calls.forward(q, k, v, mask, sm_scale, backend)
        ctx.rest = sm_scale, backend, deterministic
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, o, lse, scale, *tensors)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        """Gradients of q, k and v; the mask has none."""
        q, k, v, o, lse, scale, *mask = ctx.saved_tensors

        def gradients(do: Tensor | None, dlse: Tensor | None) -> Any:
            if do is None:
                do = torch.zeros_like(o)
            # a gradient that is recorded would be differentiated again: the operator says no, operations of torch yes
            direct = ctx.rest[1] == "reference" if torch.is_grad_enabled() else is_unwatched(q, k, do)
            direct = direct and not torch.compiler.is_compiling()
            call: Any = run_backward if direct else backward_op
            return call(q, k, v, o, lse, do, dlse, mask, *ctx.rest, scale)

        return None, *vmap.over_gradients(gradients, do, dlse), None, None, None, None, None


class Once(_SingleLevelFunction):
    """An operator's gradients, which have none."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, op: Any, refusal: str, args: tuple[Any, ...], *tensors: Tensor) -> Any:
        """What `op(*args)` returns; `tensors` are all of `args`, those of lists too, for torch to see."""
        ctx.refusal = refusal
        with outer_levels_record():
            found = below_autograd(op, keyset, *args)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Raise NotImplementedError."""
        raise NotImplementedError(ctx.refusal)


def _forward_autograd(
    keyset: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: list[Tensor],
    sm_scale: float,
    backend: str | None,
    deterministic: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rest = sm_scale, backend, deterministic, scale
    if not torch.is_grad_enabled() and is_unwatched(q, k, v):
        # what a compiled graph runs: nothing is below but the kernel
        return _forward_kernel(q, k, v, mask, *rest)
    if is_recorded(_NO_FORWARD_MODE, q, k, v):
        with one_level():
            output: tuple[Tensor, Tensor] = apply(Attention, keyset, q, k, v, mask, *rest)
            return output
    outputs: tuple[Tensor, Tensor] = below_autograd(forward_op, keyset, q, k, v, mask, *rest)
    return outputs


def _backward_autograd(keyset: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.is_grad_enabled() and is_unwatched(args[0], args[1], args[5]):
        return run_backward(*args)
    tensors = [t for t in args if isinstance(t, Tensor)]
    if is_recorded(_NO_FORWARD_MODE, *tensors):
        with one_level():
            output: tuple[Tensor, Tensor, Tensor] = apply(Once, keyset, backward_op, _TWICE, args, *tensors)
            return output
    grads: tuple[Tensor, Tensor, Tensor] = below_autograd(backward_op, keyset, *args)
    return grads


def apply(function: Any, *args: Any) -> Any:
    """What an autograd function returns."""
    return function.apply(*args)


def is_recorded(refusal: str, *tensors: Tensor) -> bool:
    """Whether gradients are recorded; raises NotImplementedError for a forward-mode derivative, which would be lost."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(refusal)
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def below_autograd(op: Any, keyset: Any, *args: Any) -> Any:
    """What an operator returns to its own autograd kernel."""
    with _C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _C._after_autograd_keyset, *args)


def one_level() -> AbstractContextManager[Any]:
    """What torch.func asks for where one of its transforms reaches an autograd function of a single level."""
    if not _C._are_functorch_transforms_active():
        return nullcontext()
    from torch._functorch import autograd_function

    context: AbstractContextManager[Any] = cast(Any, autograd_function).enable_single_level_autograd_function()
    return context


def outer_levels_record() -> AbstractContextManager[Any]:
    """Inside an autograd function, where torch records nothing: the outer transforms of torch.func do, at their level.

    Without it a second derivative by two of them would be 0.
    """
    return torch.enable_grad() if _C._are_functorch_transforms_active() else nullcontext()


def _forward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: list[Tensor],
    sm_scale: float,
    backend: str | None,
    deterministic: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return calls.forward(q, k, v, block_mask_of(mask, q, k), _scale(sm_scale, scale), backend)


def _scale(sm_scale: float, scale: Tensor | None) -> float:
    if scale is None:
        return sm_scale
    checked: float = validate.check_scale("scale", scale.item())
    return checked


@torch.library.register_fake("anymask::forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_as(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.register_fake("anymask::backward")
def _backward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_as(q), _empty_as(k), _empty_as(v)


def _empty_as(t: Tensor, dim: int | None = None) -> Tensor:
    """`layout.empty_as` of sizes that may be symbols, which nothing may remember."""
    shape = t.shape if dim is None else (*t.shape[:3], dim)
    return t.new_empty_strided(shape, dense_strides(t.shape, t.stride(), dim))


_LIBRARY.impl("forward", _forward_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("backward", run_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("forward", _forward_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("backward", _backward_autograd, "Autograd", with_keyset=True)


torch.library.register_vmap("anymask::forward", vmap.rule_of(forward_op, 3))
torch.library.register_vmap("anymask::backward", vmap.rule_of(backward_op, 7))


def mask_tensors(block_mask: BlockMask | None) -> list[Tensor]:
    """The mask as the operators take it."""
    return [] if block_mask is None else block_mask.first_tensors()


def block_mask_of(tensors: list[Tensor], q: Tensor, k: Tensor) -> BlockMask | None:
    """The mask of the tensors that the operators take."""
    return BlockMask.from_tensors(tensors, q.shape[2], k.shape[2]) if tensors else None
