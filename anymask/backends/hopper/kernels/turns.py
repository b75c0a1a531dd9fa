"""Turns at the sum of dq: a column adds to a query tile when those before it have, see hopper/turns.py.

As the counter that FlashAttention-2 and 3 have for each query tile (Dao, 2023; Shah et al., 2024).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.backends.hopper.kernels import ptx
from anymask.backends.hopper.kernels.scheduler import list_index, load_q_tile


@gluon.jit
def first_entry(column, schedule, HAS_MASK: gl.constexpr):
    """Where in its lists the walk of a column starts, so that columns of a head are not at one query tile at once."""
    first = column.tile
    if not HAS_MASK:
        first, _ = _rank(column, schedule)
    return first


@gluon.jit
def q_tile_at(column, j, schedule, HAS_MASK: gl.constexpr, IN_TURN: gl.constexpr):
    """The j-th query tile of a column."""
    first = 0
    if IN_TURN:
        first = first_entry(column, schedule, HAS_MASK)
    return load_q_tile(column, schedule.lists, j, HAS_MASK, first, IN_TURN)


@gluon.jit
def _rank(column, schedule):
    """The rank of a column of a call without a mask, and the work index of the first one of its head.

    Heads follow each other then, see `decode_work_tile` for `swizzle_heads` of 1.
    """
    sizes = schedule.sizes
    head = column.sample * sizes.kv_heads + column.head // sizes.group
    tiles = sizes.kv_tiles
    falls = (schedule.n_work_tiles // tiles - head - 1) % 2 == 0
    return gl.where(falls, column.tile, tiles - 1 - column.tile), head * tiles


@gluon.jit
def turn_at(turns, column, j, schedule, HAS_MASK: gl.constexpr):
    """How many columns add to the j-th query tile of a column before it does."""
    if HAS_MASK:
        copy = gl.cast(column.sample, gl.int64) * turns.sample_step + gl.cast(column.head, gl.int64) * turns.head_step
        n_partial = column.n_partial
        if j < n_partial:
            entry = turns.partial + (column.partial_begin + list_index(j, n_partial, column.tile, True))
        else:
            entry = turns.full + (column.full_begin + list_index(j - n_partial, column.n_full, column.tile, True))
        turn = gl.load(entry + copy)
    else:
        turn = turn_without_mask(column, j, schedule)
    return turn


@gluon.jit
def turn_without_mask(column, j, schedule):
    """`turn_at` where all columns have all query tiles: by iteration, then as many ranks as there are query tiles at a
    time, of which each is at another query tile, then by j."""
    q_tiles, kv_tiles, num_workers = schedule.sizes.q_tiles, schedule.sizes.kv_tiles, schedule.worker.num_workers
    rank, head_work = _rank(column, schedule)
    first_rank = (head_work + rank) // num_workers * num_workers - head_work
    group = rank // q_tiles * q_tiles
    begin = gl.maximum(gl.maximum(first_rank, group), 0)
    end = gl.minimum(gl.minimum(first_rank + num_workers, group + q_tiles), kv_tiles)
    # the rank whose walk starts at this query tile, and before it those that have been there already
    starter = group + list_index(j, q_tiles, rank, True)
    passed = gl.minimum(starter, end - 1) - rank
    wrapped = gl.maximum(starter - begin + 1, 0) + end - 1 - rank
    return begin + gl.where(starter >= rank, passed, wrapped)


@gluon.jit
def wait_for_turn(counter, turn):
    """Wait until `turn` columns have added to a query tile. For one warp."""
    address = counter.to(gl.int64, bitcast=True)
    gl.inline_asm_elementwise(ptx.WAIT_FOR_COUNT, "=r,l,r", [address, turn], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(counter):
    """Let the next column add to a query tile, once what this warp has sent the copy engine is in global memory."""
    address = counter.to(gl.int64, bitcast=True)
    gl.inline_asm_elementwise(ptx.COUNT_WHEN_DONE, "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1)
