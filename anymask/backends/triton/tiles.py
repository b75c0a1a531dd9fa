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

    `source` is a descriptor of the tensor with `USE_TMA`, else a pointer; `IS_INSIDE` promises that all rows exist.
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
def listed(tiles, entry, end):
    """Tile at `entry` of a list that stops at `end`; without a list, the tile of that number.

    Loops carry the tile of their next step: a load inside the step would be an indirection that costs the software
    pipeline half of its stages.
    """
    tile = entry
    if tiles is not None:
        tile = tl.load(tiles + entry, mask=entry < end, other=0)
    return tile


@triton.jit
def listed_words(words, entry, end, first_row, ROWS: tl.constexpr, TILE: tl.constexpr):
    """int32 `[ROWS, 4]`: words of the window's rows in the partial tile at `entry`. Carried like `listed`."""
    offs = (first_row + tl.arange(0, ROWS))[:, None] * 4 + tl.arange(0, 4)[None, :]
    # spelt so that the mask is a block from the start: the interpreter cannot spread a scalar one
    return tl.load(words + tl.cast(entry, tl.int64) * (TILE * 4) + offs, mask=entry + 0 * offs < end, other=0)


@triton.jit
def hide(x, fill, w, first_col, ROWS: tl.constexpr, COLS: tl.constexpr, USE_ASM: tl.constexpr):
    """`x [ROWS, COLS]` where the pair attends, else `fill`, which is -inf with `USE_ASM`.

    `w [ROWS, 4]` are the words of the rows, `first_col` the column within the tile that the window starts at.
    """
    # columns c of the window sit at bit first_col // 4 + c // 4 of their word (mask/bits.py)
    w = (w >> (first_col // 4))[:, None, :, None]
    pair = tl.arange(0, COLS // 8)[None, :, None, None] * 2 + tl.arange(0, 2)[None, None, None, :]
    if USE_ASM:
        # with the bit as a constant operand, ptxas turns eight tests into one R2P
        w, bit = tl.broadcast(w, 1 << pair)
        x = tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 t;
            and.b32 t, $2, $3;
            setp.ne.u32 p, t, 0;
            selp.f32 $0, $1, 0fFF800000, p;
            }""",
            "=f,f,r,r",
            [x, tl.reshape(w, [ROWS, COLS]), tl.reshape(bit, [ROWS, COLS])],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        # [ROWS, COLS // 8, 4, 2]
        x = tl.where(tl.reshape((w >> pair) & 1, [ROWS, COLS]) != 0, x, fill)
    return x


@triton.jit
def hide_end(x, fill, start, length, COLS: tl.constexpr):
    """`x [.., COLS]` where column `start + c` exists, else `fill`: the mask of a call without one."""
    return tl.where(((start + tl.arange(0, COLS)) < length)[None, :], x, fill)


@triton.jit
def softmax_step(s, m_i, l_i, acc, qk_scale):
    """Equation (3) of docs/kernels.md: fold scores `s` into the running maximum, sum and output; returns p too."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
    # a row with no key yet has m = -inf, and -inf - -inf would be NaN
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.math.exp2(s * qk_scale - m_safe[:, None])
    alpha = tl.math.exp2(m_i - m_safe)
    return p, m_new, l_i * alpha + tl.sum(p, 1), acc * alpha[:, None]
