"""The device twin of pack.py: the same `BlockMask`, field by field, from a few kernels and one synchronisation.

A dense tensor is read once, by `_classify_kernel`, into a kind and words for every tile. From there both entries share
`_finish`: find the live positions, count, scan, synchronise for the sizes, then fill the lists and transpose the words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymask.mask.bits import TILE, WORDS
from anymask.mask.block_mask import BlockMask, TileLists
from anymask.mask.expr import Grid
from anymask.shapes import TileKinds, Words

# kinds (of tiles along a line) or counts (of lines of a plane) that a program reads at a time
CHUNK = 1024
# no floating-point arithmetic here; Triton 3.9 wants it said
LAUNCH = {"enable_fp_fusion": False}
# dtypes that kernels read as they are; others are compared with 0 first, at the price of a bool copy
READABLE = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def pack_dense(tensor: Tensor, q_len: int, kv_len: int) -> BlockMask:
    """The `BlockMask` of a tensor `[mask_batch, mask_heads, 1 or q_len, 1 or kv_len]`, non-zero = attend."""
    grid = Grid(q_len, kv_len, tensor.device)
    batch, heads = tensor.shape[:2]
    tensor = tensor.expand(batch, heads, q_len, kv_len)
    if tensor.dtype not in READABLE:
        tensor = tensor != 0
    kinds = torch.empty(batch, heads, grid.q_tiles, grid.kv_tiles, dtype=torch.int8, device=grid.device)
    words, words_t = (torch.empty(kinds.numel(), TILE, WORDS, dtype=torch.int32, device=grid.device) for _ in range(2))
    if kinds.numel():
        tensor = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
        with torch.cuda.device_of(tensor):
            _classify_kernel[(kinds.numel(),)](
                tensor,
                kinds,
                words,
                words_t,
                tensor.stride(),
                heads,
                q_len,
                kv_len,
                grid.q_tiles,
                grid.kv_tiles,
                TILE,
                num_warps=4,
                **LAUNCH,
            )
    return _finish(kinds, words, words_t, None, grid)


def lists_from_tiles(kinds: TileKinds, words: Words, grid: Grid) -> BlockMask:
    """The `BlockMask` of tile kinds and of the words of the partial tiles in row order."""
    index = (kinds == 1).flatten().cumsum(0, dtype=torch.int32) - 1
    return _finish(kinds, words, None, index, grid)


def _finish(kinds: TileKinds, words: Words, words_t: Words | None, index: Tensor | None, grid: Grid) -> BlockMask:
    """`words`, `words_t` hold all tiles, in row and in column order; or `words` only the partial ones, by `index`."""
    batch, heads, q_tiles, kv_tiles = kinds.shape
    planes = batch * heads
    n_rows, n_cols = planes * q_tiles, planes * kv_tiles

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=grid.device)

    q_live = torch.zeros(planes * grid.q_len, dtype=torch.uint8, device=grid.device)
    kv_live = torch.zeros(planes * grid.kv_len, dtype=torch.uint8, device=grid.device)
    counts = new(2 * (n_rows + n_cols))
    row_full, row_partial, col_full, col_partial = offsets = [new(n + 1) for n in (n_rows, n_rows, n_cols, n_cols)]
    totals = torch.zeros(4, dtype=torch.int32, device=grid.device)
    shape = (q_tiles, kv_tiles)
    with torch.cuda.device_of(kinds):
        if kinds.numel():
            _live_kernel[(kinds.numel(),)](
                kinds, words, index, q_live, kv_live, grid.q_len, grid.kv_len, *shape, TILE, **LAUNCH
            )
        if n_rows + n_cols:
            _count_kernel[(n_rows + n_cols,)](kinds, counts, n_rows, n_cols, *shape, CHUNK, **LAUNCH)
        _scan_kernel[(6,)](
            counts, *offsets, q_live, kv_live, totals, n_rows, n_cols, q_live.numel(), kv_live.numel(), CHUNK, **LAUNCH
        )
        # the one synchronisation: sizes of what follows, and whether every position lives
        n_full, n_partial, q_alive, kv_alive = totals.tolist()
        row_full_tiles, col_full_tiles = new(n_full), new(n_full)
        row_partial_tiles, col_partial_tiles = new(n_partial), new(n_partial)
        row_order, col_order = new(batch, heads, q_tiles), new(batch, heads, kv_tiles)
        slots = new(2, kinds.numel())
        if n_rows + n_cols:
            _fill_kernel[(n_rows + n_cols,)](
                kinds,
                counts,
                *offsets,
                row_full_tiles,
                row_partial_tiles,
                col_full_tiles,
                col_partial_tiles,
                row_order,
                col_order,
                slots,
                n_rows,
                n_cols,
                *shape,
                kinds.numel(),
                CHUNK,
                **LAUNCH,
            )
        if n_partial == kinds.numel() and words_t is not None:
            row_words, col_words = words, words_t
        else:
            row_words = words if index is not None else new(n_partial, TILE, WORDS)
            col_words = new(n_partial, TILE, WORDS)
            if n_partial:
                _words_kernel[(kinds.numel(),)](
                    kinds,
                    words,
                    words_t,
                    index,
                    slots,
                    None if index is not None else row_words,
                    col_words,
                    kinds.numel(),
                    *shape,
                    TILE,
                    num_warps=4,
                    **LAUNCH,
                )
    if q_alive == q_live.numel():
        q_live = new(0, dtype=torch.uint8)
    if kv_alive == kv_live.numel():
        kv_live = new(0, dtype=torch.uint8)
    return BlockMask(
        grid.q_len,
        grid.kv_len,
        TileLists(row_full, row_full_tiles, row_partial, row_partial_tiles, row_words, row_order, q_live),
        TileLists(col_full, col_full_tiles, col_partial, col_partial_tiles, col_words, col_order, kv_live),
    )


@triton.jit
def _bits_of_words(w, TILE: tl.constexpr):
    """fp16 0/1 `[TILE, TILE]` of words `[TILE, 4]`, in column order (bits.py)."""
    pair = tl.arange(0, TILE // 8)[None, :, None, None] * 2 + tl.arange(0, 2)[None, None, None, :]
    # [TILE, TILE // 8, 4, 2]
    return tl.reshape((w[:, None, :, None] >> pair) & 1, [TILE, TILE]).to(tl.float16)


@triton.jit
def _words_of_bits(bits, TILE: tl.constexpr):
    """Words `[TILE, 4]` of fp16 0/1 `[TILE, TILE]`: a product with powers of two, exact as a byte is at most 255."""
    column = tl.arange(0, TILE)[:, None]
    octet = tl.arange(0, 16)[None, :]
    bit = 2 * (column // 8) + column % 2
    # byte y of word c, as octet 4 * c + y, is the sum of bits 8 * y .. 8 * y + 7
    belongs = ((column // 2) % 4 == octet // 4) & (bit // 8 == octet % 4)
    weight = tl.where(belongs, 1 << (bit % 8), 0).to(tl.float16)
    octets = tl.reshape(tl.dot(bits, weight).to(tl.int32), [TILE, 4, 4])
    return tl.sum(octets << (8 * tl.arange(0, 4))[None, None, :], 2)


@triton.jit
def _transposed(tile, q_tiles, kv_tiles):
    """Number in column order of the tile with this number in row order."""
    per_plane = q_tiles * kv_tiles
    inner = tile % per_plane
    return tile - inner + (inner % kv_tiles) * q_tiles + inner // kv_tiles


@triton.jit
def _word_offsets(TILE: tl.constexpr):
    return tl.arange(0, TILE)[:, None] * 4 + tl.arange(0, 4)[None, :]


# kv_len stays specialised: knowing that it is a multiple of 16 makes loads of 16 bytes out of loads of one
@triton.jit(do_not_specialize=["heads", "q_len", "q_tiles", "kv_tiles"])
def _classify_kernel(
    tensor, kinds, words, words_t, strides, heads, q_len, kv_len, q_tiles, kv_tiles, TILE: tl.constexpr
):
    """One program a tile: its kind (0 empty, 1 partial, 2 full), its words, in row order of tiles, and its transposed
    words, in column order."""
    tile = tl.program_id(0)
    plane = tile // (q_tiles * kv_tiles)
    rows = ((tile // kv_tiles) % q_tiles) * TILE + tl.arange(0, TILE)
    cols = (tile % kv_tiles) * TILE + tl.arange(0, TILE)
    base = tensor + (plane // heads).to(tl.int64) * strides[0] + (plane % heads).to(tl.int64) * strides[1]
    ptrs = base + rows[:, None].to(tl.int64) * strides[2] + cols[None, :].to(tl.int64) * strides[3]
    inside = (rows[:, None] < q_len) & (cols[None, :] < kv_len)
    # [TILE, TILE]
    bits = (tl.load(ptrs, mask=inside, other=0) != 0).to(tl.float16)
    w = _words_of_bits(bits, TILE)
    tl.store(words + tile.to(tl.int64) * (TILE * 4) + _word_offsets(TILE), w)
    tile_t = _transposed(tile, q_tiles, kv_tiles)
    tl.store(words_t + tile_t.to(tl.int64) * (TILE * 4) + _word_offsets(TILE), _words_of_bits(tl.trans(bits), TILE))
    # rows that do not exist count for neither empty nor full
    is_full = tl.min(tl.where((rows < q_len)[:, None], (w == -1).to(tl.int32), 1))
    is_empty = tl.min((w == 0).to(tl.int32))
    tl.store(kinds + tile, 1 + is_full - is_empty)


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_tiles", "kv_tiles"])
def _live_kernel(kinds, words, index, q_live, kv_live, q_len, kv_len, q_tiles, kv_tiles, TILE: tl.constexpr):
    """One program a tile: mark its rows and columns that have a pair. All programs write the same 1."""
    tile = tl.program_id(0)
    kind = tl.load(kinds + tile)
    plane = (tile // (q_tiles * kv_tiles)).to(tl.int64)
    rows = ((tile // kv_tiles) % q_tiles) * TILE + tl.arange(0, TILE)
    first_col = (tile % kv_tiles) * TILE
    if kind == 2:
        cols = first_col + tl.arange(0, TILE)
        one = tl.full([TILE], 1, tl.uint8)
        tl.store(q_live + plane * q_len + rows, one, mask=rows < q_len)
        tl.store(kv_live + plane * kv_len + cols, one, mask=cols < kv_len)
    if kind == 1:
        source = tile
        if index is not None:
            source = tl.load(index + tile)
        w = tl.load(words + source.to(tl.int64) * (TILE * 4) + _word_offsets(TILE))
        row_lives = tl.max((w != 0).to(tl.int32), 1) != 0
        tl.store(q_live + plane * q_len + rows, row_lives.to(tl.uint8), mask=row_lives)
        # [32, 4]: bit b of word c is a column of its own
        b = tl.arange(0, 32)[:, None]
        cols = first_col + 8 * (b // 2) + 2 * tl.arange(0, 4)[None, :] + b % 2
        col_lives = ((tl.reduce(w, 0, _or)[None, :] >> b) & 1) != 0
        tl.store(kv_live + plane * kv_len + cols, col_lives.to(tl.uint8), mask=col_lives)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _line_of(line, n_rows, q_tiles, kv_tiles):
    """Of line number `line` (rows of all planes, then columns of all planes): is it a row, its plane, its index in the
    plane, lines in a plane, its first tile, the stride to the next, and its length in tiles."""
    is_row = line < n_rows
    number = tl.where(is_row, line, line - n_rows)
    lines = tl.where(is_row, q_tiles, kv_tiles)
    plane = number // lines
    inner = number % lines
    first = plane * (q_tiles * kv_tiles) + tl.where(is_row, inner * kv_tiles, inner)
    return is_row, plane, inner, lines, first, tl.where(is_row, 1, kv_tiles), tl.where(is_row, kv_tiles, q_tiles)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "q_tiles", "kv_tiles"])
def _count_kernel(kinds, counts, n_rows, n_cols, q_tiles, kv_tiles, CHUNK: tl.constexpr):
    """One program a line; `counts` holds full of rows, partial of rows, full of columns, partial of columns."""
    line = tl.program_id(0)
    is_row, _, _, _, first, stride, length = _line_of(line, n_rows, q_tiles, kv_tiles)
    n_full = 0
    n_partial = 0
    for start in tl.range(0, length, CHUNK):
        x = start + tl.arange(0, CHUNK)
        kind = tl.load(kinds + first + x * stride, mask=x < length, other=0)
        n_full += tl.sum((kind == 2).to(tl.int32))
        n_partial += tl.sum((kind == 1).to(tl.int32))
    at = tl.where(is_row, line, n_rows + line)
    tl.store(counts + at, n_full)
    tl.store(counts + at + tl.where(is_row, n_rows, n_cols), n_partial)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "n_queries", "n_keys"])
def _scan_kernel(
    counts,
    row_full,
    row_partial,
    col_full,
    col_partial,
    q_live,
    kv_live,
    totals,
    n_rows,
    n_cols,
    n_queries,
    n_keys,
    CHUNK: tl.constexpr,
):
    """Programs 0 to 3: offsets of a list from its counts. 4 and 5: live queries and keys. `totals` get the sums."""
    which = tl.program_id(0)
    if which == 0:
        tl.store(totals + 0, _scan(counts, row_full, n_rows, CHUNK))
    if which == 1:
        tl.store(totals + 1, _scan(counts + n_rows, row_partial, n_rows, CHUNK))
    if which == 2:
        _scan(counts + 2 * n_rows, col_full, n_cols, CHUNK)
    if which == 3:
        _scan(counts + 2 * n_rows + n_cols, col_partial, n_cols, CHUNK)
    if which == 4:
        tl.store(totals + 2, _sum(q_live, n_queries, CHUNK))
    if which == 5:
        tl.store(totals + 3, _sum(kv_live, n_keys, CHUNK))


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


@triton.jit
def _sum(values, length, CHUNK: tl.constexpr):
    total = tl.zeros([], tl.int32)
    for start in tl.range(0, length, CHUNK * 8):
        x = start + tl.arange(0, CHUNK * 8)
        total += tl.sum(tl.load(values + x, mask=x < length, other=0).to(tl.int32))
    return total


@triton.jit(do_not_specialize=["n_rows", "n_cols", "q_tiles", "kv_tiles", "n_tiles"])
def _fill_kernel(
    kinds,
    counts,
    row_full,
    row_partial,
    col_full,
    col_partial,
    row_full_tiles,
    row_partial_tiles,
    col_full_tiles,
    col_partial_tiles,
    row_order,
    col_order,
    slots,
    n_rows,
    n_cols,
    q_tiles,
    kv_tiles,
    n_tiles,
    CHUNK: tl.constexpr,
):
    """One program a line: its two lists, its place in the order, and the number (slot) of each partial tile in them."""
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
        tile = first + x * stride
        kind = tl.load(kinds + tile, mask=x < length, other=0)
        is_full = (kind == 2).to(tl.int32)
        is_partial = (kind == 1).to(tl.int32)
        full_at = full_offset + tl.cumsum(is_full, 0) - 1
        partial_at = partial_offset + tl.cumsum(is_partial, 0) - 1
        if is_row:
            tl.store(row_full_tiles + full_at, x, mask=kind == 2)
            tl.store(row_partial_tiles + partial_at, x, mask=kind == 1)
            tl.store(slots + tile, partial_at, mask=kind == 1)
        else:
            tl.store(col_full_tiles + full_at, x, mask=kind == 2)
            tl.store(col_partial_tiles + partial_at, x, mask=kind == 1)
            tl.store(slots + n_tiles.to(tl.int64) + tile, partial_at, mask=kind == 1)
        full_offset += tl.sum(is_full)
        partial_offset += tl.sum(is_partial)
    # place in a stable descending sort: lines with more tiles, and earlier lines with as many
    of_full = counts + tl.where(is_row, 0, 2 * n_rows) + plane * lines
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


@triton.jit(do_not_specialize=["n_tiles", "q_tiles", "kv_tiles"])
def _words_kernel(
    kinds, words, words_t, index, slots, row_words, col_words, n_tiles, q_tiles, kv_tiles, TILE: tl.constexpr
):
    """One program a tile: put the words of a partial tile in its column slot, transposed if there are no `words_t`, and
    in its row slot, if they are not there already (`row_words` None)."""
    tile = tl.program_id(0)
    if tl.load(kinds + tile) == 1:
        source = tile
        if index is not None:
            source = tl.load(index + tile)
        offs = _word_offsets(TILE)
        w = tl.load(words + source.to(tl.int64) * (TILE * 4) + offs)
        if row_words is not None:
            tl.store(row_words + tl.load(slots + tile).to(tl.int64) * (TILE * 4) + offs, w)
        if words_t is None:
            w_t = _words_of_bits(tl.trans(_bits_of_words(w, TILE)), TILE)
        else:
            w_t = tl.load(words_t + _transposed(tile, q_tiles, kv_tiles).to(tl.int64) * (TILE * 4) + offs)
        col_slot = tl.load(slots + n_tiles.to(tl.int64) + tile).to(tl.int64)
        tl.store(col_words + col_slot * (TILE * 4) + offs, w_t)
