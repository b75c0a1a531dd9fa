"""What every Triton kernel shares: reading and writing tiles, reading the mask's bits, masking, and the softmax's step.

Triton flattens a record to its fields: records cost nothing. A record of constants is assigned and passed as
`tl.constexpr`, or Triton takes them for tensors. A field must not be called `index` or `count`, which are methods of
tuples.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from anymask import precision

LOG2_E = tl.constexpr(precision.LOG2_E)


class Operand(NamedTuple):
    """A head of a tensor `[batch, heads, length, dim]`: a pointer to the tensor, or a descriptor of it with USE_TMA.

    `has_pair`, if not None: int8 `[length]`, 0 for rows that no pair of the plane needs.
    """

    source: Any
    strides: Any
    off_b: Any
    off_h: Any
    length: Any
    has_pair: Any


class Entries(NamedTuple):
    """Entries `begin .. end` of a tile list; without a list (None), the tiles of these numbers.

    `words`: of all partial tiles. `first_row`: the row within each tile at which a program's window starts.
    """

    tiles: Any
    words: Any
    begin: Any
    end: Any
    first_row: Any


class Config(NamedTuple):
    """Constants of the kernels over tile lists: dims, dims as padded, queries and keys of a step."""

    HEAD_DIM: Any
    V_DIM: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    BLOCK_M: Any
    BLOCK_N: Any
    USE_TMA: Any
    PRECISION: Any
    TILE: Any


@triton.jit
def load_tile(
    x,
    start,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    IS_INSIDE: tl.constexpr,
):
    """Rows `start .. start + ROWS` of an operand `[length, DIM]`, 0 beyond its edges and where rows have no pair.

    `IS_INSIDE` promises that all rows exist.
    """
    offs = start + tl.arange(0, ROWS)
    if USE_TMA:
        # [1, 1, ROWS, BLOCK_D]
        block = x.source.load([x.off_b, x.off_h, start, 0])
        tile = tl.reshape(block, [ROWS, BLOCK_D])
        if x.has_pair is not None:
            wanted = tl.load(x.has_pair + offs, mask=offs < x.length, other=0) != 0
            tile = tl.where(wanted[:, None], tile, 0.0)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        base = x.source + x.off_b.to(tl.int64) * x.strides[0] + x.off_h.to(tl.int64) * x.strides[1]
        # [ROWS, BLOCK_D]
        ptrs = base + offs[:, None].to(tl.int64) * x.strides[2] + offs_d[None, :]
        if x.has_pair is not None:
            wanted = tl.load(x.has_pair + offs, mask=offs < x.length, other=0) != 0
            tile = tl.load(ptrs, mask=wanted[:, None] & (offs_d[None, :] < DIM), other=0.0)
        elif not IS_INSIDE:
            tile = tl.load(ptrs, mask=(offs[:, None] < x.length) & (offs_d[None, :] < DIM), other=0.0)
        elif DIM != BLOCK_D:
            tile = tl.load(ptrs, mask=offs_d[None, :] < DIM, other=0.0)
        else:
            tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(x, start, value, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the rows of `value [ROWS, BLOCK_D]` that exist in an operand `[length, DIM]`, through its pointer."""
    offs = start + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    base = x.source + x.off_b.to(tl.int64) * x.strides[0] + x.off_h.to(tl.int64) * x.strides[1]
    ptrs = base + offs[:, None].to(tl.int64) * x.strides[2] + offs_d[None, :]
    tl.store(ptrs, value.to(x.source.dtype.element_ty), mask=(offs[:, None] < x.length) & (offs_d[None, :] < DIM))


@triton.jit
def load_tile_index(entries, entry):
    """The tile at `entry`.

    Loops carry the tile of their next step: a load inside the step would be an indirection that costs the software
    pipeline half of its stages.
    """
    tile = entry
    if entries.tiles is not None:
        tile = tl.load(entries.tiles + entry, mask=entry < entries.end, other=0)
    return tile


@triton.jit
def load_tile_words(entries, entry, ROWS: tl.constexpr, TILE: tl.constexpr):
    """int32 `[ROWS, 4]`: words of the window's rows in the partial tile at `entry`. Carried like the tile."""
    offs = (entries.first_row + tl.arange(0, ROWS))[:, None] * 4 + tl.arange(0, 4)[None, :]
    # spelt so that the mask is a block from the start: the interpreter cannot spread a scalar one
    mask = entry + 0 * offs < entries.end
    return tl.load(entries.words + tl.cast(entry, tl.int64) * (TILE * 4) + offs, mask=mask, other=0)


@triton.jit
def mask_pairs(x, fill, w, first_col, ROWS: tl.constexpr, COLS: tl.constexpr, USE_ASM: tl.constexpr):
    """`x [ROWS, COLS]` where the pair attends, else `fill`, which is -inf with `USE_ASM`.

    `w [ROWS, 4]` are the words of the rows, `first_col` the column within the tile that the window starts at.
    """
    # columns c of the window sit at bit first_col // 4 + c // 4 of their word (bits.py)
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
def mask_tail(x, fill, start, length, COLS: tl.constexpr):
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
