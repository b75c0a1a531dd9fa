"""anymask: attention, and packing masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import anymask
from anymask import backends
from benchmarks.cases import Problem
from benchmarks.providers import Prepared, Unsupported, compiled, mask_of

# copies of the mask that packing cycles through, so that none is still in the L2 cache when its turn comes
COPIES = 4


def attention(problem: Problem, base: str, variant: str) -> Prepared:
    """`anymask.attention` with the mask packed once, or with the tensor; other variants name a backend."""
    packed = problem.block_mask
    backend = None if variant in ("", "deterministic", "dense", "view") else variant
    if backend is not None and (reason := backends.reasons(problem.q, problem.k, problem.v, packed)[backend]):
        raise Unsupported(reason)
    options: dict[str, Any] = {"backend": backend, "deterministic": variant == "deterministic"}
    tensor = mask_of(problem) if variant in ("dense", "view") else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if tensor is None:
            return anymask.attention(q, k, v, packed, **options)
        return anymask.attention(q, k, v, tensor.view(tensor.shape) if variant == "view" else tensor, **options)

    runs = backend or anymask.explain(problem.q, problem.k, problem.v, packed).backend
    how = "no mask" if packed is None else "mask packed once" if tensor is None else f"{variant} tensor"
    return Prepared(compiled(problem, attend), f"backend {runs}, {how}")


def pack(problem: Problem, base: str, variant: str) -> Prepared:
    """`anymask.pack` of the dense tensor, of the mask by name, or of a function of indices."""
    s, kind, device = problem.case.shape, problem.case.mask, problem.device
    assert kind is not None
    if not variant:
        tensor = mask_of(problem)
        sources = [tensor] + [tensor.clone() for _ in range(COPIES - 1 if device == "cuda" else 0)]
        return Prepared(None, "tiles and bits, both views", builds=tuple(partial(anymask.pack, t) for t in sources))
    assert kind.forms is not None
    rule, named = kind.forms(s, device)
    lazy = named if variant == "named" else anymask.from_function(rule)
    build = partial(anymask.pack, lazy, q_len=s.q_len, kv_len=s.kv_len, device=device)
    return Prepared(None, "tiles and bits, both views", builds=(build,))


def copy(problem: Problem, base: str, variant: str) -> Prepared:
    """A copy of the dense mask: one read and one write of its bytes, for scale."""
    sources = [mask_of(problem).clone() for _ in range(COPIES)]
    target = torch.empty_like(sources[0])
    builds: tuple[Callable[[], object], ...] = tuple(partial(target.copy_, source) for source in sources)
    return Prepared(None, "reads and writes every byte", builds=builds)
