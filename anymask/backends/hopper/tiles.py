"""What both kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# queries and keys of a tile
TILE = gl.constexpr(128)


@gluon.jit
def exp2(x):
    """2**x in one instruction; denormals are 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def barriers(depth: gl.constexpr, arrivals: gl.constexpr):
    """`depth` barriers in shared memory, each complete after `arrivals` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [depth, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(depth):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def runs(lists, line, n_tiles, MASKED: gl.constexpr):
    """Where a line's full and partial tiles begin and how many there are; without a mask all `n_tiles` are full."""
    full_begin, n_full, partial_begin, n_partial = 0, n_tiles, 0, 0
    if MASKED:
        full_begin = gl.load(lists[0] + line)
        n_full = gl.load(lists[0] + line + 1) - full_begin
        partial_begin = gl.load(lists[2] + line)
        n_partial = gl.load(lists[2] + line + 1) - partial_begin
    return full_begin, n_full, partial_begin, n_partial


@gluon.jit
def rounds(n_items, seat):
    """How many items the holder of `seat`, (place, number of places), takes."""
    full = n_items // seat[1]
    return full + (item_of(full, seat) < n_items).to(gl.int32)


@gluon.jit
def place_of(item, tiles, heads, n_items, section):
    """(rank of the line in its head, head, sample) of an item, of `tiles` lines for each of `heads` of each sample.

    The heads of all samples come in sections of `section`: few, for their keys and values are in the L2 cache together.
    Within one, lines come by rank and then by head, so that work falls over all its items; in every second it rises.
    """
    number = item // (section * tiles)
    first = number * section
    there = item - first * tiles
    size = gl.minimum(section, n_items // tiles - first)
    head = first + there % size
    rank = there // size
    return gl.where(number % 2 == 0, rank, tiles - 1 - rank), head % heads, head // heads


@gluon.jit
def item_of(round_, seat):
    """The item that it takes in a round: forth and back, so that long and short lines even out."""
    place, places = seat
    return round_ * places + gl.where(round_ % 2 == 0, place, places - 1 - place)
