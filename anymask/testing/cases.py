"""One call of `attention` by name, forward and backward: what the test grids are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from anymask import BlockMask, Mask
from anymask.api import attention
from anymask.backends import Backend
from anymask.shapes import LSE, K, O, Q, V
from anymask.testing.expressions import make_mask
from anymask.testing.oracle import Results, eager, magnitudes, make_qkv, reference
from anymask.testing.rules import Judge

DTYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}


@dataclass(frozen=True)
class Case:
    """One call of `attention`, forward and backward, by name: what the test grids are made of."""

    # a name of `MASKS` or `BUILDERS`, or several combined by &, | and ~
    mask: str
    q_len: int
    kv_len: int
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    v_dim: int | None = None
    batch: int = 2
    q_heads: int = 2
    kv_heads: int = 2
    layout: str = "contiguous"
    scale: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        """`documents-q239-kv129-d64-bf16`, then what is unusual."""
        parts = [self.mask, f"q{self.q_len}", f"kv{self.kv_len}", f"d{self.head_dim}"]
        parts += [f"dv{self.v_dim}"] if self.v_dim not in (None, self.head_dim) else []
        parts += [DTYPE_NAMES[self.dtype]]
        if (self.batch, self.q_heads, self.kv_heads) != (2, 2, 2):
            parts += [f"b{self.batch}", f"h{self.q_heads}over{self.kv_heads}"]
        parts += [self.layout] if self.layout != "contiguous" else []
        parts += [f"scale{self.scale:g}"] if self.scale is not None else []
        return "-".join(parts)


class Inputs(NamedTuple):
    """The tensors of a `Case`."""

    q: Q
    k: K
    v: V
    mask: Mask | Tensor | BlockMask | None
    # bool [batch, q_heads, q_len, kv_len], the meaning of `mask`
    dense: Tensor
    do: O
    dlse: LSE


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Inputs of a case; the same values on every device."""
    heads = case.batch, case.q_heads, case.kv_heads
    q, k, v = make_qkv(
        *heads, case.q_len, case.kv_len, case.head_dim, case.v_dim,
        dtype=case.dtype, device=device, seed=case.seed, layout=case.layout, requires_grad=True,
    )  # fmt: skip
    mask, dense = make_mask(case.mask, case.batch, case.q_heads, case.q_len, case.kv_len, case.seed + 1, device)
    generator = torch.Generator().manual_seed(case.seed + 2)
    do = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(device, case.dtype)
    if case.layout in ("blhd", "packed"):
        do = do.transpose(1, 2).contiguous().transpose(1, 2)
    elif case.layout == "transposed":
        do = do.mT.contiguous().mT
    elif case.layout == "expanded":
        do = do[:, :1, :1, :1].expand_as(do)
    dlse = torch.randn(q.shape[:3], generator=generator).to(device)
    return Inputs(q, k, v, mask, dense.expand(*q.shape[:3], k.shape[2]), do, dlse)


def run(
    inputs: Inputs, scale: float | None = None, backend: Backend | None = None, deterministic: bool | None = None
) -> Results:
    """o, lse, dq, dk, dv of `attention`."""
    q, k, v, mask = inputs[:4]
    o, lse = attention(q, k, v, mask, scale=scale, return_lse=True, backend=backend, deterministic=deterministic)
    dlse = inputs.dlse.to(lse.dtype)
    return Results(o.detach(), lse.detach(), *torch.autograd.grad([o, lse], inputs[:3], [inputs.do, dlse]))


def check(
    case: Case, backend: Backend | None = None, device: torch.device | str = "cpu", deterministic: bool | None = None
) -> Results:
    """Assert that `attention` matches the oracle, and that what must be 0 is exactly 0; return its results."""
    results = run(make_inputs(case, device), case.scale, backend, deterministic)
    _oracle(case, str(device))(results)
    return results


def judge_of(inputs: Inputs, case: Case, rows: int | None = None) -> Judge:
    """What the results of `inputs` are held against, made once for any number of backends; `rows` as of `Judge`."""
    args = *inputs[:3], inputs.dense, case.scale, inputs.do, inputs.dlse
    if case.scale == 0:
        # all heads and samples have the same p, and its errors
        rows = case.q_len if rows is None else min(rows, case.q_len)
    return Judge(reference(*args), eager(*args), magnitudes(*args, stored_lse=True), case.dtype, inputs.dense, rows)


# the backends of one case follow one another in a test file, and so do the cases of one oracle
@lru_cache(maxsize=4)
def _oracle(case: Case, device: str) -> Judge:
    return judge_of(make_inputs(case, device), case)
