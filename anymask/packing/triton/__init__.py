"""The device twin of definition.py: the same `BlockMask`, field by field, from a few kernels and one synchronisation.

A kernel finds the kind of every tile and, on the way, counts tiles and marks the positions that live: for a mask by
name `_tiles_kernel`, which evaluates only what bounds leave undecided, for a dense tensor `_dense_kernel`, which reads
it once and keeps the words of all tiles. From there all entries share `lists_of`: scan, synchronise for the sizes, and
fill the lists. Last come the words of the partial tiles, for both views.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymask import tiles as sizes
from anymask.block_mask.block_mask import BlockMask
from anymask.launch import int_key, launch, on, tensor_key
from anymask.mask.expr import Grid, Mask
from anymask.mask.leaves import Dense
from anymask.packing.definition import tile_words
from anymask.packing.triton.kernels.bits import (
    LAUNCH,
    TILE,
    WORDS,
    kind_of_words,
    live_of_words,
    load_words_t,
    tile_offsets,
    transpose_words,
    word_offsets,
    words_of_bits,
)
from anymask.packing.triton.lists import TOTALS, block_mask_of, empty, kinds_at, lists_of, live_at, padded, work_for
from anymask.packing.triton.program import (
    PACKED,
    READABLE,
    Program,
    classify,
    evaluate,
    extremes_at,
    packed_place,
    packed_program,
    prepare,
    program_of,
)
from anymask.shapes import TileKinds, Words

# kv tiles that a program classifies: one a thread, or its warps would repeat each other's work; those that stay
# undecided it evaluates one after the other
SPAN = 256
# rows of a tile that a program evaluates at a time: few, as a deep expression has many values at once in registers
STRIP = 16

PLACES_AND_SHAPE = [
    *("queries", "keys", "extremes", "kinds"),
    *("heads", "q_len", "kv_len", "q_tiles", "kv_tiles", "n_rows", "n_cols"),
]


def pack_mask(mask: Mask, grid: Grid) -> BlockMask:
    """The `BlockMask` of a mask on the device of `grid`; what only torch can evaluate is evaluated there."""
    if isinstance(mask, Dense):
        return pack_dense(mask.tensor, grid.q_len, grid.kv_len)
    packed = pack_expression(mask, grid)
    if packed is not None:
        return packed
    return lists_from_tiles(*tile_words(mask, grid, write_words=words_of_tiles), grid)


def pack_dense(tensor: Tensor, q_len: int, kv_len: int) -> BlockMask:
    """The `BlockMask` of a tensor `[mask_batch, mask_heads, 1 or q_len, 1 or kv_len]`, non-zero = attend."""
    grid = Grid(q_len, kv_len, tensor.device)
    batch, heads = tensor.shape[:2]
    tensor = tensor.expand(batch, heads, q_len, kv_len)
    if tensor.dtype not in READABLE:
        tensor = tensor != 0
    with on(grid.device):
        work = work_for(batch, heads, grid)
        prepare(work)
        tiles = work.n_rows * grid.kv_tiles
        # of all tiles, written where partial
        words, words_t = _both_words(grid, tiles)
        if tiles:
            strides = tensor.stride()
            align = _alignment(tensor, kv_len)
            # what `load_words_t` tells 0 and 1 from other bytes by
            seen_as = {torch.bool: torch.uint8, torch.uint8: torch.int8}.get(tensor.dtype)
            tensor = tensor if seen_as is None else tensor.view(seen_as)
            launch(
                _dense_kernel,
                (tiles, 1, 1),
                (
                    tensor,
                    work.memory,
                    words,
                    words_t,
                    strides,
                    *work.starts,
                    heads,
                    *_shape(grid),
                    work.n_rows,
                    work.n_cols,
                ),
                {"ALIGN": align},
                (work.key, tensor_key(tensor), *map(int_key, strides)),
                num_warps=1 if align > 1 else 8,
                **LAUNCH,
            )
        lists = lists_of(work)
        n_partial = lists.n_partial
        if n_partial != tiles:
            all_words, all_words_t = words, words_t
            words, words_t = _both_words(grid, n_partial)
            if n_partial:
                launch(
                    _copy_kernel,
                    (2 * n_partial, 1, 1),
                    (
                        *(lists.tiles, lists.lines, all_words, all_words_t, words, words_t),
                        *(lists.n_full, n_partial, grid.q_tiles, grid.kv_tiles),
                    ),
                    {},
                    work.key,
                    num_warps=1,
                    **LAUNCH,
                )
        return block_mask_of(grid, lists, words, words_t)


def pack_expression(mask: Mask, grid: Grid) -> BlockMask | None:
    """The `BlockMask` of a mask, on the device of `grid`; None if only torch can evaluate it."""
    with on(grid.device):
        program = program_of(mask, grid)
        return None if program is None else _pack_program(program, *mask.planes, grid, None)


def lists_from_tiles(kinds: TileKinds, words: Words, grid: Grid) -> BlockMask:
    """The `BlockMask` of tile kinds and of the words of the partial tiles in row order."""
    with on(grid.device):
        return _pack_program(packed_program(kinds.contiguous(), words), kinds.shape[0], kinds.shape[1], grid, words)


def words_of_tiles(tiles: Tensor, places: Tensor, grid: Grid, words: Words, kinds: Tensor) -> None:
    """Write words `[n, 128, 4]` and int8 kinds `[n]` of bool tiles `[n, 128, 128]`, of any strides.

    `places`: int64 `[n, 4]`, plane batch, plane head, q tile and kv tile. Pairs outside the plane do not count.
    """
    strides, align = tiles.stride(), _alignment(tiles, grid.kv_len)
    with on(grid.device):
        launch(
            _tile_words_kernel,
            (tiles.shape[0], 1, 1),
            (tiles.view(torch.uint8), places, words, kinds, strides, *places.stride(), grid.q_len, grid.kv_len),
            {"ALIGN": align},
            (grid.device, *map(tensor_key, (tiles, places, words, kinds)), *map(int_key, strides)),
            num_warps=1 if align > 1 else 8,
            **LAUNCH,
        )


def _pack_program(program: Program, batch: int, heads: int, grid: Grid, words: Words | None) -> BlockMask:
    """`words`: those of the rows, if they are there already."""
    work = work_for(batch, heads, grid, program.n_extremes)
    prepare(work, program)
    # no launch sees an empty tuple
    mask = program.numbers, program.tensors or (work.memory,), program.strides
    constants = {"ops": program.ops, "STRIP": STRIP}
    key = work.key, program.key
    n_rows, n_cols = work.n_rows, work.n_cols
    if n_rows * n_cols:
        launch(
            _tiles_kernel,
            (n_rows * -(-grid.kv_tiles // SPAN), 1, 1),
            (*mask, work.memory, *work.starts, heads, *_shape(grid), n_rows, n_cols),
            {**constants, "SPAN": SPAN},
            key,
            num_warps=8,
            **LAUNCH,
        )
    lists = lists_of(work)
    n_partial = lists.n_partial
    entries = 0 if words is not None else n_partial
    if words is None:
        words, words_t = _both_words(grid, n_partial)
    else:
        words_t = torch.empty_like(words)
    if n_partial:
        launch(
            _words_kernel,
            (entries + n_partial, 1, 1),
            (*mask, lists.tiles, lists.lines, words, words_t, entries, lists.n_full, n_partial, heads, *_shape(grid)),
            constants,
            (*key, tensor_key(words)),
            num_warps=2,
            **LAUNCH,
        )
    return block_mask_of(grid, lists, words, words_t)


def _shape(grid: Grid) -> tuple[int, int, int, int]:
    return grid.q_len, grid.kv_len, grid.q_tiles, grid.kv_tiles


def _both_words(grid: Grid, n: int) -> tuple[Words, Words]:
    return empty(grid, n, sizes.TILE, sizes.WORDS), empty(grid, n, sizes.TILE, sizes.WORDS)


def _alignment(t: Tensor, kv_len: int) -> int:
    """`ALIGN` of `load_words_t`."""
    *strides, last = t.stride()
    if t.element_size() != 1 or last != 1:
        return 1
    together = t.data_ptr() | kv_len
    for stride in strides:
        together |= stride
    return 16 if together % 16 == 0 else 4 if together % 4 == 0 else 1


@triton.jit
def _rows_of(tile):
    return tile * TILE + tl.arange(0, TILE)


@triton.jit
def _mark(live, plane, length, positions, lives):
    """All programs write the same 1."""
    tl.store(live + plane.to(tl.int64) * length + positions, lives.to(tl.uint8), mask=lives)


@triton.jit
def _inside(ops: tl.constexpr, numbers, tensors, strides, b, h, q, k, q_len, kv_len):
    """The pairs of positions, some of which may lie outside the plane and attend to nothing."""
    bits = evaluate(
        ops, 0, numbers, tensors, strides, b, h, tl.minimum(q, q_len - 1), tl.minimum(k, kv_len - 1), q_len, kv_len
    )
    return bits & (q < q_len) & (k < kv_len)


@triton.jit(do_not_specialize=PLACES_AND_SHAPE)
def _tiles_kernel(
    numbers,
    tensors,
    strides,
    memory,
    queries,
    keys,
    extremes,
    kinds,
    heads,
    q_len,
    kv_len,
    q_tiles,
    kv_tiles,
    n_rows,
    n_cols,
    ops: tl.constexpr,
    STRIP: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One program a line of SPAN tiles: their kinds, counted by row and by column, and what lives in partial ones."""
    spans = tl.cdiv(kv_tiles, SPAN)
    line = tl.program_id(0) // spans
    first = (tl.program_id(0) % spans) * SPAN
    plane, q_tile = line // q_tiles, line % q_tiles
    b, h = plane // heads, plane % heads
    lane = tl.arange(0, SPAN)
    there = first + lane < kv_tiles
    kv_tile = tl.minimum(first + lane, kv_tiles - 1)
    found = extremes_at(memory, extremes)
    kind = classify(ops, 0, numbers, tensors, strides, found, b, h, q_tile, kv_tile, q_len, kv_len)
    # columns beyond kv_len are off, so the last kv tile is full for nobody
    kind = tl.where((kv_tile + 1) * TILE > kv_len, tl.minimum(kind, 1), kind)
    undecided = there & (kind == 1)
    for _ in tl.range(0, tl.sum(undecided.to(tl.int32))):
        at = tl.min(tl.where(undecided, lane, SPAN))
        cols = _rows_of(first + at)
        any_pair = tl.zeros([STRIP, TILE], tl.int32)
        all_pairs = any_pair + 1
        for start in tl.range(0, TILE, STRIP):
            rows = q_tile * TILE + start + tl.arange(0, STRIP)
            tile = _inside(ops, numbers, tensors, strides, b, h, rows[:, None], cols[None, :], q_len, kv_len)
            any_pair = tl.maximum(any_pair, tile.to(tl.int32))
            # rows that do not exist count for neither
            all_pairs = tl.minimum(all_pairs, (tile | (rows >= q_len)[:, None]).to(tl.int32))
            _mark(live_at(memory, queries), plane, q_len, rows, tl.max(tile.to(tl.int32), 1) != 0)
        col_any = tl.max(any_pair, 0)
        _mark(live_at(memory, keys), plane, kv_len, cols, col_any != 0)
        kind = tl.where(lane == at, tl.max(col_any) + tl.min(all_pairs), kind)
        undecided = undecided & (lane != at)
    at = line.to(tl.int64) * kv_tiles + first + lane
    tl.store(kinds_at(memory, kinds) + at, kind.to(tl.int8), mask=there)
    counts = memory + TOTALS
    for of in tl.static_range(2):
        # full, then partial
        hit = there & (kind == 2 - of)
        n = tl.sum(hit.to(tl.int32))
        tl.atomic_add(counts + of * n_rows + line, n, mask=n > 0, sem="relaxed")
        column = 2 * n_rows + of * n_cols + plane * kv_tiles + kv_tile
        tl.atomic_add(counts + column, 1, mask=hit, sem="relaxed")


@triton.jit(do_not_specialize=PLACES_AND_SHAPE)
def _dense_kernel(
    tensor,
    memory,
    words,
    words_t,
    strides,
    queries,
    keys,
    extremes,
    kinds,
    heads,
    q_len,
    kv_len,
    q_tiles,
    kv_tiles,
    n_rows,
    n_cols,
    ALIGN: tl.constexpr,
):
    """One program a tile: as `_tiles_kernel`, and if it is partial its words, in row order of tiles, and its transposed
    words, in column order."""
    number = tl.program_id(0)
    line, kv_tile = number // kv_tiles, number % kv_tiles
    plane, q_tile = line // q_tiles, line % q_tiles
    rows, cols = _rows_of(q_tile), _rows_of(kv_tile)
    # a multiple of ALIGN, and spelt so that Triton sees it
    at = (plane // heads).to(tl.int64) * (strides[0] // ALIGN) + (plane % heads).to(tl.int64) * (strides[1] // ALIGN)
    at = (at + (q_tile * TILE).to(tl.int64) * (strides[2] // ALIGN)) * ALIGN
    at += (kv_tile * TILE).to(tl.int64) * strides[3]
    q_left, kv_left = q_len - q_tile * TILE, kv_len - kv_tile * TILE
    w_t = load_words_t(tensor + at, strides[2], strides[3], q_left, kv_left, ALIGN)
    w = transpose_words(w_t)
    kind = kind_of_words(w, rows, q_len)
    if kind == 1:
        tl.store(words + number.to(tl.int64) * (TILE * WORDS) + tile_offsets(), w)
        number_t = (plane * kv_tiles + kv_tile).to(tl.int64) * q_tiles + q_tile
        tl.store(words_t + number_t * (TILE * WORDS) + tile_offsets(), w_t)
        # full tiles are seen by their counts
        _mark(live_at(memory, queries), plane, q_len, rows, live_of_words(w))
        _mark(live_at(memory, keys), plane, kv_len, cols, live_of_words(w_t))
    tl.store(kinds_at(memory, kinds) + number, kind)
    counts = memory + TOTALS
    tl.atomic_add(counts + tl.where(kind == 2, 0, n_rows) + line, 1, mask=kind > 0, sem="relaxed")
    column = 2 * n_rows + tl.where(kind == 2, 0, n_cols) + plane * kv_tiles + kv_tile
    tl.atomic_add(counts + column, 1, mask=kind > 0, sem="relaxed")


@triton.jit(do_not_specialize=["place_stride", "field_stride", "q_len", "kv_len"])
def _tile_words_kernel(
    tiles, places, words, kinds, strides, place_stride, field_stride, q_len, kv_len, ALIGN: tl.constexpr
):
    """`words_of_tiles`, one program a tile."""
    number = tl.program_id(0).to(tl.int64)
    place = places + number * place_stride
    q_tile = tl.load(place + 2 * field_stride).to(tl.int32)
    kv_tile = tl.load(place + 3 * field_stride).to(tl.int32)
    tile = tiles + number * (strides[0] // ALIGN) * ALIGN
    w_t = load_words_t(tile, strides[1], strides[2], q_len - q_tile * TILE, kv_len - kv_tile * TILE, ALIGN)
    w = transpose_words(w_t)
    tl.store(words + number * (TILE * WORDS) + tile_offsets(), w)
    tl.store(kinds + number, kind_of_words(w, _rows_of(q_tile), q_len))


@triton.jit
def _entry(tiles, lines, entry, is_row, n_full, n_partial):
    """Tile and global line number of a partial tile of the rows, or else of the columns."""
    at = entry + tl.where(is_row, 0, padded(n_partial))
    return tl.load(tiles + 2 * padded(n_full).to(tl.int64) + at), tl.load(lines + at)


@triton.jit(do_not_specialize=["n_full", "n_partial", "q_tiles", "kv_tiles"])
def _copy_kernel(tiles, lines, all_words, all_words_t, words, words_t, n_full, n_partial, q_tiles, kv_tiles):
    """One program an entry of the rows, then of the columns: its words, out of those of all tiles."""
    entry = tl.program_id(0)
    offs = word_offsets(0, TILE)
    if entry < n_partial:
        tile, line = _entry(tiles, lines, entry, True, n_full, n_partial)
        w = tl.load(all_words + (line.to(tl.int64) * kv_tiles + tile) * (TILE * WORDS) + offs)
        tl.store(words + entry.to(tl.int64) * (TILE * WORDS) + offs, w)
    else:
        entry -= n_partial
        tile, line = _entry(tiles, lines, entry, False, n_full, n_partial)
        w = tl.load(all_words_t + (line.to(tl.int64) * q_tiles + tile) * (TILE * WORDS) + offs)
        tl.store(words_t + entry.to(tl.int64) * (TILE * WORDS) + offs, w)


@triton.jit(
    do_not_specialize=["entries", "n_full", "n_partial", "heads", "q_len", "kv_len", "q_tiles", "kv_tiles"],
)
def _words_kernel(
    numbers,
    tensors,
    strides,
    tiles,
    lines,
    words,
    words_t,
    entries,
    n_full,
    n_partial,
    heads,
    q_len,
    kv_len,
    q_tiles,
    kv_tiles,
    ops: tl.constexpr,
    STRIP: tl.constexpr,
):
    """One program an entry of the rows, `entries` of them, then of the columns: its words from the tile again."""
    entry = tl.program_id(0)
    if entry < entries:
        tile, line = _entry(tiles, lines, entry, True, n_full, n_partial)
        plane, cols = line // q_tiles, _rows_of(tile)
        b, h = plane // heads, plane % heads
        at = words + entry.to(tl.int64) * (TILE * WORDS)
        for start in tl.range(0, TILE, STRIP):
            rows = (line % q_tiles) * TILE + start + tl.arange(0, STRIP)
            bits = _inside(ops, numbers, tensors, strides, b, h, rows[:, None], cols[None, :], q_len, kv_len)
            tl.store(at + word_offsets(start, STRIP), words_of_bits(bits, STRIP))
    else:
        entry -= entries
        tile, line = _entry(tiles, lines, entry, False, n_full, n_partial)
        plane, kv_tile = line // kv_tiles, line % kv_tiles
        b, h = plane // heads, plane % heads
        at = words_t + entry.to(tl.int64) * (TILE * WORDS)
        if ops[0] == PACKED:
            number = packed_place(ops, tensors, strides, b, h, tile, kv_tile)
            w = tl.load(words + number * (TILE * WORDS) + tile_offsets())
            tl.store(at + tile_offsets(), transpose_words(w))
        else:
            cols = _rows_of(tile)
            for start in tl.range(0, TILE, STRIP):
                rows = kv_tile * TILE + start + tl.arange(0, STRIP)
                bits = _inside(ops, numbers, tensors, strides, b, h, cols[None, :], rows[:, None], q_len, kv_len)
                tl.store(at + word_offsets(start, STRIP), words_of_bits(bits, STRIP))
