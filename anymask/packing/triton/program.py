"""From a mask to the arguments of kernels: `mask.program.Program` for the functions of `kernels/program.py`.

A kernel is compiled for the nodes of a program and for nothing else: numbers and tensors are arguments, so that a
window of 512 and one of 513, or two lengths, share it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.launch import tensor_key
from anymask.mask.expr import TileGrid
from anymask.mask.leaves import Between, Blocks
from anymask.mask.program import NO_TENSOR, NODE_WIDTH, Node, Program, read_nodes
from anymask.packing.triton.kernels.bits import LAUNCH
from anymask.packing.triton.kernels.lists import prepare_kernel
from anymask.packing.triton.kernels.program import PACKED, Layout
from anymask.packing.triton.lists import Workspace
from anymask.plan import apply, launch
from anymask.tiles import tiles_over

# dtypes that kernels read as they are; others are compared with 0 first, at the price of a bool copy
READABLE = frozenset(
    (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
)
# lengths that kernels compute with: a number beyond means what this one does, and four times a sum of two fits int32
FAR = 2**28
# beyond these a kernel would take long to compile, or have too many arguments
MAX_NODES, MAX_TENSORS = 128, 32
# the tensors of `packed_program`, in their order
_PACKED = (Node(PACKED.value, 0, 0, 0, 1, 2),)
# integers that a program of `prepare_kernel` zeroes
ZEROS = 4096


def encode(numbers: Iterable[int]) -> tuple[int, ...]:
    """Integers for a tuple that is a kernel's argument.

    Triton compiles a kernel anew for an integer that is 1 or a multiple of 16, and `do_not_specialize` does not reach
    the members of a tuple (3.6, 3.9). `4 * n + 3` is neither, whatever n. A kernel reads it by `number`.
    """
    # no launch sees an empty tuple
    return tuple([4 * n + 3 for n in numbers]) or (3,)


def readable(t: Tensor) -> Tensor:
    """`t` as kernels read it: zero and non-zero where they were, and no bool."""
    if t.dtype in READABLE:
        return t
    return (t if t.dtype == torch.bool else t != 0).view(torch.uint8)


def is_too_large(program: Program, grid: TileGrid) -> bool:
    """Whether a mask must be evaluated by torch for its size alone."""
    return max(grid.q_len, grid.kv_len) > FAR or len(program.nodes) > MAX_NODES * NODE_WIDTH


class MaskProgram(NamedTuple):
    """A mask as arguments of a kernel; its tensors are operands of a plan."""

    # what a kernel is compiled for: constants, and what Triton sees of the arguments
    nodes: tuple[Node, ...]
    key: tuple[Any, ...]
    # `MaskArgs`
    numbers: tuple[int, ...]
    tensors: tuple[Any, ...]
    layouts: tuple[int, ...]
    # tensors [planes, length] of which a kernel needs the minimum and maximum of each tile: their places, the first
    # tile and the length of each, encoded, and how many tiles there are
    ranged: tuple[int, ...]
    ranges: tuple[int, ...]
    n_extremes: int


@lru_cache(maxsize=4096)
def _device_nodes(flat: tuple[int, ...], n_tensors: int) -> tuple[tuple[Node, ...], tuple[int, ...], tuple[int, ...]]:
    """Nodes for kernels; places of ranged tensors; places of layouts of blocks whose sums are tensors too, after the
    others, as `Node.second`. The same objects for the same nodes, by which kernels are found."""
    nodes = read_nodes(flat)
    ranged: list[int] = []
    summed: list[int] = []
    for at, node in enumerate(nodes):
        if node.code == Between.code:
            ranged += [place for place in (node.first, node.second, node.third) if place != NO_TENSOR]
        elif node.code == Blocks.code and not node.flag:
            nodes[at] = replace(node, second=n_tensors + len(summed))
            summed.append(node.first)
    return tuple(nodes), tuple(dict.fromkeys(ranged)), tuple(summed)


def mask_program(
    flat: tuple[int, ...], numbers: tuple[int, ...], given: Sequence[Any], grid: TileGrid
) -> MaskProgram | None:
    """The parts of a `Program` for kernels on the device of `grid`; None if it must be evaluated by torch."""
    nodes, ranged, summed = _device_nodes(flat, len(given))
    if len(given) + len(summed) > MAX_TENSORS:
        return None
    tensors = [*given, *[apply(_sums, given[place]) for place in summed]]
    layouts: list[int] = []
    ranges: list[int] = []
    first = 0
    for place, t in enumerate(tensors):
        if place in ranged:
            # extremes are found plane by plane
            tensors[place] = t = (t if len(t.shape) == 3 else t.reshape(*t.shape, 1)).contiguous()
            layout, tiles = _ranged_layout(t, first)
            ranges += [first, t.shape[2]]
            first += tiles
        else:
            layout = _grid_layout(t)
        layouts += layout
    near = encode(max(-FAR, min(n, FAR)) for n in numbers)
    return _program(nodes, near, tensors, layouts, ranged, ranges, first)


def packed_program(kinds: Any, place: Any, words: Any) -> MaskProgram:
    """The mask whose tiles have `kinds [batch, heads, q_tiles, kv_tiles]`, and partial ones `words [n, 128, 4]`.

    `place`: of each tile that is partial its place in `words`, int32 as `kinds` in memory.
    """
    return _program(_PACKED, encode(()), [kinds, place, words], [*_grid_layout(kinds)], (), [], 0)


def _program(
    nodes: tuple[Node, ...],
    numbers: tuple[int, ...],
    tensors: list[Any],
    layouts: list[int],
    ranged: tuple[int, ...],
    ranges: list[int],
    n_extremes: int,
) -> MaskProgram:
    encoded = encode(layouts)
    # numbers and ranges fit int32
    key = (*map(tensor_key, tensors), max(encoded) < 2**31 or tuple(n < 2**31 for n in encoded))
    return MaskProgram(nodes, key, numbers, tuple(tensors), encoded, ranged, encode([*ranges, n_extremes]), n_extremes)


def _ranged_layout(t: Any, first: int) -> tuple[Layout, int]:
    """Of a contiguous tensor `[batch, heads, length]` whose tiles start at `first`, and how many tiles it has."""
    batch, heads, length = t.shape
    tiles = tiles_over(length)
    # planes from one sample, and from one head, to the next
    sample, head = heads * (batch > 1), int(heads > 1)
    # the stride of positions is that of tiles too, 1 or none
    layout = Layout(sample * length, head * length, int(length > 1), 0, first, sample * tiles, head * tiles)
    return layout, batch * heads * tiles


def _grid_layout(t: Any) -> Layout:
    """Of a tensor `[batch, heads, rows, columns]`."""
    batch, head, row, col = (stride if n > 1 else 0 for n, stride in zip(t.shape, t.stride(), strict=True))
    return Layout(batch, head, row, col, 0, 0, 0)


def _sums(layout: Tensor) -> Tensor:
    """How many blocks are True in the rectangle from the first block to each, inclusive."""
    dtype = torch.int32 if layout.shape[2] * layout.shape[3] < 2**31 else torch.int64
    return layout.cumsum(2, dtype=dtype).cumsum_(3)


def prepare(work: Workspace, program: MaskProgram | None = None) -> None:
    """Fill `work` with zeros, no tile counted and no position with a pair, and with the extremes of a program."""
    tensors: tuple[Any, ...] = (work.memory,)
    ranges, n, key = encode((0,)), 0, None
    if program is not None and program.n_extremes:
        tensors = tuple(program.tensors[place] for place in program.ranged)
        ranges, n, key = program.ranges, program.n_extremes, (program.key, program.ranged)
    launch(
        prepare_kernel,
        (max(n, -(-work.zeros // ZEROS)), 1, 1),
        (work.memory, tensors, ranges, work.zeros, *work.starts),
        {"TENSORS": len(ranges) // 2, "ZEROS": ZEROS},
        (work.key, key),
        num_warps=1,
        **LAUNCH,
    )
