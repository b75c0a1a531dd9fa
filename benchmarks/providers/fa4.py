"""FlashAttention-4 as a baseline: its masks as device functions, and its lists of blocks. Needs `flash-attn-4`.

A mask is given in the best way that it has: built in for no mask, causal and a sliding window; two bounds for each
query where its keys are a range, as in documents; else the tensor itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from flash_attn.cute import flash_attn_func, utils
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_bwd
from torch import Tensor

from benchmarks.cases import Inputs
from benchmarks.providers import Prepared, Unsupported, mask_of

# its tiles on Hopper, (queries, keys): forward at head_dim up to 64, else; backward
FORWARD_SMALL, FORWARD, BACKWARD = (192, 128), (128, 128), (128, 128)
# it asks mask functions about positions up to the end of a tile, beyond the length: a multiple of all sizes of tiles
WHOLE_TILES = 384


@cute.jit
def in_range(batch, head, q, kv, seqlen_info, aux_tensors):  # noqa: ANN001, ANN201
    """`first[q] <= kv < end[q]` of int32 `[length]` tensors."""
    first = utils.scalar_to_ssa(aux_tensors[0][q[0]], cutlass.Int32)
    end = utils.scalar_to_ssa(aux_tensors[1][q[0]], cutlass.Int32)
    return (kv >= first) & (kv < end)


@cute.jit
def is_set(batch, head, q, kv, seqlen_info, aux_tensors):  # noqa: ANN001, ANN201
    """Whether the byte of the pair is not 0, uint8 `[length, length]`."""
    byte = cutlass.Int32(aux_tensors[0][q[0], kv[0]])
    return utils.scalar_to_ssa(byte, cutlass.Int32) != utils.scalar_to_ssa(0, cutlass.Int32)


@cute.jit
def bit_is_set_transposed(batch, head, q, kv, seqlen_info, aux_tensors):  # noqa: ANN001, ANN201
    """Bit `q % 32` of word `q // 32` of row kv of the transposed mask, int32 `[length, words]`."""
    bit = (aux_tensors[0][kv[0], q[0] >> 5] >> (q[0] & 31)) & 1
    return utils.scalar_to_ssa(bit, cutlass.Int32) != utils.scalar_to_ssa(0, cutlass.Int32)


def _padded(mask: Tensor) -> Tensor:
    return torch.nn.functional.pad(mask, (0, -mask.shape[1] % WHOLE_TILES, 0, -mask.shape[0] % WHOLE_TILES))


def _bits(mask: Tensor) -> Tensor:
    """int32 words of 32 pairs of a row, the lowest bit first, to the end of the tiles."""
    mask = _padded(mask)
    shift = torch.arange(32, device=mask.device, dtype=torch.int32)
    # a sum of distinct bits wraps to the word with those bits
    return torch.cat([(part.view(len(part), -1, 32).int() << shift).sum(-1) for part in mask.split(1024)]).int()


def attention(inputs: Inputs, base: str, variant: str) -> Prepared:
    """`flash_attn_func`, whose own order is `[batch, length, heads, head_dim]`, with the mask in the best way."""
    if inputs.mask is not None and len(inputs.mask) > 1:
        raise Unsupported("its provider takes one mask for all samples")
    s, scale = inputs.case.shape, inputs.case.shape.head_dim**-0.5
    kind, _, size = (inputs.case.mask.name if inputs.case.mask is not None else "none").partition(" ")
    built_in: dict[str, dict[str, Any]] = {"none": {}, "causal": {"causal": True}}
    arguments = {"window_size": (int(size), 0)} if size.isdigit() and kind == "window" else built_in.get(kind)
    note = f"built in: {arguments}"
    if arguments is None:
        mask = mask_of(inputs)[0, 0]
        forward = _lists(mask, FORWARD_SMALL if s.head_dim <= 64 else FORWARD, False)
        lists = {"block_sparse_tensors": forward, "block_sparse_tensors_bwd": _lists(mask, BACKWARD, True)}
        if (ranges := _ranges(mask)) is None:
            return _reading(mask, lists, scale)
        aux = [torch.nn.functional.pad(r, (0, -len(r) % WHOLE_TILES)) for r in ranges]
        arguments = {"mask_mod": in_range, "aux_tensors": aux, **lists}
        note = "mask_mod of a range of keys for each query, block lists"
    call = partial(flash_attn_func, softmax_scale=scale, **arguments)
    return Prepared(lambda q, k, v: call(*_swapped(q, k, v))[0].transpose(1, 2), note)


def _swapped(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _ranges(mask: Tensor) -> list[Tensor] | None:
    """First key and end of each query, int32, where the keys of each are a range."""
    found = []
    # a sum takes 8 bytes a pair
    for rows in mask.split(1024):
        first, end = rows.byte().argmax(-1), mask.shape[1] - rows.flip(-1).byte().argmax(-1)
        if bool((end - first != rows.sum(-1)).any()):
            return None
        found.append(torch.stack([first, end]).int())
    return list(torch.cat(found, 1))


def _reading(mask: Tensor, lists: dict[str, Any], scale: float) -> Prepared:
    """Bytes forward, and transposed bits backward: of four ways the fastest in 56 of 66 cases on an H200."""
    by_bytes = {"mask_mod": is_set, "aux_tensors": [_padded(mask).view(torch.uint8)]} | lists
    by_bits = {"mask_mod": bit_is_set_transposed, "aux_tensors": [_bits(mask.T)]}
    by_bits["block_sparse_tensors"] = lists["block_sparse_tensors_bwd"]

    class Attend(torch.autograd.Function):
        """Its forward and backward kernels with a mask function each; `flash_attn_func` has one for both."""

        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = flash_attn_func(q, k, v, softmax_scale=scale, return_lse=True, **by_bytes)[:2]
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
            q, k, v, out, lse = ctx.saved_tensors
            return _flash_attn_bwd(q, k, v, out, grads[0], lse, softmax_scale=scale, **by_bits)[:3]

    note = "mask_mod of the dense tensor, bytes forward, transposed bits backward, block lists"
    return Prepared(lambda q, k, v: Attend.apply(*_swapped(q, k, v)).transpose(1, 2), note)


def _lists(mask: Tensor, block: tuple[int, int], transposed: bool) -> BlockSparseTensorsTorch:
    """For each block of queries (or of keys) the partial and the full blocks of the others."""
    sizes = [-(-n // size) for n, size in zip(mask.shape, block, strict=True)]
    some, every = (torch.empty(sizes, dtype=torch.bool, device=mask.device) for _ in range(2))
    for row, part in enumerate(mask.split(block[0])):
        missing = (0, sizes[1] * block[1] - mask.shape[1])
        some[row] = torch.nn.functional.pad(part, missing).view(-1, sizes[1], block[1]).any(2).any(0)
        every[row] = torch.nn.functional.pad(part, missing, value=True).view(-1, sizes[1], block[1]).all(2).all(0)
    tensors = []
    for kind in (some & ~every, every):
        flags = (kind.T if transposed else kind)[None, None].contiguous()
        order = flags.byte().argsort(dim=-1, descending=True, stable=True)
        tensors += [flags.sum(-1, dtype=torch.int32), order.int()]
    names = "mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx"
    return BlockSparseTensorsTorch(**dict(zip(names, tensors, strict=True)), block_size=block)
