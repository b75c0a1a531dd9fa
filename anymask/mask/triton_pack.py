"""The device twin of pack.py: the same `BlockMask`, field by field, from a few kernels and one synchronisation.

A kernel finds the kind of every tile and, on the way, counts tiles and marks the positions that live: for a mask by
name `_tiles_kernel`, which evaluates only what bounds leave undecided, for a dense tensor `_dense_kernel`, which reads
it once and keeps the words of all tiles. From there all entries share `lists_of`: scan, synchronise for the sizes, and
fill the lists. Last come the words of the partial tiles, for both views.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymask.mask import bits
from anymask.mask.block_mask import BlockMask
from anymask.mask.expr import Grid, Mask
from anymask.mask.triton_bits import LAUNCH, TILE, WORDS, kind_of_words, word_offsets, words_of_bits
from anymask.mask.triton_expr import READABLE, Program, classify, evaluate, packed_program, program_of
from anymask.mask.triton_lists import TOTALS, empty, lists_of, nothing_yet
from anymask.shapes import TileKinds, Words

# kv tiles that a program classifies; those that stay undecided it evaluates one after the other
SPAN = 32
# rows of a tile that a program evaluates at a time: few, as a deep expression has many values at once in registers
STRIP = 16


def pack_dense(tensor: Tensor, q_len: int, kv_len: int) -> BlockMask:
    """The `BlockMask` of a tensor `[mask_batch, mask_heads, 1 or q_len, 1 or kv_len]`, non-zero = attend."""
    grid = Grid(q_len, kv_len, tensor.device)
    batch, heads = tensor.shape[:2]
    tensor = tensor.expand(batch, heads, q_len, kv_len)
    if tensor.dtype not in READABLE:
        tensor = tensor != 0
    with torch.cuda.device_of(tensor):
        found = nothing_yet(batch, heads, grid)
        tiles = found.kinds.numel()
        words, words_t = (empty(grid, tiles, bits.TILE, bits.WORDS) for _ in range(2))
        if tiles:
            tensor = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            _dense_kernel[(tiles,)](
                tensor,
                *found,
                words,
                words_t,
                tensor.stride(),
                heads,
                q_len,
                kv_len,
                grid.q_tiles,
                grid.kv_tiles,
                batch * heads * grid.q_tiles,
                batch * heads * grid.kv_tiles,
                num_warps=4,
                **LAUNCH,
            )
        rows, cols = lists_of(found, grid)
        n_partial = rows.lines.numel()
        if n_partial != tiles:
            all_words, all_words_t = words, words_t
            words, words_t = (empty(grid, n_partial, bits.TILE, bits.WORDS) for _ in range(2))
            if n_partial:
                _copy_kernel[(2 * n_partial,)](
                    *(rows.lines, rows.partial_tiles, all_words, words),
                    *(cols.lines, cols.partial_tiles, all_words_t, words_t),
                    n_partial,
                    grid.q_tiles,
                    grid.kv_tiles,
                    num_warps=1,
                    **LAUNCH,
                )
    return BlockMask(q_len, kv_len, rows.with_words(words), cols.with_words(words_t))


def pack_expression(mask: Mask, grid: Grid) -> BlockMask | None:
    """The `BlockMask` of a mask, its tensors on the device of `grid`; None if only torch can evaluate it."""
    with torch.cuda.device_of(torch.empty(0, device=grid.device)):
        program = program_of(mask, grid)
        return None if program is None else _pack_program(program, *mask.planes, grid, None)


def lists_from_tiles(kinds: TileKinds, words: Words, grid: Grid) -> BlockMask:
    """The `BlockMask` of tile kinds and of the words of the partial tiles in row order."""
    with torch.cuda.device_of(kinds):
        return _pack_program(packed_program(kinds.contiguous(), words), kinds.shape[0], kinds.shape[1], grid, words)


def words_of_tiles(tiles: Tensor, places: Tensor, grid: Grid, words: Words, kinds: Tensor) -> None:
    """Write words `[n, 128, 4]` and int8 kinds `[n]` of bool tiles `[n, 128, 128]`, of any strides.

    `places`: int64 `[n, 4]`, plane batch, plane head, q tile and kv tile. Pairs outside the plane do not count.
    """
    with torch.cuda.device_of(tiles):
        _tile_words_kernel[(tiles.shape[0],)](
            tiles.view(torch.uint8),
            places,
            words,
            kinds,
            tiles.stride(),
            places.stride(0),
            places.stride(1),
            grid.q_len,
            grid.kv_len,
            num_warps=4,
            **LAUNCH,
        )


def _pack_program(program: Program, batch: int, heads: int, grid: Grid, words: Words | None) -> BlockMask:
    """`words`: those of the rows, if they are there already."""
    found = nothing_yet(batch, heads, grid)
    n_rows, n_cols = batch * heads * grid.q_tiles, batch * heads * grid.kv_tiles
    mask = program.ops, program.numbers, program.tensors, program.strides
    shape = heads, grid.q_len, grid.kv_len, grid.q_tiles, grid.kv_tiles
    if found.kinds.numel():
        _tiles_kernel[(n_rows * -(-grid.kv_tiles // SPAN),)](
            *mask, program.extremes, *found, *shape, n_rows, n_cols, SPAN, STRIP, num_warps=4, **LAUNCH
        )
    rows, cols = lists_of(found, grid)
    n_partial = rows.lines.numel()
    entries = 0 if words is not None else n_partial
    words = empty(grid, n_partial, bits.TILE, bits.WORDS) if words is None else words
    words_t = empty(grid, n_partial, bits.TILE, bits.WORDS)
    if n_partial:
        _words_kernel[(entries + n_partial,)](
            *mask,
            *(rows.lines, rows.partial_tiles, words),
            *(cols.lines, cols.partial_tiles, words_t),
            entries,
            *shape,
            STRIP,
            num_warps=4,
            **LAUNCH,
        )
    return BlockMask(grid.q_len, grid.kv_len, rows.with_words(words), cols.with_words(words_t))


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


@triton.jit(do_not_specialize=["heads", "q_len", "kv_len", "q_tiles", "kv_tiles", "n_rows", "n_cols"])
def _tiles_kernel(
    ops: tl.constexpr,
    numbers,
    tensors,
    strides,
    extremes,
    kinds,
    counts,
    q_live,
    kv_live,
    heads,
    q_len,
    kv_len,
    q_tiles,
    kv_tiles,
    n_rows,
    n_cols,
    SPAN: tl.constexpr,
    STRIP: tl.constexpr,
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
    kind = classify(ops, 0, numbers, tensors, strides, extremes, b, h, q_tile, kv_tile, q_len, kv_len)
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
            _mark(q_live, plane, q_len, rows, tl.max(tile.to(tl.int32), 1) != 0)
        col_any = tl.max(any_pair, 0)
        _mark(kv_live, plane, kv_len, cols, col_any != 0)
        kind = tl.where(lane == at, tl.max(col_any) + tl.min(all_pairs), kind)
        undecided = undecided & (lane != at)
    tl.store(kinds + line.to(tl.int64) * kv_tiles + first + lane, kind.to(tl.int8), mask=there)
    counts += TOTALS
    for of in tl.static_range(2):
        # full, then partial
        hit = there & (kind == 2 - of)
        n = tl.sum(hit.to(tl.int32))
        tl.atomic_add(counts + of * n_rows + line, n, mask=n > 0, sem="relaxed")
        column = 2 * n_rows + of * n_cols + plane * kv_tiles + kv_tile
        tl.atomic_add(counts + column, 1, mask=hit, sem="relaxed")


# kv_len stays specialised: knowing that it is a multiple of 16 makes loads of 16 bytes out of loads of one
@triton.jit(do_not_specialize=["heads", "q_len", "q_tiles", "kv_tiles", "n_rows", "n_cols"])
def _dense_kernel(
    tensor,
    kinds,
    counts,
    q_live,
    kv_live,
    words,
    words_t,
    strides,
    heads,
    q_len,
    kv_len,
    q_tiles,
    kv_tiles,
    n_rows,
    n_cols,
):
    """One program a tile: as `_tiles_kernel`, and its words, in row order of tiles, and its transposed words, in column
    order."""
    number = tl.program_id(0)
    line, kv_tile = number // kv_tiles, number % kv_tiles
    plane, q_tile = line // q_tiles, line % q_tiles
    rows, cols = _rows_of(q_tile), _rows_of(kv_tile)
    base = tensor + (plane // heads).to(tl.int64) * strides[0] + (plane % heads).to(tl.int64) * strides[1]
    ptrs = base + rows[:, None].to(tl.int64) * strides[2] + cols[None, :].to(tl.int64) * strides[3]
    inside = (rows[:, None] < q_len) & (cols[None, :] < kv_len)
    # [TILE, TILE]
    tile = (tl.load(ptrs, mask=inside, other=0) != 0).to(tl.float16)
    w = words_of_bits(tile, TILE)
    tl.store(words + number.to(tl.int64) * (TILE * WORDS) + word_offsets(0, TILE), w)
    w_t = words_of_bits(tl.trans(tile), TILE)
    column = plane * kv_tiles + kv_tile
    tl.store(words_t + (column.to(tl.int64) * q_tiles + q_tile) * (TILE * WORDS) + word_offsets(0, TILE), w_t)
    kind = kind_of_words(w, rows, q_len)
    tl.store(kinds + number, kind)
    _mark(q_live, plane, q_len, rows, tl.max((w != 0).to(tl.int32), 1) != 0)
    _mark(kv_live, plane, kv_len, cols, tl.max((w_t != 0).to(tl.int32), 1) != 0)
    counts += TOTALS
    tl.atomic_add(counts + tl.where(kind == 2, 0, n_rows) + line, 1, mask=kind > 0, sem="relaxed")
    column += 2 * n_rows + tl.where(kind == 2, 0, n_cols)
    tl.atomic_add(counts + column, 1, mask=kind > 0, sem="relaxed")


@triton.jit(do_not_specialize=["place_stride", "field_stride", "q_len", "kv_len"])
def _tile_words_kernel(tiles, places, words, kinds, strides, place_stride, field_stride, q_len, kv_len):
    """`words_of_tiles`, one program a tile."""
    number = tl.program_id(0).to(tl.int64)
    place = places + number * place_stride
    rows = _rows_of(tl.load(place + 2 * field_stride).to(tl.int32))
    cols = _rows_of(tl.load(place + 3 * field_stride).to(tl.int32))
    within = tl.arange(0, TILE).to(tl.int64)
    ptrs = tiles + number * strides[0] + within[:, None] * strides[1] + within[None, :] * strides[2]
    w = words_of_bits(tl.load(ptrs, mask=(rows < q_len)[:, None] & (cols < kv_len)[None, :], other=0), TILE)
    tl.store(words + number * (TILE * WORDS) + word_offsets(0, TILE), w)
    tl.store(kinds + number, kind_of_words(w, rows, q_len))


@triton.jit(do_not_specialize=["n_partial", "q_tiles", "kv_tiles"])
def _copy_kernel(
    row_lines,
    row_tiles,
    all_words,
    row_words,
    col_lines,
    col_tiles,
    all_words_t,
    col_words,
    n_partial,
    q_tiles,
    kv_tiles,
):
    """One program an entry of the rows, then of the columns: its words, out of those of all tiles."""
    entry = tl.program_id(0)
    offs = word_offsets(0, TILE)
    if entry < n_partial:
        tile = tl.load(row_lines + entry).to(tl.int64) * kv_tiles + tl.load(row_tiles + entry)
        w = tl.load(all_words + tile * (TILE * WORDS) + offs)
        tl.store(row_words + entry.to(tl.int64) * (TILE * WORDS) + offs, w)
    else:
        entry -= n_partial
        tile = tl.load(col_lines + entry).to(tl.int64) * q_tiles + tl.load(col_tiles + entry)
        w = tl.load(all_words_t + tile * (TILE * WORDS) + offs)
        tl.store(col_words + entry.to(tl.int64) * (TILE * WORDS) + offs, w)


@triton.jit(do_not_specialize=["entries", "heads", "q_len", "kv_len", "q_tiles", "kv_tiles"])
def _words_kernel(
    ops: tl.constexpr,
    numbers,
    tensors,
    strides,
    row_lines,
    row_tiles,
    row_words,
    col_lines,
    col_tiles,
    col_words,
    entries,
    heads,
    q_len,
    kv_len,
    q_tiles,
    kv_tiles,
    STRIP: tl.constexpr,
):
    """One program an entry of the rows, `entries` of them, then of the columns: its words from the tile again."""
    entry = tl.program_id(0)
    if entry < entries:
        line = tl.load(row_lines + entry)
        plane, cols = line // q_tiles, _rows_of(tl.load(row_tiles + entry))
        b, h = plane // heads, plane % heads
        at = row_words + entry.to(tl.int64) * (TILE * WORDS)
        for start in tl.range(0, TILE, STRIP):
            rows = (line % q_tiles) * TILE + start + tl.arange(0, STRIP)
            tile = _inside(ops, numbers, tensors, strides, b, h, rows[:, None], cols[None, :], q_len, kv_len)
            tl.store(at + word_offsets(start, STRIP), words_of_bits(tile, STRIP))
    else:
        entry -= entries
        line = tl.load(col_lines + entry)
        plane, cols = line // kv_tiles, _rows_of(tl.load(col_tiles + entry))
        b, h = plane // heads, plane % heads
        at = col_words + entry.to(tl.int64) * (TILE * WORDS)
        for start in tl.range(0, TILE, STRIP):
            rows = (line % kv_tiles) * TILE + start + tl.arange(0, STRIP)
            tile = _inside(ops, numbers, tensors, strides, b, h, cols[None, :], rows[:, None], q_len, kv_len)
            tl.store(at + word_offsets(start, STRIP), words_of_bits(tile, STRIP))
