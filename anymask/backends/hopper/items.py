"""Who takes which item, and what the lists say of it.

A kernel's items are its lines: a query tile of a head forward, a kv tile of a kv head backward. A seat, (place, number
of places), takes one in every round.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.backends.hopper.tiles import TILE


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
    In the last it falls: whoever takes an item more than others takes it there.
    """
    first = item // (section * tiles) * section
    there = item - first * tiles
    left = n_items // tiles - first
    size = gl.minimum(section, left)
    head = first + there % size
    rank = there // size
    return gl.where((left - 1) // section % 2 == 0, rank, tiles - 1 - rank), head % heads, head // heads


@gluon.jit
def item_of(round_, seat):
    """The item that it takes in a round: forth and back, so that long and short lines even out."""
    place, places = seat
    return round_ * places + gl.where(round_ % 2 == 0, place, places - 1 - place)


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
def place_at(index, seat, work):
    """(rank of the query tile, head, sample) of an item; `index`: how many the holder of `seat` took before."""
    _, _, sizes, n_items, section = work
    return place_of(gl.minimum(item_of(index, seat), n_items - 1), sizes[0], sizes[1], n_items, section)


@gluon.jit
def ask(place, later, work, MASKED: gl.constexpr):
    """Load what the lists say of the item at `place`, (query tile, head, sample), and the query tile of one at `later`.

    Each lane of a warp loads a word. What all threads load from one address, ptxas moves to uniform registers at once,
    and waits for it there.
    """
    asked = 0
    if MASKED:
        lists, plane_strides, sizes, _, _ = work
        line = (place[2] * plane_strides[0] + place[1] * plane_strides[1]) * sizes[0] + place[0]
        entry = (later[2] * plane_strides[0] + later[1] * plane_strides[1]) * sizes[0] + later[0]
        lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [line], dtype=gl.int32, is_pure=True, pack=1)
        bound = gl.where(lane < 2, lists[2], lists[0]) + (line + (lane & 1))
        asked = gl.load(gl.where(lane < 4, bound, lists[5] + entry))
    return asked


@gluon.jit
def told(asked, later, work, MASKED: gl.constexpr):
    """What `ask` asked for: (first partial entry, partial tiles, first full entry, full tiles), and the later place.

    Without a mask all tiles count as full.
    """
    tile, head, sample = later
    partial_begin, n_partial, full_begin, n_full = 0, 0, 0, (work[2][3] + TILE - 1) // TILE
    if MASKED:
        partial_begin = _of_lane(asked, 0)
        n_partial = _of_lane(asked, 1) - partial_begin
        full_begin = _of_lane(asked, 2)
        n_full = _of_lane(asked, 3) - full_begin
        tile = _of_lane(asked, 4)
    return (partial_begin, n_partial, full_begin, n_full), (tile, head, sample)


@gluon.jit
def _of_lane(x, LANE: gl.constexpr):
    return gl.inline_asm_elementwise(
        f"shfl.sync.idx.b32 $0, $1, {LANE}, 31, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def start(seat, work, MASKED: gl.constexpr):
    """The first item's runs and place, and the place of the second."""
    place = place_at(0, seat, work)
    _, place = told(ask(place, place, work, MASKED), place, work, MASKED)
    after = place_at(1, seat, work)
    runs, after = told(ask(place, after, work, MASKED), after, work, MASKED)
    return runs, place, after
