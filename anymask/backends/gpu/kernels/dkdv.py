"""The dk, dv kernel, by columns of tiles: no atomics, so both are bit-equal from run to run."""

import triton
import triton.language as tl

from anymask.backends.gpu.kernels.redo import wants_redo
from anymask.backends.gpu.kernels.scores import Scoring, Stats, keep, score_gradient, score_pairs
from anymask.backends.gpu.kernels.tiles import (
    Config,
    Entries,
    Operand,
    load_tile,
    load_tile_index,
    load_tile_words,
    mask_pairs,
    store_tile,
)


@triton.jit
def _bwd_dkdv_loop(
    dk,
    dv,
    col_sum,
    k_tile,
    v_tile,
    q,
    do,
    stats,
    entries,
    scoring,
    cfg: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
):
    """Adds to `dk`, `dv` what the tiles of `entries`, of a column, give, BLOCK_M queries at a time.

    With `Terms`, `col_sum [BLOCK_N]` is what a bias of the keys alone gets of them.
    """
    terms = scoring.terms
    BLOCK_M: tl.constexpr = cfg.BLOCK_M
    STEPS: tl.constexpr = cfg.TILE // BLOCK_M
    tile = load_tile_index(entries, entries.begin)
    if IS_PARTIAL:
        w = load_tile_words(entries, entries.begin, cfg.BLOCK_N, cfg.TILE)
    for step in tl.range(entries.begin * STEPS, entries.end * STEPS):
        first_col = (step % STEPS) * BLOCK_M
        start_m = tile * cfg.TILE + first_col
        tile = load_tile_index(entries, (step + 1) // STEPS)
        q_tile = load_tile(q, start_m, cfg.HEAD_DIM, BLOCK_M, cfg.BLOCK_D, cfg.USE_TMA, False)
        do_tile = load_tile(do, start_m, cfg.V_DIM, BLOCK_M, cfg.BLOCK_DV, cfg.USE_TMA, False)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        lse2 = tl.load(stats.lse2 + offs_m)
        # [BLOCK_N, BLOCK_M], the transposed scores
        s = tl.dot(k_tile, q_tile.T, input_precision=cfg.PRECISION)
        if terms is None:
            p = tl.math.exp2(s * scoring.qk_scale - lse2[None, :])
        else:
            EXACT: tl.constexpr = q_tile.dtype == tl.float32
            s, slope = score_pairs(s, scoring, start_m, scoring.start, BLOCK_M, cfg.BLOCK_N, True, EXACT)
            p = tl.math.exp2(s - lse2[None, :])
        if IS_PARTIAL:
            p = mask_pairs(p, 0.0, w, first_col, cfg.BLOCK_N, BLOCK_M, False)
            w = load_tile_words(entries, (step + 1) // STEPS, cfg.BLOCK_N, cfg.TILE)
        weights = p
        if terms is not None:
            kept = keep(scoring, start_m, scoring.start, BLOCK_M, cfg.BLOCK_N, True)
            if len(terms.dropout) > 0:
                weights = tl.where(kept, p, 0.0)
        dv = tl.dot(weights.to(do_tile.dtype), do_tile, dv, input_precision=cfg.PRECISION)
        dp = tl.dot(v_tile, do_tile.T, input_precision=cfg.PRECISION)
        delta = tl.load(stats.delta + offs_m)
        if terms is None:
            ds = p * (dp - delta[None, :])
        else:
            ds = score_gradient(p, dp, delta[None, :], slope, kept, terms)
            col_sum += tl.sum(ds, 1)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=cfg.PRECISION)
    return dk, dv, col_sum


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_heads"])
def _bwd_dkdv_kernel(
    q,
    k,
    v,
    do,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dk_strides,
    dv_strides,
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
    """Writes `dk`, `dv` of BLOCK_N keys of one kv head, summed over its group of query heads.

    Grid: (kv tiles * TILE // BLOCK_N, kv_heads, batch). Equations (8) and (9).
    `terms`, `blocks`: of the scores, see `Scoring`. `sums_ptr`, if not None: fp32 `[batch, q_heads, kv_len]`, the
    gradient of a bias of the keys.
    """
    pid_n = tl.program_id(0)
    off_kvh = tl.program_id(1)
    off_b = tl.program_id(2)
    PARTS: tl.constexpr = TILE // BLOCK_N
    kv_tiles = tl.num_programs(0) // PARTS
    tile = pid_n // PARTS
    first_row = (pid_n % PARTS) * BLOCK_N
    if words is not None:
        # heads of a group may have planes of their own: any order is right, the first head's is as good as another
        first_plane = off_b * plane_strides[0] + off_kvh * group * plane_strides[1]
        tile = tl.load(order + first_plane * kv_tiles + tile)
    start_n = tile * TILE + first_row
    if redo is not None and not wants_redo(redo, off_b * (q_heads // group) + off_kvh, start_n, kv_len, BLOCK_N, TILE):
        return
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    # [BLOCK_N], whether a query of any head attends to the key
    used = tl.zeros([BLOCK_N], tl.int8)
    cfg: tl.constexpr = Config(HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, USE_TMA, PRECISION, TILE)
    for i in tl.range(group):
        off_h = off_kvh * group + i
        plane = off_b * plane_strides[0] + off_h * plane_strides[1]
        q_used = q_has_pair
        if q_has_pair is not None:
            q_used = q_has_pair + plane.to(tl.int64) * q_len
        keys = Operand(k, k_strides, off_b, off_kvh, kv_len, None)
        values = Operand(v, v_strides, off_b, off_kvh, kv_len, None)
        k_tile = load_tile(keys, start_n, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA, False)
        v_tile = load_tile(values, start_n, V_DIM, BLOCK_N, BLOCK_DV, USE_TMA, False)
        if words is not None:
            row = plane * kv_tiles + tile
            full_begin, full_end = tl.load(full_offsets + row), tl.load(full_offsets + row + 1)
            partial_begin, partial_end = tl.load(partial_offsets + row), tl.load(partial_offsets + row + 1)
        else:
            full_begin, full_end = 0, (q_len + TILE - 1) // TILE
            partial_begin, partial_end = full_end, full_end
        padded = (off_b * q_heads + off_h).to(tl.int64) * (((q_len + TILE - 1) // TILE) * TILE)
        q_rows = Operand(q, q_strides, off_b, off_h, q_len, None)
        do_rows = Operand(do, do_strides, off_b, off_h, q_len, None)
        stats = Stats(lse2_ptr + padded, delta_ptr + padded)
        scoring = Scoring(qk_scale, terms, blocks, off_b, off_h, q_len, kv_len, start_n)
        col_sum = tl.zeros([BLOCK_N], tl.float32)
        full = Entries(full_tiles, words, full_begin, full_end, first_row)
        dk, dv, col_sum = _bwd_dkdv_loop(
            dk, dv, col_sum, k_tile, v_tile, q_rows, do_rows, stats, full, scoring, cfg, False
        )
        # without a mask every listed tile is full: rows beyond q_len have lse2 = inf
        if words is not None:
            partial = Entries(partial_tiles, words, partial_begin, partial_end, first_row)
            # rows without a pair are in partial tiles only
            used_q = Operand(q, q_strides, off_b, off_h, q_len, q_used)
            used_do = Operand(do, do_strides, off_b, off_h, q_len, q_used)
            dk, dv, col_sum = _bwd_dkdv_loop(
                dk, dv, col_sum, k_tile, v_tile, used_q, used_do, stats, partial, scoring, cfg, True
            )
        if kv_has_pair is not None:
            # p of a key without a query is 0 by a select, and ds = p * dp is NaN if its v is
            kv_used = kv_has_pair + plane.to(tl.int64) * kv_len
            here = tl.load(kv_used + offs_n, mask=offs_n < kv_len, other=0).to(tl.int8)
            used |= here
            col_sum = tl.where(here != 0, col_sum, 0.0)
        if sums_ptr is not None:
            sums = sums_ptr + (off_b * q_heads + off_h).to(tl.int64) * kv_len
            tl.store(sums + offs_n, col_sum, mask=offs_n < kv_len)
    if kv_has_pair is not None:
        dk = tl.where((used != 0)[:, None], dk, 0.0)
    if terms is not None and len(terms.dropout) > 0:
        dv *= terms.dropout.scale
    dk_rows = Operand(dk_ptr, dk_strides, off_b, off_kvh, kv_len, None)
    dv_rows = Operand(dv_ptr, dv_strides, off_b, off_kvh, kv_len, None)
    store_tile(dk_rows, start_n, dk * sm_scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_rows, start_n, dv, V_DIM, BLOCK_N, BLOCK_DV)
