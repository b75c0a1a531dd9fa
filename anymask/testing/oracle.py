"""Inputs, and dense attention to compare with: in fp64, in the same dtype, and by its magnitudes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anymask.block_mask import BlockMask
from anymask.shapes import LSE, K, O, Q, V

LAYOUTS = ("contiguous", "blhd", "packed", "transposed", "expanded")


def make_qkv(
    batch: int,
    q_heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    v_dim: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    layout: str = "contiguous",
    requires_grad: bool = False,
) -> tuple[Q, K, V]:
    """Standard normal q, k, v; the values do not depend on `layout`, except for "expanded".

    Args:
        layout: contiguous; blhd, views of `[batch, length, heads, dim]`; packed, k and v slices of one tensor (q too if
            the lengths agree); transposed, each a `.mT` view, so the last stride is not 1; expanded, k and v of
            one head stretched over all of them with stride 0.
    """
    generator = torch.Generator().manual_seed(seed)
    v_dim = head_dim if v_dim is None else v_dim
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; allowed are {LAYOUTS}")
    shapes = [(batch, q_heads, q_len, head_dim), (batch, kv_heads, kv_len, head_dim), (batch, kv_heads, kv_len, v_dim)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    if layout == "blhd":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    elif layout == "transposed":
        q, k, v = (t.mT.contiguous().mT for t in (q, k, v))
    elif layout == "expanded":
        k, v = (t[:, :1].expand(-1, kv_heads, -1, -1) for t in (k, v))
    elif layout == "packed":
        parts = [q, k, v] if q_len == kv_len else [k, v]
        flat = torch.cat([t.transpose(1, 2).flatten(2) for t in parts], dim=-1)
        slices = torch.split(flat, [t.shape[1] * t.shape[3] for t in parts], dim=-1)
        k, v = (torch.unflatten(s, -1, (kv_heads, -1)).transpose(1, 2) for s in slices[-2:])
        q = torch.unflatten(slices[0], -1, (q_heads, -1)).transpose(1, 2) if q_len == kv_len else q
    q, k, v = (t.detach().requires_grad_(requires_grad) for t in (q, k, v))
    return q, k, v


LOG2_E = math.log2(math.e)


class Results(NamedTuple):
    """Outputs and gradients of one call."""

    o: O
    lse: LSE
    dq: Q
    dk: K
    dv: V


def reference(
    q: Q, k: K, v: V, mask: Tensor | BlockMask | None, scale: float | None, do: O, dlse: LSE | None = None
) -> Results:
    """What the call should give, in fp64: dense softmax attention differentiated by autograd.

    Args:
        mask: bool, broadcastable to `[batch, q_heads, q_len, kv_len]`, or a `BlockMask`, or None.
    """
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    dense = _dense(mask, q, k)
    group = q.shape[1] // k.shape[1]
    k_all, v_all = (t.repeat_interleave(group, dim=1) for t in leaves[1:])
    s, has_key = _scores(leaves[0], k_all, dense, scale)
    o = (torch.softmax(s, -1) * has_key) @ v_all
    lse = torch.logsumexp(s, -1).masked_fill(~has_key.squeeze(-1), -math.inf)
    grads_out = [do.double()] if dlse is None else [do.double(), dlse.double()]
    grads = torch.autograd.grad([o, lse][: len(grads_out)], leaves, grads_out)
    return Results(o.detach(), lse.detach(), *grads)


def attend(
    q: Q,
    k: K,
    v: V,
    mask: Tensor | BlockMask | None = None,
    scale: float | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[O, LSE]:
    """`(o, lse)` of dense attention with all that happens to scores, in fp64; autograd differentiates it in all inputs.

    Args:
        q, k, v, mask, scale: as of `reference`.
        bias: floats broadcastable to `[batch, q_heads, q_len, kv_len]`; -inf hides a pair.
        softcap: c of `c tanh(s / c)`.
        sinks: `[q_heads]` or `[q_heads, n]`.
        keep: what weights are multiplied by, which dropout makes 0 or more than 1; broadcastable like `bias`.
    """
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    seen = _dense(mask, q, k)
    s = (q @ k.repeat_interleave(group, dim=1).mT) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if bias is not None:
        seen = seen & (bias != -math.inf)
        # no gradient and no NaN from pairs that are not seen
        s = s + torch.where(seen, bias.double(), 0.0)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    has_key = seen.any(-1)
    # far below any score: autograd never sees -inf - -inf
    s = torch.where(seen, s, -1e30)
    columns = s if sinks is None else torch.cat([s, _sink_columns(sinks.double(), s)], -1)
    lse = torch.logsumexp(columns, -1)
    p = torch.exp(s - lse[..., None]) * seen
    o = (p if keep is None else p * keep) @ v.repeat_interleave(group, dim=1)
    return o, lse if sinks is not None else lse.masked_fill(~has_key, -math.inf)


def _sink_columns(sinks: Tensor, s: Tensor) -> Tensor:
    """Sinks `[q_heads]` or `[q_heads, n]` as scores of further keys, `[batch, q_heads, q_len, n]`."""
    return sinks.view(sinks.shape[0], 1, -1).expand(s.shape[0], -1, s.shape[2], -1)


@torch.no_grad()
def eager(
    q: Q, k: K, v: V, mask: Tensor | BlockMask | None, scale: float | None, do: O, dlse: LSE | None = None
) -> Results:
    """The same in the dtype of q, as one would write it in torch: the yardstick of `assert_matches`.

    The gradients are the equations of FlashAttention, which start from `(q, k, v, o, lse, do)` alone: p is
    `exp2(s log2(e) - lse log2(e))`, and ds is `p * (dp - delta)` with `delta = rowsum(o * do)`. Autograd keeps p and
    takes `rowsum(p * dp)` for delta. On rows with many keys both err alike (medians differ by under 5 %); with one or
    two keys autograd cancels exactly, by luck of its formula, what nothing that keeps only o and lse can cancel.
    """
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k_all, v_all = (t.repeat_interleave(group, dim=1) for t in (k, v))
    s, has_key = _scores(q, k_all, _dense(mask, q, k), scale)
    o = (torch.softmax(s, -1) * has_key) @ v_all
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.logsumexp(s.to(wide), -1)
    p = (torch.exp2(s.to(wide) * LOG2_E - lse[..., None] * LOG2_E) * has_key).to(q.dtype)
    lse = lse.masked_fill(~has_key.squeeze(-1), -math.inf)
    delta = (o.to(wide) * do.to(wide)).sum(-1) - (0.0 if dlse is None else dlse.to(wide))
    ds = (p * ((do @ v_all.mT) - delta[..., None])).to(q.dtype) * scale
    dk, dv = (torch.unflatten(x.mT @ y, 1, (-1, group)).sum(2) for x, y in ((ds, q), (p, do)))
    return Results(o, lse, ds @ k_all, dk, dv)


@torch.no_grad()
def magnitudes(
    q: Q,
    k: K,
    v: V,
    mask: Tensor | BlockMask | None,
    scale: float | None,
    do: O,
    dlse: LSE | None = None,
    stored_lse: bool = False,
) -> Results:
    """What `reference` gives if every sum of its equations adds the absolute values of its terms, in fp64.

    Times eps, it is how far one rounding of each term moves a result, however much the terms cancel.

    Args:
        stored_lse: count the rounding of lse too, which `p = exp(s - lse)` of a backward pass cannot escape: it moves p
            by |lse| times itself. Eager torch does for queries of one key, whose s and lse are one number.
    """
    q, k, v, do = (t.double() for t in (q, k, v, do))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    s, has_key = _scores(q, k, _dense(mask, q, k), scale)
    p = torch.softmax(s, -1) * has_key
    o = p @ v.abs()
    delta = ((p @ v) * do).sum(-1) - (0.0 if dlse is None else dlse.double())
    lse = torch.logsumexp(s, -1).abs().masked_fill(~has_key.squeeze(-1), 0.0)
    if stored_lse:
        p = p * (1 + lse[..., None])
    ds = p * ((do @ v.mT).abs() + delta.abs()[..., None]) * abs(1 / math.sqrt(q.shape[3]) if scale is None else scale)
    dk, dv = (torch.unflatten(x.mT @ y.abs(), 1, (-1, group)).sum(2) for x, y in ((ds, q), (p, do)))
    return Results(o, lse, ds @ k.abs(), dk, dv)


def _dense(mask: Tensor | BlockMask | None, q: Q, k: K) -> Tensor:
    dense = mask.to_dense() if isinstance(mask, BlockMask) else mask
    if dense is None:
        dense = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    return dense.expand(*q.shape[:3], k.shape[2])


def _scores(q: Q, k: K, dense: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Masked scores, and bool `[batch, q_heads, q_len, 1]`: does the query have a key."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    has_key = dense.any(-1, keepdim=True)
    s = (q @ k.mT) * scale
    # a row with no key has all scores 0 here and is cut out after the softmax, so autograd never sees -inf - -inf
    return s.masked_fill(~dense & has_key, -math.inf).masked_fill(~has_key, 0.0), has_key
