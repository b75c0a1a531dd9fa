"""FlashAttention, forward and backward, under any mask."""

from anymask import formats as formats
from anymask import viz as viz
from anymask.api import Explanation as Explanation
from anymask.api import attention as attention
from anymask.api import explain as explain
from anymask.block_mask import BlockMask as BlockMask
from anymask.drop_in import flash_attention_custom_mask as flash_attention_custom_mask
from anymask.drop_in import scaled_dot_product_attention as scaled_dot_product_attention
from anymask.mask import Mask as Mask
from anymask.mask import block_diffusion as block_diffusion
from anymask.mask import block_sparse as block_sparse
from anymask.mask import causal as causal
from anymask.mask import causal_lower_right as causal_lower_right
from anymask.mask import chunked as chunked
from anymask.mask import dilated as dilated
from anymask.mask import document as document
from anymask.mask import document_window as document_window
from anymask.mask import from_dense as from_dense
from anymask.mask import from_function as from_function
from anymask.mask import global_tokens as global_tokens
from anymask.mask import key_padding as key_padding
from anymask.mask import neighbourhood_2d as neighbourhood_2d
from anymask.mask import neighbourhood_3d as neighbourhood_3d
from anymask.mask import prefix_lm as prefix_lm
from anymask.mask import random_blocks as random_blocks
from anymask.mask import shared_prefix as shared_prefix
from anymask.mask import shared_question as shared_question
from anymask.mask import sliding_window as sliding_window
from anymask.mask import spans as spans
from anymask.mask import strided as strided
from anymask.mask import tree as tree
from anymask.packing import extend as extend
from anymask.packing import pack as pack
from anymask.packing import slice_queries as slice_queries
from anymask.packing.cache import forget as forget
from anymask.scores import Bias as Bias
from anymask.scores import alibi as alibi
from anymask.scores import from_score_mod as from_score_mod
from anymask.scores import low_rank as low_rank
from anymask.scores import relative as relative
from anymask.scores import relative_2d as relative_2d
from anymask.scores import relative_buckets as relative_buckets
from anymask.varlen import attention_varlen as attention_varlen

__version__ = "0.1.0"

__all__ = [
    "Bias",
    "BlockMask",
    "Explanation",
    "Mask",
    "alibi",
    "attention",
    "attention_varlen",
    "block_diffusion",
    "block_sparse",
    "causal",
    "causal_lower_right",
    "chunked",
    "dilated",
    "document",
    "document_window",
    "explain",
    "extend",
    "flash_attention_custom_mask",
    "forget",
    "formats",
    "from_dense",
    "from_function",
    "from_score_mod",
    "global_tokens",
    "key_padding",
    "low_rank",
    "neighbourhood_2d",
    "neighbourhood_3d",
    "pack",
    "prefix_lm",
    "random_blocks",
    "relative",
    "relative_2d",
    "relative_buckets",
    "scaled_dot_product_attention",
    "shared_prefix",
    "shared_question",
    "slice_queries",
    "sliding_window",
    "spans",
    "strided",
    "tree",
    "viz",
]
