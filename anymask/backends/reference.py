"""The definition: dense attention and its gradients in a few lines of torch, and the oracle of every test.

Computes in float32, or in float64 for float64 inputs, with memory proportional to `q_len * kv_len`. Runs on any device.
Torch can differentiate both functions once more, and forward mode goes through the first.
The letters are those of docs/kernels.md.
"""

import torch
from torch import Tensor

from anymask.block_mask import BlockMask
from anymask.layout import laid_out_as
from anymask.precision import ieee_products
from anymask.scores import Needs, ScoreGrads, Scores
from anymask.scores.weights import table_gradient, weigh
from anymask.shapes import LSE, K, O, Q, V


def why_not(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, scores: Scores | None = None) -> str | None:
    """Why this backend cannot run the call: it always can."""
    return None


@ieee_products
def forward(
    q: Q, k: K, v: V, block_mask: BlockMask | None, sm_scale: float, scores: Scores | None = None
) -> tuple[O, LSE]:
    """`o` in the dtype of `q`, and `lse` (natural log, fp32, or fp64 for fp64 inputs)."""
    qf, kf, vf, mask = _prepare(q, k, v, block_mask)
    if scores is not None:
        found = weigh(qf, kf, mask, sm_scale, scores)
        return laid_out_as((found.p * found.keep) @ vf, q), found.lse
    p, lse = _softmax(qf, kf, mask, sm_scale)
    return laid_out_as(p @ vf, q), lse


@ieee_products
def backward(
    q: Q,
    k: K,
    v: V,
    o: O,
    lse: LSE,
    do: O,
    dlse: LSE | None,
    block_mask: BlockMask | None,
    sm_scale: float,
    deterministic: bool,
) -> tuple[Q, K, V]:
    """`dq, dk, dv` in the dtypes of `q, k, v`."""
    qf, kf, vf, mask = _prepare(q, k, v, block_mask)
    p, _ = _softmax(qf, kf, mask, sm_scale)
    dof = torch.where(mask.any(-1, keepdim=True), do.to(qf.dtype), 0)
    delta = (dof * o.to(qf.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - torch.where(mask.any(-1), dlse.to(qf.dtype), 0)
    ds = p * (dof @ vf.mT - delta[..., None])
    dq = (ds @ kf) * sm_scale
    dk = (ds.mT @ qf) * sm_scale
    dv = p.mT @ dof
    return laid_out_as(dq, q), _of_kv_heads(dk, k), _of_kv_heads(dv, v)


@ieee_products
def backward_scores(
    q: Q,
    k: K,
    v: V,
    o: O,
    lse: LSE,
    do: O,
    dlse: LSE | None,
    block_mask: BlockMask | None,
    sm_scale: float,
    deterministic: bool,
    scores: Scores,
    needs: Needs,
) -> ScoreGrads:
    """`dq, dk, dv` in the dtypes of `q, k, v`, and the gradients of what is needed of the scores."""
    qf, kf, vf, mask = _prepare(q, k, v, block_mask)
    found = weigh(qf, kf, mask, sm_scale, scores)
    has_key = found.mask.any(-1)
    dof = torch.where(has_key[..., None], do.to(qf.dtype), 0)
    delta = (dof * o.to(qf.dtype)).sum(-1)
    if dlse is not None:
        # a sink is in lse of queries without a key, too
        delta = delta - torch.where(has_key | (scores.sinks is not None), dlse.to(qf.dtype), 0)
    of_keys = torch.where(has_key, delta, 0)
    ds = found.p * ((dof @ vf.mT) * found.keep - of_keys[..., None]) * found.slope
    dv = (found.p * found.keep).mT @ dof
    tables = [
        table_gradient(ds, lookup.table, lookup.q_code[:, None] - lookup.k_code) if needed else None
        for lookup, needed in zip(scores.lookups, needs.tables, strict=True)
    ]
    sinks = None
    if scores.sinks is not None and needs.sinks:
        sinks = -(torch.exp(scores.sinks[:, None] - found.lse) * delta).sum((0, 2))
    return ScoreGrads(
        laid_out_as((ds @ kf) * sm_scale, q),
        _of_kv_heads((ds.mT @ qf) * sm_scale, k),
        _of_kv_heads(dv, v),
        tuple(ds.sum_to_size(t.shape) if n else None for t, n in zip(scores.dense, needs.dense, strict=True)),
        tuple(tables),
        sinks,
    )


def _of_kv_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of k or v, which is `like`, summed over the query heads of each group."""
    folded = gradient.view(like.shape[0], like.shape[1], -1, like.shape[2], gradient.shape[-1])
    return laid_out_as(folded.sum(2), like)


def _prepare(q: Q, k: K, v: V, block_mask: BlockMask | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs in the compute dtype with one kv head per query head, and the dense mask.

    Keys no query attends to, and queries without a key, become 0, so that a NaN in them reaches nothing.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    if block_mask is None:
        mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    else:
        mask = block_mask.to_dense()
    kf, vf = (t.to(compute).repeat_interleave(group, dim=1) for t in (k, v))
    has_query = mask.any(-2)[..., None]
    qf = torch.where(mask.any(-1, keepdim=True), q.to(compute), 0)
    return qf, torch.where(has_query, kf, 0), torch.where(has_query, vf, 0), mask


def _softmax(q: Tensor, k: Tensor, mask: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    s = ((q @ k.mT) * sm_scale).masked_fill(~mask, -float("inf"))
    if s.shape[-1] == 0:
        return s, s.new_full(s.shape[:-1], -float("inf"))
    m = s.amax(-1, keepdim=True)
    p = torch.exp(s - torch.where(m == -float("inf"), 0, m))
    total = p.sum(-1, keepdim=True)
    # of a row without a key, whose m is -inf
    total = torch.where(total == 0, 1, total)
    return p / total, (m + torch.log(total)).squeeze(-1)
