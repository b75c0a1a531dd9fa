"""The backward kernels of fp32 numbers in two fp16 parts: dq by rows of tiles, dk and dv by columns."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from anymask.backends.gpu.kernels.redo import store_redo
from anymask.backends.gpu.kernels.scores import Stats
from anymask.backends.gpu.kernels.tiles import (
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
    gradient_scale,
    halves,
    largest_of,
    load_halves,
    load_number,
    split,
)

# a sum of products of ds is right if its largest element is as large a part of what bounds them
LEAST = tl.constexpr(2.0**-18)


class Rows(NamedTuple):
    """Parts of BLOCK_M queries; the scale of q times that of scores; scale, norm and largest |delta| of do."""

    q_hi: Any
    q_lo: Any
    do_hi: Any
    do_lo: Any
    q_factor: Any
    do_scale: Any
    do_norm: Any
    delta: Any


class Columns(NamedTuple):
    """Parts of BLOCK_N keys and values; the scale of k times that of scores, and scale and norm of v."""

    k_hi: Any
    k_lo: Any
    v_hi: Any
    v_lo: Any
    k_factor: Any
    v_scale: Any
    v_norm: Any


@triton.jit
def _halves_dq_loop(dq, total, top, rows, stats, k, v, entries, cfg: tl.constexpr, IS_PARTIAL: tl.constexpr):
    """`_bwd_dq_loop` on parts.

    `total` becomes NaN or inf if a tile has no parts, `top`
    is what bounds a product of ds and k.
    """
    BLOCK_N: tl.constexpr = cfg.BLOCK_N
    STEPS: tl.constexpr = cfg.TILE // BLOCK_N
    tile = load_tile_index(entries, entries.begin)
    k_scale, v_scale, v_norm = _numbers(k, v, tile, cfg.TILE)
    if IS_PARTIAL and entries.words is not None:
        w = load_tile_words(entries, entries.begin, cfg.BLOCK_M, cfg.TILE)
    for step in tl.range(entries.begin * STEPS, entries.end * STEPS):
        first_col = (step % STEPS) * BLOCK_N
        start_n = tile * cfg.TILE + first_col
        tile = load_tile_index(entries, (step + 1) // STEPS)
        k_hi, k_lo = load_halves(k, start_n, cfg.HEAD_DIM, BLOCK_N, cfg.BLOCK_D, cfg.USE_TMA, not IS_PARTIAL)
        v_hi, v_lo = load_halves(v, start_n, cfg.V_DIM, BLOCK_N, cfg.BLOCK_DV, cfg.USE_TMA, not IS_PARTIAL)
        # [BLOCK_M, BLOCK_N]
        s = dot3(rows.q_hi, rows.q_lo, k_hi.T, k_lo.T)
        dp = dot3(rows.do_hi, rows.do_lo, v_hi.T, v_lo.T)
        p = tl.math.exp2(s * (rows.q_factor * k_scale) - stats.lse2[:, None])
        if IS_PARTIAL:
            if entries.words is None:
                p = mask_tail(p, 0.0, start_n, k.length, BLOCK_N)
            else:
                p = mask_pairs(p, 0.0, w, first_col, cfg.BLOCK_M, BLOCK_N, False)
                w = load_tile_words(entries, (step + 1) // STEPS, cfg.BLOCK_M, cfg.TILE)
        up, down = gradient_scale(rows.do_norm * v_norm + rows.delta)
        ds = p * (dp * (rows.do_scale * v_scale * up) - (stats.delta * up)[:, None])
        ds_hi, ds_lo = split(ds)
        factor = down * k_scale
        dq += dot3(ds_hi, ds_lo, k_hi, k_lo) * factor
        total += tl.abs(rows.q_factor * k_scale) + v_scale + factor
        top = tl.maximum(top, factor)
        k_scale, v_scale, v_norm = _numbers(k, v, tile, cfg.TILE)
    return dq, total, top


@triton.jit
def _numbers(k, v, tile, TILE: tl.constexpr):
    return load_number(k, tile, 0, TILE), load_number(v, tile, 0, TILE), load_number(v, tile, 1, TILE)


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_heads", "group"])
def _halves_dq_kernel(
    q,
    k,
    v,
    do,
    q_numbers,
    k_numbers,
    v_numbers,
    do_numbers,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    redo,
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
    plane_strides,
    q_heads,
    group,
    q_len,
    kv_len,
    sm_scale,
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
):
    """Writes `dq` and `redo` of BLOCK_M queries; q, k, v and do are parts, with the numbers of their tiles.

    Grid: (q tiles * TILE // BLOCK_M, q_heads, batch). Equation (7).
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
    outputs = halves(do, do_numbers, do_strides, off_b, off_h, q_heads, q_len, TILE)
    keys = halves(k, k_numbers, k_strides, off_b, off_kvh, q_heads // group, kv_len, TILE)
    values = halves(v, v_numbers, v_strides, off_b, off_kvh, q_heads // group, kv_len, TILE)
    q_hi, q_lo = load_halves(queries, start_m, HEAD_DIM, BLOCK_M, BLOCK_D, USE_TMA, False)
    do_hi, do_lo = load_halves(outputs, start_m, V_DIM, BLOCK_M, BLOCK_DV, USE_TMA, False)
    rows = Rows(
        q_hi,
        q_lo,
        do_hi,
        do_lo,
        load_number(queries, tile, 0, TILE) * qk_scale,
        load_number(outputs, tile, 0, TILE),
        load_number(outputs, tile, 1, TILE),
        load_number(outputs, tile, 2, TILE),
    )
    offs_m = start_m + tl.arange(0, BLOCK_M)
    padded = (off_b * q_heads + off_h).to(tl.int64) * (tl.num_programs(0) * BLOCK_M)
    lse2 = tl.load(lse2_ptr + padded + offs_m)
    stats = Stats(lse2, tl.load(delta_ptr + padded + offs_m))
    # [BLOCK_M, BLOCK_D]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total, top = tl.abs(rows.q_factor) + rows.do_scale, 0.0
    cfg: tl.constexpr = Config(HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, USE_TMA, PRECISION, TILE)
    full = Entries(full_tiles, words, full_begin, full_end, first_row)
    partial = Entries(partial_tiles, words, partial_begin, partial_end, first_row)
    dq, total, top = _halves_dq_loop(dq, total, top, rows, stats, keys, values, full, cfg, False)
    dq, total, top = _halves_dq_loop(dq, total, top, rows, stats, keys, values, partial, cfg, True)
    dq_rows = Operand(dq_ptr, dq_strides, off_b, off_h, q_len, None)
    store_tile(dq_rows, start_m, dq * sm_scale, HEAD_DIM, BLOCK_M, BLOCK_D)
    # no query with a key: all is 0
    is_large = (largest_of(dq, start_m, q_len, BLOCK_M) >= top * _bound()) | (tl.min(lse2, 0) == float("inf"))
    store_redo(redo, off_b * q_heads + off_h, start_m, q_len, (total < float("inf")) & is_large, BLOCK_M, TILE, False)


@triton.jit
def _bound():
    """What a scale of ds and k is to be multiplied by: both parts go to 2**(TOP + 1)."""
    return LEAST * 2.0 ** (2 * (TOP + 1))


@triton.jit
def _halves_dkdv_loop(
    dk,
    dv,
    seen,
    kv,
    q,
    do,
    stats,
    entries,
    cfg: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
):
    """`_bwd_dkdv_loop` on parts.

    `seen`: a sum that becomes NaN or inf if a tile
    has no parts, what bounds a product of ds and q, and one of p and do.
    """
    BLOCK_M: tl.constexpr = cfg.BLOCK_M
    STEPS: tl.constexpr = cfg.TILE // BLOCK_M
    # p is at most 2**TOP
    UP: tl.constexpr = 2.0**TOP
    tile = load_tile_index(entries, entries.begin)
    q_scale, do_scale = load_number(q, tile, 0, cfg.TILE), load_number(do, tile, 0, cfg.TILE)
    do_norm, delta_top = load_number(do, tile, 1, cfg.TILE), load_number(do, tile, 2, cfg.TILE)
    if IS_PARTIAL:
        w = load_tile_words(entries, entries.begin, cfg.BLOCK_N, cfg.TILE)
    for step in tl.range(entries.begin * STEPS, entries.end * STEPS):
        first_col = (step % STEPS) * BLOCK_M
        start_m = tile * cfg.TILE + first_col
        tile = load_tile_index(entries, (step + 1) // STEPS)
        q_hi, q_lo = load_halves(q, start_m, cfg.HEAD_DIM, BLOCK_M, cfg.BLOCK_D, cfg.USE_TMA, False)
        do_hi, do_lo = load_halves(do, start_m, cfg.V_DIM, BLOCK_M, cfg.BLOCK_DV, cfg.USE_TMA, False)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        lse2 = tl.load(stats.lse2 + offs_m)
        # [BLOCK_N, BLOCK_M], the transposed scores
        s = dot3(kv.k_hi, kv.k_lo, q_hi.T, q_lo.T)
        p = tl.math.exp2(s * (kv.k_factor * q_scale) - (lse2 - TOP)[None, :])
        if IS_PARTIAL:
            p = mask_pairs(p, 0.0, w, first_col, cfg.BLOCK_N, BLOCK_M, False)
            w = load_tile_words(entries, (step + 1) // STEPS, cfg.BLOCK_N, cfg.TILE)
        total = seen[0] + tl.abs(kv.k_factor * q_scale) + do_scale
        if WITH_DV:
            p_hi, p_lo = split(p)
            dv += dot3(p_hi, p_lo, do_hi, do_lo) * (do_scale * (1 / UP))
        ds_factor = 0.0
        if WITH_DK:
            dp = dot3(kv.v_hi, kv.v_lo, do_hi.T, do_lo.T)
            delta = tl.load(stats.delta + offs_m)
            up, down = gradient_scale(kv.v_norm * do_norm + delta_top)
            up *= 1 / UP
            ds = p * (dp * (kv.v_scale * do_scale * up) - (delta * up)[None, :])
            ds_hi, ds_lo = split(ds)
            ds_factor = down * q_scale
            dk += dot3(ds_hi, ds_lo, q_hi, q_lo) * ds_factor
            total += ds_factor
        seen = total, tl.maximum(seen[1], ds_factor), tl.maximum(seen[2], do_scale)
        q_scale, do_scale = load_number(q, tile, 0, cfg.TILE), load_number(do, tile, 0, cfg.TILE)
        do_norm, delta_top = load_number(do, tile, 1, cfg.TILE), load_number(do, tile, 2, cfg.TILE)
    return dk, dv, seen


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_heads"])
def _halves_dkdv_kernel(
    q,
    k,
    v,
    do,
    q_numbers,
    k_numbers,
    v_numbers,
    do_numbers,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    redo,
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
    plane_strides,
    q_heads,
    group,
    q_len,
    kv_len,
    sm_scale,
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
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
):
    """Writes `dk`, `dv` and `redo` of BLOCK_N keys of a kv head; q, k, v and do are parts, with numbers of their tiles.

    WITH_DK or WITH_DV alone: one of them, where both take more registers than there are. That of dk comes second.
    Grid: (kv tiles * TILE // BLOCK_N, kv_heads, batch). Equations (8) and (9).
    """
    pid_n = tl.program_id(0)
    off_kvh = tl.program_id(1)
    off_b = tl.program_id(2)
    PARTS: tl.constexpr = TILE // BLOCK_N
    kv_tiles = tl.num_programs(0) // PARTS
    tile = pid_n // PARTS
    first_row = (pid_n % PARTS) * BLOCK_N
    if words is not None:
        # heads of a group may have planes of their own: any order is right
        first_plane = off_b * plane_strides[0] + off_kvh * group * plane_strides[1]
        tile = tl.load(order + first_plane * kv_tiles + tile)
    start_n = tile * TILE + first_row
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    cfg: tl.constexpr = Config(HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, USE_TMA, PRECISION, TILE)
    keys = halves(k, k_numbers, k_strides, off_b, off_kvh, q_heads // group, kv_len, TILE)
    values = halves(v, v_numbers, v_strides, off_b, off_kvh, q_heads // group, kv_len, TILE)
    k_hi, k_lo = load_halves(keys, start_n, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA, False)
    v_hi, v_lo = load_halves(values, start_n, V_DIM, BLOCK_N, BLOCK_DV, USE_TMA, False)
    v_scale, v_norm = load_number(values, tile, 0, TILE), load_number(values, tile, 1, TILE)
    kv = Columns(k_hi, k_lo, v_hi, v_lo, load_number(keys, tile, 0, TILE) * qk_scale, v_scale, v_norm)
    seen = tl.abs(kv.k_factor) + v_scale, 0.0, 0.0
    for i in tl.range(group):
        off_h = off_kvh * group + i
        plane = off_b * plane_strides[0] + off_h * plane_strides[1]
        if words is not None:
            row = plane * kv_tiles + tile
            full_begin, full_end = tl.load(full_offsets + row), tl.load(full_offsets + row + 1)
            partial_begin, partial_end = tl.load(partial_offsets + row), tl.load(partial_offsets + row + 1)
        else:
            full_begin, full_end = 0, (q_len + TILE - 1) // TILE
            partial_begin, partial_end = full_end, full_end
        padded = (off_b * q_heads + off_h).to(tl.int64) * (((q_len + TILE - 1) // TILE) * TILE)
        queries = halves(q, q_numbers, q_strides, off_b, off_h, q_heads, q_len, TILE)
        outputs = halves(do, do_numbers, do_strides, off_b, off_h, q_heads, q_len, TILE)
        stats = Stats(lse2_ptr + padded, delta_ptr + padded)
        full = Entries(full_tiles, words, full_begin, full_end, first_row)
        dk, dv, seen = _halves_dkdv_loop(dk, dv, seen, kv, queries, outputs, stats, full, cfg, False, WITH_DK, WITH_DV)
        # without a mask every listed tile is full: rows beyond q_len have lse2 = inf
        if words is not None:
            partial = Entries(partial_tiles, words, partial_begin, partial_end, first_row)
            dk, dv, seen = _halves_dkdv_loop(
                dk, dv, seen, kv, queries, outputs, stats, partial, cfg, True, WITH_DK, WITH_DV
            )
    is_right = seen[0] < float("inf")
    if WITH_DV:
        dv_rows = Operand(dv_ptr, dv_strides, off_b, off_kvh, kv_len, None)
        store_tile(dv_rows, start_n, dv, V_DIM, BLOCK_N, BLOCK_DV)
        is_right &= largest_of(dv, start_n, kv_len, BLOCK_N) >= seen[2]
    if WITH_DK:
        dk_rows = Operand(dk_ptr, dk_strides, off_b, off_kvh, kv_len, None)
        store_tile(dk_rows, start_n, dk * sm_scale, HEAD_DIM, BLOCK_N, BLOCK_D)
        is_right &= largest_of(dk, start_n, kv_len, BLOCK_N) >= seen[1] * _bound()
    plane = off_b * (q_heads // group) + off_kvh
    store_redo(redo, plane, start_n, kv_len, is_right, BLOCK_N, TILE, not WITH_DV)
