"""What a mask means (`Mask`), how it is stored (`BlockMask`), and the way from one to the other (`pack`)."""

from anymask.mask.block_mask import BlockMask as BlockMask
from anymask.mask.block_mask import TileLists as TileLists
from anymask.mask.builders import causal as causal
from anymask.mask.builders import causal_lower_right as causal_lower_right
from anymask.mask.builders import from_dense as from_dense
from anymask.mask.builders import sliding_window as sliding_window
from anymask.mask.expr import Mask as Mask
from anymask.mask.pack import pack as pack
