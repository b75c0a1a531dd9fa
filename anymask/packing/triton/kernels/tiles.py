"""Kernels that look at tiles: their kinds, counted by row and by column, and the words of the partial ones."""

import triton
import triton.language as tl

from anymask.packing.triton.kernels.bits import (
    EMPTY,
    FULL,
    PARTIAL,
    TILE,
    WORDS,
    four_bits,
    has_pair_of_words,
    kind_of_words,
    load_words_t,
    strip_columns,
    strip_rows,
    strip_word_offsets,
    tile_offsets,
    transpose_words,
    word_offsets,
    words_of_strip,
)
from anymask.packing.triton.kernels.lists import STARTS, padded, views
from anymask.packing.triton.kernels.program import PACKED, MaskArgs, classify, inside, packed_place

PLACES_AND_SHAPE = [*STARTS, "heads", "q_len", "kv_len", "q_tiles", "kv_tiles", "n_rows", "n_cols"]


@triton.jit
def _rows_of(tile):
    return tile * TILE + tl.arange(0, TILE)


@triton.jit
def _mark(has_pair, plane, length, positions, used):
    """All programs write the same 1."""
    tl.store(has_pair + plane.to(tl.int64) * length + positions, used.to(tl.uint8), mask=used)


@triton.jit(do_not_specialize=PLACES_AND_SHAPE)
def tiles_kernel(
    numbers,
    tensors,
    layouts,
    memory,
    q_has_pair,
    kv_has_pair,
    extremes,
    offsets,
    kinds,
    heads,
    q_len,
    kv_len,
    q_tiles,
    kv_tiles,
    n_rows,
    n_cols,
    nodes: tl.constexpr,
    STRIP: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One program SPAN tiles of a row: their kinds, counted by row and by column, and the positions of partial ones."""
    spans = tl.cdiv(kv_tiles, SPAN)
    tile_row = tl.program_id(0) // spans
    first = (tl.program_id(0) % spans) * SPAN
    plane, q_tile = tile_row // q_tiles, tile_row % q_tiles
    b, h = plane // heads, plane % heads
    lane = tl.arange(0, SPAN)
    there = first + lane < kv_tiles
    kv_tile = tl.minimum(first + lane, kv_tiles - 1)
    mask = MaskArgs(numbers, tensors, layouts)
    work = views(memory, q_has_pair, kv_has_pair, extremes, offsets, kinds)
    kind = classify(nodes, mask, work.extremes, b, h, q_tile, kv_tile, q_len, kv_len)
    # columns beyond kv_len are off, so the last kv tile is full for nobody
    kind = tl.where((kv_tile + 1) * TILE > kv_len, tl.minimum(kind, PARTIAL), kind)
    undecided = there & (kind == PARTIAL)
    for _ in tl.range(0, tl.sum(undecided.to(tl.int32))):
        at = tl.min(tl.where(undecided, lane, SPAN))
        cols = (first + at) * TILE + strip_columns()
        # pairs by column, eight numbers of four bits, as each sums no more than TILE / 16 rows
        found = tl.zeros([1, 16, 4, WORDS], tl.uint32)
        for start in tl.range(0, TILE, STRIP):
            rows = q_tile * TILE + start + strip_rows(STRIP)
            pairs = inside(nodes, mask, b, h, rows, cols, q_len, kv_len)
            eight = tl.sum(pairs.to(tl.uint32) << four_bits(), 1, keep_dims=True)
            found += tl.sum(eight, 0)
            row_any = tl.max(tl.max((eight != 0).to(tl.int32), 3, keep_dims=True), 4, keep_dims=True)
            _mark(work.q_has_pair, plane, q_len, rows, row_any != 0)
        by_column = tl.sum((found[None, :, :, :, :] >> four_bits() & 15).to(tl.int32), 2, keep_dims=True)
        _mark(work.kv_has_pair, plane, kv_len, cols, by_column != 0)
        # 0, 1 or 2: EMPTY, PARTIAL or FULL; rows that do not exist count for neither
        n = tl.sum(by_column)
        of_tile = (n > 0).to(tl.int32) + (n == TILE * tl.minimum(TILE, q_len - q_tile * TILE)).to(tl.int32)
        kind = tl.where(lane == at, of_tile, kind)
        undecided = undecided & (lane != at)
    at = tile_row.to(tl.int64) * kv_tiles + first + lane
    tl.store(work.kinds + at, kind.to(tl.int8), mask=there)
    counts = work.counts
    for of in tl.static_range(2):
        # full, then partial
        hit = there & (kind == FULL - of)
        n = tl.sum(hit.to(tl.int32))
        tl.atomic_add(counts + of * n_rows + tile_row, n, mask=n > 0, sem="relaxed")
        column = 2 * n_rows + of * n_cols + plane * kv_tiles + kv_tile
        tl.atomic_add(counts + column, 1, mask=hit, sem="relaxed")


@triton.jit(do_not_specialize=PLACES_AND_SHAPE)
def dense_kernel(
    tensor,
    memory,
    words,
    strides,
    q_has_pair,
    kv_has_pair,
    extremes,
    offsets,
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
    """One program a tile: as `tiles_kernel`, and if it is partial its words, in row order of tiles, and behind those of
    all tiles its transposed words, in column order."""
    number = tl.program_id(0)
    tile_row, kv_tile = number // kv_tiles, number % kv_tiles
    plane, q_tile = tile_row // q_tiles, tile_row % q_tiles
    rows, cols = _rows_of(q_tile), _rows_of(kv_tile)
    # a multiple of ALIGN, and spelt so that Triton sees it
    at = (plane // heads).to(tl.int64) * (strides[0] // ALIGN) + (plane % heads).to(tl.int64) * (strides[1] // ALIGN)
    at = (at + (q_tile * TILE).to(tl.int64) * (strides[2] // ALIGN)) * ALIGN
    at += (kv_tile * TILE).to(tl.int64) * strides[3]
    q_left, kv_left = q_len - q_tile * TILE, kv_len - kv_tile * TILE
    w_t = load_words_t(tensor + at, strides[2], strides[3], q_left, kv_left, ALIGN)
    w = transpose_words(w_t)
    kind = kind_of_words(w, rows, q_len)
    work = views(memory, q_has_pair, kv_has_pair, extremes, offsets, kinds)
    if kind == PARTIAL:
        tl.store(words + number.to(tl.int64) * (TILE * WORDS) + tile_offsets(), w)
        number_t = n_rows.to(tl.int64) * kv_tiles + (plane * kv_tiles + kv_tile).to(tl.int64) * q_tiles + q_tile
        tl.store(words + number_t * (TILE * WORDS) + tile_offsets(), w_t)
        # full tiles are seen by their counts
        _mark(work.q_has_pair, plane, q_len, rows, has_pair_of_words(w))
        _mark(work.kv_has_pair, plane, kv_len, cols, has_pair_of_words(w_t))
    tl.store(work.kinds + number, kind)
    row = tl.where(kind == FULL, 0, n_rows) + tile_row
    tl.atomic_add(work.counts + row, 1, mask=kind != EMPTY, sem="relaxed")
    column = 2 * n_rows + tl.where(kind == FULL, 0, n_cols) + plane * kv_tiles + kv_tile
    tl.atomic_add(work.counts + column, 1, mask=kind != EMPTY, sem="relaxed")


@triton.jit(do_not_specialize=["place_stride", "field_stride", "q_len", "kv_len"])
def tile_words_kernel(
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
def _entry(tiles, tile_rows, entry, is_row, n_partial):
    """A partial tile of the rows, or else of the columns, and the global number of its row or column."""
    at = entry + tl.where(is_row, 0, padded(n_partial))
    return tl.load(tiles + at), tl.load(tile_rows + at)


@triton.jit(do_not_specialize=["tiles", "n_tiles", "q_tiles", "kv_tiles"])
def copy_kernel(memory, lists, tile_rows, all_words, words, tiles, n_tiles, q_tiles, kv_tiles):
    """One program an entry of the rows, then of the columns: its words, out of those of all `n_tiles` tiles.

    `tiles`: where partial tiles begin in `lists`.
    """
    entry = tl.program_id(0)
    offs = word_offsets(0, TILE)
    # of all tiles, see `views`
    n_partial = tl.load(memory + 1)
    words_t = words + n_partial.to(tl.int64) * (TILE * WORDS)
    all_words_t = all_words + n_tiles.to(tl.int64) * (TILE * WORDS)
    if entry < n_partial:
        tile, tile_row = _entry(lists + tiles, tile_rows, entry, True, n_partial)
        w = tl.load(all_words + (tile_row.to(tl.int64) * kv_tiles + tile) * (TILE * WORDS) + offs)
        tl.store(words + entry.to(tl.int64) * (TILE * WORDS) + offs, w)
    else:
        entry -= n_partial
        tile, tile_row = _entry(lists + tiles, tile_rows, entry, False, n_partial)
        w = tl.load(all_words_t + (tile_row.to(tl.int64) * q_tiles + tile) * (TILE * WORDS) + offs)
        tl.store(words_t + entry.to(tl.int64) * (TILE * WORDS) + offs, w)


@triton.jit
def _place_in_column(column_tiles, offsets, column, q_tile, SPAN: tl.constexpr):
    """The entry of the columns that a tile has: those of its column before it are counted."""
    first, end = tl.load(offsets + column), tl.load(offsets + column + 1)
    place = first
    for start in tl.range(first, end, SPAN):
        x = start + tl.arange(0, SPAN)
        before = (x < end) & (tl.load(column_tiles + x, mask=x < end, other=0) < q_tile)
        place += tl.sum(before.to(tl.int32))
    return place


@triton.jit(do_not_specialize=["tiles", "heads", "q_len", "kv_len", "q_tiles", "kv_tiles", "n_rows", "n_cols"])
def words_kernel(
    numbers,
    tensors,
    layouts,
    memory,
    lists,
    tile_rows,
    words,
    tiles,
    heads,
    q_len,
    kv_len,
    q_tiles,
    kv_tiles,
    n_rows,
    n_cols,
    nodes: tl.constexpr,
    STRIP: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One program a partial tile: its words from the pairs again, and transposed among those of the columns.

    `tiles`: where partial tiles begin in `lists`.
    """
    entry = tl.program_id(0)
    mask = MaskArgs(numbers, tensors, layouts)
    # of all tiles, see `views`
    n_partial = tl.load(memory + 1)
    tile, tile_row = _entry(lists + tiles, tile_rows, entry, True, n_partial)
    plane, q_tile = tile_row // q_tiles, tile_row % q_tiles
    b, h = plane // heads, plane % heads
    # see `block_mask.parts`
    offsets = lists + 2 * padded(n_rows + 1) + padded(n_cols + 1)
    column_tiles = lists + tiles + padded(n_partial)
    place = n_partial + _place_in_column(column_tiles, offsets, plane * kv_tiles + tile, q_tile, SPAN)
    at = words + entry.to(tl.int64) * (TILE * WORDS)
    if nodes[0].code == PACKED:
        number = packed_place(nodes, 0, mask, b, h, q_tile, tile)
        w = tl.load(tensors[nodes[0].third] + number * (TILE * WORDS) + tile_offsets())
        tl.store(at + tile_offsets(), w)
    else:
        cols = tile * TILE + strip_columns()
        for start in tl.range(0, TILE, STRIP):
            rows = q_tile * TILE + start + strip_rows(STRIP)
            pairs = inside(nodes, mask, b, h, rows, cols, q_len, kv_len)
            tl.store(at + start * WORDS + strip_word_offsets(STRIP), words_of_strip(pairs))
        # threads read what others have written
        tl.debug_barrier()
        w = tl.load(at + tile_offsets())
    tl.store(words + place.to(tl.int64) * (TILE * WORDS) + tile_offsets(), transpose_words(w))
