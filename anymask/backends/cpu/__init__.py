"""Attention over tile lists in torch ops: the schedule of the kernels without a kernel compiler.

One step is one row of tiles of one plane, for a few heads at a time, against up to `STEP_TILES` kv tiles, so temporary
memory is a few MiB whatever the lengths, and empty tiles cost nothing. Full tiles come first in a step; only the
columns after them are masked. Letters as in docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymask.backends.cpu import small
from anymask.backends.cpu.small import LOG2_E, STEADY
from anymask.block_mask import BlockMask
from anymask.block_mask.bits import unpack_bits
from anymask.layout import empty_as, laid_out_as
from anymask.precision import ieee_products
from anymask.shapes import LSE, K, O, Q, V
from anymask.tiles import TILE, tiles_over

# kv tiles of a step: 128 x 1024 fp32 scores are 512 KiB a head, so that a few heads fit the L2 cache
STEP_TILES = 8
# scores of a step over all its heads
STEP_SCORES = 1 << 20


def why_not(q: Q, k: K, v: V, block_mask: BlockMask | None) -> str | None:
    """Why this backend cannot run the call, or None."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device}, this backend runs on the CPU"
    return None


@ieee_products
def forward(q: Q, k: K, v: V, block_mask: BlockMask | None, sm_scale: float) -> tuple[O, LSE]:
    """`o` in the dtype of `q`, and `lse` (natural log, fp32, or fp64 for fp64 inputs)."""
    if small.fits(q, k):
        return small.forward(q, k, v, block_mask, sm_scale)
    call = _Call.of(q, k, v, block_mask)
    o = empty_as(q, v.shape[3]).zero_()
    lse = q.new_full(q.shape[:3], -float("inf"), dtype=call.compute)
    for tile_row in call.tile_rows():
        q_rows = call.used_rows(q, tile_row) * (sm_scale * LOG2_E)
        steady = call.is_steady(q_rows, tile_row)
        acc = q_rows.new_zeros(*q_rows.shape[:-1], v.shape[3])
        m = q_rows.new_full(q_rows.shape[:-1], 0.0 if steady else -float("inf"))
        l = torch.zeros_like(m)  # noqa: E741
        for step in call.steps(tile_row):
            s = step.mask_out(q_rows @ call.tiles(call.k, tile_row, step).mT)
            if not steady:
                m_new = torch.maximum(m, s.amax(-1))
                # a row with no key yet has m = -inf, and -inf - -inf would be NaN
                m_safe = torch.where(m_new == -float("inf"), 0, m_new)
                s.sub_(m_safe[..., None])
                alpha = torch.exp2(m - m_safe)
                l *= alpha  # noqa: E741
                acc *= alpha[..., None]
                m = m_new
            p = s.exp2_()
            l += p.sum(-1)  # noqa: E741
            acc += p @ call.tiles(call.v, tile_row, step)
        acc /= torch.where(l == 0, 1, l)[..., None]
        call.put_rows(o, tile_row, acc)
        # in fp64, so that leaving base 2 rounds once
        call.put_rows(lse[..., None], tile_row, (m.double() + l.double().log2())[..., None] / LOG2_E)
    return o, lse


@ieee_products
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
    deterministic: bool,
) -> tuple[Q, K, V]:
    """`dq, dk, dv` in the dtypes of `q, k, v`."""
    delta = (o.to(lse.dtype) * do.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(lse.dtype)
    # queries without a key give and receive nothing, whatever q, do or dlse hold there
    has_key = lse != -float("inf")
    delta = torch.where(has_key, delta, 0)
    lse2 = torch.where(has_key, lse * LOG2_E, 0)
    if small.fits(q, k):
        return small.backward(q, k, v, lse2, delta, do, block_mask, sm_scale)
    call = _Call.of(q, k, v, block_mask)
    dq = empty_as(q).zero_()
    # [batch, kv_heads, dim, kv_tiles, 128]: products that end in this form are faster
    dk_t, dv_t = (t.new_zeros(*t.shape[:2], t.shape[4], *t.shape[2:4]) for t in (call.k, call.v))
    for tile_row in call.tile_rows():
        q_rows, do_rows = (call.used_rows(t, tile_row) for t in (q, do))
        lse_rows, delta_rows = (call.rows(t[..., None], tile_row) for t in (lse2, delta))
        q_scaled = q_rows * (sm_scale * LOG2_E)
        steady = call.is_steady(q_scaled, tile_row)
        if steady:
            # p = 2^s * 2^-lse: the second factor goes to the rows of do and delta, which are far smaller than p
            do_rows, delta_rows = (t * torch.exp2(-lse_rows) for t in (do_rows, delta_rows))
        dq_rows = torch.zeros_like(q_rows)
        for step in call.steps(tile_row):
            k_step, v_step = call.tiles(call.k, tile_row, step), call.tiles(call.v, tile_row, step)
            s = step.mask_out(q_scaled @ k_step.mT)
            p = (s if steady else s.sub_(lse_rows)).exp2_()
            ds = (do_rows @ v_step.mT).sub_(delta_rows).mul_(p)
            dq_rows += ds @ k_step
            call.add_tiles(dk_t, tile_row, step, q_rows.mT @ ds)
            call.add_tiles(dv_t, tile_row, step, do_rows.mT @ p)
        call.put_rows(dq, tile_row, dq_rows * sm_scale)
    return dq, call.key_gradient(dk_t * sm_scale, k), call.key_gradient(dv_t, v)


@dataclass(frozen=True)
class _TileRow:
    """One row of tiles of one plane, for samples `b` and kv heads `g` (with all, or one, of their query heads)."""

    b: slice
    g: slice
    # query head within the group, or None for the whole group
    head: int | None
    plane: tuple[int, int]
    rows: slice
    full: Tensor
    partial: Tensor
    words: slice


@dataclass(frozen=True)
class _Step:
    """Up to `STEP_TILES` kv tiles of a row of tiles: the full ones, then the partial ones."""

    # a slice where they are neighbours, which makes keys and values a view
    tiles: slice | Tensor
    n_full: int
    # [rows, 128 * n_partial], 0 where the pair attends, -inf where not
    bias: Tensor

    def mask_out(self, s: Tensor) -> Tensor:
        """Scores `[1, kv_heads, group * rows, 128 * n]` with -inf, in place, where the pair does not attend."""
        s.unflatten(2, (-1, self.bias.shape[0]))[..., self.n_full * TILE :].add_(self.bias)
        return s


@dataclass(frozen=True)
class _Call:
    """A call's inputs, ready for steps: k and v in the compute dtype, padded to whole tiles."""

    mask: BlockMask
    group: int
    compute: torch.dtype
    # [batch, kv_heads, kv_tiles, 128, dim]
    k: Tensor
    v: Tensor
    batch: int
    # [batch, kv_heads, kv_tiles, 128], lengths of the keys
    k_norm: Tensor

    @staticmethod
    def of(q: Q, k: K, v: V, block_mask: BlockMask | None) -> _Call:
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        q_len, kv_len = q.shape[2], k.shape[2]
        mask = block_mask if block_mask is not None else BlockMask.full(q_len, kv_len)
        extra = tiles_over(kv_len) * TILE - kv_len
        k, v = (t.to(compute) for t in (k, v))
        if extra:
            k, v = (pad(t, (0, 0, 0, extra)) for t in (k, v))
        k, v = (t.contiguous().unflatten(2, (-1, TILE)) for t in (k, v))
        return _Call(mask, q.shape[1] // k.shape[1], compute, k, v, q.shape[0], k.norm(dim=-1))

    def is_steady(self, q_scaled: Tensor, tile_row: _TileRow) -> bool:
        """Whether every score of the row of tiles is within `STEADY`, by the Cauchy-Schwarz bound."""
        k_norm = self._zero_unused(self.k_norm[tile_row.b, tile_row.g, :, :, None], tile_row).amax((-1, -2, -3))
        return bool((q_scaled.norm(dim=-1).amax(-1) * k_norm <= STEADY).all())

    def tile_rows(self) -> Iterator[_TileRow]:
        """Lines in blocks of heads whose scores fit `STEP_SCORES`."""
        mask, lists = self.mask, self.mask.rows
        full, partial = lists.full_offsets.tolist(), lists.partial_offsets.tolist()
        kv_heads, q_tiles = self.k.shape[1], tiles_over(mask.q_len)
        for n in range(len(full) - 1):
            n_tiles = full[n + 1] - full[n] + partial[n + 1] - partial[n]
            if not n_tiles:
                continue
            plane, q_tile = divmod(n, q_tiles)
            plane_b, plane_h = divmod(plane, mask.heads)
            rows = slice(q_tile * TILE, min((q_tile + 1) * TILE, mask.q_len))
            samples = range(self.batch) if mask.batch == 1 else (plane_b,)
            if mask.heads == 1:
                head, kv_range = None, range(kv_heads)
            else:
                head, kv_range = plane_h % self.group, range(plane_h // self.group, plane_h // self.group + 1)
            scores = TILE * TILE * min(n_tiles, STEP_TILES) * (self.group if head is None else 1)
            at_once = max(1, STEP_SCORES // scores)
            for b in samples:
                for g in range(kv_range.start, kv_range.stop, at_once):
                    yield _TileRow(
                        slice(b, b + 1),
                        slice(g, min(g + at_once, kv_range.stop)),
                        head,
                        (plane_b, plane_h),
                        rows,
                        lists.full_tiles[full[n] : full[n + 1]],
                        lists.partial_tiles[partial[n] : partial[n + 1]],
                        slice(partial[n], partial[n + 1]),
                    )

    def steps(self, tile_row: _TileRow) -> Iterator[_Step]:
        tiles, words = torch.cat([tile_row.full, tile_row.partial]), self.mask.rows.words[tile_row.words]
        rows = tile_row.rows.stop - tile_row.rows.start
        for first in range(0, tiles.numel(), STEP_TILES):
            chunk = tiles[first : first + STEP_TILES]
            n_full = max(0, min(tile_row.full.numel() - first, chunk.numel()))
            begin = first + n_full - tile_row.full.numel()
            # [rows, n_partial, 4]: the words are turned, before there are 32 times as many bits to turn
            chosen = words[begin : begin + chunk.numel() - n_full, :rows].transpose(0, 1)
            bias = unpack_bits(chosen).flatten(1).to(self.compute).reciprocal_().neg_().add_(1)
            start, stop = int(chunk[0]), int(chunk[-1]) + 1
            neighbours = stop - start == chunk.numel() and bool((chunk.diff() == 1).all())
            yield _Step(slice(start, stop) if neighbours else chunk, n_full, bias)

    def rows(self, t: Tensor, tile_row: _TileRow) -> Tensor:
        """Query rows of the row of tiles `[1, kv_heads, group * rows, dim]` in the compute dtype."""
        return self._rows(t, tile_row).to(self.compute).flatten(2, 3)

    def used_rows(self, t: Tensor, tile_row: _TileRow) -> Tensor:
        """`rows` with 0 for queries that have no key."""
        rows = self.rows(t, tile_row)
        used = self.mask.rows.has_pair
        if used.numel():
            has_pair = used.view(self.mask.batch, self.mask.heads, -1)[tile_row.plane][tile_row.rows, None] != 0
            rows = torch.where(has_pair, rows.unflatten(2, (-1, has_pair.shape[0])), 0).flatten(2, 3)
        return rows

    def put_rows(self, t: Tensor, tile_row: _TileRow, rows: Tensor) -> None:
        target = self._rows(t, tile_row)
        target.copy_(rows.view(target.shape))

    def _rows(self, t: Tensor, tile_row: _TileRow) -> Tensor:
        grouped: Tensor = t.unflatten(1, (-1, self.group))[tile_row.b, tile_row.g, :, tile_row.rows]
        return grouped if tile_row.head is None else grouped[:, :, tile_row.head : tile_row.head + 1]

    def tiles(self, t: Tensor, tile_row: _TileRow, step: _Step) -> Tensor:
        """Keys or values of the step `[1, kv_heads, 128 * n, dim]`; those no query attends to are 0."""
        return self._zero_unused(t[tile_row.b, tile_row.g, step.tiles], tile_row, step.tiles).flatten(2, 3)

    def _zero_unused(self, t: Tensor, tile_row: _TileRow, tiles: slice | Tensor = slice(None)) -> Tensor:
        """`t [1, kv_heads, n, 128, dim]`, of these tiles, with 0 for keys that no query of the plane attends to."""
        used = self.mask.cols.has_pair
        if used.numel():
            of_plane = used.view(self.mask.batch, self.mask.heads, -1)[tile_row.plane]
            by_tile = pad(of_plane, (0, self.k.shape[2] * TILE - of_plane.numel())).view(-1, TILE)[tiles]
            t = torch.where(by_tile[..., None] != 0, t, 0)
        return t

    def add_tiles(self, grad_t: Tensor, tile_row: _TileRow, step: _Step, of_step: Tensor) -> None:
        """Add the transposed gradient of the step's keys or values to that of all of them."""
        grad_t[tile_row.b, tile_row.g, :, step.tiles] += of_step.unflatten(3, (-1, TILE))

    def key_gradient(self, grad_t: Tensor, like: Tensor) -> Tensor:
        """The gradient of k or v, which is `like`, from its transposed and padded form."""
        return laid_out_as(grad_t.flatten(3)[..., : self.mask.kv_len].mT, like)
