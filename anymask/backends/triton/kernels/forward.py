"""The forward kernel: one program computes the output of BLOCK_M queries of one head."""

import triton
import triton.language as tl

from anymask.backends.gpu.kernels.redo import wants_redo
from anymask.backends.gpu.kernels.scores import Scoring, keep, score_pairs
from anymask.backends.gpu.kernels.tiles import (
    LOG2_E,
    Config,
    Entries,
    Operand,
    load_tile,
    load_tile_index,
    load_tile_words,
    mask_pairs,
    mask_tail,
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
    entries,
    scoring,
    cfg: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Fold the tiles of `entries` into output, row maxima and row sums, BLOCK_N keys at a time."""
    BLOCK_N: tl.constexpr = cfg.BLOCK_N
    STEPS: tl.constexpr = cfg.TILE // BLOCK_N
    tile = load_tile_index(entries, entries.begin)
    if IS_PARTIAL and entries.words is not None:
        w = load_tile_words(entries, entries.begin, cfg.BLOCK_M, cfg.TILE)
    for step in tl.range(entries.begin * STEPS, entries.end * STEPS):
        first_col = (step % STEPS) * BLOCK_N
        start_n = tile * cfg.TILE + first_col
        tile = load_tile_index(entries, (step + 1) // STEPS)
        # [BLOCK_N, BLOCK_D]
        k_tile = load_tile(k, start_n, cfg.HEAD_DIM, BLOCK_N, cfg.BLOCK_D, cfg.USE_TMA, not IS_PARTIAL)
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_tile, k_tile.T, input_precision=cfg.PRECISION)
        qk_scale = scoring.qk_scale
        if scoring.terms is not None:
            EXACT: tl.constexpr = q_tile.dtype == tl.float32
            s, _ = score_pairs(s, scoring, scoring.start, start_n, cfg.BLOCK_M, BLOCK_N, False, EXACT)
            qk_scale = 1.0
        elif IS_NEGATIVE:
            s = -s
        if IS_PARTIAL:
            if entries.words is None:
                s = mask_tail(s, -float("inf"), start_n, k.length, BLOCK_N)
            else:
                s = mask_pairs(s, -float("inf"), w, first_col, cfg.BLOCK_M, BLOCK_N, USE_ASM)
                w = load_tile_words(entries, (step + 1) // STEPS, cfg.BLOCK_M, cfg.TILE)
        p, m_i, l_i, acc = softmax_step(s, m_i, l_i, acc, qk_scale)
        if scoring.terms is not None and len(scoring.terms.dropout) > 0:
            p = tl.where(keep(scoring, scoring.start, start_n, cfg.BLOCK_M, BLOCK_N, False), p, 0.0)
        # [BLOCK_N, BLOCK_DV]
        v_tile = load_tile(v, start_n, cfg.V_DIM, BLOCK_N, cfg.BLOCK_DV, cfg.USE_TMA, not IS_PARTIAL)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=cfg.PRECISION)
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
    kv_has_pair,
    plane_strides,
    q_heads,
    group,
    q_len,
    kv_len,
    qk_scale,
    terms,
    blocks,
    redo,
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
    `terms`, `blocks`: of the scores, see `Scoring`.
    """
    pid_m, off_h, off_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    off_kvh = off_h // group
    PARTS: tl.constexpr = TILE // BLOCK_M
    q_tiles = tl.num_programs(0) // PARTS
    tile = pid_m // PARTS
    first_row = (pid_m % PARTS) * BLOCK_M
    plane = off_b * plane_strides[0] + off_h * plane_strides[1]
    if words is not None:
        tile = tl.load(order + plane * q_tiles + tile)
    start_m = tile * TILE + first_row
    if redo is not None and not wants_redo(redo, off_b * q_heads + off_h, start_m, q_len, BLOCK_M, TILE):
        return
    # [BLOCK_M, BLOCK_D]
    q_rows = Operand(q, q_strides, off_b, off_h, q_len, None)
    q_tile = load_tile(q_rows, start_m, HEAD_DIM, BLOCK_M, BLOCK_D, USE_TMA, False)
    m_i, l_i = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, BLOCK_DV]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if terms is not None and len(terms.sinks) == 1:
        # a sink is a key that every query sees first, whose value is 0
        m_i = tl.zeros([BLOCK_M], tl.float32) + tl.load(terms.sinks[0] + off_h) * LOG2_E
        l_i += 1.0
    if words is not None:
        row = plane * q_tiles + tile
        full_begin, full_end = tl.load(full_offsets + row), tl.load(full_offsets + row + 1)
        partial_begin, partial_end = tl.load(partial_offsets + row), tl.load(partial_offsets + row + 1)
    else:
        full_begin, full_end = 0, kv_len // TILE
        partial_begin, partial_end = full_end, (kv_len + TILE - 1) // TILE
    if kv_has_pair is not None:
        kv_has_pair += plane.to(tl.int64) * kv_len
    cfg: tl.constexpr = Config(HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, USE_TMA, PRECISION, TILE)
    keys = Operand(k, k_strides, off_b, off_kvh, kv_len, None)
    values = Operand(v, v_strides, off_b, off_kvh, kv_len, None)
    # rows without a pair are in partial tiles only, and a select drops their scores
    used_values = Operand(v, v_strides, off_b, off_kvh, kv_len, kv_has_pair)
    full = Entries(full_tiles, words, full_begin, full_end, first_row)
    partial = Entries(partial_tiles, words, partial_begin, partial_end, first_row)
    scoring = Scoring(qk_scale, terms, blocks, off_b, off_h, q_len, kv_len, start_m)
    acc, m_i, l_i = _fwd_loop(acc, m_i, l_i, q_tile, keys, values, full, scoring, cfg, False, IS_NEGATIVE, USE_ASM)
    acc, m_i, l_i = _fwd_loop(
        acc, m_i, l_i, q_tile, keys, used_values, partial, scoring, cfg, True, IS_NEGATIVE, USE_ASM
    )
    if terms is not None and len(terms.dropout) > 0:
        acc *= terms.dropout.scale
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    store_tile(Operand(o_ptr, o_strides, off_b, off_h, q_len, None), start_m, acc, V_DIM, BLOCK_M, BLOCK_DV)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse_ptr += (off_b * q_heads + off_h).to(tl.int64) * q_len
    if q_tile.dtype == tl.float32:
        # in fp64, so that leaving base 2 rounds once
        m_i, l_i = m_i.to(tl.float64), l_i.to(tl.float64)
    tl.store(lse_ptr + offs_m, ((m_i + tl.math.log2(l_i)) / LOG2_E).to(tl.float32), mask=offs_m < q_len)
