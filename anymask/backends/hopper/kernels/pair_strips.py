"""The walk of the sums over pairs: a worker's strips of blocks, their sharers, and what a mask says of them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.backends.gpu.kernels.bias import FULL
from anymask.backends.hopper.kernels.pair_records import Sharer, Strip
from anymask.backends.hopper.kernels.scheduler import work_index


@gluon.jit
def strip_at(iteration, schedule):
    """The strip of a worker's iteration. The last query tiles come first, which have the most work if causal."""
    sizes = schedule.sizes
    work = work_index(iteration, schedule.worker)
    in_plane = sizes.q_tiles * sizes.strips
    place, plane = work % in_plane, work // in_plane
    strip = place % sizes.strips
    output = plane % (sizes.out_samples * sizes.out_heads)
    part = plane // (sizes.out_samples * sizes.out_heads)
    total, parts = sizes.samples * sizes.heads, sizes.parts
    return Strip(
        plane,
        output // sizes.out_heads,
        output % sizes.out_heads,
        sizes.q_tiles - 1 - place // sizes.strips,
        strip * sizes.kv_tiles // sizes.strips,
        (strip + 1) * sizes.kv_tiles // sizes.strips,
        total * part // parts,
        total * (part + 1) // parts,
    )


@gluon.jit
def sharer_at(strip, i, sizes):
    """The i-th sample and head that share a strip."""
    return Sharer(strip.sample + i // sizes.heads, strip.head + i % sizes.heads)


@gluon.jit
def sharer_after(sharer, strip, sizes):
    """The next one: all heads of a sample, then those of the next sample."""
    wraps = sharer.head + 1 == strip.head + sizes.heads
    return Sharer(sharer.sample + wraps.to(gl.int32), gl.where(wraps, strip.head, sharer.head + 1))


@gluon.jit
def entry_at(strip, kv_tile, sharer, schedule, HAS_MASK: gl.constexpr):
    """What the map of tiles says of a block of a sharer; FULL without a mask."""
    entry = FULL
    if HAS_MASK:
        sizes, strides = schedule.sizes, schedule.plane_strides
        plane = (sharer.sample * strides.sample + sharer.head * strides.head).to(gl.int64)
        entry = gl.load(schedule.tile_map + (plane * sizes.q_tiles + strip.q_tile) * sizes.kv_tiles + kv_tile)
    return entry


@gluon.jit
def entry_after(strip, kv_tile, i, next_sharer, first_sharer, schedule, HAS_MASK: gl.constexpr):
    """`entry_at` of the step after that of the i-th sharer; past the last one of a strip, of one that exists."""
    entry = FULL
    if HAS_MASK:
        is_last = i + 1 == strip.last
        kv_tile = gl.where(is_last, gl.minimum(kv_tile + 1, schedule.sizes.kv_tiles - 1), kv_tile)
        sample = gl.where(is_last, first_sharer.sample, next_sharer.sample)
        head = gl.where(is_last, first_sharer.head, next_sharer.head)
        entry = entry_at(strip, kv_tile, Sharer(sample, head), schedule, HAS_MASK)
    return entry
