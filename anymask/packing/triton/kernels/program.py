"""A mask inside a kernel: the device twin of `mask/leaves.py`, two functions a leaf.

`..._kind` is `Leaf.classify` for a q tile and `[n]` kv tiles, int32 `[n]`; `..._pairs` is `Leaf.evaluate` for positions
of one tile, bool that broadcasts to their shape. All take the nodes of a program, which the kernel is compiled for, the
place of their node, and the records below.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from anymask.mask import leaves, program
from anymask.packing.triton.kernels.bits import FULL, PARTIAL, TILE, WORDS, word_and_bit

NOT, AND, OR = tl.constexpr(program.NOT), tl.constexpr(program.AND), tl.constexpr(program.OR)
BAND, STRIDE = tl.constexpr(leaves.Band.code), tl.constexpr(leaves.Stride.code)
POSITIONS, BETWEEN = tl.constexpr(leaves.Positions.code), tl.constexpr(leaves.Between.code)
BLOCKS = tl.constexpr(leaves.Blocks.code)
DENSE = tl.constexpr(leaves.Dense.code)
# a mask of which kinds and words are known already; its tensors are kinds, places in words, words
PACKED = tl.constexpr(-1)
NO_TENSOR = tl.constexpr(program.NO_TENSOR)


class MaskArgs(NamedTuple):
    """What a kernel reads of a mask. Integers are encoded, see `packing.triton.program.encode`."""

    numbers: Any
    tensors: Any
    # a `Layout` for each tensor, one after the other
    layouts: Any


class Layout(NamedTuple):
    """Where the elements of a tensor are, and its tile minima and maxima; a stride is 0 where values are shared."""

    # strides of samples and heads; of positions, or of queries and keys, or of blocks of them
    batch: Any
    head: Any
    row: Any
    col: Any
    # in the table of minima and maxima: the first tile, strides of samples and heads
    first_tile: Any
    tile_batch: Any
    tile_head: Any


FIELDS = tl.constexpr(len(Layout._fields))


class Tiles(NamedTuple):
    """A q tile and `[n]` kv tiles of a plane, and where the table of minima and maxima is."""

    b: Any
    h: Any
    q_tile: Any
    kv_tile: Any
    # positions inside the plane
    first_q: Any
    last_q: Any
    first_k: Any
    last_k: Any
    q_len: Any
    kv_len: Any
    extremes: Any


class Pairs(NamedTuple):
    """Positions of one tile of a plane, which broadcast."""

    b: Any
    h: Any
    q: Any
    k: Any
    q_len: Any
    kv_len: Any


@triton.jit
def number(numbers, i: tl.constexpr):
    """Inverse of `packing.triton.program.encode`."""
    return numbers[i] >> 2


@triton.jit
def _layout(mask, tensor: tl.constexpr):
    at: tl.constexpr = FIELDS * tensor
    return Layout(
        number(mask.layouts, at).to(tl.int64),
        number(mask.layouts, at + 1).to(tl.int64),
        number(mask.layouts, at + 2).to(tl.int64),
        number(mask.layouts, at + 3).to(tl.int64),
        number(mask.layouts, at + 4).to(tl.int64),
        number(mask.layouts, at + 5).to(tl.int64),
        number(mask.layouts, at + 6).to(tl.int64),
    )


@triton.jit
def _offset(mask, tensor: tl.constexpr, b, h, row, col):
    at = _layout(mask, tensor)
    return b * at.batch + h * at.head + row * at.row + col * at.col


@triton.jit
def _load(mask, tensor: tl.constexpr, b, h, row, col):
    return tl.load(mask.tensors[tensor] + _offset(mask, tensor, b, h, row, col))


@triton.jit
def _tile_extremes(mask, tensor: tl.constexpr, tiles, tile):
    """Minimum and maximum of a tensor in a tile of positions."""
    at = _layout(mask, tensor)
    # values that all positions share are one tile, which has no stride either
    place = at.first_tile + tiles.b * at.tile_batch + tiles.h * at.tile_head + tile * at.row
    entry = tiles.extremes + 2 * place
    return tl.load(entry), tl.load(entry + 1)


@triton.jit
def _kind(full, empty):
    return PARTIAL + full.to(tl.int32) - empty.to(tl.int32)


@triton.jit
def _band_limits(nodes: tl.constexpr, i: tl.constexpr, mask, q_len, kv_len):
    first: tl.constexpr = nodes[i].number
    shift = (kv_len - q_len) * nodes[i].flag
    low, high = number(mask.numbers, first) + shift, number(mask.numbers, first + 1) + shift
    return low, high, number(mask.numbers, first + 2)


@triton.jit
def band_kind(nodes: tl.constexpr, i: tl.constexpr, mask, tiles):
    low, high, block = _band_limits(nodes, i, mask, tiles.q_len, tiles.kv_len)
    nearest = tiles.first_k // block - tiles.last_q // block
    farthest = tiles.last_k // block - tiles.first_q // block
    return _kind((nearest >= low) & (farthest <= high), (farthest < low) | (nearest > high))


@triton.jit
def band_pairs(nodes: tl.constexpr, i: tl.constexpr, mask, pairs):
    low, high, block = _band_limits(nodes, i, mask, pairs.q_len, pairs.kv_len)
    distance = pairs.k // block - pairs.q // block
    return (distance >= low) & (distance <= high)


@triton.jit
def stride_kind(nodes: tl.constexpr, i: tl.constexpr, mask, tiles):
    full = (number(mask.numbers, nodes[i].number) == 1) & (tiles.kv_tile >= 0)
    return _kind(full, tiles.kv_tile < 0)


@triton.jit
def stride_pairs(nodes: tl.constexpr, i: tl.constexpr, mask, pairs):
    return (pairs.q - pairs.k) % number(mask.numbers, nodes[i].number) == 0


@triton.jit
def positions_kind(nodes: tl.constexpr, i: tl.constexpr, mask, tiles):
    low, high = number(mask.numbers, nodes[i].number), number(mask.numbers, nodes[i].number + 1)
    if nodes[i].flag:
        # as many as kv tiles
        first, last = tiles.first_q + 0 * tiles.kv_tile, tiles.last_q + 0 * tiles.kv_tile
    else:
        first, last = tiles.first_k, tiles.last_k
    return _kind((first >= low) & (last < high), (last < low) | (first >= high))


@triton.jit
def positions_pairs(nodes: tl.constexpr, i: tl.constexpr, mask, pairs):
    low, high = number(mask.numbers, nodes[i].number), number(mask.numbers, nodes[i].number + 1)
    position = pairs.q if nodes[i].flag else pairs.k
    return (position >= low) & (position < high)


@triton.jit
def between_kind(nodes: tl.constexpr, i: tl.constexpr, mask, tiles):
    if nodes[i].flag:
        at_value, at_range, first, last = tiles.q_tile, tiles.kv_tile, tiles.first_q, tiles.last_q
    else:
        at_value, at_range, first, last = tiles.kv_tile, tiles.q_tile, tiles.first_k, tiles.last_k
    if nodes[i].first == NO_TENSOR:
        least, most = first.to(tl.int64), last.to(tl.int64)
    else:
        least, most = _tile_extremes(mask, nodes[i].first, tiles, at_value)
    low_least, low_most = _tile_extremes(mask, nodes[i].second, tiles, at_range)
    high_least, high_most = _tile_extremes(mask, nodes[i].third, tiles, at_range)
    return _kind((low_most <= least) & (most < high_least), (low_least > most) | (high_most <= least))


@triton.jit
def between_pairs(nodes: tl.constexpr, i: tl.constexpr, mask, pairs):
    if nodes[i].flag:
        at_value, at_range = pairs.q, pairs.k
    else:
        at_value, at_range = pairs.k, pairs.q
    if nodes[i].first == NO_TENSOR:
        value = at_value.to(tl.int64)
    else:
        value = _load(mask, nodes[i].first, pairs.b, pairs.h, at_value, 0)
    low = _load(mask, nodes[i].second, pairs.b, pairs.h, at_range, 0)
    return (low <= value) & (value < _load(mask, nodes[i].third, pairs.b, pairs.h, at_range, 0))


@triton.jit
def blocks_kind(nodes: tl.constexpr, i: tl.constexpr, mask, tiles):
    size = number(mask.numbers, nodes[i].number)
    b, h, first_q, first_k = tiles.b, tiles.h, tiles.first_q // size, tiles.first_k // size
    if nodes[i].flag:
        # a tile lies in one block
        return FULL * (_load(mask, nodes[i].first, b, h, first_q, first_k) != 0).to(tl.int32)
    else:
        end_q, end_k = tiles.last_q // size + 1, tiles.last_k // size + 1
        count = _sum_before(mask, nodes[i].second, b, h, end_q, end_k)
        count -= _sum_before(mask, nodes[i].second, b, h, first_q, end_k)
        count -= _sum_before(mask, nodes[i].second, b, h, end_q, first_k)
        count += _sum_before(mask, nodes[i].second, b, h, first_q, first_k)
        return _kind(count == (end_q - first_q) * (end_k - first_k), count == 0)


@triton.jit
def _sum_before(mask, tensor: tl.constexpr, b, h, q, k):
    """The sum over the blocks before `q` and `k`."""
    entry = mask.tensors[tensor] + _offset(mask, tensor, b, h, q - 1, k - 1)
    return tl.load(entry, mask=tl.minimum(q, k) > 0, other=0)


@triton.jit
def blocks_pairs(nodes: tl.constexpr, i: tl.constexpr, mask, pairs):
    size = number(mask.numbers, nodes[i].number)
    return _load(mask, nodes[i].first, pairs.b, pairs.h, pairs.q // size, pairs.k // size) != 0


@triton.jit
def dense_kind(nodes: tl.constexpr, i: tl.constexpr, mask, tiles):
    return PARTIAL + 0 * tiles.kv_tile


@triton.jit
def dense_pairs(nodes: tl.constexpr, i: tl.constexpr, mask, pairs):
    return _load(mask, nodes[i].first, pairs.b, pairs.h, pairs.q, pairs.k) != 0


@triton.jit
def packed_kind(nodes: tl.constexpr, i: tl.constexpr, mask, tiles):
    return _load(mask, nodes[i].first, tiles.b, tiles.h, tiles.q_tile, tiles.kv_tile).to(tl.int32)


@triton.jit
def packed_place(nodes: tl.constexpr, i: tl.constexpr, mask, b, h, q_tile, kv_tile):
    """Where the words of a partial tile of a packed mask are."""
    # places lie like kinds
    return tl.load(mask.tensors[nodes[i].second] + _offset(mask, nodes[i].first, b, h, q_tile, kv_tile)).to(tl.int64)


@triton.jit
def packed_pairs(nodes: tl.constexpr, i: tl.constexpr, mask, pairs):
    place = packed_place(nodes, i, mask, pairs.b, pairs.h, tl.min(pairs.q) // TILE, tl.min(pairs.k) // TILE)
    word, bit = word_and_bit(pairs.k % TILE)
    words = mask.tensors[nodes[i].third] + (place * TILE + pairs.q % TILE) * WORDS + word
    return ((tl.load(words) >> bit) & 1) != 0


@triton.jit
def _leaf_kind(nodes: tl.constexpr, i: tl.constexpr, mask, tiles):
    if nodes[i].code == BAND:
        return band_kind(nodes, i, mask, tiles)
    elif nodes[i].code == STRIDE:
        return stride_kind(nodes, i, mask, tiles)
    elif nodes[i].code == POSITIONS:
        return positions_kind(nodes, i, mask, tiles)
    elif nodes[i].code == BETWEEN:
        return between_kind(nodes, i, mask, tiles)
    elif nodes[i].code == BLOCKS:
        return blocks_kind(nodes, i, mask, tiles)
    elif nodes[i].code == DENSE:
        return dense_kind(nodes, i, mask, tiles)
    else:
        tl.static_assert(nodes[i].code == PACKED)
        return packed_kind(nodes, i, mask, tiles)


@triton.jit
def _leaf_pairs(nodes: tl.constexpr, i: tl.constexpr, mask, pairs):
    if nodes[i].code == BAND:
        return band_pairs(nodes, i, mask, pairs)
    elif nodes[i].code == STRIDE:
        return stride_pairs(nodes, i, mask, pairs)
    elif nodes[i].code == POSITIONS:
        return positions_pairs(nodes, i, mask, pairs)
    elif nodes[i].code == BETWEEN:
        return between_pairs(nodes, i, mask, pairs)
    elif nodes[i].code == BLOCKS:
        return blocks_pairs(nodes, i, mask, pairs)
    elif nodes[i].code == DENSE:
        return dense_pairs(nodes, i, mask, pairs)
    else:
        tl.static_assert(nodes[i].code == PACKED)
        return packed_pairs(nodes, i, mask, pairs)


@triton.jit
def classify(nodes: tl.constexpr, mask, extremes, b, h, q_tile, kv_tile, q_len, kv_len):
    """int32 `[n]`, EMPTY, PARTIAL (unknown) or FULL: `Mask.classify` of a q tile and `[n]` kv tiles."""
    last_q = tl.minimum(q_tile * TILE + (TILE - 1), q_len - 1)
    last_k = tl.minimum(kv_tile * TILE + (TILE - 1), kv_len - 1)
    tiles = Tiles(b, h, q_tile, kv_tile, q_tile * TILE, last_q, kv_tile * TILE, last_k, q_len, kv_len, extremes)
    # results of operands; what a loop that is unrolled assigns may change its type
    done = ()
    for i in tl.static_range(len(nodes)):
        if nodes[i].code == NOT:
            done = done[:-1] + (FULL - done[-1],)
        elif nodes[i].code == AND:
            done = done[:-2] + (tl.minimum(done[-2], done[-1]),)
        elif nodes[i].code == OR:
            done = done[:-2] + (tl.maximum(done[-2], done[-1]),)
        else:
            done = done + (_leaf_kind(nodes, i, mask, tiles),)
    return done[0]


@triton.jit
def evaluate(nodes: tl.constexpr, mask, b, h, q, k, q_len, kv_len):
    """bool that broadcasts to the shape of positions `q` and `k`, of one tile: `Mask.evaluate`."""
    pairs = Pairs(b, h, q, k, q_len, kv_len)
    done = ()
    for i in tl.static_range(len(nodes)):
        if nodes[i].code == NOT:
            done = done[:-1] + (~done[-1],)
        elif nodes[i].code == AND:
            done = done[:-2] + (done[-2] & done[-1],)
        elif nodes[i].code == OR:
            done = done[:-2] + (done[-2] | done[-1],)
        else:
            done = done + (_leaf_pairs(nodes, i, mask, pairs),)
    return done[0]


@triton.jit
def inside(nodes: tl.constexpr, mask, b, h, q, k, q_len, kv_len):
    """`evaluate` of positions, some of which may lie outside the plane and attend to nothing."""
    bits = evaluate(nodes, mask, b, h, tl.minimum(q, q_len - 1), tl.minimum(k, kv_len - 1), q_len, kv_len)
    return bits & (q < q_len) & (k < kv_len)
