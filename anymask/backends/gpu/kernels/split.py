"""Split-KV: programs share the keys of few queries, and a second kernel joins what they found."""

import triton
import triton.language as tl

from anymask.backends.gpu.kernels.tiles import (
    LOG2_E,
    Config,
    Entries,
    Operand,
    load_tile,
    load_tile_index,
    mask_pairs,
    mask_tail,
    softmax_step,
)


@triton.jit
def _load_words(entries, entry, mask_rows, TILE: tl.constexpr):
    """int32 `[ROWS, 4]`: words of rows `mask_rows` of the partial tile at `entry`."""
    offs = mask_rows[:, None] * 4 + tl.arange(0, 4)[None, :]
    return tl.load(
        entries.words + tl.cast(entry, tl.int64) * (TILE * 4) + offs, mask=entry + 0 * offs < entries.end, other=0
    )


@triton.jit
def _split_loop(
    state, q_tile, k, v, entries, steps, mask_rows, qk_scale, cfg: tl.constexpr, PARTIAL: tl.constexpr,
    IS_NEGATIVE: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """Fold steps `steps[0] .. steps[1]` through `entries`, BLOCK_N keys each, into the sums of BLOCK_M rows."""
    acc, m_i, l_i = state
    BLOCK_N: tl.constexpr = cfg.BLOCK_N
    STEPS: tl.constexpr = cfg.TILE // BLOCK_N
    tile = load_tile_index(entries, entries.begin)
    if PARTIAL and entries.words is not None:
        w = _load_words(entries, entries.begin, mask_rows, cfg.TILE)
    for step in tl.range(steps[0], steps[1]):
        first_col = (step % STEPS) * BLOCK_N
        start_n = tile * cfg.TILE + first_col
        tile = load_tile_index(entries, (step + 1) // STEPS)
        # [BLOCK_N, BLOCK_D]
        k_tile = load_tile(k, start_n, cfg.HEAD_DIM, BLOCK_N, cfg.BLOCK_D, cfg.USE_TMA, not PARTIAL)
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_tile, k_tile.T, input_precision=cfg.PRECISION)
        if IS_NEGATIVE:
            s = -s
        if PARTIAL:
            if entries.words is None:
                s = mask_tail(s, -float("inf"), start_n, k.length, BLOCK_N)
            else:
                s = mask_pairs(s, -float("inf"), w, first_col, cfg.BLOCK_M, BLOCK_N, USE_ASM)
                w = _load_words(entries, (step + 1) // STEPS, mask_rows, cfg.TILE)
        p, m_i, l_i, acc = softmax_step(s, m_i, l_i, acc, qk_scale)
        # [BLOCK_N, BLOCK_DV]
        v_tile = load_tile(v, start_n, cfg.V_DIM, BLOCK_N, cfg.BLOCK_DV, cfg.USE_TMA, not PARTIAL)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=cfg.PRECISION)
    return acc, m_i, l_i


@triton.jit
def _share(n, part, parts):
    """Where share `part` of `n` things begins: shares differ by one thing at most."""
    return part * (n // parts) + tl.minimum(part, n % parts)


@triton.jit(
    do_not_specialize=["sample_planes", "head_planes", "q_heads", "group", "packed", "q_len", "kv_len", "splits"],
    do_not_specialize_on_alignment=[
        "full_offsets", "full_tiles", "partial_offsets", "partial_tiles", "words", "kv_has_pair",
    ],
)  # fmt: skip
def _split_kernel(
    q,
    k,
    v,
    parts,
    sums,
    q_strides,
    k_strides,
    v_strides,
    full_offsets,
    full_tiles,
    partial_offsets,
    partial_tiles,
    words,
    kv_has_pair,
    sample_planes,
    head_planes,
    q_heads,
    group,
    packed,
    q_len,
    kv_len,
    splits,
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
    USE_PDL: tl.constexpr,
):
    """Writes what a split of the keys gives BLOCK_M rows: `parts`, the output's numerator, and `sums`, m and l.

    Rows are the queries of `packed` heads that share their keys and their mask, head after head. Grid: (blocks of rows
    * splits, q_heads // packed, batch). `parts [splits, batch, q_heads, q_len, V_DIM]`, `sums [.., 2]`, fp32.
    """
    off_b = tl.program_id(2)
    first_head = tl.program_id(1) * packed
    blocks = tl.num_programs(0) // splits
    split = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    inside = rows < packed * q_len
    head, query = first_head + rows // q_len, rows % q_len
    offs_d = tl.arange(0, BLOCK_D)
    q_rows = q + off_b.to(tl.int64) * q_strides[0] + head.to(tl.int64) * q_strides[1]
    q_rows += query.to(tl.int64) * q_strides[2]
    q_mask = inside[:, None] & (offs_d[None, :] < HEAD_DIM)
    # [BLOCK_M, BLOCK_D]
    q_tile = tl.load(q_rows[:, None] + offs_d[None, :], mask=q_mask, other=0.0)
    STEPS: tl.constexpr = TILE // BLOCK_N
    plane = off_b * sample_planes + first_head * head_planes
    if words is not None:
        q_tiles = (q_len + TILE - 1) // TILE
        line = plane * q_tiles + tl.minimum(start // TILE, q_tiles - 1)
        full_begin, full_end = tl.load(full_offsets + line), tl.load(full_offsets + line + 1)
        partial_begin, partial_end = tl.load(partial_offsets + line), tl.load(partial_offsets + line + 1)
        n_full, n_partial = (full_end - full_begin) * STEPS, (partial_end - partial_begin) * STEPS
    else:
        full_begin, partial_begin = 0, kv_len // TILE
        n_full, n_partial = partial_begin * STEPS, (kv_len % TILE + BLOCK_N - 1) // BLOCK_N
    begin, end = _share(n_full + n_partial, split, splits), _share(n_full + n_partial, split + 1, splits)
    full_steps = full_begin * STEPS + tl.minimum(begin, n_full), full_begin * STEPS + tl.minimum(end, n_full)
    partial_steps = (
        partial_begin * STEPS + tl.maximum(begin - n_full, 0),
        partial_begin * STEPS + tl.maximum(end - n_full, 0),
    )
    if kv_has_pair is not None:
        kv_has_pair += plane.to(tl.int64) * kv_len
    cfg: tl.constexpr = Config(HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, USE_TMA, PRECISION, TILE)
    off_kvh = first_head // group
    full_k, full_v = (
        Operand(k, k_strides, off_b, off_kvh, kv_len, None),
        Operand(v, v_strides, off_b, off_kvh, kv_len, None),
    )
    some_k = Operand(k, k_strides, off_b, off_kvh, kv_len, kv_has_pair)
    some_v = Operand(v, v_strides, off_b, off_kvh, kv_len, kv_has_pair)
    full = Entries(full_tiles, words, full_steps[0] // STEPS, (full_steps[1] + STEPS - 1) // STEPS, 0)
    partial = Entries(partial_tiles, words, partial_steps[0] // STEPS, (partial_steps[1] + STEPS - 1) // STEPS, 0)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, BLOCK_DV]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    mask_rows = query % TILE
    state = acc, m_i, l_i
    state = _split_loop(
        state, q_tile, full_k, full_v, full, full_steps, mask_rows, qk_scale, cfg, False, IS_NEGATIVE, USE_ASM
    )
    state = _split_loop(
        state, q_tile, some_k, some_v, partial, partial_steps, mask_rows, qk_scale, cfg, True, IS_NEGATIVE, USE_ASM
    )
    acc, m_i, l_i = state
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    out = (split * tl.num_programs(2) + off_b).to(tl.int64) * q_heads + head
    out = out * q_len + query
    offs_dv = tl.arange(0, BLOCK_DV)
    tl.store(parts + out[:, None] * V_DIM + offs_dv[None, :], acc, mask=inside[:, None] & (offs_dv[None, :] < V_DIM))
    tl.store(sums + out * 2, m_i, mask=inside)
    tl.store(sums + out * 2 + 1, l_i, mask=inside)


@triton.jit(do_not_specialize=["splits", "q_heads", "q_len"])
def _join_kernel(
    parts,
    sums,
    o,
    lse,
    o_strides,
    splits,
    q_heads,
    q_len,
    V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Writes BLOCK_DV columns of `o` of a row, and its `lse`, from `splits` parts.

    Grid: (batch * q_heads * q_len, columns // BLOCK_DV).
    """
    row = tl.program_id(0)
    offs_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    split = tl.arange(0, MAX_SPLITS)
    place = split.to(tl.int64) * tl.num_programs(0) + row
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    # [MAX_SPLITS]
    part_m = tl.load(sums + place * 2, mask=split < splits, other=-float("inf"))
    part_l = tl.load(sums + place * 2 + 1, mask=split < splits, other=0.0)
    # [MAX_SPLITS, BLOCK_DV]
    mask = (split[:, None] < splits) & (offs_dv[None, :] < V_DIM)
    part = tl.load(parts + place[:, None] * V_DIM + offs_dv[None, :], mask=mask, other=0.0)
    m_all = tl.max(part_m, 0)
    # as in `softmax_step`
    m_safe = tl.where(m_all == -float("inf"), 0.0, m_all)
    weight = tl.math.exp2(part_m - m_safe)
    l_all = tl.sum(weight * part_l, 0)
    value = tl.sum(weight[:, None] * part, 0) / tl.where(l_all == 0.0, 1.0, l_all)
    head = row // q_len
    base = o + (head // q_heads).to(tl.int64) * o_strides[0] + (head % q_heads).to(tl.int64) * o_strides[1]
    base += (row % q_len).to(tl.int64) * o_strides[2]
    tl.store(base + offs_dv, value.to(o.dtype.element_ty), mask=offs_dv < V_DIM)
    if o.dtype.element_ty == tl.float32:
        # in fp64, so that leaving base 2 rounds once
        m_all, l_all = m_all.to(tl.float64), l_all.to(tl.float64)
    if tl.program_id(1) == 0:
        tl.store(lse + row, ((m_all + tl.math.log2(l_all)) / LOG2_E).to(tl.float32))
