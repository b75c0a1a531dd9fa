"""FlashAttention-4 as a rival: its masks as device functions, and its lists of blocks. Needs `flash-attn-4`.

A mask is given in the best way that it has: built in for no mask, causal and a sliding window; two bounds for each
query where its keys are a range, as in documents; else the tensor itself.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from flash_attn.cute import flash_attn_func, utils
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from torch import Tensor

# its tiles on Hopper, (queries, keys): forward at head_dim up to 64, else; backward
FORWARD_SMALL, FORWARD, BACKWARD = (192, 128), (128, 128), (128, 128)


@cute.jit
def in_range(batch, head, q, kv, seqlen_info, aux_tensors):  # noqa: ANN001, ANN201
    """`first[q] <= kv < end[q]` of int32 `[length]` tensors."""
    first = utils.scalar_to_ssa(aux_tensors[0][q[0]], cutlass.Int32)
    end = utils.scalar_to_ssa(aux_tensors[1][q[0]], cutlass.Int32)
    return (kv >= first) & (kv < end)


@cute.jit
def is_set(batch, head, q, kv, seqlen_info, aux_tensors):  # noqa: ANN001, ANN201
    """Whether the byte of the pair is not 0, uint8 `[length, length]`: faster here than one bit a pair."""
    byte = cutlass.Int32(aux_tensors[0][q[0], kv[0]])
    return utils.scalar_to_ssa(byte, cutlass.Int32) != utils.scalar_to_ssa(0, cutlass.Int32)


def options(mask: Tensor | None, head_dim: int) -> tuple[dict[str, Any], str]:
    """Arguments of `flash_attn_func` for a bool `[length, length]` mask, and how that was done."""
    if mask is None:
        return {}, "no mask"
    at = torch.arange(mask.shape[0], device=mask.device)
    first, end = mask.byte().argmax(-1), mask.shape[0] - mask.flip(-1).byte().argmax(-1)
    count = mask.sum(-1)
    if bool((end - first == count).all()) and bool((count > 0).all()):
        width = int((at - first).max())
        if torch.equal(end, at + 1) and torch.equal(first, (at - width).clamp(min=0)):
            if width == mask.shape[0] - 1:
                return {"causal": True}, "causal=True"
            return {"window_size": (width, 0)}, "window_size"
        how, aux = "a range of keys for each query", [first.int(), end.int()]
        mod = in_range
    else:
        how, aux, mod = "the dense tensor", [mask.view(torch.uint8)], is_set
    lists = {
        "block_sparse_tensors": _lists(mask, FORWARD_SMALL if head_dim <= 64 else FORWARD, False),
        "block_sparse_tensors_bwd": _lists(mask, BACKWARD, True),
    }
    return {"mask_mod": mod, "aux_tensors": aux, **lists}, f"mask_mod of {how}, block lists"


def _lists(mask: Tensor, block: tuple[int, int], transposed: bool) -> BlockSparseTensorsTorch:
    """For each block of queries (or of keys) the partial and the full blocks of the others."""
    sizes = [-(-n // size) for n, size in zip(mask.shape, block, strict=True)]
    some, every = (torch.empty(sizes, dtype=torch.bool, device=mask.device) for _ in range(2))
    for line, rows in enumerate(mask.split(block[0])):
        missing = (0, sizes[1] * block[1] - mask.shape[1])
        some[line] = torch.nn.functional.pad(rows, missing).view(-1, sizes[1], block[1]).any(2).any(0)
        every[line] = torch.nn.functional.pad(rows, missing, value=True).view(-1, sizes[1], block[1]).all(2).all(0)
    tensors = []
    for kind in (some & ~every, every):
        flags = (kind.T if transposed else kind)[None, None].contiguous()
        order = flags.byte().argsort(dim=-1, descending=True, stable=True)
        tensors += [flags.sum(-1, dtype=torch.int32), order.int()]
    return BlockSparseTensorsTorch(
        mask_block_cnt=tensors[0],
        mask_block_idx=tensors[1],
        full_block_cnt=tensors[2],
        full_block_idx=tensors[3],
        block_size=block,
    )


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, arguments: dict[str, Any]) -> Tensor:
    """Attention over `[batch, heads, length, head_dim]`; its own order is `[batch, length, heads, head_dim]`."""
    swapped = (t.transpose(1, 2) for t in (q, k, v))
    out: Tensor = flash_attn_func(*swapped, softmax_scale=scale, **arguments)[0]
    return out.transpose(1, 2)
