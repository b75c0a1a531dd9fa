"""The call of `torch.nn.attention.flex_attention`, by anymask's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from anymask import validate
from anymask.api import attention
from anymask.block_mask import BlockMask
from anymask.formats import from_flex
from anymask.mask import Mask
from anymask.scores import Bias, from_score_mod
from anymask.scores.score_mod import softcap_of


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | Bias | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Any]:
    """FlexAttention's call under any mask.

    Args:
        query: `[batch, q_heads, q_len, head_dim]`.
        key, value: `[batch or 1, kv_heads, kv_len, dim]`.
        score_mod: None; a function that adds a bias, `from_score_mod(score_mod)`; one that is a soft cap,
            `c tanh(score / c)`; or a `Bias` by name, which costs less.
        block_mask: None, a `BlockMask` of torch or of anymask, or a `Mask`. One of torch is packed at each call: give
            `anymask.pack(anymask.formats.from_flex(block_mask), ...)` instead where it is used again.
        scale: factor of the scores; default `1 / sqrt(head_dim)`.
        enable_gqa: allow fewer key and value heads than query heads.
        return_lse: also return `lse [batch, q_heads, q_len]`, natural log, -inf where a query has no key.
        kernel_options: not read; they choose among FlexAttention's kernels.
        return_aux: an `AuxRequest` of torch with `lse`; then an `AuxOutput` is returned beside o.

    Raises:
        ValueError: head counts that differ without `enable_gqa`, `max_scores`, or what `attention` raises, also for a
            score_mod that does something else.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        validate.check_tensor(name, t)
        if t.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; allowed are 4 dimensions, [batch, heads, length, dim]"
            )
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads and key has {key.shape[1]}; allowed are equal counts, or enable_gqa=True"
        )
    wants_max = getattr(return_aux, "max_scores", False)
    if wants_max:
        raise ValueError("return_aux asks for max_scores; allowed is lse")
    if block_mask is not None and not isinstance(block_mask, (BlockMask, Mask)):
        block_mask = from_flex(block_mask)
    if key.shape[0] == 1 and query.shape[0] > 1:
        key, value = (t.expand(query.shape[0], -1, -1, -1) for t in (key, value))
    bias: Bias | None = None
    softcap: float | None = None
    if isinstance(score_mod, Bias):
        bias = score_mod
    elif score_mod is not None:
        bias = from_score_mod(score_mod)
        softcap = softcap_of(score_mod, query.device)
    o, lse = attention(
        query,
        key,
        value,
        block_mask,
        bias=bias if softcap is None else None,
        softcap=softcap,
        scale=scale,
        return_lse=True,
    )
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return o, AuxOutput(lse=lse if return_aux.lse else None, max_scores=None)
    return (o, lse) if return_lse else o
