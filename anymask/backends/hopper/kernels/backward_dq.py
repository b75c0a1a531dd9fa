"""dq in the Hopper backward kernel: a product of both consumer warpgroups, and the warp that adds it to memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma

from anymask.backends.hopper.kernels.compat import reinterpret, tma_add
from anymask.backends.hopper.kernels.dq_sum import store_dq
from anymask.backends.hopper.kernels.pipeline import TILE, arrive, sync
from anymask.backends.hopper.kernels.scheduler import column_at, num_work_tiles
from anymask.backends.hopper.kernels.turns import pass_turn, q_tile_at, turn_at, wait_for_turn
from anymask.backends.hopper.kernels.words import ROWS

# Hardware barriers, by number, and the warps that meet there. Triton has 0 to 4: one for all warps, one that wakes
# partitions, and one for each of four partitions less the first.
DS_FULL = gl.constexpr(6)
# two each, one a consumer warpgroup
DQ_EMPTY, DQ_FULL = gl.constexpr(11), gl.constexpr(13)
BOTH_CONSUMERS = gl.constexpr(8)
CONSUMER_AND_STORE = gl.constexpr(5)


@gluon.jit
def issue_dq(ds, ds_buf, k, G: gl.constexpr):
    """Write `ds [ROWS, BLOCK_M]`, wait for the other warpgroup's, and issue half G of `ds^T k`, `[64, 64]`."""
    HALVES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ds_buf.slice(G * ROWS, ROWS, dim=0).store(ds)
    fence_async_shared()
    sync(DS_FULL, BOTH_CONSUMERS)
    # by rows where there are rows enough, else by columns
    if ds.shape[1] == 128:
        ds_buf = ds_buf.slice(G * 64, 64, dim=1)
    else:
        k = k.slice(G * 64, 64, dim=1)
    zero_dq = gl.zeros([64, 64], gl.float32, HALVES)
    return warpgroup_mma(ds_buf.permute((1, 0)), k, zero_dq, use_acc=False, is_async=True)


@gluon.jit
def hand_over_dq(dq, buf, G: gl.constexpr):
    """Put dq of consumer warpgroup G into `buf`, when that is empty, for the dq store warp."""
    sync(DQ_EMPTY + G, CONSUMER_AND_STORE)
    store_dq(buf, dq)
    fence_async_shared()
    arrive(DQ_FULL + G, CONSUMER_AND_STORE)


@gluon.jit
def take_dq_buffer(bufs, out_desc, G: gl.constexpr):
    """The buffer of dq of a warpgroup, when it is empty, for a block of dk or dv. `give_dq_buffer_back` follows."""
    sync(DQ_EMPTY + G, CONSUMER_AND_STORE)
    return reinterpret(bufs.index(G), out_desc.dtype, out_desc.block_type.shape, out_desc.layout)


@gluon.jit
def give_dq_buffer_back(G: gl.constexpr):
    """Once what was stored from it has left, let the dq store warp call the buffer empty."""
    tma.store_wait(0)
    arrive(DQ_FULL + G, CONSUMER_AND_STORE)


@gluon.jit
def reduce_dq(dq_desc, dq_bufs, turns, schedule, cfg: gl.constexpr):
    """The dq store warp: adds both halves of the dq of each step to global memory, if there is a `dq_desc`.

    With `IN_TURN` it waits for its turn at each query tile. With a bias of pairs dk and dv leave through the buffers of
    dq, at the end of each work tile.
    """
    if dq_desc is not None:
        worker, n_work_tiles = schedule.worker, schedule.n_work_tiles
        q_tiles, kv_heads, group = schedule.sizes.q_tiles, schedule.sizes.kv_heads, schedule.sizes.group
        HAS_MASK: gl.constexpr = cfg.HAS_MASK
        HALF: gl.constexpr = cfg.BLOCK_M * cfg.HEAD_DIM // 64
        for g in gl.static_range(2):
            arrive(DQ_EMPTY + g, CONSUMER_AND_STORE)
        next_column = column_at(0, schedule, HAS_MASK)
        for index in range(num_work_tiles(n_work_tiles, worker) * group):
            column = next_column
            next_column = column_at(index + 1, schedule, HAS_MASK)
            sample, head = column.sample, column.head
            head_tile = (sample * kv_heads * group + head) * q_tiles
            for j in range(column.n_full + column.n_partial):
                q_tile = head_tile + q_tile_at(column, j, schedule, HAS_MASK, cfg.IN_TURN)
                row = q_tile * (TILE * cfg.HEAD_DIM // 32)
                if cfg.IN_TURN:
                    wait_for_turn(turns.counters + q_tile, turn_at(turns, column, j, schedule, HAS_MASK))
                for _ in gl.static_range(TILE // cfg.BLOCK_M):
                    for g in gl.static_range(2):
                        sync(DQ_FULL + g, CONSUMER_AND_STORE)
                        tma_add(dq_desc, [row, 0], dq_bufs.index(g))
                        row += HALF
                    for g in gl.static_range(2):
                        tma.store_wait(1 - g)
                        arrive(DQ_EMPTY + g, CONSUMER_AND_STORE)
                if cfg.IN_TURN:
                    pass_turn(turns.counters + q_tile)
            if cfg.BIAS_STAGES > 0:  # noqa: SIM102
                if index % group == group - 1:
                    # what lay there were dk and dv
                    for g in gl.static_range(2):
                        sync(DQ_FULL + g, CONSUMER_AND_STORE)
                        arrive(DQ_EMPTY + g, CONSUMER_AND_STORE)
