"""The backward kernels: delta, then dq by rows of tiles, then dk and dv by columns. No atomics, so bit-reproducible."""

import triton
import triton.language as tl

from anymask.backends.triton.tiles import LOG2_E, hide, hide_end, listed, listed_words, load_tile, store_tile


@triton.jit(do_not_specialize=["q_len", "q_heads"])
def _bwd_delta_kernel(
    o,
    do,
    lse_ptr,
    dlse_ptr,
    lse2_ptr,
    delta_ptr,
    dq_acc,
    o_strides,
    do_strides,
    dlse_strides,
    q_heads,
    q_len,
    V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC_DIM: tl.constexpr,
):
    """Writes `delta = rowsum(o * do) - dlse` and `lse2`, lse in base 2, of BLOCK_M queries.

    Both are padded to whole tiles; queries that have no key or do not exist get `lse2 = inf`, so that their p is 0.
    If there is a `dq_acc`, padded too, it sets ACC_DIM floats of each query to 0.
    Grid: (q tiles * TILE // BLOCK_M, q_heads, batch). Equation (5).
    """
    start_m = tl.program_id(0) * BLOCK_M
    off_h = tl.program_id(1)
    off_b = tl.program_id(2)
    o_tile = load_tile(o, o_strides, off_b, off_h, start_m, q_len, None, V_DIM, BLOCK_M, BLOCK_DV, False, False)
    do_tile = load_tile(do, do_strides, off_b, off_h, start_m, q_len, None, V_DIM, BLOCK_M, BLOCK_DV, False, False)
    # [BLOCK_M]
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    inside = offs_m < q_len
    if dlse_ptr is not None:
        base = dlse_ptr + off_b.to(tl.int64) * dlse_strides[0] + off_h.to(tl.int64) * dlse_strides[1]
        delta -= tl.load(base + offs_m.to(tl.int64) * dlse_strides[2], mask=inside, other=0.0)
    row = (off_b * q_heads + off_h).to(tl.int64)
    lse = tl.load(lse_ptr + row * q_len + offs_m, mask=inside, other=-float("inf"))
    has_key = lse != -float("inf")
    padded = row * (tl.num_programs(0) * BLOCK_M) + offs_m
    # a factor in fp32 would be wrong by 2e-8 of itself, and p by that much of lse2
    lse2 = (lse.to(tl.float64) * LOG2_E).to(tl.float32)
    tl.store(lse2_ptr + padded, tl.where(has_key, lse2, float("inf")))
    tl.store(delta_ptr + padded, tl.where(has_key, delta, 0.0))
    if dq_acc is not None:
        first = (row * (tl.num_programs(0) * BLOCK_M) + start_m) * ACC_DIM
        tl.store(dq_acc + first + tl.arange(0, BLOCK_M * ACC_DIM), tl.zeros([BLOCK_M * ACC_DIM], tl.float32))


@triton.jit
def _bwd_dq_loop(
    dq,
    q_tile,
    do_tile,
    lse2,
    delta,
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
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds to `dq [BLOCK_M, BLOCK_D]` what entries `begin .. end` of a tile list give, BLOCK_N keys at a time."""
    STEPS: tl.constexpr = TILE // BLOCK_N
    tile = listed(tiles, begin, end)
    if IS_PARTIAL and words is not None:
        w = listed_words(words, begin, end, first_row, BLOCK_M, TILE)
    for step in tl.range(begin * STEPS, end * STEPS):
        first_col = (step % STEPS) * BLOCK_N
        start_n = tile * TILE + first_col
        tile = listed(tiles, (step + 1) // STEPS, end)
        k_tile = load_tile(
            k, k_strides, off_b, off_kvh, start_n, kv_len, kv_live, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA, not IS_PARTIAL
        )
        v_tile = load_tile(
            v, v_strides, off_b, off_kvh, start_n, kv_len, kv_live, V_DIM, BLOCK_N, BLOCK_DV, USE_TMA, not IS_PARTIAL
        )
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
        p = tl.math.exp2(s * qk_scale - lse2[:, None])
        if IS_PARTIAL:
            if words is None:
                p = hide_end(p, 0.0, start_n, kv_len, BLOCK_N)
            else:
                p = hide(p, 0.0, w, first_col, BLOCK_M, BLOCK_N, False)
                w = listed_words(words, (step + 1) // STEPS, end, first_row, BLOCK_M, TILE)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


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
    q_live,
    kv_live,
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
    """Writes `dq` of BLOCK_M queries of one head. Grid: (q tiles * TILE // BLOCK_M, q_heads, batch). Equation (7)."""
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
        line = plane * q_tiles + tile
        full_begin, full_end = tl.load(full_offsets + line), tl.load(full_offsets + line + 1)
        partial_begin, partial_end = tl.load(partial_offsets + line), tl.load(partial_offsets + line + 1)
    else:
        full_begin, full_end = 0, kv_len // TILE
        partial_begin, partial_end = full_end, (kv_len + TILE - 1) // TILE
    start_m = tile * TILE + first_row
    if q_live is not None:
        q_live += plane.to(tl.int64) * q_len
    if kv_live is not None:
        kv_live += plane.to(tl.int64) * kv_len
    q_tile = load_tile(q, q_strides, off_b, off_h, start_m, q_len, q_live, HEAD_DIM, BLOCK_M, BLOCK_D, USE_TMA, False)
    do_tile = load_tile(do, do_strides, off_b, off_h, start_m, q_len, q_live, V_DIM, BLOCK_M, BLOCK_DV, USE_TMA, False)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row = (off_b * q_heads + off_h).to(tl.int64) * (tl.num_programs(0) * BLOCK_M)
    lse2 = tl.load(lse2_ptr + row + offs_m)
    delta = tl.load(delta_ptr + row + offs_m)
    # [BLOCK_M, BLOCK_D]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for IS_PARTIAL in tl.static_range(2):
        dq = _bwd_dq_loop(
            dq,
            q_tile,
            do_tile,
            lse2,
            delta,
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
            USE_TMA,
            PRECISION,
            TILE,
        )
    store_tile(dq_ptr, dq_strides, off_b, off_h, start_m, q_len, dq * sm_scale, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _bwd_dkdv_loop(
    dk,
    dv,
    k_tile,
    v_tile,
    q,
    do,
    lse2_row,
    delta_row,
    q_strides,
    do_strides,
    q_live,
    tiles,
    words,
    begin,
    end,
    off_b,
    off_h,
    first_row,
    q_len,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds to `dk`, `dv` what entries `begin .. end` of a column's tile list give, BLOCK_M queries at a time."""
    STEPS: tl.constexpr = TILE // BLOCK_M
    tile = listed(tiles, begin, end)
    if IS_PARTIAL:
        w = listed_words(words, begin, end, first_row, BLOCK_N, TILE)
    for step in tl.range(begin * STEPS, end * STEPS):
        first_col = (step % STEPS) * BLOCK_M
        start_m = tile * TILE + first_col
        tile = listed(tiles, (step + 1) // STEPS, end)
        q_tile = load_tile(
            q, q_strides, off_b, off_h, start_m, q_len, q_live, HEAD_DIM, BLOCK_M, BLOCK_D, USE_TMA, False
        )
        do_tile = load_tile(
            do, do_strides, off_b, off_h, start_m, q_len, q_live, V_DIM, BLOCK_M, BLOCK_DV, USE_TMA, False
        )
        offs_m = start_m + tl.arange(0, BLOCK_M)
        lse2 = tl.load(lse2_row + offs_m)
        # [BLOCK_N, BLOCK_M], the transposed scores
        s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
        p = tl.math.exp2(s * qk_scale - lse2[None, :])
        if IS_PARTIAL:
            p = hide(p, 0.0, w, first_col, BLOCK_N, BLOCK_M, False)
            w = listed_words(words, (step + 1) // STEPS, end, first_row, BLOCK_N, TILE)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
        dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)
        delta = tl.load(delta_row + offs_m)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


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
    q_live,
    kv_live,
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
    """Writes `dk`, `dv` of BLOCK_N keys of one kv head, summed over its group of query heads.

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
        # heads of a group may have planes of their own: any order is right, the first head's is as good as another
        first_plane = off_b * plane_strides[0] + off_kvh * group * plane_strides[1]
        tile = tl.load(order + first_plane * kv_tiles + tile)
    start_n = tile * TILE + first_row
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i in tl.range(group):
        off_h = off_kvh * group + i
        plane = off_b * plane_strides[0] + off_h * plane_strides[1]
        q_live_row = q_live
        kv_live_row = kv_live
        if q_live is not None:
            q_live_row = q_live + plane.to(tl.int64) * q_len
        if kv_live is not None:
            kv_live_row = kv_live + plane.to(tl.int64) * kv_len
        k_tile = load_tile(
            k, k_strides, off_b, off_kvh, start_n, kv_len, kv_live_row, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA, False
        )
        v_tile = load_tile(
            v, v_strides, off_b, off_kvh, start_n, kv_len, kv_live_row, V_DIM, BLOCK_N, BLOCK_DV, USE_TMA, False
        )
        if words is not None:
            line = plane * kv_tiles + tile
            full_begin, full_end = tl.load(full_offsets + line), tl.load(full_offsets + line + 1)
            partial_begin, partial_end = tl.load(partial_offsets + line), tl.load(partial_offsets + line + 1)
        else:
            full_begin, full_end = 0, (q_len + TILE - 1) // TILE
            partial_begin, partial_end = full_end, full_end
        row = (off_b * q_heads + off_h).to(tl.int64) * (((q_len + TILE - 1) // TILE) * TILE)
        # without a mask every listed tile is full: rows beyond q_len have lse2 = inf
        for IS_PARTIAL in tl.static_range(1 if words is None else 2):
            dk, dv = _bwd_dkdv_loop(
                dk,
                dv,
                k_tile,
                v_tile,
                q,
                do,
                lse2_ptr + row,
                delta_ptr + row,
                q_strides,
                do_strides,
                q_live_row,
                partial_tiles if IS_PARTIAL else full_tiles,
                words,
                partial_begin if IS_PARTIAL else full_begin,
                partial_end if IS_PARTIAL else full_end,
                off_b,
                off_h,
                first_row,
                q_len,
                qk_scale,
                HEAD_DIM,
                V_DIM,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_M,
                BLOCK_N,
                IS_PARTIAL == 1,
                USE_TMA,
                PRECISION,
                TILE,
            )
    store_tile(dk_ptr, dk_strides, off_b, off_kvh, start_n, kv_len, dk * sm_scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr, dv_strides, off_b, off_kvh, start_n, kv_len, dv, V_DIM, BLOCK_N, BLOCK_DV)
