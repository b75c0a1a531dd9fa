"""The leaves of a `Mask`: what a pair may depend on, each with its rule for whole tiles, and as numbers and tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from anymask.mask.expr import TileGrid, check_sizes
from anymask.mask.program import FAR, Leaf, Parts, near
from anymask.shapes import TileKinds
from anymask.tiles import FULL, PARTIAL, TILE


def _kinds(full: Tensor, empty: Tensor) -> Tensor:
    return PARTIAL + full.to(torch.int8) - empty.to(torch.int8)


def _unknown(grid: TileGrid) -> TileKinds:
    return torch.full((1, 1, 1, 1), PARTIAL, dtype=torch.int8, device=grid.device)


@dataclass(frozen=True, repr=False)
class Band(Leaf):
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

    def lower(self) -> Parts:
        return Parts((near(self.low, -FAR), near(self.high, FAR), near(self.block)), flag=self.lower_right)

    @classmethod
    def read(cls, parts: Parts) -> Band:
        low, high, block = parts.numbers
        return cls(None if low <= -FAR else low, None if high >= FAR else high, parts.flag, block)

    def _limits(self, grid: TileGrid) -> tuple[int, int, int]:
        shift = grid.kv_len - grid.q_len if self.lower_right else 0
        return near(self.low, -FAR) + shift, near(self.high, FAR) + shift, near(self.block)

    def classify(self, grid: TileGrid, rows: range) -> TileKinds:
        low, high, block = self._limits(grid)
        # division keeps the order, so that the bounds stay bounds
        first_q, last_q, first_k, last_k = (x // block for x in grid.bounds(rows))
        nearest, farthest = first_k - last_q, last_k - first_q
        return _kinds((nearest >= low) & (farthest <= high), (farthest < low) | (nearest > high))[None, None]

    def evaluate(self, grid: TileGrid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        low, high, block = self._limits(grid)
        distance = k - q if block == 1 else k // block - q // block
        return (distance >= low) & (distance <= high)


@dataclass(frozen=True, repr=False)
class Stride(Leaf):
    """Attends where `q - k` is a multiple of `step`."""

    step: int

    def lower(self) -> Parts:
        return Parts((near(self.step),))

    @classmethod
    def read(cls, parts: Parts) -> Stride:
        return cls(*parts.numbers)

    def classify(self, grid: TileGrid, rows: range) -> TileKinds:
        kind = FULL if self.step == 1 else PARTIAL
        return torch.full((1, 1, 1, 1), kind, dtype=torch.int8, device=grid.device)

    def evaluate(self, grid: TileGrid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k) % near(self.step) == 0


@dataclass(frozen=True, repr=False)
class Positions(Leaf):
    """Attends where the position of the query, or else of the key, is in `low <= position < high`."""

    low: int
    high: int
    of_query: bool

    def lower(self) -> Parts:
        return Parts((near(self.low), near(self.high)), flag=self.of_query)

    @classmethod
    def read(cls, parts: Parts) -> Positions:
        low, high = parts.numbers
        return cls(low, high, parts.flag)

    def classify(self, grid: TileGrid, rows: range) -> TileKinds:
        low, high = near(self.low), near(self.high)
        first_q, last_q, first_k, last_k = grid.bounds(rows)
        first, last = (first_q, last_q) if self.of_query else (first_k, last_k)
        return _kinds((first >= low) & (last < high), (last < low) | (first >= high))[None, None]

    def evaluate(self, grid: TileGrid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        position = q if self.of_query else k
        return (position >= near(self.low)) & (position < near(self.high))


@dataclass(frozen=True, eq=False, repr=False)
class Between(Leaf):
    """Attends where `low <= value < high`: a value of each query in a range of each key, or the other way round.

    Documents, paddings, prefixes, spans and trees are of this kind. Tensors are int64 `[mask_batch or 1, mask_heads or
    1, length]`, or `[mask_batch or 1, mask_heads or 1]` where all tokens share a value; `value` None is the position.
    `of_query`: value belongs to the queries, low and high to the keys. `name` is the argument that errors speak of.
    """

    value: Tensor | None
    low: Tensor
    high: Tensor
    of_query: bool
    name: str

    def __post_init__(self) -> None:
        check_sizes(self.name, [_planes(t) for t in self._tensors()])

    def _tensors(self) -> list[Tensor]:
        return [t for t in (self.value, self.low, self.high) if t is not None]

    @property
    def planes(self) -> tuple[int, int]:
        return _largest([_planes(t) for t in self._tensors()])

    def check(self, q_len: int, kv_len: int) -> None:
        value_side, range_side = (("q_len", q_len), ("kv_len", kv_len))[:: 1 if self.of_query else -1]
        _check_length(self.value, self.name, *value_side)
        _check_length(self.low, self.name, *range_side)
        _check_length(self.high, self.name, *range_side)

    def lower(self) -> Parts:
        return Parts(tensors=(self.value, self.low, self.high), flag=self.of_query)

    @classmethod
    def read(cls, parts: Parts) -> Between:
        value, low, high = parts.tensors
        return cls(value, cast(Tensor, low), cast(Tensor, high), parts.flag, "tensors of the mask")

    def classify(self, grid: TileGrid, rows: range) -> TileKinds:
        value = self.value
        if value is None:
            value = torch.arange(grid.q_len if self.of_query else grid.kv_len, device=grid.device)[None, None]
        least, most = _extremes(value, grid, rows, self.of_query)
        low_least, low_most = _extremes(self.low, grid, rows, not self.of_query)
        high_least, high_most = _extremes(self.high, grid, rows, not self.of_query)
        return _kinds((low_most <= least) & (most < high_least), (low_least > most) | (high_most <= least))

    def evaluate(self, grid: TileGrid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at_value, at_range = (q, k) if self.of_query else (k, q)
        value = at_value if self.value is None else _read(self.value, b, h, at_value)
        return (_read(self.low, b, h, at_range) <= value) & (value < _read(self.high, b, h, at_range))


def _planes(t: Tensor) -> tuple[int, int]:
    return t.shape[0], t.shape[1]


def _largest(planes: list[tuple[int, int]]) -> tuple[int, int]:
    batches, heads = zip(*planes, strict=True)
    return max(batches), max(heads)


def _check_length(t: Tensor | None, name: str, side: str, length: int) -> None:
    """A length of 1 is no broadcast: it is one token, as 2 are two."""
    if t is not None and t.dim() == 3 and _differ(t.shape[2], length):
        raise ValueError(f"{name} has length {t.shape[2]} but {side} is {length}; allowed are equal lengths")


def _differ(a: int, b: int) -> bool:
    """Whether two lengths are known to differ: in a traced function one may be a symbol that only a run tells."""
    if not torch.compiler.is_compiling():
        return a != b
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(a != b))


def _extremes(t: Tensor, grid: TileGrid, rows: range, of_query: bool) -> tuple[Tensor, Tensor]:
    """Least and most of `t` in each tile of positions, as rows `[batch, heads, rows, 1]` or columns `[..., 1, tiles]`;
    1 where all positions share a value."""
    if t.dim() == 2:
        return t[..., None, None], t[..., None, None]
    length, tiles = (grid.q_len, rows) if of_query else (grid.kv_len, range(grid.kv_tiles))
    places = torch.arange(tiles.start * TILE, tiles.stop * TILE, device=t.device).clamp(max=length - 1)
    values = t[..., places].unflatten(2, (-1, TILE))
    dim = -1 if of_query else -2
    return values.amin(-1).unsqueeze(dim), values.amax(-1).unsqueeze(dim)


def _read(t: Tensor, *index: Tensor) -> Tensor:
    """`t[index]`, where a dimension of size 1 is shared, as is the last index where `t` has no such dimension."""
    return t[tuple(i if n > 1 else torch.zeros_like(i) for i, n in zip(index, t.shape, strict=False))]


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Leaf):
    """Attends where `layout [mask_batch, mask_heads, q blocks, kv blocks]`, bool, is True; blocks of `size` tokens."""

    layout: Tensor
    size: int

    @property
    def planes(self) -> tuple[int, int]:
        return _planes(self.layout)

    def lower(self) -> Parts:
        # a tile lies in one block, or else in a rectangle of them
        return Parts((near(self.size),), (self.layout,), flag=self.size % TILE == 0)

    @classmethod
    def read(cls, parts: Parts) -> Blocks:
        return cls(cast(Tensor, parts.tensors[0]), *parts.numbers)

    def check(self, q_len: int, kv_len: int) -> None:
        for dim, name, length in ((2, "q_len", q_len), (3, "kv_len", kv_len)):
            blocks = self.layout.shape[dim]
            if -(-length // self.size) != blocks:
                raise ValueError(
                    f"layout has {blocks} blocks of {self.size} along {name} but {name} is {length}; allowed are "
                    f"{-(-length // self.size)} blocks"
                )

    def classify(self, grid: TileGrid, rows: range) -> TileKinds:
        # the count of True in any rectangle of blocks from four corners of a running sum
        corners = torch.nn.functional.pad(self.layout.long().cumsum(2).cumsum(3), (1, 0, 1, 0))
        size = near(self.size)
        first_q, last_q, first_k, last_k = (x // size for x in grid.bounds(rows))
        last_q, last_k = last_q + 1, last_k + 1
        count = corners[:, :, last_q, last_k] - corners[:, :, first_q, last_k]
        count -= corners[:, :, last_q, first_k] - corners[:, :, first_q, first_k]
        full = count == (last_q - first_q) * (last_k - first_k)
        return _kinds(full, count == 0)

    def evaluate(self, grid: TileGrid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        size = near(self.size)
        return _read(self.layout, b, h, q // size, k // size)


@dataclass(frozen=True, eq=False, repr=False)
class Function(Leaf):
    """Attends where `fn(b, h, q, k)` is True, for `batch` samples and `heads` heads. Evaluated tile by tile."""

    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    batch: int
    heads: int

    @property
    def planes(self) -> tuple[int, int]:
        return self.batch, self.heads

    def classify(self, grid: TileGrid, rows: range) -> TileKinds:
        return _unknown(grid)

    def evaluate(self, grid: TileGrid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
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


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Leaf):
    """A tensor `[mask_batch, mask_heads, 1 or q_len, 1 or kv_len]`; non-zero = attend. It is read once, by `pack`."""

    tensor: Tensor

    @property
    def planes(self) -> tuple[int, int]:
        return _planes(self.tensor)

    def lower(self) -> Parts:
        return Parts(tensors=(self.tensor,))

    @classmethod
    def read(cls, parts: Parts) -> Dense:
        return cls(cast(Tensor, parts.tensors[0]))

    def check(self, q_len: int, kv_len: int) -> None:
        for dim, name, length in ((2, "q_len", q_len), (3, "kv_len", kv_len)):
            if self.tensor.shape[dim] not in (1, length):
                raise ValueError(
                    f"mask has shape {tuple(self.tensor.shape)}: its dimension {dim - 4} is {self.tensor.shape[dim]} "
                    f"but {name} is {length}; allowed are 1 and {length}"
                )

    def classify(self, grid: TileGrid, rows: range) -> TileKinds:
        return _unknown(grid)

    def evaluate(self, grid: TileGrid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _read(self.tensor, b, h, q, k) != 0
