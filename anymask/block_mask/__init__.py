"""How a mask is stored: `BlockMask`, lists of tiles and the bits of the partial ones. It needs torch alone."""

from anymask.block_mask.block_mask import BlockMask as BlockMask
from anymask.block_mask.block_mask import Stats as Stats
from anymask.block_mask.buffer import MaskBuffer as MaskBuffer
from anymask.block_mask.tile_lists import TileLists as TileLists
from anymask.block_mask.tree import put_together as _put_together  # noqa: F401
