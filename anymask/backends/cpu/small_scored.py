"""Attention within one tile with a bias, as windows of images have one, and with dropout: `small`, with both.

A softcap and sinks are left to `scored`. Letters as in docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anymask.backends.cpu import small
from anymask.backends.cpu.small import LOG2_E, Planes, planes_of
from anymask.block_mask import BlockMask
from anymask.layout import empty_as
from anymask.scores import Lookup, Needs, ScoreGrads, Scores
from anymask.scores.dropout import keep_blocks, keep_scale
from anymask.shapes import LSE, K, O, Q, V


def fits(q: Q, k: K, scores: Scores) -> bool:
    """Whether a plane is one tile, and scores have no softcap and no sinks."""
    return small.fits(q, k) and not scores.softcap and scores.sinks is None


def forward(q: Q, k: K, v: V, block_mask: BlockMask | None, sm_scale: float, scores: Scores) -> tuple[O, LSE]:
    """`(o, lse)`."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    o, lse = empty_as(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=compute)
    terms = _Terms.of(scores, compute)
    for planes in planes_of(q, k, block_mask, compute):
        q_rows = planes.used_queries(planes.queries(q) * (sm_scale * LOG2_E))
        k_rows, v_rows = planes.used_keys(planes.keys(k)), planes.used_keys(planes.keys(v))
        p = terms.scores(q_rows, k_rows, planes)
        m = p.amax(-1, keepdim=True)
        # a row without a key has m = -inf, and -inf - -inf would be NaN
        m = torch.where(m == -float("inf"), 0, m)
        l = p.sub_(m).exp2_().sum(-1, keepdim=True)  # noqa: E741
        _drop(p, _kept(planes, q, k, scores), planes)
        planes.put_queries(o, (p @ v_rows).div_(torch.where(l == 0, 1, l)))
        # in fp64, so that leaving base 2 rounds once
        planes.put_queries(lse[..., None], (l.double().log2() + m) / LOG2_E)
    return o, lse


def backward(
    q: Q,
    k: K,
    v: V,
    lse2: LSE,
    delta: LSE,
    do: O,
    block_mask: BlockMask | None,
    sm_scale: float,
    scores: Scores,
    needs: Needs,
) -> ScoreGrads:
    """All gradients; `lse2` in base 2, `delta` and `do` are 0 for queries without a key."""
    dq, dk, dv = empty_as(q), empty_as(k), empty_as(v)
    terms, sums = _Terms.of(scores, lse2.dtype), _Sums.zeros(q, k, scores, needs, lse2.dtype)
    for planes in planes_of(q, k, block_mask, lse2.dtype):
        q_rows, do_rows = (planes.used_queries(planes.queries(t)) for t in (q, do))
        k_rows, v_rows = (planes.used_keys(planes.keys(t)) for t in (k, v))
        lse_rows, delta_rows = (planes.queries(t[..., None]) for t in (lse2, delta))
        p = terms.scores(q_rows * (sm_scale * LOG2_E), k_rows, planes).sub_(lse_rows).exp2_()
        kept = _kept(planes, q, k, scores)
        ds = _drop(do_rows @ v_rows.mT, kept, planes).sub_(delta_rows).mul_(p)
        sums.add(ds, planes)
        planes.put_queries(dq, (ds @ k_rows).mul_(sm_scale))
        planes.put_keys(dk, (ds.mT @ q_rows).mul_(sm_scale))
        planes.put_keys(dv, _drop(p, kept, planes).mT @ do_rows)
    return ScoreGrads(dq, dk, dv, *sums.of_terms(scores, needs), None)


@dataclass(frozen=True)
class _Terms:
    """What is added to scores, in base 2."""

    compute: torch.dtype
    # the sum of all that samples share, broadcastable to [1, q_heads, q_len, kv_len]; None if there is none
    shared: Tensor | None
    # the others, [batch, q_heads or 1, q_len or 1, kv_len or 1], as they came
    of_samples: tuple[Tensor, ...]

    @staticmethod
    def of(scores: Scores, compute: torch.dtype) -> _Terms:
        """The terms of a call."""
        shared = [t.to(compute) for t in scores.dense if t.shape[0] == 1]
        shared += [lookup.table[None, :, _entries(lookup)].to(compute) for lookup in scores.lookups]
        of_samples = tuple(t for t in scores.dense if t.shape[0] > 1)
        return _Terms(compute, sum(shared[1:], shared[0]) * LOG2_E if shared else None, of_samples)

    def scores(self, q_rows: Tensor, k_rows: Tensor, planes: Planes) -> Tensor:
        """`q @ k^T` with all terms, -inf where the pair does not attend."""
        s = q_rows @ k_rows.mT
        by_head, below_inf = planes.by_head(s), True
        own = [_of_planes(t, planes).to(self.compute) * LOG2_E for t in self.of_samples]
        for term in own if self.shared is None else [_of_planes(self.shared, planes), *own]:
            by_head.add_(term)
            below_inf = below_inf and bool((term < float("inf")).all())
        if planes.bias is not None:
            if below_inf:
                by_head.add_(planes.bias)
            else:
                # whatever the bias of a pair holds that does not attend; this takes ten times as long
                by_head.masked_fill_(planes.bias != 0, -float("inf"))
        return s


@dataclass(frozen=True)
class _Sums:
    """Gradients of the terms so far."""

    # [q_heads, q_len, kv_len], over samples, for all that these share; None if nobody needs it
    shared: Tensor | None
    # in the shapes of the dense terms; None for what samples share, and for what nobody needs
    dense: tuple[Tensor | None, ...]

    @staticmethod
    def zeros(q: Q, k: K, scores: Scores, needs: Needs, compute: torch.dtype) -> _Sums:
        """Before the first planes."""
        shares = any(n and t.shape[0] == 1 for t, n in zip(scores.dense, needs.dense, strict=True))
        of_samples = tuple(
            torch.zeros(t.shape, dtype=compute) if n and t.shape[0] > 1 else None
            for t, n in zip(scores.dense, needs.dense, strict=True)
        )
        shape = *q.shape[1:3], k.shape[2]
        return _Sums(torch.zeros(shape, dtype=compute) if shares or any(needs.tables) else None, of_samples)

    def add(self, ds: Tensor, planes: Planes) -> None:
        """Add the gradients of the scores of planes."""
        by_head = planes.by_head(ds)
        if self.shared is not None:
            self.shared[planes.query_heads] += by_head.sum(0)
        for grad in self.dense:
            if grad is not None:
                target = _of_planes(grad, planes)
                target += by_head.sum_to_size(target.shape)

    def of_terms(self, scores: Scores, needs: Needs) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """The gradients of the dense terms and of the tables."""
        dense, shared = list(self.dense), self.shared
        tables: list[Tensor | None] = [None] * len(scores.lookups)
        if shared is not None:
            for i, (t, needed) in enumerate(zip(scores.dense, needs.dense, strict=True)):
                if needed and t.shape[0] == 1:
                    dense[i] = shared[None].sum_to_size(t.shape)
            for i, (lookup, needed) in enumerate(zip(scores.lookups, needs.tables, strict=True)):
                if needed:
                    heads, pairs = lookup.table.shape[0], _entries(lookup).flatten()
                    summed = shared.flatten(1).sum_to_size(heads, len(pairs))
                    tables[i] = torch.zeros_like(lookup.table).index_add_(1, pairs, summed)
        return tuple(dense), tuple(tables)


def _kept(planes: Planes, q: Q, k: K, scores: Scores) -> Tensor | None:
    """What dropout multiplies weights by, `[samples, q_heads, q_len, kv_len]`; None without dropout."""
    if scores.seed is None:
        return None
    (q_len, kv_len), heads = (q.shape[2], k.shape[2]), planes.query_heads
    b = torch.arange(planes.b.start, planes.b.stop)[:, None, None, None]
    h = torch.arange(heads.start, heads.stop)[:, None, None]
    blocks = torch.arange(-(-q_len // 16)), torch.arange(-(-kv_len // 16))
    kept = keep_blocks(scores.seed, b, h, *blocks, scores.dropout_p)[..., :q_len, :kv_len]
    return kept.to(planes.compute).mul_(keep_scale(scores.dropout_p))


def _drop(p: Tensor, kept: Tensor | None, planes: Planes) -> Tensor:
    """What dropout leaves of the weights of planes, or of their gradients, in place."""
    if kept is not None:
        planes.by_head(p).mul_(kept)
    return p


def _of_planes(t: Tensor, planes: Planes) -> Tensor:
    """The part of a term, or a gradient of its shape, of these planes."""
    t = t[planes.b] if t.shape[0] > 1 else t
    return t[:, planes.query_heads] if t.shape[1] > 1 else t


def _entries(lookup: Lookup) -> Tensor:
    """int64 `[q_len, kv_len]`: which entry of the table each pair reads."""
    return (lookup.q_code[:, None] - lookup.k_code).long()
