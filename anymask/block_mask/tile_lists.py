"""`TileLists`: the tiles of a `BlockMask` as seen from one side, by query tiles or by kv tiles."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anymask.tiles import FULL, TILE, WORDS, tiles_over


@dataclass(frozen=True, eq=False)
class TileLists:
    """The non-empty tiles of each row of tiles, as two CSR lists. In the view by kv tiles a row is a kv tile.

    Row `x` of plane `p` has the global number `n = p * tile_rows + x`. Its full tiles are
    `full_tiles[full_offsets[n]:full_offsets[n + 1]]`, in ascending order, and likewise its partial ones.
    """

    # int32 [planes * tile_rows + 1]
    full_offsets: Tensor
    # int32 [n_full], index of the tile in the other direction
    full_tiles: Tensor
    # int32 [planes * tile_rows + 1]
    partial_offsets: Tensor
    # int32 [n_partial]
    partial_tiles: Tensor
    # int32 [n_partial, 128, 4], bits of partial_tiles in the order of bits.py, four words per position of the row
    words: Tensor
    # int32 [mask_batch, mask_heads, tile_rows], rows in descending order of tiles, ties in ascending order of row
    order: Tensor
    # uint8 [planes * length], 1 where the position has a pair; [0] when every position has one
    has_pair: Tensor

    def tile_row_numbers(self, kind: int) -> Tensor:
        """int64 `[n]`: global number of the row of each full (`kind=2`) or partial (`kind=1`) tile."""
        offsets = self.full_offsets if kind == FULL else self.partial_offsets
        tile_rows = torch.arange(offsets.numel() - 1, device=offsets.device)
        return tile_rows.repeat_interleave(offsets.diff().to(torch.int64))

    @cached_property
    def mean_tiles(self) -> int:
        """Tiles of the mean row, rounded up."""
        return -(-(self.full_tiles.numel() + self.partial_tiles.numel()) // max(1, self.order.numel()))

    @property
    def nbytes(self) -> int:
        """Bytes of all seven tensors."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """The seven tensors in field order."""
        return [getattr(self, name) for name in FIELDS]

    def wrong_shape(self, planes: tuple[int, ...], length: int) -> str | None:
        """The first tensor whose shape is not that of a view of `length` positions and `planes`, or None."""
        tile_rows, count = tiles_over(length), math.prod(planes)
        if self.order.shape != (*planes, tile_rows):
            return "order"
        for kind in ("full", "partial"):
            if getattr(self, f"{kind}_offsets").shape != (count * tile_rows + 1,):
                return f"{kind}_offsets"
            if getattr(self, f"{kind}_tiles").dim() != 1:
                return f"{kind}_tiles"
        if self.words.shape != (*self.partial_tiles.shape, TILE, WORDS):
            return "words"
        return None if self.has_pair.shape in ((0,), (count * length,)) else "has_pair"

    def wrong_value(self, planes: tuple[int, ...], length: int, other: int) -> str | None:
        """The first tensor that cannot be one of a view of `length` by `other` positions, or None. Reads the lists."""
        wrong = self.wrong_shape(planes, length)
        if wrong:
            return wrong
        for name, t in zip(FIELDS, self.tensors(), strict=True):
            if t.dtype != (torch.uint8 if name == "has_pair" else torch.int32):
                return name
        if (self.order.sort(-1).values != torch.arange(tiles_over(length), device=self.order.device)).any():
            return "order"
        for kind in ("full", "partial"):
            offsets, tiles = getattr(self, f"{kind}_offsets"), getattr(self, f"{kind}_tiles")
            if offsets[0] != 0 or (offsets.diff() < 0).any():
                return f"{kind}_offsets"
            if tiles.numel() != offsets[-1] or ((tiles < 0) | (tiles >= tiles_over(other))).any():
                return f"{kind}_tiles"
        return None


FIELDS = tuple(f.name for f in fields(TileLists))


def plane_range(index: Any, size: int, name: str) -> range:
    """The planes that an index of one dimension names, all of which there are.

    Raises:
        IndexError: one that is not there. TypeError: no int and no slice of them.
    """
    shared = "; a dimension of 1 is shared by all and has nothing to cut" if size == 1 else ""
    if isinstance(index, slice):
        step = 1 if index.step is None else _integer(index.step, name)
        start = 0 if index.start is None else _integer(index.start, name)
        stop = size if index.stop is None else _integer(index.stop, name)
        start, stop = (n + size if n < 0 else n for n in (start, stop))
        # Python would shorten the slice, and one sample too few would be one that all share
        if step != 1 or not 0 <= start <= stop <= size:
            raise IndexError(
                f"{name} index {index} of a mask with {size} planes along it; allowed are slices of step 1 "
                f"within 0 to {size}{shared}"
            )
        return range(start, stop)
    place = _integer(index, name)
    if not -size <= place < size:
        raise IndexError(
            f"{name} index {place} of a mask with {size} planes along it; allowed are {-size} to {size - 1}{shared}"
        )
    return range(place % size, place % size + 1)


def _integer(index: Any, name: str) -> int:
    if isinstance(index, (bool, Tensor)) or not hasattr(index, "__index__"):
        raise TypeError(
            f"{name} index is {index!r} of type {type(index).__name__}; allowed are an int and a slice of step 1"
        )
    return operator.index(index)


def select_planes(
    rows: TileLists, cols: TileLists, words: Tensor, batch: range, heads: range
) -> tuple[TileLists, TileLists, Tensor]:
    """Both views, and the words of both, of the planes of some neighbouring samples and heads.

    Where these planes are neighbours in memory, tiles and words are not copied. A GPU waits once, for the places where
    the lists of each plane begin.
    """
    views = rows, cols
    all_heads = rows.order.shape[1]
    runs = [range(b * all_heads + heads.start, b * all_heads + heads.stop) for b in batch] or [range(0)]
    if len(heads) == all_heads:
        runs = [range(batch.start * all_heads, batch.stop * all_heads)]
    span = range(runs[0].start, runs[-1].stop)
    cut = slice(batch.start, batch.stop), slice(heads.start, heads.stop)
    maps = [v.has_pair.view(*v.order.shape[:2], -1)[cut].flatten() if v.has_pair.numel() else v.has_pair for v in views]
    wanted = [has_pair.all()[None].to(torch.int32) for has_pair in maps]
    for view in views:
        tile_rows = view.order.shape[2]
        for offsets in (view.full_offsets, view.partial_offsets):
            starts = offsets[span.start * tile_rows : span.stop * tile_rows + 1 : max(1, tile_rows)]
            wanted.append(starts.expand(len(span) + 1))
    numbers = [part.tolist() for part in torch.cat(wanted).cpu().split([len(t) for t in wanted])]
    found, chosen = [], words
    for i, (view, has_pair) in enumerate(zip(views, maps, strict=True)):
        full_starts, partial_starts = numbers[len(views) + 2 * i : len(views) + 2 * i + 2]
        full, partial = (
            [slice(starts[run.start - span.start], starts[run.stop - span.start]) for run in runs]
            for starts in (full_starts, partial_starts)
        )
        # a plane has as many partial tiles by rows as by columns
        chosen = _pieces(words, partial, 1)
        found.append(
            TileLists(
                _offsets_of(view.full_offsets, view.order.shape, cut),
                _pieces(view.full_tiles, full),
                _offsets_of(view.partial_offsets, view.order.shape, cut),
                _pieces(view.partial_tiles, partial),
                chosen[i],
                view.order[cut].contiguous(),
                # empty where all of these planes' positions have a pair, as if they were packed alone
                has_pair[:0] if numbers[i][0] else has_pair,
            )
        )
    return found[0], found[1], chosen


def _pieces(t: Tensor, pieces: list[slice], dim: int = 0) -> Tensor:
    some = [t.narrow(dim, piece.start, piece.stop - piece.start) for piece in pieces]
    return some[0] if len(some) == 1 else torch.cat(some, dim)


def _offsets_of(offsets: Tensor, shape: torch.Size, cut: tuple[slice, slice]) -> Tensor:
    """Offsets of the rows of tiles of some planes, of `shape` rows in all."""
    counts = offsets.diff().view(shape)[cut].flatten()
    chosen = offsets.new_zeros(counts.numel() + 1)
    chosen[1:] = counts.cumsum(0)
    return chosen
