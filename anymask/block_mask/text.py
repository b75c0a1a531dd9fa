"""Tiles as text, one character each."""

import math

import torch
from torch import Tensor

from anymask.tiles import EMPTY, FULL, PARTIAL

GLYPHS = {EMPTY: "·", PARTIAL: "░", FULL: "█"}
NAMES = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}
LEGEND = "  ".join(f"{GLYPHS[kind]} {NAMES[kind]}" for kind in (FULL, PARTIAL, EMPTY))


def draw(kinds: Tensor, width: int = 64) -> str:
    """Tiles `[q_tiles, kv_tiles]`, of 0 empty, 1 partial and 2 full; lines are query tiles.

    A plane of more than `width` tiles along either side is drawn with `scale` tiles a side in one character, which is
    full (empty) if all of them are.
    """
    lines: list[str] = []
    step = scale(kinds, width)
    for rows in torch.split(kinds, step) if kinds.numel() else ():
        cells = [set(cell.flatten().tolist()) for cell in torch.split(rows, step, dim=1)]
        lines.append(" ".join(GLYPHS[found.pop() if len(found) == 1 else PARTIAL] for found in cells))
    return "\n".join(lines)


def scale(kinds: Tensor, width: int = 64) -> int:
    """Tiles along each side of one character of `draw`."""
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"width is {width!r} of type {type(width).__name__}; allowed is an int")
    if width < 1:
        raise ValueError(f"width is {width}; allowed are 1 and more characters")
    return max(1, math.ceil(max(kinds.shape) / width))
