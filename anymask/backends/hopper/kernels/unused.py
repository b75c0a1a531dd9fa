"""Rows that no pair needs, zeroed where the copy engine has put them: 0 times a NaN there would reach a sum.

Only partial tiles have such rows, and few masks have any. A producer sends a tile that has some to a barrier of its
own, waits for it, writes the zeros, and then tells the consumers, who know nothing of it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from anymask.backends.hopper.kernels.compat import reinterpret, tma_load
from anymask.backends.hopper.kernels.pipeline import TILE

# a producer has few registers: rows that are read and written at a time
CHUNK = gl.constexpr(8)


@gluon.jit
def used_rows(has_pair, strides, sample, head, length):
    """The part of `has_pair`, of all planes, that belongs to a head; None without."""
    used = has_pair
    if has_pair is not None:
        used = has_pair + (sample * strides.sample + head * strides.head).to(gl.int64) * length
    return used


@gluon.jit
def has_unused(has_pair, row, length, ROWS: gl.constexpr):
    """Whether one of rows `row .. row + ROWS` that exist has no pair; `has_pair`: int8 `[length]`. For one warp."""
    offs = row + gl.arange(0, ROWS, layout=gl.BlockedLayout([ROWS // 32], [32], [1], [0]))
    return gl.min(gl.load(has_pair + offs, mask=offs < length, other=1).to(gl.int32), 0) == 0


@gluon.jit
def zero_unused(buf, has_pair, row, length):
    """Zero the rows of `buf [1, 1, ROWS, D]`, rows `row ..` of a tensor, that have no pair. For one warp."""
    ROWS: gl.constexpr = buf.shape[2]
    # the copy engine lays out 64 columns of all rows, then the next 64
    COLUMNS: gl.constexpr = 64 if buf.shape[3] > 64 else buf.shape[3]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [1, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, COLUMNS], buf.dtype)
    CHUNKS: gl.constexpr = ROWS * buf.shape[3] // (CHUNK * COLUMNS)
    chunks = reinterpret(buf, buf.dtype, [CHUNKS, CHUNK, COLUMNS], SHARED)
    for i in range(CHUNKS):
        offs = row + i * CHUNK % ROWS + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, LAYOUT))
        used = gl.load(has_pair + offs, mask=offs < length, other=1)
        chunk = chunks.index(i)
        tile = chunk.load(LAYOUT)
        chunk.store(gl.where(used.expand_dims(1) != 0, tile, gl.zeros_like(tile)))
    fence_async_shared()


@gluon.jit
def load_used_kv(k_desc, v_desc, has_pair, column, kv, schedule, n_zeroed):
    """Load the keys and values of a column, and zero those that no query attends to.

    `n_zeroed`: how many of the worker's work tiles had some.
    """
    kv_len = has_pair.kv_len
    sample, kv_head, row = column.sample, column.head // schedule.sizes.group, column.tile * TILE
    k_buf, v_buf = kv.k_bufs.index(0), kv.v_bufs.index(0)
    # query heads of a group that have masks of their own leave no such keys (hopper.why_not)
    used = used_rows(has_pair.keys, schedule.plane_strides, sample, column.head, kv_len)
    at = 0
    if used is not None:  # noqa: SIM102
        if column.n_partial > 0:
            at = has_unused(used, row, kv_len, TILE).to(gl.int32)
    mbarrier.expect(kv.landed.index(at), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma_load(k_desc, [sample, kv_head, row, 0], kv.landed.index(at), k_buf)
    tma_load(v_desc, [sample, kv_head, row, 0], kv.landed.index(at), v_buf)
    if used is not None:  # noqa: SIM102
        if at == 1:
            mbarrier.wait(kv.landed.index(1), n_zeroed & 1)
            zero_unused(k_buf, used, row, kv_len)
            zero_unused(v_buf, used, row, kv_len)
            mbarrier.arrive(kv.full)
            n_zeroed += 1
    return n_zeroed


@gluon.jit
def zero_queries(q, do, stage, used, row, q_len, n_zeroed):
    """Zero rows of q and do of queries without a key, once they have landed, and call the stage full."""
    STAGES: gl.constexpr = q.bufs.shape[0]
    mbarrier.wait(q.full.index(STAGES), n_zeroed & 1)
    zero_unused(q.bufs.index(stage), used, row, q_len)
    mbarrier.arrive(q.full.index(stage))
    mbarrier.wait(do.full.index(STAGES), n_zeroed & 1)
    zero_unused(do.bufs.index(stage), used, row, q_len)
    mbarrier.arrive(do.full.index(stage))
