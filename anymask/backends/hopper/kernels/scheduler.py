"""The tile scheduler: which worker takes which work tile, and what the mask's lists say of it.

The scheduler is static: a worker knows its work tiles from its number. docs/kernels.md, section 6, says why they come
in this order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.backends.hopper.kernels import ptx
from anymask.backends.hopper.kernels.pipeline import TILE
from anymask.backends.hopper.kernels.records import TileRange, WorkTile


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
    return decode_work_tile(work, sizes.q_tiles, sizes.q_heads, schedule.n_work_tiles, schedule.swizzle_heads)


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
