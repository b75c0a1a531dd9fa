"""A `BlockMask` as a pytree of its four tensors, of which Python and `torch.export` find each by its name."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from anymask.block_mask import parts
from anymask.block_mask.block_mask import TENSORS, BlockMask


def put_together(tensors: Any, lengths: tuple[int, int]) -> BlockMask:
    """A mask of whatever; if of tensors, those of one mask, which what splits each would not notice.

    Raises:
        ValueError: tensors of shapes that are never together.
    """
    mask = BlockMask(*lengths, *tensors)
    # traced sizes are numbers to be, and a comparison would bind them
    if torch.compiler.is_compiling() or not all(isinstance(t, Tensor) for t in tensors):
        return mask
    if any(not isinstance(n, int) for n in (*lengths, *(n for t in mask.tensors() for n in t.shape))):
        return mask
    wrong = parts.wrong_tensor(mask.tensors(), *lengths)
    if wrong:
        raise ValueError(
            f"a BlockMask was put together from tensors that do not fit: {wrong} has shape "
            f"{tuple(getattr(mask, wrong).shape)} beside q_has_pair of shape {tuple(mask.q_has_pair.shape)}. "
            "Micro-batches of torch.distributed.pipelining split each of its tensors along dimension 0; keep it "
            "out of what they split, and cut it by block_mask[i:j]. torch.vmap returns no BlockMask"
        )
    return mask


pytree.register_pytree_node(
    BlockMask,
    lambda m: (m.tensors(), (m.q_len, m.kv_len)),
    put_together,
    serialized_type_name="anymask.BlockMask",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda m: (
        [(pytree.GetAttrKey(name), t) for name, t in zip(TENSORS, m.tensors(), strict=True)],
        (m.q_len, m.kv_len),
    ),
)
