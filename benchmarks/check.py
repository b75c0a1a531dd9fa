"""Is a result right? The fp64 oracle of `anymask.testing`, a few heads and rows at a time.

The oracle reads the dense mask, so an error in packing shows here too. Eager torch of the same dtype is the yardstick.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anymask import BlockMask, slice_queries
from anymask.testing import eager, reference
from benchmarks import scores
from benchmarks.cases import Inputs
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
# fp64 and eager `o, dq` `[1, group, q_len, dim]` and `dk, dv` `[1, 1, kv_len, dim]`, by sample and kv head, and the
# gradients of learned tensors, by `LEAVES`
Expected = dict[tuple[int, int], list[tuple[Tensor, Tensor]]]
LEAVES = -1, -1


@dataclass(frozen=True)
class Errors:
    """How far a result is from fp64, per name of `NAMES`."""

    # |found - expected| / |expected|, Frobenius norms
    total: dict[str, float] = field(default_factory=dict)
    # the same, and that of the worst single row, over what is allowed: above 1 is wrong, NaN too
    excess: dict[str, float] = field(default_factory=dict)
    # `total` over the same of eager torch
    ratio: dict[str, float] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether nothing is off by more than is allowed; False also if anything is NaN."""
        return all(e <= 1 for e in self.excess.values())

    def __str__(self) -> str:
        beside = {name: f" ({times:.2f} of eager's)" for name, times in self.ratio.items()}
        said = (f"{name} {error:.1e}{beside.get(name, '')}" for name, error in self.total.items())
        return ", ".join(said) or "it packs another mask"


def expected(inputs: Inputs, with_mask: bool = True) -> Expected:
    """What the first sample and kv head should give, and the last."""
    s = inputs.case.shape
    planes = dict.fromkeys(((0, 0), (s.batch - 1, s.kv_heads - 1)))
    if inputs.case.scores is not None and with_mask:
        return _with_scores(inputs, set(planes))
    return {plane: _of_plane(inputs, *plane, with_mask) for plane in planes}


def _of_plane(inputs: Inputs, b: int, kv_head: int, with_mask: bool) -> list[tuple[Tensor, Tensor]]:
    heads = heads_of(inputs.case.shape, kv_head)
    q, do = (t.detach()[b : b + 1, heads] for t in (inputs.q, inputs.do))
    k, v = (t.detach()[b : b + 1, kv_head : kv_head + 1] for t in (inputs.k, inputs.v))
    mask = inputs.mask[b % len(inputs.mask), None] if with_mask and inputs.mask is not None else None
    step = max(1, SCORES // (k.shape[2] * q.shape[1]))
    parts: list[list[list[Tensor]]] = [[], []]
    for rows in (slice(first, first + step) for first in range(0, q.shape[2], step)):
        for kind, of in zip(parts, (reference, eager), strict=True):
            found = of(q[:, :, rows], k, v, None if mask is None else mask[:, :, rows], None, do[:, :, rows])
            kind.append([found.o, found.dq, found.dk.double(), found.dv.double()])
    # rows of o and dq are of their queries alone; dk and dv are sums over all queries
    joined = [[torch.cat(t, 2) if i < 2 else sum(t) for i, t in enumerate(zip(*kind, strict=True))] for kind in parts]
    return list(zip(*joined, strict=True))


def _with_scores(inputs: Inputs, planes: set[tuple[int, int]]) -> Expected:
    """The same under scores of a kind; gradients of its tensors are sums over all planes."""
    s, found = inputs.case.shape, Expected()
    every = planes if not inputs.leaves else {(b, h) for b in range(s.batch) for h in range(s.kv_heads)}
    names, sums = list(inputs.leaves), [[0.0 for _ in inputs.leaves] for _ in range(2)]
    for b, kv_head in sorted(every):
        kinds = []
        for total, dtype in zip(sums, (torch.float64, s.dtype), strict=True):
            own = [t.detach().to(dtype if dtype == torch.float64 else t.dtype) for t in inputs.leaves.values()]
            results, of_leaves = _plane_with_scores(inputs, b, kv_head, dtype, dict(zip(names, own, strict=True)))
            kinds.append(results)
            total[:] = [x + y for x, y in zip(total, of_leaves, strict=True)]
        if (b, kv_head) in planes:
            found[b, kv_head] = list(zip(*kinds, strict=True))
    return found | ({LEAVES: list(zip(*sums, strict=True))} if names else {})


def _plane_with_scores(
    inputs: Inputs, b: int, kv_head: int, dtype: torch.dtype, leaves: scores.Leaves
) -> tuple[list[Tensor], list[Tensor]]:
    kind, heads = inputs.case.scores, heads_of(inputs.case.shape, kv_head)
    assert kind is not None
    q, do = (t.detach()[b, heads].to(dtype) for t in (inputs.q, inputs.do))
    k, v = (t.detach()[b, kv_head : kv_head + 1].to(dtype) for t in (inputs.k, inputs.v))
    mask = None if inputs.mask is None else inputs.mask[b % len(inputs.mask)]
    number, step = torch.arange(heads.start, heads.stop, device=q.device), max(1, SCORES // (k.shape[1] * len(q)))
    found = []
    for first in range(0, q.shape[1], step):
        rows = torch.arange(first, min(first + step, q.shape[1]), device=q.device)
        own = [t.detach().requires_grad_() for t in (q[:, rows], k, v, *leaves.values())]
        named = dict(zip(leaves, own[3:], strict=True))
        seen = None if mask is None else mask[:, rows]
        o = scores.attend(own[0][None], own[1][None], own[2][None], seen, kind, named, (b, number, rows))
        grads = torch.autograd.grad(o, own, do[None, :, rows])
        found.append([o.detach(), grads[0][None], *(t.double() for t in grads[1:])])
    o, dq, dk, dv, *of_leaves = zip(*found, strict=True)
    return [torch.cat(o, 2), torch.cat(dq, 2), sum(dk)[None], sum(dv)[None]], [sum(t) for t in of_leaves]


def heads_of(s: Shape, kv_head: int) -> slice:
    """Query heads that read this kv head."""
    group = s.heads // s.kv_heads
    return slice(kv_head * group, (kv_head + 1) * group)


def errors(inputs: Inputs, found: tuple[Tensor, ...], wanted: Expected) -> Errors:
    """Errors of `o, dq, dk, dv`, or of `o` alone, each the worst of the planes of `wanted`."""
    worst, eps = Errors(), torch.finfo(found[0].dtype).eps
    for name, got, want, yardstick in _compared(inputs, found, wanted):
        mine, of_eager = (_errors(t, want) for t in (got, yardstick))
        off = [error / max(LIMIT * its, FLOOR * eps) for error, its in zip(mine, of_eager, strict=True)]
        for kind, *values in (
            (worst.total, mine[0]),
            (worst.excess, *off),
            (worst.ratio, mine[0] / max(of_eager[0], eps / 8)),
        ):
            # NaN is larger than any
            kind[name] = float(torch.tensor([kind.get(name, 0.0), *values], dtype=torch.float64).max())
    return worst


def _compared(
    inputs: Inputs, found: tuple[Tensor, ...], wanted: Expected
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, what was found, fp64 and eager of each tensor that is compared."""
    for (b, kv_head), tensors in wanted.items():
        if (b, kv_head) == LEAVES:
            for name, got, pair in zip(inputs.leaves, found[4:], tensors, strict=False):
                yield name, *(t.detach().reshape(1, 1, -1, t.shape[-1]) for t in (got, *pair))
            continue
        own = slice(kv_head, kv_head + 1)
        parts = heads_of(inputs.case.shape, kv_head), heads_of(inputs.case.shape, kv_head), own, own
        for name, got, part, pair in zip(NAMES, found, parts, tensors, strict=False):
            yield name, got.detach()[b : b + 1, part], *pair


def _errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative error of all, and of the worst row, whose size is its own and that of a typical row."""
    wrong = got.double() - want
    # all zeros, under an empty mask: the error is absolute
    size = float(want.norm()) or 1.0
    typical = size / math.sqrt(want.shape[1] * want.shape[2])
    return float(wrong.norm()) / size, float((wrong.norm(dim=-1) / (want.norm(dim=-1) + typical)).max())


def mask_is(block_mask: BlockMask, inputs: Inputs) -> bool:
    """Whether a mask is that of the case: of its tensor, or of its closed form on some rows of tiles."""
    if inputs.mask is not None:
        return torch.equal(block_mask.to_dense(), inputs.mask)
    kind, s, device = inputs.case.mask, inputs.case.shape, block_mask.device
    assert kind is not None
    assert kind.forms is not None
    (rule, _), zero = kind.forms(s, inputs.q.device.type), torch.zeros((), dtype=torch.int64, device=device)
    for tile in torch.linspace(0, -(-s.q_len // 128) - 1, TILE_ROWS).long().unique().tolist():
        q = torch.arange(128 * tile, min(128 * tile + 128, s.q_len), device=device)
        found = slice_queries(block_mask, 128 * tile, 128 * tile + len(q)).to_dense()[0, 0]
        wanted = rule(zero, zero, q[:, None], torch.arange(s.kv_len, device=device)[None, :])
        if not torch.equal(found, wanted.expand(found.shape)):
            return False
    return True
