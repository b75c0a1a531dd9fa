"""What torch sees of a call with scores: two opaque operators with fakes, autograd, vmap. No arithmetic of pairs here.

They are those of `ops` with the tensors of `Scores` beside the mask. A call without scores comes nowhere near.

`dispatch` is the way in. As in `ops`, it asks torch's dispatcher only where something watches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from anymask import calls, flops, ops, score_vmap, vmap
from anymask.block_mask import BlockMask
from anymask.layout import dense_strides
from anymask.scores import Lookup, Needs, Scores

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
_PARTS = score_vmap.PARTS
_WHAT = "attention with bias, softcap, sinks or dropout"
_NO_FORWARD_MODE = f"{_WHAT} has no forward-mode derivative (jvp); allowed is reverse mode"
_TWICE = f"{_WHAT} was differentiated twice; allowed is one derivative"


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
    """`(o, lse)` of validated inputs."""
    mask, (dense, lookups, diagonal, sinks, seed) = ops.mask_tensors(block_mask), tensors_of(scores)
    numbers = sm_scale, *_numbers(scores), backend, deterministic
    compiling = torch.compiler.is_compiling()
    scored = [*dense, *lookups] if sinks is None else [*dense, *lookups, sinks]
    if compiling or not ops.is_unwatched(q, k, v, *scored):
        if not compiling:
            flops.register()
        output = forward_op(q, k, v, mask, dense, lookups, diagonal, sinks, seed, *numbers)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *scored)):
        counts, run = (len(mask), len(dense)), (block_mask, sm_scale, backend, scores)
        output = ops.apply(
            ScoredAttention, run, counts, diagonal, numbers, q, k, v, sinks, seed, *mask, *dense, *lookups
        )
    else:
        output = calls.forward_scores(q, k, v, block_mask, sm_scale, backend, scores)
    outputs: tuple[Tensor, Tensor] = output
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
    scores = _scores(dense, lookups, diagonal, sinks, seed, softcap, dropout_p)
    return calls.forward_scores(q, k, v, ops.block_mask_of(mask, q, k), sm_scale, backend, scores)


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
    repeatable = deterministic or torch.are_deterministic_algorithms_enabled()
    block_mask = ops.block_mask_of(mask, q, k)
    grads = calls.backward_scores(
        calls.Inputs(q, k, v, o, lse, do), dlse, block_mask, sm_scale, backend, repeatable, scores, asked
    )
    parts = zip(dense, exact_zero, grads.dense, strict=True)
    of_terms = [
        t.new_zeros(t.shape) if is_zero else grad if grad is None else grad.to(t.dtype) for t, is_zero, grad in parts
    ]
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
    # contiguous, whatever the term is
    of_dense = [t.new_empty(t.shape) for t, needed in zip(dense, needs.dense, strict=True) if needed]
    terms = [t for t, needed in zip(lookups[::_PARTS], needs.tables, strict=True) if needed]
    if needs.sinks and sinks is not None:
        terms.append(sinks)
    return [_empty_as(t) for t in (q, k, v)] + of_dense + [lse.new_empty(t.shape) for t in terms]


def _empty_as(t: Tensor, dim: int | None = None) -> Tensor:
    shape = t.shape if dim is None else (*t.shape[:3], dim)
    return t.new_empty_strided(shape, dense_strides(t.shape, t.stride(), dim))


class ScoredAttention(_SingleLevelFunction):
    """The autograd of attention with scores, as `ops.Attention` is without.

    `keyset` is that of the operator below autograd; or what a backend is called with instead, in a tuple.
    """

    @staticmethod
    def forward(
        ctx: Any, keyset: Any, counts: tuple[int, int], diagonal: int, numbers: tuple[Any, ...], *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        """`(o, lse)`; `tensors` are q, k, v, sinks, seed, and in a row mask, dense, lookups, `counts` of those two."""
        q, k, v, sinks, seed, *lists = tensors
        args = q, k, v, *_cut(lists, counts), diagonal, sinks, seed, *numbers
        if isinstance(keyset, tuple):
            o, lse = calls.forward_scores(q, k, v, *keyset)
        else:
            with ops.outer_levels_record():
                o, lse = ops.below_autograd(forward_op, keyset, *args)
        ctx.rest = counts, diagonal, numbers
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, o, lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        """Gradients of q, k, v, sinks, and of those dense terms and tables that want one."""
        counts, diagonal, numbers = ctx.rest
        q, k, v, sinks, seed, *lists, o, lse = ctx.saved_tensors
        mask, dense, lookups = _cut(lists, counts)
        # behind keyset, counts, diagonal and numbers
        *_, of_sinks, _ = ctx.needs_input_grad[4:9]
        _, of_dense, of_lookups = _cut(ctx.needs_input_grad[9:], counts)
        flags = [*of_dense, *of_lookups[::_PARTS], of_sinks]

        def gradients(do: Tensor | None, dlse: Tensor | None) -> list[Tensor]:
            if do is None:
                do = torch.zeros_like(o)
            scored = [*dense, *lookups] if sinks is None else [*dense, *lookups, sinks]
            direct = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            call: Any = _backward if direct and ops.is_unwatched(q, k, do, *scored) else backward_op
            found: list[Tensor] = call(
                q, k, v, o, lse, do, dlse, mask, dense, lookups, diagonal, sinks, seed, *numbers, flags
            )
            return found

        dq, dk, dv, *others = vmap.over_gradients(gradients, do, dlse)
        of_terms = iter(others)
        d_terms = [next(of_terms) if needed else None for needed in (*of_dense, *of_lookups)]
        d_sinks = next(of_terms) if of_sinks else None
        return *[None] * 4, dq, dk, dv, d_sinks, None, *[None] * len(mask), *d_terms


def _cut(values: Sequence[Any], counts: tuple[int, int]) -> tuple[list[Any], list[Any], list[Any]]:
    """Those of the mask, of dense terms, and of lookups."""
    mask, end = counts[0], sum(counts)
    return list(values[:mask]), list(values[mask:end]), list(values[end:])


def _forward_autograd(
    keyset: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: list[Tensor],
    dense: list[Tensor],
    lookups: list[Tensor],
    diagonal: int,
    sinks: Tensor | None,
    seed: Tensor | None,
    *numbers: Any,
) -> tuple[Tensor, Tensor]:
    scored = [t for t in (q, k, v, sinks, *dense, *lookups) if t is not None]
    if ops.is_recorded(_NO_FORWARD_MODE, *scored):
        counts = len(mask), len(dense)
        with ops.one_level():
            output: tuple[Tensor, Tensor] = ops.apply(
                ScoredAttention, keyset, counts, diagonal, numbers, q, k, v, sinks, seed, *mask, *dense, *lookups
            )
            return output
    outputs: tuple[Tensor, Tensor] = ops.below_autograd(
        forward_op, keyset, q, k, v, mask, dense, lookups, diagonal, sinks, seed, *numbers
    )
    return outputs


def _backward_autograd(keyset: Any, *args: Any) -> list[Tensor]:
    tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, Tensor)]
    if ops.is_recorded(_NO_FORWARD_MODE, *tensors):
        with ops.one_level():
            return list(ops.apply(ops.Once, keyset, backward_op, _TWICE, args, *tensors))
    found: list[Tensor] = ops.below_autograd(backward_op, keyset, *args)
    return found


_LIBRARY.impl("scored_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("scored_backward", _backward, "CompositeExplicitAutograd")
_LIBRARY.impl("scored_forward", _forward_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("scored_backward", _backward_autograd, "Autograd", with_keyset=True)
torch.library.register_vmap("anymask::scored_forward", score_vmap.forward_rule_of(forward_op))
torch.library.register_vmap("anymask::scored_backward", score_vmap.backward_rule_of(backward_op))
