"""The device twin of bits.py: words of a tile and its booleans, in Triton."""

import triton
import triton.language as tl

from anymask.mask import bits

# of every launch that packs: no floating-point arithmetic, and Triton 3.9 wants it said
LAUNCH = {"enable_fp_fusion": False}
TILE = tl.constexpr(bits.TILE)
WORDS = tl.constexpr(bits.WORDS)


@triton.jit
def word_offsets():
    """Of the words `[TILE, WORDS]` of a tile in memory."""
    return tl.arange(0, TILE)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]


@triton.jit
def bits_of_words(w):
    """Booleans `[TILE, TILE]` of words `[TILE, WORDS]`, in column order."""
    pair = tl.arange(0, TILE // 8)[None, :, None, None] * 2 + tl.arange(0, 2)[None, None, None, :]
    # [TILE, TILE // 8, WORDS, 2]
    return tl.reshape((w[:, None, :, None] >> pair) & 1, [TILE, TILE]) != 0


@triton.jit
def words_of_bits(bits):
    """Words `[TILE, WORDS]` of 0/1 `[TILE, TILE]`: a product with powers of two, exact as a byte is at most 255."""
    column = tl.arange(0, TILE)[:, None]
    octet = tl.arange(0, 16)[None, :]
    bit = 2 * (column // 8) + column % 2
    # byte y of word c, as octet 4 * c + y, is the sum of bits 8 * y .. 8 * y + 7
    belongs = ((column // 2) % 4 == octet // 4) & (bit // 8 == octet % 4)
    weight = tl.where(belongs, 1 << (bit % 8), 0).to(tl.float16)
    octets = tl.reshape(tl.dot(bits.to(tl.float16), weight).to(tl.int32), [TILE, WORDS, 4])
    return tl.sum(octets << (8 * tl.arange(0, 4))[None, None, :], 2)


@triton.jit
def kind_of_bits(row_any, row_all, rows, q_len):
    """int32, 0 empty, 1 partial or 2 full, of a tile whose rows `[TILE]` have any, or all, of their bits; rows that do
    not exist count for neither."""
    is_full = tl.min(tl.where(rows < q_len, row_all.to(tl.int32), 1))
    return 1 + is_full - (1 - tl.max(row_any.to(tl.int32)))
