"""Masks by an expression of names, `documents & ~(drawn_tree | row)`: each with its meaning, all from one seed.

A name alone is a mask of `MASKS` or `BUILDERS` as it is. Meanings are combined as tensors, apart from the library.
"""

from __future__ import annotations

import ast
import random
from collections import ChainMap
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from anymask import Mask, from_dense
from anymask.testing.builders import BUILDERS, SQUARE
from anymask.testing.masks import MASKS, NamedMask

# every named mask: those of tests, and every builder
KINDS: ChainMap[str, Callable[..., NamedMask]] = ChainMap(MASKS, BUILDERS)
# between the seeds of two masks of an expression
STEP = 7919


def make_mask(
    expression: str,
    batch: int,
    q_heads: int,
    q_len: int,
    kv_len: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> NamedMask:
    """The mask of an expression, and its meaning as a bool tensor broadcastable to `[batch, q_heads, q_len, kv_len]`.

    Raises:
        ValueError: not an expression of known names by `&`, `|` and `~`, or one for equal lengths with others.
    """
    sizes = batch, q_heads, q_len, kv_len
    tree = _parse(expression)
    if isinstance(tree, ast.Name):
        return KINDS[tree.id](*sizes, seed, device)
    seeds = iter(range(seed, seed + STEP * len(expression), STEP))

    def made(node: ast.expr) -> tuple[Mask, torch.Tensor]:
        if isinstance(node, ast.Name):
            mask, dense = KINDS[node.id](*sizes, next(seeds), device)
            return (mask if isinstance(mask, Mask) else from_dense(dense)), dense
        if isinstance(node, ast.UnaryOp):
            mask, dense = made(node.operand)
            return ~mask, ~dense
        assert isinstance(node, ast.BinOp)
        (a, x), (b, y) = made(node.left), made(node.right)
        return (a & b, x & y) if isinstance(node.op, ast.BitAnd) else (a | b, x | y)

    return made(tree)


def is_square(expression: str) -> bool:
    """Whether it needs as many queries as keys."""
    return not SQUARE.isdisjoint(names_of(expression))


def names_of(expression: str) -> list[str]:
    """The names in an expression."""
    return [node.id for node in ast.walk(_parse(expression)) if isinstance(node, ast.Name)]


def combine(names: Sequence[str], rng: random.Random) -> str:
    """An expression of all `names`, in order, by random `&`, `|`, `~` and brackets."""
    parts = list(names)
    while len(parts) > 1:
        at = rng.randrange(len(parts) - 1)
        parts[at : at + 2] = [f"({parts[at]} {rng.choice('&|')} {parts[at + 1]})"]
        if rng.random() < 0.25:
            parts[at] = f"~{parts[at]}"
    return parts[0] if len(names) > 1 else rng.choice(("", "~")) + parts[0]


@lru_cache(maxsize=4096)
def _parse(expression: str) -> ast.expr:
    allowed = "allowed are names of masks combined by &, | and ~"
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"mask is {expression!r}; {allowed}") from error
    known = ast.Name, ast.Load, ast.BinOp, ast.BitAnd, ast.BitOr, ast.UnaryOp, ast.Invert
    for node in ast.walk(tree):
        if not isinstance(node, known):
            raise ValueError(f"mask is {expression!r}, with a {type(node).__name__}; {allowed}")
        if isinstance(node, ast.Name) and node.id not in KINDS:
            raise ValueError(f"mask is {expression!r}; {node.id} is no name of a mask: {', '.join(KINDS)}")
    return tree
