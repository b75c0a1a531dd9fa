"""The backward kernel for head_dim 129 to 256 on Hopper: a program computes dk and dv of 64 keys after another.

The sums of 64 keys fill the registers of two consumer warpgroups, so one has dv and the other dk. The first computes p
and hands it to the second through shared memory, the second computes ds; each has two products of a step of 64
queries, on transposed scores as in `backward.py`. dq has a kernel of its own, which computes the scores again: as fp32
sums in memory it would take the copy engine longer than that.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from anymask.backends.hopper.kernels.blocks import blocks_at, issue_scores, issue_sums, load_blocks, wait_sums
from anymask.backends.hopper.kernels.compat import tma_load, tma_store
from anymask.backends.hopper.kernels.pipeline import TILE, allocate_barriers, stage_and_phase
from anymask.backends.hopper.kernels.records import (
    BackwardSchedule,
    BackwardSizes,
    Column,
    DKDVConfig,
    DKDVPipelines,
    Exchange,
    MaskLists,
    PlaneStrides,
    Ring,
    Worker,
)
from anymask.backends.hopper.kernels.scheduler import (
    decode_work_tile,
    load_q_tile,
    load_tile_range,
    num_work_tiles,
    work_index,
)
from anymask.backends.hopper.kernels.softmax import exp2, masked_exp2, pack_halves, unpack_halves
from anymask.backends.hopper.kernels.words import ROWS, load_words, zero_words

# work tiles in a tile of keys, and steps in a tile of queries
HALVES = gl.constexpr(2)


@gluon.jit
def _half_column_at(index, schedule, HAS_MASK: gl.constexpr):
    """The worker's column at `index`, as `column_at`, and the first of its keys in the work tile."""
    lists, strides, sizes = schedule.lists, schedule.plane_strides, schedule.sizes
    group, n_work_tiles = sizes.group, schedule.n_work_tiles
    work = gl.minimum(work_index(index // group, schedule.worker), n_work_tiles - 1)
    work_tile = decode_work_tile(work, HALVES * sizes.kv_tiles, sizes.kv_heads, n_work_tiles, schedule.swizzle_heads)
    tile, sample = work_tile.tile // HALVES, work_tile.sample
    first_head = work_tile.head * group
    head = first_head + index % group
    if HAS_MASK:
        first_plane = sample * strides.sample + first_head * strides.head
        tile = gl.load(lists.order + first_plane * sizes.kv_tiles + tile)
    row = (sample * strides.sample + head * strides.head) * sizes.kv_tiles + tile
    r = load_tile_range(lists, row, sizes.q_tiles, HAS_MASK)
    column = Column(sample, head, tile, r.full_begin, r.n_full, r.partial_begin, r.n_partial)
    return column, work_tile.tile % HALVES * ROWS


@gluon.jit
def _produce(q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, pipes, schedule, cfg: gl.constexpr):
    """The producer warp: loads k and v of every work tile, then q, lse2, do and delta of the steps through it."""
    q, do, lists = pipes.q, pipes.do, schedule.lists
    q_tiles, kv_heads, group = schedule.sizes.q_tiles, schedule.sizes.kv_heads, schedule.sizes.group
    KV_BYTES: gl.constexpr = cfg.D_BLOCKS * k_desc.block_type.nbytes + cfg.V_BLOCKS * v_desc.block_type.nbytes
    Q_BYTES: gl.constexpr = cfg.D_BLOCKS * q_desc.block_type.nbytes + lse_desc.block_type.nbytes
    DO_BYTES: gl.constexpr = cfg.V_BLOCKS * do_desc.block_type.nbytes + delta_desc.block_type.nbytes
    pos = 0
    next_column, next_first_key = _half_column_at(0, schedule, cfg.HAS_MASK)
    q_tile = load_q_tile(next_column, lists, 0, cfg.HAS_MASK)
    for iteration in range(num_work_tiles(schedule.n_work_tiles, schedule.worker)):
        sample, kv_head = next_column.sample, next_column.head // group
        key = next_column.tile * TILE + next_first_key
        mbarrier.wait(pipes.kv_empty, (iteration & 1) ^ 1)
        mbarrier.expect(pipes.kv_full, KV_BYTES)
        load_blocks(k_desc, sample, kv_head, key, pipes.kv_full, pipes.k_bufs, 0, cfg.D_BLOCKS)
        load_blocks(v_desc, sample, kv_head, key, pipes.kv_full, pipes.v_bufs, 0, cfg.V_BLOCKS)
        for i in range(group):
            column = next_column
            next_column, next_first_key = _half_column_at(iteration * group + i + 1, schedule, cfg.HAS_MASK)
            sample, head = column.sample, column.head
            row = (sample * kv_heads * group + head) * q_tiles * TILE
            for j in range(column.n_full + column.n_partial):
                start = q_tile * TILE
                q_tile = load_q_tile(column, lists, j + 1, cfg.HAS_MASK)
                for _ in gl.static_range(HALVES):
                    stage, phase = stage_and_phase(pos, cfg.STAGES)
                    q_full, do_full = q.full.index(stage), do.full.index(stage)
                    mbarrier.wait(q.empty.index(stage), phase ^ 1)
                    mbarrier.expect(q_full, Q_BYTES)
                    load_blocks(q_desc, sample, head, start, q_full, q.bufs, stage, cfg.D_BLOCKS)
                    tma_load(lse_desc, [row + start], q_full, q.row_bufs.index(stage))
                    mbarrier.wait(do.empty.index(stage), phase ^ 1)
                    mbarrier.expect(do_full, DO_BYTES)
                    load_blocks(do_desc, sample, head, start, do_full, do.bufs, stage, cfg.V_BLOCKS)
                    tma_load(delta_desc, [row + start], do_full, do.row_bufs.index(stage))
                    start += ROWS
                    pos += 1
            q_tile = load_q_tile(next_column, lists, 0, cfg.HAS_MASK)


@gluon.jit
def _to_exchange(x):
    """`x [ROWS, ROWS]` of an accumulator so that a thread has four elements in a row, and a warp's are side by side."""
    return x.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([8, ROWS * ROWS // 8])


@gluon.jit
def _from_exchange(x, LAYOUT: gl.constexpr):
    """Undo `_to_exchange`; nothing moves."""
    x = x.reshape([8, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5)).reshape([ROWS, ROWS])
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def _consume_dv(dv_desc, pipes, schedule, qk_scale, cfg: gl.constexpr):
    """The consumer warpgroup that computes p, hands it over, and sums dv."""
    q, do, lists, group = pipes.q, pipes.do, schedule.lists, schedule.sizes.group
    WIDTH: gl.constexpr = dv_desc.block_type.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    SUM_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, SUM_LAYOUT, 2)
    W_LAYOUT: gl.constexpr = zero_words(ROWS, S_LAYOUT).type.layout
    COL_LAYOUT: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = dv_desc.dtype
    begin = 0
    next_column, next_first_key = _half_column_at(0, schedule, cfg.HAS_MASK)
    if cfg.HAS_MASK:
        next_w = _load_words(lists, next_column, next_first_key, 0, W_LAYOUT)
    for iteration in range(num_work_tiles(schedule.n_work_tiles, schedule.worker)):
        sample, head, tile, first_key = next_column.sample, next_column.head, next_column.tile, next_first_key
        dv = (gl.zeros([ROWS, WIDTH], gl.float32, SUM_LAYOUT),) * cfg.V_BLOCKS
        # of the step before the first: zeros, multiplied with the first step's do
        p = pack_halves(gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT), dtype)
        first = begin
        mbarrier.wait(pipes.kv_full, iteration & 1)
        k = blocks_at(pipes.k_bufs, 0, cfg.D_BLOCKS)
        for i in range(group):
            column, column_first_key = next_column, next_first_key
            next_column, next_first_key = _half_column_at(iteration * group + i + 1, schedule, cfg.HAS_MASK)
            end = begin + (column.n_full + column.n_partial) * HALVES
            for pos in range(begin, end):
                stage, phase = stage_and_phase(pos, cfg.STAGES)
                last, last_phase = stage_and_phase(gl.maximum(pos - 1, first), cfg.STAGES)
                mbarrier.wait(do.full.index(last), last_phase)
                left = unpack_halves(p, dtype, P_LAYOUT)
                dv_flying = issue_sums(left, do.bufs, last, dv)
                mbarrier.wait(q.full.index(stage), phase)
                s = issue_scores(k, q.bufs, stage)
                lse2 = q.row_bufs.index(stage).load(COL_LAYOUT)
                s = warpgroup_mma_wait(0, deps=[s])
                dv, _ = wait_sums(dv_flying, left)
                # lse2 has been read, before the copy engine may write there
                fence_async_shared()
                mbarrier.arrive(q.empty.index(stage))
                mbarrier.arrive(do.empty.index(last), pred=pos > first)
                z = s * qk_scale - lse2.expand_dims(0)
                if cfg.HAS_MASK:
                    w = next_w >> (pos - begin) % HALVES * (ROWS // 4)
                    next_w = _load_words(lists, column, column_first_key, (pos + 1 - begin) // HALVES, W_LAYOUT)
                    x = masked_exp2(z, w)
                else:
                    x = exp2(z)
                p_stage, p_phase = stage_and_phase(pos, cfg.P_STAGES)
                mbarrier.wait(pipes.p.empty.index(p_stage), p_phase ^ 1)
                pipes.p.bufs.index(p_stage).store(_to_exchange(x))
                mbarrier.arrive(pipes.p.full.index(p_stage))
                p = pack_halves(x, dtype)
            begin = end
            if cfg.HAS_MASK:
                next_w = _load_words(lists, next_column, next_first_key, 0, W_LAYOUT)
        if begin > first:
            last, last_phase = stage_and_phase(begin - 1, cfg.STAGES)
            mbarrier.wait(do.full.index(last), last_phase)
            left = unpack_halves(p, dtype, P_LAYOUT)
            dv, _ = wait_sums(issue_sums(left, do.bufs, last, dv), left)
            mbarrier.arrive(do.empty.index(last))
        # the scores of all steps have been computed: nothing reads k any more
        store_blocks(dv_desc, sample, head // group, tile * TILE + first_key, dv, 1.0, pipes.k_bufs, 0, cfg.D_BLOCKS)
        mbarrier.arrive(pipes.kv_empty)


@gluon.jit
def _consume_dk(dk_desc, pipes, schedule, sm_scale, cfg: gl.constexpr):
    """The consumer warpgroup that computes ds from p and sums dk."""
    q, do, group = pipes.q, pipes.do, schedule.sizes.group
    WIDTH: gl.constexpr = dk_desc.block_type.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    SUM_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, SUM_LAYOUT, 2)
    COL_LAYOUT: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    X_LAYOUT: gl.constexpr = _to_exchange(gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT)).type.layout
    dtype: gl.constexpr = dk_desc.dtype
    begin = 0
    next_column, next_first_key = _half_column_at(0, schedule, cfg.HAS_MASK)
    for iteration in range(num_work_tiles(schedule.n_work_tiles, schedule.worker)):
        sample, head, tile, first_key = next_column.sample, next_column.head, next_column.tile, next_first_key
        dk = (gl.zeros([ROWS, WIDTH], gl.float32, SUM_LAYOUT),) * cfg.D_BLOCKS
        # as p in `_consume_dv`
        ds = pack_halves(gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT), dtype)
        first = begin
        mbarrier.wait(pipes.kv_full, iteration & 1)
        v = blocks_at(pipes.v_bufs, 0, cfg.V_BLOCKS)
        end = begin
        for i in range(group):
            column = next_column
            next_column, next_first_key = _half_column_at(iteration * group + i + 1, schedule, cfg.HAS_MASK)
            end += (column.n_full + column.n_partial) * HALVES
        for pos in range(begin, end):
            stage, phase = stage_and_phase(pos, cfg.STAGES)
            last, last_phase = stage_and_phase(gl.maximum(pos - 1, first), cfg.STAGES)
            mbarrier.wait(q.full.index(last), last_phase)
            left = unpack_halves(ds, dtype, P_LAYOUT)
            dk_flying = issue_sums(left, q.bufs, last, dk)
            mbarrier.wait(do.full.index(stage), phase)
            dp = issue_scores(v, do.bufs, stage)
            delta = do.row_bufs.index(stage).load(COL_LAYOUT)
            dp = warpgroup_mma_wait(0, deps=[dp])
            dk, _ = wait_sums(dk_flying, left)
            # and so has delta
            fence_async_shared()
            mbarrier.arrive(do.empty.index(stage))
            mbarrier.arrive(q.empty.index(last), pred=pos > first)
            p_stage, p_phase = stage_and_phase(pos, cfg.P_STAGES)
            mbarrier.wait(pipes.p.full.index(p_stage), p_phase)
            x = _from_exchange(pipes.p.bufs.index(p_stage).load(X_LAYOUT), S_LAYOUT)
            mbarrier.arrive(pipes.p.empty.index(p_stage))
            ds = pack_halves(x * (dp - delta.expand_dims(0)), dtype)
        begin = end
        if begin > first:
            last, last_phase = stage_and_phase(begin - 1, cfg.STAGES)
            mbarrier.wait(q.full.index(last), last_phase)
            left = unpack_halves(ds, dtype, P_LAYOUT)
            dk, _ = wait_sums(issue_sums(left, q.bufs, last, dk), left)
            mbarrier.arrive(q.empty.index(last))
        store_blocks(
            dk_desc, sample, head // group, tile * TILE + first_key, dk, sm_scale, pipes.v_bufs, 0, cfg.V_BLOCKS
        )
        mbarrier.arrive(pipes.kv_empty)


@gluon.jit
def _load_words(lists, column, first_key, j, W_LAYOUT: gl.constexpr):
    """int32 `[ROWS, 4]`: words of keys from `first_key` of the j-th tile of a column, all ones where none is stored."""
    words = lists.words + (column.partial_begin + j).to(gl.int64) * (TILE * 4)
    return load_words(words, first_key, j < column.n_partial, TILE, W_LAYOUT, False)


@gluon.jit
def store_blocks(desc, sample, head, row, blocks, scale, bufs, FIRST: gl.constexpr, BUFS: gl.constexpr):
    """Write a sum, through those BUFS of `bufs [blocks, 1, 1, ROWS, width]` from FIRST on, which nothing reads more."""
    BLOCKS: gl.constexpr = len(blocks)
    WIDTH: gl.constexpr = desc.block_type.shape[3]
    for c in gl.static_range(BLOCKS):
        if c >= BUFS:
            tma.store_wait(0)
        buf = bufs.index(FIRST + c % BUFS)
        buf.reshape([ROWS, WIDTH]).store((blocks[c] * scale).to(desc.dtype))
        fence_async_shared()
        tma_store(desc, [sample, head, row, c * WIDTH], buf)
    tma.store_wait(0)


@gluon.jit
def _allocate(q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, cfg: gl.constexpr):
    """Shared memory of a program."""
    STAGES: gl.constexpr = cfg.STAGES
    P_STAGES: gl.constexpr = cfg.P_STAGES
    dtype: gl.constexpr = q_desc.dtype
    k_bufs = gl.allocate_shared_memory(dtype, [cfg.D_BLOCKS] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [cfg.V_BLOCKS] + v_desc.block_type.shape, v_desc.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES * cfg.D_BLOCKS] + q_desc.block_type.shape, q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES * cfg.V_BLOCKS] + do_desc.block_type.shape, do_desc.layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], lse_desc.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], delta_desc.layout)
    X_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    p_bufs = gl.allocate_shared_memory(gl.float32, [P_STAGES, 8, ROWS * ROWS // 8], X_SHARED)
    q = Ring(q_bufs, lse_bufs, allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2))
    do = Ring(do_bufs, delta_bufs, allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2))
    p = Exchange(p_bufs, allocate_barriers(P_STAGES, 1), allocate_barriers(P_STAGES, 1))
    kv_full, kv_empty = allocate_barriers(1, 1).index(0), allocate_barriers(1, 2).index(0)
    return DKDVPipelines(k_bufs, v_bufs, kv_full, kv_empty, q, do, p)


@gluon.jit(
    do_not_specialize=[
        "sample_planes",
        "head_planes",
        "q_tiles",
        "kv_heads",
        "group",
        "kv_len",
        "n_work_tiles",
        "swizzle_heads",
    ],
    do_not_specialize_on_alignment=["full_offsets", "full_tiles", "partial_offsets", "partial_tiles", "words", "order"],
)
def _wide_dkdv_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_desc,
    delta_desc,
    dk_desc,
    dv_desc,
    full_offsets,
    full_tiles,
    partial_offsets,
    partial_tiles,
    words,
    order,
    sample_planes,
    head_planes,
    q_tiles,
    kv_heads,
    group,
    kv_len,
    n_work_tiles,
    swizzle_heads,
    sm_scale,
    qk_scale,
    D_BLOCKS: gl.constexpr,
    V_BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    P_STAGES: gl.constexpr,
):
    """Writes `dk`, `dv` of 64 keys of one kv head, summed over its group of query heads; equations (5), (6), (8), (9).

    Grid: (programs), between 1 and `n_work_tiles = batch * kv_heads * 2 * kv tiles`. Descriptors have blocks
    `[1, 1, ROWS, width]`, those of lse2 and delta `[ROWS]`. Keys beyond `kv_len` are rows of 0 that nothing stores.
    """
    cfg: gl.constexpr = DKDVConfig(D_BLOCKS, V_BLOCKS, STAGES, P_STAGES, words is not None)
    pipes = _allocate(q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, cfg)
    lists = MaskLists(full_offsets, full_tiles, partial_offsets, partial_tiles, words, order)
    sizes = BackwardSizes(q_tiles, (kv_len + TILE - 1) // TILE, kv_heads, group)
    worker = Worker(gl.program_id(0), gl.num_programs(0))
    strides = PlaneStrides(sample_planes, head_planes)
    schedule = BackwardSchedule(lists, strides, sizes, n_work_tiles, swizzle_heads, worker, ())
    # argument lists are written inline (docs/kernels.md, finding 8)
    gl.warp_specialize(
        [
            (_consume_dv, (dv_desc, pipes, schedule, qk_scale, cfg)),
            (_consume_dk, (dk_desc, pipes, schedule, sm_scale, cfg)),
            (_produce, (q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, pipes, schedule, cfg)),
        ],
        [4, 1],
        [240, 24],
    )
