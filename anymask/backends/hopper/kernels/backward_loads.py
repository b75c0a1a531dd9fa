"""The producer warp of the Hopper backward kernel: it fills the stages that both consumer warpgroups read."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from anymask.backends.hopper.kernels.compat import tma_load
from anymask.backends.hopper.kernels.pipeline import TILE, arrive, stage_and_phase, sync
from anymask.backends.hopper.kernels.scheduler import column_at, num_work_tiles
from anymask.backends.hopper.kernels.turns import q_tile_at
from anymask.backends.hopper.kernels.unused import has_unused, load_used_kv, used_rows, zero_queries
from anymask.backends.hopper.kernels.words import ROWS

# hardware barriers beside those of backward_dq.py, two each, one a stage, and the warps that meet there
Q_EMPTY, DO_EMPTY = gl.constexpr(7), gl.constexpr(9)
# of the stages of a bias of pairs, the second so many below the first: the numbers that are left
BIAS_EMPTY, BIAS_STEP = gl.constexpr(15), gl.constexpr(10)
CONSUMERS_AND_PRODUCER = gl.constexpr(9)


@gluon.jit
def produce(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_desc,
    delta_desc,
    bias_desc,
    terms,
    has_pair,
    pipes,
    schedule,
    cfg: gl.constexpr,
):
    """The producer warp: loads k and v of every work tile, then q, lse2, do and delta of the steps through it."""
    kv, q, do = pipes.kv, pipes.q, pipes.do
    worker, n_work_tiles = schedule.worker, schedule.n_work_tiles
    q_tiles, kv_heads, group = schedule.sizes.q_tiles, schedule.sizes.kv_heads, schedule.sizes.group
    HAS_MASK: gl.constexpr = cfg.HAS_MASK
    BLOCK_M: gl.constexpr = cfg.BLOCK_M
    STAGES: gl.constexpr = cfg.STAGES
    strides, q_len = schedule.plane_strides, has_pair.q_len
    pos, bias_step = 0, 0
    kv_zeroed, q_zeroed = 0, 0
    next_column = column_at(0, schedule, HAS_MASK)
    q_tile = q_tile_at(next_column, 0, schedule, HAS_MASK, cfg.IN_TURN)
    for iteration in range(num_work_tiles(n_work_tiles, worker)):
        mbarrier.wait(kv.empty, (iteration & 1) ^ 1)
        kv_zeroed = load_used_kv(k_desc, v_desc, has_pair, next_column, kv, schedule, kv_zeroed)
        for i in range(group):
            column = next_column
            next_column = column_at(iteration * group + i + 1, schedule, HAS_MASK)
            sample, head = column.sample, column.head
            row = (sample * kv_heads * group + head) * q_tiles * TILE
            used = used_rows(has_pair.queries, strides, sample, head, q_len)
            for j in range(column.n_full + column.n_partial):
                start = q_tile * TILE
                q_tile = q_tile_at(column, j + 1, schedule, HAS_MASK, cfg.IN_TURN)
                for _ in gl.static_range(TILE // BLOCK_M):
                    stage = pos & (STAGES - 1)
                    at = stage
                    if used is not None:  # noqa: SIM102
                        if j < column.n_partial:
                            at = gl.where(has_unused(used, start, q_len, BLOCK_M), STAGES, stage)
                    _wait_until_empty(Q_EMPTY, pos, STAGES)
                    mbarrier.expect(q.full.index(at), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
                    tma_load(q_desc, [sample, head, start, 0], q.full.index(at), q.bufs.index(stage))
                    tma_load(lse_desc, [row + start], q.full.index(at), q.lse_bufs.index(stage))
                    _wait_until_empty(DO_EMPTY, pos, STAGES)
                    mbarrier.expect(do.full.index(at), do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
                    tma_load(do_desc, [sample, head, start, 0], do.full.index(at), do.bufs.index(stage))
                    tma_load(delta_desc, [row + start], do.full.index(at), do.delta_bufs.index(stage))
                    if used is not None:  # noqa: SIM102
                        if at == STAGES:
                            zero_queries(q, do, stage, used, start, q_len, q_zeroed)
                            q_zeroed += 1
                    if bias_desc is not None:
                        _load_bias(bias_desc, terms.pairs[0], column, start, pipes.bias, bias_step)
                        bias_step += 1
                    start += BLOCK_M
                    pos += 1
            q_tile = q_tile_at(next_column, 0, schedule, HAS_MASK, cfg.IN_TURN)
        if cfg.SCORES_AHEAD:
            # consumers compute the scores of one step too many, from whatever the buffer holds
            stage = pos & (STAGES - 1)
            _wait_until_empty(Q_EMPTY, pos, STAGES)
            _wait_until_empty(DO_EMPTY, pos, STAGES)
            mbarrier.arrive(q.full.index(stage))
            mbarrier.arrive(do.full.index(stage))
            pos += 1
    # no arrival is left behind
    for i in gl.static_range(STAGES):
        _wait_until_empty(Q_EMPTY, pos + i, STAGES)
        _wait_until_empty(DO_EMPTY, pos + i, STAGES)
    if bias_desc is not None:
        for i in gl.static_range(cfg.BIAS_STAGES):
            _wait_until_bias_empty(bias_step + i, cfg.BIAS_STAGES)


@gluon.jit
def give_bias_back(bias, step):
    """A consumer warpgroup has read the bias of pairs of a worker's step, if there is one.

    It is to issue the product with p before: that takes p from registers, so loads of the bias have ended.
    """
    if len(bias) > 0:
        STAGES: gl.constexpr = bias.full.shape[0]
        arrive(BIAS_EMPTY - BIAS_STEP * (step & (STAGES - 1)), CONSUMERS_AND_PRODUCER)


@gluon.jit
def _wait_until_bias_empty(step, STAGES: gl.constexpr):
    """`_wait_until_empty` of the bias of pairs."""
    if step >= STAGES:
        sync(BIAS_EMPTY - BIAS_STEP * (step & (STAGES - 1)), CONSUMERS_AND_PRODUCER)


@gluon.jit
def _load_bias(desc, pairs, column, start, bias, step):
    """Load the bias of the pairs of a step that starts at query `start`, for each warpgroup its keys."""
    STAGES: gl.constexpr = bias.full.shape[0]
    stage, _ = stage_and_phase(step, STAGES)
    _wait_until_bias_empty(step, STAGES)
    full = bias.full.index(stage)
    mbarrier.expect(full, 2 * desc.block_type.nbytes)
    sample, head = column.sample & pairs.batch, column.head & pairs.head
    for g in gl.static_range(2):
        tma_load(desc, [sample, head, start, column.tile * TILE + g * ROWS], full, bias.bufs.index(stage * 2 + g))


@gluon.jit
def _wait_until_empty(barriers, pos, STAGES: gl.constexpr):
    """Wait until both consumers have read the stage of step `pos`, if a step before it has used the stage."""
    if pos >= STAGES:
        sync(barriers + (pos & (STAGES - 1)), CONSUMERS_AND_PRODUCER)
