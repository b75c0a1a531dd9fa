"""Scores of every kind at a small size, and dense fp64 attention under them, differentiated by autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anymask import BlockMask, pack
from anymask.scores import Lookup, Needs, ScoreGrads, Scores, dropout
from anymask.testing import MASKS

# shape of a dense term by name: which of batch, heads, queries and keys it has of its own
DENSE = {
    "full": (1, 1, 1, 1),
    "by_head": (0, 1, 1, 1),
    "by_sample": (1, 0, 1, 1),
    "shared": (0, 0, 1, 1),
    "keys": (1, 0, 0, 1),
    "keys_by_head": (0, 1, 0, 1),
    "queries": (1, 1, 1, 0),
    "heads": (0, 1, 0, 0),
    "one": (0, 0, 0, 0),
}


@dataclass(frozen=True)
class Call:
    """Inputs of a backend's `forward` and `backward_scores`."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor | None
    mask: BlockMask | None
    dense_mask: Tensor | None
    scale: float
    scores: Scores

    @property
    def needs(self) -> Needs:
        """All gradients there are."""
        s = self.scores
        return Needs((True,) * len(s.dense), (True,) * len(s.lookups), s.sinks is not None)


def relative(heads: int, q_len: int, kv_len: int, device: str = "cpu") -> Lookup:
    """A random table of relative positions."""
    table = torch.randn(heads, q_len + kv_len - 1, device=device)
    q_code = torch.arange(q_len, dtype=torch.int32, device=device) + kv_len - 1
    return Lookup(table, q_code, torch.arange(kv_len, dtype=torch.int32, device=device), True)


def window(heads: int, q_len: int, kv_len: int, device: str = "cpu", width: int = 9) -> Lookup:
    """A random table of relative positions in a picture `width` pixels wide."""
    step = 2 * width - 1

    def code(length: int) -> Tensor:
        index = torch.arange(length, device=device)
        return index // width * step + index % width

    k_code = code(kv_len)
    q_code = code(q_len) + k_code.max()
    entries = int(q_code.max() - k_code.min()) + 1
    return Lookup(torch.randn(heads, entries, device=device), q_code.int(), k_code.int(), False)


def make_call(
    mask: str = "none",
    dense: tuple[str, ...] = (),
    tables: tuple[str, ...] = (),
    *,
    shape: tuple[int, int, int, int, int] = (2, 4, 2, 100, 140),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float16,
    bias_dtype: torch.dtype | None = None,
    softcap: float = 0.0,
    sinks: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    hidden: float = 0.0,
    with_dlse: bool = True,
    device: str = "cpu",
) -> Call:
    """A random call. `shape`: batch, q_heads, kv_heads, q_len, kv_len; `hidden`: the share of -inf in dense terms."""
    batch, q_heads, kv_heads, q_len, kv_len = shape

    def randn(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    q, k = randn(batch, q_heads, q_len, dims[0]), randn(batch, kv_heads, kv_len, dims[0])
    v, do = randn(batch, kv_heads, kv_len, dims[1]), randn(batch, q_heads, q_len, dims[1])
    terms = []
    for name in dense:
        size = [n if own else 1 for n, own in zip((batch, q_heads, q_len, kv_len), DENSE[name], strict=True)]
        term = randn(*size, dtype=bias_dtype or dtype)
        terms.append(term.masked_fill_(torch.rand(size, device=device) < hidden, -math.inf))
    makers = {"relative": relative, "window": window}
    lookups = [
        makers[name.removesuffix("_shared")](1 if "shared" in name else q_heads, q_len, kv_len, device)
        for name in tables
    ]
    scores = Scores(
        tuple(terms), tuple(lookups), softcap,
        torch.randn(q_heads, device=device) if sinks else None,
        dropout_p, torch.tensor([0x1234_5678_9ABC, 4 * 2**33 + 8], device=device) if dropout_p else None,
    )  # fmt: skip
    packed = plane = None
    if mask != "none":
        named, plane = MASKS[mask](batch, q_heads, q_len, kv_len)
        plane = plane.to(device).expand(batch, q_heads, q_len, kv_len)
        packed = pack(plane if named is None else named, q_len=q_len, kv_len=kv_len, device=device)
    dlse = torch.randn(batch, q_heads, q_len, device=device) if with_dlse else None
    return Call(q, k, v, do, dlse, packed, plane, dims[0] ** -0.5 if scale is None else scale, scores)


def run(backend: Any, call: Call) -> tuple[Tensor, Tensor, ScoreGrads]:
    """`(o, lse, gradients)` of a backend."""
    c = call
    assert backend.why_not(c.q, c.k, c.v, c.mask, c.scores) is None
    o, lse = backend.forward(c.q, c.k, c.v, c.mask, c.scale, c.scores)
    grads = backend.backward_scores(c.q, c.k, c.v, o, lse, c.do, c.dlse, c.mask, c.scale, True, c.scores, c.needs)
    return o, lse, grads


def expected(call: Call, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, ScoreGrads]:
    """The same by dense attention in fp64."""
    c, s = call, call.scores
    wide = [t.detach().to(dtype).requires_grad_() for t in (c.q, c.k, c.v)]
    dense = [t.detach().to(dtype).requires_grad_() for t in s.dense]
    tables = [x.table.detach().to(dtype).requires_grad_() for x in s.lookups]
    sinks = None if s.sinks is None else s.sinks.detach().to(dtype).requires_grad_()
    group = c.q.shape[1] // c.k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in wide[1:])
    x = (wide[0] @ k.mT) * c.scale
    shown = torch.ones_like(x, dtype=torch.bool) if c.dense_mask is None else c.dense_mask.expand(x.shape)
    for term in dense:
        shown = shown & (term != -math.inf)
    for term in dense:
        x = x + torch.where(shown, term, 0)
    for lookup, table in zip(s.lookups, tables, strict=True):
        entry = (lookup.q_code[:, None] - lookup.k_code[None, :]).long()
        x = x + torch.where(shown, table[:, entry], 0)
    if s.softcap:
        x = s.softcap * torch.tanh(x / s.softcap)
    # masked by numbers below all others, so that autograd meets no -inf - -inf
    x = x.masked_fill(~shown, -1e30)
    whole = x if sinks is None else torch.cat([x, sinks[None, :, None, None].expand(*x.shape[:3], 1)], -1)
    lse = torch.logsumexp(whole, -1)
    p = torch.exp(x - lse[..., None]) * shown
    if s.seed is not None:
        axes = [
            torch.arange(n, device=x.device).view(*[-1 if d == i else 1 for i in range(4)])
            for d, n in enumerate(x.shape)
        ]
        p = p * dropout.keep(s.seed, *axes, s.dropout_p) * dropout.keep_scale(s.dropout_p)
    o = p @ v
    if sinks is None:
        lse = lse.masked_fill(~shown.any(-1), -math.inf)
    leaves = [*wide, *dense, *tables, *([] if sinks is None else [sinks])]
    outs, into = [o], [c.do.to(dtype)]
    if c.dlse is not None:
        outs, into = [o, lse], [*into, c.dlse.to(dtype)]
    grads = torch.autograd.grad(outs, leaves, into, allow_unused=True)
    grads = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
    n = 3 + len(dense)
    return (
        o.detach(),
        lse.detach(),
        ScoreGrads(
            *grads[:3], tuple(grads[3:n]), tuple(grads[n : n + len(tables)]), None if sinks is None else grads[-1]
        ),
    )


def named(result: tuple[Tensor, Tensor, ScoreGrads]) -> dict[str, Tensor]:
    """All tensors of a result by name."""
    o, lse, g = result
    found = {"o": o, "lse": lse, "dq": g.dq, "dk": g.dk, "dv": g.dv}
    found |= {f"dense{i}": t for i, t in enumerate(g.dense) if t is not None}
    found |= {f"table{i}": t for i, t in enumerate(g.tables) if t is not None}
    return found if g.sinks is None else found | {"sinks": g.sinks}


# error over the norm of what is expected, of results in a dtype and of sums in fp32 over products in it
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 3e-6}


def check(backend: Any, call: Call, factor: float = 1.0) -> dict[str, Tensor]:
    """Assert that a backend's results are those of fp64, by norms; return them."""
    got, want = named(run(backend, call)), named(expected(call))
    assert got.keys() == want.keys()
    limit = factor * LIMITS[call.q.dtype]
    for name, x in got.items():
        y = want[name]
        assert x.shape == y.shape, f"{name}: {tuple(x.shape)}, not {tuple(y.shape)}"
        if name == "lse":
            assert torch.equal(x == -math.inf, y == -math.inf), "lse is -inf elsewhere"
            x, y = (t.nan_to_num(neginf=0.0) for t in (x, y))
        assert x.isfinite().all(), f"{name}: {int((~x.isfinite()).sum())} of {x.numel()} not finite"
        error, size = float((x.double() - y).norm()), float(y.norm())
        # of sums that cancel, the error is that of their terms
        floor = 0.0 if name in ("o", "lse", "dv") else _ds_size(call) * limit * 0.1 if y.numel() < 64 else 0.0
        assert error <= limit * size + floor + 1e-12, (
            f"{name}: error {error:.3e} of {size:.3e}, allowed {limit:.0e} of it"
        )
    return got


def _ds_size(call: Call) -> float:
    """A bound of the norm of what sums of ds add up."""
    return float(call.do.double().norm()) * float(call.v.double().norm(dim=-1).max())


def without(call: Call, **changes: Any) -> Call:
    """The call with other scores."""
    return replace(call, scores=replace(call.scores, **changes))
