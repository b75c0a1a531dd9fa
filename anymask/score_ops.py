"""What torch sees of a call with scores: two opaque operators with fakes and autograd. No arithmetic of pairs here.

They are those of `ops` with the tensors of `Scores` beside the mask. A call without scores comes nowhere near.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from anymask import backends, flops, ops
from anymask.block_mask import BlockMask
from anymask.calls import no_autocast, unit_last_stride
from anymask.layout import dense_strides
from anymask.scores import Lookup, Needs, ScoreGrads, Scores

_LIBRARY = torch.library.Library("anymask", "FRAGMENT")
_SCORES = (
    "Tensor[] mask, Tensor[] dense, Tensor[] lookups, int diagonal, Tensor? sinks, Tensor? seed, float sm_scale, "
    "float softcap, float dropout_p, str? backend, bool deterministic"
)
_LIBRARY.define(f"scored_forward(Tensor q, Tensor k, Tensor v, {_SCORES}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "scored_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, Tensor? dlse, "
    f"{_SCORES}, bool[] needs) -> Tensor[]"
)
# `(o, lse)`; `lookups` are `(table, q_code, k_code)` in a row, and bit n of `diagonal` says whether the n-th is
forward_op = torch.ops.anymask.scored_forward.default
# `[dq, dk, dv]` and, in their order, the gradients of those dense terms, tables and sinks that are needed
backward_op = torch.ops.anymask.scored_backward.default
# tensors of a lookup
_PARTS = 3


def dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None,
    sm_scale: float,
    backend: str | None,
    deterministic: bool,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """`(o, lse)` of validated inputs.

    Raises:
        NotImplementedError: under a transform of torch.func, or with a forward-mode derivative.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        if _C._are_functorch_transforms_active():
            raise NotImplementedError(
                "bias, softcap, sinks and dropout have no transforms of torch.func (vmap, grad, ...); allowed are "
                "torch.autograd, and a batch instead of vmap"
            )
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                "attention with bias, softcap, sinks or dropout has no forward-mode derivative; allowed is reverse mode"
            )
        if _C._len_torch_dispatch_stack():
            flops.register()
    outputs: tuple[Tensor, Tensor] = forward_op(
        q, k, v, ops.mask_tensors(block_mask), *tensors_of(scores), sm_scale, *_numbers(scores), backend, deterministic
    )
    return outputs


def tensors_of(scores: Scores) -> tuple[list[Tensor], list[Tensor], int, Tensor | None, Tensor | None]:
    """The tensors of scores as the operators take them."""
    lookups = [t for lookup in scores.lookups for t in (lookup.table, lookup.q_code, lookup.k_code)]
    diagonal = sum(lookup.is_diagonal << n for n, lookup in enumerate(scores.lookups))
    return list(scores.dense), lookups, diagonal, scores.sinks, scores.seed


def _numbers(scores: Scores) -> tuple[float, float]:
    return scores.softcap, scores.dropout_p


def _scores(
    dense: Sequence[Tensor],
    lookups: Sequence[Tensor],
    diagonal: int,
    sinks: Tensor | None,
    seed: Tensor | None,
    softcap: float,
    dropout_p: float,
) -> Scores:
    parts = zip(lookups[::_PARTS], lookups[1::_PARTS], lookups[2::_PARTS], strict=True)
    found = [Lookup(*part, bool(diagonal >> n & 1)) for n, part in enumerate(parts)]
    return Scores(tuple(dense), tuple(found), softcap, sinks, dropout_p, seed)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: list[Tensor],
    dense: list[Tensor],
    lookups: list[Tensor],
    diagonal: int,
    sinks: Tensor | None,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    sm_scale, softcap, dropout_p, backend, _ = rest
    if q.numel() == 0 or k.shape[2] == 0 or v.shape[3] == 0:
        o, lse = _forward_fake(q, k, v)
        lse.fill_(-float("inf"))
        if k.shape[2] == 0 and sinks is not None:
            # they are all there is
            lse.copy_(sinks[:, None].expand(lse.shape))
        return o.zero_(), lse
    scores = _scores(dense, lookups, diagonal, sinks, seed, softcap, dropout_p)
    block_mask = ops.block_mask_of(mask, q, k)
    q, k, v = (unit_last_stride(t) for t in (q, k, v))
    chosen = backends.choose(q, k, v, block_mask, backend, scores)
    with no_autocast(q):
        outputs: tuple[Tensor, Tensor] = chosen.forward(q, k, v, block_mask, sm_scale, scores)
    return outputs


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    mask: list[Tensor],
    dense: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    lookups, diagonal, sinks, seed, sm_scale, softcap, dropout_p, backend, deterministic, flags = rest
    needs = _needs(flags, len(dense))
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        zeros = [t.zero_() for t in _backward_fake(q, k, v, o, lse, do, dlse, mask, dense, *rest)]
        if needs.sinks and dlse is not None and k.shape[2] == 0:
            zeros[-1] += dlse.sum((0, 2))
        return zeros
    scores = _scores(dense, lookups, diagonal, sinks, seed, softcap, dropout_p)
    # one number for all keys of a query changes nothing but lse, and what a softcap or a sink makes of the scores
    shifts = not softcap and sinks is None and dlse is None
    exact_zero = [n and shifts and t.shape[3] == 1 for t, n in zip(dense, needs.dense, strict=True)]
    asked = needs._replace(dense=tuple(n and not zero for n, zero in zip(needs.dense, exact_zero, strict=True)))
    block_mask = ops.block_mask_of(mask, q, k)
    q, k, v, do = (unit_last_stride(t) for t in (q, k, v, do))
    chosen = backends.for_gradients(backends.choose(q, k, v, block_mask, backend, scores), scores)
    repeatable = deterministic or torch.are_deterministic_algorithms_enabled()
    with no_autocast(q):
        grads: ScoreGrads = chosen.backward_scores(
            q, k, v, o, lse, do, dlse, block_mask, sm_scale, repeatable, scores, asked
        )
    parts = zip(dense, exact_zero, grads.dense, strict=True)
    of_terms = [lse.new_zeros(t.shape) if is_zero else grad for t, is_zero, grad in parts]
    return [*grads[:3], *[t for t in (*of_terms, *grads.tables, grads.sinks) if t is not None]]


def _needs(flags: Sequence[bool], n_dense: int) -> Needs:
    """Of a row of flags: one for each dense term, one for each table, one for the sinks."""
    return Needs(tuple(flags[:n_dense]), tuple(flags[n_dense:-1]), flags[-1])


@torch.library.register_fake("anymask::scored_forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_as(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.register_fake("anymask::scored_backward")
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    mask: list[Tensor],
    dense: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    lookups, _, sinks, *_, flags = rest
    needs = _needs(flags, len(dense))
    terms = [t for t, needed in zip(dense, needs.dense, strict=True) if needed]
    terms += [t for t, needed in zip(lookups[::_PARTS], needs.tables, strict=True) if needed]
    if needs.sinks and sinks is not None:
        terms.append(sinks)
    # contiguous, whatever the term is
    return [_empty_as(t) for t in (q, k, v)] + [lse.new_empty(t.shape) for t in terms]


def _empty_as(t: Tensor, dim: int | None = None) -> Tensor:
    shape = t.shape if dim is None else (*t.shape[:3], dim)
    return t.new_empty_strided(shape, dense_strides(t.shape, t.stride(), dim))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, dense, lookups, diagonal, sinks, seed, *numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.counts, ctx.diagonal, ctx.numbers = (len(mask), len(dense)), diagonal, numbers
    ctx.save_for_backward(q, k, v, *output, sinks, seed, *mask, *dense, *lookups)


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    ops.refuse_batched(do, dlse)
    q, k, v, o, lse, sinks, seed, *lists = ctx.saved_tensors
    n_mask, n_dense = ctx.counts
    mask, dense, lookups = lists[:n_mask], lists[n_mask : n_mask + n_dense], lists[n_mask + n_dense :]
    needed = ctx.needs_input_grad
    flags = [*needed[4], *needed[5][::_PARTS], needed[7]]
    do = torch.zeros_like(o) if do is None else do
    dq, dk, dv, *others = backward_op(
        q, k, v, o, lse, do, dlse, mask, dense, lookups, ctx.diagonal, sinks, seed, *ctx.numbers, flags
    )
    of_terms = iter(others)
    d_dense = [next(of_terms).to(t.dtype) if n else None for t, n in zip(dense, needed[4], strict=True)]
    d_lookups = [next(of_terms) if n else None for n in needed[5]]
    d_sinks = next(of_terms) if needed[7] else None
    return dq, dk, dv, [None] * n_mask, d_dense, d_lookups, None, d_sinks, *[None] * 6


def _refuse_second(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "attention with bias, softcap, sinks or dropout was differentiated twice; allowed is one derivative"
    )


_LIBRARY.impl("scored_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("scored_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_autograd("anymask::scored_forward", _differentiate, setup_context=_save)
torch.library.register_autograd("anymask::scored_backward", _refuse_second)
