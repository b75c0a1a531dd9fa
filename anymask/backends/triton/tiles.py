"""What every kernel shares: reading a tile, reading the mask's bits, and the one copy of the online softmax."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(
    source,
    strides,
    off_b,
    off_h,
    start,
    length,
    live,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    IS_INSIDE: tl.constexpr,
):
    """Rows `start .. start + ROWS` of a head `[length, DIM]`, 0 beyond its edges and where `live` (if given) is 0.

    `source` is a descriptor of the whole tensor with `USE_TMA`, else a pointer; `IS_INSIDE` promises that all rows exist.
    """
    if USE_TMA:
        # [1, 1, ROWS, BLOCK_D]
        block = source.load([off_b, off_h, start, 0])
        tile = tl.reshape(block, [ROWS, BLOCK_D])
    else:
        offs = start + tl.arange(0, ROWS)
        offs_d = tl.arange(0, BLOCK_D)
        base = source + off_b.to(tl.int64) * strides[0] + off_h.to(tl.int64) * strides[1]
        # [ROWS, BLOCK_D]
        ptrs = base + offs[:, None].to(tl.int64) * strides[2] + offs_d[None, :]
        if live is not None:
            wanted = tl.load(live + offs, mask=offs < length, other=0) != 0
            tile = tl.load(ptrs, mask=wanted[:, None] & (offs_d[None, :] < DIM), other=0.0)
        elif not IS_INSIDE:
            tile = tl.load(ptrs, mask=(offs[:, None] < length) & (offs_d[None, :] < DIM), other=0.0)
        elif DIM != BLOCK_D:
            tile = tl.load(ptrs, mask=offs_d[None, :] < DIM, other=0.0)
        else:
            tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(
    pointer,
    strides,
    off_b,
    off_h,
    start,
    length,
    value,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the rows of `value [ROWS, BLOCK_D]` that exist in a head `[length, DIM]`."""
    offs = start + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    base = pointer + off_b.to(tl.int64) * strides[0] + off_h.to(tl.int64) * strides[1]
    ptrs = base + offs[:, None].to(tl.int64) * strides[2] + offs_d[None, :]
    tl.store(ptrs, value.to(pointer.dtype.element_ty), mask=(offs[:, None] < length) & (offs_d[None, :] < DIM))


@triton.jit
def attends(
    words, entry, first_row, first_col, other_len, col, ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr
):
    """bool `[ROWS, COLS]`: the pairs of a partial tile that attend.

    With words, the window of tile number `entry` whose corner within the tile is `(first_row, first_col)`; without, the
    mask is only the end of the other direction: column `col + c` exists if below `other_len`.
    """
    if words is None:
        inside = (col + tl.arange(0, COLS)) < other_len
        keep = tl.broadcast_to(inside[None, :], [ROWS, COLS])
    else:
        rows = first_row + tl.arange(0, ROWS)
        base = words + entry.to(tl.int64) * (TILE * 4)
        # [ROWS, 4]; columns c of the window sit at bit first_col // 4 + c // 4 of their word (mask/bits.py)
        w = tl.load(base + rows[:, None] * 4 + tl.arange(0, 4)[None, :]) >> (first_col // 4)
        pair = tl.arange(0, COLS // 8)[None, :, None, None] * 2 + tl.arange(0, 2)[None, None, None, :]
        # [ROWS, COLS // 8, 4, 2]
        bits = (w[:, None, :, None] >> pair) & 1
        keep = tl.reshape(bits, [ROWS, COLS]) != 0
    return keep


@triton.jit
def softmax_step(s, m_i, l_i, acc, qk_scale):
    """Equation (3) of docs/kernels.md: fold scores `s` into the running maximum, sum and output; returns p too."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
    # a row with no key yet has m = -inf, and -inf - -inf would be NaN
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.math.exp2(s * qk_scale - m_safe[:, None])
    alpha = tl.math.exp2(m_i - m_safe)
    return p, m_new, l_i * alpha + tl.sum(p, 1), acc * alpha[:, None]
