"""fp32 numbers as sums of two fp16 numbers, and what the kernels that multiply such parts share.

x = scale (hi + lo), with one power of two for the rows of a tile. A product of two such numbers is hi hi + hi lo + lo
hi, three products of a tensor core instead of six of bf16 (Ootomo and Yokota, 2022).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from anymask.backends.gpu.kernels.tiles import Operand, load_tile

# fp32 numbers that the kernel of the parts writes for a tile: the scale, the largest norm of a row, the largest |delta|
NUMBERS = tl.constexpr(3)
# the largest element of a tile becomes 2**14 to 2**15: parts are exact to 2**-23 of themselves, or to 2**-39 of it
TOP = tl.constexpr(14)
# of rows and columns of a tile, so that parts are exact to 2**-23 of the largest of their row and column
MAX_SPREAD = tl.constexpr(14)
# of the largest element of a tile, so that products of two scales are normal numbers
MAX_EXPONENT = tl.constexpr(48)


class Halves(NamedTuple):
    """A head of a tensor in parts, which are heads `off_h` and `off_h + 1`, and the numbers of its tiles."""

    source: Any
    strides: Any
    off_b: Any
    off_h: Any
    length: Any
    numbers: Any


@triton.jit(do_not_specialize=["heads", "length"])
def _parts_kernel(
    x,
    delta_ptr,
    parts_ptr,
    numbers_ptr,
    has_pair,
    x_strides,
    plane_strides,
    heads,
    length,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW: tl.constexpr,
    TILE: tl.constexpr,
    LIKE_ROWS: tl.constexpr,
):
    """Writes the parts of a tile of a head of `x [batch, heads, length, DIM]`, hi in head 2h and lo in head 2h + 1.

    ROW: elements from row to row of the parts. The scale of a tile without parts is NaN: one with numbers that are not
    finite, too large or too small, or with columns, with LIKE_ROWS rows too, of too different sizes. That of a tile of
    zeros is 0.
    `has_pair`, if not None: of the rows of each plane of a mask; those without a pair count as zeros.
    `delta_ptr`, if not None: of whole tiles, as the delta kernel writes it.
    Grid: (tiles, heads, batch).
    """
    tile = tl.program_id(0)
    off_h = tl.program_id(1)
    off_b = tl.program_id(2)
    start = tile * TILE
    if has_pair is not None:
        has_pair += (off_b * plane_strides[0] + off_h * plane_strides[1]).to(tl.int64) * length
    x_tile = load_tile(Operand(x, x_strides, off_b, off_h, length, has_pair), start, DIM, TILE, BLOCK_D, False, False)
    # the order of absolute values is that of their bits, NaN and infinities above all
    bits = x_tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    by_row, by_column = tl.max(bits, 1), tl.max(bits, 0)
    top = tl.max(by_row, 0)
    least = tl.min(tl.where(by_column == 0, top, by_column), 0)
    if LIKE_ROWS:
        least = tl.minimum(least, tl.min(tl.where(by_row == 0, top, by_row), 0))
    exponent = (top >> 23) - 127
    spread = (top >> 23) - (least >> 23)
    is_wild = (top != 0) & ((spread > MAX_SPREAD) | (exponent > MAX_EXPONENT) | (exponent < -MAX_EXPONENT))
    exponent = tl.where(is_wild | (top == 0), 0, exponent)
    inverse = ((127 - exponent + TOP) << 23).to(tl.float32, bitcast=True)
    scale = ((127 + exponent - TOP) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(is_wild, float("nan"), tl.where(top == 0, 0.0, scale))
    # parts that nobody needs are 0
    x_tile = tl.where(is_wild, 0.0, x_tile)
    norm = tl.sqrt(tl.max(tl.sum(x_tile * x_tile, 1), 0))
    scaled = x_tile * inverse
    hi = scaled.to(tl.float16)
    lo = (scaled - hi.to(tl.float32)).to(tl.float16)
    offs, offs_d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    plane = (off_b * heads + off_h).to(tl.int64)
    rows = start + offs
    at = parts_ptr + (2 * plane * length + rows[:, None]) * ROW + offs_d[None, :]
    mask = (rows[:, None] < length) & (offs_d[None, :] < DIM)
    tl.store(at, hi, mask=mask)
    tl.store(at + tl.cast(length, tl.int64) * ROW, lo, mask=mask)
    largest = 0.0
    if delta_ptr is not None:
        largest = tl.max(tl.abs(tl.load(delta_ptr + plane * (tl.num_programs(0) * TILE) + rows)), 0)
    numbers = numbers_ptr + (plane * tl.num_programs(0) + tile) * NUMBERS
    tl.store(numbers, scale)
    tl.store(numbers + 1, norm)
    tl.store(numbers + 2, largest)


@triton.jit
def halves(x, numbers, strides, off_b, off_h, heads, length, TILE: tl.constexpr):
    """`Halves` of head `off_h` of a tensor whose parts are `x`."""
    tiles = (length + TILE - 1) // TILE
    plane = (off_b * heads + off_h).to(tl.int64)
    return Halves(x, strides, off_b, 2 * off_h, length, numbers + plane * tiles * NUMBERS)


@triton.jit
def load_halves(
    x,
    start,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    IS_INSIDE: tl.constexpr,
):
    """`(hi, lo)` of rows `start .. start + ROWS`, as `load_tile` gives them."""
    upper = Operand(x.source, x.strides, x.off_b, x.off_h, x.length, None)
    lower = Operand(x.source, x.strides, x.off_b, x.off_h + 1, x.length, None)
    hi = load_tile(upper, start, DIM, ROWS, BLOCK_D, USE_TMA, IS_INSIDE)
    lo = load_tile(lower, start, DIM, ROWS, BLOCK_D, USE_TMA, IS_INSIDE)
    return hi, lo


@triton.jit
def load_number(x, tile, WHICH: tl.constexpr, TILE: tl.constexpr):
    """The scale (0), norm (1) or largest |delta| (2) of a tile, 0 of one beyond the end."""
    return tl.load(x.numbers + tile * NUMBERS + WHICH, mask=tile * TILE < x.length, other=0.0)


@triton.jit
def split(x):
    """`(hi, lo)` of fp32 numbers within fp16's range."""
    hi = x.to(tl.float16)
    return hi, (x - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def dot3(a_hi, a_lo, b_hi, b_lo):
    """`a b` of two pairs of parts, in fp32: the small products first."""
    c = tl.dot(a_lo, b_hi)
    c = tl.dot(a_hi, b_lo, c)
    return tl.dot(a_hi, b_hi, c)


@triton.jit
def gradient_scale(bound):
    """`(up, down)`, powers of two whose product is 1: `up` makes numbers up to `bound` numbers below 2**15.

    `down` is infinite for a bound that has no such pair.
    """
    exponent = (bound.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23
    within = tl.minimum(tl.maximum(exponent, 27), 240)
    up = ((254 - within + TOP) << 23).to(tl.float32, bitcast=True)
    down = ((within - TOP) << 23).to(tl.float32, bitcast=True)
    return up, tl.where(exponent > within, float("inf"), down)


@triton.jit
def largest_of(x, start, length, ROWS: tl.constexpr):
    """The largest absolute value in the rows of `x [ROWS, ..]` that exist."""
    inside = (start + tl.arange(0, ROWS)) < length
    return tl.max(tl.max(tl.where(inside[:, None], tl.abs(x), 0.0), 1), 0)
