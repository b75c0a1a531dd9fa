"""The device twin of expr.py and leaves.py: a mask as arguments of a kernel that classifies and evaluates its tiles.

A kernel is compiled for the structure of a mask, `ops`, and for nothing else: numbers and tensors are arguments, so
that a window of 512 and one of 513, or two lengths, share it.
"""

import ast
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from anymask import tiles
from anymask.launch import launch, tensor_key
from anymask.mask.expr import Grid, Mask
from anymask.packing.triton.kernels.bits import LAUNCH, TILE, WORDS, word_and_bit
from anymask.packing.triton.lists import Work
from anymask.tiles import tiles_over

# dtypes that kernels read as they are; others are compared with 0 first, at the price of a bool copy
READABLE = (
    torch.bool,
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
# the names of `Mask.spec`; packed is a mask of which kinds and words are known already
OPS = ("and", "or", "not", "band", "stride", "positions", "between", "blocks", "dense", "packed")
AND, OR, NOT, BAND, STRIDE, POSITIONS, BETWEEN, BLOCKS, DENSE, PACKED = map(tl.constexpr, range(len(OPS)))
# farther than any two positions, and four times a sum of two such still fits int32
FAR = 2**28
# beyond these a kernel would have too many arguments, or take long to compile
MAX_OPS, MAX_TENSORS = 512, 32
# integers that a program of `_prepare_kernel` zeroes
ZEROS = 4096
# integers of a tensor in `Program.strides`
FIELDS = tl.constexpr(7)


class Program(NamedTuple):
    """A mask as arguments of a kernel. All integers are stored as `4 * n + 3`, which no Triton specialises on."""

    # nodes, the root first: number of the op, then its operands; see `_parse`
    ops: tuple[int, ...]
    numbers: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    # FIELDS for each tensor. Four strides: batch, head, then position or query and key; 0 where shared. Of a tensor of
    # `between` also its first entry in `extremes`, and there the strides of batch and head; its tile stride is the sign
    # of its position stride
    strides: tuple[int, ...]
    # entries of `extremes`, int64 [n, 2]: least and most of each tile of positions
    n_extremes: int
    # leaves of `between`, and for each its first entry and its length
    ranges: tuple[int, ...]
    counts: tuple[int, ...]
    # what a kernel depends on beside `ops`
    key: tuple[Any, ...]


class _Parsed(NamedTuple):
    ops: tuple[int, ...]
    numbers: tuple[int, ...]
    # leaves of `between`; those of `blocks` whose blocks do not consist of whole tiles
    ranges: tuple[int, ...]
    layouts: tuple[int, ...]


def _stored(numbers: Any) -> tuple[int, ...]:
    return tuple(4 * n + 3 for n in numbers)


@lru_cache(maxsize=4096)
def _parse(spec: str, leaves: int) -> _Parsed | None:
    """What `Mask.spec` says. None if it has a function, which no kernel can call, or is too large."""
    ops: list[int] = []
    numbers: list[int] = []
    ranges: list[int] = []
    layouts: list[int] = []

    def number(n: int | None, default: int = 0) -> int:
        numbers.append(default if n is None else max(-FAR, min(n, FAR)))
        return len(numbers) - 1

    def emit(node: tuple[Any, ...]) -> int:
        at = len(ops)
        kind, *args = node
        ops.append(OPS.index(kind))
        if kind in ("and", "or", "not"):
            ops.extend([0] * len(args))
            for i, arg in enumerate(args):
                ops[at + 1 + i] = emit(arg)
        elif kind == "band":
            low, high, lower_right, block = args
            ops.extend((number(low, -FAR), number(high, FAR), int(lower_right), number(block)))
        elif kind == "stride":
            ops.append(number(args[0]))
        elif kind == "positions":
            low, high, of_query = args
            ops.extend((number(low), number(high), int(of_query)))
        elif kind == "between":
            value, low, high, of_query, _ = args
            ranges.extend(leaf for leaf in (value, low, high) if leaf is not None)
            ops.extend((-1 if value is None else value, low, high, int(of_query)))
        elif kind == "blocks":
            leaf, size = args
            whole = size % tiles.TILE == 0
            ops.extend((leaf, number(size), -1 if whole else leaves + len(layouts)))
            if not whole:
                layouts.append(leaf)
        elif kind == "dense":
            ops.append(args[0])
        return at

    if "'function'" in spec:
        return None
    emit(ast.literal_eval(spec))
    if len(ops) > MAX_OPS or leaves + len(layouts) > MAX_TENSORS:
        return None
    return _Parsed(tuple(ops), _stored(numbers), tuple(dict.fromkeys(ranges)), tuple(layouts))


def program_of(mask: Mask, grid: Grid) -> Program | None:
    """The mask for kernels on the device of `grid`; None if it must be evaluated by torch."""
    leaves: list[Tensor] = []
    parsed = _parse(mask.spec(leaves), len(leaves))
    if parsed is None:
        return None
    tensors = [t.to(grid.device) for t in leaves]
    tensors += [_sums(tensors[leaf]) for leaf in parsed.layouts]
    fields, counts, first = [], [], 0
    for leaf, t in enumerate(tensors):
        batch, heads = t.shape[:2]
        if leaf in parsed.ranges:
            # extremes are found plane by plane
            tensors[leaf] = t.contiguous()
            length, tiles = t.shape[2], tiles_over(t.shape[2])
            # planes from one sample, and from one head, to the next
            sample, head = heads * (batch > 1), int(heads > 1)
            fields += [sample * length, head * length, int(length > 1), 0, first, sample * tiles, head * tiles]
            counts += [first, length]
            first += batch * heads * tiles
            continue
        if t.dtype not in READABLE:
            t = t != 0
        tensors[leaf] = t.view(torch.uint8) if t.dtype == torch.bool else t
        fields += [*_strides(t), 0, 0, 0]
    return _program(parsed, tensors, fields, first, counts)


def packed_program(kinds: Tensor, words: Tensor) -> Program:
    """The mask whose tiles have `kinds [batch, heads, q_tiles, kv_tiles]` and, if partial, `words` in row order."""
    place = (kinds == tiles.PARTIAL).flatten().cumsum(0, dtype=torch.int32) - 1
    parsed = _Parsed((PACKED.value, 0, 1, 2), (), (), ())
    return _program(parsed, [kinds, place, words], [*kinds.stride(), 0, 0, 0], 0, [])


def _program(parsed: _Parsed, tensors: list[Tensor], fields: list[int], n_extremes: int, counts: list[int]) -> Program:
    strides = _stored(fields) or (3,)
    # numbers and counts fit int32
    key = (*map(tensor_key, tensors), max(strides) < 2**31 or tuple(n < 2**31 for n in strides))
    # no launch sees an empty tuple
    return Program(
        parsed.ops, parsed.numbers or (3,), tuple(tensors), strides, n_extremes, parsed.ranges, _stored(counts), key
    )


def prepare(work: Work, program: Program | None = None) -> None:
    """Fill `work` with zeros, that is no tile counted and no position alive, and with the extremes of a program."""
    zeros, n = 4 * work.starts[2], 0
    # no launch sees an empty tuple
    tensors: tuple[Tensor, ...] = (work.memory,)
    counts: tuple[int, ...] = (3,)
    key = None
    if program is not None and program.n_extremes:
        tensors = tuple(program.tensors[leaf] for leaf in program.ranges)
        n, key = program.n_extremes, (program.key, program.ranges)
        counts = *program.counts, 4 * n + 3
    launch(
        _prepare_kernel,
        (max(n, -(-zeros // ZEROS)), 1, 1),
        (work.memory, tensors, counts, zeros, work.starts[2]),
        {"TENSORS": len(counts) // 2, "ZEROS": ZEROS},
        (work.key, key),
        num_warps=1,
        **LAUNCH,
    )


def _strides(t: Tensor) -> list[int]:
    return [stride if n > 1 else 0 for n, stride in zip(t.shape, t.stride(), strict=True)]


def _sums(layout: Tensor) -> Tensor:
    """How many blocks are True in the rectangle from the first block to each, inclusive."""
    dtype = torch.int32 if layout.shape[2] * layout.shape[3] < 2**31 else torch.int64
    return layout.cumsum(2, dtype=dtype).cumsum_(3)


@triton.jit
def extremes_at(memory, start):
    """Of `Work.memory`: pointer to the extremes."""
    return (memory.to(tl.pointer_type(tl.int8)) + start.to(tl.int64) * 16).to(tl.pointer_type(tl.int64))


@triton.jit(do_not_specialize=["zeros", "start"])
def _prepare_kernel(memory, tensors, counts, zeros, start, TENSORS: tl.constexpr, ZEROS: tl.constexpr):
    """One program ZEROS zeros, and a tile of positions of a tensor `[planes, length]`: its least and its most."""
    x = tl.program_id(0) * ZEROS + tl.arange(0, ZEROS)
    tl.store(memory + x, 0, mask=x < zeros)
    extremes = extremes_at(memory, start)
    number = tl.program_id(0)
    for j in tl.static_range(TENSORS):
        # a tensor's first number and its length; after the last one, the number of all
        first = counts[2 * j] >> 2
        length = counts[2 * j + 1] >> 2
        if (number >= first) & (number < (counts[2 * j + 2] >> 2)):
            tiles = tl.cdiv(length, TILE)
            plane = (number - first) // tiles
            position = tl.minimum(((number - first) % tiles) * TILE + tl.arange(0, TILE), length - 1)
            values = tl.load(tensors[j] + plane.to(tl.int64) * length + position)
            tl.store(extremes + 2 * number.to(tl.int64), tl.min(values))
            tl.store(extremes + 2 * number.to(tl.int64) + 1, tl.max(values))


@triton.jit
def _positions(tile, length):
    """First and last position of a tile, inside the plane."""
    return tile * TILE, tl.minimum(tile * TILE + (TILE - 1), length - 1)


@triton.jit
def _field(strides, leaf: tl.constexpr, i: tl.constexpr):
    return (strides[FIELDS * leaf + i] >> 2).to(tl.int64)


@triton.jit
def _plane(strides, leaf: tl.constexpr, b, h):
    return b * _field(strides, leaf, 0) + h * _field(strides, leaf, 1)


@triton.jit
def _extremes(extremes, strides, leaf: tl.constexpr, b, h, tile):
    """Least and most of a tensor of `between` in a tile."""
    plane = _field(strides, leaf, 4) + b * _field(strides, leaf, 5) + h * _field(strides, leaf, 6)
    at = extremes + 2 * (plane + tile * _field(strides, leaf, 2))
    return tl.load(at), tl.load(at + 1)


@triton.jit
def _value(tensors, strides, leaf: tl.constexpr, b, h, position):
    return tl.load(tensors[leaf] + _plane(strides, leaf, b, h) + position * _field(strides, leaf, 2))


@triton.jit
def _cell(tensors, strides, leaf: tl.constexpr, b, h, q, k):
    """The entry of a tensor of blocks, tiles or pairs."""
    q_offset, k_offset = q * _field(strides, leaf, 2), k * _field(strides, leaf, 3)
    return tl.load(tensors[leaf] + _plane(strides, leaf, b, h) + q_offset + k_offset)


@triton.jit
def _sum_before(tensors, strides, leaf: tl.constexpr, b, h, q, k):
    """The sum over the blocks before `q` and `k`."""
    ptr = tensors[leaf] + _plane(strides, leaf, b, h)
    ptr += (q - 1) * _field(strides, leaf, 2) + (k - 1) * _field(strides, leaf, 3)
    return tl.load(ptr, mask=tl.minimum(q, k) > 0, other=0)


@triton.jit
def _kind(full, empty):
    return 1 + full.to(tl.int32) - empty.to(tl.int32)


@triton.jit
def classify(
    ops: tl.constexpr, at: tl.constexpr, numbers, tensors, strides, extremes, b, h, q_tile, kv_tile, q_len, kv_len
):
    """int32 `[n]`, 0 empty, 1 unknown, 2 full: `Mask.classify` of the node at `at`, for a q tile and `[n]` kv tiles."""
    first_q, last_q = _positions(q_tile, q_len)
    first_k, last_k = _positions(kv_tile, kv_len)
    if ops[at] == AND:
        left = classify(ops, ops[at + 1], numbers, tensors, strides, extremes, b, h, q_tile, kv_tile, q_len, kv_len)
        right = classify(ops, ops[at + 2], numbers, tensors, strides, extremes, b, h, q_tile, kv_tile, q_len, kv_len)
        return tl.minimum(left, right)
    elif ops[at] == OR:
        left = classify(ops, ops[at + 1], numbers, tensors, strides, extremes, b, h, q_tile, kv_tile, q_len, kv_len)
        right = classify(ops, ops[at + 2], numbers, tensors, strides, extremes, b, h, q_tile, kv_tile, q_len, kv_len)
        return tl.maximum(left, right)
    elif ops[at] == NOT:
        return 2 - classify(ops, ops[at + 1], numbers, tensors, strides, extremes, b, h, q_tile, kv_tile, q_len, kv_len)
    elif ops[at] == BAND:
        low, high, block = numbers[ops[at + 1]] >> 2, numbers[ops[at + 2]] >> 2, numbers[ops[at + 4]] >> 2
        shift = (kv_len - q_len) * ops[at + 3]
        nearest, farthest = first_k // block - last_q // block, last_k // block - first_q // block
        full = (nearest >= low + shift) & (farthest <= high + shift)
        return _kind(full, (farthest < low + shift) | (nearest > high + shift))
    elif ops[at] == STRIDE:
        full = ((numbers[ops[at + 1]] >> 2) == 1) & (kv_tile >= 0)
        return _kind(full, kv_tile < 0)
    elif ops[at] == POSITIONS:
        low, high = numbers[ops[at + 1]] >> 2, numbers[ops[at + 2]] >> 2
        if ops[at + 3]:
            first, last = first_q + 0 * kv_tile, last_q + 0 * kv_tile
        else:
            first, last = first_k, last_k
        return _kind((first >= low) & (last < high), (last < low) | (first >= high))
    elif ops[at] == BETWEEN:
        if ops[at + 4]:
            at_value, at_range = q_tile, kv_tile
        else:
            at_value, at_range = kv_tile, q_tile
        if ops[at + 1] >= 0:
            least, most = _extremes(extremes, strides, ops[at + 1], b, h, at_value)
        elif ops[at + 4]:
            least, most = first_q.to(tl.int64), last_q.to(tl.int64)
        else:
            least, most = first_k.to(tl.int64), last_k.to(tl.int64)
        low_least, low_most = _extremes(extremes, strides, ops[at + 2], b, h, at_range)
        high_least, high_most = _extremes(extremes, strides, ops[at + 3], b, h, at_range)
        return _kind((low_most <= least) & (most < high_least), (low_least > most) | (high_most <= least))
    elif ops[at] == BLOCKS:
        size = numbers[ops[at + 2]] >> 2
        first_q, last_q, first_k, last_k = first_q // size, last_q // size, first_k // size, last_k // size
        if ops[at + 3] < 0:
            # a tile lies in one block
            return 2 * (_cell(tensors, strides, ops[at + 1], b, h, first_q, first_k) != 0).to(tl.int32)
        else:
            count = _sum_before(tensors, strides, ops[at + 3], b, h, last_q + 1, last_k + 1)
            count -= _sum_before(tensors, strides, ops[at + 3], b, h, first_q, last_k + 1)
            count -= _sum_before(tensors, strides, ops[at + 3], b, h, last_q + 1, first_k)
            count += _sum_before(tensors, strides, ops[at + 3], b, h, first_q, first_k)
            return _kind(count == (last_q + 1 - first_q) * (last_k + 1 - first_k), count == 0)
    elif ops[at] == DENSE:
        return 1 + 0 * kv_tile
    else:
        tl.static_assert(ops[at] == PACKED)
        return _cell(tensors, strides, ops[at + 1], b, h, q_tile, kv_tile).to(tl.int32)


@triton.jit
def packed_place(ops: tl.constexpr, tensors, strides, b, h, q_tile, kv_tile):
    """Where the words of a partial tile of a packed mask are."""
    # places lie like kinds
    at = _plane(strides, ops[1], b, h) + q_tile * _field(strides, ops[1], 2) + kv_tile * _field(strides, ops[1], 3)
    return tl.load(tensors[ops[2]] + at).to(tl.int64)


@triton.jit
def evaluate(ops: tl.constexpr, at: tl.constexpr, numbers, tensors, strides, b, h, q, k, q_len, kv_len):
    """bool that broadcasts to the shape of positions `q` and `k`, of one tile: `Mask.evaluate` of the node at `at`."""
    if ops[at] == AND:
        left = evaluate(ops, ops[at + 1], numbers, tensors, strides, b, h, q, k, q_len, kv_len)
        return left & evaluate(ops, ops[at + 2], numbers, tensors, strides, b, h, q, k, q_len, kv_len)
    elif ops[at] == OR:
        left = evaluate(ops, ops[at + 1], numbers, tensors, strides, b, h, q, k, q_len, kv_len)
        return left | evaluate(ops, ops[at + 2], numbers, tensors, strides, b, h, q, k, q_len, kv_len)
    elif ops[at] == NOT:
        return ~evaluate(ops, ops[at + 1], numbers, tensors, strides, b, h, q, k, q_len, kv_len)
    elif ops[at] == BAND:
        low, high, block = numbers[ops[at + 1]] >> 2, numbers[ops[at + 2]] >> 2, numbers[ops[at + 4]] >> 2
        shift = (kv_len - q_len) * ops[at + 3]
        distance = k // block - q // block
        return (distance >= low + shift) & (distance <= high + shift)
    elif ops[at] == STRIDE:
        return (q - k) % (numbers[ops[at + 1]] >> 2) == 0
    elif ops[at] == POSITIONS:
        position = q if ops[at + 3] else k
        return (position >= (numbers[ops[at + 1]] >> 2)) & (position < (numbers[ops[at + 2]] >> 2))
    elif ops[at] == BETWEEN:
        if ops[at + 4]:
            at_value, at_range = q, k
        else:
            at_value, at_range = k, q
        value = at_value.to(tl.int64)
        if ops[at + 1] >= 0:
            value = _value(tensors, strides, ops[at + 1], b, h, at_value)
        low = _value(tensors, strides, ops[at + 2], b, h, at_range)
        return (low <= value) & (value < _value(tensors, strides, ops[at + 3], b, h, at_range))
    elif ops[at] == BLOCKS:
        size = numbers[ops[at + 2]] >> 2
        return _cell(tensors, strides, ops[at + 1], b, h, q // size, k // size) != 0
    elif ops[at] == DENSE:
        return _cell(tensors, strides, ops[at + 1], b, h, q, k) != 0
    else:
        tl.static_assert(ops[at] == PACKED)
        place = packed_place(ops, tensors, strides, b, h, tl.min(q) // TILE, tl.min(k) // TILE)
        word, bit = word_and_bit(k % TILE)
        return ((tl.load(tensors[ops[at + 3]] + (place * TILE + q % TILE) * WORDS + word) >> bit) & 1) != 0
