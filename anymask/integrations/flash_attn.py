"""The calls of flash-attn 2, under its names, by anymask's kernels: causal and windows are lower-right."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anymask import validate
from anymask.api import attention
from anymask.mask import Mask, sliding_window
from anymask.mask.arguments import check_flag
from anymask.varlen import attention_varlen, bounds_of_window

OPEN = (-1, -1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = OPEN,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn.flash_attn_func`.

    Args:
        q: `[batch, q_len, q_heads, head_dim]`, dtypes as in `attention`.
        k, v: `[batch, kv_len, kv_heads, dim]`; `kv_heads` divides `q_heads`.
        dropout_p: 0.0.
        softmax_scale: factor of the scores; default `1 / sqrt(head_dim)`.
        causal: query i attends to keys `j <= i + kv_len - q_len`.
        window_size: tokens before and after that place, -1 for all of them; `causal` makes the second 0.
        softcap: 0.0.
        alibi_slopes: None.
        deterministic: whether gradients must be bit-equal from run to run; False asks torch.
        return_attn_probs: also return lse and an empty tensor, as flash-attn does without dropout.

    Returns:
        `o [batch, q_len, q_heads, v_dim]`, contiguous; or `(o, lse [batch, q_heads, q_len], an empty tensor)`.

    Raises:
        ValueError: dropout, a soft cap or slopes are asked for; or what `attention` raises. TypeError: as `attention`.
    """
    _refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
    for name, t in (("q", q), ("k", k), ("v", v)):
        validate.check_tensor(name, t)
        if t.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; allowed are 4 dimensions, [batch, length, heads, dim]"
            )
    left, right = bounds_of_window(check_flag("causal", causal), window_size, "window_size")
    mask: Mask | None = None
    if (left, right) != (None, None):
        mask = sliding_window(left, right, offset=k.shape[1] - q.shape[1])
    repeatable = check_flag("deterministic", deterministic) or None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o, lse = attention(q, k, v, mask, scale=softmax_scale, return_lse=True, deterministic=repeatable)
    o = o.transpose(1, 2).contiguous()
    return (o, lse, q.new_empty(0)) if check_flag("return_attn_probs", return_attn_probs) else o


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = OPEN,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn.flash_attn_varlen_func`: documents in a row, by `attention_varlen`.

    Args:
        q: `[q_tokens, q_heads, head_dim]`.
        k, v: `[kv_tokens, kv_heads, dim]`.
        cu_seqlens_q, cu_seqlens_k: int `[documents + 1]`, where each document begins; the last is the tokens.
        max_seqlen_q, max_seqlen_k: not read; the bounds say it.
        block_table: None.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: as in
            `flash_attn_func`.

    Returns:
        `o [q_tokens, q_heads, v_dim]`, contiguous; or `(o, lse [q_heads, q_tokens], an empty tensor)`.

    Raises:
        ValueError: dropout, a soft cap, slopes or a block table are asked for; or what `attention_varlen` raises.
        TypeError: as `attention_varlen`.
    """
    _refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes, block_table=block_table)
    bounds_of_window(check_flag("causal", causal), window_size, "window_size")
    o, lse = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        window=window_size,
        scale=softmax_scale,
        return_lse=True,
        deterministic=check_flag("deterministic", deterministic) or None,
    )
    return (o, lse, q.new_empty(0)) if check_flag("return_attn_probs", return_attn_probs) else o


def _refuse(**asked: Any) -> None:
    """Raise ValueError for the first argument, by name, that asks for what anymask has not."""
    for name, value in asked.items():
        if value is not None and (isinstance(value, Tensor) or value != 0.0):
            allowed = "0.0" if name in ("dropout_p", "softcap") else "None"
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} is {shown}; allowed is {allowed}: anymask has masks alone")
