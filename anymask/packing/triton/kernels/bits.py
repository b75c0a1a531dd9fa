"""The device twin of bits.py: words of a tile and its booleans, in Triton.

Inside kernels the words of a tile are int32 `[4, 128]`, word by position.
"""

import triton
import triton.language as tl

from anymask import tiles

# of every launch that packs: no floating-point arithmetic, and Triton 3.9 wants it said
LAUNCH = {"enable_fp_fusion": False}
TILE = tl.constexpr(tiles.TILE)
WORDS = tl.constexpr(tiles.WORDS)
EMPTY, PARTIAL, FULL = tl.constexpr(tiles.EMPTY), tl.constexpr(tiles.PARTIAL), tl.constexpr(tiles.FULL)


@triton.jit
def word_offsets(first, ROWS: tl.constexpr):
    """Of the words `[ROWS, WORDS]` of some rows of a tile in memory."""
    return (first + tl.arange(0, ROWS))[:, None] * WORDS + tl.arange(0, WORDS)[None, :]


@triton.jit
def tile_offsets():
    """Of the words `[WORDS, TILE]` of a tile in memory."""
    return tl.arange(0, WORDS)[:, None] + tl.arange(0, TILE)[None, :] * WORDS


@triton.jit
def word_and_bit(column):
    """Where the bit of a column is."""
    return (column // 2) % 4, 2 * (column // 8) + column % 2


@triton.jit
def strip_rows(ROWS: tl.constexpr):
    """Rows of a strip of ROWS rows of a tile, `[ROWS / 16, 1, 16, 1, 1]`; with `strip_columns` its pairs.

    The last dimensions are spread over the threads. So a thread has a rectangle of pairs, where what depends on the row
    alone, or on the column alone, is found once for many pairs.
    """
    far, near = tl.arange(0, ROWS // 16)[:, None, None, None, None], tl.arange(0, 16)[None, None, :, None, None]
    return 16 * far + near


@triton.jit
def strip_columns():
    """Columns of a tile, `[1, 8, 1, 4, WORDS]`: the bits of each word in two dimensions, then the words."""
    word = tl.arange(0, WORDS)[None, None, None, None, :]
    return 8 * (_strip_bits() // 2) + 2 * word + _strip_bits() % 2


@triton.jit
def _strip_bits():
    return tl.arange(0, 8)[None, :, None, None, None] + 8 * tl.arange(0, 4)[None, None, None, :, None]


@triton.jit
def four_bits():
    """Where numbers of four bits are, one for each of the eight columns of a strip that a thread has."""
    return (4 * tl.arange(0, 8))[None, :, None, None, None]


@triton.jit
def words_of_strip(pairs):
    """Words `[ROWS / 16, 16, WORDS]` of the pairs of a strip, bool."""
    return tl.sum(tl.sum(pairs.to(tl.int32) << _strip_bits(), 1), 2)


@triton.jit
def strip_word_offsets(ROWS: tl.constexpr):
    """Of the words of a strip in memory, `[ROWS / 16, 16, WORDS]`."""
    far, near = tl.arange(0, ROWS // 16)[:, None, None], tl.arange(0, 16)[None, :, None]
    return (16 * far + near) * WORDS + tl.arange(0, WORDS)[None, None, :]


@triton.jit
def load_words_t(tile, row_stride, col_stride, q_left, kv_left, ALIGN: tl.constexpr):
    """Transposed words of the tile at a pointer, of which `q_left` rows and `kv_left` columns exist; non-zero = attend.

    ALIGN 4 or 16: bytes without gaps, read as many at a time, where the address, `row_stride` and `kv_left` are
    multiples of that. Without, ALIGN is 1.
    """
    # rows are ordered by their bit and then by their word, so that all bits of a word are in one thread
    bit, word = tl.arange(0, TILE)[:, None] // WORDS, tl.arange(0, TILE)[:, None] % WORDS
    row = 8 * (bit // 2) + 2 * word + bit % 2
    far = row.to(tl.int64) * (row_stride // ALIGN)
    # [128, four columns]
    if ALIGN > 1:
        fours = tl.arange(0, 32)[None, :]
        # spelt so that Triton sees the factor
        ptrs = tile.to(tl.pointer_type(tl.uint32)) + far * (ALIGN // 4) + fours
        x = tl.load(ptrs, mask=(row < q_left) & (fours < (kv_left // ALIGN) * (ALIGN // 4)), other=0)
        # bytes of a bool are 0 and 1 but for those that were another dtype's: asking is cheaper than converting
        if tl.max(x & 0xFEFEFEFE) != 0:
            # a sum reaches the highest bit of a byte that is not 0, and no other byte
            x = ((((x & 0x7F7F7F7F) + 0x7F7F7F7F) | x) >> 7) & 0x01010101
        x = x.to(tl.int32)
    else:
        column = tl.arange(0, TILE)[None, :]
        ptrs = tile + far + column.to(tl.int64) * col_stride
        ones = tl.load(ptrs, mask=(row < q_left) & (column < kv_left), other=0) != 0
        # byte y is column y of the four
        ones = tl.reshape(ones.to(tl.int32), [TILE, 32, 4])
        x = tl.sum(ones << (8 * tl.arange(0, 4))[None, None, :], 2)
    # eight rows in the bits of a byte, an instruction for each four pairs: byte y of the words of column y
    x = tl.reshape(x, [4, 8, WORDS, 32])
    x = tl.sum(x << tl.arange(0, 8)[None, :, None, None], 1)[:, :, :, None]
    # exchange bytes of a word with columns
    y, at = (8 * tl.arange(0, 4))[None, None, None, :], (8 * tl.arange(0, 4))[:, None, None, None]
    return tl.reshape(tl.sum(((x >> y) & 255) << at, 0), [WORDS, TILE])


@triton.jit
def _exchange(words, INDEX: tl.constexpr, BIT: tl.constexpr, LOW: tl.constexpr):
    """Exchange the bit of value INDEX of a flat index into `words` with bit BIT of a bit's number. LOW has the bits
    whose number lacks it."""
    pairs = tl.reshape(words, [WORDS * TILE // (2 * INDEX), 2, INDEX])
    other = tl.xor_sum(pairs, 1, keep_dims=True) ^ pairs
    upper = (tl.arange(0, 2) == 1)[None, :, None]
    kept = tl.where(upper, -1 - LOW, LOW)
    moved = tl.where(upper, other >> BIT, other << BIT)
    return tl.reshape((pairs & kept) | (moved & ~kept), [WORDS, TILE])


@triton.jit
def transpose_words(words):
    """Words of the transposed tile: 16 transpositions of 32 x 32 bits, by exchanging the five bits of an index with
    those of a bit's number."""
    # position 8 * (b // 2) + 2 * c + b % 2 is bit b of word c
    words = _exchange(words, 1, 1, 0x55555555)
    words = _exchange(words, 8, 2, 0x33333333)
    words = _exchange(words, 16, 4, 0x0F0F0F0F)
    words = _exchange(words, 32, 8, 0x00FF00FF)
    words = _exchange(words, 64, 16, 0x0000FFFF)
    swapped = tl.permute(tl.reshape(words, [WORDS, 16, WORDS, 2]), 2, 1, 0, 3)
    return tl.reshape(swapped, [WORDS, TILE])


@triton.jit
def kind_of_words(words, rows, q_len):
    """int32, EMPTY, PARTIAL or FULL, of a tile; rows `[TILE]` that do not exist count for neither."""
    full = (words == -1) | (rows >= q_len)[None, :]
    return tl.min(full.to(tl.int32)) + tl.max((words != 0).to(tl.int32))


@triton.jit
def has_pair_of_words(words):
    """bool `[TILE]`: positions with a pair."""
    return tl.max((words != 0).to(tl.int32), 0) != 0
