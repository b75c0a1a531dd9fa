"""The calls of flash-attn 2, under its names, by anymask's kernels: causal and windows are lower-right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymask import validate
from anymask.api import attention
from anymask.mask import Mask, sliding_window
from anymask.mask.arguments import check_flag
from anymask.scores import Bias, alibi
from anymask.scores.bias import as_bias, check_floats
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
        dropout_p: probability that a weight becomes 0, as in `attention`.
        softmax_scale: factor of the scores; default `1 / sqrt(head_dim)`.
        causal: query i attends to keys `j <= i + kv_len - q_len`.
        window_size: tokens before and after that place, -1 for all of them; `causal` makes the second 0.
        softcap: c of `c tanh(s / c)`, which scores become; 0.0 for none.
        alibi_slopes: float `[q_heads]`: `-slope |i + kv_len - q_len - j|` is added to scores. Gradients reach them.
            Those of each sample, `[batch, q_heads]`, under causal alone.
        deterministic: whether gradients must be bit-equal from run to run; False asks torch.
        return_attn_probs: also return lse and an empty tensor, as flash-attn does without dropout: no kernel has the
            weights.

    Returns:
        `o [batch, q_len, q_heads, v_dim]`, contiguous; or `(o, lse [batch, q_heads, q_len], an empty tensor)`.

    Raises:
        ValueError: a soft cap beside slopes, which flash-attn adds to what is capped already; slopes of each sample
            where keys after the query attend; or what `attention` raises. TypeError: as `attention`.
    """
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
    scores = _scores(dropout_p, softcap, alibi_slopes, k.shape[1] - q.shape[1])
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() == 2:
        if right != 0 or alibi_slopes.shape != (q.shape[0], q.shape[2]):
            raise ValueError(
                f"alibi_slopes has shape {tuple(alibi_slopes.shape)}; allowed are [q_heads], and with causal=True "
                f"[batch, q_heads], here {[q.shape[0], q.shape[2]]}"
            )
        scores["bias"] = _slopes_of_samples(alibi_slopes, q.shape[1], k.shape[1])
    repeatable = check_flag("deterministic", deterministic) or None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o, lse = attention(q, k, v, mask, scale=softmax_scale, return_lse=True, deterministic=repeatable, **scores)
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
        ValueError: a block table, or slopes where documents have other numbers of keys than of queries; or what
            `flash_attn_func` and `attention_varlen` raise. TypeError: as `attention_varlen`.
    """
    if block_table is not None:
        raise ValueError("block_table is a tensor; allowed is None: keys lie in a row")
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() != 1:
        raise ValueError(f"alibi_slopes has shape {tuple(alibi_slopes.shape)}; allowed is [q_heads]")
    if alibi_slopes is not None and cu_seqlens_q is not cu_seqlens_k and not torch.equal(cu_seqlens_q, cu_seqlens_k):
        raise ValueError("alibi_slopes are given and cu_seqlens_q differs from cu_seqlens_k; allowed are equal ones")
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
        **_scores(dropout_p, softcap, alibi_slopes, 0),
    )
    return (o, lse, q.new_empty(0)) if check_flag("return_attn_probs", return_attn_probs) else o


def _scores(dropout_p: float, softcap: float, slopes: Tensor | None, offset: int) -> dict[str, Any]:
    """What `attention` calls them; `offset` is of the first query among the keys."""
    if softcap and slopes is not None:
        raise ValueError(
            "softcap and alibi_slopes are both given; allowed is one of them: flash-attn adds slopes to capped scores, "
            "and attention caps the sum"
        )
    has_samples = isinstance(slopes, Tensor) and slopes.dim() == 2
    return {
        "bias": None if slopes is None or has_samples else alibi(slopes, offset),
        "softcap": softcap or None,
        "dropout_p": dropout_p,
    }


def _slopes_of_samples(slopes: Tensor, q_len: int, kv_len: int) -> Bias:
    """`-slope (i + kv_len - q_len - j)` of pairs that are causal: a part of the queries, and one of the keys."""
    check_floats("alibi_slopes", slopes)
    # both are counted from the last key, near which what cancels is small
    wide = slopes.to(torch.promote_types(slopes.dtype, torch.float32))[..., None, None]
    i, j = (torch.arange(n, device=slopes.device) - (n - 1) for n in (q_len, kv_len))
    return as_bias(wide * j) + as_bias(-wide * i[:, None])
