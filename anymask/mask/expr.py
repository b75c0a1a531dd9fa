"""`Mask`: a lazy expression that says which pairs attend, before any length or device is known.

A leaf answers two questions: `classify` whole tiles from bounds alone (empty / unknown / full), and `evaluate` the
booleans of chosen pairs. `& | ~` combine both; on tiles that is three-valued (Kleene) logic with 0 = empty,
1 = unknown, 2 = full, so that "and" is the minimum, "or" the maximum and "not" is `2 - x`.

Nothing here recurses: a chain of thousands of `|` is walked by `postfix`, in time linear in its length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from anymask.shapes import TileKinds
from anymask.tiles import FULL, TILE, tiles_over

# values of a list that a `repr` and errors show
FEW = 8
# what a mask keeps of itself, as attributes: its lowered form, which `mask.program` makes, and lengths that it fits
PROGRAM, FITS = "_program", "_fits"
T = TypeVar("T")


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a `q_len x kv_len` plane on a device."""

    q_len: int
    kv_len: int
    device: torch.device

    @cached_property
    def q_tiles(self) -> int:
        """Rows of tiles."""
        return tiles_over(self.q_len)

    @cached_property
    def kv_tiles(self) -> int:
        """Columns of tiles."""
        return tiles_over(self.kv_len)

    @property
    def rows(self) -> range:
        """All rows of tiles."""
        return range(self.q_tiles)

    def bounds(self, rows: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and last query `[rows, 1]`, first and last key `[1, kv_tiles]` of each tile, inside the plane."""
        first_q = torch.arange(rows.start * TILE, min(rows.stop * TILE, self.q_len), TILE, device=self.device)[:, None]
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
    def held(self) -> int:
        """Results that are held at a time while the expression is walked in the order of `postfix`."""
        return 1

    @property
    def is_prefix_stable(self) -> bool:
        """Whether pairs keep their values when the lengths grow."""
        return True

    @abstractmethod
    def classify(self, grid: TileGrid, rows: range) -> TileKinds:
        """int8, broadcastable to `[mask_batch, mask_heads, len(rows), kv_tiles]`: 0 empty, 1 unknown, 2 full."""

    @abstractmethod
    def evaluate(self, grid: TileGrid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """bool of the broadcast shape of the index tensors: does query `q` attend to key `k` in plane `(b, h)`."""

    def check(self, q_len: int, kv_len: int) -> None:  # noqa: B027
        """Raise ValueError if the mask cannot describe a plane of these lengths; one without tensors can."""

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with all its tensors on `device`; itself if they are there."""
        # no `vars` and no `id`, which dynamo of torch 2.11 does not know
        tensors = {f.name: x for f in fields(cast(Any, self)) if isinstance(x := getattr(self, f.name), Tensor)}
        moved: dict[str, Tensor] = {}
        for name, x in tensors.items():
            # fields that share a tensor share its copy
            moved[name] = ([moved[other] for other in moved if tensors[other] is x] or [x.to(device)])[0]
        if all(moved[name] is x for name, x in tensors.items()):
            return self
        return cast(Mask, replace(cast(Any, self), **moved))

    def check_once(self, q_len: int, kv_len: int) -> None:
        """`check`, unless it was asked for these lengths the last time; packing checks the mask again."""
        if not (type(q_len) is type(kv_len) is int) or torch.compiler.is_compiling():
            self.check(q_len, kv_len)
        elif vars(self).get(FITS) != (q_len, kv_len):
            self.check(q_len, kv_len)
            vars(self)[FITS] = q_len, kv_len

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in (PROGRAM, FITS)}

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


class Operator(Mask):
    """A node with operands. What a mask can be asked is asked of its leaves, and combined here."""

    @abstractmethod
    def of_kinds(self, *operands: Tensor) -> TileKinds:
        """Kinds of tiles from those of the operands."""

    @abstractmethod
    def of_pairs(self, *operands: Tensor) -> Tensor:
        """Booleans of pairs from those of the operands."""

    @abstractmethod
    def of_masks(self, *operands: Mask) -> Mask:
        """The same node over other operands; itself if they are its own."""

    @property
    def is_prefix_stable(self) -> bool:
        return all(leaf.is_prefix_stable for leaf in _leaves(self))

    def check(self, q_len: int, kv_len: int) -> None:
        for leaf in _leaves(self):
            leaf.check(q_len, kv_len)

    def classify(self, grid: TileGrid, rows: range) -> TileKinds:
        found: TileKinds = fold(self, lambda leaf: leaf.classify(grid, rows), lambda node, *x: node.of_kinds(*x))
        return found

    def evaluate(self, grid: TileGrid, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found: Tensor = fold(self, lambda leaf: leaf.evaluate(grid, b, h, q, k), lambda node, *x: node.of_pairs(*x))
        return found

    def to(self, device: torch.device | str) -> Mask:
        moved: Mask = fold(self, lambda leaf: leaf.to(device), lambda node, *masks: node.of_masks(*masks))
        return moved

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operator) and _signature(self) == _signature(other)

    def __hash__(self) -> int:
        return hash(_signature(self))

    def __repr__(self) -> str:
        pieces: list[str] = []
        todo: list[Mask | str] = [self]
        while todo:
            piece = todo.pop()
            if isinstance(piece, Mask) and piece.label is not None:
                pieces.append(piece.label)
            elif isinstance(piece, Not):
                todo += [piece.of, "~"]
            elif isinstance(piece, Binary):
                todo += [")", piece.right, " & " if piece.op == "and" else " | ", piece.left, "("]
            else:
                pieces.append(piece if isinstance(piece, str) else repr(piece))
        return "".join(pieces)

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle and deepcopy walk what they are given by recursion: a list is flat
        nodes = postfix(self, as_written=True)
        labels = [node.label if isinstance(node, Operator) else None for node in nodes]
        return from_postfix, (list(_signature(self, as_written=True)), labels)


@dataclass(frozen=True, eq=False, repr=False)
class Not(Operator):
    """True where `of` is False."""

    of: Mask
    _planes: tuple[int, int] = field(init=False)
    _held: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_planes", self.of.planes)
        object.__setattr__(self, "_held", self.of.held)

    @property
    def planes(self) -> tuple[int, int]:
        return self._planes

    @property
    def held(self) -> int:
        return self._held

    def of_kinds(self, *operands: Tensor) -> TileKinds:
        return FULL - operands[0]

    def of_pairs(self, *operands: Tensor) -> Tensor:
        return ~operands[0]

    def of_masks(self, *operands: Mask) -> Mask:
        return self if operands[0] is self.of else Not(operands[0], label=self.label)


# name: what it does to two tile kinds, what it does to two booleans
_BINARY: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "and": (torch.minimum, torch.logical_and),
    "or": (torch.maximum, torch.logical_or),
}


@dataclass(frozen=True, eq=False, repr=False)
class Binary(Operator):
    """`left & right` or `left | right`."""

    op: str
    left: Mask
    right: Mask
    # found once, as a walk for each new node of a chain would take quadratic time
    _planes: tuple[int, int] = field(init=False)
    _held: int = field(init=False)

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        planes = max(left.planes[0], right.planes[0]), max(left.planes[1], right.planes[1])
        object.__setattr__(self, "_planes", planes)
        object.__setattr__(self, "_held", max(left.held, right.held) + int(left.held == right.held))

    @property
    def planes(self) -> tuple[int, int]:
        return self._planes

    @property
    def held(self) -> int:
        return self._held

    @property
    def left_first(self) -> bool:
        """Whether `postfix` has `left` before `right`: the operand that holds more comes first (Sethi, Ullman, 1970).

        So a walk holds at most the logarithm of the number of leaves, also of `a | (b | (c | ...))`.
        """
        return self.left.held >= self.right.held

    def of_kinds(self, *operands: Tensor) -> TileKinds:
        return _BINARY[self.op][0](*operands)

    def of_pairs(self, *operands: Tensor) -> Tensor:
        return _BINARY[self.op][1](*operands)

    def of_masks(self, *operands: Mask) -> Mask:
        left, right = operands
        same = left is self.left and right is self.right
        return self if same else Binary(self.op, left, right, label=self.label)


def postfix(mask: Mask, as_written: bool = False) -> list[Mask]:
    """All nodes of an expression, operands before the node that combines them.

    Of two operands the one comes first that `Binary.left_first` says, or, `as_written`, the left one.
    """
    found: list[Mask] = []
    todo = [mask]
    # a node before its operands, the last one first: the other way round; `isinstance` of an ABC takes far longer
    while todo:
        node = todo.pop()
        found.append(node)
        if type(node) is Not:
            todo.append(node.of)
        elif type(node) is Binary:
            todo += [node.left, node.right] if as_written or node.left_first else [node.right, node.left]
    return found[::-1]


def from_postfix(nodes: list[Mask | str], labels: list[str | None] | None = None) -> Mask:
    """The mask of leaves and names of operators, operands first, left before right; `labels` are of operators."""
    done: list[Mask] = []
    for node, label in zip(nodes, labels or [None] * len(nodes), strict=True):
        if not isinstance(node, str):
            done.append(node)
        elif node == "not":
            done.append(Not(done.pop(), label=label))
        else:
            done.append(Binary(node, done.pop(-2), done.pop(), label=label))
    return done.pop()


def fold(mask: Mask, leaf: Callable[[Mask], T], operator: Callable[..., T]) -> T:
    """The result of a mask, from `leaf(node)` of its leaves and `operator(node, *results of its operands)`."""
    done: list[T] = []
    for node in postfix(mask):
        # no name holds an operand's result longer than its use
        if type(node) is Binary:
            done.append(operator(node, done.pop(-2 if node.left_first else -1), done.pop()))
        elif type(node) is Not:
            done.append(operator(node, done.pop()))
        else:
            done.append(leaf(node))
    return done.pop()


def _leaves(mask: Mask) -> list[Mask]:
    return [node for node in postfix(mask) if type(node) is not Binary and type(node) is not Not]


def _signature(mask: Mask, as_written: bool = False) -> tuple[Mask | str, ...]:
    """Leaves and names of operators: what makes two expressions equal."""
    nodes = postfix(mask, as_written)
    return tuple(["not" if isinstance(n, Not) else n.op if isinstance(n, Binary) else n for n in nodes])


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
    check_sizes("masks to combine", [left.planes, right.planes])
    return Binary(op, left, right)


def check_sizes(names: str, planes: list[tuple[int, int]]) -> None:
    """Raise ValueError if things, in the plural, have batches or heads that are neither equal nor 1."""
    for dim, name in enumerate(("batch", "heads")):
        sizes = [p[dim] for p in planes if p[dim] != 1]
        for size in sizes[1:]:
            if size != sizes[0]:
                raise ValueError(f"{names} differ in {name}: {sizes[0]} and {size}; allowed are equal sizes or 1")
