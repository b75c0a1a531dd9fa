"""`Mask`: a lazy expression that says which pairs attend, before any length or device is known.

A leaf answers two questions: `classify` a whole grid of tiles from bounds alone (empty / unknown / full), and
`evaluate` the booleans of chosen pairs. `& | ~` combine both; on tiles that is three-valued (Kleene) logic with
0 = empty, 1 = unknown, 2 = full, so that "and" is the minimum, "or" the maximum and "not" is `2 - x`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from anymask.shapes import TileKinds
from anymask.tiles import FULL, TILE, tiles_over

# values of a list that a `repr` and errors show
FEW = 8


@dataclass(frozen=True)
class Grid:
    """The tiles of a `q_len x kv_len` plane on a device, or a strip of them: lines `first` to `last - 1` of q tiles."""

    q_len: int
    kv_len: int
    device: torch.device
    first: int = 0
    last: int | None = None

    @cached_property
    def q_tiles(self) -> int:
        """Lines of tiles along the queries."""
        return tiles_over(self.q_len)

    @cached_property
    def kv_tiles(self) -> int:
        """Lines of tiles along the keys."""
        return tiles_over(self.kv_len)

    def bounds(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and last query `[lines, 1]`, first and last key `[1, kv_tiles]` of each tile, inside the plane."""
        end = self.q_len if self.last is None else min(self.last * TILE, self.q_len)
        first_q = torch.arange(self.first * TILE, end, TILE, device=self.device)[:, None]
        first_k = torch.arange(0, self.kv_len, TILE, device=self.device)[None, :]
        last_q = (first_q + TILE - 1).clamp(max=self.q_len - 1)
        last_k = (first_k + TILE - 1).clamp(max=self.kv_len - 1)
        return first_q, last_q, first_k, last_k


@dataclass(frozen=True, eq=False, repr=False)
class Mask(ABC):
    """Which query attends to which key, as an expression: `causal() & ~sliding_window(4, 4)`.

    True = attend. A mask has no lengths: `anymask.pack` gives it some, and `attention` does so by itself.
    """

    # the call of the builder that made it, for `repr` and errors; it says nothing about pairs
    label: str | None = field(default=None, compare=False, kw_only=True)

    @property
    def planes(self) -> tuple[int, int]:
        """Mask batch and mask heads: 1 where all samples, or all heads, share a plane."""
        return 1, 1

    @property
    def is_prefix_stable(self) -> bool:
        """Whether pairs keep their values when the lengths grow."""
        return True

    @abstractmethod
    def classify(self, grid: Grid) -> TileKinds:
        """int8, broadcastable to `[mask_batch, mask_heads, lines, kv_tiles]`: 0 empty, 1 unknown, 2 full."""

    @abstractmethod
    def evaluate(self, grid: Grid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """bool of the broadcast shape of the index tensors: does query `q` attend to key `k` in plane `(b, h)`."""

    @abstractmethod
    def spec(self, leaves: list[Tensor]) -> str:
        """The expression as a Python literal; tensors are appended to `leaves`. `mask_from_spec` reads it back."""

    def check(self, q_len: int, kv_len: int) -> None:  # noqa: B027
        """Raise ValueError if the mask cannot describe a plane of these lengths; one without tensors can."""

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with all its tensors on `device`; itself if they are there."""
        parts = {name: x for name, x in vars(self).items() if isinstance(x, (Tensor, Mask))}
        moved = {name: x.to(device) for name, x in parts.items()}
        if all(moved[name] is x for name, x in parts.items()):
            return self
        return cast(Mask, replace(cast(Any, self), **moved))

    def __repr__(self) -> str:
        if self.label is not None:
            return self.label
        values = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={brief(value)}' for name, value in values)})"

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


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """True where `of` is False."""

    of: Mask

    def __repr__(self) -> str:
        return self.label or f"~{self.of!r}"

    @property
    def planes(self) -> tuple[int, int]:
        return self.of.planes

    @property
    def is_prefix_stable(self) -> bool:
        return self.of.is_prefix_stable

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


@dataclass(frozen=True, repr=False)
class Binary(Mask):
    """`left & right` or `left | right`."""

    op: str
    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return self.label or f"({self.left!r} {'&' if self.op == 'and' else '|'} {self.right!r})"

    @property
    def planes(self) -> tuple[int, int]:
        left, right = self.left.planes, self.right.planes
        return max(left[0], right[0]), max(left[1], right[1])

    @property
    def is_prefix_stable(self) -> bool:
        return self.left.is_prefix_stable and self.right.is_prefix_stable

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


def brief(value: Any) -> str:
    """A value in a `repr`: tensors by dtype and shape, functions by name, long lists by length, objects by type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        kind = type(value).__name__
        return f"{kind} of {len(value)}" if len(value) > FEW else f"({', '.join(map(brief, value))})"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return getattr(value, "__name__", None) or type(value).__name__


def _combine(op: str, left: Mask, right: Mask) -> Mask:
    if not isinstance(right, Mask):
        raise TypeError(f"cannot combine a Mask with {type(right).__name__}; wrap a bool tensor in from_dense()")
    for dim, name in enumerate(("batch", "heads")):
        a, b = left.planes[dim], right.planes[dim]
        if a != b and 1 not in (a, b):
            raise ValueError(f"masks to combine differ in {name}: {a} and {b}; allowed are equal sizes or 1")
    return Binary(op, left, right)
