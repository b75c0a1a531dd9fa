"""Where the lists of a mask lie in the one tensor that holds them all, and both views of the mask as parts of it.

The tensor is int32, and every part starts at a multiple of 16 bytes:

    full_offsets and partial_offsets of rows, full_offsets and partial_offsets of columns, order of rows, of columns,
    partial_tiles of rows, of columns, full_tiles of rows, of columns

The last part has no padding behind it: so the size of the tensor says how many full tiles there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from anymask.block_mask.tile_lists import TileLists
from anymask.tiles import TILE, WORDS, tiles_over
from anymask.vmap import ALL, HAS_PAIR, ONE_PLANE

# of each view: its full_offsets, full_tiles, partial_offsets, partial_tiles and order among the parts
PLACES = {"rows": (0, 8, 1, 6, 4), "cols": (2, 9, 3, 7, 5)}


def padded(n: int) -> int:
    """Up to the next multiple of 16 bytes of int32."""
    return n + -n % 4


def sizes_of(n_rows: int, n_cols: int, n_partial: int, n_full: int) -> list[int]:
    """Integers of each part, for as many rows and columns of tiles of all planes, and as many tiles."""
    offsets = [n_rows + 1, n_rows + 1, n_cols + 1, n_cols + 1]
    return [*offsets, n_rows, n_cols, n_partial, n_partial, n_full, n_full]


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Where each part starts, and last the size of the whole tensor."""
    *starts, _ = accumulate(map(padded, sizes), initial=0)
    return [*starts, starts[-1] + sizes[-1]]


def full_tiles_in(numel: int, n_rows: int, n_cols: int, n_partial: int) -> int:
    """How many full tiles a tensor of this size lists; negative if no mask's has it."""
    rest = numel - starts_of(sizes_of(n_rows, n_cols, n_partial, 0))[-1]
    # `padded(n) + n`
    n = rest + 4 * (-rest // 8)
    return n if padded(n) + n == rest else -1


def view_of(name: str, tensors: tuple[Tensor, Tensor, Tensor, Tensor], q_len: int, kv_len: int) -> TileLists:
    """The view "rows" or "cols" of the tensors of a `BlockMask`."""
    lists, words, q_has_pair, kv_has_pair = tensors
    batch, heads = q_has_pair.shape[:2]
    q_tiles, kv_tiles = tiles_over(q_len), tiles_over(kv_len)
    n_rows, n_cols, n_partial = batch * heads * q_tiles, batch * heads * kv_tiles, words.shape[1]
    sizes = sizes_of(n_rows, n_cols, n_partial, full_tiles_in(lists.shape[0], n_rows, n_cols, n_partial))
    starts = starts_of(sizes)
    # of all ways to a part of a tensor the fastest
    full_offsets, full_tiles, partial_offsets, partial_tiles, order = [
        lists[starts[at] : starts[at] + sizes[at]] for at in PLACES[name]
    ]
    by_rows = name == "rows"
    return TileLists(
        full_offsets,
        full_tiles,
        partial_offsets,
        partial_tiles,
        words[0 if by_rows else 1],
        order.view(batch, heads, q_tiles if by_rows else kv_tiles),
        (q_has_pair if by_rows else kv_has_pair).view(-1),
    )


def said_by_first(tensors: Sequence[Any]) -> int:
    """How many of the first tensors of a mask say what all do: see `vmap.completed`.

    All, where a size is no number yet, or `torch.vmap` maps the last two.
    """
    sizes = []
    for t in tensors[HAS_PAIR:]:
        if not isinstance(t, Tensor) or is_functorch_wrapped_tensor(t):
            return ALL
        sizes.append(tuple(t.shape))
    if any(type(n) is not int for size in sizes for n in size) or sizes[1][2:] != (0,):
        return ALL
    return ONE_PLANE if sizes[0] == sizes[1] == (1, 1, 0) else ALL - 1


def joined(rows: TileLists, cols: TileLists, words: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a `BlockMask` of two views; `words` are those of both, if they lie together already."""
    parts: list[Tensor] = [rows.order] * 10
    for lists, places in ((rows, PLACES["rows"]), (cols, PLACES["cols"])):
        of_view = lists.full_offsets, lists.full_tiles, lists.partial_offsets, lists.partial_tiles, lists.order
        for at, part in zip(places, of_view, strict=True):
            parts[at] = part.flatten()
    zeros, pieces = rows.order.new_zeros(3), []
    for part in parts[:-1]:
        pieces += [part, zeros[: -part.numel() % 4]]
    planes = rows.order.shape[:2]
    q_has_pair, kv_has_pair = (
        lists.has_pair.view(*planes, lists.has_pair.numel() // max(1, planes.numel())) for lists in (rows, cols)
    )
    words = torch.stack([rows.words, cols.words]) if words is None else words
    return torch.cat([*pieces, parts[-1]]), words, q_has_pair, kv_has_pair


def wrong_tensor(tensors: Sequence[Tensor], q_len: int, kv_len: int) -> str | None:
    """The first of the tensors of a mask whose shape is not that of one beside the others, or None."""
    lists, words, q_has_pair, kv_has_pair = tensors
    planes = tuple(q_has_pair.shape[:2])
    for name, t, length in (("q_has_pair", q_has_pair, q_len), ("kv_has_pair", kv_has_pair, kv_len)):
        if t.dim() != 3 or tuple(t.shape[:2]) != planes or t.shape[2] not in (0, length):
            return name
    if words.dim() != 4 or (words.shape[0], *words.shape[2:]) != (2, TILE, WORDS):
        return "words"
    n_rows, n_cols = (planes[0] * planes[1] * tiles_over(length) for length in (q_len, kv_len))
    if lists.dim() != 1 or full_tiles_in(lists.shape[0], n_rows, n_cols, words.shape[1]) < 0:
        return "lists"
    return None
