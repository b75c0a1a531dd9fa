"""Kernels of tile lists: the workspace they share, sums of counts, and lists from the kinds of tiles."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from anymask.packing.triton.kernels.bits import FULL, PARTIAL, TILE
from anymask.packing.triton.kernels.program import number

# integers at the head of the workspace: full tiles, partial tiles, queries and keys that have a pair; then how many
# programs have added to them, and room up to a multiple of 16 bytes
TOTALS = tl.constexpr(8)
# of them those that the host asks for, and the place of the next one
ANSWER = tl.constexpr(4)
# where the parts of a workspace start
STARTS = ["q_has_pair", "kv_has_pair", "extremes", "offsets", "kinds"]


class Views(NamedTuple):
    """Pointers to the parts of a workspace, see `packing.triton.lists.Workspace`."""

    totals: Any
    counts: Any
    q_has_pair: Any
    kv_has_pair: Any
    extremes: Any
    offsets: Any
    kinds: Any


@triton.jit
def views(memory, q_has_pair, kv_has_pair, extremes, offsets, kinds):
    """The parts of a workspace from where they start, in units of 16 bytes."""
    octets = memory.to(tl.pointer_type(tl.int8))
    return Views(
        memory,
        memory + TOTALS,
        (octets + q_has_pair.to(tl.int64) * 16).to(tl.pointer_type(tl.uint8)),
        (octets + kv_has_pair.to(tl.int64) * 16).to(tl.pointer_type(tl.uint8)),
        (octets + extremes.to(tl.int64) * 16).to(tl.pointer_type(tl.int64)),
        memory + offsets.to(tl.int64) * 4,
        octets + kinds.to(tl.int64) * 16,
    )


@triton.jit(do_not_specialize=["zeros", *STARTS])
def prepare_kernel(
    memory,
    tensors,
    ranges,
    zeros,
    q_has_pair,
    kv_has_pair,
    extremes,
    offsets,
    kinds,
    TENSORS: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """One program ZEROS zeros, and a tile of positions of a tensor `[planes, length]`: its minimum and its maximum."""
    x = tl.program_id(0) * ZEROS + tl.arange(0, ZEROS)
    tl.store(memory + x, 0, mask=x < zeros)
    entries = views(memory, q_has_pair, kv_has_pair, extremes, offsets, kinds).extremes
    tile = tl.program_id(0)
    for j in tl.static_range(TENSORS):
        # a tensor's first tile and its length; after the last one, the number of all
        first = number(ranges, 2 * j)
        length = number(ranges, 2 * j + 1)
        if (tile >= first) & (tile < number(ranges, 2 * j + 2)):
            tiles = tl.cdiv(length, TILE)
            plane = (tile - first) // tiles
            position = tl.minimum(((tile - first) % tiles) * TILE + tl.arange(0, TILE), length - 1)
            values = tl.load(tensors[j] + plane.to(tl.int64) * length + position)
            tl.store(entries + 2 * tile.to(tl.int64), tl.min(values))
            tl.store(entries + 2 * tile.to(tl.int64) + 1, tl.max(values))


@triton.jit
def padded(n):
    """Up to the next multiple of 16 bytes of int32."""
    return tl.cdiv(n, 4) * 4


@triton.jit
def _tile_row_of(tile_row, n_rows, q_tiles, kv_tiles):
    """Of a row of tiles (rows of all planes, then columns): is it a row, its plane, its index in the plane, rows in a
    plane, its first tile, the stride to the next, and its length in tiles."""
    is_row = tile_row < n_rows
    of_side = tl.where(is_row, tile_row, tile_row - n_rows)
    tile_rows = tl.where(is_row, q_tiles, kv_tiles)
    plane = of_side // tile_rows
    inner = of_side % tile_rows
    first = plane.to(tl.int64) * q_tiles * kv_tiles + tl.where(is_row, inner.to(tl.int64) * kv_tiles, inner)
    return is_row, plane, inner, tile_rows, first, tl.where(is_row, 1, kv_tiles), tl.where(is_row, kv_tiles, q_tiles)


@triton.jit(do_not_specialize=[*STARTS, "n_rows", "n_cols", "q_len", "kv_len"])
def scan_kernel(
    memory,
    answer,
    q_has_pair,
    kv_has_pair,
    extremes,
    offsets,
    kinds,
    n_rows,
    n_cols,
    q_len,
    kv_len,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Programs 0 to 3: offsets of a list from its counts. Those after them: positions of ROWS rows of tiles, then of as
    many columns.

    The last to end writes the totals to `answer`, int32 [4] where the host reads.
    """
    which = tl.program_id(0)
    work = views(memory, q_has_pair, kv_has_pair, extremes, offsets, kinds)
    totals = work.totals
    if which < 4:
        # full and partial tiles of rows, then of columns
        is_row, of = which < 2, which % 2
        n_lines = tl.where(is_row, n_rows, n_cols)
        counts = work.counts + tl.where(is_row, 0, 2 * n_rows) + of * n_lines
        lists = work.offsets + tl.where(is_row, 0, 2 * padded(n_rows + 1)) + of * padded(n_lines + 1)
        total = _scan(counts, lists, n_lines, CHUNK)
        tl.store(totals + of, total, mask=is_row)
    else:
        chunk, row_chunks = which - 4, tl.cdiv(n_rows, ROWS)
        is_row = chunk < row_chunks
        counts = work.counts + tl.where(is_row, 0, 2 * n_rows)
        # one call for both, as the code of a kernel that runs once takes longer to fetch than to run
        start = tl.where(is_row, q_has_pair, kv_has_pair)
        has_pair = (memory.to(tl.pointer_type(tl.int8)) + start.to(tl.int64) * 16).to(tl.pointer_type(tl.uint8))
        chunk = tl.where(is_row, chunk, chunk - row_chunks)
        n_lines, length = tl.where(is_row, n_rows, n_cols), tl.where(is_row, q_len, kv_len)
        n = _count_used(has_pair, counts, chunk, n_lines, length, ROWS)
        tl.atomic_add(totals + tl.where(is_row, 2, 3), n, sem="relaxed")
    # all threads have written
    tl.debug_barrier()
    if tl.atomic_add(totals + ANSWER, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        x = tl.arange(0, ANSWER)
        tl.store(answer + x, tl.load(totals + x, volatile=True))


@triton.jit
def _count_used(has_pair, full_counts, chunk, n_lines, length, ROWS: tl.constexpr):
    """How many positions of a chunk of rows of tiles have a pair. Those of partial tiles are marked already, those of
    full ones here."""
    row = chunk * ROWS + tl.arange(0, ROWS)
    full = tl.load(full_counts + row, mask=row < n_lines, other=0) > 0
    tile_rows = tl.cdiv(length, TILE)
    inner = ((row % tile_rows) * TILE)[:, None] + tl.arange(0, TILE)[None, :]
    there = (row < n_lines)[:, None] & (inner < length)
    at = has_pair + (row // tile_rows).to(tl.int64)[:, None] * length + inner
    used = tl.load(at, mask=there, other=0) | (full[:, None] & there).to(tl.uint8)
    tl.store(at, used, mask=there)
    return tl.sum(used.to(tl.int32))


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


@triton.jit(do_not_specialize=[*STARTS, "n_rows", "n_cols", "q_tiles", "kv_tiles"])
def fill_kernel(
    memory,
    lists,
    tile_row_numbers,
    q_has_pair,
    kv_has_pair,
    extremes,
    offsets,
    kinds,
    n_rows,
    n_cols,
    q_tiles,
    kv_tiles,
    CHUNK: tl.constexpr,
):
    """One program a row or column of tiles: its part of the lists and of the order (`block_mask.parts`)."""
    tile_row = tl.program_id(0)
    is_row, plane, inner, tile_rows, first, stride, length = _tile_row_of(tile_row, n_rows, q_tiles, kv_tiles)
    tile_row_number = plane * tile_rows + inner
    n_lines = tl.where(is_row, n_rows, n_cols)
    # of the list of full tiles; that of partial ones comes next
    at_full = tl.where(is_row, 0, 2 * padded(n_rows + 1)) + tile_row_number
    at_partial = at_full + padded(n_lines + 1)
    work = views(memory, q_has_pair, kv_has_pair, extremes, offsets, kinds)
    full_offset, partial_offset = tl.load(work.offsets + at_full), tl.load(work.offsets + at_partial)
    n_full, n_partial = tl.load(work.totals), tl.load(work.totals + 1)
    tl.store(lists + at_full, full_offset)
    tl.store(lists + at_partial, partial_offset)
    if tile_row_number == n_lines - 1:
        tl.store(lists + at_full + 1, n_full)
        tl.store(lists + at_partial + 1, n_partial)
    orders = lists + 2 * (padded(n_rows + 1) + padded(n_cols + 1))
    tiles = orders + padded(n_rows) + padded(n_cols)
    of_partial = tl.where(is_row, 0, padded(n_partial))
    partial_tiles = tiles + of_partial
    full_tiles = tiles + 2 * padded(n_partial).to(tl.int64) + tl.where(is_row, 0, padded(n_full))
    kinds_of_row = work.kinds + first
    for start in tl.range(0, length, CHUNK):
        x = start + tl.arange(0, CHUNK)
        kind = tl.load(kinds_of_row + x.to(tl.int64) * stride, mask=x < length, other=0)
        is_full = (kind == FULL).to(tl.int32)
        is_partial = (kind == PARTIAL).to(tl.int32)
        partial_at = partial_offset + tl.cumsum(is_partial, 0) - 1
        tl.store(full_tiles + full_offset + tl.cumsum(is_full, 0) - 1, x, mask=kind == FULL)
        tl.store(partial_tiles + partial_at, x, mask=kind == PARTIAL)
        tl.store(tile_row_numbers + of_partial + partial_at, tile_row_number, mask=kind == PARTIAL)
        full_offset += tl.sum(is_full)
        partial_offset += tl.sum(is_partial)
    # place in a stable descending sort: rows with more tiles, and earlier rows with as many
    full_counts = work.counts + tl.where(is_row, 0, 2 * n_rows) + plane * tile_rows
    partial_counts = full_counts + n_lines
    mine = tl.load(full_counts + inner) + tl.load(partial_counts + inner)
    place = 0
    for start in tl.range(0, tile_rows, CHUNK):
        x = start + tl.arange(0, CHUNK)
        n = tl.load(full_counts + x, mask=x < tile_rows, other=0) + tl.load(
            partial_counts + x, mask=x < tile_rows, other=0
        )
        before = (x < tile_rows) & ((n > mine) | ((n == mine) & (x < inner)))
        place += tl.sum(before.to(tl.int32))
    order = orders + tl.where(is_row, 0, padded(n_rows))
    tl.store(order + plane * tile_rows + place, inner)
