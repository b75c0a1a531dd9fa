"""The dq kernel, by rows of tiles: no atomics, so dq is bit-equal from run to run."""

import triton
import triton.language as tl

from anymask.backends.gpu.kernels.delta import row_stats
from anymask.backends.gpu.kernels.redo import wants_redo
from anymask.backends.gpu.kernels.scores import Scoring, keep, score_gradient, score_pairs
from anymask.backends.gpu.kernels.tiles import (
    Config,
    Entries,
    Operand,
    load_tile,
    load_tile_index,
    load_tile_words,
    mask_pairs,
    mask_tail,
    store_tile,
)


@triton.jit
def _bwd_dq_loop(
    dq, row_sum, q_tile, do_tile, lse2, delta, k, v, entries, scoring, cfg: tl.constexpr, IS_PARTIAL: tl.constexpr
):
    """Adds to `dq [BLOCK_M, BLOCK_D]` what the tiles of `entries` give, BLOCK_N keys at a time.

    With a soft cap, `row_sum [BLOCK_M]` is what a bias of the queries alone gets of them.
    """
    terms = scoring.terms
    BLOCK_N: tl.constexpr = cfg.BLOCK_N
    STEPS: tl.constexpr = cfg.TILE // BLOCK_N
    tile = load_tile_index(entries, entries.begin)
    if IS_PARTIAL and entries.words is not None:
        w = load_tile_words(entries, entries.begin, cfg.BLOCK_M, cfg.TILE)
    for step in tl.range(entries.begin * STEPS, entries.end * STEPS):
        first_col = (step % STEPS) * BLOCK_N
        start_n = tile * cfg.TILE + first_col
        tile = load_tile_index(entries, (step + 1) // STEPS)
        k_tile = load_tile(k, start_n, cfg.HEAD_DIM, BLOCK_N, cfg.BLOCK_D, cfg.USE_TMA, not IS_PARTIAL)
        v_tile = load_tile(v, start_n, cfg.V_DIM, BLOCK_N, cfg.BLOCK_DV, cfg.USE_TMA, not IS_PARTIAL)
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_tile, k_tile.T, input_precision=cfg.PRECISION)
        dp = tl.dot(do_tile, v_tile.T, input_precision=cfg.PRECISION)
        if terms is None:
            p = tl.math.exp2(s * scoring.qk_scale - lse2[:, None])
        else:
            EXACT: tl.constexpr = q_tile.dtype == tl.float32
            s, slope = score_pairs(s, scoring, scoring.start, start_n, cfg.BLOCK_M, BLOCK_N, False, EXACT)
            p = tl.math.exp2(s - lse2[:, None])
        if IS_PARTIAL:
            if entries.words is None:
                p = mask_tail(p, 0.0, start_n, k.length, BLOCK_N)
            else:
                p = mask_pairs(p, 0.0, w, first_col, cfg.BLOCK_M, BLOCK_N, False)
                w = load_tile_words(entries, (step + 1) // STEPS, cfg.BLOCK_M, cfg.TILE)
        if terms is None:
            ds = p * (dp - delta[:, None])
        else:
            kept = keep(scoring, scoring.start, start_n, cfg.BLOCK_M, BLOCK_N, False)
            ds = score_gradient(p, dp, delta[:, None], slope, kept, terms)
            if len(terms.cap) == 1:
                row_sum += tl.sum(ds, 1)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=cfg.PRECISION)
    return dq, row_sum


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_heads", "group"])
def _bwd_dq_kernel(
    q,
    k,
    v,
    do,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dq_strides,
    full_offsets,
    full_tiles,
    partial_offsets,
    partial_tiles,
    words,
    order,
    q_has_pair,
    kv_has_pair,
    plane_strides,
    q_heads,
    group,
    q_len,
    kv_len,
    sm_scale,
    qk_scale,
    terms,
    blocks,
    sums_ptr,
    o,
    lse_ptr,
    dlse_ptr,
    o_strides,
    dlse_strides,
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
):
    """Writes `dq` of BLOCK_M queries of one head. Grid: (q tiles * TILE // BLOCK_M, q_heads, batch). Equation (7).

    `terms`, `blocks`: of the scores, see `Scoring`. `sums_ptr`, if not None, with a soft cap: fp32 `[batch, q_heads,
    q_len]`, the gradient of a bias of the queries. With an `o`, `lse2` and `delta` are made of it, of lse and of
    dlse, and written; else read.
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
    if redo is not None and not wants_redo(redo, off_b * q_heads + off_h, start_m, q_len, BLOCK_M, TILE):
        return
    if q_has_pair is not None:
        q_has_pair += plane.to(tl.int64) * q_len
    if kv_has_pair is not None:
        kv_has_pair += plane.to(tl.int64) * kv_len
    q_rows = Operand(q, q_strides, off_b, off_h, q_len, q_has_pair)
    do_rows = Operand(do, do_strides, off_b, off_h, q_len, q_has_pair)
    q_tile = load_tile(q_rows, start_m, HEAD_DIM, BLOCK_M, BLOCK_D, USE_TMA, False)
    do_tile = load_tile(do_rows, start_m, V_DIM, BLOCK_M, BLOCK_DV, USE_TMA, False)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    padded = (off_b * q_heads + off_h).to(tl.int64) * (tl.num_programs(0) * BLOCK_M)
    if o is not None:
        row = (off_b * q_heads + off_h).to(tl.int64)
        if dlse_ptr is not None:
            dlse_ptr += off_b.to(tl.int64) * dlse_strides[0] + off_h.to(tl.int64) * dlse_strides[1]
        o_rows = Operand(o, o_strides, off_b, off_h, q_len, None)
        o_tile = load_tile(o_rows, start_m, V_DIM, BLOCK_M, BLOCK_DV, False, False)
        lse2, delta = row_stats(o_tile, do_tile, lse_ptr + row * q_len, dlse_ptr, dlse_strides, offs_m, q_len)
        tl.store(lse2_ptr + padded + offs_m, lse2)
        tl.store(delta_ptr + padded + offs_m, delta)
    else:
        lse2 = tl.load(lse2_ptr + padded + offs_m)
        delta = tl.load(delta_ptr + padded + offs_m)
    # [BLOCK_M, BLOCK_D]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    cfg: tl.constexpr = Config(HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, USE_TMA, PRECISION, TILE)
    keys = Operand(k, k_strides, off_b, off_kvh, kv_len, None)
    values = Operand(v, v_strides, off_b, off_kvh, kv_len, None)
    # rows without a pair are in partial tiles only
    used_keys = Operand(k, k_strides, off_b, off_kvh, kv_len, kv_has_pair)
    used_values = Operand(v, v_strides, off_b, off_kvh, kv_len, kv_has_pair)
    full = Entries(full_tiles, words, full_begin, full_end, first_row)
    partial = Entries(partial_tiles, words, partial_begin, partial_end, first_row)
    scoring = Scoring(qk_scale, terms, blocks, off_b, off_h, q_len, kv_len, start_m)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    dq, row_sum = _bwd_dq_loop(dq, row_sum, q_tile, do_tile, lse2, delta, keys, values, full, scoring, cfg, False)
    dq, row_sum = _bwd_dq_loop(
        dq, row_sum, q_tile, do_tile, lse2, delta, used_keys, used_values, partial, scoring, cfg, True
    )
    dq_rows = Operand(dq_ptr, dq_strides, off_b, off_h, q_len, None)
    store_tile(dq_rows, start_m, dq * sm_scale, HEAD_DIM, BLOCK_M, BLOCK_D)
    if sums_ptr is not None:
        sums_ptr += (off_b * q_heads + off_h).to(tl.int64) * q_len
        tl.store(sums_ptr + offs_m, row_sum, mask=offs_m < q_len)
