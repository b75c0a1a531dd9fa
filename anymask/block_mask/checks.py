"""Whether two views can be those of one mask, and whether `torch.vmap` has made one that has none."""

import torch
from torch import Tensor

from anymask.block_mask.tile_lists import TileLists
from anymask.tiles import FULL, PARTIAL, tiles_over
from anymask.vmap import is_mapped_tensor


def contradiction_of(rows: TileLists, cols: TileLists, q_len: int, kv_len: int) -> str | None:
    """The first tensor, such as `rows.order`, that contradicts the others; None if the lists are a mask's.

    Reads the lists and not the words.
    """
    planes, lengths = tuple(rows.order.shape[:2]), (q_len, kv_len)
    for view, lists, (length, other) in (("rows", rows, lengths), ("cols", cols, lengths[::-1])):
        wrong = lists.wrong_value(planes, length, other)
        if wrong:
            return f"{view}.{wrong}"
    q_tiles, kv_tiles = map(tiles_over, lengths)
    places = []
    for kind, name in ((FULL, "full"), (PARTIAL, "partial")):
        by_row = rows.tile_row_numbers(kind) * kv_tiles + _tiles(rows, kind)
        column, q_tile = cols.tile_row_numbers(kind), _tiles(cols, kind)
        by_column = (column // max(1, kv_tiles) * q_tiles + q_tile) * kv_tiles + column % max(1, kv_tiles)
        places.append(by_row)
        for view, numbers in (("rows", by_row), ("cols", column * q_tiles + q_tile)):
            if (numbers.diff() <= 0).any():
                return f"{view}.{name}_tiles"
        if not torch.equal(by_column.sort().values, by_row):
            return f"cols.{name}_tiles"
    return "rows.partial_tiles" if (torch.cat(places).sort().values.diff() == 0).any() else None


def is_mapped(q_has_pair: Tensor) -> bool:
    """Whether a mask was packed inside `torch.vmap`: its lists are those of all slices."""
    return not torch.compiler.is_compiling() and is_mapped_tensor(q_has_pair)


def refuse_mapped(q_has_pair: Tensor) -> None:
    """Raise NotImplementedError for such a mask, which nothing but attention knows to read."""
    if is_mapped(q_has_pair):
        raise NotImplementedError(
            "a BlockMask packed inside torch.vmap has the tiles of all slices; allowed is attention under it there"
        )


def _tiles(lists: TileLists, kind: int) -> Tensor:
    return lists.full_tiles if kind == FULL else lists.partial_tiles
