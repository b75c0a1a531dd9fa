"""The work of the operators, for `torch.utils.flop_counter.FlopCounterMode`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anymask.block_mask import BlockMask


def register() -> None:
    """Make counters of torch, those too that count at the moment, know the operators.

    Done where a mode watches a call, and not on import: the module of the counter imports Triton.
    """
    library: Any = sys.modules.get("torch.utils.flop_counter")
    if library is None:
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    counters = [getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack()]
    registries = [c.flop_registry for c in counters if isinstance(c, library.FlopCounterMode)]
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.anymask.forward: _forward_flops,
        torch.ops.anymask.backward: _backward_flops,
        torch.ops.anymask.scored_forward: _forward_flops,
        torch.ops.anymask.scored_backward: _backward_flops,
    }
    for op, formula in formulas.items():
        for registry in (library.flop_registry, *registries):
            registry.setdefault(op, formula)


def _forward_flops(q: Tensor, k: Tensor, v: Tensor, mask: list[Tensor], *rest: Any, **out: Any) -> int:
    """`q @ k^T` and `p @ v` over attended pairs; multiply-adds count 2, as everywhere in that module."""
    return 2 * _attended_pairs(q, k, mask) * (q.shape[3] + v.shape[3])


def _backward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    mask: list[Tensor],
    *rest: Any,
    **out: Any,
) -> int:
    """The scores again, dq and dk over head_dim, `do @ v^T` and dv over v_dim."""
    return 2 * _attended_pairs(q, k, mask) * (3 * q.shape[3] + 2 * v.shape[3])


def _attended_pairs(q: Tensor, k: Tensor, mask: list[Tensor]) -> int:
    """Pairs over all samples and heads. Waits for the GPU; without a mask, or its values, all pairs."""
    q_len, kv_len = q.shape[2], k.shape[2]
    pairs = q.shape[0] * q.shape[1] * q_len * kv_len
    if not mask or type(mask[0]) is not Tensor or q.is_meta:
        return pairs
    return round(pairs * BlockMask.from_tensors(mask, q_len, kv_len).density())
