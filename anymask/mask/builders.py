"""Masks by name. Each returns a lazy `Mask`; True = attend, query i and key j count from 0."""

import torch
from torch import Tensor

from anymask.mask.expr import Band, Dense, Mask


def causal(offset: int = 0) -> Mask:
    """Query i attends to keys `j <= i + offset`: upper-left aligned, whatever the lengths.

    Args:
        offset: tokens by which the diagonal moves right; negative moves it left.

    >>> from anymask import pack
    >>> pack(causal(), q_len=3, kv_len=3).to_dense().int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    """
    return Band(None, _integer("offset", offset))


def causal_lower_right() -> Mask:
    """The last query attends to the last key, query i to keys `j <= i + kv_len - q_len`: decoding with a cache."""
    return Band(None, 0, lower_right=True)


def sliding_window(left: int, right: int = 0) -> Mask:
    """Query i attends to keys `i - left <= j <= i + right`.

    Args:
        left: tokens before the query, 0 or more.
        right: tokens after it, 0 or more; 0 makes the window causal.
    """
    for name, value in (("left", _integer("left", left)), ("right", _integer("right", right))):
        if value < 0:
            raise ValueError(f"sliding_window: {name} is {value}; allowed are 0 and more tokens")
    return Band(-left, right)


def from_dense(tensor: Tensor) -> Mask:
    """A mask read from a tensor.

    Args:
        tensor: bool, broadcastable to `[batch, q_heads, q_len, kv_len]`; 2 to 4 dimensions, missing ones are shared.
            A stride-0 (expanded) batch or head dimension is read, and stored, once.

    Raises:
        TypeError: not a tensor. ValueError: not bool, or not 2 to 4 dimensions.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"mask is a {type(tensor).__name__}; allowed are None, a bool tensor, a Mask, a BlockMask")
    if tensor.dtype != torch.bool:
        raise ValueError(
            f"mask has dtype {tensor.dtype}; allowed is torch.bool (True = attend). "
            "A float mask would be an additive bias, which attention does not take; "
            "for a mask of 0 and 1 pass mask != 0"
        )
    return dense(tensor)


def dense(tensor: Tensor) -> Dense:
    """`from_dense` for a tensor of any dtype, non-zero = attend."""
    if not 2 <= tensor.dim() <= 4:
        raise ValueError(
            f"mask has shape {tuple(tensor.shape)}, {tensor.dim()} dimensions; allowed are 2 to 4, "
            "broadcastable to [batch, q_heads, q_len, kv_len]"
        )
    tensor = tensor[(None,) * (4 - tensor.dim())]
    for dim in (0, 1):
        if tensor.shape[dim] > 1 and tensor.stride(dim) == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return Dense(tensor)


def _integer(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; allowed is an int")
    return value
