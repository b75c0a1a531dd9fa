"""The backward kernel for Hopper: a program computes dk and dv of one tile of keys after another, and its share of dq.

Two consumer warpgroups, a partition each, hold 64 keys with dk and dv in registers, and compute on transposed scores.
`ds^T` of both meets in shared memory, from where each warpgroup multiplies its half of dq; one warp fills the stages of
q and do, another adds dq to an fp32 accumulator in global memory. docs/kernels.md, section 5, draws who waits for whom.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from anymask.backends.hopper.kernels.backward_dq import (
    CONSUMER_AND_STORE,
    DQ_EMPTY,
    give_dq_buffer_back,
    hand_over_dq,
    issue_dq,
    reduce_dq,
    take_dq_buffer,
)
from anymask.backends.hopper.kernels.backward_loads import (
    CONSUMERS_AND_PRODUCER,
    DO_EMPTY,
    Q_EMPTY,
    give_bias_back,
    produce,
)
from anymask.backends.hopper.kernels.backward_terms import (
    add_key_sums,
    column_bias,
    dropped_words,
    read_ahead,
    score_gradient,
    step_bias,
    step_pairs,
    store_key_sums,
    weights,
)
from anymask.backends.hopper.kernels.blocks import store_rows
from anymask.backends.hopper.kernels.diagonals import first_runs, store_runs
from anymask.backends.hopper.kernels.pipeline import TILE, allocate_barriers, arrive, opaque, opaque_zero, sync
from anymask.backends.hopper.kernels.records import (
    BackwardConfig,
    BackwardPipelines,
    BackwardSchedule,
    BackwardSizes,
    BiasStages,
    DOStages,
    HasPair,
    KVBuffers,
    MaskLists,
    PlaneStrides,
    QStages,
    TermSums,
    Turns,
    Worker,
)
from anymask.backends.hopper.kernels.scheduler import column_at, num_work_tiles
from anymask.backends.hopper.kernels.turns import q_tile_at
from anymask.backends.hopper.kernels.words import ROWS, load_column_words, zero_words


@gluon.jit
def _consume(
    dk_desc, dv_desc, term_sums, pipes, schedule, kv_len, sm_scale, qk_scale, terms, cfg: gl.constexpr, G: gl.constexpr
):
    """Consumer warpgroup G: dk and dv of its half of each work tile, its half of every dq; (5) to (9), transposed."""
    kv, q_stages, do_stages = pipes.kv, pipes.q, pipes.do
    words, group = schedule.lists.words, schedule.sizes.group
    BLOCK_M: gl.constexpr = cfg.BLOCK_M
    HEAD_DIM: gl.constexpr = cfg.HEAD_DIM
    STAGES: gl.constexpr = cfg.STAGES
    HAS_MASK: gl.constexpr = cfg.HAS_MASK
    HAS_DQ: gl.constexpr = cfg.HAS_DQ
    AHEAD: gl.constexpr = cfg.SCORES_AHEAD
    MASKED: gl.constexpr = HAS_MASK or cfg.HAS_TAIL
    DROPS: gl.constexpr = len(terms.dropout) == 1 if len(terms) > 0 else False
    BY_QUERY: gl.constexpr = len(terms.queries) + len(terms.diagonals) + DROPS > 0 if len(terms) > 0 else False
    STEPS: gl.constexpr = TILE // BLOCK_M
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    KV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, KV_LAYOUT, 2)
    W_LAYOUT: gl.constexpr = zero_words(BLOCK_M, S_LAYOUT).type.layout
    dtype: gl.constexpr = dk_desc.dtype
    zero_s = gl.zeros([ROWS, BLOCK_M], gl.float32, S_LAYOUT)
    # [ROWS, 4]: row and quad of this thread's words
    rows = G * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, W_LAYOUT)).expand_dims(1)
    offs = rows * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, W_LAYOUT)).expand_dims(0)
    begin, start_q = 0, 0
    next_column = column_at(0, schedule, HAS_MASK)
    next_w, next_q, dropped = read_ahead(next_column, offs, schedule, terms, zero_s, cfg, G)
    for iteration in range(num_work_tiles(schedule.n_work_tiles, schedule.worker)):
        sample, head, tile = next_column.sample, next_column.head, next_column.tile
        dk, dv = (gl.zeros([ROWS, HEAD_DIM], gl.float32, KV_LAYOUT),) * 2
        # without a mask the same words in every tile mask out the keys beyond kv_len
        w = gl.where(tile * TILE + offs // 4 < kv_len, -1, 0)
        mbarrier.wait(kv.full, iteration & 1)
        if term_sums.runs is not None:
            # they go through the buffer of dk and dv
            tma.store_wait(0)
        if AHEAD:
            k = kv.k_bufs.index(0).reshape([TILE, HEAD_DIM]).slice(G * ROWS, ROWS, dim=0)
            s = warpgroup_mma_wait(0, deps=[_issue_scores(k, q_stages, begin, S_LAYOUT, cfg)])
        for i in range(group):
            column = next_column
            next_column = column_at(iteration * group + i + 1, schedule, HAS_MASK)
            end = begin + (column.n_full + column.n_partial) * STEPS
            of_keys = column_bias(terms, column, zero_s, G)
            if term_sums.keys is not None:
                sums = zero_words(BLOCK_M, S_LAYOUT).to(gl.float32)
            if term_sums.runs is not None:
                first = first_runs(term_sums, column, schedule, G)
            for pos in range(begin, end):
                if HAS_MASK:
                    w = next_w >> (pos - begin) % STEPS * (BLOCK_M // 4)
                    next_w = load_column_words(words, column, (pos + 1 - begin) // STEPS, offs, cfg)
                zero, stage = opaque_zero(pos), pos & (STAGES - 1)
                k = kv.k_bufs.index(zero).reshape([TILE, HEAD_DIM]).slice(G * ROWS, ROWS, dim=0)
                q = q_stages.bufs.index(stage).reshape([BLOCK_M, HEAD_DIM])
                if not AHEAD:
                    s = _issue_scores(k, q_stages, pos, S_LAYOUT, cfg)
                mbarrier.wait(do_stages.full.index(stage), (pos // STAGES) & 1)
                v = kv.v_bufs.index(opaque(zero)).reshape([TILE, HEAD_DIM]).slice(G * ROWS, ROWS, dim=0)
                do = do_stages.bufs.index(opaque(stage)).reshape([BLOCK_M, HEAD_DIM])
                dp = _issue_dp(v, do, do_stages.delta_bufs.index(stage), zero_s, AHEAD and not DROPS)
                if BY_QUERY:
                    # read one step ahead: it is an indirection
                    start_q, j = next_q, pos + 1 - begin
                    next_q = q_tile_at(column, j // STEPS, schedule, HAS_MASK, cfg.IN_TURN) * TILE + j % STEPS * BLOCK_M
                bias = step_bias(terms, of_keys, column, start_q, zero_s, G)
                lse_buf = q_stages.lse_bufs.index(stage)
                pairs = step_pairs(pipes.bias, pos - iteration * AHEAD, S_LAYOUT, G)
                p, of_ds = weights(s, lse_buf, w, bias, pairs, dropped, qk_scale, terms, dtype, MASKED, AHEAD, S_LAYOUT)
                dv = warpgroup_mma(gl.convert_layout(p, A_LAYOUT), do, dv, is_async=True)
                give_bias_back(pipes.bias, pos - iteration * AHEAD)
                dp = warpgroup_mma_wait(1, deps=[dp])
                ds = score_gradient(of_ds, dp, do_stages.delta_bufs.index(stage), terms, AHEAD)
                if term_sums.keys is not None and not AHEAD:
                    sums = add_key_sums(sums, ds)
                wide_ds = ds
                ds = ds.to(dtype)
                if HAS_DQ:
                    all_k = kv.k_bufs.index(opaque(zero)).reshape([TILE, HEAD_DIM])
                    dq = issue_dq(ds, pipes.ds_bufs.index((pos - iteration * AHEAD) & 1), all_k, G)
                dk = warpgroup_mma(gl.convert_layout(ds, A_LAYOUT), q, dk, is_async=True)
                dv = warpgroup_mma_wait(1 + HAS_DQ, deps=[dv])
                arrive(DO_EMPTY + stage, CONSUMERS_AND_PRODUCER)
                if term_sums.keys is not None and AHEAD:
                    sums = add_key_sums(sums, ds.to(gl.float32))
                if term_sums.runs is not None:
                    of_runs = ds.to(gl.float32) if AHEAD else wide_ds
                    store_runs(first, of_runs, pipes.out_bufs.index(G), column, pos - begin, start_q, cfg)
                # for the next step, beside the products: without a branch ptxas moves it before them
                if DROPS:  # noqa: SIM102
                    if pos + 1 < end:
                        dropped = dropped_words(terms, column, next_q, zero_s, W_LAYOUT, G)
                if AHEAD:
                    # with dv done, the registers of p are free for the scores of the next step
                    s = _issue_scores(k, q_stages, pos + 1, S_LAYOUT, cfg)
                if HAS_DQ:
                    # it moves beside dk
                    hand_over_dq(warpgroup_mma_wait(1 + AHEAD, deps=[dq]), pipes.dq_bufs.index(G), G)
                dk = warpgroup_mma_wait(0 + AHEAD, deps=[dk])
                arrive(Q_EMPTY + stage, CONSUMERS_AND_PRODUCER)
                if AHEAD:
                    # docs/kernels.md, finding 3
                    s = warpgroup_mma_wait(0, deps=[s])
            # where only bounds need it, Triton 3.6 would leave it as it was (docs/kernels.md, finding 15)
            begin = end if AHEAD or HAS_MASK else opaque(end)
            if term_sums.keys is not None:
                store_key_sums(term_sums.keys, sums, column, schedule.sizes.kv_heads * group, kv_len, G)
            next_w, next_q, dropped = read_ahead(next_column, offs, schedule, terms, zero_s, cfg, G)
        if AHEAD:
            # the stage of the step too many
            arrive(Q_EMPTY + (begin & (STAGES - 1)), CONSUMERS_AND_PRODUCER)
            arrive(DO_EMPTY + (begin & (STAGES - 1)), CONSUMERS_AND_PRODUCER)
            begin += 1
        mbarrier.arrive(kv.empty)
        _store_sums((dk_desc, dv_desc), (dk, dv), sm_scale, terms, pipes, sample, head, group, tile, cfg, G)
    tma.store_wait(0)
    if HAS_DQ:
        # no arrival is left behind
        sync(DQ_EMPTY + G, CONSUMER_AND_STORE)


@gluon.jit
def _store_sums(descs, sums, sm_scale, terms, pipes, sample, head, group, tile, cfg: gl.constexpr, G: gl.constexpr):
    """Store the `sums` dk and dv of a work tile, dk times `sm_scale`, dv times what `terms` ask for.

    They leave through a buffer of their own, as the next k and v are on their way, or through that of dq.
    """
    OUT_IN_DQ: gl.constexpr = cfg.HAS_DQ and cfg.BIAS_STAGES > 0
    DROPS: gl.constexpr = len(terms.dropout) == 1 if len(terms) > 0 else False
    row = tile * TILE + G * ROWS
    buf = take_dq_buffer(pipes.dq_bufs, descs[0], G) if OUT_IN_DQ else pipes.out_bufs.index(G)
    store_rows(descs[0], buf, sums[0], sm_scale, sample, head, group, row, cfg.HEAD_DIM)
    v_scale = terms.dropout[0].scale if DROPS else None
    store_rows(descs[1], buf, sums[1], v_scale, sample, head, group, row, cfg.HEAD_DIM)
    if OUT_IN_DQ:
        give_dq_buffer_back(G)


@gluon.jit
def _issue_scores(k, q_stages, pos, S_LAYOUT: gl.constexpr, cfg: gl.constexpr):
    """Wait for the queries of step `pos` and issue the scores of `k [ROWS, HEAD_DIM]`, transposed."""
    stage, phase = pos & (cfg.STAGES - 1), (pos // cfg.STAGES) & 1
    mbarrier.wait(q_stages.full.index(stage), phase)
    q = q_stages.bufs.index(stage).reshape([cfg.BLOCK_M, cfg.HEAD_DIM])
    zero_s = gl.zeros([ROWS, cfg.BLOCK_M], gl.float32, S_LAYOUT)
    return warpgroup_mma(k, q.permute((1, 0)), zero_s, use_acc=False, is_async=True)


@gluon.jit
def _issue_dp(v, do, delta_buf, zero_s, LESS_DELTA: gl.constexpr):
    """Issue dp of `v [ROWS, HEAD_DIM]` and `do [BLOCK_M, HEAD_DIM]`, transposed; `LESS_DELTA`: dp - delta."""
    COL_LAYOUT: gl.constexpr = gl.SliceLayout(0, zero_s.type.layout)
    dp = zero_s
    if LESS_DELTA:
        # by starting the sum at -delta
        dp = dp - delta_buf.load(COL_LAYOUT).expand_dims(0)
    return warpgroup_mma(v, do.permute((1, 0)), dp, use_acc=LESS_DELTA, is_async=True)


@gluon.jit
def _allocate_bias(desc, STAGES: gl.constexpr):
    bufs = gl.allocate_shared_memory(desc.dtype, [STAGES * 2] + desc.block_type.shape, desc.layout)
    return BiasStages(bufs, allocate_barriers(STAGES, 1))


@gluon.jit
def _allocate(q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dk_desc, bias_desc, cfg: gl.constexpr):
    """Shared memory of all variants: k, v, q and do with their barriers, and a buffer of dk and dv a consumer.

    With a bias of pairs there is room for one stage of it and not for dk and dv, which leave through the buffers of dq.
    """
    STAGES: gl.constexpr = cfg.STAGES
    dtype: gl.constexpr = q_desc.dtype
    k_bufs = gl.allocate_shared_memory(dtype, [1] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [1] + v_desc.block_type.shape, v_desc.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, cfg.BLOCK_M], lse_desc.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, cfg.BLOCK_M], delta_desc.layout)
    out_shape: gl.constexpr = [2] + dk_desc.block_type.shape
    OUT_IN_DQ: gl.constexpr = cfg.HAS_DQ and cfg.BIAS_STAGES > 0
    out_bufs = () if OUT_IN_DQ else gl.allocate_shared_memory(dtype, out_shape, dk_desc.layout)
    bias = () if bias_desc is None else _allocate_bias(bias_desc, cfg.BIAS_STAGES)
    landed = allocate_barriers(2, 1)
    kv = KVBuffers(k_bufs, v_bufs, landed, landed.index(0), allocate_barriers(1, 2).index(0))
    q = QStages(q_bufs, lse_bufs, allocate_barriers(STAGES + 1, 1))
    do = DOStages(do_bufs, delta_bufs, allocate_barriers(STAGES + 1, 1))
    return kv, q, do, out_bufs, bias


@gluon.jit(
    do_not_specialize=[
        "sample_planes",
        "head_planes",
        "q_tiles",
        "kv_heads",
        "q_len",
        "kv_len",
        "n_work_tiles",
        "swizzle_heads",
        "turn_sample_step",
        "turn_head_step",
        "n_tiles",
    ],
    do_not_specialize_on_alignment=[
        "full_offsets",
        "full_tiles",
        "partial_offsets",
        "partial_tiles",
        "words",
        "order",
        "counters",
        "full_turns",
        "partial_turns",
        "q_has_pair",
        "kv_has_pair",
        "k_sums",
        "runs",
    ],
)
def _bwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_desc,
    delta_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    counters,
    full_turns,
    partial_turns,
    turn_sample_step,
    turn_head_step,
    full_offsets,
    full_tiles,
    partial_offsets,
    partial_tiles,
    words,
    order,
    q_has_pair,
    kv_has_pair,
    sample_planes,
    head_planes,
    q_tiles,
    kv_heads,
    group,
    q_len,
    kv_len,
    n_work_tiles,
    swizzle_heads,
    sm_scale,
    qk_scale,
    terms,
    bias_desc,
    k_sums,
    runs,
    n_tiles,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    SCORES_AHEAD: gl.constexpr,
    BIAS_STAGES: gl.constexpr,
    HAS_TAIL: gl.constexpr,
):
    """Writes `dk`, `dv` of 128 keys of one kv head, summed over its group of query heads, and adds to `dq`.

    Grid: (programs), between 1 and `n_work_tiles = batch * kv_heads * kv tiles`. `sample_planes`, `head_planes`: planes
    from one sample or query head to the next. Without a `dq_desc` there is no dq. With `counters` it is added in turns,
    for which all programs have to run at the same time; see `Turns` of hopper/turns.py.

    `terms`: `Terms`, or () if nothing else happens to scores. `bias_desc`: of their `pairs`, `[batch or 1, heads or 1,
    q_len, kv_len]` with blocks `[1, 1, BLOCK_M, ROWS]` in BIAS_STAGES stages, 1 or 2, or None. `k_sums`, if not None:
    fp32 `[batch, q_heads, kv_len]`, the gradient of a bias of the keys. `runs`, if not None: sums by distance, see
    `Runs` of hopper/diagonals.py.
    """
    kv_tiles = (kv_len + TILE - 1) // TILE
    cfg: gl.constexpr = BackwardConfig(
        HEAD_DIM,
        BLOCK_M,
        STAGES,
        SCORES_AHEAD,
        words is not None,
        HAS_TAIL,
        dq_desc is not None,
        counters is not None,
        BIAS_STAGES,
    )
    kv, q, do, out_bufs, bias = _allocate(
        q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dk_desc, bias_desc, cfg
    )
    ds_bufs, dq_bufs = None, None
    if cfg.HAS_DQ:
        DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, BLOCK_M], q_desc.dtype)
        # a step's ds is written while the last one's may still be read
        ds_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, TILE, BLOCK_M], DS_LAYOUT)
        dq_bufs = gl.allocate_shared_memory(gl.float32, [2] + dq_desc.block_type.shape, dq_desc.layout)
    pipes = BackwardPipelines(kv, q, do, ds_bufs, dq_bufs, out_bufs, bias)
    lists = MaskLists(full_offsets, full_tiles, partial_offsets, partial_tiles, words, order)
    sizes = BackwardSizes(q_tiles, kv_tiles, kv_heads, group)
    worker = Worker(gl.program_id(0), gl.num_programs(0))
    strides = PlaneStrides(sample_planes, head_planes)
    samples = ()
    # turns are made for the usual order
    if bias_desc is not None and counters is None:
        samples = terms.pairs[0].samples
    schedule = BackwardSchedule(lists, strides, sizes, n_work_tiles, swizzle_heads, worker, samples)
    maps = HasPair(q_has_pair, kv_has_pair, q_len, kv_len)
    turns = Turns(counters, full_turns, partial_turns, turn_sample_step, turn_head_step)
    term_sums = TermSums(k_sums, runs, n_tiles)
    # argument lists are written inline (docs/kernels.md, finding 8)
    gl.warp_specialize(
        [
            (
                _consume,
                (dk_desc, dv_desc, term_sums, pipes, schedule, kv_len, sm_scale, qk_scale, terms, cfg, gl.constexpr(0)),
            ),
            (
                _consume,
                (dk_desc, dv_desc, term_sums, pipes, schedule, kv_len, sm_scale, qk_scale, terms, cfg, gl.constexpr(1)),
            ),
            (
                produce,
                (q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, bias_desc, terms, maps, pipes, schedule, cfg),
            ),
            (reduce_dq, (dq_desc, dq_bufs, turns, schedule, cfg)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
