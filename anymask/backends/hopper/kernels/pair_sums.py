"""The gradient of a bias of pairs on Hopper: blocks of it, each summed over what shares it, always in one order.

Two consumer warpgroups, a partition each, hold 64 queries of a block with its sum in registers. For every sample and
head that share the block they make scores and dp again, CHUNK keys at a time; one warp fills the stages. A program
walks a strip of blocks, one row of them. Where a strip's sharers are no more than there are stages for q and do, these
stay in shared memory for all of it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from anymask.backends.gpu.kernels.bias import EMPTY, FULL
from anymask.backends.hopper.kernels.blocks import block_at
from anymask.backends.hopper.kernels.compat import tma_load
from anymask.backends.hopper.kernels.pair_records import (
    BiasPipeline,
    KeyStages,
    PairScoring,
    PairStep,
    PairSumsConfig,
    PairSumsPipelines,
    PairSumsSchedule,
    PairSumsSizes,
    QueryStages,
    StageUses,
)
from anymask.backends.hopper.kernels.pair_strips import entry_after, entry_at, sharer_after, sharer_at, strip_at
from anymask.backends.hopper.kernels.pipeline import TILE, allocate_barriers, opaque, stage_and_phase
from anymask.backends.hopper.kernels.records import PlaneStrides, Worker
from anymask.backends.hopper.kernels.scheduler import num_work_tiles
from anymask.backends.hopper.kernels.softmax import exp2, masked
from anymask.backends.hopper.kernels.terms import add_pairs, factor, keep, load_bias, load_seeds, scored
from anymask.backends.hopper.kernels.words import ROWS, load_words, zero_words

# of a block of the bias, each of 64 queries
WARPGROUPS = gl.constexpr(2)


@gluon.jit
def _load_queries(descs, strip, sharer, q, use, sizes):
    """Load q and do of a sharer with lse2 and delta, for the stages' use `use`; `descs`: in this order."""
    STAGES: gl.constexpr = q.full.shape[0]
    stage, phase = stage_and_phase(use, STAGES)
    mbarrier.wait(q.empty.index(stage), phase ^ 1)
    full = q.full.index(stage)
    q_desc, do_desc, lse_desc, delta_desc = descs
    row = strip.q_tile * TILE
    # of all heads, in whole tiles
    row_of_all = (sharer.sample * sizes.q_heads + sharer.head) * sizes.q_tiles * TILE + row
    mbarrier.expect(full, q_desc.block_type.nbytes + do_desc.block_type.nbytes + 2 * lse_desc.block_type.nbytes)
    tma_load(q_desc, [sharer.sample, sharer.head, row, 0], full, q.q_bufs.index(stage))
    tma_load(do_desc, [sharer.sample, sharer.head, row, 0], full, q.do_bufs.index(stage))
    tma_load(lse_desc, [row_of_all], full, q.lse_bufs.index(stage))
    tma_load(delta_desc, [row_of_all], full, q.delta_bufs.index(stage))


@gluon.jit
def _load_keys(k_desc, v_desc, sharer, row, kv, use, sizes):
    """Load a chunk of keys and values of a sharer, from `row` on."""
    STAGES: gl.constexpr = kv.full.shape[0]
    stage, phase = stage_and_phase(use, STAGES)
    mbarrier.wait(kv.empty.index(stage), phase ^ 1)
    full = kv.full.index(stage)
    mbarrier.expect(full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma_load(k_desc, [sharer.sample, sharer.head // sizes.group, row, 0], full, kv.k_bufs.index(stage))
    tma_load(v_desc, [sharer.sample, sharer.head // sizes.group, row, 0], full, kv.v_bufs.index(stage))


@gluon.jit
def _load_block_of_bias(desc, strip, kv_tile, bias, use):
    """Load a block of the bias of pairs: for each warpgroup its queries, for each chunk its keys."""
    STAGES: gl.constexpr = bias.full.shape[0] // WARPGROUPS
    CHUNK: gl.constexpr = desc.block_type.shape[3]
    CHUNKS: gl.constexpr = TILE // CHUNK
    stage, phase = stage_and_phase(use, STAGES)
    for g in gl.static_range(WARPGROUPS):
        mbarrier.wait(bias.empty.index(stage * WARPGROUPS + g), phase ^ 1)
        full = bias.full.index(stage * WARPGROUPS + g)
        mbarrier.expect(full, CHUNKS * desc.block_type.nbytes)
        for c in gl.static_range(CHUNKS):
            at = [strip.sample, strip.head, strip.q_tile * TILE + g * ROWS, kv_tile * TILE + c * CHUNK]
            tma_load(desc, at, full, bias.bufs.index((stage * WARPGROUPS + g) * CHUNKS + c))


@gluon.jit
def _produce(of_queries, k_desc, v_desc, bias_desc, pipes, schedule, cfg: gl.constexpr):
    """The producer warp: loads what the steps of every strip need, and a block of the bias once."""
    sizes = schedule.sizes
    HAS_MASK: gl.constexpr = cfg.HAS_MASK
    CHUNKS: gl.constexpr = TILE // cfg.CHUNK
    q_use, kv_use, bias_use = 0, 0, 0
    for iteration in range(num_work_tiles(schedule.n_work_tiles, schedule.worker)):
        strip = strip_at(iteration, schedule)
        first_sharer = sharer_at(strip, strip.first, sizes)
        next_entry = entry_at(strip, strip.kv_begin, first_sharer, schedule, HAS_MASK)
        if cfg.RESIDENT:
            sharer = first_sharer
            for _ in range(strip.first, strip.last):
                _load_queries(of_queries, strip, sharer, pipes.q, q_use, sizes)
                sharer = sharer_after(sharer, strip, sizes)
                q_use += 1
        for kv_tile in range(strip.kv_begin, strip.kv_end):
            lacks_bias, next_sharer = 1, first_sharer
            for i in range(strip.first, strip.last):
                entry, sharer = next_entry, next_sharer
                next_sharer = sharer_after(sharer, strip, sizes)
                next_entry = entry_after(strip, kv_tile, i, next_sharer, first_sharer, schedule, HAS_MASK)
                if entry != EMPTY:
                    if not cfg.RESIDENT:
                        _load_queries(of_queries, strip, sharer, pipes.q, q_use, sizes)
                        q_use += 1
                    for c in gl.static_range(CHUNKS):
                        row = kv_tile * TILE + c * cfg.CHUNK
                        _load_keys(k_desc, v_desc, sharer, row, pipes.kv, kv_use + c, sizes)
                    kv_use += CHUNKS
                    # last, as its stage is given back last
                    if lacks_bias == 1:
                        _load_block_of_bias(bias_desc, strip, kv_tile, pipes.bias, bias_use)
                        bias_use += 1
                        lacks_bias = 0


@gluon.jit
def _weights(s, bias, pairs, lse2, qk_scale, terms):
    """p of products `s [ROWS, N]`, times the slope of a soft cap; `lse2 [ROWS, 1]`."""
    of_pairs = add_pairs(bias, pairs, terms)
    if len(terms.cap) == 1:
        t = scored(s, of_pairs, qk_scale, terms)
        # where a bias is -inf, so is t
        p = exp2(t * factor(terms) - lse2) * gl.maximum(1.0 - t * t, 0.0)
    else:
        p = exp2(s * qk_scale - (lse2 - of_pairs))
    return p


@gluon.jit
def _drop(dp, start_q, start_k, sharer, scoring):
    """dp `[ROWS, N]` as dropout leaves it."""
    terms = scoring.terms
    if len(terms.dropout) == 1:
        kept = keep(terms, scoring.seeds, sharer.sample, sharer.head, start_q, start_k, dp)
        dp = gl.where(kept, dp * terms.dropout[0].scale, 0.0)
    return dp


@gluon.jit
def _issue(q, do, kv, use, cfg: gl.constexpr):
    """Wait for a chunk, and issue its scores and its dp, `[ROWS, CHUNK]` each."""
    stage, phase = stage_and_phase(use, cfg.KV_STAGES)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.CHUNK, 16])
    zero = gl.zeros([ROWS, cfg.CHUNK], gl.float32, S_LAYOUT)
    mbarrier.wait(kv.full.index(stage), phase)
    # docs/kernels.md, finding 13
    k = kv.k_bufs.index(opaque(stage)).reshape([cfg.CHUNK, cfg.HEAD_DIM])
    v = kv.v_bufs.index(opaque(stage)).reshape([cfg.CHUNK, cfg.V_DIM])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _add_step(acc, strip, kv_tile, sharer, entry, uses, pipes, scoring, cfg: gl.constexpr, G: gl.constexpr):
    """`acc`, the chunks of a block's sum, with ds of one sharer added; `uses`: `StageUses`."""
    CHUNKS: gl.constexpr = TILE // cfg.CHUNK
    S_LAYOUT: gl.constexpr = acc[0].type.layout
    start_q = strip.q_tile * TILE + G * ROWS
    w = 0
    if cfg.HAS_MASK:
        # of a full tile all ones, and not read
        words = scoring.words + entry.to(gl.int64) * (TILE * 4)
        W_LAYOUT: gl.constexpr = zero_words(cfg.CHUNK, S_LAYOUT).type.layout
        w = load_words(words, G * ROWS, entry != FULL, TILE, W_LAYOUT, False)
    q_stage, q_phase = stage_and_phase(uses.q, cfg.Q_STAGES)
    mbarrier.wait(pipes.q.full.index(q_stage), q_phase)
    q = pipes.q.q_bufs.index(q_stage).reshape([TILE, cfg.HEAD_DIM]).slice(G * ROWS, ROWS, dim=0)
    do = pipes.q.do_bufs.index(q_stage).reshape([TILE, cfg.V_DIM]).slice(G * ROWS, ROWS, dim=0)
    flying = _issue(q, do, pipes.kv, uses.kv, cfg)
    for c in gl.static_range(1, CHUNKS):
        flying = flying + _issue(q, do, pipes.kv, uses.kv + c, cfg)
    R_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    lse2 = pipes.q.lse_bufs.index(q_stage).slice(G * ROWS, ROWS).load(R_LAYOUT).expand_dims(1)
    delta = pipes.q.delta_bufs.index(q_stage).slice(G * ROWS, ROWS).load(R_LAYOUT).expand_dims(1)
    bias_stage, bias_phase = stage_and_phase(uses.bias, cfg.BIAS_STAGES)
    mbarrier.wait(pipes.bias.full.index(bias_stage * WARPGROUPS + G), bias_phase)
    step = PairStep(sharer, start_q, kv_tile * TILE, entry, w, lse2, delta, uses.kv, bias_stage)
    sums = [_add_chunk(acc[0], flying, step, pipes, scoring, cfg, G, 0)]
    for c in gl.static_range(1, CHUNKS):
        sums = sums + [_add_chunk(acc[c], flying, step, pipes, scoring, cfg, G, c)]
    return sums


@gluon.jit
def _add_chunk(acc, flying, step, pipes, scoring, cfg: gl.constexpr, G: gl.constexpr, C: gl.constexpr):
    """`acc [ROWS, CHUNK]` with ds of chunk C of a step added, whose products are `flying`: s and dp of each chunk."""
    CHUNK: gl.constexpr = cfg.CHUNK
    CHUNKS: gl.constexpr = TILE // CHUNK
    S_LAYOUT: gl.constexpr = acc.type.layout
    sharer, start_q, start_k = step.sharer, step.start_q, step.start_k + C * CHUNK
    pairs = block_at(pipes.bias.bufs, (step.bias_stage * WARPGROUPS + G) * CHUNKS + C).load(S_LAYOUT)
    bias = load_bias(scoring.terms, sharer.sample, sharer.head, start_q, start_k, ROWS, CHUNK, S_LAYOUT, False)
    s = warpgroup_mma_wait(2 * (CHUNKS - C) - 1, deps=[flying[2 * C]])
    p = _weights(s, bias, pairs, step.lse2, scoring.qk_scale, scoring.terms)
    dp = warpgroup_mma_wait(2 * (CHUNKS - C) - 2, deps=[flying[2 * C + 1]])
    mbarrier.arrive(pipes.kv.empty.index(stage_and_phase(step.kv_use + C, cfg.KV_STAGES)[0]))
    ds = p * (_drop(dp, start_q, start_k, sharer, scoring) - step.delta)
    if cfg.HAS_MASK:  # noqa: SIM102
        if step.entry != FULL:
            # after the product: what a hidden pair multiplies may be NaN
            ds = masked(ds, step.w >> (C * (CHUNK // 4)))
    return acc + ds


@gluon.jit
def _store_block(out, acc, strip, kv_tile, sizes, cfg: gl.constexpr, G: gl.constexpr):
    """Write the sum of a block, what there is of it."""
    LAYOUT: gl.constexpr = acc[0].type.layout
    q_len, kv_len = sizes.q_len, sizes.kv_len
    start_q = strip.q_tile * TILE + G * ROWS
    base = out + (strip.plane.to(gl.int64) * q_len + start_q) * kv_len
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)).expand_dims(1)
    for c in gl.static_range(TILE // cfg.CHUNK):
        start_k = kv_tile * TILE + c * cfg.CHUNK
        keys = start_k + gl.arange(0, cfg.CHUNK, layout=gl.SliceLayout(0, LAYOUT)).expand_dims(0)
        inside = (start_q + rows < q_len) & (keys < kv_len)
        gl.store(base + (rows * kv_len + keys), acc[c].to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _consume(out, pipes, schedule, scoring, cfg: gl.constexpr, G: gl.constexpr):
    """Consumer warpgroup G: its 64 queries of every block."""
    sizes = schedule.sizes
    HAS_MASK: gl.constexpr = cfg.HAS_MASK
    CHUNKS: gl.constexpr = TILE // cfg.CHUNK
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.CHUNK, 16])
    q_use, kv_use, bias_use = 0, 0, 0
    for iteration in range(num_work_tiles(schedule.n_work_tiles, schedule.worker)):
        strip = strip_at(iteration, schedule)
        first_sharer = sharer_at(strip, strip.first, sizes)
        next_entry = entry_at(strip, strip.kv_begin, first_sharer, schedule, HAS_MASK)
        for kv_tile in range(strip.kv_begin, strip.kv_end):
            acc = (gl.zeros([ROWS, cfg.CHUNK], gl.float32, S_LAYOUT),) * CHUNKS
            has_bias, next_sharer = 0, first_sharer
            for i in range(strip.first, strip.last):
                entry, sharer = next_entry, next_sharer
                next_sharer = sharer_after(sharer, strip, sizes)
                next_entry = entry_after(strip, kv_tile, i, next_sharer, first_sharer, schedule, HAS_MASK)
                if entry != EMPTY:
                    at = q_use
                    if cfg.RESIDENT:
                        at += i - strip.first
                    uses = StageUses(at, kv_use, bias_use)
                    acc = _add_step(acc, strip, kv_tile, sharer, entry, uses, pipes, scoring, cfg, G)
                    kv_use += CHUNKS
                    has_bias = 1
                    if not cfg.RESIDENT:
                        # docs/kernels.md, finding 14: of lse2 and delta
                        fence_async_shared()
                        mbarrier.arrive(pipes.q.empty.index(stage_and_phase(q_use, cfg.Q_STAGES)[0]))
                        q_use += 1
            if has_bias == 1:
                # docs/kernels.md, finding 14
                fence_async_shared()
                stage = stage_and_phase(bias_use, cfg.BIAS_STAGES)[0]
                mbarrier.arrive(pipes.bias.empty.index(stage * WARPGROUPS + G))
                bias_use += 1
            _store_block(out, acc, strip, kv_tile, sizes, cfg, G)
        if cfg.RESIDENT:
            fence_async_shared()
            for _ in range(strip.first, strip.last):
                stage, phase = stage_and_phase(q_use, cfg.Q_STAGES)
                # of a sharer whose blocks are all empty nobody has waited for it
                mbarrier.wait(pipes.q.full.index(stage), phase)
                mbarrier.arrive(pipes.q.empty.index(stage))
                q_use += 1


@gluon.jit
def _q_stages(q_desc, do_desc, lse_desc, STAGES: gl.constexpr):
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_bufs = gl.allocate_shared_memory(do_desc.dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], lse_desc.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], lse_desc.layout)
    full, empty = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, WARPGROUPS)
    return QueryStages(q_bufs, do_bufs, lse_bufs, delta_bufs, full, empty)


@gluon.jit
def _kv_stages(k_desc, v_desc, STAGES: gl.constexpr):
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    return KeyStages(k_bufs, v_bufs, allocate_barriers(STAGES, 1), allocate_barriers(STAGES, WARPGROUPS))


@gluon.jit
def _bias_stages(desc, STAGES: gl.constexpr):
    """Of a block, each warpgroup has its own stages, and a buffer for each chunk."""
    N: gl.constexpr = STAGES * WARPGROUPS
    bufs = gl.allocate_shared_memory(
        desc.dtype, [N * (TILE // desc.block_type.shape[3])] + desc.block_type.shape, desc.layout
    )
    return BiasPipeline(bufs, allocate_barriers(N, 1), allocate_barriers(N, 1))


@gluon.jit(
    do_not_specialize=[
        "sample_planes",
        "head_planes",
        "q_heads",
        "group",
        "q_len",
        "samples",
        "heads",
        "out_samples",
        "out_heads",
        "parts",
        "strips",
        "n_work_tiles",
    ],
    do_not_specialize_on_alignment=["tile_map", "words"],
)
def _pair_sums_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    bias_desc,
    lse_desc,
    delta_desc,
    out,
    tile_map,
    words,
    sample_planes,
    head_planes,
    q_heads,
    group,
    q_len,
    kv_len,
    samples,
    heads,
    out_samples,
    out_heads,
    parts,
    strips,
    n_work_tiles,
    qk_scale,
    terms,
    HEAD_DIM: gl.constexpr,
    V_DIM: gl.constexpr,
    CHUNK: gl.constexpr,
    Q_STAGES: gl.constexpr,
    KV_STAGES: gl.constexpr,
    BIAS_STAGES: gl.constexpr,
    RESIDENT: gl.constexpr,
):
    """Writes sums of ds, equations (6) and (11) of docs/kernels.md, to `out [parts, samples, heads, q_len, kv_len]`.

    Grid: (programs), so many that there is a strip for each, `n_work_tiles = parts * out_samples * out_heads * q_tiles
    * strips`: a row of blocks is cut into `strips`. A block is summed over `samples * heads`, each part over an equal
    share; the caller adds the parts. `tile_map`: int32 `[planes, q_tiles, kv_tiles]`: EMPTY, FULL, or the number of a
    partial tile in `words`; None, as `words`, without a mask.

    Descriptors have blocks of TILE queries for q and do, CHUNK keys for k and v, and `[1, 1, ROWS, CHUNK]` for the
    bias. RESIDENT: no part has more sharers than Q_STAGES, and q and do of a strip are loaded once.
    """
    HAS_MASK: gl.constexpr = tile_map is not None
    cfg: gl.constexpr = PairSumsConfig(HEAD_DIM, V_DIM, CHUNK, Q_STAGES, KV_STAGES, BIAS_STAGES, RESIDENT, HAS_MASK)
    q_tiles, kv_tiles = (q_len + TILE - 1) // TILE, (kv_len + TILE - 1) // TILE
    pipes = PairSumsPipelines(
        _q_stages(q_desc, do_desc, lse_desc, Q_STAGES),
        _kv_stages(k_desc, v_desc, KV_STAGES),
        _bias_stages(bias_desc, BIAS_STAGES),
    )
    sizes = PairSumsSizes(
        q_tiles, kv_tiles, q_len, kv_len, q_heads, group, samples, heads, out_samples, out_heads, parts, strips
    )
    worker = Worker(gl.program_id(0), gl.num_programs(0))
    if tile_map is None:
        # nothing reads them
        tile_map, words = out, out
    schedule = PairSumsSchedule(tile_map, PlaneStrides(sample_planes, head_planes), sizes, n_work_tiles, worker)
    scoring = PairScoring(qk_scale, terms, load_seeds(terms), words)
    # argument lists are written inline (docs/kernels.md, finding 8)
    gl.warp_specialize(
        [
            (_consume, (out, pipes, schedule, scoring, cfg, gl.constexpr(0))),
            (_consume, (out, pipes, schedule, scoring, cfg, gl.constexpr(1))),
            (_produce, ((q_desc, do_desc, lse_desc, delta_desc), k_desc, v_desc, bias_desc, pipes, schedule, cfg)),
        ],
        [4, 1],
        [240, 24],
    )
