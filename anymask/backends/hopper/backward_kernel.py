"""The backward kernel: a program computes dk and dv of 128 keys after another, and adds their share to dq.

Two warpgroups hold 64 keys each, with dk and dv in registers, and compute on transposed scores. `ds^T` of both meets in
shared memory, from where each group multiplies its half of dq; one warp fills the rings of q and do, another adds dq to
an fp32 accumulator in global memory. docs/kernels.md has the equations and draws who waits for whom.
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

from anymask.backends.hopper.compat import tma_add, tma_load, tma_store
from anymask.backends.hopper.items import item_of, place_of, rounds, runs
from anymask.backends.hopper.tiles import TILE, barriers, exp2


@gluon.jit
def _line(index, work, MASKED: gl.constexpr):
    """(sample, query head, kv tile, (first full entry, full tiles, first partial entry, partial tiles)) of a line.

    A program takes the lines of an item, one for each query head of the group, and then those of its next item; the
    line at `index` among all of them is read while the one before it is at work, as it is two indirections.
    """
    lists, plane_strides, sizes, n_items, section, seat = work
    q_tiles, kv_tiles, kv_heads, group = sizes
    item = gl.minimum(item_of(index // group, seat), n_items - 1)
    tile, kv_head, sample = place_of(item, kv_tiles, kv_heads, n_items, section)
    first_head = kv_head * group
    head = first_head + index % group
    plane = sample * plane_strides[0] + head * plane_strides[1]
    if MASKED:
        # heads of a group may have planes of their own: any order is right, the first head's is as good as another
        first_plane = sample * plane_strides[0] + first_head * plane_strides[1]
        tile = gl.load(lists[4] + first_plane * kv_tiles + tile)
    return sample, head, tile, runs(lists, plane * kv_tiles + tile, q_tiles, MASKED)


@gluon.jit
def _listed(line, lists, j, MASKED: gl.constexpr):
    """The j-th query tile of a line, partial ones first; 0 past the end."""
    full_begin, n_full, partial_begin, n_partial = line[3]
    tile = j
    if MASKED:
        entry = lists[3] + (partial_begin + j) if j < n_partial else lists[1] + (full_begin + j - n_partial)
        tile = gl.load(entry, mask=j < n_partial + n_full, other=0)
    return tile


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_desc,
    delta_desc,
    kv_ring,
    q_ring,
    do_ring,
    free,
    work,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Loads k and v of every item, and keeps the rings of q, lse2 and of do, delta filled as `_consume` reads them."""
    k_bufs, v_bufs, kv_ready, kv_empty = kv_ring
    q_bufs, lse_bufs, q_ready = q_ring
    do_bufs, delta_bufs, do_ready = do_ring
    lists, _strides, sizes, n_items, _section, seat = work
    q_tiles, _kv_tiles, kv_heads, group = sizes
    pos = 0
    line = _line(0, work, MASKED)
    q_tile = _listed(line, lists, 0, MASKED)
    for round_ in range(rounds(n_items, seat)):
        sample, head, tile = line[0], line[1], line[2]
        mbarrier.wait(kv_empty, (round_ & 1) ^ 1)
        mbarrier.expect(kv_ready, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma_load(k_desc, [sample, head // group, tile * TILE, 0], kv_ready, k_bufs.index(0))
        tma_load(v_desc, [sample, head // group, tile * TILE, 0], kv_ready, v_bufs.index(0))
        for i in range(group):
            this = line
            line = _line(round_ * group + i + 1, work, MASKED)
            sample, head = this[0], this[1]
            row = (sample * kv_heads * group + head) * q_tiles * TILE
            for j in range(this[3][1] + this[3][3]):
                start = q_tile * TILE
                q_tile = _listed(this, lists, j + 1, MASKED)
                for _ in gl.static_range(TILE // BLOCK_M):
                    stage = pos & (STAGES - 1)
                    mbarrier.wait(free.index(stage), ((pos // STAGES) & 1) ^ 1)
                    mbarrier.expect(q_ready.index(stage), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
                    tma_load(q_desc, [sample, head, start, 0], q_ready.index(stage), q_bufs.index(stage))
                    tma_load(lse_desc, [row + start], q_ready.index(stage), lse_bufs.index(stage))
                    mbarrier.expect(do_ready.index(stage), do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
                    tma_load(do_desc, [sample, head, start, 0], do_ready.index(stage), do_bufs.index(stage))
                    tma_load(delta_desc, [row + start], do_ready.index(stage), delta_bufs.index(stage))
                    start += BLOCK_M
                    pos += 1
            q_tile = _listed(line, lists, 0, MASKED)
        # consumers compute the scores of one step too many, from whatever the buffer holds
        stage = pos & (STAGES - 1)
        mbarrier.wait(free.index(stage), ((pos // STAGES) & 1) ^ 1)
        mbarrier.arrive(q_ready.index(stage))
        mbarrier.arrive(do_ready.index(stage))
        pos += 1


@gluon.jit
def _add_dq(
    dq_desc,
    dq_ring,
    work,
    BLOCK_M: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Adds the dq of each step to global memory, if there is a `dq_desc`."""
    if dq_desc is not None:
        dq_buf, dq_full, dq_empty = dq_ring
        lists, _strides, sizes, n_items, _section, seat = work
        q_tiles, _kv_tiles, kv_heads, group = sizes
        pos = 0
        line = _line(0, work, MASKED)
        for index in range(rounds(n_items, seat) * group):
            this = line
            line = _line(index + 1, work, MASKED)
            sample, head = this[0], this[1]
            head_tile = (sample * kv_heads * group + head) * q_tiles
            for j in range(this[3][1] + this[3][3]):
                row = (head_tile + _listed(this, lists, j, MASKED)) * (TILE * HEAD_DIM // 32)
                for _ in gl.static_range(TILE // BLOCK_M):
                    mbarrier.wait(dq_full, pos & 1)
                    tma_add(dq_desc, [row, 0], dq_buf)
                    tma.store_wait(0)
                    mbarrier.arrive(dq_empty)
                    row += BLOCK_M * HEAD_DIM // 32
                    pos += 1


@gluon.jit
def _words(words, line, j, place):
    """int32 `[TILE, 4]`: words of the j-th tile of a line, all ones where none is stored. `place`: see `_consume`."""
    _, _, partial_begin, n_partial = line[3]
    entry = (partial_begin + j).to(gl.int64)
    return gl.load(words + entry * (TILE * 4) + place, mask=place * 0 + j < n_partial, other=-1)


@gluon.jit
def _consume(
    dk_desc,
    dv_desc,
    kv_ring,
    q_ring,
    do_ring,
    free,
    ds_bufs,
    dq_ring,
    out_buf,
    work,
    words,
    kv_len,
    sm_scale,
    qk_scale,
    BLOCK_M: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    HAS_TAIL: gl.constexpr,
    WITH_DQ: gl.constexpr,
):
    """dk and dv of each tile's keys, and their share of every dq: equations (5) to (9), transposed."""
    k_bufs, v_bufs, kv_ready, kv_empty = kv_ring
    q_bufs, lse_bufs, q_ready = q_ring
    do_bufs, delta_bufs, do_ready = do_ring
    if WITH_DQ:
        dq_buf, dq_full, dq_empty = dq_ring
    group, n_items, seat = work[2][3], work[3], work[5]
    STEPS: gl.constexpr = TILE // BLOCK_M
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    KV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEAD_DIM, 16])
    # the groups share dq by rows where there are rows enough, else by columns
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_M // 16, STEPS], [16, 64, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, KV_LAYOUT, 2)
    COL_LAYOUT: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    S4_LAYOUT: gl.constexpr = (
        gl.zeros([TILE, BLOCK_M], gl.float32, S_LAYOUT).reshape([TILE, BLOCK_M // 8, 4, 2]).type.layout
    )
    W_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, S4_LAYOUT))
    PAIR_LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, S4_LAYOUT)))
    BIT_LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, S4_LAYOUT)))
    dtype: gl.constexpr = dk_desc.dtype
    zero_s = gl.zeros([TILE, BLOCK_M], gl.float32, S_LAYOUT)
    zero_dq = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, DQ_LAYOUT)
    # [TILE, 4]: row and quad of this thread's words; [1, BLOCK_M // 8, 1, 2]: the bit of a word that is a column
    rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, W_LAYOUT)).expand_dims(1)
    place = rows * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, W_LAYOUT)).expand_dims(0)
    bit = 2 * gl.arange(0, BLOCK_M // 8, layout=PAIR_LAYOUT).expand_dims(0).expand_dims(2).expand_dims(3)
    bit += gl.arange(0, 2, layout=BIT_LAYOUT).expand_dims(0).expand_dims(1).expand_dims(2)
    begin = 0
    line = _line(0, work, MASKED)
    if MASKED:
        next_w = _words(words, line, 0, place)
    for round_ in range(rounds(n_items, seat)):
        sample, head, tile = line[0], line[1], line[2]
        dk = gl.zeros([TILE, HEAD_DIM], gl.float32, KV_LAYOUT)
        dv = gl.zeros([TILE, HEAD_DIM], gl.float32, KV_LAYOUT)
        # without a mask the same words in every tile hide the keys beyond kv_len
        w = gl.where(tile * TILE + place // 4 < kv_len, -1, 0)
        mbarrier.wait(kv_ready, round_ & 1)
        mbarrier.wait(q_ready.index(begin & (STAGES - 1)), (begin // STAGES) & 1)
        k = k_bufs.index(0).reshape([TILE, HEAD_DIM])
        q = q_bufs.index(begin & (STAGES - 1)).reshape([BLOCK_M, HEAD_DIM])
        s = warpgroup_mma(k, q.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        for i in range(group):
            this = line
            line = _line(round_ * group + i + 1, work, MASKED)
            end = begin + (this[3][1] + this[3][3]) * STEPS
            for pos in range(begin, end):
                if MASKED:
                    w = next_w >> (pos - begin) % STEPS * (BLOCK_M // 4)
                    next_w = _words(words, this, (pos + 1 - begin) // STEPS, place)
                # always 0 and not known to be: addresses that never change would be computed early and spilled
                zero = pos >> 30
                k = k_bufs.index(zero).reshape([TILE, HEAD_DIM])
                v = v_bufs.index(zero).reshape([TILE, HEAD_DIM])
                if WITH_DQ:
                    ds_buf = ds_bufs.index(zero)
                stage = pos & (STAGES - 1)
                q = q_bufs.index(stage).reshape([BLOCK_M, HEAD_DIM])
                do = do_bufs.index(stage).reshape([BLOCK_M, HEAD_DIM])
                mbarrier.wait(do_ready.index(stage), (pos // STAGES) & 1)
                # dp - delta, by starting the sum at -delta
                dp = zero_s - delta_bufs.index(stage).load(COL_LAYOUT).expand_dims(0)
                dp = warpgroup_mma(v, do.permute((1, 0)), dp, is_async=True)
                lse2 = lse_bufs.index(stage).load(COL_LAYOUT)
                # [TILE, BLOCK_M]
                p = exp2(s * qk_scale - lse2.expand_dims(0))
                if MASKED or HAS_TAIL:
                    p4 = p.reshape([TILE, BLOCK_M // 8, 4, 2])
                    p4 = gl.where(((w.expand_dims(1).expand_dims(3) >> bit) & 1) != 0, p4, 0.0)
                    p = gl.convert_layout(p4.reshape([TILE, BLOCK_M]), S_LAYOUT, assert_trivial=True)
                dv = warpgroup_mma(gl.convert_layout(p.to(dtype), A_LAYOUT), do, dv, is_async=True)
                dp = warpgroup_mma_wait(1, deps=[dp])
                ds = (p * dp).to(dtype)
                if WITH_DQ:
                    ds_buf.store(ds)
                    fence_async_shared()
                dk = warpgroup_mma(gl.convert_layout(ds, A_LAYOUT), q, dk, is_async=True)
                if WITH_DQ:
                    dq = warpgroup_mma(ds_buf.permute((1, 0)), k, zero_dq, use_acc=False, is_async=True)
                # with dv done, the registers of p are free for the scores of the next step, which run while dq is moved
                dv = warpgroup_mma_wait(1 + WITH_DQ, deps=[dv])
                following = (pos + 1) & (STAGES - 1)
                mbarrier.wait(q_ready.index(following), ((pos + 1) // STAGES) & 1)
                q = q_bufs.index(following).reshape([BLOCK_M, HEAD_DIM])
                s = warpgroup_mma(k, q.permute((1, 0)), zero_s, use_acc=False, is_async=True)
                dk = warpgroup_mma_wait(1 + WITH_DQ, deps=[dk])
                mbarrier.arrive(free.index(stage))
                if WITH_DQ:
                    dq = warpgroup_mma_wait(1, deps=[dq])
                    mbarrier.wait(dq_empty, ((pos - round_) & 1) ^ 1)
                    _store_dq(dq_buf, dq)
                    fence_async_shared()
                    mbarrier.arrive(dq_full)
                # a product in flight cannot cross the end of a loop: ptxas would serialise all of them
                s = warpgroup_mma_wait(0, deps=[s])
            begin = end
            if MASKED:
                next_w = _words(words, line, 0, place)
        # the slot of the step too many
        mbarrier.arrive(free.index(begin & (STAGES - 1)))
        begin += 1
        mbarrier.arrive(kv_empty)
        # through a buffer of their own: the next k and v are on their way
        tma.store_wait(0)
        out_buf.reshape([TILE, HEAD_DIM]).store((dk * sm_scale).to(dtype))
        fence_async_shared()
        tma_store(dk_desc, [sample, head // group, tile * TILE, 0], out_buf)
        tma.store_wait(0)
        out_buf.reshape([TILE, HEAD_DIM]).store(dv.to(dtype))
        fence_async_shared()
        tma_store(dv_desc, [sample, head // group, tile * TILE, 0], out_buf)
    tma.store_wait(0)


@gluon.jit
def _store_dq(buf, dq):
    """Write `dq [BLOCK_M, HEAD_DIM]` so that a thread writes 16 bytes at once and eight threads 128 in a row.

    Column `8 * (2 * a + b) + 2 * t + p` of row `r` becomes float `4 * t + 2 * b + p` of the 16 of `(a, r)`, in blocks
    of 64 rows. `_dq_kernel` reads this order.
    """
    x = dq.reshape([dq.shape[0] // 64, 64, dq.shape[1] // 16, 2, 4, 2]).permute((0, 2, 1, 4, 3, 5))
    buf.store(x.reshape([dq.shape[0] * dq.shape[1] // 32, 32]))


@gluon.jit(
    do_not_specialize=["sample_planes", "head_planes", "q_tiles", "kv_heads", "kv_len", "n_items", "section"],
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
    n_items,
    section,
    sm_scale,
    qk_scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    HAS_TAIL: gl.constexpr,
):
    """Writes `dk`, `dv` of 128 keys of one kv head, summed over its group of query heads, and adds to `dq`.

    Grid: (programs), between 1 and `n_items = batch * kv_heads * kv tiles`. `sample_planes`, `head_planes`: planes from
    one sample or query head to the next.
    """
    kv_tiles = (kv_len + TILE - 1) // TILE
    dtype: gl.constexpr = q_desc.dtype
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, BLOCK_M], dtype)
    k_bufs = gl.allocate_shared_memory(dtype, [1] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [1] + v_desc.block_type.shape, v_desc.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    q_ready, do_ready, free = barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    out_buf = gl.allocate_shared_memory(dtype, dk_desc.block_type.shape, dk_desc.layout)
    single = barriers(4, 1)
    kv_ring = k_bufs, v_bufs, single.index(0), single.index(3)
    q_ring = q_bufs, lse_bufs, q_ready
    do_ring = do_bufs, delta_bufs, do_ready
    WITH_DQ: gl.constexpr = dq_desc is not None
    if WITH_DQ:
        ds_bufs = gl.allocate_shared_memory(dtype, [1, TILE, BLOCK_M], DS_LAYOUT)
        dq_buf = gl.allocate_shared_memory(gl.float32, dq_desc.block_type.shape, dq_desc.layout)
        dq_ring = dq_buf, single.index(1), single.index(2)
    else:
        ds_bufs, dq_ring = None, None
    lists = full_offsets, full_tiles, partial_offsets, partial_tiles, order
    sizes = q_tiles, kv_tiles, kv_heads, group
    work = lists, (sample_planes, head_planes), sizes, n_items, section, (gl.program_id(0), gl.num_programs(0))
    # argument lists are written inline: through a variable constexprs would become tensors
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                dk_desc, dv_desc, kv_ring, q_ring, do_ring, free, ds_bufs, dq_ring, out_buf, work, words, kv_len,
                sm_scale, qk_scale, BLOCK_M, HEAD_DIM, STAGES, MASKED, HAS_TAIL, WITH_DQ,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, kv_ring, q_ring, do_ring, free, work,
                BLOCK_M, STAGES, MASKED,
            )),
            (_add_dq, (dq_desc, dq_ring, work, BLOCK_M, HEAD_DIM, MASKED)),
        ],
        [1, 1],
        [24, 24],
    )
    # fmt: on


@triton.jit(do_not_specialize=["q_len"])
def _dq_kernel(dq_acc, dq_ptr, q_len, sm_scale, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """Writes `dq [heads of all samples, q_len, DIM]`, scaled, from the fp32 accumulator in the order of `_store_dq`.

    Grid: (heads of all samples * query tiles * TILE // 64): 64 queries of one head a program.
    """
    parts = (q_len + TILE - 1) // TILE * (TILE // 64)
    head = (tl.program_id(0) // parts).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * (64 * HEAD_DIM)
    # (a, row, t, b, p), as it lies in memory
    dq = tl.load(dq_acc + place + tl.arange(0, 64 * HEAD_DIM)).reshape(HEAD_DIM // 16, 64, 4, 2, 2)
    dq = dq.permute(1, 0, 3, 2, 4).reshape(64, HEAD_DIM)
    rows = tl.program_id(0) % parts * 64 + tl.arange(0, 64)[:, None]
    c = tl.arange(0, HEAD_DIM)[None, :]
    out = dq_ptr + (head * q_len + rows) * DIM + c
    tl.store(out, (dq * sm_scale).to(dq_ptr.dtype.element_ty), mask=(rows < q_len) & (c < DIM))
