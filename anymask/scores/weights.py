"""The definition of `Scores`: the weights of dense attention in a few lines of torch, for the backend `reference`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anymask.scores.dropout import keep, keep_scale
from anymask.scores.record import Scores
from anymask.shapes import LSE


class Weights(NamedTuple):
    """The softmax of a call with scores. All but lse broadcast to `[batch, q_heads, q_len, kv_len]`.

    `mask` is without the pairs that a bias of -inf hides; `keep` is what dropout multiplies weights by, and `slope` the
    derivative of the softcap.
    """

    p: Tensor
    lse: LSE
    mask: Tensor
    keep: Tensor | float
    slope: Tensor | float


def weigh(q: Tensor, k: Tensor, mask: Tensor, sm_scale: float, scores: Scores) -> Weights:
    """The softmax of `q [batch, q_heads, q_len, head_dim]` over `k [batch, q_heads, kv_len, head_dim]`.

    Args:
        q, k: in the dtype to compute in.
        mask: bool, broadcastable to `[batch, q_heads, q_len, kv_len]`.
        sm_scale: factor of the scores.
        scores: what else happens to them.
    """
    s = (q @ k.mT) * sm_scale
    batch, heads, q_len, kv_len = s.shape
    bias = sum((t.to(q.dtype) for t in scores.dense), torch.zeros(1, 1, 1, 1, dtype=q.dtype, device=q.device))
    for lookup in scores.lookups:
        bias = bias + lookup.table[:, lookup.q_code[:, None] - lookup.k_code]
    mask = (mask & (bias != -float("inf"))).expand(s.shape)
    s = torch.where(mask, s + bias, 0)
    slope: Tensor | float = 1.0
    if scores.softcap:
        capped = torch.tanh(s / scores.softcap)
        s, slope = scores.softcap * capped, 1 - capped**2
    s = s.masked_fill(~mask, -float("inf"))
    if scores.sinks is not None:
        # a column more, of a key without a value
        s = torch.cat([s, scores.sinks[:, None, None].expand(batch, -1, q_len, 1)], -1)
    m = s.amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).min)
    p = torch.exp(s - m)
    total = p.sum(-1, keepdim=True)
    # of a row without a key, which has a lse of -inf
    lse = torch.where(total == 0, -float("inf"), m + torch.log(total))
    total = torch.where(total == 0, 1, total)
    factor: Tensor | float = 1.0
    if scores.seed is not None:
        b, h, i, j = (torch.arange(n, device=q.device) for n in (batch, heads, q_len, kv_len))
        kept = keep(scores.seed, b[:, None, None, None], h[:, None, None], i[:, None], j, scores.dropout_p)
        factor = kept.to(q.dtype) * keep_scale(scores.dropout_p)
    return Weights((p / total)[..., :kv_len], lse.squeeze(-1), mask, factor, slope)


def table_gradient(ds: Tensor, table: Tensor, entries: Tensor) -> Tensor:
    """The sums over the pairs that read each entry of a table `[1 or q_heads, n]`."""
    by_head = ds.sum(0).flatten(1).sum_to_size(table.shape[0], entries.numel())
    return torch.zeros_like(table).index_add(1, entries.flatten().long(), by_head)
