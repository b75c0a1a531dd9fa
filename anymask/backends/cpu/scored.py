"""Attention with a bias, a softcap, sinks or dropout, over the tiles of the mask. Letters as in docs/kernels.md.

Terms of the bias are read for the pairs of a step, and their gradients are summed as the steps go, so that nothing of
all pairs exists unless a term has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anymask.backends.cpu import small_scored
from anymask.backends.cpu.small import LOG2_E
from anymask.backends.cpu.steps import Call, Step, TileRow
from anymask.block_mask import BlockMask
from anymask.layout import empty_as
from anymask.scores import Lookup, Needs, ScoreGrads, Scores
from anymask.scores.dropout import keep_blocks, keep_scale
from anymask.shapes import LSE, K, O, Q, V
from anymask.tiles import TILE


def forward(q: Q, k: K, v: V, block_mask: BlockMask | None, sm_scale: float, scores: Scores) -> tuple[O, LSE]:
    """`(o, lse)`."""
    if small_scored.fits(q, k, scores):
        return small_scored.forward(q, k, v, block_mask, sm_scale, scores)
    call = Call.of(q, k, v, block_mask)
    o = empty_as(q, v.shape[3]).zero_()
    lse = q.new_full(q.shape[:3], -float("inf"), dtype=call.compute)
    if scores.sinks is not None:
        lse.copy_(scores.sinks[:, None].expand_as(lse))
    for tile_row in call.tile_rows(many_samples=True):
        q_rows = call.used_rows(q, tile_row) * sm_scale
        acc = q_rows.new_zeros(*q_rows.shape[:-1], v.shape[3])
        # a sink is a key that has been seen already
        m = call.rows(lse[..., None], tile_row)[..., 0] * LOG2_E
        l = (m != -float("inf")).to(m.dtype)  # noqa: E741
        for step in call.steps(tile_row):
            pairs = _Pairs.of(call, scores, tile_row, step)
            s, _ = pairs.change(q_rows @ call.tiles(call.k, tile_row, step).mT)
            m_new = torch.maximum(m, s.amax(-1))
            # a row with no key yet has m = -inf, and -inf - -inf would be NaN
            m_safe = torch.where(m_new == -float("inf"), 0, m_new)
            alpha, p = torch.exp2(m - m_safe), s.sub_(m_safe[..., None]).exp2_()
            l = l * alpha + p.sum(-1)  # noqa: E741
            acc = acc.mul_(alpha[..., None]) + pairs.drop(p) @ call.tiles(call.v, tile_row, step)
            m = m_new
        acc /= torch.where(l == 0, 1, l)[..., None]
        call.put_rows(o, tile_row, acc)
        # in fp64, so that leaving base 2 rounds once
        call.put_rows(lse[..., None], tile_row, (m.double() + l.double().log2())[..., None] / LOG2_E)
    return o, lse


def backward(
    q: Q,
    k: K,
    v: V,
    o: O,
    lse: LSE,
    do: O,
    dlse: LSE | None,
    block_mask: BlockMask | None,
    sm_scale: float,
    scores: Scores,
    needs: Needs,
) -> ScoreGrads:
    """All gradients."""
    # where o is 0, of queries without a key, do may be anything
    delta = torch.where(o == 0, 0, o.to(lse.dtype) * do.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(lse.dtype)
    has_key = lse != -float("inf")
    if not has_key.all():
        delta, do = torch.where(has_key, delta, 0), torch.where(has_key[..., None], do, 0)
    lse2 = torch.where(has_key, lse * LOG2_E, 0)
    if small_scored.fits(q, k, scores):
        return small_scored.backward(q, k, v, lse2, delta, do, block_mask, sm_scale, scores, needs)
    call = Call.of(q, k, v, block_mask)
    grads = _Gradients.zeros(scores, needs, lse)
    if grads.sinks is not None and scores.sinks is not None:
        grads.sinks.sub_((torch.exp(scores.sinks[:, None] - lse) * delta).sum((0, 2)))
    dq = empty_as(q).zero_()
    dk_t, dv_t = (t.new_zeros(*t.shape[:2], t.shape[4], *t.shape[2:4]) for t in (call.k, call.v))
    for tile_row in call.tile_rows(many_samples=True):
        q_rows, do_rows = (call.used_rows(t, tile_row) for t in (q, do))
        lse_rows, delta_rows = (call.used_rows(t[..., None], tile_row) for t in (lse2, delta))
        q_scaled, dq_rows = q_rows * sm_scale, torch.zeros_like(q_rows)
        for step in call.steps(tile_row):
            pairs = _Pairs.of(call, scores, tile_row, step)
            k_step, v_step = call.tiles(call.k, tile_row, step), call.tiles(call.v, tile_row, step)
            s, slope = pairs.change(q_scaled @ k_step.mT)
            p = s.sub_(lse_rows).exp2_()
            ds = pairs.drop(do_rows @ v_step.mT).sub_(delta_rows).mul_(p)
            call.add_tiles(dv_t, tile_row, step, do_rows.mT @ pairs.drop(p))
            if slope is not None:
                ds *= slope
            grads.add(pairs, ds)
            dq_rows += ds @ k_step
            call.add_tiles(dk_t, tile_row, step, q_rows.mT @ ds)
        call.put_rows(dq, tile_row, dq_rows * sm_scale)
    dk, dv = call.key_gradient(dk_t * sm_scale, k), call.key_gradient(dv_t, v)
    return ScoreGrads(dq, dk, dv, grads.dense, grads.tables, grads.sinks)


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a step, and what their scores are changed by.

    Scores are `[samples, kv_heads, group * rows, 128 * n]`; `apart` is their shape with the heads of a group apart.
    """

    group: int
    scores: Scores
    tile_row: TileRow
    step: Step
    apart: tuple[int, int, int, int, int]
    # int64 [128 * n]; those beyond the last key are the last key, and do not attend
    keys: Tensor
    # what dropout multiplies weights by, in the shape of the scores; None without dropout
    factor: Tensor | None

    @staticmethod
    def of(call: Call, scores: Scores, tile_row: TileRow, step: Step) -> _Pairs:
        """The pairs of this step."""
        tiles = torch.arange(call.k.shape[2])[step.tiles]
        keys = (tiles[:, None] * TILE + torch.arange(TILE)).flatten().clamp_(max=call.mask.kv_len - 1)
        samples, kv_heads, rows = (s.stop - s.start for s in (tile_row.b, tile_row.g, tile_row.rows))
        apart = samples, kv_heads, call.group if tile_row.head is None else 1, rows, keys.numel()
        factor = None
        if scores.seed is not None:
            b = torch.arange(tile_row.b.start, tile_row.b.stop).view(-1, 1, 1, 1, 1)
            heads = torch.arange(call.k.shape[1] * call.group).view(-1, call.group)
            h = _own_heads(heads, tile_row)[..., None, None]
            q_blocks = torch.arange(tile_row.rows.start // 16, -(-tile_row.rows.stop // 16))
            k_blocks = (tiles[:, None] * (TILE // 16) + torch.arange(TILE // 16)).flatten()
            kept = keep_blocks(scores.seed, b, h, q_blocks, k_blocks, scores.dropout_p)[..., :rows, :]
            factor = kept.flatten(2, 3).to(call.compute).mul_(keep_scale(scores.dropout_p))
        return _Pairs(call.group, scores, tile_row, step, apart, keys, factor)

    def change(self, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores in base 2, -inf where a pair does not attend, in place; and the derivative of the softcap."""
        biases, slope = list(self._biases(s.dtype)), None
        for bias in biases:
            s.view(self.apart).add_(bias)
        if self.scores.softcap:
            hidden = s == -float("inf") if biases else None
            s.div_(self.scores.softcap).tanh_()
            slope = 1 - s.square()
            s.mul_(self.scores.softcap)
            if hidden is not None:
                s.masked_fill_(hidden, -float("inf"))
        masked = self.step.bias != 0
        partial = (..., slice(self.step.n_full * TILE, None))
        for t, value in ((s, -float("inf")), (slope, 0.0)):
            if t is not None:
                # not by adding -inf: the bias of a pair that does not attend may be NaN
                t.unflatten(2, (-1, masked.shape[0]))[partial].masked_fill_(masked, value)
        return s.mul_(LOG2_E), slope

    def drop(self, p: Tensor) -> Tensor:
        """What dropout leaves."""
        return p if self.factor is None else p * self.factor

    def _biases(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Terms of the bias, each broadcastable to `apart`."""
        for term in self.scores.dense:
            of_rows = self.of_rows(term)
            yield (of_rows if term.shape[3] == 1 else of_rows.index_select(4, self.keys)).to(dtype)
        for lookup in self.scores.lookups:
            yield self.of_heads(lookup.table)[:, :, self.entries(lookup)]

    def of_rows(self, t: Tensor) -> Tensor:
        """A view `[samples or 1, kv_heads or 1, group or 1, rows or 1, kv_len or 1]` of a term or its gradient."""
        t = t[self.tile_row.b] if t.shape[0] > 1 else t
        t = t[:, :, self.tile_row.rows] if t.shape[2] > 1 else t
        if t.shape[1] == 1:
            return t[:, :, None]
        return _own_heads(t.unflatten(1, (-1, self.group)).movedim((1, 2), (0, 1)), self.tile_row).movedim(2, 0)

    def of_heads(self, table: Tensor) -> Tensor:
        """A view `[kv_heads or 1, group or 1, n]` of a table or its gradient."""
        return table[None] if table.shape[0] == 1 else _own_heads(table.unflatten(0, (-1, self.group)), self.tile_row)

    def entries(self, lookup: Lookup) -> Tensor:
        """int64 `[rows, 128 * n]`: which entry of the table each pair reads."""
        return (lookup.q_code[self.tile_row.rows, None] - lookup.k_code[self.keys]).long()


def _own_heads(t: Tensor, tile_row: TileRow) -> Tensor:
    """The heads of a row of tiles, of `[kv_heads, group, ..]`."""
    own = t[tile_row.g]
    return own if tile_row.head is None else own[:, tile_row.head : tile_row.head + 1]


@dataclass(frozen=True)
class _Gradients:
    """Sums so far, None for what nobody needs."""

    dense: tuple[Tensor | None, ...]
    tables: tuple[Tensor | None, ...]
    sinks: Tensor | None

    @staticmethod
    def zeros(scores: Scores, needs: Needs, lse: LSE) -> _Gradients:
        """Before the first step."""
        dense, tables = (
            tuple(lse.new_zeros(t.shape) if needed else None for t, needed in zip(terms, needed_terms, strict=True))
            for terms, needed_terms in (
                (scores.dense, needs.dense),
                ([lookup.table for lookup in scores.lookups], needs.tables),
            )
        )
        return _Gradients(
            dense, tables, torch.zeros_like(scores.sinks) if needs.sinks and scores.sinks is not None else None
        )

    def add(self, pairs: _Pairs, ds: Tensor) -> None:
        """Add the gradients of the scores of a step."""
        apart = ds.view(pairs.apart)
        for grad in self.dense:
            if grad is None:
                continue
            target = pairs.of_rows(grad)
            if grad.shape[3] == 1:
                target += apart.sum_to_size(target.shape)
            else:
                target.index_add_(4, pairs.keys, apart.sum_to_size(*target.shape[:4], apart.shape[4]))
        for lookup, grad in zip(pairs.scores.lookups, self.tables, strict=True):
            if grad is not None:
                target = pairs.of_heads(grad)
                summed = apart.sum(0).flatten(2).sum_to_size(*target.shape[:2], apart[0, 0, 0].numel())
                target.index_add_(2, pairs.entries(lookup).flatten(), summed)
