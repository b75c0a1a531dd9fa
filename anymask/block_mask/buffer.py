"""A mask as part of a module."""

from torch import Tensor, nn

from anymask.block_mask.block_mask import TENSORS, BlockMask


class MaskBuffer(nn.Module):
    """Holds a `BlockMask` so that it moves with a module: its tensors are buffers, and `mask` puts them together.

    `self.attend = MaskBuffer(block_mask)`, then `attention(q, k, v, self.attend.mask)`; `.to`, `.cuda`, `deepcopy` and
    `torch.compile` do what they do with buffers. The buffers are not persistent: no `state_dict` holds them. DDP sends
    buffers of the first rank to the others, so under DDP it is for a mask that all ranks share.

    Args:
        block_mask: the mask.

    Raises:
        TypeError: no `BlockMask`.
    """

    def __init__(self, block_mask: BlockMask) -> None:
        super().__init__()
        if not isinstance(block_mask, BlockMask):
            raise TypeError(f"block_mask is a {type(block_mask).__name__}; allowed is a BlockMask, which pack makes")
        self.q_len, self.kv_len = block_mask.q_len, block_mask.kv_len
        for name, t in zip(TENSORS, block_mask.tensors(), strict=True):
            self.register_buffer(name, t, persistent=False)

    @property
    def mask(self) -> BlockMask:
        """The mask, where the module is now."""
        tensors: list[Tensor] = [getattr(self, name) for name in TENSORS]
        return BlockMask(self.q_len, self.kv_len, *tensors)
