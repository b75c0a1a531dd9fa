"""The device twin of bits.py: words of a tile and its booleans, in Triton."""

import triton
import triton.language as tl

from anymask.mask import bits

# of every launch that packs: no floating-point arithmetic, and Triton 3.9 wants it said
LAUNCH = {"enable_fp_fusion": False}
TILE = tl.constexpr(bits.TILE)
WORDS = tl.constexpr(bits.WORDS)


@triton.jit
def word_offsets(first, ROWS: tl.constexpr):
    """Of the words `[ROWS, WORDS]` of some rows of a tile in memory."""
    return (first + tl.arange(0, ROWS))[:, None] * WORDS + tl.arange(0, WORDS)[None, :]


@triton.jit
def word_and_bit(column):
    """Where the bit of a column is."""
    return (column // 2) % 4, 2 * (column // 8) + column % 2


@triton.jit
def words_of_bits(bits, ROWS: tl.constexpr):
    """Words `[ROWS, WORDS]` of 0/1 `[ROWS, TILE]`: a product with powers of two, exact as a byte is at most 255."""
    word, bit = word_and_bit(tl.arange(0, TILE)[:, None])
    octet = tl.arange(0, 16)[None, :]
    # byte y of word c, as octet 4 * c + y, is the sum of bits 8 * y .. 8 * y + 7
    belongs = (word == octet // 4) & (bit // 8 == octet % 4)
    weight = tl.where(belongs, 1 << (bit % 8), 0).to(tl.float16)
    octets = tl.reshape(tl.dot(bits.to(tl.float16), weight).to(tl.int32), [ROWS, WORDS, 4])
    return tl.sum(octets << (8 * tl.arange(0, 4))[None, None, :], 2)


@triton.jit
def kind_of_words(w, rows, q_len):
    """int32, 0 empty, 1 partial or 2 full, of a tile; rows `[TILE]` that do not exist count for neither."""
    full = (w == -1) | (rows >= q_len)[:, None]
    return tl.min(full.to(tl.int32)) + tl.max((w != 0).to(tl.int32))
