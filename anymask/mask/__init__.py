"""What a mask means: `Mask`, an expression, and its builders. It needs torch alone."""

from anymask.mask.builders import block_diffusion as block_diffusion
from anymask.mask.builders import block_sparse as block_sparse
from anymask.mask.builders import causal as causal
from anymask.mask.builders import causal_lower_right as causal_lower_right
from anymask.mask.builders import chunked as chunked
from anymask.mask.builders import dilated as dilated
from anymask.mask.builders import document as document
from anymask.mask.builders import document_window as document_window
from anymask.mask.builders import from_dense as from_dense
from anymask.mask.builders import from_function as from_function
from anymask.mask.builders import global_tokens as global_tokens
from anymask.mask.builders import key_padding as key_padding
from anymask.mask.builders import neighbourhood_2d as neighbourhood_2d
from anymask.mask.builders import neighbourhood_3d as neighbourhood_3d
from anymask.mask.builders import prefix_lm as prefix_lm
from anymask.mask.builders import random_blocks as random_blocks
from anymask.mask.builders import shared_prefix as shared_prefix
from anymask.mask.builders import shared_question as shared_question
from anymask.mask.builders import sliding_window as sliding_window
from anymask.mask.builders import spans as spans
from anymask.mask.builders import strided as strided
from anymask.mask.builders import tree as tree
from anymask.mask.expr import Mask as Mask
from anymask.mask.invert import install as _install

_install()
