"""A `score_mod` as a bias: what it reads, whether it only adds, and what it adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from anymask import vmap
from anymask.scores.bias import Bias, Found

# pairs that are evaluated together: 16 MiB of fp32 for each result inside fn
PAIRS = 1 << 22
# pairs of each index at which fn is asked whether it only adds
PROBES = 5
# scores that it is asked with, beside 0; a softcap of 100 changes the last by 15 %
SCORES = (1.0, -2.5, 80.0)
_INDICES = ("b", "h", "q_idx", "kv_idx")


@dataclass(frozen=True, eq=False)
class ScoreMod(Bias):
    """`from_score_mod`."""

    fn: Callable[..., Any]

    def add_to(self, found: Found) -> None:
        """Add a tensor with a size for each index that fn reads."""
        if torch.compiler.is_compiling():
            raise ValueError(
                "bias is a from_score_mod inside a traced function; allowed are tensors, and biases by name such as "
                "alibi and relative"
            )
        # a compiler would look into what it left for the error above, and knows no levels of torch.func
        reads = torch.compiler.disable(_reads)(self.fn, found.device)
        sizes = tuple(size if read else 1 for size, read in zip(found.shape, reads, strict=True))
        if 0 in found.shape:
            return
        self._check(found, sizes)
        found.dense.append(self._tensor(found, sizes))

    def _check(self, found: Found, sizes: tuple[int, ...]) -> None:
        """Raise ValueError unless fn adds the same to any score, at pairs of all over the call."""
        indices = [sorted({i * (n - 1) // (PROBES - 1) for i in range(PROBES)}) for n in sizes]
        pairs = torch.tensor(list(product(*indices)), device=found.device)
        with torch.no_grad():
            at_zero, *at_scores = (self._at(pairs, s) for s in (0.0, *SCORES))
        for s, got in zip(SCORES, at_scores, strict=True):
            # infinities are their own sum with a score
            wrong = ~((got == at_zero + s) | ((got - (at_zero + s)).abs() <= 1e-5 * (1 + at_zero.abs() + abs(s))))
            if wrong.any():
                first = int(wrong.nonzero()[0])
                where = ", ".join(f"{n}={int(i)}" for n, i in zip(_INDICES, pairs[first], strict=True))
                raise ValueError(
                    f"fn makes {float(got[first]):g} of a score of {s:g}, and {float(at_zero[first]):g} of 0, at "
                    f"{where}; allowed are functions that add a bias" + self._hint(pairs)
                )

    def _hint(self, pairs: Tensor) -> str:
        """What to write instead, where fn is a softcap."""
        cap = self.cap(pairs)
        return "" if cap is None else f": this is attention(..., softcap={cap:g})"

    def cap(self, pairs: Tensor) -> float | None:
        """c, if fn is `c tanh(score / c)` at these pairs."""
        cap = float(self._at(pairs[:1], 1e9))
        if not 0 < cap < 1e8:
            return None
        for part in (0.0, 0.1, 0.5, -0.5, 2.0):
            expected = torch.tensor(part, dtype=torch.float64, device=pairs.device).tanh()
            if not torch.allclose(self._at(pairs, part * cap) / cap, expected, rtol=1e-5, atol=1e-9):
                return None
        return cap

    def _at(self, pairs: Tensor, score: float) -> Tensor:
        """fp64 `[n]` of indices `[n, 4]`."""
        s = torch.tensor(score, dtype=torch.float64, device=pairs.device)
        changed: Tensor = torch.vmap(lambda pair: _checked(self.fn(s, *pair.unbind())))(pairs)
        return changed.double()

    def _tensor(self, found: Found, sizes: tuple[int, ...]) -> Tensor:
        """`fn(0, ...)` of all pairs, some rows of queries at a time."""
        score = torch.zeros((), dtype=found.compute, device=found.device)
        fn = _of_all_pairs(self.fn)
        b, h, q, k = (torch.arange(n, device=found.device) for n in sizes)
        rows = max(1, PAIRS // (sizes[0] * sizes[1] * sizes[3]))
        parts = [fn(score, b, h, some, k).to(found.compute) for some in q.split(rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def softcap_of(fn: Callable[..., Any], device: torch.device) -> float | None:
    """c, if fn is `c tanh(score / c)` whatever the indices; None if it is not, or gradients would reach it."""
    if torch.compiler.is_compiling() or any(torch.compiler.disable(_reads)(fn, device)):
        return None
    pair = torch.zeros(1, len(_INDICES), dtype=torch.int64, device=device)
    mod = ScoreMod(fn)
    return None if mod._at(pair, 1.0).requires_grad else mod.cap(pair)


def _checked(changed: Any) -> Tensor:
    if not isinstance(changed, Tensor) or not changed.is_floating_point() or changed.dim():
        what = f"{changed.dtype} of shape {tuple(changed.shape)}" if isinstance(changed, Tensor) else repr(changed)
        raise ValueError(f"fn returned {what}; allowed is a float tensor of no dimensions, the new score")
    return changed


def _reads(fn: Callable[..., Any], device: torch.device) -> tuple[bool, ...]:
    """Which indices the result of fn depends on: those whose `torch.vmap` has mapped it.

    Raises:
        NotImplementedError: it depends on what an outer `torch.vmap` maps.
    """
    mapped_by: set[int] = set()

    def probe(score: Tensor, *pair: Tensor) -> Tensor:
        changed = _checked(fn(score, *pair))
        innermost = _functorch.maybe_current_level()
        assert innermost is not None
        mapped_by.update(level - innermost for level in vmap.levels_of(changed))
        return changed

    score, index = torch.zeros((), device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad():
        _of_all_pairs(probe)(score, *[index] * len(_INDICES))
    # of the innermost level, of the last index, 0
    places = [level + len(_INDICES) - 1 for level in mapped_by]
    if min(places, default=0) < 0:
        raise NotImplementedError(
            "bias is a from_score_mod whose fn reads a tensor that torch.vmap maps; allowed are tensors, and biases by "
            "name such as relative"
        )
    return tuple(place in places for place in range(len(_INDICES)))


def _of_all_pairs(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`fn` of a score and of four rows of indices, whose results are `[b, h, q, k]`."""
    for dim in reversed(range(len(_INDICES))):
        # innermost first
        fn = torch.vmap(fn, in_dims=(None, *(0 if d == dim else None for d in range(len(_INDICES)))))
    return fn
