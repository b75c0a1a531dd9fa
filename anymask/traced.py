"""The usual call inside a compiled function, with few names.

Before each call of a compiled function dynamo looks whether every function, module and class that its trace has met is
still the same, and once more for each other way to it. What `attention` does for all calls took 2.5 us of that, as much
as twenty tensors.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import Tensor, is_autocast_enabled, strided

from anymask.block_mask import BlockMask
from anymask.ops import forward_op
from anymask.vmap import ONE_PLANE


def is_simple(q: Any, k: Any, v: Any, mask: Any, return_lse: Any, deterministic: Any) -> bool:
    """Whether `attention` has nothing to cast, pack or refuse. What is not simple may still be right."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    if q.is_nested or k.is_nested or v.is_nested or q.is_meta:
        return False
    if not (q.layout == k.layout == v.layout == strided and q.dim() == k.dim() == v.dim() == 4):
        return False
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        return False
    if not (q.is_floating_point() and q.element_size() > 1) or is_autocast_enabled(q.device.type):
        return False
    batch, q_heads, q_len, head_dim = q.shape
    kv_batch, kv_heads, kv_len, k_dim = k.shape
    if not (kv_batch == batch and v.shape[0] == batch and v.shape[1] == kv_heads and v.shape[2] == kv_len):
        return False
    if not (k_dim == head_dim and head_dim > 0 and kv_heads > 0 and q_heads % kv_heads == 0):
        return False
    if not (return_lse is True or return_lse is False):
        return False
    if not (deterministic is None or deterministic is True or deterministic is False):
        return False
    if mask is None:
        return True
    if not isinstance(mask, BlockMask) or mask.q_len != q_len or mask.kv_len != kv_len:
        return False
    planes = (1, 1) if mask.n_first == ONE_PLANE else mask.q_has_pair.shape
    return planes[0] in (1, batch) and planes[1] in (1, q_heads) and mask.lists.device == q.device


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, return_lse: bool, deterministic: bool | None
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of a call that is simple."""
    # a number, as kernels are compiled for it
    scale = 1 / math.sqrt(operator.index(q.shape[3]))
    tensors = [] if mask is None else [mask.lists, mask.words]
    if mask is not None and mask.n_first > ONE_PLANE:
        tensors += [mask.q_has_pair, mask.kv_has_pair][: mask.n_first - ONE_PLANE]
    o, lse = forward_op(q, k, v, tensors, scale, None, deterministic is True, None)
    return (o, lse) if return_lse else o
