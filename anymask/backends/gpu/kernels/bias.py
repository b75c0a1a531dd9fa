"""The gradient of a bias of pairs: one program sums a block of it over what shares it, always in one order."""

import triton
import triton.language as tl

from anymask.backends.gpu.kernels.scores import Scoring, Stats, keep, score_gradient, score_pairs
from anymask.backends.gpu.kernels.tiles import (
    Config,
    Entries,
    Operand,
    load_tile,
    load_tile_words,
    mask_pairs,
    mask_tail,
)

# entries of a map of tiles that are no number of a partial tile
EMPTY = tl.constexpr(-1)
FULL = tl.constexpr(2**31 - 1)


@triton.jit
def _bwd_bias_step(acc, q, k, v, do, stats, words, entry, scoring, start_n, cfg: tl.constexpr):
    """Adds to `acc [BLOCK_M, BLOCK_N]` the ds of a block; `entry` of the map of tiles, unread without `words`."""
    BLOCK_M: tl.constexpr = cfg.BLOCK_M
    BLOCK_N: tl.constexpr = cfg.BLOCK_N
    start_m = scoring.start
    q_tile = load_tile(q, start_m, cfg.HEAD_DIM, BLOCK_M, cfg.BLOCK_D, cfg.USE_TMA, False)
    k_tile = load_tile(k, start_n, cfg.HEAD_DIM, BLOCK_N, cfg.BLOCK_D, cfg.USE_TMA, False)
    s = tl.dot(q_tile, k_tile.T, input_precision=cfg.PRECISION)
    do_tile = load_tile(do, start_m, cfg.V_DIM, BLOCK_M, cfg.BLOCK_DV, cfg.USE_TMA, False)
    v_tile = load_tile(v, start_n, cfg.V_DIM, BLOCK_N, cfg.BLOCK_DV, cfg.USE_TMA, False)
    dp = tl.dot(do_tile, v_tile.T, input_precision=cfg.PRECISION)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse2, delta = tl.load(stats.lse2 + offs_m), tl.load(stats.delta + offs_m)
    s, slope = score_pairs(s, scoring, start_m, start_n, BLOCK_M, BLOCK_N, False, q_tile.dtype == tl.float32)
    p = tl.math.exp2(s - lse2[:, None])
    if words is None:
        p = mask_tail(p, 0.0, start_n, scoring.kv_len, BLOCK_N)
    else:
        partial = Entries(None, words, 0, FULL, start_m % cfg.TILE)
        # all bits of a full tile
        w = load_tile_words(partial, entry, BLOCK_M, cfg.TILE) | tl.where(entry == FULL, -1, 0)
        p = mask_pairs(p, 0.0, w, start_n % cfg.TILE, BLOCK_M, BLOCK_N, False)
    kept = keep(scoring, start_m, start_n, BLOCK_M, BLOCK_N, False)
    ds = score_gradient(p, dp, delta[:, None], slope, kept, scoring.terms)
    # a NaN of a pair that is hidden reaches nothing
    return acc + tl.where(p == 0.0, 0.0, ds)


@triton.jit(
    do_not_specialize=["q_len", "kv_len", "q_heads", "group", "samples", "heads", "out_heads", "first_block", "rows"]
)
def _bwd_bias_kernel(
    q,
    k,
    v,
    do,
    lse2_ptr,
    delta_ptr,
    out_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    tile_map,
    words,
    plane_strides,
    q_heads,
    group,
    q_len,
    kv_len,
    # samples and heads that a program sums over, heads of the output
    samples,
    heads,
    out_heads,
    # of the first query block of the output, which has `rows` queries
    first_block,
    rows,
    qk_scale,
    terms,
    blocks,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    IS_DIAGONAL: tl.constexpr,
):
    """Writes sums of ds to fp32 `out`: of one block of pairs, or of all blocks on one diagonal of blocks.

    Grid: (blocks or diagonals, samples x heads of the output, parts). A part is an equal share of what is summed over;
    the caller adds them. `out` is `[parts, samples, heads, rows, kv_len]`, or, `IS_DIAGONAL`, `[parts, heads,
    diagonals, 2 * BLOCK_M]`: entry `i - j + BLOCK_M - 1` of row i and column j of a block.
    `tile_map`: int32 `[planes, q tiles, kv tiles]`: EMPTY, FULL, or the number of a partial tile.
    """
    place = tl.program_id(0)
    out = tl.program_id(1)
    part, parts = tl.program_id(2), tl.num_programs(2)
    q_blocks, kv_blocks = (q_len + BLOCK_M - 1) // BLOCK_M, (kv_len + BLOCK_N - 1) // BLOCK_N
    if IS_DIAGONAL:
        q_block = tl.maximum(q_blocks - 1 - place, 0)
        kv_block = tl.maximum(place - (q_blocks - 1), 0)
        steps = tl.minimum(q_blocks - q_block, kv_blocks - kv_block)
    else:
        q_block, kv_block = first_block + place // kv_blocks, place % kv_blocks
        steps = 1
    cfg: tl.constexpr = Config(HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, USE_TMA, PRECISION, TILE)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = samples * heads * steps
    for i in tl.range(total * part // parts, total * (part + 1) // parts):
        off_b = out // out_heads + i // steps // heads
        off_h = out % out_heads + i // steps % heads
        start_m, start_n = (q_block + i % steps) * BLOCK_M, (kv_block + i % steps) * BLOCK_N
        padded = (off_b * q_heads + off_h).to(tl.int64) * (((q_len + TILE - 1) // TILE) * TILE)
        q_rows = Operand(q, q_strides, off_b, off_h, q_len, None)
        do_rows = Operand(do, do_strides, off_b, off_h, q_len, None)
        keys = Operand(k, k_strides, off_b, off_h // group, kv_len, None)
        values = Operand(v, v_strides, off_b, off_h // group, kv_len, None)
        stats = Stats(lse2_ptr + padded, delta_ptr + padded)
        scoring = Scoring(qk_scale, terms, blocks, off_b, off_h, q_len, kv_len, start_m)
        if words is None:
            acc = _bwd_bias_step(acc, q_rows, keys, values, do_rows, stats, words, 0, scoring, start_n, cfg)
        else:
            plane = (off_b * plane_strides[0] + off_h * plane_strides[1]).to(tl.int64)
            row = plane * ((q_len + TILE - 1) // TILE) + start_m // TILE
            entry = tl.load(tile_map + row * ((kv_len + TILE - 1) // TILE) + start_n // TILE)
            if entry != EMPTY:
                acc = _bwd_bias_step(acc, q_rows, keys, values, do_rows, stats, words, entry, scoring, start_n, cfg)
    out = (part * tl.num_programs(1) + out).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    if IS_DIAGONAL:
        # column c of row i is the pair of entry c
        offs = tl.arange(0, 2 * BLOCK_N)
        column = offs_m[:, None] + (BLOCK_M - 1) - offs[None, :]
        inside = (column >= 0) & (column < BLOCK_N)
        skewed = tl.gather(acc, tl.where(inside, column, 0), 1)
        sums = tl.sum(tl.where(inside, skewed, 0.0), 0)
        tl.store(out_ptr + (out * tl.num_programs(0) + place) * (2 * BLOCK_M) + offs, sums)
    else:
        row = place // kv_blocks * BLOCK_M + offs_m
        offs_n = kv_block * BLOCK_N + tl.arange(0, BLOCK_N)
        ptrs = out_ptr + (out * rows + row.to(tl.int64))[:, None] * kv_len + offs_n[None, :]
        tl.store(ptrs, acc, mask=(row < rows)[:, None] & (offs_n < kv_len)[None, :])
