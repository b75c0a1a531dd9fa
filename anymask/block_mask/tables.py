"""Kinds of tiles as a table, from the lists of a `BlockMask`."""

import torch
from torch import Tensor

from anymask.block_mask.block_mask import BlockMask
from anymask.shapes import TileKinds
from anymask.tiles import EMPTY, FULL, PARTIAL, tiles_over


def tile_tables(block_mask: BlockMask, first: int, tile_rows: int) -> tuple[TileKinds, Tensor]:
    """Kinds, int8, and places in `rows.words`, int64, of tiles: `[batch, heads, tile_rows, kv_tiles]` each.

    The rows are q tiles from `first` on, past the end empty; a tile that is not partial has place 0.
    """
    rows, q_tiles = block_mask.rows, tiles_over(block_mask.q_len)
    shape = (block_mask.batch, block_mask.heads, tile_rows, tiles_over(block_mask.kv_len))
    kinds = torch.full(shape, EMPTY, dtype=torch.int8, device=block_mask.device)
    number = torch.zeros(shape, dtype=torch.int64, device=block_mask.device)
    planes = shape[0] * shape[1]
    for kind, tiles in ((FULL, rows.full_tiles), (PARTIAL, rows.partial_tiles)):
        tile_row = rows.tile_row_numbers(kind)
        plane, tile_row = tile_row // max(1, q_tiles), tile_row % max(1, q_tiles) - first
        inside = ((tile_row >= 0) & (tile_row < tile_rows)).nonzero()[:, 0]
        at = plane[inside], tile_row[inside], tiles[inside].long()
        kinds.view(planes, tile_rows, shape[3])[at] = kind
        if kind == PARTIAL:
            number.view(planes, tile_rows, shape[3])[at] = inside
    return kinds, number
