"""`Mask`: a lazy expression that says which pairs attend, before any length or device is known.

A leaf answers two questions: `classify` a whole grid of tiles from bounds alone (empty / unknown / full), and
`evaluate` the booleans of chosen pairs. `& | ~` combine both; on tiles that is three-valued (Kleene) logic with
0 = empty, 1 = unknown, 2 = full, so that "and" is the minimum, "or" the maximum and "not" is `2 - x`.
"""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymask.mask.bits import EMPTY, FULL, PARTIAL, TILE, tiles_over
from anymask.shapes import TileKinds


@dataclass(frozen=True)
class Grid:
    """The tiles of a `q_len x kv_len` plane on a device."""

    q_len: int
    kv_len: int
    device: torch.device

    @property
    def q_tiles(self) -> int:
        """Lines of tiles along the queries."""
        return tiles_over(self.q_len)

    @property
    def kv_tiles(self) -> int:
        """Lines of tiles along the keys."""
        return tiles_over(self.kv_len)

    def bounds(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and last query `[q_tiles, 1]`, first and last key `[1, kv_tiles]` of each tile, inside the plane."""
        first_q = torch.arange(0, self.q_len, TILE, device=self.device)[:, None]
        first_k = torch.arange(0, self.kv_len, TILE, device=self.device)[None, :]
        last_q = (first_q + TILE - 1).clamp(max=self.q_len - 1)
        last_k = (first_k + TILE - 1).clamp(max=self.kv_len - 1)
        return first_q, last_q, first_k, last_k


class Mask(ABC):
    """Which query attends to which key, as an expression: `causal() & ~sliding_window(4, 4)`.

    True = attend. A mask has no lengths: `anymask.pack` gives it some, and `attention` does so by itself.
    """

    @property
    @abstractmethod
    def planes(self) -> tuple[int, int]:
        """Mask batch and mask heads: 1 where all samples, or all heads, share a plane."""

    @abstractmethod
    def classify(self, grid: Grid) -> TileKinds:
        """int8, broadcastable to `[mask_batch, mask_heads, q_tiles, kv_tiles]`: 0 empty, 1 unknown, 2 full."""

    @abstractmethod
    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """bool of the broadcast shape of the index tensors: does query `q` attend to key `k` in plane `(b, h)`."""

    @abstractmethod
    def spec(self, leaves: list[Tensor]) -> str:
        """The expression as a Python literal; tensors are appended to `leaves`. `mask_from_spec` reads it back."""

    @abstractmethod
    def check(self, q_len: int, kv_len: int) -> None:
        """Raise ValueError if the mask cannot describe a plane of these lengths."""

    def __and__(self, other: Mask) -> Mask:
        return _combine("and", self, other)

    def __or__(self, other: Mask) -> Mask:
        return _combine("or", self, other)

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            "a Mask has no truth value: combine masks with & | ~ (not `and`, `or`, `not`), and compare packed masks "
            "through pack(mask, ...).to_dense()"
        )


@dataclass(frozen=True)
class Band(Mask):
    """Attends where `low <= k - q <= high`; None is unbounded. `lower_right` counts from the last query and key."""

    low: int | None
    high: int | None
    lower_right: bool = False

    @property
    def planes(self) -> tuple[int, int]:
        return 1, 1

    def check(self, q_len: int, kv_len: int) -> None:
        """A band fits any lengths."""

    def _limits(self, grid: Grid) -> tuple[float, float]:
        shift = grid.kv_len - grid.q_len if self.lower_right else 0
        low = -float("inf") if self.low is None else self.low + shift
        high = float("inf") if self.high is None else self.high + shift
        return low, high

    def classify(self, grid: Grid) -> TileKinds:
        low, high = self._limits(grid)
        first_q, last_q, first_k, last_k = grid.bounds()
        nearest, farthest = first_k - last_q, last_k - first_q
        full = (nearest >= low) & (farthest <= high)
        empty = (farthest < low) | (nearest > high)
        return (PARTIAL + full.to(torch.int8) - empty.to(torch.int8))[None, None]

    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        low, high = self._limits(grid)
        distance = k - q
        return (distance >= low) & (distance <= high)

    def spec(self, leaves: list[Tensor]) -> str:
        # int: a compiled function may have made symbols of them
        low, high = (None if x is None else int(x) for x in (self.low, self.high))
        return f"('band', {low}, {high}, {self.lower_right})"


@dataclass(frozen=True, eq=False)
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
        index = [i if n > 1 else torch.zeros_like(i) for i, n in zip((b, h, q, k), self.tensor.shape, strict=True)]
        return self.tensor[tuple(index)] != 0

    def spec(self, leaves: list[Tensor]) -> str:
        leaves.append(self.tensor)
        return f"('dense', {len(leaves) - 1})"


@dataclass(frozen=True)
class Not(Mask):
    """True where `of` is False."""

    of: Mask

    @property
    def planes(self) -> tuple[int, int]:
        return self.of.planes

    def check(self, q_len: int, kv_len: int) -> None:
        self.of.check(q_len, kv_len)

    def classify(self, grid: Grid) -> TileKinds:
        return FULL - self.of.classify(grid)

    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~self.of.evaluate(grid, b, h, q, k)

    def spec(self, leaves: list[Tensor]) -> str:
        return f"('not', {self.of.spec(leaves)})"


# name: what it does to two tile kinds, what it does to two booleans
_BINARY: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "and": (torch.minimum, torch.logical_and),
    "or": (torch.maximum, torch.logical_or),
}


@dataclass(frozen=True)
class Binary(Mask):
    """`left & right` or `left | right`."""

    op: str
    left: Mask
    right: Mask

    @property
    def planes(self) -> tuple[int, int]:
        batch, heads = (max(a, b) for a, b in zip(self.left.planes, self.right.planes, strict=True))
        return batch, heads

    def check(self, q_len: int, kv_len: int) -> None:
        self.left.check(q_len, kv_len)
        self.right.check(q_len, kv_len)

    def classify(self, grid: Grid) -> TileKinds:
        return _BINARY[self.op][0](self.left.classify(grid), self.right.classify(grid))

    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        left = self.left.evaluate(grid, b, h, q, k)
        return _BINARY[self.op][1](left, self.right.evaluate(grid, b, h, q, k))

    def spec(self, leaves: list[Tensor]) -> str:
        return f"('{self.op}', {self.left.spec(leaves)}, {self.right.spec(leaves)})"


def _combine(op: str, left: Mask, right: Mask) -> Mask:
    if not isinstance(right, Mask):
        raise TypeError(f"cannot combine a Mask with {type(right).__name__}; wrap a bool tensor in from_dense()")
    for dim, name in enumerate(("batch", "heads")):
        a, b = left.planes[dim], right.planes[dim]
        if a != b and 1 not in (a, b):
            raise ValueError(f"masks to combine differ in {name}: {a} and {b}; allowed are equal sizes or 1")
    return Binary(op, left, right)


def mask_from_spec(spec: str, leaves: list[Tensor]) -> Mask:
    """The mask that `spec` and `leaves`, as filled by `Mask.spec`, describe."""

    def build(node: tuple[Any, ...]) -> Mask:
        kind, *args = node
        if kind == "band":
            return Band(*args)
        if kind == "dense":
            return Dense(leaves[args[0]])
        if kind == "not":
            return Not(build(args[0]))
        return Binary(kind, build(args[0]), build(args[1]))

    return build(ast.literal_eval(spec))


__all__ = ["EMPTY", "FULL", "PARTIAL", "Band", "Binary", "Dense", "Grid", "Mask", "Not", "mask_from_spec"]
