"""The kernel of dq for head_dim 129 to 256 on Hopper: a work tile is one query tile of one head, as in `forward.py`.

A consumer warpgroup holds dq of 64 queries and computes their scores again, 64 keys a step. No other program adds to
dq, so that its bits are the same in every run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from anymask.backends.hopper.kernels.blocks import blocks_at, issue_scores, issue_sums, load_blocks, wait_sums
from anymask.backends.hopper.kernels.forward import WARPGROUPS
from anymask.backends.hopper.kernels.pipeline import TILE, allocate_barriers, stage_and_phase
from anymask.backends.hopper.kernels.records import (
    DQConfig,
    DQPipelines,
    ForwardSchedule,
    ForwardSizes,
    MaskLists,
    PlaneStrides,
    Ring,
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
from anymask.backends.hopper.kernels.softmax import exp2, mask_exponents, pack_halves, unpack_halves
from anymask.backends.hopper.kernels.wide_dkdv import HALVES, store_blocks
from anymask.backends.hopper.kernels.words import ROWS, load_words, tail_words, zero_words


@gluon.jit
def _produce(q_desc, k_desc, v_desc, do_desc, pipes, schedule, worker, group, cfg: gl.constexpr):
    """The producer warp: loads q and do of every work tile, then k and v of the steps through its kv tiles."""
    q, k, v, lists = pipes.q, pipes.k, pipes.v, schedule.lists
    K_BYTES: gl.constexpr = cfg.D_BLOCKS * k_desc.block_type.nbytes
    V_BYTES: gl.constexpr = cfg.V_BLOCKS * v_desc.block_type.nbytes
    pos = 0
    tile_range, tile, next_tile = first_two_tiles(worker, schedule, cfg.HAS_MASK)
    for iteration in range(num_work_tiles(schedule.n_work_tiles, worker)):
        head, sample = tile.head, tile.sample
        n = (tile_range.n_partial + tile_range.n_full) * HALVES
        mbarrier.wait(q.empty.index(0), (iteration & 1) ^ 1)
        mbarrier.expect(q.full.index(0), WARPGROUPS * (K_BYTES + V_BYTES))
        for g in gl.static_range(WARPGROUPS):
            row = tile.tile * TILE + g * ROWS
            load_blocks(q_desc, sample, head, row, q.full.index(0), q.bufs, g, cfg.D_BLOCKS)
            load_blocks(do_desc, sample, head, row, q.full.index(0), q.row_bufs, g, cfg.V_BLOCKS)
        next_next = work_tile_at(iteration + 2, worker, schedule)
        pending = prefetch_tile_range(next_tile, next_next, schedule, cfg.HAS_MASK)
        kv_tile = load_kv_tile(0, lists, tile_range, cfg.HAS_MASK)
        for t in range(n):
            row = kv_tile * TILE + t % HALVES * ROWS
            kv_tile = load_kv_tile((t + 1) // HALVES, lists, tile_range, cfg.HAS_MASK)
            stage, phase = stage_and_phase(pos + t, cfg.K_STAGES)
            mbarrier.wait(k.empty.index(stage), phase ^ 1)
            mbarrier.expect(k.full.index(stage), K_BYTES)
            load_blocks(k_desc, sample, head // group, row, k.full.index(stage), k.bufs, stage, cfg.D_BLOCKS)
            stage, phase = stage_and_phase(pos + t, cfg.V_STAGES)
            mbarrier.wait(v.empty.index(stage), phase ^ 1)
            mbarrier.expect(v.full.index(stage), V_BYTES)
            load_blocks(v_desc, sample, head // group, row, v.full.index(stage), v.bufs, stage, cfg.V_BLOCKS)
        pos += n
        tile = next_tile
        tile_range, next_tile = read_tile_range(pending, next_next, schedule, cfg.HAS_MASK)


@gluon.jit
def _load_words(lists, tile_range, j, mask_rows, WARPGROUP: gl.constexpr, W_LAYOUT: gl.constexpr):
    """int32 `[ROWS, 4]`: words of the j-th tile of a work tile, all ones where none is stored."""
    words = lists.words + (tile_range.partial_begin + j).to(gl.int64) * (TILE * 4)
    return load_words(words, WARPGROUP * ROWS, j < tile_range.n_partial, mask_rows, W_LAYOUT, False)


@gluon.jit
def _consume(
    dq_desc, lse2, delta, pipes, schedule, worker, sm_scale, qk_scale, cfg: gl.constexpr, WARPGROUP: gl.constexpr
):
    """A consumer warpgroup: dq of ROWS queries of every work tile."""
    q, k, v, lists, sizes = pipes.q, pipes.k, pipes.v, schedule.lists, schedule.sizes
    WIDTH: gl.constexpr = dq_desc.block_type.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    SUM_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, SUM_LAYOUT, 2)
    W_LAYOUT: gl.constexpr = zero_words(ROWS, S_LAYOUT).type.layout
    R_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    dtype: gl.constexpr = dq_desc.dtype
    begin = 0
    tile_range, tile, next_tile = first_two_tiles(worker, schedule, cfg.HAS_MASK)
    for iteration in range(num_work_tiles(schedule.n_work_tiles, worker)):
        head, sample = tile.head, tile.sample
        row = tile.tile * TILE + WARPGROUP * ROWS
        line = (sample * sizes.q_heads + head).to(gl.int64) * (sizes.q_tiles * TILE) + row
        rows = line + gl.arange(0, ROWS, layout=R_LAYOUT)
        lse2_rows, delta_rows = gl.load(lse2 + rows), gl.load(delta + rows)
        end = begin + (tile_range.n_partial + tile_range.n_full) * HALVES
        if cfg.HAS_MASK:
            w = _load_words(lists, tile_range, 0, sizes.mask_rows, WARPGROUP, W_LAYOUT)
            masked_end = begin + tile_range.n_partial * HALVES
        else:
            # the last tile comes first and can end early
            w = tail_words(sizes.kv_len - (tile_range.n_full - 1) * TILE, W_LAYOUT)
            masked_end = begin + HALVES
        next_next = work_tile_at(iteration + 2, worker, schedule)
        pending = prefetch_tile_range(next_tile, next_next, schedule, cfg.HAS_MASK)
        dq = (gl.zeros([ROWS, WIDTH], gl.float32, SUM_LAYOUT),) * cfg.D_BLOCKS
        # of the step before the first: zeros, multiplied with the first step's k
        ds = pack_halves(gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT), dtype)
        mbarrier.wait(q.full.index(0), iteration & 1)
        for pos in range(begin, end):
            stage, phase = stage_and_phase(pos, cfg.K_STAGES)
            v_stage, v_phase = stage_and_phase(pos, cfg.V_STAGES)
            last, last_phase = stage_and_phase(gl.maximum(pos - 1, begin), cfg.K_STAGES)
            mbarrier.wait(k.full.index(last), last_phase)
            left = unpack_halves(ds, dtype, P_LAYOUT)
            dq_flying = issue_sums(left, k.bufs, last, dq)
            mbarrier.wait(k.full.index(stage), phase)
            # 0, which the compiler does not know (docs/kernels.md, finding 2)
            own = WARPGROUP + (pos >> 30)
            s = issue_scores(blocks_at(q.bufs, own, cfg.D_BLOCKS), k.bufs, stage)
            s = warpgroup_mma_wait(0, deps=[s])
            dq, _ = wait_sums(dq_flying, left)
            mbarrier.arrive(k.empty.index(last), pred=pos > begin)
            mbarrier.wait(v.full.index(v_stage), v_phase)
            dp = issue_scores(blocks_at(q.row_bufs, own, cfg.V_BLOCKS), v.bufs, v_stage)
            z = s * qk_scale - lse2_rows.expand_dims(1)
            if pos < masked_end:
                step = stage_and_phase(pos, HALVES)[0]
                z = mask_exponents(z, w >> step * (ROWS // 4))
                if cfg.HAS_MASK:  # noqa: SIM102
                    if step == HALVES - 1:
                        w = _load_words(
                            lists, tile_range, (pos + 1 - begin) // HALVES, sizes.mask_rows, WARPGROUP, W_LAYOUT
                        )
            p = exp2(z)
            dp = warpgroup_mma_wait(0, deps=[dp])
            mbarrier.arrive(v.empty.index(v_stage))
            ds = pack_halves(p * (dp - delta_rows.expand_dims(1)), dtype)
        if end > begin:
            last = stage_and_phase(end - 1, cfg.K_STAGES)[0]
            left = unpack_halves(ds, dtype, P_LAYOUT)
            dq, _ = wait_sums(issue_sums(left, k.bufs, last, dq), left)
            mbarrier.arrive(k.empty.index(last))
        begin = end
        # its own q has been read
        store_blocks(dq_desc, sample, head, row, dq, sm_scale, q.bufs, WARPGROUP * cfg.D_BLOCKS, cfg.D_BLOCKS)
        mbarrier.arrive(q.empty.index(0))
        tile = next_tile
        tile_range, next_tile = read_tile_range(pending, next_next, schedule, cfg.HAS_MASK)


@gluon.jit
def _allocate(q_desc, k_desc, v_desc, do_desc, cfg: gl.constexpr):
    """Shared memory of a program."""
    dtype: gl.constexpr = q_desc.dtype
    d_shape: gl.constexpr = q_desc.block_type.shape
    v_shape: gl.constexpr = do_desc.block_type.shape
    q_bufs = gl.allocate_shared_memory(dtype, [WARPGROUPS * cfg.D_BLOCKS] + d_shape, q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [WARPGROUPS * cfg.V_BLOCKS] + v_shape, do_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [cfg.K_STAGES * cfg.D_BLOCKS] + d_shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [cfg.V_STAGES * cfg.V_BLOCKS] + v_shape, v_desc.layout)
    q = Ring(q_bufs, do_bufs, allocate_barriers(1, 1), allocate_barriers(1, WARPGROUPS))
    k = Ring(k_bufs, k_bufs, allocate_barriers(cfg.K_STAGES, 1), allocate_barriers(cfg.K_STAGES, WARPGROUPS))
    v = Ring(v_bufs, v_bufs, allocate_barriers(cfg.V_STAGES, 1), allocate_barriers(cfg.V_STAGES, WARPGROUPS))
    return DQPipelines(q, k, v)


@gluon.jit(
    do_not_specialize=[
        "sample_planes",
        "head_planes",
        "q_tiles",
        "q_heads",
        "group",
        "q_len",
        "kv_len",
        "n_work_tiles",
        "swizzle_heads",
    ],
    do_not_specialize_on_alignment=["full_offsets", "full_tiles", "partial_offsets", "partial_tiles", "words", "order"],
)
def _wide_dq_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dq_desc,
    lse2,
    delta,
    full_offsets,
    full_tiles,
    partial_offsets,
    partial_tiles,
    words,
    order,
    sample_planes,
    head_planes,
    q_tiles,
    q_heads,
    group,
    q_len,
    kv_len,
    n_work_tiles,
    swizzle_heads,
    sm_scale,
    qk_scale,
    D_BLOCKS: gl.constexpr,
    V_BLOCKS: gl.constexpr,
    K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
):
    """Writes `dq`; equations (5) to (7). Grid: (programs), up to `n_work_tiles = batch * q_heads * q_tiles`.

    Descriptors have blocks `[1, 1, ROWS, width]`; lse2 and delta have whole tiles of rows.
    """
    cfg: gl.constexpr = DQConfig(D_BLOCKS, V_BLOCKS, K_STAGES, V_STAGES, words is not None)
    pipes = _allocate(q_desc, k_desc, v_desc, do_desc, cfg)
    if words is not None:
        lists = MaskLists(full_offsets, full_tiles, partial_offsets, partial_tiles, words, order)
    else:
        # nothing reads them
        lists = MaskLists(lse2, lse2, lse2, lse2, lse2, lse2)
    sizes = ForwardSizes(q_tiles, q_heads, q_len, kv_len, q_len)
    schedule = ForwardSchedule(lists, PlaneStrides(sample_planes, head_planes), sizes, n_work_tiles, swizzle_heads, ())
    worker = Worker(gl.program_id(0), gl.num_programs(0))
    # argument lists are written inline (docs/kernels.md, finding 8)
    gl.warp_specialize(
        [
            (_consume, (dq_desc, lse2, delta, pipes, schedule, worker, sm_scale, qk_scale, cfg, gl.constexpr(0))),
            (_consume, (dq_desc, lse2, delta, pipes, schedule, worker, sm_scale, qk_scale, cfg, gl.constexpr(1))),
            (_produce, (q_desc, k_desc, v_desc, do_desc, pipes, schedule, worker, group, cfg)),
        ],
        [4, 1],
        [240, 24],
    )
