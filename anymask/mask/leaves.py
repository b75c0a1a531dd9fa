"""The leaves of a `Mask`: what a pair may depend on, each with its rule for whole tiles."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymask.mask.expr import Binary, Grid, Mask, Not
from anymask.shapes import TileKinds
from anymask.tiles import FULL, PARTIAL, TILE, tiles_over


@dataclass(frozen=True, repr=False)
class Band(Mask):
    """Attends where `low <= k // block - q // block <= high`; None is unbounded.

    `lower_right` counts from the last query and key, for a block of 1.
    """

    low: int | None
    high: int | None
    lower_right: bool = False
    block: int = 1

    @property
    def is_prefix_stable(self) -> bool:
        return not self.lower_right

    def _limits(self, grid: Grid) -> tuple[float, float]:
        shift = grid.kv_len - grid.q_len if self.lower_right else 0
        low = -float("inf") if self.low is None else self.low + shift
        high = float("inf") if self.high is None else self.high + shift
        return low, high

    def classify(self, grid: Grid) -> TileKinds:
        low, high = self._limits(grid)
        first_q, last_q, first_k, last_k = grid.bounds()
        # division keeps the order, so that the bounds stay bounds
        first_q, last_q, first_k, last_k = (x // self.block for x in (first_q, last_q, first_k, last_k))
        nearest, farthest = first_k - last_q, last_k - first_q
        full = (nearest >= low) & (farthest <= high)
        empty = (farthest < low) | (nearest > high)
        return (PARTIAL + full.to(torch.int8) - empty.to(torch.int8))[None, None]

    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        low, high = self._limits(grid)
        distance = k - q if self.block == 1 else k // self.block - q // self.block
        return (distance >= low) & (distance <= high)

    def spec(self, leaves: list[Tensor]) -> str:
        # int: a compiled function may have made symbols of them
        low, high = (None if x is None else int(x) for x in (self.low, self.high))
        return f"('band', {low}, {high}, {self.lower_right}, {int(self.block)})"


@dataclass(frozen=True, repr=False)
class Stride(Mask):
    """Attends where `q - k` is a multiple of `step`."""

    step: int

    def classify(self, grid: Grid) -> TileKinds:
        kind = FULL if self.step == 1 else PARTIAL
        return torch.full((1, 1, 1, 1), kind, dtype=torch.int8, device=grid.device)

    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k) % self.step == 0

    def spec(self, leaves: list[Tensor]) -> str:
        return f"('stride', {int(self.step)})"


@dataclass(frozen=True, repr=False)
class Positions(Mask):
    """Attends where the position of the query, or else of the key, is in `low <= position < high`."""

    low: int
    high: int
    of_query: bool

    def classify(self, grid: Grid) -> TileKinds:
        first_q, last_q, first_k, last_k = grid.bounds()
        first, last = (first_q, last_q) if self.of_query else (first_k, last_k)
        full = (first >= self.low) & (last < self.high)
        empty = (last < self.low) | (first >= self.high)
        return (PARTIAL + full.to(torch.int8) - empty.to(torch.int8))[None, None]

    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        position = q if self.of_query else k
        return (position >= self.low) & (position < self.high)

    def spec(self, leaves: list[Tensor]) -> str:
        return f"('positions', {int(self.low)}, {int(self.high)}, {self.of_query})"


@dataclass(frozen=True, eq=False, repr=False)
class Between(Mask):
    """Attends where `low <= value < high`: a value of each query in a range of each key, or the other way round.

    Documents, paddings, prefixes, spans and trees are all of this kind. Tensors are int64 `[mask_batch or 1, mask_heads
    or 1, length or 1]`; `value` None is the position. `of_query`: value belongs to the queries, low and high to the
    keys. `name` is the argument that errors speak of.
    """

    value: Tensor | None
    low: Tensor
    high: Tensor
    of_query: bool
    name: str

    def _tensors(self) -> list[Tensor]:
        return [t for t in (self.value, self.low, self.high) if t is not None]

    @property
    def planes(self) -> tuple[int, int]:
        batches, heads, _ = zip(*[t.shape for t in self._tensors()], strict=True)
        return max(batches), max(heads)

    def check(self, q_len: int, kv_len: int) -> None:
        value_side, range_side = ("q_len", "kv_len") if self.of_query else ("kv_len", "q_len")
        lengths = {"q_len": q_len, "kv_len": kv_len}
        for t, side in ((self.value, value_side), (self.low, range_side), (self.high, range_side)):
            if t is not None and t.shape[2] not in (1, lengths[side]):
                raise ValueError(
                    f"{self.name} has length {t.shape[2]} but {side} is {lengths[side]}; allowed are equal lengths"
                )

    def classify(self, grid: Grid) -> TileKinds:
        value_length, range_length = (grid.q_len, grid.kv_len) if self.of_query else (grid.kv_len, grid.q_len)
        value = self.value
        if value is None:
            value = torch.arange(value_length, device=grid.device)[None, None]

        def extremes(t: Tensor, length: int, of_query: bool) -> list[Tensor]:
            # [batch, heads, tiles] each; those of the queries become lines, those of the keys columns
            if of_query:
                return [x.unsqueeze(-1) for x in _extremes(t, length, grid.first, grid.last)]
            return [x.unsqueeze(-2) for x in _extremes(t, length)]

        least, most = extremes(value, value_length, self.of_query)
        low_least, low_most = extremes(self.low, range_length, not self.of_query)
        high_least, high_most = extremes(self.high, range_length, not self.of_query)
        full = (low_most <= least) & (most < high_least)
        empty = (low_least > most) | (high_most <= least)
        return PARTIAL + full.to(torch.int8) - empty.to(torch.int8)

    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at_value, at_range = (q, k) if self.of_query else (k, q)
        value = at_value if self.value is None else _read(self.value, b, h, at_value)
        return (_read(self.low, b, h, at_range) <= value) & (value < _read(self.high, b, h, at_range))

    def spec(self, leaves: list[Tensor]) -> str:
        numbers = [None if t is None else _leaf(t, leaves) for t in (self.value, self.low, self.high)]
        return f"('between', {', '.join(map(str, numbers))}, {self.of_query}, {self.name!r})"


def _leaf(t: Tensor, leaves: list[Tensor]) -> int:
    """Where `t` is in `leaves`, to which it is added if it is new: documents compare their ids with themselves."""
    for i, known in enumerate(leaves):
        if known is t:
            return i
    leaves.append(t)
    return len(leaves) - 1


def _extremes(t: Tensor, length: int, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
    """Least and most of `t [batch, heads, length or 1]` in each of some tiles: `[batch, heads, tiles or 1]`."""
    if t.shape[2] == 1:
        return t, t
    end = tiles_over(length) if last is None else last
    places = torch.arange(first * TILE, end * TILE, device=t.device).clamp(max=length - 1)
    tiles = t[..., places].unflatten(2, (-1, TILE))
    return tiles.amin(-1), tiles.amax(-1)


def _read(t: Tensor, *index: Tensor) -> Tensor:
    """`t[index]`, where a dimension of size 1 is shared."""
    return t[tuple(i if n > 1 else torch.zeros_like(i) for i, n in zip(index, t.shape, strict=True))]


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Mask):
    """Attends where `layout [mask_batch, mask_heads, q blocks, kv blocks]`, bool, is True; blocks of `size` tokens."""

    layout: Tensor
    size: int

    @property
    def planes(self) -> tuple[int, int]:
        return self.layout.shape[0], self.layout.shape[1]

    def check(self, q_len: int, kv_len: int) -> None:
        for dim, name, length in ((2, "q_len", q_len), (3, "kv_len", kv_len)):
            blocks = self.layout.shape[dim]
            if -(-length // self.size) != blocks:
                raise ValueError(
                    f"layout has {blocks} blocks of {self.size} along {name} but {name} is {length}; allowed are "
                    f"{-(-length // self.size)} blocks"
                )

    def classify(self, grid: Grid) -> TileKinds:
        # the count of True in any rectangle of blocks from four corners of a running sum
        corners = torch.nn.functional.pad(self.layout.long().cumsum(2).cumsum(3), (1, 0, 1, 0))
        first_q, last_q, first_k, last_k = (x // self.size for x in grid.bounds())
        last_q, last_k = last_q + 1, last_k + 1
        count = corners[:, :, last_q, last_k] - corners[:, :, first_q, last_k]
        count -= corners[:, :, last_q, first_k] - corners[:, :, first_q, first_k]
        full = count == (last_q - first_q) * (last_k - first_k)
        return PARTIAL + full.to(torch.int8) - (count == 0).to(torch.int8)

    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _read(self.layout, b, h, q // self.size, k // self.size)

    def spec(self, leaves: list[Tensor]) -> str:
        return f"('blocks', {_leaf(self.layout, leaves)}, {int(self.size)})"


@dataclass(frozen=True, eq=False, repr=False)
class Function(Mask):
    """Attends where `fn(b, h, q, k)` is True, for `batch` samples and `heads` heads. Evaluated tile by tile."""

    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    batch: int
    heads: int

    @property
    def planes(self) -> tuple[int, int]:
        return self.batch, self.heads

    def classify(self, grid: Grid) -> TileKinds:
        return torch.full((1, 1, 1, 1), PARTIAL, dtype=torch.int8, device=grid.device)

    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(b.shape, h.shape, q.shape, k.shape)
        found = self.fn(b, h, q, k)
        if not isinstance(found, Tensor) or found.dtype != torch.bool:
            what = f"dtype {found.dtype}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
            raise ValueError(f"fn returned a result of {what}; allowed is a tensor of torch.bool")
        try:
            return found.expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"fn returned shape {tuple(found.shape)} for index tensors that broadcast to {tuple(shape)}; allowed "
                "is a shape that broadcasts to it"
            ) from error

    def spec(self, leaves: list[Tensor]) -> str:
        if torch.compiler.is_compiling():
            raise ValueError(
                "mask is a from_function mask inside torch.compile; allowed is its BlockMask: pack it outside"
            )
        # what it has captured may change: a mask with a leaf is not remembered
        leaves.append(torch.empty(0))
        return "('function',)"


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """A tensor `[mask_batch, mask_heads, 1 or q_len, 1 or kv_len]`; non-zero = attend. It is read once, by `pack`."""

    tensor: Tensor

    @property
    def planes(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]

    def check(self, q_len: int, kv_len: int) -> None:
        for dim, name, length in ((2, "q_len", q_len), (3, "kv_len", kv_len)):
            if self.tensor.shape[dim] not in (1, length):
                raise ValueError(
                    f"mask has shape {tuple(self.tensor.shape)}: its dimension {dim - 4} is {self.tensor.shape[dim]} "
                    f"but {name} is {length}; allowed are 1 and {length}"
                )

    def classify(self, grid: Grid) -> TileKinds:
        return torch.full((1, 1, 1, 1), PARTIAL, dtype=torch.int8, device=grid.device)

    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _read(self.tensor, b, h, q, k) != 0

    def spec(self, leaves: list[Tensor]) -> str:
        return f"('dense', {_leaf(self.tensor, leaves)})"


def mask_from_spec(spec: str, leaves: list[Tensor]) -> Mask:
    """The mask that `spec` and `leaves`, as filled by `Mask.spec`, describe."""

    def build(node: tuple[Any, ...]) -> Mask:
        kind, *args = node
        if kind == "band":
            return Band(*args)
        if kind == "dense":
            return Dense(leaves[args[0]])
        if kind == "positions":
            return Positions(*args)
        if kind == "stride":
            return Stride(*args)
        if kind == "between":
            value, low, high, of_query, name = args
            return Between(None if value is None else leaves[value], leaves[low], leaves[high], of_query, name)
        if kind == "blocks":
            return Blocks(leaves[args[0]], args[1])
        if kind == "not":
            return Not(build(args[0]))
        return Binary(kind, build(args[0]), build(args[1]))

    return build(ast.literal_eval(spec))
