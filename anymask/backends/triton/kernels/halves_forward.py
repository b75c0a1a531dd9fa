"""The forward kernel of fp32 numbers in two fp16 parts."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from anymask.backends.gpu.kernels.redo import store_redo
from anymask.backends.gpu.kernels.tiles import (
    LOG2_E,
    Config,
    Entries,
    Operand,
    load_tile_index,
    load_tile_words,
    mask_pairs,
    mask_tail,
    store_tile,
)
from anymask.backends.triton.kernels.parts import (
    TOP,
    dot3,
    halves,
    load_halves,
    load_number,
    split,
)

# a factor of scores is never smaller: its products with -inf are to be -inf
TINY = tl.constexpr(2.0**-126)


class Rows(NamedTuple):
    """Parts of BLOCK_M queries, and what their products with those of a key are multiplied by, but for its scale."""

    hi: Any
    lo: Any
    factor: Any


@triton.jit
def _halves_fwd_loop(
    acc,
    m_i,
    l_i,
    seen,
    q,
    k,
    v,
    entries,
    cfg: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """`_fwd_loop` on parts. `seen`: a sum that becomes NaN or inf if a tile has no parts, the largest scale of v."""
    BLOCK_N: tl.constexpr = cfg.BLOCK_N
    STEPS: tl.constexpr = cfg.TILE // BLOCK_N
    tile = load_tile_index(entries, entries.begin)
    k_scale, v_scale = load_number(k, tile, 0, cfg.TILE), load_number(v, tile, 0, cfg.TILE)
    if IS_PARTIAL and entries.words is not None:
        w = load_tile_words(entries, entries.begin, cfg.BLOCK_M, cfg.TILE)
    for step in tl.range(entries.begin * STEPS, entries.end * STEPS):
        first_col = (step % STEPS) * BLOCK_N
        start_n = tile * cfg.TILE + first_col
        tile = load_tile_index(entries, (step + 1) // STEPS)
        k_hi, k_lo = load_halves(k, start_n, cfg.HEAD_DIM, BLOCK_N, cfg.BLOCK_D, cfg.USE_TMA, not IS_PARTIAL)
        # [BLOCK_M, BLOCK_N]
        s = dot3(q.hi, q.lo, k_hi.T, k_lo.T)
        if IS_NEGATIVE:
            s = -s
        if IS_PARTIAL:
            if entries.words is None:
                s = mask_tail(s, -float("inf"), start_n, k.length, BLOCK_N)
            else:
                s = mask_pairs(s, -float("inf"), w, first_col, cfg.BLOCK_M, BLOCK_N, USE_ASM)
                w = load_tile_words(entries, (step + 1) // STEPS, cfg.BLOCK_M, cfg.TILE)
        factor = tl.maximum(q.factor * k_scale, TINY)
        seen = seen[0] + q.factor * k_scale + v_scale, tl.maximum(seen[1], v_scale)
        m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
        # a row with no key yet has m = -inf, and -inf - -inf would be NaN
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        # at most 2**TOP
        p = tl.math.exp2(s * factor - (m_safe - TOP)[:, None])
        alpha = tl.math.exp2(m_i - m_safe)
        m_i, l_i = m_new, l_i * alpha + tl.sum(p, 1)
        p_hi, p_lo = split(p)
        v_hi, v_lo = load_halves(v, start_n, cfg.V_DIM, BLOCK_N, cfg.BLOCK_DV, cfg.USE_TMA, not IS_PARTIAL)
        # tensor cores cut sums off: they are added here
        acc = acc * alpha[:, None] + dot3(p_hi, p_lo, v_hi, v_lo) * v_scale
        k_scale, v_scale = load_number(k, tile, 0, cfg.TILE), load_number(v, tile, 0, cfg.TILE)
    return acc, m_i, l_i, seen


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_heads", "group"])
def _halves_fwd_kernel(
    q,
    k,
    v,
    q_numbers,
    k_numbers,
    v_numbers,
    o_ptr,
    lse_ptr,
    redo,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    full_offsets,
    full_tiles,
    partial_offsets,
    partial_tiles,
    words,
    order,
    plane_strides,
    q_heads,
    group,
    q_len,
    kv_len,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Writes `o`, `lse` and `redo` of BLOCK_M queries; q, k, v are parts, with the numbers of their tiles.

    Grid: (q tiles * TILE // BLOCK_M, q_heads, batch). `IS_NEGATIVE`: qk_scale is the magnitude of a negative scale.
    """
    pid_m = tl.program_id(0)
    off_h = tl.program_id(1)
    off_b = tl.program_id(2)
    off_kvh = off_h // group
    PARTS: tl.constexpr = TILE // BLOCK_M
    q_tiles = tl.num_programs(0) // PARTS
    tile = pid_m // PARTS
    first_row = (pid_m % PARTS) * BLOCK_M
    plane = off_b * plane_strides[0] + off_h * plane_strides[1]
    if words is not None:
        tile = tl.load(order + plane * q_tiles + tile)
        row = plane * q_tiles + tile
        full_begin, full_end = tl.load(full_offsets + row), tl.load(full_offsets + row + 1)
        partial_begin, partial_end = tl.load(partial_offsets + row), tl.load(partial_offsets + row + 1)
    else:
        full_begin, full_end = 0, kv_len // TILE
        partial_begin, partial_end = full_end, (kv_len + TILE - 1) // TILE
    start_m = tile * TILE + first_row
    queries = halves(q, q_numbers, q_strides, off_b, off_h, q_heads, q_len, TILE)
    keys = halves(k, k_numbers, k_strides, off_b, off_kvh, q_heads // group, kv_len, TILE)
    values = halves(v, v_numbers, v_strides, off_b, off_kvh, q_heads // group, kv_len, TILE)
    q_hi, q_lo = load_halves(queries, start_m, HEAD_DIM, BLOCK_M, BLOCK_D, USE_TMA, False)
    rows = Rows(q_hi, q_lo, load_number(queries, tile, 0, TILE) * qk_scale)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, BLOCK_DV]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    seen = rows.factor, 0.0
    cfg: tl.constexpr = Config(HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, USE_TMA, PRECISION, TILE)
    full = Entries(full_tiles, words, full_begin, full_end, first_row)
    partial = Entries(partial_tiles, words, partial_begin, partial_end, first_row)
    acc, m_i, l_i, seen = _halves_fwd_loop(
        acc, m_i, l_i, seen, rows, keys, values, full, cfg, False, IS_NEGATIVE, USE_ASM
    )
    acc, m_i, l_i, seen = _halves_fwd_loop(
        acc, m_i, l_i, seen, rows, keys, values, partial, cfg, True, IS_NEGATIVE, USE_ASM
    )
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    store_tile(Operand(o_ptr, o_strides, off_b, off_h, q_len, None), start_m, acc, V_DIM, BLOCK_M, BLOCK_DV)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    # p is exact to 2**-39 of the largest of its row, so o is to 2**-24 of the largest of its row if that is no smaller
    is_small = (tl.max(tl.abs(acc), 1) < seen[1]) & (l_i != 0.0) & (offs_m < q_len)
    is_right = (seen[0] < float("inf")) & (tl.max(is_small.to(tl.int32), 0) == 0)
    store_redo(redo, off_b * q_heads + off_h, start_m, q_len, is_right, BLOCK_M, TILE, False)
    lse_ptr += (off_b * q_heads + off_h).to(tl.int64) * q_len
    # in fp64, so that leaving base 2 rounds once
    lse = (m_i.to(tl.float64) + tl.math.log2(l_i.to(tl.float64)) - TOP) / LOG2_E
    tl.store(lse_ptr + offs_m, lse.to(tl.float32), mask=offs_m < q_len)
