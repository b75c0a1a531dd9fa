"""The tile scheduler: which worker takes which work tile, and what the mask's lists say of it.

The scheduler is static: a worker knows its work tiles from its number. docs/kernels.md, section 6, says why they come
in this order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.backends.hopper.kernels import ptx
from anymask.backends.hopper.kernels.pipeline import TILE
from anymask.backends.hopper.kernels.records import Column, TileRange, WorkTile


@gluon.jit
def num_work_tiles(n_work_tiles, worker):
    """How many of all work tiles a worker takes: its iterations."""
    full = n_work_tiles // worker.num_workers
    return full + (work_index(full, worker) < n_work_tiles).to(gl.int32)


@gluon.jit
def work_index(iteration, worker):
    """The index of a worker's work tile. Every second wave runs backwards, so that long and short tiles even out."""
    worker_id, num_workers = worker.worker_id, worker.num_workers
    return iteration * num_workers + gl.where(iteration % 2 == 0, worker_id, num_workers - 1 - worker_id)


@gluon.jit
def decode_work_tile(work, tiles, heads, n_work_tiles, swizzle_heads):
    """Map a work index to a tile, of `tiles` for each of `heads` heads of each sample; its tile is a rank in the order.

    Heads are swizzled `swizzle_heads` at a time, so that their keys and values stay in the L2 cache. Within such a
    block tiles go by rank, rank 0 having the most work, all heads of a rank before the next rank. Blocks alternate
    direction, counted from the last one, which goes from long to short so that the tail is short.
    """
    first_head = work // (swizzle_heads * tiles) * swizzle_heads
    in_block = work - first_head * tiles
    heads_left = n_work_tiles // tiles - first_head
    block_heads = gl.minimum(swizzle_heads, heads_left)
    head = first_head + in_block % block_heads
    rank = in_block // block_heads
    falls = (heads_left - 1) // swizzle_heads % 2 == 0
    return WorkTile(gl.where(falls, rank, tiles - 1 - rank), head % heads, head // heads)


@gluon.jit
def load_tile_range(lists, row, n_tiles, HAS_MASK: gl.constexpr):
    """The tiles that a row of tiles, or a column, meets; without a mask all `n_tiles` are full."""
    full_begin, n_full, partial_begin, n_partial = 0, n_tiles, 0, 0
    if HAS_MASK:
        full_begin = gl.load(lists.full_offsets + row)
        n_full = gl.load(lists.full_offsets + row + 1) - full_begin
        partial_begin = gl.load(lists.partial_offsets + row)
        n_partial = gl.load(lists.partial_offsets + row + 1) - partial_begin
    return TileRange(partial_begin, n_partial, full_begin, n_full)


@gluon.jit
def work_tile_at(iteration, worker, schedule):
    """The work tile, by rank, of a worker's iteration; past its last one, one that exists."""
    work = gl.minimum(work_index(iteration, worker), schedule.n_work_tiles - 1)
    sizes = schedule.sizes
    tile = decode_work_tile(work, sizes.q_tiles, sizes.q_heads, schedule.n_work_tiles, schedule.swizzle_heads)
    if len(schedule.samples) == 1:
        tile = samples_together(tile, sizes.q_heads, schedule.samples[0])
    return tile


@gluon.jit
def samples_together(tile, heads, samples):
    """The work tile in the place of `tile` where all samples of a head come before the next head."""
    plane = tile.sample * heads + tile.head
    return WorkTile(tile.tile, plane // samples, plane % samples)


@gluon.jit
def prefetch_tile_range(tile, next_tile, schedule, HAS_MASK: gl.constexpr):
    """Load what the lists say of work tile `tile`, and which query tile has the rank of `next_tile`.

    Each lane of a warp loads one word, for `read_tile_range` to hand out (docs/kernels.md, finding 7).
    """
    pending = 0
    if HAS_MASK:
        lists, strides, q_tiles = schedule.lists, schedule.plane_strides, schedule.sizes.q_tiles
        row = (tile.sample * strides.sample + tile.head * strides.head) * q_tiles + tile.tile
        entry = (next_tile.sample * strides.sample + next_tile.head * strides.head) * q_tiles + next_tile.tile
        lane = gl.inline_asm_elementwise(ptx.LANE_ID, "=r,r", [row], dtype=gl.int32, is_pure=True, pack=1)
        bound = gl.where(lane < 2, lists.partial_offsets, lists.full_offsets) + (row + (lane & 1))
        pending = gl.load(gl.where(lane < 4, bound, lists.order + entry))
    return pending


@gluon.jit
def read_tile_range(pending, next_tile, schedule, HAS_MASK: gl.constexpr):
    """The range and the work tile that `prefetch_tile_range` loads; without a mask all tiles count as full."""
    tile = next_tile.tile
    partial_begin, n_partial, full_begin, n_full = 0, 0, 0, (schedule.sizes.kv_len + TILE - 1) // TILE
    if HAS_MASK:
        partial_begin = _from_lane(pending, 0)
        n_partial = _from_lane(pending, 1) - partial_begin
        full_begin = _from_lane(pending, 2)
        n_full = _from_lane(pending, 3) - full_begin
        tile = _from_lane(pending, 4)
    return TileRange(partial_begin, n_partial, full_begin, n_full), WorkTile(tile, next_tile.head, next_tile.sample)


@gluon.jit
def load_kv_tile(t, lists, tile_range, HAS_MASK: gl.constexpr):
    """The `t`-th kv tile of a work tile, partial ones first; 0 past the end."""
    n_partial, n_full = tile_range.n_partial, tile_range.n_full
    if HAS_MASK:
        if t < n_partial:
            entry = lists.partial_tiles + (tile_range.partial_begin + t)
        else:
            entry = lists.full_tiles + (tile_range.full_begin + t - n_partial)
        tile = gl.load(entry, mask=t < n_partial + n_full, other=0)
    else:
        # the last tile first: it alone can end early
        tile = gl.where(t == 0, n_full, t) - 1
    return tile


@gluon.jit
def _from_lane(x, LANE: gl.constexpr):
    return gl.inline_asm_elementwise(ptx.shuffle(LANE), "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def first_two_tiles(worker, schedule, HAS_MASK: gl.constexpr):
    """The range and the work tile of a worker's first iteration, and the work tile of its second."""
    tile = work_tile_at(0, worker, schedule)
    pending = prefetch_tile_range(tile, tile, schedule, HAS_MASK)
    _, tile = read_tile_range(pending, tile, schedule, HAS_MASK)
    next_tile = work_tile_at(1, worker, schedule)
    pending = prefetch_tile_range(tile, next_tile, schedule, HAS_MASK)
    tile_range, next_tile = read_tile_range(pending, next_tile, schedule, HAS_MASK)
    return tile_range, tile, next_tile


@gluon.jit
def column_at(index, schedule, HAS_MASK: gl.constexpr):
    """The worker's column at `index`: one for each query head of the group of a work tile, then the next work tile's.

    It is read while the column before it is at work, as that takes two indirections.
    """
    lists, strides, sizes = schedule.lists, schedule.plane_strides, schedule.sizes
    group, kv_tiles, n_work_tiles = sizes.group, sizes.kv_tiles, schedule.n_work_tiles
    work = gl.minimum(work_index(index // group, schedule.worker), n_work_tiles - 1)
    work_tile = decode_work_tile(work, kv_tiles, sizes.kv_heads, n_work_tiles, schedule.swizzle_heads)
    if len(schedule.samples) == 1:
        work_tile = samples_together(work_tile, sizes.kv_heads, schedule.samples[0])
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
def load_q_tile(column, lists, j, HAS_MASK: gl.constexpr, first=0, TURNED: gl.constexpr = False):
    """The j-th query tile of a column, partial ones first; 0 past the end. `first`: see `list_index`."""
    n_partial, n_full = column.n_partial, column.n_full
    if HAS_MASK:
        if j < n_partial:
            entry = lists.partial_tiles + (column.partial_begin + list_index(j, n_partial, first, TURNED))
        else:
            entry = lists.full_tiles + (column.full_begin + list_index(j - n_partial, n_full, first, TURNED))
        tile = gl.load(entry, mask=j < n_partial + n_full, other=0)
    else:
        tile = list_index(j, n_full, first, TURNED)
    return tile


@gluon.jit
def list_index(j, n, first, TURNED: gl.constexpr):
    """Where in a list of `n` its j-th tile is; with `TURNED` a walk starts at the entry `first`, and goes round."""
    if TURNED:
        j += first % gl.maximum(n, 1)
        j = gl.where(j >= n, j - n, j)
    return j
