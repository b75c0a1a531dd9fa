"""Is a result right? Attention and its gradients in fp64, written out, for single (batch, head) planes.

It reads the dense mask and shares no code with anymask, so an error in packing shows here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.suites import Problem

# query rows of a step: 2048 x 8192 fp64 scores are 128 MiB
ROWS = 2048
NAMES = ("o", "dq", "dk", "dv")
# right results measure about 1e-3 in 16 bits and 1e-6 in fp32
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float64: 1e-10}
# a single row may be worse than the whole by this factor
ROW_FACTOR = 2.5


@dataclass(frozen=True)
class Errors:
    """How far a result is from fp64, in parts of the reference."""

    # |found - expected| / |expected|, Frobenius norms, per name of `NAMES`
    total: dict[str, float]
    # the same of the worst single row, where |expected| is that of the row plus that of a typical row
    worst_row: dict[str, float]
    tolerance: float

    @property
    def right(self) -> bool:
        """False also if anything is NaN."""
        total = all(e <= self.tolerance for e in self.total.values())
        return total and all(e <= self.tolerance * ROW_FACTOR for e in self.worst_row.values())

    def __str__(self) -> str:
        return " ".join(f"{name} {self.total[name]:.1e}/{self.worst_row[name]:.1e}" for name in self.total)


def reference(problem: Problem, b: int, h: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp64 `o, dq, dk, dv` of one plane, `[length, head_dim]` each."""
    q, k, v, do = (t.detach()[b, h].double() for t in (problem.q, problem.k, problem.v, problem.do))
    scale = 1 / math.sqrt(problem.shape.head_dim)
    o, dq, dk, dv = (torch.zeros_like(t) for t in (q, q, k, v))
    for first in range(0, problem.shape.length, ROWS):
        rows = slice(first, first + ROWS)
        s = (q[rows] @ k.mT) * scale
        if problem.mask is not None:
            s.masked_fill_(~problem.mask[rows], -math.inf)
        # a row with no key is NaN here and 0 by definition
        p = torch.softmax(s, -1).nan_to_num_(0)
        o[rows] = p @ v
        dp = do[rows] @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dq[rows] = (ds @ k) * scale
        dk += (ds.mT @ q[rows]) * scale
        dv += p.mT @ do[rows]
    return o, dq, dk, dv


def planes(problem: Problem) -> tuple[tuple[int, int], ...]:
    """The (batch, head) pairs that are checked: the first and the last."""
    return tuple(sorted({(0, 0), (problem.shape.batch - 1, problem.shape.heads - 1)}))


def references(problem: Problem) -> dict[tuple[int, int], tuple[Tensor, ...]]:
    """`reference` of each plane of `planes`."""
    return {plane: reference(problem, *plane) for plane in planes(problem)}


def errors(
    found: tuple[Tensor, ...], expected: dict[tuple[int, int], tuple[Tensor, ...]], dtype: torch.dtype
) -> Errors:
    """Errors of `o, dq, dk, dv` `[batch, heads, length, head_dim]`, the largest over the planes of `expected`."""
    total = dict.fromkeys(NAMES, 0.0)
    worst_row = dict.fromkeys(NAMES, 0.0)
    for (b, h), tensors in expected.items():
        for name, got, want in zip(NAMES, found, tensors, strict=True):
            wrong = got.detach()[b, h].double() - want
            typical = want.norm() / math.sqrt(want.shape[0])
            total[name] = _worse(total[name], float(wrong.norm() / want.norm()))
            row = wrong.norm(dim=-1) / (want.norm(dim=-1) + typical)
            worst_row[name] = _worse(worst_row[name], float(row.max()))
    return Errors(total, worst_row, TOLERANCE[dtype])


def _worse(a: float, b: float) -> float:
    """The larger of two errors; NaN is the largest."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
