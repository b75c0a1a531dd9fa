"""FlashAttention, forward and backward, under any mask."""

from anymask.api import Explanation as Explanation
from anymask.api import attention as attention
from anymask.api import explain as explain
from anymask.api import flash_attention_custom_mask as flash_attention_custom_mask
from anymask.api import scaled_dot_product_attention as scaled_dot_product_attention
from anymask.mask import BlockMask as BlockMask
from anymask.mask import Mask as Mask
from anymask.mask import causal as causal
from anymask.mask import causal_lower_right as causal_lower_right
from anymask.mask import from_dense as from_dense
from anymask.mask import pack as pack
from anymask.mask import sliding_window as sliding_window

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "Explanation",
    "Mask",
    "attention",
    "causal",
    "causal_lower_right",
    "explain",
    "flash_attention_custom_mask",
    "from_dense",
    "pack",
    "scaled_dot_product_attention",
    "sliding_window",
]
