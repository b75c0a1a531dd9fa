"""Attention within one tile: up to 128 queries and keys, as windows and short samples have, many planes at once.

A plane of so few pairs takes less time than the Python that would walk its tiles. So the scores of some samples and
heads are one batched product, to which the mask is added as 0 and -inf. Letters as in docs/kernels.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anymask.block_mask import BlockMask
from anymask.block_mask.bits import unpack_bits
from anymask.layout import empty_as
from anymask.shapes import LSE, K, O, Q, V
from anymask.tiles import TILE

# torch's exp2 keeps its speed on -inf and on tiny results, its exp does not
LOG2_E = math.log2(math.e)
# scores of a product over all its planes: 1 MiB of fp32, which stays in the L2 cache
SCORES = 1 << 18
# pairs of the planes of a mask that are unpacked together: 4 MiB of fp32
PAIRS = 1 << 20
# largest |score| in base 2 for which exponentials need no row maximum: their sums, and do over them, are far from the
# ends of fp32
STEADY = 32.0
# largest |do @ v| that is certain to be finite
LARGE = 1e30


def fits(q: Q, k: K) -> bool:
    """Whether a plane is one tile."""
    return q.shape[2] <= TILE and k.shape[2] <= TILE


def forward(q: Q, k: K, v: V, block_mask: BlockMask | None, sm_scale: float) -> tuple[O, LSE]:
    """`(o, lse)`."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    o, lse = empty_as(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=compute)
    for planes in planes_of(q, k, block_mask, compute):
        q_rows, k_rows, v_rows = planes.queries(q) * (sm_scale * LOG2_E), planes.keys(k), planes.keys(v)
        # of each plane by itself, so that no sample depends on its batch
        is_steady = _products_within(STEADY, q_rows, k_rows)
        if planes.has_unused and not is_steady.all():
            # what they hold decides nothing
            q_rows, k_rows = planes.used_queries(q_rows), planes.used_keys(k_rows)
            is_steady = _products_within(STEADY, q_rows, k_rows)
        steady = bool(is_steady.all())
        # 0 times a NaN is no 0
        if planes.kv_has_pair is not None and not v_rows.sum().isfinite():
            v_rows = planes.used_keys(v_rows)
        p = planes.scores(q_rows, k_rows)
        if not steady:
            m = p.amax(-1, keepdim=True)
            # a row without a key has m = -inf, and -inf - -inf would be NaN
            m = torch.where((m == -float("inf")) | is_steady, 0, m)
            p.sub_(m)
        l = p.exp2_().sum(-1, keepdim=True)  # noqa: E741
        planes.put_queries(o, (p @ v_rows).div_(torch.where(l == 0, 1, l)))
        # in fp64, so that leaving base 2 rounds once
        log2_sum = l.double().log2()
        planes.put_queries(lse[..., None], (log2_sum if steady else log2_sum + m) / LOG2_E)
    return o, lse


def backward(
    q: Q, k: K, v: V, lse2: LSE, delta: LSE, do: O, block_mask: BlockMask | None, sm_scale: float
) -> tuple[Q, K, V]:
    """`(dq, dk, dv)`; `lse2` in base 2 and `delta` are 0 for queries without a key."""
    dq, dk, dv = empty_as(q), empty_as(k), empty_as(v)
    for planes in planes_of(q, k, block_mask, lse2.dtype):
        q_rows, do_rows, k_rows, v_rows = planes.queries(q), planes.queries(do), planes.keys(k), planes.keys(v)
        lse_rows, delta_rows = (planes.queries(t[..., None]) for t in (lse2, delta))
        if planes.has_unused and not (
            _products_within(STEADY / abs(sm_scale * LOG2_E or 1), q_rows, k_rows).all()
            and _products_within(LARGE, do_rows, v_rows).all()
        ):
            q_rows, do_rows = planes.used_queries(q_rows), planes.used_queries(do_rows)
            k_rows, v_rows = planes.used_keys(k_rows), planes.used_keys(v_rows)
        p = planes.scores(q_rows * (sm_scale * LOG2_E), k_rows).sub_(lse_rows).exp2_()
        ds = (do_rows @ v_rows.mT).sub_(delta_rows).mul_(p)
        planes.put_queries(dq, (ds @ k_rows).mul_(sm_scale))
        planes.put_keys(dk, (ds.mT @ q_rows).mul_(sm_scale))
        planes.put_keys(dv, p.mT @ do_rows)
    return dq, dk, dv


def _products_within(limit: float, rows: Tensor, columns: Tensor) -> Tensor:
    """bool `[samples, heads, 1, 1]`: are all `rows @ columns^T` finite and within `limit`, by Cauchy and Schwarz."""
    longest = [torch.linalg.vector_norm(t, dim=-1).amax(-1)[..., None, None] for t in (rows, columns)]
    within: Tensor = longest[0] * longest[1] <= limit
    return within


@dataclass(frozen=True)
class Planes:
    """Some samples `b` and kv heads `g`, with all query heads of these.

    Rows are the queries of a group one below the other, `[samples, kv_heads, group * q_len, dim]`; where the heads of a
    group have masks of their own, which may leave different keys unused, each head has rows and keys of its own.
    """

    b: slice
    g: slice
    group: int
    compute: torch.dtype
    # [samples or 1, heads or 1, q_len, kv_len], 0 where the pair attends and -inf where not; None where all do
    bias: Tensor | None = None
    # bool [samples or 1, heads or 1, length, 1], where a query or a key has a pair; None where all have one
    q_has_pair: Tensor | None = None
    kv_has_pair: Tensor | None = None
    is_split: bool = False

    @property
    def has_unused(self) -> bool:
        """Whether some query or key has no pair: whatever it holds reaches nothing."""
        return self.q_has_pair is not None or self.kv_has_pair is not None

    @property
    def query_heads(self) -> slice:
        """The query heads of these kv heads."""
        return slice(self.g.start * self.group, self.g.stop * self.group)

    def queries(self, t: Tensor) -> Tensor:
        """Rows of the planes."""
        rows = t[self.b, self.query_heads].to(self.compute)
        return rows if self.is_split else rows.reshape(rows.shape[0], -1, self.group * rows.shape[2], rows.shape[3])

    def used_queries(self, rows: Tensor) -> Tensor:
        """Rows with 0 for queries without a key."""
        if self.q_has_pair is None:
            return rows
        by_head = rows.reshape(rows.shape[0], -1, self.q_has_pair.shape[2], rows.shape[3])
        return torch.where(self.q_has_pair, by_head, 0).view(rows.shape)

    def put_queries(self, t: Tensor, rows: Tensor) -> None:
        """Write rows of the planes."""
        target = t[self.b, self.query_heads]
        target.copy_(rows.view(target.shape))

    def keys(self, t: Tensor) -> Tensor:
        """Keys or values of the planes."""
        rows = t[self.b, self.g].to(self.compute)
        return rows.repeat_interleave(self.group, 1) if self.is_split else rows

    def used_keys(self, rows: Tensor) -> Tensor:
        """Keys or values with 0 where no query attends to them."""
        return rows if self.kv_has_pair is None else torch.where(self.kv_has_pair, rows, 0)

    def put_keys(self, t: Tensor, rows: Tensor) -> None:
        """Write gradients of the planes' keys or values."""
        t[self.b, self.g] = (rows.unflatten(1, (-1, self.group)).sum(2) if self.is_split else rows).to(t.dtype)

    def by_head(self, s: Tensor) -> Tensor:
        """A view `[samples, q_heads, q_len, kv_len]` of scores."""
        return s if self.is_split else s.view(s.shape[0], -1, s.shape[2] // self.group, s.shape[3])

    def scores(self, q_rows: Tensor, k_rows: Tensor) -> Tensor:
        """`q @ k^T`, -inf where the pair does not attend."""
        s = q_rows @ k_rows.mT
        if self.bias is not None:
            self.by_head(s).add_(self.bias)
        return s


def planes_of(q: Q, k: K, block_mask: BlockMask | None, compute: torch.dtype) -> Iterator[Planes]:
    """All planes, in blocks whose scores fit `SCORES`."""
    (batch, q_heads, q_len, _), (_, kv_heads, kv_len, _) = q.shape, k.shape
    group = q_heads // kv_heads
    scores = group * q_len * kv_len
    heads_at_once = min(kv_heads, max(1, SCORES // scores))
    samples_at_once = max(1, SCORES // (scores * heads_at_once))
    found = _MaskOfPlanes()
    for first in range(0, batch, samples_at_once):
        b = slice(first, min(first + samples_at_once, batch))
        for head in range(0, kv_heads, heads_at_once):
            g = slice(head, min(head + heads_at_once, kv_heads))
            if block_mask is None:
                yield Planes(b, g, group, compute)
                continue
            if not found.holds(b, g):
                found = _MaskOfPlanes.of(block_mask, b, g, group, compute)
            bias, q_has_pair, kv_has_pair = found.cut(b)
            yield Planes(b, g, group, compute, bias, q_has_pair, kv_has_pair, found.is_split)


@dataclass(frozen=True)
class _MaskOfPlanes:
    """The mask of some samples and kv heads, made together: for one sample at a time it would take longer than its use.

    Of samples or heads that share a plane, all.
    """

    samples: range = range(0)
    kv_heads: range = range(0)
    # see `Planes`
    parts: tuple[Tensor | None, ...] = ()
    is_split: bool = False

    @staticmethod
    def of(block_mask: BlockMask, b: slice, g: slice, group: int, compute: torch.dtype) -> _MaskOfPlanes:
        """The mask of these samples and kv heads, and of more samples if theirs are small."""
        has_heads, everything = block_mask.heads > 1, range(sys.maxsize)
        heads = slice(g.start * group, g.stop * group) if has_heads else slice(0, 1)
        pairs = block_mask.q_len * block_mask.kv_len * block_mask.heads
        # of some of the heads, the next samples' would be forgotten before they are reached
        has_all = heads.stop - heads.start == block_mask.heads
        stop = min(block_mask.batch, max(b.stop, b.start + PAIRS // pairs)) if has_all else b.stop
        samples = slice(b.start, stop) if block_mask.batch > 1 else slice(0, 1)
        used = [_used(block_mask, lists.has_pair, (samples, heads)) for lists in (block_mask.rows, block_mask.cols)]
        return _MaskOfPlanes(
            range(samples.start, samples.stop) if block_mask.batch > 1 else everything,
            range(g.start, g.stop) if has_heads else everything,
            (_bias(block_mask, (samples, heads), compute), *used),
            has_heads and group > 1,
        )

    def holds(self, b: slice, g: slice) -> bool:
        """Whether these samples and kv heads are all here."""
        exact = self.kv_heads.stop == sys.maxsize or (self.kv_heads.start, self.kv_heads.stop) == (g.start, g.stop)
        return exact and self.samples.start <= b.start and b.stop <= self.samples.stop

    def cut(self, b: slice) -> list[Tensor | None]:
        """What is known of these samples."""
        if self.samples.stop == sys.maxsize:
            return list(self.parts)
        cut = slice(b.start - self.samples.start, b.stop - self.samples.start)
        return [None if part is None else part[cut] for part in self.parts]


def _used(block_mask: BlockMask, has_pair: Tensor, of_mask: tuple[slice, slice]) -> Tensor | None:
    """bool `[samples, heads, length, 1]` of the mask's planes, None if every position has a pair."""
    return has_pair.view(block_mask.batch, block_mask.heads, -1, 1)[of_mask] != 0 if has_pair.numel() else None


def _bias(block_mask: BlockMask, of_mask: tuple[slice, slice], compute: torch.dtype) -> Tensor:
    """`[samples, heads, q_len, kv_len]` of the mask's planes, each of which is one tile or none: 0 or -inf."""
    rows, shape = block_mask.rows, (block_mask.batch, block_mask.heads)
    full, first, after = (
        t.view(shape)[of_mask] for t in (rows.full_offsets.diff(), rows.partial_offsets[:-1], rows.partial_offsets[1:])
    )
    attends = full.bool()[..., None, None].repeat(1, 1, block_mask.q_len, block_mask.kv_len)
    partial = after > first
    words = rows.words[first[partial], : block_mask.q_len]
    attends[partial] = unpack_bits(words)[..., : block_mask.kv_len]
    # 1 becomes 0, and 0 -inf
    return attends.to(compute).reciprocal_().neg_().add_(1)
