"""The one lowered form of a mask, integers and tensors: read by the operator's schema, by torch and by kernels.

What a kernel is compiled for, `nodes`, is apart from what it reads as arguments, `numbers` and `tensors`. So a window
of 512 and one of 513 are the same graph and the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from anymask.mask.expr import PROGRAM, Binary, Mask, Not, TileGrid, from_postfix, postfix
from anymask.vmap import is_mapped_tensor

# farther than any two positions are, and a sum of two such fits int64
FAR = 2**61
# codes of operators; those of leaves follow
OPERATORS = ("not", "and", "or")
NOT, AND, OR = range(len(OPERATORS))
NO_TENSOR = -1


class Parts(NamedTuple):
    """What a leaf consists of."""

    numbers: tuple[int, ...] = ()
    # at most three; None keeps the place of one that is not there
    tensors: tuple[Tensor | None, ...] = ()
    # what a kernel is compiled for
    flag: bool = False


class Leaf(Mask):
    """A mask without operands. A new one is a class, and in `packing/triton/kernels/program.py` two jit functions."""

    # number of the class in a `Node`, in the order of definition
    code: ClassVar[int]
    classes: ClassVar[list[type[Leaf]]] = []

    def __init_subclass__(cls) -> None:
        cls.code = len(OPERATORS) + len(Leaf.classes)
        Leaf.classes.append(cls)

    def lower(self) -> Parts | None:
        """The leaf as numbers and tensors; None if only Python can evaluate it."""
        return None

    @classmethod
    def read(cls, parts: Parts) -> Leaf:
        """Inverse of `lower`."""
        raise NotImplementedError(f"{cls.__name__} is never lowered")


# no NamedTuple: as an element of a constant, Triton 3.6 takes the names of its fields away; compared by identity, as
# each launch of a kernel hashes them
@dataclass(frozen=True, eq=False)
class Node:
    """A leaf, or an operator of the results before it."""

    code: int
    # of its numbers in `Program.numbers` the first
    number: int
    flag: int
    # places in `Program.tensors`, or NO_TENSOR
    first: int
    second: int
    third: int


NODE_WIDTH = len(fields(Node))


class Program(NamedTuple):
    """A mask: `nodes` in the order of `expr.postfix`, NODE_WIDTH integers each, see `Node`; `numbers` fit int64."""

    nodes: tuple[int, ...]
    numbers: tuple[int, ...]
    tensors: tuple[Tensor, ...]


def program_of(mask: Mask) -> Program | None:
    """The mask lowered; None if it calls a function, which only Python can.

    Raises:
        ValueError: the same inside `torch.compile`, where nothing but a program can be packed.
    """
    if torch.compiler.is_compiling():
        return _lowered(mask)
    # a mask never changes, though what its tensors hold may
    found: Program | None = vars(mask).get(PROGRAM)
    if found is None:
        found = _lowered(mask)
        if found is not None:
            vars(mask)[PROGRAM] = found
    return found


def _lowered(mask: Mask) -> Program | None:
    nodes: list[int] = []
    numbers: list[int] = []
    tensors: list[Tensor] = []
    for node in postfix(mask):
        if type(node) is Not or type(node) is Binary:
            code = NOT if type(node) is Not else OPERATORS.index(cast(Binary, node).op)
            nodes += [code, len(numbers), 0, NO_TENSOR, NO_TENSOR, NO_TENSOR]
            continue
        leaf = cast(Leaf, node)
        parts = leaf.lower()
        if parts is None:
            if torch.compiler.is_compiling():
                raise ValueError(
                    "mask is a from_function mask inside torch.compile; allowed is its BlockMask: pack it outside"
                )
            return None
        places = [NO_TENSOR if t is None else _place(t, tensors) for t in parts.tensors]
        nodes += [leaf.code, len(numbers), int(parts.flag), *places, *[NO_TENSOR] * (3 - len(places))]
        numbers += parts.numbers
    return Program(tuple(nodes), tuple(numbers), tuple(tensors))


def _place(t: Tensor, tensors: list[Tensor]) -> int:
    """Where `t` is in `tensors`, to which it is added if it is new: documents compare their ids with themselves."""
    for i, known in enumerate(tensors):
        if known is t:
            return i
    tensors.append(t)
    return len(tensors) - 1


def read_nodes(flat: Sequence[int]) -> list[Node]:
    """`Program.nodes` as records."""
    return [Node(*flat[at : at + NODE_WIDTH]) for at in range(0, len(flat), NODE_WIDTH)]


def mask_from_program(nodes: Sequence[int], numbers: Sequence[int], tensors: Sequence[Tensor]) -> Mask:
    """Inverse of `program_of`."""
    records = read_nodes(nodes)
    ends = [node.number for node in records[1:]] + [len(numbers)]
    found: list[Mask | str] = []
    for node, end in zip(records, ends, strict=True):
        if node.code < len(OPERATORS):
            found.append(OPERATORS[node.code])
            continue
        leaf = Leaf.classes[node.code - len(OPERATORS)]
        places = (node.first, node.second, node.third)
        parts = tuple(None if place == NO_TENSOR else tensors[place] for place in places)
        found.append(leaf.read(Parts(tuple(numbers[node.number : end]), parts, bool(node.flag))))
    return from_postfix(found)


def is_mapped(mask: Mask) -> bool:
    """Whether `torch.vmap` maps a tensor of the mask, at whatever level; what a function reads is not known."""
    program = program_of(mask) if torch._C._are_functorch_transforms_active() else None
    return program is not None and any(map(is_mapped_tensor, program.tensors))


def refuse_mapped_functions(mask: Mask, grid: TileGrid) -> None:
    """Raise NotImplementedError if a function reads what `torch.vmap` maps, which the value of one pair shows."""
    if not torch._C._are_functorch_transforms_active() or not (grid.q_len and grid.kv_len):
        return
    first = torch.zeros(1, 1, dtype=torch.int64, device=grid.device)
    if program_of(mask) is None and is_mapped_tensor(mask.evaluate(grid, first, first, first, first)):
        raise NotImplementedError(
            "mask is a from_function mask whose function reads a tensor that torch.vmap maps; allowed is a mask by "
            "name, or from_dense"
        )


def near(n: int | None, unbounded: int = 0) -> int:
    """`n` as int64: a number beyond all positions becomes another such number, None becomes `unbounded`."""
    if n is None:
        return unbounded
    if isinstance(n, int):
        return max(-FAR, min(n, FAR))
    # a symbol of a compiled function, of which `min` would ask how large it is
    return cast(int, torch.sym_max(torch.sym_min(n, FAR), -FAR))
