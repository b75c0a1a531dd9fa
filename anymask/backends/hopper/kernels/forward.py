"""The forward kernel for Hopper: one producer warp feeds a pair of consumer warpgroups.

A work tile is one query tile of one head, 128 queries; each consumer warpgroup of a pair has 64 of them. A program has
one pair, or two that share nothing but the multiprocessor. A grid may have a pair for every work tile or one program
per multiprocessor: with fewer pairs than work tiles, the producer loads the next one while the consumers finish the
last. docs/kernels.md, section 4, draws who waits for whom.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from anymask.backends.hopper.kernels.blocks import blocks_at, load_blocks
from anymask.backends.hopper.kernels.columns import allocate_columns, load_columns
from anymask.backends.hopper.kernels.compat import reinterpret, tma_load, tma_store
from anymask.backends.hopper.kernels.mainloop import mainloop
from anymask.backends.hopper.kernels.pipeline import TILE, allocate_barriers, stage_and_phase, sync
from anymask.backends.hopper.kernels.records import (
    BiasStages,
    ConsumerPair,
    ForwardConfig,
    ForwardSchedule,
    ForwardSizes,
    KVPipeline,
    MaskLists,
    PlaneStrides,
    QPipeline,
    Scoring,
    Worker,
)
from anymask.backends.hopper.kernels.scheduler import (
    first_two_tiles,
    load_kv_tile,
    num_work_tiles,
    prefetch_tile_range,
    read_tile_range,
    work_tile_at,
)
from anymask.backends.hopper.kernels.terms import load_seeds
from anymask.backends.hopper.kernels.unused import has_unused, used_rows, zero_unused
from anymask.backends.hopper.kernels.words import ROWS, load_words, zero_words

LN_2 = gl.constexpr(0.6931471805599453)
LOG2_E = gl.constexpr(1.4426950408889634)
# consumer warpgroups of a pair
WARPGROUPS = gl.constexpr(2)
# a hardware barrier: both have read all of v; Triton has a number for all warps and for each partition, up to 6
V_READ = gl.constexpr(14)
BOTH_CONSUMERS = gl.constexpr(8)


@gluon.jit
def _words_of(tile_range, lists):
    """Where the words of a work tile's partial tiles begin."""
    return lists.words + tile_range.partial_begin.to(gl.int64) * (TILE * 4)


@gluon.jit
def _produce(q_desc, k_desc, v_desc, bias_desc, columns, terms, kv_has_pair, pair, schedule, group, cfg: gl.constexpr):
    """The producer warp: loads q of every work tile, then k and v of the steps through its kv tiles.

    v runs one step behind k, which is the order that the consumers want them in.
    """
    q, kv, lists = pair.q, pair.kv, schedule.lists
    STAGES: gl.constexpr = cfg.STAGES
    HAS_MASK: gl.constexpr = cfg.HAS_MASK
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[2]
    STEPS: gl.constexpr = TILE // BLOCK_N
    OF_BIAS: gl.constexpr = columns[0].block_type.nbytes if len(columns) > 0 else 0
    K_BYTES: gl.constexpr = cfg.D_BLOCKS * k_desc.block_type.nbytes + OF_BIAS
    step_base = 0
    n_zeroed = 0
    kv_len = schedule.sizes.kv_len
    tile_range, tile, next_tile = first_two_tiles(pair.worker, schedule, HAS_MASK)
    for iteration in range(num_work_tiles(schedule.n_work_tiles, pair.worker)):
        head, sample = tile.head, tile.sample
        kv_head = head // group
        used = used_rows(kv_has_pair, schedule.plane_strides, sample, head, kv_len)
        n = (tile_range.n_partial + tile_range.n_full) * STEPS
        q_stage, q_phase = stage_and_phase(iteration, cfg.Q_STAGES)
        mbarrier.wait(q.empty.index(q_stage), q_phase ^ 1)
        mbarrier.expect(q.full.index(q_stage), WARPGROUPS * cfg.D_BLOCKS * q_desc.block_type.nbytes)
        for g in gl.static_range(WARPGROUPS):
            row = tile.tile * TILE + g * ROWS
            load_blocks(
                q_desc, sample, head, row, q.full.index(q_stage), q.bufs, q_stage * WARPGROUPS + g, cfg.D_BLOCKS
            )
        next_next = work_tile_at(iteration + 2, pair.worker, schedule)
        pending = prefetch_tile_range(next_tile, next_next, schedule, HAS_MASK)
        kv_tile = load_kv_tile(0, lists, tile_range, HAS_MASK)
        last_row = 0
        for t in range(n):
            stage, phase = stage_and_phase(step_base + t, STAGES)
            row = kv_tile * TILE + t % STEPS * BLOCK_N
            # read one step ahead: it is an indirection
            kv_tile = load_kv_tile((t + 1) // STEPS, lists, tile_range, HAS_MASK)
            mbarrier.wait(kv.empty.index(stage), phase ^ 1)
            mbarrier.expect(kv.k_full.index(stage), K_BYTES)
            load_blocks(k_desc, sample, kv_head, row, kv.k_full.index(stage), kv.k_bufs, stage, cfg.D_BLOCKS)
            if len(columns) > 0:
                load_columns(columns[0], columns[1], tile, row, kv.k_full.index(stage), kv.columns.bufs, stage)
            if t > 0:
                last = stage_and_phase(step_base + t - 1, STAGES)[0]
                is_partial = t <= tile_range.n_partial * STEPS
                n_zeroed = _load_v(v_desc, sample, kv_head, last_row, kv, last, used, kv_len, is_partial, n_zeroed, cfg)
            if bias_desc is not None:
                _load_bias(bias_desc, terms.pairs[0], tile, row, pair.bias, stage)
            last_row = row
        step_base += n
        if n > 0:
            stage, phase = stage_and_phase(step_base, STAGES)
            mbarrier.wait(kv.empty.index(stage), phase ^ 1)
            last = stage_and_phase(step_base - 1, STAGES)[0]
            is_partial = tile_range.n_full == 0
            n_zeroed = _load_v(v_desc, sample, kv_head, last_row, kv, last, used, kv_len, is_partial, n_zeroed, cfg)
        tile = next_tile
        tile_range, next_tile = read_tile_range(pending, next_next, schedule, HAS_MASK)


@gluon.jit
def _load_bias(desc, pairs, tile, key, bias, stage):
    """Load the bias of a step's pairs, for each warpgroup its queries, into the stage that k of the step has."""
    full = bias.full.index(stage)
    mbarrier.expect(full, WARPGROUPS * desc.block_type.nbytes)
    sample, head = tile.sample & pairs.batch, tile.head & pairs.head
    for g in gl.static_range(WARPGROUPS):
        buf = bias.bufs.index(stage * WARPGROUPS + g)
        tma_load(desc, [sample, head, tile.tile * TILE + g * ROWS, key], full, buf)


@gluon.jit
def _load_v(v_desc, sample, kv_head, row, kv, stage, used, kv_len, is_partial, n_zeroed, cfg: gl.constexpr):
    """Load a tile of v, and zero what no query attends to. `n_zeroed`: how many tiles the worker has zeroed rows of."""
    STAGES: gl.constexpr = cfg.STAGES
    lands_at = stage
    if used is not None:  # noqa: SIM102
        if is_partial:
            lands_at = gl.where(has_unused(used, row, kv_len, v_desc.block_type.shape[2]), STAGES, stage)
    mbarrier.expect(kv.v_full.index(lands_at), cfg.V_BLOCKS * v_desc.block_type.nbytes)
    load_blocks(v_desc, sample, kv_head, row, kv.v_full.index(lands_at), kv.v_bufs, stage, cfg.V_BLOCKS)
    if used is not None:  # noqa: SIM102
        if lands_at == STAGES:
            mbarrier.wait(kv.v_full.index(STAGES), n_zeroed & 1)
            for c in gl.static_range(cfg.V_BLOCKS):
                zero_unused(kv.v_bufs.index(stage * cfg.V_BLOCKS + c), used, row, kv_len)
            mbarrier.arrive(kv.v_full.index(stage))
            n_zeroed += 1
    return n_zeroed


@gluon.jit
def _add_sinks(l_i, m_i, sinks, head, rows, sizes):
    """Row sums and maxima `[ROWS]` with a sink, a key of every query whose value is 0, and the factor of o for it."""
    # heads that are packed follow each other
    head = head * (sizes.q_len // sizes.mask_rows) + rows // sizes.mask_rows
    sink = gl.load(sinks + head, mask=rows < sizes.q_len, other=0.0) * LOG2_E
    # a row without a key has a maximum of 0
    m_i = gl.where(l_i == 0.0, -float("inf"), m_i)
    top = gl.maximum(m_i, sink)
    top = gl.where(top == -float("inf"), 0.0, top)
    alpha = gl.exp2(m_i - top)
    return l_i * alpha + gl.exp2(sink - top), top, alpha


@gluon.jit
def _consume(o_desc, per_row, pair, schedule, qk_scale, terms, cfg: gl.constexpr, WARPGROUP: gl.constexpr):
    """A consumer warpgroup: ROWS queries of every work tile, their `o` and `lse`.

    `per_row`: the pointer to lse, and that to the sinks if there are any.
    """
    lse = per_row[0]
    q, lists, sizes = pair.q, schedule.lists, schedule.sizes
    HAS_MASK: gl.constexpr = cfg.HAS_MASK
    WIDTH: gl.constexpr = o_desc.block_type.shape[3]
    BLOCK_N: gl.constexpr = pair.kv.k_bufs.shape[3]
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    R_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    W_LAYOUT: gl.constexpr = zero_words(BLOCK_N, S_LAYOUT).type.layout
    step_base = 0
    seeds = load_seeds(terms)
    tile_range, tile, next_tile = first_two_tiles(pair.worker, schedule, HAS_MASK)
    w = zero_words(BLOCK_N, S_LAYOUT)
    if HAS_MASK:
        w = _first_words(tile_range, lists, sizes, cfg, WARPGROUP, W_LAYOUT)
    for iteration in range(num_work_tiles(schedule.n_work_tiles, pair.worker)):
        head, sample = tile.head, tile.sample
        n_partial = tile_range.n_partial
        n = (n_partial + tile_range.n_full) * (TILE // BLOCK_N)
        words = lists.words
        if HAS_MASK:
            words = _words_of(tile_range, lists)
        # the lists are read work tiles ahead, as they lead from one to the other
        next_next = work_tile_at(iteration + 2, pair.worker, schedule)
        pending = prefetch_tile_range(next_tile, next_next, schedule, HAS_MASK)
        q_stage, q_phase = stage_and_phase(iteration, cfg.Q_STAGES)
        q_blocks = blocks_at(q.bufs, q_stage * WARPGROUPS + WARPGROUP, cfg.D_BLOCKS)
        acc = (gl.zeros([ROWS, WIDTH], gl.float32, O_LAYOUT),) * cfg.V_BLOCKS
        l_i = zero_words(BLOCK_N, S_LAYOUT).to(gl.float32)
        m_i = l_i
        mbarrier.wait(q.full.index(q_stage), q_phase)
        if n > 0:
            scoring = Scoring(qk_scale, terms, tile, lists, tile_range, seeds, pair.bias)
            acc, l_i, m_i = mainloop(
                q_blocks, pair.kv, words, w, n_partial, n, sizes, scoring, step_base, acc, cfg, WARPGROUP
            )
        step_base += n
        q_tile = tile.tile
        tile = next_tile
        tile_range, next_tile = read_tile_range(pending, next_next, schedule, HAS_MASK)
        if HAS_MASK:
            # for the first step of the next work tile, while o of this one is stored
            w = _first_words(tile_range, lists, sizes, cfg, WARPGROUP, W_LAYOUT)
        l_i = gl.convert_layout(gl.sum(l_i, 1), R_LAYOUT, assert_trivial=True)
        m_i = gl.convert_layout(gl.max(m_i, 1), R_LAYOUT, assert_trivial=True)
        mbarrier.arrive(q.empty.index(q_stage))
        row = q_tile * TILE + WARPGROUP * ROWS
        rows = row + gl.arange(0, ROWS, layout=R_LAYOUT)
        alpha = 1.0
        if len(per_row) == 2:
            l_i, m_i, alpha = _add_sinks(l_i, m_i, per_row[1], head, rows, sizes)
        lse_rows = lse + (sample * sizes.q_heads + head).to(gl.int64) * sizes.q_len + rows
        gl.store(lse_rows, (m_i + gl.log2(l_i)) * LN_2, mask=rows < sizes.q_len)
        if len(terms) > 0:  # noqa: SIM102
            if len(terms.dropout) == 1:
                alpha *= terms.dropout[0].scale
        scale = gl.convert_layout(alpha / gl.where(l_i == 0.0, 1.0, l_i), gl.SliceLayout(1, O_LAYOUT))
        o_buf = _o_buffer(o_desc, pair, step_base, cfg, WARPGROUP)
        for c in gl.static_range(cfg.V_BLOCKS):
            o = (acc[c] * scale.expand_dims(1)).to(o_desc.dtype)
            tma.store_wait(0)
            o_buf.reshape([ROWS, WIDTH]).store(o)
            fence_async_shared()
            tma_store(o_desc, [sample, head, row, c * WIDTH], o_buf)
    tma.store_wait(0)


@gluon.jit
def _o_buffer(o_desc, pair, step_base, cfg: gl.constexpr, WARPGROUP: gl.constexpr):
    """Where a warpgroup puts its o, after all steps of a work tile; `step_base`: so many steps of the worker.

    With O_IN_V it is half of the last stage of v, which is loaded again only when both have given the next step back.
    """
    if cfg.O_IN_V:
        sync(V_READ, BOTH_CONSUMERS)
        v_buf = pair.kv.v_bufs.index(stage_and_phase(step_base - 1, cfg.STAGES)[0])
        shape: gl.constexpr = [WARPGROUPS] + o_desc.block_type.shape
        buf = reinterpret(v_buf, o_desc.dtype, shape, o_desc.layout).index(WARPGROUP)
    else:
        buf = pair.o_bufs.index(WARPGROUP)
    return buf


@gluon.jit
def _first_words(tile_range, lists, sizes, cfg: gl.constexpr, WARPGROUP: gl.constexpr, W_LAYOUT: gl.constexpr):
    """Words of a work tile's first tile, all ones if that is full."""
    words = _words_of(tile_range, lists)
    return load_words(words, WARPGROUP * ROWS, tile_range.n_partial > 0, sizes.mask_rows, W_LAYOUT, cfg.PACK_GQA)


@gluon.jit
def _allocate_bias(desc, STAGES: gl.constexpr):
    bufs = gl.allocate_shared_memory(desc.dtype, [STAGES * WARPGROUPS] + desc.block_type.shape, desc.layout)
    return BiasStages(bufs, allocate_barriers(STAGES, 1))


@gluon.jit
def _allocate_pair(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    bias_desc,
    columns_desc,
    cfg: gl.constexpr,
    PAIR: gl.constexpr,
    CONSUMER_PAIRS: gl.constexpr,
):
    """What a pair of consumer warpgroups of a program shares with its producer."""
    STAGES: gl.constexpr = cfg.STAGES
    Q_STAGES: gl.constexpr = cfg.Q_STAGES
    dtype: gl.constexpr = q_desc.dtype
    q_blocks: gl.constexpr = Q_STAGES * WARPGROUPS * cfg.D_BLOCKS
    q_bufs = gl.allocate_shared_memory(dtype, [q_blocks] + q_desc.block_type.shape, q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES * cfg.D_BLOCKS] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES * cfg.V_BLOCKS] + v_desc.block_type.shape, v_desc.layout)
    o_shape: gl.constexpr = [WARPGROUPS] + o_desc.block_type.shape
    o_bufs = () if cfg.O_IN_V else gl.allocate_shared_memory(dtype, o_shape, o_desc.layout)
    q = QPipeline(q_bufs, allocate_barriers(Q_STAGES, 1), allocate_barriers(Q_STAGES, WARPGROUPS))
    k_full, v_full = allocate_barriers(STAGES, 1), allocate_barriers(STAGES + 1, 1)
    columns = allocate_columns(columns_desc, STAGES)
    kv = KVPipeline(k_bufs, k_full, v_bufs, v_full, allocate_barriers(STAGES, WARPGROUPS), columns)
    bias = () if bias_desc is None else _allocate_bias(bias_desc, STAGES)
    worker = Worker(gl.program_id(0) * CONSUMER_PAIRS + PAIR, gl.num_programs(0) * CONSUMER_PAIRS)
    return ConsumerPair(q, kv, bias, o_bufs, worker)


@gluon.jit(
    do_not_specialize=[
        "sample_planes",
        "head_planes",
        "q_tiles",
        "q_heads",
        "group",
        "q_len",
        "kv_len",
        "mask_rows",
        "n_work_tiles",
        "swizzle_heads",
    ],
    do_not_specialize_on_alignment=[
        "lse",
        "full_offsets",
        "full_tiles",
        "partial_offsets",
        "partial_tiles",
        "words",
        "order",
        "kv_has_pair",
        "sinks",
    ],
)
def _fwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    lse,
    full_offsets,
    full_tiles,
    partial_offsets,
    partial_tiles,
    words,
    order,
    kv_has_pair,
    sample_planes,
    head_planes,
    q_tiles,
    q_heads,
    group,
    q_len,
    kv_len,
    mask_rows,
    n_work_tiles,
    swizzle_heads,
    qk_scale,
    sinks,
    terms,
    bias_desc,
    columns_desc,
    column_planes,
    D_BLOCKS: gl.constexpr,
    V_BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    CONSUMER_PAIRS: gl.constexpr,
    O_IN_V: gl.constexpr,
    PACK_GQA: gl.constexpr,
    PLAIN_SOFTMAX: gl.constexpr,
):
    """Writes `o` and `lse`; equations (1) to (4) of docs/kernels.md.

    `sinks`: fp32, one for each query head, or None. `terms`: `Terms`, or () if nothing else happens to scores.
    `bias_desc`: of their `pairs`, `[batch or 1, heads or 1, q_len, kv_len]` with blocks `[1, 1, ROWS, BLOCK_N]`, or
    None. `columns_desc`: of a bias of keys, `[batch or 1, heads or 1, kv_len, 16]` with blocks `[1, 1, BLOCK_N, 16]`,
    of which `column_planes`, `KeyColumns`, chooses; or None.

    Grid: (programs), so many that there is a work tile for each, `n_work_tiles = batch * q_heads * q_tiles`.
    Descriptors are `[batch, heads, length, D]` with blocks `[1, 1, ROWS, width]` for q and o, `[1, 1, BLOCK_N, width]`
    for k and v, of which BLOCK_N divides a tile: no block leaves its head, and what a block has beyond its length or D
    is read as 0 and not written. q and k have D_BLOCKS blocks of columns, v and o have V_BLOCKS: widths are powers of
    two, 192 is three times 64.

    PACK_GQA: rows of q are `mask_rows` queries of one head after the other, and a row of the mask is for all of them.
    PLAIN_SOFTMAX: row maxima by tensor code in place of PTX, for a test that both give the same.

    Each of CONSUMER_PAIRS pairs has STAGES stages for k and v and Q_STAGES for q in shared memory. O_IN_V: o leaves
    through the last stage of v, of 2 * ROWS keys, when both warpgroups have read it.
    """
    HAS_MASK: gl.constexpr = words is not None
    cfg: gl.constexpr = ForwardConfig(D_BLOCKS, V_BLOCKS, HAS_MASK, STAGES, Q_STAGES, O_IN_V, PACK_GQA, PLAIN_SOFTMAX)
    if words is not None:
        lists = MaskLists(full_offsets, full_tiles, partial_offsets, partial_tiles, words, order)
    else:
        # nothing reads them
        lists = MaskLists(lse, lse, lse, lse, lse, lse)
    sizes = ForwardSizes(q_tiles, q_heads, q_len, kv_len, mask_rows)
    strides, samples = PlaneStrides(sample_planes, head_planes), ()
    if bias_desc is not None:
        samples = terms.pairs[0].samples
    schedule = ForwardSchedule(lists, strides, sizes, n_work_tiles, swizzle_heads, samples)
    per_row = (lse,) if sinks is None else (lse, sinks)
    columns = () if columns_desc is None else (columns_desc, column_planes)
    a = _allocate_pair(q_desc, k_desc, v_desc, o_desc, bias_desc, columns_desc, cfg, 0, CONSUMER_PAIRS)
    # argument lists are written inline (docs/kernels.md, finding 8)
    if CONSUMER_PAIRS == 1:
        gl.warp_specialize(
            [
                (_consume, (o_desc, per_row, a, schedule, qk_scale, terms, cfg, gl.constexpr(0))),
                (_consume, (o_desc, per_row, a, schedule, qk_scale, terms, cfg, gl.constexpr(1))),
                (_produce, (q_desc, k_desc, v_desc, bias_desc, columns, terms, kv_has_pair, a, schedule, group, cfg)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        b = _allocate_pair(q_desc, k_desc, v_desc, o_desc, bias_desc, columns_desc, cfg, 1, CONSUMER_PAIRS)
        gl.warp_specialize(
            [
                (_consume, (o_desc, per_row, a, schedule, qk_scale, terms, cfg, gl.constexpr(0))),
                (_consume, (o_desc, per_row, a, schedule, qk_scale, terms, cfg, gl.constexpr(1))),
                (_consume, (o_desc, per_row, b, schedule, qk_scale, terms, cfg, gl.constexpr(0))),
                (_consume, (o_desc, per_row, b, schedule, qk_scale, terms, cfg, gl.constexpr(1))),
                (_produce, (q_desc, k_desc, v_desc, bias_desc, columns, terms, kv_has_pair, a, schedule, group, cfg)),
                (_produce, (q_desc, k_desc, v_desc, bias_desc, columns, terms, kv_has_pair, b, schedule, group, cfg)),
            ],
            [4, 4, 4, 1, 1],
            [112, 112, 112, 24, 24],
        )
