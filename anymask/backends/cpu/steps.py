"""The walk over the tiles of a mask: which rows, keys and values a step needs, and where its results go.

One step is one row of tiles of one plane, for a few heads at a time, against up to `STEP_TILES` kv tiles, so temporary
memory is a few MiB whatever the lengths, and empty tiles cost nothing. Full tiles come first in a step; only the
columns after them are masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymask.backends.cpu.small import STEADY
from anymask.block_mask import BlockMask
from anymask.block_mask.bits import unpack_bits
from anymask.layout import laid_out_as
from anymask.shapes import K, Q, V
from anymask.tiles import TILE, tiles_over

# kv tiles of a step: 128 x 1024 fp32 scores are 512 KiB a head, so that a few heads fit the L2 cache
STEP_TILES = 8
# scores of a step over all its heads
STEP_SCORES = 1 << 20


@dataclass(frozen=True)
class TileRow:
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
class Step:
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
class Call:
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
    def of(q: Q, k: K, v: V, block_mask: BlockMask | None) -> Call:
        """The inputs of a call, ready."""
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        q_len, kv_len = q.shape[2], k.shape[2]
        mask = block_mask if block_mask is not None else BlockMask.full(q_len, kv_len)
        extra = tiles_over(kv_len) * TILE - kv_len
        k, v = (t.to(compute) for t in (k, v))
        if extra:
            k, v = (pad(t, (0, 0, 0, extra)) for t in (k, v))
        k, v = (t.contiguous().unflatten(2, (-1, TILE)) for t in (k, v))
        return Call(mask, q.shape[1] // k.shape[1], compute, k, v, q.shape[0], k.norm(dim=-1))

    def is_steady(self, q_scaled: Tensor, tile_row: TileRow) -> bool:
        """Whether every score of the row of tiles is within `STEADY`, by the Cauchy-Schwarz bound."""
        k_norm = self._zero_unused(self.k_norm[tile_row.b, tile_row.g, :, :, None], tile_row).amax((-1, -2, -3))
        return bool((q_scaled.norm(dim=-1).amax(-1) * k_norm <= STEADY).all())

    def tile_rows(self, many_samples: bool = False) -> Iterator[TileRow]:
        """Lines in blocks of heads, and if `many_samples` of samples with one plane, whose scores fit `STEP_SCORES`."""
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
            samples = range(self.batch) if mask.batch == 1 else range(plane_b, plane_b + 1)
            if mask.heads == 1:
                head, kv_range = None, range(kv_heads)
            else:
                head, kv_range = plane_h % self.group, range(plane_h // self.group, plane_h // self.group + 1)
            scores = TILE * TILE * min(n_tiles, STEP_TILES) * (self.group if head is None else 1)
            at_once = max(1, STEP_SCORES // scores)
            together = max(1, at_once // len(kv_range)) if many_samples else 1
            for b in range(samples.start, samples.stop, together):
                for g in range(kv_range.start, kv_range.stop, at_once):
                    yield TileRow(
                        slice(b, min(b + together, samples.stop)),
                        slice(g, min(g + at_once, kv_range.stop)),
                        head,
                        (plane_b, plane_h),
                        rows,
                        lists.full_tiles[full[n] : full[n + 1]],
                        lists.partial_tiles[partial[n] : partial[n + 1]],
                        slice(partial[n], partial[n + 1]),
                    )

    def steps(self, tile_row: TileRow) -> Iterator[Step]:
        """The tiles of a row of tiles, some at a time."""
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
            yield Step(slice(start, stop) if neighbours else chunk, n_full, bias)

    def rows(self, t: Tensor, tile_row: TileRow) -> Tensor:
        """Query rows of the row of tiles `[1, kv_heads, group * rows, dim]` in the compute dtype."""
        return self._rows(t, tile_row).to(self.compute).flatten(2, 3)

    def used_rows(self, t: Tensor, tile_row: TileRow) -> Tensor:
        """`rows` with 0 for queries that have no key."""
        rows = self.rows(t, tile_row)
        used = self.mask.rows.has_pair
        if used.numel():
            has_pair = used.view(self.mask.batch, self.mask.heads, -1)[tile_row.plane][tile_row.rows, None] != 0
            rows = torch.where(has_pair, rows.unflatten(2, (-1, has_pair.shape[0])), 0).flatten(2, 3)
        return rows

    def put_rows(self, t: Tensor, tile_row: TileRow, rows: Tensor) -> None:
        """Write query rows of the row of tiles."""
        target = self._rows(t, tile_row)
        target.copy_(rows.view(target.shape))

    def _rows(self, t: Tensor, tile_row: TileRow) -> Tensor:
        grouped: Tensor = t.unflatten(1, (-1, self.group))[tile_row.b, tile_row.g, :, tile_row.rows]
        return grouped if tile_row.head is None else grouped[:, :, tile_row.head : tile_row.head + 1]

    def tiles(self, t: Tensor, tile_row: TileRow, step: Step) -> Tensor:
        """Keys or values of the step `[1, kv_heads, 128 * n, dim]`; those no query attends to are 0."""
        return self._zero_unused(t[tile_row.b, tile_row.g, step.tiles], tile_row, step.tiles).flatten(2, 3)

    def _zero_unused(self, t: Tensor, tile_row: TileRow, tiles: slice | Tensor = slice(None)) -> Tensor:
        """`t [1, kv_heads, n, 128, dim]`, of these tiles, with 0 for keys that no query of the plane attends to."""
        used = self.mask.cols.has_pair
        if used.numel():
            of_plane = used.view(self.mask.batch, self.mask.heads, -1)[tile_row.plane]
            by_tile = pad(of_plane, (0, self.k.shape[2] * TILE - of_plane.numel())).view(-1, TILE)[tiles]
            t = torch.where(by_tile[..., None] != 0, t, 0)
        return t

    def add_tiles(self, grad_t: Tensor, tile_row: TileRow, step: Step, of_step: Tensor) -> None:
        """Add the transposed gradient of the step's keys or values to that of all of them."""
        grad_t[tile_row.b, tile_row.g, :, step.tiles] += of_step.unflatten(3, (-1, TILE))

    def key_gradient(self, grad_t: Tensor, like: Tensor) -> Tensor:
        """The gradient of k or v, which is `like`, from its transposed and padded form."""
        return laid_out_as(grad_t.flatten(3)[..., : self.mask.kv_len].mT, like)
