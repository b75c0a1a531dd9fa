"""Tile lists on a device: from the kinds of all tiles and their counts to the lists of a `BlockMask` but for its words.

Scan the counts, synchronise for the sizes, and fill.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymask.block_mask.block_mask import BlockMask, TileLists
from anymask.launch import launch
from anymask.mask.expr import Grid
from anymask.packing.triton.kernels.bits import LAUNCH, TILE
from anymask.shapes import Words

# kinds (of tiles along a line) or counts (of lines of a plane) that a program reads at a time
CHUNK = 1024
# positions that a program counts
LIVE_CHUNK = 8192
# sums at the head of `Work.memory`: full tiles, partial tiles, live queries, live keys
TOTALS = tl.constexpr(4)


class Work(NamedTuple):
    """Memory of one call: what is known of the tiles once each has been looked at. See `work_for`."""

    # int32: totals, then by line the full tiles of rows, partial of rows, full of columns, partial of columns; then
    # uint8 [planes * length] of queries and of keys, 1 where a partial tile has a pair; all zeros at first. Then int64
    # [n, 2] for `Program`; then int8 kinds [batch, heads, q_tiles, kv_tiles]. Each starts at a multiple of 16 bytes
    memory: Tensor
    # where they start, in units of 16 bytes: queries, keys, extremes, kinds
    starts: tuple[int, int, int, int]
    batch: int
    heads: int
    grid: Grid
    # rows and columns of tiles of all planes
    n_rows: int
    n_cols: int
    # device, and whether integers fit int32: what kernels are compiled for, of the arguments that are made here
    key: tuple[Any, ...]


class Lists(NamedTuple):
    """Both views but for their words. The tensors share memory, each part of which starts at a multiple of 16 bytes."""

    # int32: full_offsets and partial_offsets of rows, of columns, then both orders
    offsets: tuple[Tensor, ...]
    # int32: full_tiles of rows, of columns, then partial_tiles of rows, of columns
    tiles: Tensor
    # int32: global line numbers of the partial tiles of rows, of columns; dies with the call
    lines: Tensor
    n_full: int
    n_partial: int
    live: tuple[Tensor, Tensor]


def empty(grid: Grid, *shape: int) -> Tensor:
    """int32, not written, where the tiles are."""
    return torch.empty(shape, dtype=torch.int32, device=grid.device)


def work_for(batch: int, heads: int, grid: Grid, extremes: int = 0) -> Work:
    """Not written yet."""
    planes = batch * heads
    n_rows, n_cols = planes * grid.q_tiles, planes * grid.kv_tiles
    queries = -(-(TOTALS.value + 2 * (n_rows + n_cols)) // 4)
    keys = queries - (-planes * grid.q_len // 16)
    first = keys - (-planes * grid.kv_len // 16)
    kinds = first + extremes
    end = kinds - (-n_rows * grid.kv_tiles // 16)
    memory = empty(grid, 4 * end)
    key = grid.device, planes * max(grid.q_len, grid.kv_len) < 2**31
    return Work(memory, (queries, keys, first, kinds), batch, heads, grid, n_rows, n_cols, key)


def lists_of(work: Work) -> Lists:
    """Scan, synchronise for the sizes, the only time, and fill."""
    memory, (queries, keys, _, kinds), batch, heads, grid, n_rows, n_cols, key = work
    planes = batch * heads
    n_queries, n_keys = planes * grid.q_len, planes * grid.kv_len
    row, col = [n_rows + 1, -(n_rows + 1) % 4], [n_cols + 1, -(n_cols + 1) % 4]
    sizes = [*row, *row, *col, *col, n_rows, -n_rows % 4, n_cols, -n_cols % 4]
    offsets = empty(grid, sum(sizes))
    chunks = -(-n_queries // LIVE_CHUNK) - (-n_keys // LIVE_CHUNK)
    launch(
        _scan_kernel,
        (4 + chunks, 1, 1),
        (memory, offsets, queries, keys, n_rows, n_cols, n_queries, n_keys, grid.q_len, grid.kv_len),
        {"CHUNK": CHUNK, "LIVE_CHUNK": LIVE_CHUNK},
        key,
        **LAUNCH,
    )
    # what can be done while the device counts
    parts = offsets.split_with_sizes(sizes)[::2]
    parts = *parts[:4], parts[4].view(batch, heads, grid.q_tiles), parts[5].view(batch, heads, grid.kv_tiles)
    live = all_alive(grid.device)
    # sizes of what follows, and whether every position lives
    n_full, n_partial, q_alive, kv_alive = memory[: TOTALS.value].tolist()
    tiles = empty(grid, 2 * (_up(n_full) + _up(n_partial)))
    lines = empty(grid, 2 * _up(n_partial))
    if n_rows + n_cols:
        launch(
            _fill_kernel,
            (n_rows + n_cols, 1, 1),
            (memory, offsets, tiles, lines, kinds, n_rows, n_cols, grid.q_tiles, grid.kv_tiles, n_full, n_partial),
            {"CHUNK": CHUNK},
            key,
            num_warps=8,
            **LAUNCH,
        )
    if q_alive < n_queries or kv_alive < n_keys:
        # copies, as all of the memory would live on with a part
        octets = memory.view(torch.uint8)
        if q_alive < n_queries:
            live = octets[16 * queries : 16 * queries + n_queries].clone(), live[1]
        if kv_alive < n_keys:
            live = live[0], octets[16 * keys : 16 * keys + n_keys].clone()
    return Lists(parts, tiles, lines, n_full, n_partial, live)


def block_mask_of(grid: Grid, lists: Lists, words: Words, words_t: Words) -> BlockMask:
    """The result: views of a few tensors."""
    row_full, row_partial, col_full, col_partial, row_order, col_order = lists.offsets
    full, partial = [lists.n_full, -lists.n_full % 4], [lists.n_partial, -lists.n_partial % 4]
    row_tiles, col_tiles, row_partial_tiles, col_partial_tiles = lists.tiles.split_with_sizes(
        [*full, *full, *partial, *partial]
    )[::2]
    row_live, col_live = lists.live
    return BlockMask(
        grid.q_len,
        grid.kv_len,
        TileLists(row_full, row_tiles, row_partial, row_partial_tiles, words, row_order, row_live),
        TileLists(col_full, col_tiles, col_partial, col_partial_tiles, words_t, col_order, col_live),
    )


def _up(n: int) -> int:
    return n + -n % 4


@cache
def all_alive(device: torch.device) -> tuple[Tensor, Tensor]:
    """`live` of rows and columns where every position has a pair."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8, device=device), torch.empty(0, dtype=torch.uint8, device=device)


@triton.jit
def live_at(memory, start):
    """Of `Work.memory`: pointer to the positions that start there."""
    return memory.to(tl.pointer_type(tl.uint8)) + start.to(tl.int64) * 16


@triton.jit
def kinds_at(memory, start):
    """Likewise to kinds."""
    return memory.to(tl.pointer_type(tl.int8)) + start.to(tl.int64) * 16


@triton.jit
def padded(n):
    """Up to the next multiple of 16 bytes of int32."""
    return tl.cdiv(n, 4) * 4


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


@triton.jit(
    do_not_specialize=["queries", "keys", "n_rows", "n_cols", "n_queries", "n_keys", "q_len", "kv_len"],
)
def _scan_kernel(
    memory,
    offsets,
    queries,
    keys,
    n_rows,
    n_cols,
    n_queries,
    n_keys,
    q_len,
    kv_len,
    CHUNK: tl.constexpr,
    LIVE_CHUNK: tl.constexpr,
):
    """Programs 0 to 3: offsets of a list from its counts. Those after them: LIVE_CHUNK queries each, then keys."""
    which = tl.program_id(0)
    totals = memory
    counts = memory + TOTALS
    if which == 0:
        tl.store(totals + 0, _scan(counts, offsets, n_rows, CHUNK))
    if which == 1:
        tl.store(totals + 1, _scan(counts + n_rows, offsets + padded(n_rows + 1), n_rows, CHUNK))
    cols = offsets + 2 * padded(n_rows + 1)
    if which == 2:
        _scan(counts + 2 * n_rows, cols, n_cols, CHUNK)
    if which == 3:
        _scan(counts + 2 * n_rows + n_cols, cols + padded(n_cols + 1), n_cols, CHUNK)
    q_chunks = tl.cdiv(n_queries, LIVE_CHUNK)
    if (which >= 4) & (which < 4 + q_chunks):
        n = _count_live(live_at(memory, queries), counts, which - 4, n_queries, q_len, LIVE_CHUNK)
        tl.atomic_add(totals + 2, n, sem="relaxed")
    if which >= 4 + q_chunks:
        n = _count_live(live_at(memory, keys), counts + 2 * n_rows, which - 4 - q_chunks, n_keys, kv_len, LIVE_CHUNK)
        tl.atomic_add(totals + 3, n, sem="relaxed")


@triton.jit
def _count_live(live, full_counts, chunk, positions, length, LIVE_CHUNK: tl.constexpr):
    """How many of a chunk of positions live. Partial tiles have marked theirs, those of full ones are marked here."""
    x = chunk * LIVE_CHUNK + tl.arange(0, LIVE_CHUNK)
    line = (x // length) * tl.cdiv(length, TILE) + (x % length) // TILE
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


@triton.jit(do_not_specialize=["kinds", "n_rows", "n_cols", "q_tiles", "kv_tiles", "n_full", "n_partial"])
def _fill_kernel(
    memory,
    offsets,
    tiles,
    line_numbers,
    kinds,
    n_rows,
    n_cols,
    q_tiles,
    kv_tiles,
    n_full,
    n_partial,
    CHUNK: tl.constexpr,
):
    """One program a line: its part of the lists, and its place in the order."""
    line = tl.program_id(0)
    is_row, plane, inner, lines, first, stride, length = _line_of(line, n_rows, q_tiles, kv_tiles)
    number = plane * lines + inner
    # of the list of full tiles; that of partial ones comes next
    n_lines = tl.where(is_row, n_rows, n_cols)
    list_offsets = offsets + tl.where(is_row, 0, 2 * padded(n_rows + 1)) + number
    full_offset = tl.load(list_offsets)
    partial_offset = tl.load(list_offsets + padded(n_lines + 1))
    full_tiles = tiles + tl.where(is_row, 0, padded(n_full))
    of_partial = tl.where(is_row, 0, padded(n_partial))
    partial_tiles = tiles + 2 * padded(n_full).to(tl.int64) + of_partial
    kinds_of_line = kinds_at(memory, kinds) + first
    for start in tl.range(0, length, CHUNK):
        x = start + tl.arange(0, CHUNK)
        kind = tl.load(kinds_of_line + x.to(tl.int64) * stride, mask=x < length, other=0)
        is_full = (kind == 2).to(tl.int32)
        is_partial = (kind == 1).to(tl.int32)
        partial_at = partial_offset + tl.cumsum(is_partial, 0) - 1
        tl.store(full_tiles + full_offset + tl.cumsum(is_full, 0) - 1, x, mask=kind == 2)
        tl.store(partial_tiles + partial_at, x, mask=kind == 1)
        tl.store(line_numbers + of_partial + partial_at, number, mask=kind == 1)
        full_offset += tl.sum(is_full)
        partial_offset += tl.sum(is_partial)
    # place in a stable descending sort: lines with more tiles, and earlier lines with as many
    full_counts = memory + TOTALS + tl.where(is_row, 0, 2 * n_rows) + plane * lines
    partial_counts = full_counts + n_lines
    mine = tl.load(full_counts + inner) + tl.load(partial_counts + inner)
    place = 0
    for start in tl.range(0, lines, CHUNK):
        x = start + tl.arange(0, CHUNK)
        n = tl.load(full_counts + x, mask=x < lines, other=0) + tl.load(partial_counts + x, mask=x < lines, other=0)
        before = (x < lines) & ((n > mine) | ((n == mine) & (x < inner)))
        place += tl.sum(before.to(tl.int32))
    order = offsets + 2 * (padded(n_rows + 1) + padded(n_cols + 1)) + tl.where(is_row, 0, padded(n_rows))
    tl.store(order + plane * lines + place, inner)
