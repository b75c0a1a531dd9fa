"""The backward kernel for Hopper: a program computes dk and dv of one tile of keys after another, and its share of dq.

Two consumer warpgroups hold 64 keys each, with dk and dv in registers, and compute on transposed scores. `ds^T` of both
meets in shared memory, from where each warpgroup multiplies its half of dq; one warp fills the stages of q and do,
another adds dq to an fp32 accumulator in global memory. docs/kernels.md, section 5, draws who waits for whom.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from anymask.backends.hopper.kernels.compat import tma_add, tma_load, tma_store
from anymask.backends.hopper.kernels.pipeline import TILE, allocate_barriers
from anymask.backends.hopper.kernels.records import (
    BackwardConfig,
    BackwardPipelines,
    BackwardSchedule,
    BackwardSizes,
    Column,
    DOStages,
    DQBuffer,
    KVBuffers,
    MaskLists,
    PlaneStrides,
    QStages,
    Worker,
)
from anymask.backends.hopper.kernels.scheduler import decode_work_tile, load_tile_range, num_work_tiles, work_index
from anymask.backends.hopper.kernels.softmax import exp2


@gluon.jit
def _column_at(index, schedule, HAS_MASK: gl.constexpr):
    """The worker's column at `index`: one for each query head of the group of a work tile, then the next work tile's.

    It is read while the column before it is at work, as that takes two indirections.
    """
    lists, strides, sizes = schedule.lists, schedule.plane_strides, schedule.sizes
    group, kv_tiles, n_work_tiles = sizes.group, sizes.kv_tiles, schedule.n_work_tiles
    work = gl.minimum(work_index(index // group, schedule.worker), n_work_tiles - 1)
    work_tile = decode_work_tile(work, kv_tiles, sizes.kv_heads, n_work_tiles, schedule.swizzle_heads)
    tile, sample = work_tile.tile, work_tile.sample
    first_head = work_tile.head * group
    head = first_head + index % group
    plane = sample * strides.sample + head * strides.head
    if HAS_MASK:
        # heads of a group may have planes of their own: any order is right, the first head's is as good as another
        first_plane = sample * strides.sample + first_head * strides.head
        tile = gl.load(lists.order + first_plane * kv_tiles + tile)
    r = load_tile_range(lists, plane * kv_tiles + tile, sizes.q_tiles, HAS_MASK)
    return Column(sample, head, tile, r.full_begin, r.n_full, r.partial_begin, r.n_partial)


@gluon.jit
def _load_q_tile(column, lists, j, HAS_MASK: gl.constexpr):
    """The j-th query tile of a column, partial ones first; 0 past the end."""
    n_partial, n_full = column.n_partial, column.n_full
    tile = j
    if HAS_MASK:
        if j < n_partial:
            entry = lists.partial_tiles + (column.partial_begin + j)
        else:
            entry = lists.full_tiles + (column.full_begin + j - n_partial)
        tile = gl.load(entry, mask=j < n_partial + n_full, other=0)
    return tile


@gluon.jit
def _produce(q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, pipes, schedule, cfg: gl.constexpr):
    """The producer warp: loads k and v of every work tile, then q, lse2, do and delta of the steps through it."""
    kv, q, do, empty = pipes.kv, pipes.q, pipes.do, pipes.empty
    lists, worker, n_work_tiles = schedule.lists, schedule.worker, schedule.n_work_tiles
    q_tiles, kv_heads, group = schedule.sizes.q_tiles, schedule.sizes.kv_heads, schedule.sizes.group
    HAS_MASK: gl.constexpr = cfg.HAS_MASK
    BLOCK_M: gl.constexpr = cfg.BLOCK_M
    STAGES: gl.constexpr = cfg.STAGES
    pos = 0
    next_column = _column_at(0, schedule, HAS_MASK)
    q_tile = _load_q_tile(next_column, lists, 0, HAS_MASK)
    for iteration in range(num_work_tiles(n_work_tiles, worker)):
        sample, head, tile = next_column.sample, next_column.head, next_column.tile
        mbarrier.wait(kv.empty, (iteration & 1) ^ 1)
        mbarrier.expect(kv.full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma_load(k_desc, [sample, head // group, tile * TILE, 0], kv.full, kv.k_bufs.index(0))
        tma_load(v_desc, [sample, head // group, tile * TILE, 0], kv.full, kv.v_bufs.index(0))
        for i in range(group):
            column = next_column
            next_column = _column_at(iteration * group + i + 1, schedule, HAS_MASK)
            sample, head = column.sample, column.head
            row = (sample * kv_heads * group + head) * q_tiles * TILE
            for j in range(column.n_full + column.n_partial):
                start = q_tile * TILE
                q_tile = _load_q_tile(column, lists, j + 1, HAS_MASK)
                for _ in gl.static_range(TILE // BLOCK_M):
                    stage = pos & (STAGES - 1)
                    mbarrier.wait(empty.index(stage), ((pos // STAGES) & 1) ^ 1)
                    mbarrier.expect(q.full.index(stage), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
                    tma_load(q_desc, [sample, head, start, 0], q.full.index(stage), q.bufs.index(stage))
                    tma_load(lse_desc, [row + start], q.full.index(stage), q.lse_bufs.index(stage))
                    mbarrier.expect(do.full.index(stage), do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
                    tma_load(do_desc, [sample, head, start, 0], do.full.index(stage), do.bufs.index(stage))
                    tma_load(delta_desc, [row + start], do.full.index(stage), do.delta_bufs.index(stage))
                    start += BLOCK_M
                    pos += 1
            q_tile = _load_q_tile(next_column, lists, 0, HAS_MASK)
        # consumers compute the scores of one step too many, from whatever the buffer holds
        stage = pos & (STAGES - 1)
        mbarrier.wait(empty.index(stage), ((pos // STAGES) & 1) ^ 1)
        mbarrier.arrive(q.full.index(stage))
        mbarrier.arrive(do.full.index(stage))
        pos += 1


@gluon.jit
def _reduce_dq(dq_desc, dq, schedule, cfg: gl.constexpr):
    """The dq store warp: adds the dq of each step to global memory, if there is a `dq_desc`."""
    if dq_desc is not None:
        lists, worker, n_work_tiles = schedule.lists, schedule.worker, schedule.n_work_tiles
        q_tiles, kv_heads, group = schedule.sizes.q_tiles, schedule.sizes.kv_heads, schedule.sizes.group
        HAS_MASK: gl.constexpr = cfg.HAS_MASK
        pos = 0
        next_column = _column_at(0, schedule, HAS_MASK)
        for index in range(num_work_tiles(n_work_tiles, worker) * group):
            column = next_column
            next_column = _column_at(index + 1, schedule, HAS_MASK)
            sample, head = column.sample, column.head
            head_tile = (sample * kv_heads * group + head) * q_tiles
            for j in range(column.n_full + column.n_partial):
                row = (head_tile + _load_q_tile(column, lists, j, HAS_MASK)) * (TILE * cfg.HEAD_DIM // 32)
                for _ in gl.static_range(TILE // cfg.BLOCK_M):
                    mbarrier.wait(dq.full, pos & 1)
                    tma_add(dq_desc, [row, 0], dq.buf)
                    tma.store_wait(0)
                    mbarrier.arrive(dq.empty)
                    row += cfg.BLOCK_M * cfg.HEAD_DIM // 32
                    pos += 1


@gluon.jit
def _load_words(words, column, j, offs):
    """int32 `[TILE, 4]`: words of the j-th tile of a column, all ones where none is stored; `offs`: in a tile."""
    n_partial = column.n_partial
    entry = (column.partial_begin + j).to(gl.int64)
    return gl.load(words + entry * (TILE * 4) + offs, mask=offs * 0 + j < n_partial, other=-1)


@gluon.jit
def _opaque_zero(step):
    """0, which the compiler does not know (docs/kernels.md, finding 2)."""
    return step >> 30


@gluon.jit
def _mask_pairs(p, w, bit):
    """`p [TILE, BLOCK_M]` where pairs attend, else 0; `w [TILE, 4]` words of the keys, `bit` as in `_consume`."""
    p4 = p.reshape([TILE, p.shape[1] // 8, 4, 2])
    p4 = gl.where(((w.expand_dims(1).expand_dims(3) >> bit) & 1) != 0, p4, 0.0)
    return gl.convert_layout(p4.reshape([TILE, p.shape[1]]), p.type.layout, assert_trivial=True)


@gluon.jit
def _bit_numbers(BLOCK_M: gl.constexpr, S4_LAYOUT: gl.constexpr):
    """int32 `[1, BLOCK_M // 8, 1, 2]`: for each column of a step, which bit of its word it is."""
    PAIR_LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, S4_LAYOUT)))
    BIT_LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, S4_LAYOUT)))
    bit = 2 * gl.arange(0, BLOCK_M // 8, layout=PAIR_LAYOUT).expand_dims(0).expand_dims(2).expand_dims(3)
    return bit + gl.arange(0, 2, layout=BIT_LAYOUT).expand_dims(0).expand_dims(1).expand_dims(2)


@gluon.jit
def _consume(dk_desc, dv_desc, pipes, schedule, kv_len, sm_scale, qk_scale, cfg: gl.constexpr):
    """The consumer warpgroups: dk and dv of each work tile, their share of every dq; (5) to (9), transposed."""
    kv, q_stages, do_stages, empty = pipes.kv, pipes.q, pipes.do, pipes.empty
    words, group = schedule.lists.words, schedule.sizes.group
    BLOCK_M: gl.constexpr = cfg.BLOCK_M
    HEAD_DIM: gl.constexpr = cfg.HEAD_DIM
    STAGES: gl.constexpr = cfg.STAGES
    HAS_MASK: gl.constexpr = cfg.HAS_MASK
    HAS_DQ: gl.constexpr = cfg.HAS_DQ
    STEPS: gl.constexpr = TILE // BLOCK_M
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    KV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEAD_DIM, 16])
    # the warpgroups share dq by rows where there are rows enough, else by columns
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_M // 16, STEPS], [16, 64, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, KV_LAYOUT, 2)
    COL_LAYOUT: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    S4_LAYOUT: gl.constexpr = (
        gl.zeros([TILE, BLOCK_M], gl.float32, S_LAYOUT).reshape([TILE, BLOCK_M // 8, 4, 2]).type.layout
    )
    W_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, S4_LAYOUT))
    dtype: gl.constexpr = dk_desc.dtype
    zero_s = gl.zeros([TILE, BLOCK_M], gl.float32, S_LAYOUT)
    zero_dq = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, DQ_LAYOUT)
    # [TILE, 4]: row and quad of this thread's words
    rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, W_LAYOUT)).expand_dims(1)
    offs = rows * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, W_LAYOUT)).expand_dims(0)
    bit = _bit_numbers(BLOCK_M, S4_LAYOUT)
    begin = 0
    next_column = _column_at(0, schedule, HAS_MASK)
    if HAS_MASK:
        next_w = _load_words(words, next_column, 0, offs)
    for iteration in range(num_work_tiles(schedule.n_work_tiles, schedule.worker)):
        sample, head, tile = next_column.sample, next_column.head, next_column.tile
        dk = gl.zeros([TILE, HEAD_DIM], gl.float32, KV_LAYOUT)
        dv = gl.zeros([TILE, HEAD_DIM], gl.float32, KV_LAYOUT)
        # without a mask the same words in every tile mask out the keys beyond kv_len
        w = gl.where(tile * TILE + offs // 4 < kv_len, -1, 0)
        mbarrier.wait(kv.full, iteration & 1)
        mbarrier.wait(q_stages.full.index(begin & (STAGES - 1)), (begin // STAGES) & 1)
        k = kv.k_bufs.index(0).reshape([TILE, HEAD_DIM])
        q = q_stages.bufs.index(begin & (STAGES - 1)).reshape([BLOCK_M, HEAD_DIM])
        s = warpgroup_mma(k, q.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        for i in range(group):
            column = next_column
            next_column = _column_at(iteration * group + i + 1, schedule, HAS_MASK)
            end = begin + (column.n_full + column.n_partial) * STEPS
            for pos in range(begin, end):
                if HAS_MASK:
                    w = next_w >> (pos - begin) % STEPS * (BLOCK_M // 4)
                    next_w = _load_words(words, column, (pos + 1 - begin) // STEPS, offs)
                zero = _opaque_zero(pos)
                k = kv.k_bufs.index(zero).reshape([TILE, HEAD_DIM])
                v = kv.v_bufs.index(zero).reshape([TILE, HEAD_DIM])
                if HAS_DQ:
                    ds_buf = pipes.ds_bufs.index(zero)
                stage = pos & (STAGES - 1)
                q = q_stages.bufs.index(stage).reshape([BLOCK_M, HEAD_DIM])
                do = do_stages.bufs.index(stage).reshape([BLOCK_M, HEAD_DIM])
                mbarrier.wait(do_stages.full.index(stage), (pos // STAGES) & 1)
                # dp - delta, by starting the sum at -delta
                dp = zero_s - do_stages.delta_bufs.index(stage).load(COL_LAYOUT).expand_dims(0)
                dp = warpgroup_mma(v, do.permute((1, 0)), dp, is_async=True)
                lse2 = q_stages.lse_bufs.index(stage).load(COL_LAYOUT)
                # [TILE, BLOCK_M]
                p = exp2(s * qk_scale - lse2.expand_dims(0))
                if HAS_MASK or cfg.HAS_TAIL:
                    p = _mask_pairs(p, w, bit)
                dv = warpgroup_mma(gl.convert_layout(p.to(dtype), A_LAYOUT), do, dv, is_async=True)
                dp = warpgroup_mma_wait(1, deps=[dp])
                ds = (p * dp).to(dtype)
                if HAS_DQ:
                    ds_buf.store(ds)
                    fence_async_shared()
                dk = warpgroup_mma(gl.convert_layout(ds, A_LAYOUT), q, dk, is_async=True)
                if HAS_DQ:
                    dq = warpgroup_mma(ds_buf.permute((1, 0)), k, zero_dq, use_acc=False, is_async=True)
                # with dv done, the registers of p are free for the scores of the next step, which run while dq is moved
                dv = warpgroup_mma_wait(1 + HAS_DQ, deps=[dv])
                following = (pos + 1) & (STAGES - 1)
                mbarrier.wait(q_stages.full.index(following), ((pos + 1) // STAGES) & 1)
                q = q_stages.bufs.index(following).reshape([BLOCK_M, HEAD_DIM])
                s = warpgroup_mma(k, q.permute((1, 0)), zero_s, use_acc=False, is_async=True)
                dk = warpgroup_mma_wait(1 + HAS_DQ, deps=[dk])
                mbarrier.arrive(empty.index(stage))
                if HAS_DQ:
                    dq = warpgroup_mma_wait(1, deps=[dq])
                    mbarrier.wait(pipes.dq.empty, ((pos - iteration) & 1) ^ 1)
                    _store_dq(pipes.dq.buf, dq)
                    fence_async_shared()
                    mbarrier.arrive(pipes.dq.full)
                # docs/kernels.md, finding 3
                s = warpgroup_mma_wait(0, deps=[s])
            begin = end
            if HAS_MASK:
                next_w = _load_words(words, next_column, 0, offs)
        # the stage of the step too many
        mbarrier.arrive(empty.index(begin & (STAGES - 1)))
        begin += 1
        mbarrier.arrive(kv.empty)
        # through a buffer of their own: the next k and v are on their way
        tma.store_wait(0)
        pipes.out_buf.reshape([TILE, HEAD_DIM]).store((dk * sm_scale).to(dtype))
        fence_async_shared()
        tma_store(dk_desc, [sample, head // group, tile * TILE, 0], pipes.out_buf)
        tma.store_wait(0)
        pipes.out_buf.reshape([TILE, HEAD_DIM]).store(dv.to(dtype))
        fence_async_shared()
        tma_store(dv_desc, [sample, head // group, tile * TILE, 0], pipes.out_buf)
    tma.store_wait(0)


@gluon.jit
def _store_dq(buf, dq):
    """Write `dq [BLOCK_M, HEAD_DIM]` so that a thread writes 16 bytes at once and eight threads 128 in a row.

    Column `8 * (2 * a + b) + 2 * t + p` of row `r` becomes float `4 * t + 2 * b + p` of the 16 of `(a, r)`, in blocks
    of 64 rows. `_dq_kernel` reads this order.
    """
    x = dq.reshape([dq.shape[0] // 64, 64, dq.shape[1] // 16, 2, 4, 2]).permute((0, 2, 1, 4, 3, 5))
    buf.store(x.reshape([dq.shape[0] * dq.shape[1] // 32, 32]))


@gluon.jit
def _allocate(q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dk_desc, cfg: gl.constexpr):
    """Shared memory of all variants: k, v, q and do, their empty barriers, the buffer of dk and dv, dq's barriers."""
    STAGES: gl.constexpr = cfg.STAGES
    dtype: gl.constexpr = q_desc.dtype
    k_bufs = gl.allocate_shared_memory(dtype, [1] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [1] + v_desc.block_type.shape, v_desc.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, cfg.BLOCK_M], lse_desc.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, cfg.BLOCK_M], delta_desc.layout)
    q_full, do_full = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, 1)
    out_buf = gl.allocate_shared_memory(dtype, dk_desc.block_type.shape, dk_desc.layout)
    single = allocate_barriers(4, 1)
    kv = KVBuffers(k_bufs, v_bufs, single.index(0), single.index(3))
    q, do = QStages(q_bufs, lse_bufs, q_full), DOStages(do_bufs, delta_bufs, do_full)
    return kv, q, do, empty, out_buf, single.index(1), single.index(2)


@gluon.jit(
    do_not_specialize=[
        "sample_planes",
        "head_planes",
        "q_tiles",
        "kv_heads",
        "kv_len",
        "n_work_tiles",
        "swizzle_heads",
    ],
    do_not_specialize_on_alignment=["full_offsets", "full_tiles", "partial_offsets", "partial_tiles", "words", "order"],
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
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_TAIL: gl.constexpr,
):
    """Writes `dk`, `dv` of 128 keys of one kv head, summed over its group of query heads, and adds to `dq`.

    Grid: (programs), between 1 and `n_work_tiles = batch * kv_heads * kv tiles`. `sample_planes`, `head_planes`: planes
    from one sample or query head to the next. Without a `dq_desc` there is no dq.
    """
    kv_tiles = (kv_len + TILE - 1) // TILE
    cfg: gl.constexpr = BackwardConfig(HEAD_DIM, BLOCK_M, STAGES, words is not None, HAS_TAIL, dq_desc is not None)
    kv, q, do, empty, out_buf, dq_full, dq_empty = _allocate(
        q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dk_desc, cfg
    )
    ds_bufs, dq = None, None
    if cfg.HAS_DQ:
        DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, BLOCK_M], q_desc.dtype)
        ds_bufs = gl.allocate_shared_memory(q_desc.dtype, [1, TILE, BLOCK_M], DS_LAYOUT)
        dq_buf = gl.allocate_shared_memory(gl.float32, dq_desc.block_type.shape, dq_desc.layout)
        dq = DQBuffer(dq_buf, dq_full, dq_empty)
    pipes = BackwardPipelines(kv, q, do, empty, ds_bufs, dq, out_buf)
    lists = MaskLists(full_offsets, full_tiles, partial_offsets, partial_tiles, words, order)
    sizes = BackwardSizes(q_tiles, kv_tiles, kv_heads, group)
    worker = Worker(gl.program_id(0), gl.num_programs(0))
    strides = PlaneStrides(sample_planes, head_planes)
    schedule = BackwardSchedule(lists, strides, sizes, n_work_tiles, swizzle_heads, worker)
    # argument lists are written inline (docs/kernels.md, finding 8)
    gl.warp_specialize(
        [
            (_consume, (dk_desc, dv_desc, pipes, schedule, kv_len, sm_scale, qk_scale, cfg)),
            (_produce, (q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, pipes, schedule, cfg)),
            (_reduce_dq, (dq_desc, pipes.dq, schedule, cfg)),
        ],
        [1, 1],
        [24, 24],
    )


@triton.jit(do_not_specialize=["sample_step", "head_step", "query_step", "q_heads", "q_len"])
def _dq_kernel(
    dq_acc,
    dq_ptr,
    sample_step,
    head_step,
    query_step,
    q_heads,
    q_len,
    sm_scale,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes `dq [batch, q_heads, q_len, DIM]`, scaled, from the fp32 accumulator in the order of `_store_dq`.

    Steps are strides of dq in units of 8 elements, so that stores of 16 bytes are seen to be aligned.
    Grid: (heads of all samples * query tiles * TILE // 64): 64 queries of one head a program.
    """
    parts = (q_len + TILE - 1) // TILE * (TILE // 64)
    head = (tl.program_id(0) // parts).to(tl.int64)
    base = tl.program_id(0).to(tl.int64) * (64 * HEAD_DIM)
    # (a, row, t, b, p), as it lies in memory
    dq = tl.load(dq_acc + base + tl.arange(0, 64 * HEAD_DIM)).reshape(HEAD_DIM // 16, 64, 4, 2, 2)
    dq = dq.permute(1, 0, 3, 2, 4).reshape(64, HEAD_DIM)
    rows = tl.program_id(0) % parts * 64 + tl.arange(0, 64)[:, None]
    c = tl.arange(0, HEAD_DIM)[None, :]
    plane = head // q_heads * sample_step + head % q_heads * head_step
    out = dq_ptr + (plane + rows.to(tl.int64) * query_step) * 8 + c
    tl.store(out, (dq * sm_scale).to(dq_ptr.dtype.element_ty), mask=(rows < q_len) & (c < DIM))
