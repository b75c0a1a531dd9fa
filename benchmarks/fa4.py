"""FlashAttention-4 as a rival: its masks as device functions, and its lists of blocks. Needs `flash-attn-4`.

A mask is given in the best way that it has: built in for no mask, causal and a sliding window; two bounds for each
query where its keys are a range, as in documents; else the tensor itself, by bytes or bits, as it is or transposed:
whatever is the fastest for that tensor forward, and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from flash_attn.cute import flash_attn_func, utils
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_bwd
from torch import Tensor

from benchmarks import timing
from benchmarks.providers import Attend

Call = Callable[..., tuple[Tensor, ...]]
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
def is_set_transposed(batch, head, q, kv, seqlen_info, aux_tensors):  # noqa: ANN001, ANN201
    """The same of the transposed tensor, whose rows are keys."""
    byte = cutlass.Int32(aux_tensors[0][kv[0], q[0]])
    return utils.scalar_to_ssa(byte, cutlass.Int32) != utils.scalar_to_ssa(0, cutlass.Int32)


@cute.jit
def bit_is_set(batch, head, q, kv, seqlen_info, aux_tensors):  # noqa: ANN001, ANN201
    """Bit `kv % 32` of word `kv // 32` of row q, int32 `[length, words]`."""
    bit = (aux_tensors[0][q[0], kv[0] >> 5] >> (kv[0] & 31)) & 1
    return utils.scalar_to_ssa(bit, cutlass.Int32) != utils.scalar_to_ssa(0, cutlass.Int32)


@cute.jit
def bit_is_set_transposed(batch, head, q, kv, seqlen_info, aux_tensors):  # noqa: ANN001, ANN201
    """The same of the transposed tensor, whose rows are keys."""
    bit = (aux_tensors[0][kv[0], q[0] >> 5] >> (q[0] & 31)) & 1
    return utils.scalar_to_ssa(bit, cutlass.Int32) != utils.scalar_to_ssa(0, cutlass.Int32)


def _missing(n: int) -> int:
    return -n % WHOLE_TILES


def _bytes(mask: Tensor) -> Tensor:
    """uint8, 0 or 1, to the end of the tiles."""
    return torch.nn.functional.pad(mask, (0, _missing(mask.shape[1]), 0, _missing(mask.shape[0]))).view(torch.uint8)


def _bits(mask: Tensor) -> Tensor:
    """int32 words of 32 pairs of a row, the lowest bit first, to the end of the tiles."""
    shift = torch.arange(32, device=mask.device, dtype=torch.int32)
    rows, columns = (n + _missing(n) for n in mask.shape)
    out = torch.zeros(rows, columns // 32, dtype=torch.int32, device=mask.device)
    for part, words in zip(mask.split(1024), out[: mask.shape[0]].split(1024), strict=True):
        padded = torch.nn.functional.pad(part, (0, columns - mask.shape[1]))
        # a sum of distinct bits wraps to the word with those bits
        words.copy_((padded.view(-1, words.shape[1], 32).int() << shift).sum(-1))
    return out


# how a mask function reads a tensor, and the tensor made for that
READERS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "bytes": (is_set, _bytes),
    "bytes, transposed": (is_set_transposed, lambda mask: _bytes(mask.T)),
    "bits": (bit_is_set, _bits),
    "bits, transposed": (bit_is_set_transposed, lambda mask: _bits(mask.T)),
}


def prepare(q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: Tensor | None) -> tuple[Attend, str]:
    """`attend(q, k, v)` of `[batch, heads, length, head_dim]` under a bool `[length, length]` mask, and how it is done.

    Its own order is `[batch, length, heads, head_dim]`.
    """
    scale, arguments, how = q.shape[3] ** -0.5, {}, "no mask"
    if mask is not None:
        ranges = _ranges(mask)
        if ranges is None:
            return _fastest(q, k, v, do, mask, _both_lists(mask, q.shape[3]), scale)
        arguments, how = _built_in(*ranges)
        if not arguments:
            aux = [torch.nn.functional.pad(r, (0, _missing(r.shape[0]))) for r in ranges]
            arguments = {"mask_mod": in_range, "aux_tensors": aux, **_both_lists(mask, q.shape[3])}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_func(*_swapped(q, k, v), softmax_scale=scale, **arguments)[0]
        return out.transpose(1, 2)

    return attend, how


def _swapped(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _built_in(first: Tensor, end: Tensor) -> tuple[dict[str, Any], str]:
    """Arguments of `flash_attn_func` for ranges of keys that it knows, none for others; and how they are given."""
    at = torch.arange(first.shape[0], device=first.device, dtype=torch.int32)
    width = int((at - first).max())
    if not torch.equal(end, at + 1) or not torch.equal(first, (at - width).clamp(min=0)):
        return {}, "mask_mod of a range of keys for each query, block lists"
    if width == first.shape[0] - 1:
        return {"causal": True}, "causal=True"
    return {"window_size": (width, 0)}, "window_size"


def _ranges(mask: Tensor) -> list[Tensor] | None:
    """First key and end of each query, int32, where the keys of each are a range."""
    firsts, ends = [], []
    # a sum takes 8 bytes a pair
    for rows in mask.split(1024):
        first, end = rows.byte().argmax(-1), mask.shape[1] - rows.flip(-1).byte().argmax(-1)
        count = rows.sum(-1)
        if bool((end - first != count).any()) or bool((count == 0).any()):
            return None
        firsts.append(first.int())
        ends.append(end.int())
    return [torch.cat(firsts), torch.cat(ends)]


def _fastest(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: Tensor, lists: dict[str, Any], scale: float
) -> tuple[Attend, str]:
    """The tensor in the way that takes the least time, forward and backward each."""
    made = {name: {"mask_mod": mod, "aux_tensors": [of(mask)]} for name, (mod, of) in READERS.items()}
    forward = {name: partial(_forward, scale=scale, arguments=a | lists) for name, a in made.items()}
    backward_lists = {"block_sparse_tensors": lists["block_sparse_tensors_bwd"]}
    backward = {name: partial(_backward, scale=scale, arguments=a | backward_lists) for name, a in made.items()}
    inputs = _swapped(q.detach(), k.detach(), v.detach())
    out, lse = forward["bytes"](*inputs)
    times = timing.cuda_ms({name: partial(call, *inputs) for name, call in forward.items()}, 1, 10.0)
    first = min(times, key=lambda name: times[name].median)
    calls = {name: partial(call, *inputs, out, lse, do.transpose(1, 2)) for name, call in backward.items()}
    times = timing.cuda_ms(calls, 1, 10.0)
    second = min(times, key=lambda name: times[name].median)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = _Attend.apply(*_swapped(q, k, v), forward[first], backward[second])
        return o.transpose(1, 2)

    return attend, f"mask_mod of the dense tensor, block lists; forward {first}, backward {second}"


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out, lse = flash_attn_func(q, k, v, softmax_scale=scale, return_lse=True, **arguments)[:2]
    return out, lse


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    scale: float,
    arguments: dict[str, Any],
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _flash_attn_bwd(q, k, v, out, do, lse, softmax_scale=scale, **arguments)[:3]
    return found


class _Attend(torch.autograd.Function):
    """Its forward and backward kernels with a mask function each; `flash_attn_func` has one for both."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, forward: Call, backward: Call) -> Tensor:
        out, lse = forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backward_call = backward
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return (*ctx.backward_call(*ctx.saved_tensors, grads[0]), None, None)


def _both_lists(mask: Tensor, head_dim: int) -> dict[str, BlockSparseTensorsTorch]:
    forward = FORWARD_SMALL if head_dim <= 64 else FORWARD
    return {
        "block_sparse_tensors": _lists(mask, forward, False),
        "block_sparse_tensors_bwd": _lists(mask, BACKWARD, True),
    }


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
