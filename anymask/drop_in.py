"""Stand-ins: other libraries' calls, under their own signatures, by `attention`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from anymask import formats, mask_ops, validate
from anymask.api import attention
from anymask.mask import Mask
from anymask.packing import cache
from anymask.shapes import K, O, Q, V


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` under the same signature, by `attention`.

    Args:
        query, key, value: 2 to 4 dimensions, `[..., length, dim]`. A batch, or heads without `enable_gqa`, of 1 is that
            of all.
        attn_mask: None or a bool tensor, True = attend, broadcastable to the scores; a float tensor, which is added to
            them; or whatever `attention` takes as a mask. A float tensor of 0 and -inf, or the least number of its
            dtype, is packed as a mask, unless it requires grad or a function is compiled. A query that sees nothing
            gives 0.
        dropout_p: as in `attention`.
        is_causal: upper-left aligned; excludes `attn_mask`.
        scale: default `1 / sqrt(head_dim)`.
        enable_gqa: allow fewer key and value heads than query heads.

    Raises:
        ValueError: what `attention` raises, and for what it does not do: 5 or more dimensions, head counts that differ
            without `enable_gqa`.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        validate.check_tensor(name, t)
        if t.dim() != query.dim() or not 2 <= t.dim() <= 4:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; allowed are 2 to 4 dimensions, as many as query, which has "
                f"shape {tuple(query.shape)}"
            )
    query, key, value = _broadcast(query, key, value, enable_gqa)
    mask, bias = mask_and_bias(attn_mask)
    if is_causal and bias is not None:
        raise ValueError("is_causal is True and attn_mask is given; allowed is one of them")
    lead = (None,) * (4 - query.dim())
    o = attention(
        query[lead], key[lead], value[lead], mask, bias=bias, is_causal=is_causal, scale=scale, dropout_p=dropout_p
    )
    return o.view(*query.shape[:-1], value.shape[-1])


def mask_and_bias(attn_mask: Any) -> tuple[Any, Tensor | None]:
    """A mask of torch as `attention` takes it: floats of 0 and -inf are a mask, and others a bias.

    Floats are read once for as long as they hold the same, and not at all where gradients or a transform of torch.func
    reach them, or a function is traced: there they are a bias.
    """
    if not isinstance(attn_mask, Tensor) or not attn_mask.is_floating_point():
        return attn_mask, None
    if mask_ops.is_traced() or attn_mask.requires_grad or mask_ops.has_no_values(attn_mask):
        return None, attn_mask
    if _functorch.is_functorch_wrapped_tensor(attn_mask):
        return None, attn_mask
    found = cache.masks.build(("from_additive", "or None"), (attn_mask,), lambda: _additive_or_none(attn_mask))
    return (None, attn_mask) if found is None else (found, None)


def _additive_or_none(tensor: Tensor) -> Mask | None:
    try:
        return formats.from_additive(tensor)
    except ValueError:
        return None


def _broadcast(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Batches and heads of 1 expanded as SDPA does; k and v of one head are left, as that of a group.

    Raises:
        ValueError: head counts that differ without `enable_gqa`.
    """
    if q.dim() == 4 and not q.shape[0] == k.shape[0] == v.shape[0]:
        q, k, v = _expanded(0, q, k, v)
    if q.dim() > 2:
        if k.shape[-3] != v.shape[-3]:
            k, v = _expanded(-3, k, v)
        if not enable_gqa and q.shape[-3] != k.shape[-3] != 1:
            if q.shape[-3] != 1:
                raise ValueError(
                    f"query has {q.shape[-3]} heads and key has {k.shape[-3]}; allowed are equal counts, or "
                    "enable_gqa=True"
                )
            q, k = _expanded(-3, q, k)
    return q, k, v


def _expanded(dim: int, *tensors: Tensor) -> list[Tensor]:
    """Those of size 1 along a dimension expanded to the size of the others, if that is one."""
    size = next((t.shape[dim] for t in tensors if t.shape[dim] != 1), 1)
    expanded = []
    for t in tensors:
        sizes = [-1] * t.dim()
        sizes[dim] = size
        expanded.append(t.expand(sizes) if t.shape[dim] == 1 else t)
    return expanded


def flash_attention_custom_mask(q: Q, k: K, v: V, mask: Tensor | None = None, sm_scale: float | None = None) -> O:
    """Attention under a tensor mask, with the call of the package `flashattention2-custom-mask`.

    Args:
        q, k, v: as in `attention`.
        mask: any dtype, non-zero = attend, broadcastable to `[batch, heads, q_len, kv_len]`, on the device of q.
        sm_scale: factor of the scores; None means `1 / sqrt(head_dim)`.

    Returns:
        `o [batch, heads, q_len, v_dim]` in the dtype of q. Rows with no key are 0.

    Raises:
        ValueError: as `attention`; and a float mask that holds -inf, NaN or values up to -1e4, which is made to be
            added to scores. TypeError: as `attention`.
    """
    q, k, v = validate.autocast(q, k, v)
    sm_scale = validate.check_call(q, k, v, sm_scale, False, None, False, None, scale_name="sm_scale")
    if mask is not None:
        validate.check_tensor("mask", mask)
        if torch.compiler.is_compiling():
            mask = mask_ops.attended_op(mask)
    lazy = validate.fitting_mask(q, k, mask, any_dtype=True)
    check = None if mask is None else partial(validate.check_not_additive, mask)
    return attention(q, k, v, mask_ops.pack_for(q, lazy, k.shape[2], check), scale=sm_scale)
