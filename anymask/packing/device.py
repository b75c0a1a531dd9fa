"""Where a mask is packed: in torch, or by the kernels that are its twin."""

from typing import Protocol, cast

import torch
from torch import Tensor

from anymask.block_mask import BlockMask
from anymask.mask import Mask
from anymask.mask.expr import TileGrid
from anymask.shapes import TileBits, TileKinds, Words


class Implementation(Protocol):
    """The functions of `definition` that have a twin on a GPU."""

    def pack_mask(self, mask: Mask, grid: TileGrid) -> BlockMask:
        """The `BlockMask` of a mask on the device of `grid`."""

    def words_of_tiles(self, tiles: TileBits, places: Tensor, grid: TileGrid, words: Words, kinds: Tensor) -> None:
        """Write the words and the kinds of tiles."""

    def lists_from_tiles(self, kinds: TileKinds, words: Words, grid: TileGrid) -> BlockMask:
        """The `BlockMask` of tile kinds and of the words of the partial tiles in row order."""


def implementation(device: torch.device) -> Implementation:
    """What packs tensors of a device."""
    if device.type == "cuda":
        from anymask.packing import triton

        return cast(Implementation, triton)
    from anymask.packing import definition

    return cast(Implementation, definition)
