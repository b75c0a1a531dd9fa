"""Kernels of lines that fit one tile: a program computes a head of a sample, forward or backward, at once.

The list of such a plane has one tile or none, so there is no loop over tiles, no running maximum and no second pass
over the scores: backward computes them once for dq, dk and dv, and delta on the way.
"""

import triton
import triton.language as tl

from anymask.backends.gpu.kernels.tiles import LOG2_E, Operand, load_tile, mask_pairs, mask_tail, store_tile


@triton.jit
def _load_words(full_offsets, partial_offsets, words, plane, BLOCK_M: tl.constexpr, TILE: tl.constexpr):
    """int32 `[BLOCK_M, 4]`: words of the rows of a plane's only tile; all ones if it is full, 0 if it is empty."""
    partial_begin, partial_end = tl.load(partial_offsets + plane), tl.load(partial_offsets + plane + 1)
    is_full = tl.load(full_offsets + plane) < tl.load(full_offsets + plane + 1)
    offs = tl.arange(0, BLOCK_M)[:, None] * 4 + tl.arange(0, 4)[None, :]
    # spelt so that mask and default are blocks: the interpreter cannot spread scalars
    w = tl.load(
        words + partial_begin.to(tl.int64) * (TILE * 4) + offs, mask=partial_begin + 0 * offs < partial_end, other=0
    )
    return tl.where((is_full & (offs >= 0)), -1, w)


@triton.jit
def _mask(x, fill, w, kv_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_ASM: tl.constexpr):
    """`x [BLOCK_M, BLOCK_N]` where the pair attends, else `fill`; without words `w`, where the key exists."""
    if w is None:  # noqa: SIM108
        x = mask_tail(x, fill, 0, kv_len, BLOCK_N)
    else:
        x = mask_pairs(x, fill, w, 0, BLOCK_M, BLOCK_N, USE_ASM)
    return x


@triton.jit(do_not_specialize=["q_len", "kv_len", "group"])
def _window_fwd_kernel(
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
    partial_offsets,
    words,
    kv_has_pair,
    plane_strides,
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
    """Writes `o` and `lse` of a head; equations (1) to (4) of docs/kernels.md.

    Grid: (q_heads, batch). q_len <= BLOCK_M, kv_len <= BLOCK_N, both at most TILE. `IS_NEGATIVE`: qk_scale is the
    magnitude of a negative scale.
    """
    off_h = tl.program_id(0)
    off_b = tl.program_id(1)
    off_kvh = off_h // group
    plane = off_b * plane_strides[0] + off_h * plane_strides[1]
    if kv_has_pair is not None:
        kv_has_pair += plane.to(tl.int64) * kv_len
    q_tile = load_tile(Operand(q, q_strides, off_b, off_h, q_len, None), 0, HEAD_DIM, BLOCK_M, BLOCK_D, False, False)
    keys = Operand(k, k_strides, off_b, off_kvh, kv_len, None)
    k_tile = load_tile(keys, 0, HEAD_DIM, BLOCK_N, BLOCK_D, False, False)
    values = Operand(v, v_strides, off_b, off_kvh, kv_len, kv_has_pair)
    v_tile = load_tile(values, 0, V_DIM, BLOCK_N, BLOCK_DV, False, False)
    w = None
    if words is not None:
        w = _load_words(full_offsets, partial_offsets, words, plane, BLOCK_M, TILE)
    # [BLOCK_M, BLOCK_N]
    s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
    if IS_NEGATIVE:
        s = -s
    s = _mask(s, -float("inf"), w, kv_len, BLOCK_M, BLOCK_N, USE_ASM)
    m_i = tl.max(s, 1) * qk_scale
    # a row with no key has m = -inf, and -inf - -inf would be NaN
    p = tl.math.exp2(s * qk_scale - tl.where(m_i == -float("inf"), 0.0, m_i)[:, None])
    l_i = tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    store_tile(Operand(o_ptr, o_strides, off_b, off_h, q_len, None), 0, acc, V_DIM, BLOCK_M, BLOCK_DV)
    offs_m = tl.arange(0, BLOCK_M)
    lse_ptr += (off_b * tl.num_programs(0) + off_h).to(tl.int64) * q_len
    tl.store(lse_ptr + offs_m, (m_i + tl.math.log2(l_i)) / LOG2_E, mask=offs_m < q_len)


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_heads", "group"])
def _window_bwd_kernel(
    q,
    k,
    v,
    o,
    do,
    lse_ptr,
    dlse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    do_strides,
    dlse_strides,
    dq_strides,
    dk_strides,
    dv_strides,
    full_offsets,
    partial_offsets,
    words,
    q_has_pair,
    kv_has_pair,
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
    """Writes `dk`, `dv` of a kv head and `dq` of its group of query heads; equations (5) to (9).

    Grid: (kv_heads, batch); lengths as in the forward kernel.
    """
    off_kvh = tl.program_id(0)
    off_b = tl.program_id(1)
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    offs_m = tl.arange(0, BLOCK_M)
    inside = offs_m < q_len
    for i in tl.range(group):
        off_h = off_kvh * group + i
        plane = off_b * plane_strides[0] + off_h * plane_strides[1]
        q_used = q_has_pair
        kv_used = kv_has_pair
        if q_has_pair is not None:
            q_used = q_has_pair + plane.to(tl.int64) * q_len
        if kv_has_pair is not None:
            kv_used = kv_has_pair + plane.to(tl.int64) * kv_len
        q_rows = Operand(q, q_strides, off_b, off_h, q_len, q_used)
        o_rows = Operand(o, o_strides, off_b, off_h, q_len, None)
        do_rows = Operand(do, do_strides, off_b, off_h, q_len, q_used)
        keys = Operand(k, k_strides, off_b, off_kvh, kv_len, kv_used)
        values = Operand(v, v_strides, off_b, off_kvh, kv_len, kv_used)
        q_tile = load_tile(q_rows, 0, HEAD_DIM, BLOCK_M, BLOCK_D, False, False)
        k_tile = load_tile(keys, 0, HEAD_DIM, BLOCK_N, BLOCK_D, False, False)
        do_tile = load_tile(do_rows, 0, V_DIM, BLOCK_M, BLOCK_DV, False, False)
        v_tile = load_tile(values, 0, V_DIM, BLOCK_N, BLOCK_DV, False, False)
        o_tile = load_tile(o_rows, 0, V_DIM, BLOCK_M, BLOCK_DV, False, False)
        row = (off_b * q_heads + off_h).to(tl.int64)
        lse = tl.load(lse_ptr + row * q_len + offs_m, mask=inside, other=-float("inf"))
        w = None
        if words is not None:
            w = _load_words(full_offsets, partial_offsets, words, plane, BLOCK_M, TILE)
        # [BLOCK_M]
        delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
        if dlse_ptr is not None:
            base = dlse_ptr + off_b.to(tl.int64) * dlse_strides[0] + off_h.to(tl.int64) * dlse_strides[1]
            delta -= tl.load(base + offs_m.to(tl.int64) * dlse_strides[2], mask=inside, other=0.0)
        has_key = lse != -float("inf")
        delta = tl.where(has_key, delta, 0.0)
        # a factor in fp32 would be wrong by 2e-8 of itself, and p by that much of lse2
        lse2 = tl.where(has_key, (lse.to(tl.float64) * LOG2_E).to(tl.float32), float("inf"))
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        p = _mask(tl.math.exp2(s * qk_scale - lse2[:, None]), 0.0, w, kv_len, BLOCK_M, BLOCK_N, False)
        dv = tl.dot(p.to(do_tile.dtype).T, do_tile, dv, input_precision=PRECISION)
        dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(q_tile.dtype)
        dk = tl.dot(ds.T, q_tile, dk, input_precision=PRECISION)
        dq = tl.dot(ds, k_tile, input_precision=PRECISION)
        dq_rows = Operand(dq_ptr, dq_strides, off_b, off_h, q_len, None)
        store_tile(dq_rows, 0, dq * sm_scale, HEAD_DIM, BLOCK_M, BLOCK_D)
    dk_rows = Operand(dk_ptr, dk_strides, off_b, off_kvh, kv_len, None)
    dv_rows = Operand(dv_ptr, dv_strides, off_b, off_kvh, kv_len, None)
    store_tile(dk_rows, 0, dk * sm_scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_rows, 0, dv, V_DIM, BLOCK_N, BLOCK_DV)
