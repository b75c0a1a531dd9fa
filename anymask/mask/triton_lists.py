"""Tile lists on a device: from the kinds of all tiles and their counts to the lists of a `BlockMask` but for its words.

Scan the counts, synchronise for the sizes, and fill.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymask.mask.block_mask import TileLists
from anymask.mask.expr import Grid
from anymask.mask.triton_bits import LAUNCH, TILE
from anymask.shapes import TileKinds, Words

# kinds (of tiles along a line) or counts (of lines of a plane) that a program reads at a time
CHUNK = 1024
# positions that a program counts
LIVE_CHUNK = 8192
# sums at the head of `Found.counts`: full tiles, partial tiles, live queries, live keys
TOTALS = tl.constexpr(4)


class Found(NamedTuple):
    """What is known of the tiles once each has been looked at."""

    # int8 [batch, heads, q_tiles, kv_tiles]
    kinds: TileKinds
    # int32: totals, then by line the full tiles of rows, partial of rows, full of columns, partial of columns
    counts: Tensor
    # uint8 [planes * length], and a few bytes: 1 where a partial tile has a pair
    q_live: Tensor
    kv_live: Tensor


class Lists(NamedTuple):
    """A view but for its words, and the global line number of each partial tile."""

    full_offsets: Tensor
    full_tiles: Tensor
    partial_offsets: Tensor
    partial_tiles: Tensor
    order: Tensor
    live: Tensor
    lines: Tensor

    def with_words(self, words: Words) -> TileLists:
        """The view."""
        return TileLists(*self[:4], words, self.order, self.live)


def empty(grid: Grid, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """`torch.empty` where the tiles are."""
    return torch.empty(shape, dtype=dtype, device=grid.device)


def nothing_yet(batch: int, heads: int, grid: Grid) -> Found:
    """Kinds not written, counts 0 and no position alive."""
    planes = batch * heads
    kinds = empty(grid, batch, heads, grid.q_tiles, grid.kv_tiles, dtype=torch.int8)
    counts = 4 * (TOTALS.value + 2 * planes * (grid.q_tiles + grid.kv_tiles))
    # one launch for all zeros, each at an address for loads of 16 bytes
    sizes = [-(-size // 16) * 16 for size in (counts, planes * grid.q_len, planes * grid.kv_len)]
    zeros = torch.zeros(sum(sizes), dtype=torch.uint8, device=grid.device).split(sizes)
    return Found(kinds, zeros[0].view(torch.int32), zeros[1], zeros[2])


def lists_of(found: Found, grid: Grid) -> tuple[Lists, Lists]:
    """Rows and columns. The one synchronisation is here."""
    kinds, counts, q_live, kv_live = found
    batch, heads, q_tiles, kv_tiles = kinds.shape
    planes = batch * heads
    n_rows, n_cols = planes * q_tiles, planes * kv_tiles
    n_queries, n_keys = planes * grid.q_len, planes * grid.kv_len
    row_full, row_partial, col_full, col_partial = offsets = [
        empty(grid, n + 1) for n in (n_rows, n_rows, n_cols, n_cols)
    ]
    q_chunks, kv_chunks = (-(-n // LIVE_CHUNK) for n in (n_queries, n_keys))
    _scan_kernel[(4 + q_chunks + kv_chunks,)](
        counts, *offsets, q_live, kv_live, n_rows, n_cols, n_queries, n_keys, grid.q_len, grid.kv_len,
        q_tiles, kv_tiles, CHUNK, LIVE_CHUNK, **LAUNCH,
    )  # fmt: skip
    # sizes of what follows, and whether every position lives
    n_full, n_partial, q_alive, kv_alive = counts[: TOTALS.value].tolist()
    row_order, col_order = empty(grid, batch, heads, q_tiles), empty(grid, batch, heads, kv_tiles)
    row_full_tiles, col_full_tiles = empty(grid, n_full), empty(grid, n_full)
    row_partial_tiles, row_lines, col_partial_tiles, col_lines = (empty(grid, n_partial) for _ in range(4))
    if n_rows + n_cols:
        _fill_kernel[(n_rows + n_cols,)](
            kinds,
            counts,
            *offsets,
            *(row_full_tiles, row_partial_tiles, row_lines, row_order),
            *(col_full_tiles, col_partial_tiles, col_lines, col_order),
            n_rows,
            n_cols,
            q_tiles,
            kv_tiles,
            CHUNK,
            num_warps=8,
            **LAUNCH,
        )
    # a copy, as the zeros of all would live on with a part
    q_live = q_live[: 0 if q_alive == n_queries else n_queries].clone()
    kv_live = kv_live[: 0 if kv_alive == n_keys else n_keys].clone()
    return (
        Lists(row_full, row_full_tiles, row_partial, row_partial_tiles, row_order, q_live, row_lines),
        Lists(col_full, col_full_tiles, col_partial, col_partial_tiles, col_order, kv_live, col_lines),
    )


@triton.jit
def _line_of(line, n_rows, q_tiles, kv_tiles):
    """Of line number `line` (rows of all planes, then columns of all planes): is it a row, its plane, its index in the
    plane, lines in a plane, its first tile, the stride to the next, and its length in tiles."""
    is_row = line < n_rows
    number = tl.where(is_row, line, line - n_rows)
    lines = tl.where(is_row, q_tiles, kv_tiles)
    plane = number // lines
    inner = number % lines
    first = plane.to(tl.int64) * q_tiles * kv_tiles + tl.where(is_row, inner.to(tl.int64) * kv_tiles, inner)
    return is_row, plane, inner, lines, first, tl.where(is_row, 1, kv_tiles), tl.where(is_row, kv_tiles, q_tiles)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "n_queries", "n_keys", "q_len", "kv_len", "q_tiles", "kv_tiles"])
def _scan_kernel(
    counts,
    row_full,
    row_partial,
    col_full,
    col_partial,
    q_live,
    kv_live,
    n_rows,
    n_cols,
    n_queries,
    n_keys,
    q_len,
    kv_len,
    q_tiles,
    kv_tiles,
    CHUNK: tl.constexpr,
    LIVE_CHUNK: tl.constexpr,
):
    """Programs 0 to 3: offsets of a list from its counts. Those after them: LIVE_CHUNK queries each, then keys."""
    which = tl.program_id(0)
    totals = counts
    counts += TOTALS
    if which == 0:
        tl.store(totals + 0, _scan(counts, row_full, n_rows, CHUNK))
    if which == 1:
        tl.store(totals + 1, _scan(counts + n_rows, row_partial, n_rows, CHUNK))
    if which == 2:
        _scan(counts + 2 * n_rows, col_full, n_cols, CHUNK)
    if which == 3:
        _scan(counts + 2 * n_rows + n_cols, col_partial, n_cols, CHUNK)
    q_chunks = tl.cdiv(n_queries, LIVE_CHUNK)
    if (which >= 4) & (which < 4 + q_chunks):
        n = _count_live(q_live, counts, which - 4, n_queries, q_len, q_tiles, LIVE_CHUNK)
        tl.atomic_add(totals + 2, n, sem="relaxed")
    if which >= 4 + q_chunks:
        n = _count_live(kv_live, counts + 2 * n_rows, which - 4 - q_chunks, n_keys, kv_len, kv_tiles, LIVE_CHUNK)
        tl.atomic_add(totals + 3, n, sem="relaxed")


@triton.jit
def _count_live(live, full_counts, chunk, positions, length, lines, LIVE_CHUNK: tl.constexpr):
    """How many of a chunk of positions live. Partial tiles have marked theirs, those of full ones are marked here."""
    x = chunk * LIVE_CHUNK + tl.arange(0, LIVE_CHUNK)
    line = (x // length) * lines + (x % length) // TILE
    full = tl.load(full_counts + line, mask=x < positions, other=0)
    lives = tl.load(live + x, mask=x < positions, other=0) | (full > 0).to(tl.uint8)
    tl.store(live + x, lives, mask=x < positions)
    return tl.sum(lives.to(tl.int32))


@triton.jit
def _scan(counts, offsets, length, CHUNK: tl.constexpr):
    total = tl.zeros([], tl.int32)
    tl.store(offsets, total)
    for start in tl.range(0, length, CHUNK):
        x = start + tl.arange(0, CHUNK)
        n = tl.load(counts + x, mask=x < length, other=0)
        tl.store(offsets + 1 + x, total + tl.cumsum(n, 0), mask=x < length)
        total += tl.sum(n)
    return total


@triton.jit(do_not_specialize=["n_rows", "n_cols", "q_tiles", "kv_tiles"])
def _fill_kernel(
    kinds,
    counts,
    row_full,
    row_partial,
    col_full,
    col_partial,
    row_full_tiles,
    row_partial_tiles,
    row_lines,
    row_order,
    col_full_tiles,
    col_partial_tiles,
    col_lines,
    col_order,
    n_rows,
    n_cols,
    q_tiles,
    kv_tiles,
    CHUNK: tl.constexpr,
):
    """One program a line: its part of the lists, and its place in the order."""
    line = tl.program_id(0)
    is_row, plane, inner, lines, first, stride, length = _line_of(line, n_rows, q_tiles, kv_tiles)
    number = plane * lines + inner
    if is_row:
        full_offset = tl.load(row_full + number)
        partial_offset = tl.load(row_partial + number)
    else:
        full_offset = tl.load(col_full + number)
        partial_offset = tl.load(col_partial + number)
    for start in tl.range(0, length, CHUNK):
        x = start + tl.arange(0, CHUNK)
        kind = tl.load(kinds + first + x.to(tl.int64) * stride, mask=x < length, other=0)
        is_full = (kind == 2).to(tl.int32)
        is_partial = (kind == 1).to(tl.int32)
        full_at = full_offset + tl.cumsum(is_full, 0) - 1
        partial_at = partial_offset + tl.cumsum(is_partial, 0) - 1
        if is_row:
            tl.store(row_full_tiles + full_at, x, mask=kind == 2)
            tl.store(row_partial_tiles + partial_at, x, mask=kind == 1)
            tl.store(row_lines + partial_at, number, mask=kind == 1)
        else:
            tl.store(col_full_tiles + full_at, x, mask=kind == 2)
            tl.store(col_partial_tiles + partial_at, x, mask=kind == 1)
            tl.store(col_lines + partial_at, number, mask=kind == 1)
        full_offset += tl.sum(is_full)
        partial_offset += tl.sum(is_partial)
    # place in a stable descending sort: lines with more tiles, and earlier lines with as many
    of_full = counts + TOTALS + tl.where(is_row, 0, 2 * n_rows) + plane * lines
    of_partial = of_full + tl.where(is_row, n_rows, n_cols)
    mine = tl.load(of_full + inner) + tl.load(of_partial + inner)
    place = 0
    for start in tl.range(0, lines, CHUNK):
        x = start + tl.arange(0, CHUNK)
        n = tl.load(of_full + x, mask=x < lines, other=0) + tl.load(of_partial + x, mask=x < lines, other=0)
        before = (x < lines) & ((n > mine) | ((n == mine) & (x < inner)))
        place += tl.sum(before.to(tl.int32))
    if is_row:
        tl.store(row_order + plane * lines + place, inner)
    else:
        tl.store(col_order + plane * lines + place, inner)
