"""Kinds of tiles as a table, from the lists of a `BlockMask`."""

import torch
from torch import Tensor

from anymask.block_mask.block_mask import BlockMask
from anymask.shapes import TileKinds
from anymask.tiles import EMPTY, FULL, PARTIAL, tiles_over


def tile_tables(block_mask: BlockMask, first: int, lines: int) -> tuple[TileKinds, Tensor]:
    """Kinds, int8, and places in `rows.words`, int64, of the tiles of `lines` lines: `[batch, heads, lines, kv_tiles]`.

    Lines are q tiles from `first` on, past the end empty; a tile that is not partial has place 0.
    """
    rows, q_tiles = block_mask.rows, tiles_over(block_mask.q_len)
    shape = (block_mask.batch, block_mask.heads, lines, tiles_over(block_mask.kv_len))
    kinds = torch.full(shape, EMPTY, dtype=torch.int8, device=block_mask.device)
    number = torch.zeros(shape, dtype=torch.int64, device=block_mask.device)
    planes = shape[0] * shape[1]
    for kind, tiles in ((FULL, rows.full_tiles), (PARTIAL, rows.partial_tiles)):
        line = rows.line_numbers(kind)
        plane, line = line // max(1, q_tiles), line % max(1, q_tiles) - first
        inside = ((line >= 0) & (line < lines)).nonzero()[:, 0]
        at = plane[inside], line[inside], tiles[inside].long()
        kinds.view(planes, lines, shape[3])[at] = kind
        if kind == PARTIAL:
            number.view(planes, lines, shape[3])[at] = inside
    return kinds, number
