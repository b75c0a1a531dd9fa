"""`attention_varlen`: documents in a row, `[tokens, heads, dim]`, by `attention` and without padding."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from anymask import mask_ops, validate
from anymask.api import attention
from anymask.backends import Backend
from anymask.mask import Mask, document_window
from anymask.mask.arguments import check_flag, check_integers, check_natural
from anymask.mask.leaves import Between
from anymask.mask.parts import as_mask
from anymask.packing import cache
from anymask.scores import Bias

_KEYWORDS = (
    "cu_seqlens_q, cu_seqlens_k, mask, causal, window, bias, scale, softcap, sinks, dropout_p, return_lse, "
    "deterministic and backend"
)
# keyword of another library, or of `attention` -> what to do here
_ELSEWHERE = {
    "is_causal": "write causal=...",
    **dict.fromkeys(("window_size", "sliding_window"), "write window=(before, after)"),
    "cu_seqlens": "write cu_seqlens_q=...",
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), "leave it out: the bounds say it"),
    **dict.fromkeys(("block_table", "page_table"), "keys lie in a row"),
}


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    mask: Tensor | Mask | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    deterministic: bool | None = None,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    mask: Tensor | Mask | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    deterministic: bool | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    mask: Tensor | Mask | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool,
    deterministic: bool | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    mask: Tensor | Mask | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: Backend | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within documents that lie in a row, as flash-attn's varlen calls have it; no token is padded or moved.

    Query p of a document with n queries and m keys is at key `p + m - n`: causal and windows are lower-right in each.

    Args:
        q: `[q_tokens, q_heads, head_dim]`, dtypes as in `attention`.
        k: `[kv_tokens, kv_heads, head_dim]`; `kv_heads` divides `q_heads`.
        v: `[kv_tokens, kv_heads, v_dim]`.
        cu_seqlens_q: int `[documents + 1]`, where each document begins among the queries; the last is `q_tokens`.
        cu_seqlens_k: the same among the keys, of as many documents; default cu_seqlens_q.
        mask: a `Mask` over all tokens, or a bool tensor broadcastable to `[1, q_heads, q_tokens, kv_tokens]`: which of
            the pairs within documents attend.
        causal: keys up to the query's own place.
        window: tokens before and after the query's place, 0 or more; -1 or None for all of them. `causal` makes the
            second 0.
        bias: a float tensor broadcastable to `[1, q_heads, q_tokens, kv_tokens]`, or a `Bias` over all tokens. Its
            distances are those in the row: those in a document too, where all have as many queries as keys.
        scale: factor of the scores, finite; default `1 / sqrt(head_dim)`.
        softcap, sinks, dropout_p: as in `attention`.
        return_lse: also return the log-sum-exp of the scores, differentiable.
        deterministic, backend: as in `attention`.

    Returns:
        `o [q_tokens, q_heads, v_dim]`, contiguous, in the dtype of q; with `return_lse` also `lse [q_heads, q_tokens]`,
        natural log, fp32, -inf where a query has no key.

    The first call with `cu_seqlens` reads them and packs their mask; later ones, of other layers, find both again by
    the same tensors. A compiled function does not read them: they must be right there, and tokens beyond the last
    document see nothing.

    Raises:
        ValueError: a shape, dtype, window or bounds that do not fit, naming it and what is allowed. TypeError: an
            argument of the wrong type, or a keyword of another library, naming what to write.

    >>> import torch
    >>> q = k = v = torch.randn(7, 2, 16)
    >>> attention_varlen(q, k, v, torch.tensor([0, 3, 7]), causal=True).shape
    torch.Size([7, 2, 16])
    """
    if unknown:
        validate.refuse_keywords(unknown, _KEYWORDS, _ELSEWHERE)
    for name, t in (("q", q), ("k", k), ("v", v)):
        validate.check_tensor(name, t)
        if t.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(t.shape)}; allowed are 3 dimensions, [tokens, heads, dim]")
    bounds = {"cu_seqlens_q": cu_seqlens_q}
    if cu_seqlens_k is not None:
        bounds["cu_seqlens_k"] = cu_seqlens_k
    left, right = bounds_of_window(check_flag("causal", causal), window)
    seen = _documents(bounds, left, right, (q.shape[0], k.shape[0]))
    if mask is not None:
        seen = as_mask(mask, "None, a bool tensor and a Mask") & seen
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    o, lse = attention(
        q,
        k,
        v,
        seen,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        return_lse=True,
        deterministic=deterministic,
        backend=backend,
    )
    o = o[0].transpose(0, 1).contiguous()
    return (o, lse[0]) if check_flag("return_lse", return_lse) else o


def bounds_of_window(causal: bool, window: Any, name: str = "window") -> tuple[int | None, int | None]:
    """Tokens before and after a query's place, None for all of them, of flash-attn's two arguments."""
    if window is None:
        window = (None, None)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{name} is {window!r}; allowed are None and a pair, tokens before and after")
    left, right = (None if n is None or n == -1 else check_natural(f"a bound of {name}", n) for n in window)
    return left, 0 if causal else right


def _documents(given: dict[str, Tensor], left: int | None, right: int | None, lengths: tuple[int, int]) -> Mask:
    """`document_window` of the bounds `given` by name, one object for as long as their tensors hold the same."""
    tensors = tuple(check_integers(name, t, (1,)) for name, t in given.items())
    if mask_ops.is_traced() or any(map(mask_ops.has_no_values, tensors)):
        return _documents_unread(tensors[0], tensors[-1], left, right, lengths)

    def read() -> Mask:
        kv = tensors[1] if len(tensors) > 1 else None
        return document_window(tensors[0], left, right, kv_cu_seqlens=kv)

    return cache.masks.build(("document_window", left, right), tensors, read)


def _documents_unread(
    bounds: Tensor, kv_bounds: Tensor, left: int | None, right: int | None, lengths: tuple[int, int]
) -> Mask:
    """`document_window` by operations on tensors alone, whose shapes depend on no values."""
    bounds, kv_bounds = bounds.long(), kv_bounds.long()
    q_at, k_at = (torch.arange(n, device=bounds.device) for n in lengths)
    number = torch.searchsorted(bounds[1:], q_at, right=True).clamp(max=bounds.shape[0] - 2)
    start, stop = kv_bounds[number], kv_bounds[number + 1]
    # each query's place among the keys
    place = q_at - bounds[number + 1] + stop
    first = start if left is None else (place - left).maximum(start)
    end = stop if right is None else (place + right + 1).minimum(stop)
    # queries beyond the last document see nothing
    end = torch.where(q_at < bounds[-1], end, first)
    return Between(k_at[None, None], first[None, None], end[None, None], of_query=False, name="cu_seqlens")
