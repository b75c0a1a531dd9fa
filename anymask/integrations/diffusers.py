"""The attention of diffusers' dispatcher, by anymask's kernels.

Diffusers has a closed list of names for its attention backends, so this takes the place of one of them, before
`pipe.transformer.set_attention_backend("native")` or by the default:

    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    _AttentionBackendRegistry.register(AttentionBackendName.NATIVE)(dispatched_attention)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anymask import validate
from anymask.api import attention
from anymask.block_mask import BlockMask
from anymask.drop_in import mask_and_bias
from anymask.mask import Mask


def dispatched_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | Mask | BlockMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `dispatch_attention_fn` of diffusers calls.

    Args:
        query: `[batch, q_len, q_heads, head_dim]`.
        key, value: `[batch, kv_len, kv_heads, dim]`.
        attn_mask: bool, True = attend, or floats that are added to the scores: `[batch, kv_len]`, or broadcastable to
            `[batch, q_heads, q_len, kv_len]`; or a `Mask` or `BlockMask` by `attention_kwargs`.
        dropout_p: as in `attention`.
        is_causal: upper-left aligned; excludes `attn_mask`.
        scale: factor of the scores; default `1 / sqrt(head_dim)`.
        enable_gqa: allow fewer key and value heads than query heads.
        return_lse: also return `lse [batch, q_heads, q_len]`, natural log.
        _parallel_config: None; diffusers' parallelism over tokens calls attention's parts by itself.

    Returns:
        `o [batch, q_len, q_heads, v_dim]`, contiguous; with `return_lse` also lse.

    Raises:
        ValueError: parallelism or head counts that differ without `enable_gqa`; or what `attention` raises.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        validate.check_tensor(name, t)
        if t.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; allowed are 4 dimensions, [batch, length, heads, dim]"
            )
    if _parallel_config is not None:
        raise ValueError(f"_parallel_config is a {type(_parallel_config).__name__}; allowed is None")
    if not enable_gqa and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query has {query.shape[2]} heads and key has {key.shape[2]}; allowed are equal counts, or enable_gqa=True"
        )
    if isinstance(attn_mask, Tensor) and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal is True and attn_mask is given; allowed is one of them")
    mask, bias = mask_and_bias(attn_mask)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    o, lse = attention(q, k, v, mask, bias=bias, is_causal=is_causal, scale=scale, dropout_p=dropout_p, return_lse=True)
    o = o.transpose(1, 2).contiguous()
    return (o, lse) if return_lse else o
