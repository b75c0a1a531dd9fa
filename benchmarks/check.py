"""Is a result right? Attention and its gradients in fp64, written out, for single heads of k and v.

It reads the dense mask and shares no code with anymask, so an error in packing shows here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anymask import BlockMask
from benchmarks.masks import MaskMod
from benchmarks.suites import Problem

# scores of a step: 128 MiB in fp64
SCORES = 2**24
# lines of tiles on which a mask too long for a tensor is compared
LINES = 64
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


def reference(problem: Problem, b: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp64 `o, dq` `[query heads of the group, length, head_dim]` and `dk, dv` `[1, length, head_dim]` of one head of k
    and v."""
    heads = heads_of(problem, group)
    q, do = (t.detach()[b, heads].double() for t in (problem.q, problem.do))
    k, v = (t.detach()[b, group].double() for t in (problem.k, problem.v))
    scale = 1 / math.sqrt(problem.shape.head_dim)
    o, dq, dk, dv = (torch.zeros_like(t) for t in (q, q, k, v))
    for head in range(q.shape[0]):
        for first in range(0, problem.shape.length, _rows(problem)):
            rows = slice(first, first + _rows(problem))
            s = (q[head, rows] @ k.mT).mul_(scale)
            if problem.mask is not None:
                s.masked_fill_(~problem.mask[rows], -math.inf)
            # a row with no key is NaN here and 0 by definition
            p = torch.softmax(s, -1).nan_to_num_(0)
            o[head, rows] = p @ v
            dp = do[head, rows] @ v.mT
            dv += p.mT @ do[head, rows]
            # the sum of p * dp over keys is that of o * do
            ds = dp.sub_((o[head, rows] * do[head, rows]).sum(-1, keepdim=True)).mul_(p)
            dq[head, rows] = (ds @ k).mul_(scale)
            dk += (ds.mT @ q[head, rows]).mul_(scale)
    return o, dq, dk[None], dv[None]


def _rows(problem: Problem) -> int:
    return max(1, SCORES // problem.shape.length)


def heads_of(problem: Problem, group: int) -> slice:
    """Query heads that read this head of k and v."""
    size = problem.shape.heads // problem.shape.kv_heads
    return slice(group * size, (group + 1) * size)


def planes(problem: Problem) -> tuple[tuple[int, int], ...]:
    """The batches and heads of k and v that are checked: the first and the last."""
    return tuple(sorted({(0, 0), (problem.shape.batch - 1, problem.shape.kv_heads - 1)}))


def references(problem: Problem) -> dict[tuple[int, int], tuple[Tensor, ...]]:
    """`reference` of each plane of `planes`."""
    return {plane: reference(problem, *plane) for plane in planes(problem)}


def errors(problem: Problem, found: tuple[Tensor, ...], expected: dict[tuple[int, int], tuple[Tensor, ...]]) -> Errors:
    """Errors of `o, dq, dk, dv` `[batch, heads, length, head_dim]`, or of `o` alone, over the planes of `expected`."""
    total = dict.fromkeys(NAMES[: len(found)], 0.0)
    worst_row = dict(total)
    for (b, group), tensors in expected.items():
        heads = heads_of(problem, group)
        parts = (heads, heads, slice(group, group + 1), slice(group, group + 1))
        for name, got, part, want in zip(total, found, parts, tensors, strict=False):
            wrong = got.detach()[b, part].double() - want
            # all zeros, under an empty mask: the error is absolute
            size = float(want.norm()) or 1.0
            typical = size / math.sqrt(want.shape[0] * want.shape[1])
            total[name] = _worse(total[name], float(wrong.norm()) / size)
            row = wrong.norm(dim=-1) / (want.norm(dim=-1) + typical)
            worst_row[name] = _worse(worst_row[name], float(row.max()))
    return Errors(total, worst_row, TOLERANCE[problem.shape.dtype])


def lines_match(block_mask: BlockMask, rule: MaskMod) -> bool:
    """Whether a mask says what its closed form says, on the first, the last and other lines of query tiles."""
    length, device = block_mask.q_len, block_mask.device
    lines = torch.linspace(0, -(-length // 128) - 1, LINES).long().unique().tolist()
    zero, k = torch.zeros((), dtype=torch.int64, device=device), torch.arange(block_mask.kv_len, device=device)
    for line in lines:
        q = torch.arange(128 * line, min(128 * line + 128, length), device=device)
        found = block_mask.queries(128 * line, 128 * line + q.numel()).to_dense()[0, 0]
        if not torch.equal(found, rule(zero, zero, q[:, None], k[None, :]).expand(found.shape)):
            return False
    return True


def _worse(a: float, b: float) -> float:
    """The larger of two errors; NaN is the largest."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
