"""The operators under `torch.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# where the operators' list of tensors has `q_has_pair [mask_batch, ...]`
HAS_PAIR = 2


def rule_of(op: Any, n_tensors: int) -> Callable[..., Any]:
    """The rule of an operator under `torch.vmap`: the mapped dimension becomes a part of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        tensors, (mask, *rest), n = args[:n_tensors], args[n_tensors:], info.batch_size
        if any(d is not None for d in in_dims[n_tensors]):
            raise NotImplementedError("mask is mapped by torch.vmap; allowed is one mask, or a batch instead of vmap")
        dims = in_dims[:n_tensors]
        stacked = [
            None if t is None else t.expand(n, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, dims, strict=True)
        ]
        if not mask or mask[HAS_PAIR].shape[0] == 1:
            outputs = op(*[None if t is None else t.flatten(0, 1) for t in stacked], mask, *rest)
            results = tuple(t.unflatten(0, (n, t.shape[0] // n)) for t in outputs)
        else:
            # each sample has a plane of its own
            calls = [op(*[None if t is None else t[i] for t in stacked], mask, *rest) for i in range(n)]
            results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule
