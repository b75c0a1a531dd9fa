"""The forward kernel: one program computes the output of BLOCK_M queries of one head."""

import triton
import triton.language as tl

from anymask.backends.triton.tiles import (
    LOG2_E,
    hide,
    hide_end,
    listed,
    listed_words,
    load_tile,
    softmax_step,
    store_tile,
)


@triton.jit
def _fwd_loop(
    acc,
    m_i,
    l_i,
    q_tile,
    k,
    v,
    k_strides,
    v_strides,
    kv_live,
    tiles,
    words,
    begin,
    end,
    off_b,
    off_kvh,
    first_row,
    kv_len,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Entries `begin .. end` of a tile list (or, without a list, those kv tiles), BLOCK_N keys at a time."""
    STEPS: tl.constexpr = TILE // BLOCK_N
    tile = listed(tiles, begin, end)
    if IS_PARTIAL and words is not None:
        w = listed_words(words, begin, end, first_row, BLOCK_M, TILE)
    for step in tl.range(begin * STEPS, end * STEPS):
        first_col = (step % STEPS) * BLOCK_N
        start_n = tile * TILE + first_col
        tile = listed(tiles, (step + 1) // STEPS, end)
        # [BLOCK_N, BLOCK_D]
        k_tile = load_tile(
            k, k_strides, off_b, off_kvh, start_n, kv_len, kv_live, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA, not IS_PARTIAL
        )
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        if IS_NEGATIVE:
            s = -s
        if IS_PARTIAL:
            if words is None:
                s = hide_end(s, -float("inf"), start_n, kv_len, BLOCK_N)
            else:
                s = hide(s, -float("inf"), w, first_col, BLOCK_M, BLOCK_N, USE_ASM)
                w = listed_words(words, (step + 1) // STEPS, end, first_row, BLOCK_M, TILE)
        p, m_i, l_i, acc = softmax_step(s, m_i, l_i, acc, qk_scale)
        # [BLOCK_N, BLOCK_DV]
        v_tile = load_tile(
            v, v_strides, off_b, off_kvh, start_n, kv_len, kv_live, V_DIM, BLOCK_N, BLOCK_DV, USE_TMA, not IS_PARTIAL
        )
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_heads", "group"])
def _fwd_kernel(
    q,
    k,
    v,
    o_ptr,
    lse_ptr,
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
    kv_live,
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
    """Writes `o` and `lse` of BLOCK_M queries; equations (1) to (4) of docs/kernels.md.

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
    start_m = tile * TILE + first_row
    # [BLOCK_M, BLOCK_D]
    q_tile = load_tile(q, q_strides, off_b, off_h, start_m, q_len, None, HEAD_DIM, BLOCK_M, BLOCK_D, USE_TMA, False)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, BLOCK_DV]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if words is not None:
        line = plane * q_tiles + tile
        full_begin, full_end = tl.load(full_offsets + line), tl.load(full_offsets + line + 1)
        partial_begin, partial_end = tl.load(partial_offsets + line), tl.load(partial_offsets + line + 1)
    else:
        full_begin, full_end = 0, kv_len // TILE
        partial_begin, partial_end = full_end, (kv_len + TILE - 1) // TILE
    if kv_live is not None:
        kv_live += plane.to(tl.int64) * kv_len
    for IS_PARTIAL in tl.static_range(2):
        acc, m_i, l_i = _fwd_loop(
            acc,
            m_i,
            l_i,
            q_tile,
            k,
            v,
            k_strides,
            v_strides,
            kv_live,
            partial_tiles if IS_PARTIAL else full_tiles,
            words,
            partial_begin if IS_PARTIAL else full_begin,
            partial_end if IS_PARTIAL else full_end,
            off_b,
            off_kvh,
            first_row,
            kv_len,
            qk_scale,
            HEAD_DIM,
            V_DIM,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_M,
            BLOCK_N,
            IS_PARTIAL == 1,
            IS_NEGATIVE,
            USE_TMA,
            PRECISION,
            TILE,
            USE_ASM,
        )
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    store_tile(o_ptr, o_strides, off_b, off_h, start_m, q_len, acc, V_DIM, BLOCK_M, BLOCK_DV)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse_ptr += (off_b * q_heads + off_h).to(tl.int64) * q_len
    if q_tile.dtype == tl.float32:
        # in fp64, so that leaving base 2 rounds once
        m_i, l_i = m_i.to(tl.float64), l_i.to(tl.float64)
    lse = (m_i + tl.math.log2(l_i)) / LOG2_E
    tl.store(lse_ptr + offs_m, lse.to(tl.float32), mask=offs_m < q_len)
