"""Is a result right? The fp64 oracle of `anymask.testing`, a few heads and rows at a time.

The oracle reads the dense mask, so an error in packing shows here too. Eager torch of the same dtype is the yardstick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anymask import BlockMask, slice_queries
from anymask.testing import eager, reference
from benchmarks.cases import Problem
from benchmarks.masks import Shape

# scores of a step, all query heads of one kv head: 512 MiB in fp64, of which the oracle holds several
SCORES = 2**26
# rows of tiles on which a mask too long for a tensor is compared
TILE_ROWS = 64
NAMES = ("o", "dq", "dk", "dv")
# most that a result may be off, in parts of the error of eager torch, in all and in its worst row
LIMIT = 5.0
# what is always allowed, in parts of eps: a few roundings
FLOOR = 4.0
Plane = tuple[int, int]


@dataclass(frozen=True)
class Errors:
    """How far a result is from fp64, per name of `NAMES`."""

    # |found - expected| / |expected|, Frobenius norms
    total: dict[str, float]
    # the same, and that of the worst single row, over what is allowed: above 1 is wrong, NaN too
    excess: dict[str, float]
    # `total` over the same of eager torch
    ratio: dict[str, float]

    @property
    def right(self) -> bool:
        """Whether nothing is off by more than is allowed; False also if anything is NaN."""
        return all(e <= 1 for e in self.excess.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {self.total[name]:.1e} ({self.ratio[name]:.2f} of eager's)" for name in self.total)


def planes(s: Shape) -> tuple[Plane, ...]:
    """The samples and kv heads that are checked: the first and the last."""
    return tuple(sorted({(0, 0), (s.batch - 1, s.kv_heads - 1)}))


def expected(problem: Problem, with_mask: bool = True) -> dict[Plane, list[tuple[Tensor, Tensor]]]:
    """For each of `planes`, fp64 and eager `o, dq` `[1, group, q_len, dim]` and `dk, dv` `[1, 1, kv_len, dim]`."""
    return {plane: _of_plane(problem, *plane, with_mask) for plane in planes(problem.case.shape)}


def _of_plane(problem: Problem, b: int, kv_head: int, with_mask: bool) -> list[tuple[Tensor, Tensor]]:
    heads = heads_of(problem.case.shape, kv_head)
    q, do = (t.detach()[b : b + 1, heads] for t in (problem.q, problem.do))
    k, v = (t.detach()[b : b + 1, kv_head : kv_head + 1] for t in (problem.k, problem.v))
    mask = problem.mask if with_mask else None
    step = max(1, SCORES // (k.shape[2] * q.shape[1]))
    parts: list[list[list[Tensor]]] = [[], []]
    for first in range(0, q.shape[2], step):
        rows = slice(first, first + step)
        seen = None if mask is None else mask[b % len(mask), None, :, rows]
        for kind, of in zip(parts, (reference, eager), strict=True):
            found = of(q[:, :, rows], k, v, seen, None, do[:, :, rows])
            kind.append([found.o, found.dq, found.dk.double(), found.dv.double()])
    # rows of o and dq are of their queries alone; dk and dv are sums over all queries
    joined = [[torch.cat(t, 2) if i < 2 else sum(t) for i, t in enumerate(zip(*kind, strict=True))] for kind in parts]
    return list(zip(*joined, strict=True))


def heads_of(s: Shape, kv_head: int) -> slice:
    """Query heads that read this kv head."""
    group = s.heads // s.kv_heads
    return slice(kv_head * group, (kv_head + 1) * group)


def errors(problem: Problem, found: tuple[Tensor, ...], wanted: dict[Plane, list[tuple[Tensor, Tensor]]]) -> Errors:
    """Errors of `o, dq, dk, dv`, or of `o` alone, each the worst of the planes of `wanted`."""
    total, excess, ratio = (dict.fromkeys(NAMES[: len(found)], 0.0) for _ in range(3))
    for (b, kv_head), tensors in wanted.items():
        heads = heads_of(problem.case.shape, kv_head)
        parts = heads, heads, slice(kv_head, kv_head + 1), slice(kv_head, kv_head + 1)
        for name, got, part, (want, yardstick) in zip(total, found, parts, tensors, strict=False):
            floor = FLOOR * torch.finfo(got.dtype).eps
            mine, its = (_errors(t, want) for t in (got.detach()[b : b + 1, part], yardstick))
            off = [error / max(LIMIT * of_eager, floor) for error, of_eager in zip(mine, its, strict=True)]
            total[name] = _worse(total[name], mine[0])
            excess[name] = _worse(excess[name], *off)
            ratio[name] = _worse(ratio[name], mine[0] / max(its[0], torch.finfo(got.dtype).eps / 8))
    return Errors(total, excess, ratio)


def _errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative error of all, and of the worst row, whose size is its own and that of a typical row."""
    wrong = got.double() - want
    # all zeros, under an empty mask: the error is absolute
    size = float(want.norm()) or 1.0
    typical = size / math.sqrt(want.shape[1] * want.shape[2])
    return float(wrong.norm()) / size, float((wrong.norm(dim=-1) / (want.norm(dim=-1) + typical)).max())


def mask_is(block_mask: BlockMask, problem: Problem) -> bool:
    """Whether a mask is that of the problem: of its tensor, or of its closed form on some rows of tiles."""
    if problem.mask is not None:
        return torch.equal(block_mask.to_dense(), problem.mask)
    kind, s, device = problem.case.mask, problem.case.shape, block_mask.device
    assert kind is not None
    assert kind.forms is not None
    (rule, _), zero = kind.forms(s, problem.device), torch.zeros((), dtype=torch.int64, device=device)
    for tile in torch.linspace(0, -(-s.q_len // 128) - 1, TILE_ROWS).long().unique().tolist():
        q = torch.arange(128 * tile, min(128 * tile + 128, s.q_len), device=device)
        found = slice_queries(block_mask, 128 * tile, 128 * tile + len(q)).to_dense()[0, 0]
        wanted = rule(zero, zero, q[:, None], torch.arange(s.kv_len, device=device)[None, :])
        if not torch.equal(found, wanted.expand(found.shape)):
            return False
    return True


def _worse(*errors: float) -> float:
    """The largest of errors; NaN is larger than any."""
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)
