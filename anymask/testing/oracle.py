"""Inputs, dense fp64 attention to compare with, and the one rule that says how close is close enough."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from anymask.block_mask import BlockMask, TileLists
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
    s, lives = _scores(leaves[0], k_all, dense, scale)
    o = (torch.softmax(s, -1) * lives) @ v_all
    lse = torch.logsumexp(s, -1).masked_fill(~lives.squeeze(-1), -math.inf)
    grads_out = [do.double()] if dlse is None else [do.double(), dlse.double()]
    grads = torch.autograd.grad([o, lse][: len(grads_out)], leaves, grads_out)
    return Results(o.detach(), lse.detach(), *grads)


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
    s, lives = _scores(q, k_all, _dense(mask, q, k), scale)
    o = (torch.softmax(s, -1) * lives) @ v_all
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.logsumexp(s.to(wide), -1)
    p = (torch.exp2(s.to(wide) * LOG2_E - lse[..., None] * LOG2_E) * lives).to(q.dtype)
    lse = lse.masked_fill(~lives.squeeze(-1), -math.inf)
    delta = (o.to(wide) * do.to(wide)).sum(-1) - (0.0 if dlse is None else dlse.to(wide))
    ds = (p * ((do @ v_all.mT) - delta[..., None])).to(q.dtype) * scale
    dk, dv = (torch.unflatten(x.mT @ y, 1, (-1, group)).sum(2) for x, y in ((ds, q), (p, do)))
    return Results(o, lse, ds @ k_all, dk, dv)


@torch.no_grad()
def magnitudes(
    q: Q, k: K, v: V, mask: Tensor | BlockMask | None, scale: float | None, do: O, dlse: LSE | None = None
) -> Results:
    """What `reference` gives if every sum of its equations adds the absolute values of its terms, in fp64.

    Times eps, it is how far one rounding of each term moves a result, however much the terms cancel.
    """
    q, k, v, do = (t.double() for t in (q, k, v, do))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    s, lives = _scores(q, k, _dense(mask, q, k), scale)
    p = torch.softmax(s, -1) * lives
    delta = ((p @ v) * do).sum(-1) - (0.0 if dlse is None else dlse.double())
    ds = p * ((do @ v.mT).abs() + delta.abs()[..., None]) * abs(1 / math.sqrt(q.shape[3]) if scale is None else scale)
    dk, dv = (torch.unflatten(x.mT @ y.abs(), 1, (-1, group)).sum(2) for x, y in ((ds, q), (p, do)))
    lse = torch.logsumexp(s, -1).abs().masked_fill(~lives.squeeze(-1), 0.0)
    return Results(p @ v.abs(), lse, ds @ k.abs(), dk, dv)


def _dense(mask: Tensor | BlockMask | None, q: Q, k: K) -> Tensor:
    dense = mask.to_dense() if isinstance(mask, BlockMask) else mask
    if dense is None:
        dense = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    return dense.expand(*q.shape[:3], k.shape[2])


def _scores(q: Q, k: K, dense: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Masked scores, and bool `[batch, q_heads, q_len, 1]`: does the query have a key."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    lives = dense.any(-1, keepdim=True)
    s = (q @ k.mT) * scale
    # a row with no key has all scores 0 here and is cut out after the softmax, so autograd never sees -inf - -inf
    return s.masked_fill(~dense & lives, -math.inf).masked_fill(~lives, 0.0), lives


@dataclass(frozen=True)
class Record:
    """One comparison: the error as a share of what rule `kind` takes as its unit; `limit` is the largest allowed."""

    what: str
    dtype: torch.dtype
    # "max" or "rmse"
    kind: str
    ratio: float
    limit: float


# every comparison of `assert_matches` in this process since the list was last cleared
RECORDS: list[Record] = []

MAX_ERROR_LIMIT = 2.0
RMSE_LIMIT = 1.1
# for an RMSE to say anything
FEWEST_ROWS = 9
LSE_ERROR_LIMIT = 1e-3


def assert_matches(
    actual: Tensor,
    expected: Tensor,
    eager: Tensor | None,
    dtype: torch.dtype,
    what: str,
    rows: int | None = None,
    magnitude: Tensor | None = None,
) -> float:
    """Assert that `actual` is as close to fp64 as same-dtype eager torch is; return the ratio of the maximum errors.

    Shapes equal, every element finite, and

    - 16-bit: `max|actual - expected| <= 2 * (max|eager - expected| + eps * max|expected|)`, and
      `rmse(actual) <= 1.1 * max(rmse(eager), rounding)`;
    - fp32: the first of these, with `magnitude` for `expected` on the right;
    - fp64: `max|actual - expected| <= 1e-12 * max(1, max|expected|)`;
    - lse, for every dtype: `|actual - expected| <= 1e-3` (plus fp32's own spacing), -inf at exactly the same places.

    `rounding` is the error that no implementation can avoid: the RMSE of `expected` rounded once to the dtype.
    With few rows the eager error is itself a poor estimate: rounding errors are shared along a row, and the ratio of
    the RMSE of two equally good results of n rows has a standard deviation of `1 / sqrt(n)`. So both limits are at
    least `1 + 3 / sqrt(n)`: 1.1 stands from 900 rows on, 2 from 9. Nor is n larger than the number of elements that
    make up the squares of `expected`, their sum squared over the sum of their squares: where few elements are large,
    the RMSE is how those were rounded. With n below 9 it is not judged: of two equally good gradients of two keys and
    one dimension, every tenth has 3 times the RMSE of the other. In fp32, where nothing is rounded to 16 bits and the
    largest error is that of one row whose gradient is the difference of large terms, those terms set the floor.

    Args:
        actual: the tensor under test, dtype `dtype` (lse: fp32, or fp64 for fp64 inputs).
        expected: fp64 from `reference`.
        eager: from `eager`; not read for lse and fp64.
        what: a name of `Results`, for messages.
        rows: n, the rows whose errors are independent; default the non-zero rows of `expected`.
        magnitude: from `magnitudes`; default `expected`, which is the stricter.
    """
    if what not in Results._fields:
        raise ValueError(f"what is {what!r}; allowed are {Results._fields}")
    expected = expected.double()
    assert actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    kept_dtype = dtype if what != "lse" else torch.promote_types(dtype, torch.float32)
    assert actual.dtype == kept_dtype, f"{what} has dtype {actual.dtype}, expected {kept_dtype}"
    if actual.numel() == 0:
        return 0.0
    got = actual.detach().double()
    if what == "lse":
        return _assert_lse(got, expected, dtype)
    bad = ~torch.isfinite(got)
    assert not bad.any(), f"{what}: {int(bad.sum())} of {bad.numel()} elements not finite, first at {_first(bad)}"
    error, largest = (got - expected).abs(), float(expected.abs().max())
    if dtype == torch.float64:
        return _judge(error, float(error.max()), 1e-12 * max(1.0, largest), Record(what, dtype, "max", 0.0, 1.0))
    assert eager is not None, "eager is None; it is needed for every dtype but fp64"
    assert eager.shape == expected.shape, f"eager {what} has shape {tuple(eager.shape)}"
    eager_error = (eager.double() - expected).abs()
    rows = int((expected != 0).any(-1).sum()) if rows is None else rows
    squares = expected.square()
    rows = min(rows, int(squares.sum() ** 2 / squares.square().sum().clamp(min=1e-300)))
    noise = 1 + 3 / math.sqrt(max(rows, 1))
    if dtype != torch.float32 and rows >= FEWEST_ROWS:
        unit = max(_rms(eager_error), _rms(expected.to(dtype).double() - expected))
        _judge(error, _rms(error), unit, Record(what, dtype, "rmse", 0.0, max(RMSE_LIMIT, noise)))
    if dtype == torch.float32 and magnitude is not None:
        largest = float(magnitude.abs().max())
    unit = float(eager_error.max()) + torch.finfo(dtype).eps * largest
    return _judge(error, float(error.max()), unit, Record(what, dtype, "max", 0.0, max(MAX_ERROR_LIMIT, noise)))


def _assert_lse(got: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    dead = expected == -math.inf
    wrong = dead != (got == -math.inf)
    assert not wrong.any(), f"lse: -inf in the wrong places, first at {_first(wrong)}"
    bad = ~torch.isfinite(got) & ~dead
    assert not bad.any(), f"lse: {int(bad.sum())} elements not finite, first at {_first(bad)}"
    expected = expected.masked_fill(dead, 0.0)
    error = (got.masked_fill(dead, 0.0) - expected).abs()
    unit = LSE_ERROR_LIMIT + 2 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    return _judge(error, float(error.max()), unit, Record("lse", dtype, "max", 0.0, 1.0))


def _judge(error: Tensor, value: float, unit: float, rule: Record) -> float:
    ratio = value / unit if unit else (0.0 if value == 0 else math.inf)
    RECORDS.append(replace(rule, ratio=ratio))
    assert ratio <= rule.limit, (
        f"{rule.what}: {rule.kind} error {value:.3e} is {ratio:.3f} units of {unit:.3e}, allowed are {rule.limit:.3f}; "
        f"the largest error {float(error.max()):.3e} is at {_first(error == error.max())}"
    )
    return ratio


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def _first(hit: Tensor) -> list[int]:
    return [int(i) for i in hit.nonzero()[0]]


def assert_same_block_mask(a: BlockMask, b: BlockMask) -> None:
    """Assert that two packed masks agree in every field: lengths, lists, words, order and live maps, exactly."""
    assert (a.q_len, a.kv_len) == (b.q_len, b.kv_len), f"lengths {a.q_len, a.kv_len} and {b.q_len, b.kv_len}"
    for view in ("rows", "cols"):
        for field in fields(TileLists):
            name = f"{view}.{field.name}"
            x, y = (getattr(getattr(m, view), field.name) for m in (a, b))
            assert x.dtype == y.dtype, f"{name} has dtypes {x.dtype} and {y.dtype}"
            assert x.shape == y.shape, f"{name} has shapes {tuple(x.shape)} and {tuple(y.shape)}"
            differs = x.cpu() != y.cpu()
            assert not differs.any(), f"{name} differs in {int(differs.sum())} elements, first at {_first(differs)}"
