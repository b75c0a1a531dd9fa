"""Expressions of leaves that builders share; their tensors have the layout of `Between`."""

from collections.abc import Sequence
from functools import reduce
from itertools import zip_longest
from operator import and_
from typing import Any

import torch
from torch import Tensor

from anymask.mask.arguments import (
    abbreviate,
    check_dense,
    check_integers,
    check_one_device,
    check_positive,
    check_sizes,
    per_token,
    shared_once,
    values,
)
from anymask.mask.expr import Mask
from anymask.mask.leaves import Between, Dense
from anymask.mask.traced import numbers_of

# tokens with this id see nothing and are seen by nothing
PADDING = -1
INT64 = torch.iinfo(torch.int64)


def union(masks: Sequence[Mask]) -> Mask:
    """`|` of one mask or more, by halves: a chain of many would be slow to walk."""
    left = list(masks)
    while len(left) > 1:
        left = [a if b is None else a | b for a, b in zip_longest(left[::2], left[1::2])]
    return left[0]


def for_lengths(name: str, q_len: int, kv_len: int, device: torch.device) -> Mask:
    """Attends to everything, in planes of these lengths alone; `name` is what errors say has them."""
    zeros, ones = torch.zeros(1, 1, q_len, dtype=torch.int64), torch.ones(1, 1, q_len, dtype=torch.int64)
    keys = torch.zeros(1, 1, kv_len, dtype=torch.int64, device=device)
    return Between(keys, zeros.to(device), ones.to(device), of_query=False, name=name)


def neighbourhood(dims: int, shape: tuple[int, ...], kernel: int | tuple[int, ...]) -> Mask:
    """Tokens attend to the `kernel` places around them in a grid, moved inside at the borders."""
    sizes = check_sizes("shape", shape, dims)
    kernels = check_sizes("kernel", (kernel,) * dims if isinstance(kernel, int) else kernel, dims)
    masks: list[Mask] = []
    places = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in sizes))[None, None].unbind(-1)
    for place, n, size in zip(places, sizes, kernels, strict=True):
        if size > n or size % 2 == 0:
            raise ValueError(f"kernel is {kernel}; allowed are odd sizes of at most the shape, which is {shape}")
        first = (place - size // 2).clamp(0, n - size)
        name = f"neighbourhood_{dims}d: the product of shape"
        masks.append(Between(place, first, first + size, of_query=False, name=name))
    return reduce(and_, masks)


def block_edges(layout: Tensor, dim: int, size: int | Tensor) -> Tensor:
    """int64 `[blocks + 1]`: where each block along a dimension of the layout begins, and the end of the last."""
    blocks = layout.shape[dim]
    if not isinstance(size, Tensor):
        return torch.arange(blocks + 1, device=layout.device) * check_positive("block", size)
    sizes = values("block", check_integers("block", size, (1,)))
    check_one_device(layout=layout, block=size)
    if len(sizes) != blocks or min(sizes, default=0) < 0:
        name = ("q_len", "kv_len")[dim - 2]
        raise ValueError(
            f"block has sizes {abbreviate(sizes)} along {name}; allowed are {blocks}, as layout has, of 0 and more"
        )
    return torch.nn.functional.pad(size.long().cumsum(0), (1, 0))


def blocks_of_sizes(layout: Tensor, q_edges: Tensor, kv_edges: Tensor) -> Mask:
    """Each run of True in a line of the layout is a range of keys for its queries, and one in a column the reverse."""
    by_rows, by_columns = _runs(layout), _runs(layout.mT)
    of_query = len(by_columns[0]) < len(by_rows[0])
    runs = by_columns if of_query else by_rows
    ranged, valued = (kv_edges, q_edges) if of_query else (q_edges, kv_edges)
    block = numbers_of(ranged)
    position = torch.arange(int(valued[-1]), device=layout.device)[None, None]
    bounds = zip(*((valued[x][..., block]).unbind(0) for x in runs), strict=True)
    name = "block_sparse: layout in blocks of these sizes"
    return union([Between(position, low, high, of_query, name) for low, high in bounds])


def _runs(layout: Tensor) -> tuple[Tensor, Tensor]:
    """First block of each run of True in a line, and the block after its last, int64 `[runs, batch, heads, lines]`.

    Lines with fewer runs than others, of which all have one, have empty ones.
    """
    steps = torch.nn.functional.pad(layout.to(torch.int8), (1, 1)).diff(dim=-1)
    (*_, first), (*_, end) = ((steps == step).nonzero().unbind(1) for step in (1, -1))
    count = (steps == 1).sum(-1).flatten()
    line = torch.arange(len(count), device=layout.device).repeat_interleave(count)
    # the number of a run among those of its line
    rank = torch.arange(len(line), device=layout.device) - (count.cumsum(0) - count)[line]
    found = torch.zeros(2, max([1, *values("layout", count)]), len(count), dtype=torch.int64, device=layout.device)
    found[:, rank, line] = torch.stack([first, end])
    return found[0].unflatten(1, layout.shape[:3]), found[1].unflatten(1, layout.shape[:3])


def flagged(name: str, flags: Tensor, of_query: bool) -> Mask:
    """Attends where the flag of the query, or else of the key, is set."""
    one = torch.ones((1, 1), dtype=torch.long, device=flags.device)
    return Between(per_token(name, flags.byte()), one, one + 1, of_query, name)


def equal_ids(name: str, ids: Tensor | None, kv_name: str = "", kv_ids: Tensor | None = None) -> Mask:
    """Attends where query and key have the same number, not that of padding; the keys have `ids`, or `kv_ids`."""
    value = _with_room(per_token(name, ids))
    low = value if kv_ids is None else _with_room(per_token(kv_name, kv_ids))
    if kv_ids is not None:
        check_one_device(ids=ids, kv_ids=kv_ids)
        name = f"{name} and {kv_name.partition(': ')[2]}"
    return Between(value, low, _after(low), of_query=True, name=name)


def of_own_part(name: str, ids: Tensor) -> Mask:
    """Attends to the own part and to part 0, which lies in the range of all but padding."""
    value = _with_room(per_token(name, ids))
    is_prefix = value == -1
    low = torch.where(is_prefix, INT64.min, value)
    return Between(value, low, torch.where(is_prefix, INT64.max, _after(value)), of_query=True, name=name)


def _with_room(ids: Tensor) -> Tensor:
    """The same order of ids without gap at -1, which is padding, and gets the largest number."""
    return torch.where(ids >= 0, ids - 1, torch.where(ids == PADDING, INT64.max, ids))


def _after(numbers: Tensor) -> Tensor:
    """The end of the range that holds a number of `_with_room` alone, and is empty for padding."""
    return torch.where(numbers == INT64.max, numbers, numbers + 1)


def first_keys(lengths: Tensor, name: str) -> Mask:
    """Attends to the first `lengths [batch]` keys."""
    end = lengths.to(torch.int64, copy=True)[:, None]
    return Between(None, torch.zeros_like(end), end, False, name)


def as_mask(mask: Any, allowed: str) -> Mask:
    """The argument `mask` of `pack` and `attention`, a `Mask` or a bool tensor, as a `Mask`."""
    if isinstance(mask, Mask):
        return mask
    if not isinstance(mask, Tensor):
        kind = type(mask)
        # of the type of a function dynamo of torch 2.11 cannot ask
        if not callable(mask) and kind.__module__ == "torch.nn.attention.flex_attention":
            raise TypeError(f"mask is a {kind.__name__} of {kind.__module__}; convert it by anymask.formats.from_flex")
        raise TypeError(f"mask is a {kind.__name__}; allowed are {allowed}")
    return bools(mask, "mask")


def dense(tensor: Tensor, name: str = "mask") -> Dense:
    """`from_dense` for a tensor of any dtype, non-zero = attend."""
    check_dense(name, tensor, "a bool tensor")
    if not 2 <= tensor.dim() <= 4:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, {tensor.dim()} dimensions; allowed are 2 to 4, "
            "broadcastable to [batch, q_heads, q_len, kv_len]"
        )
    return Dense(shared_once(tensor[(None,) * (4 - tensor.dim())]))


def bools(tensor: Tensor, name: str) -> Dense:
    """The mask of a bool tensor, which errors call `name`."""
    if type(tensor) is not Tensor and type(tensor).__module__ == "torch.nn.attention.bias":
        raise TypeError(f"{name} is a {type(tensor).__name__}; convert it by anymask.formats.from_causal_bias")
    if tensor.dtype != torch.bool:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; allowed is torch.bool (True = attend). "
            "A float mask would be an additive bias, which attention does not take; one of 0 and -inf is "
            f"converted by anymask.formats.from_additive, for a mask of 0 and 1 pass {name} != 0"
        )
    return dense(tensor, name)
