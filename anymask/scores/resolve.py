"""From what a user asks of scores to the record that backends take, by differentiable operations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import _C, Tensor

from anymask.layout import dense_strides
from anymask.scores.bias import Bias, Found, as_bias, check_floats
from anymask.scores.record import Lookup, Scores


def resolve(
    q: Tensor,
    k: Tensor,
    sm_scale: float,
    bias: Tensor | Bias | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Scores | None]:
    """q and k, with columns of a `low_rank` bias beside their own, and what else happens to their scores.

    Args:
        q, k, sm_scale: of a valid call.
        bias, softcap, sinks, dropout_p: as of `attention`.

    Raises:
        ValueError: a value, shape, dtype or device that does not fit. TypeError: an argument of the wrong type.
    """
    found = Found((*q.shape[:3], k.shape[2]), k.shape[1], q.dtype, q.device, sm_scale)
    cap = 0.0 if softcap is None else _number("softcap", softcap, "None and finite numbers above 0")
    if softcap is not None and not 0 < cap < math.inf:
        raise ValueError(f"softcap is {softcap}; allowed are None and finite numbers above 0")
    p = _number("dropout_p", dropout_p, "numbers from 0 to below 1")
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p is {dropout_p}; allowed are numbers from 0 to below 1")
    logits = None if sinks is None else _sinks(found, sinks)
    if bias is not None:
        if not isinstance(bias, (Tensor, Bias)):
            raise TypeError(f"bias is a {type(bias).__name__}; allowed is None, a float tensor, a Bias")
        as_bias(bias).add_to(found)
    if found.columns:
        q, k = _with_columns(q, k, found)
    if not (found.dense or found.diagonals or found.lookups or cap or logits is not None or p):
        return q, k, None
    seed = _seed(q.device, p) if p else None
    return q, k, Scores(tuple(found.dense), _lookups(found), cap, logits, p, seed)


def _seed(device: torch.device, p: float) -> Tensor:
    """Seed and offset of a call's dropout; `torch.vmap` maps them if each slice has its own.

    Raises:
        ValueError: inside a `torch.vmap` that does not say whether each has.
    """
    if not torch.compiler.is_compiling() and _C._are_functorch_transforms_active():
        from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters

        for level in retrieve_all_functorch_interpreters():
            if isinstance(level, VmapInterpreter) and level.randomness() == "error":
                raise ValueError(
                    f"dropout_p is {p:g} inside torch.vmap(..., randomness='error'); allowed are 'different', other "
                    "pairs in each slice, and 'same'"
                )
    return torch.randint(2**63 - 1, (2,), device=device)


def _number(name: str, value: Any, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed are {allowed}")
    return float(value)


def _sinks(found: Found, sinks: Tensor) -> Tensor:
    """`[q_heads]`: several sinks of a head are one, of the sum of their weights."""
    heads, shape = found.shape[1], tuple(check_floats("sinks", sinks, "None and a float tensor").shape)
    if not (len(shape) in (1, 2) and shape[0] == heads and shape[-1]):
        raise ValueError(f"sinks has shape {shape}; allowed are [{heads}] and [{heads}, n], with q's number of heads")
    logits = found.checked("sinks", sinks).to(found.compute)
    return (logits if logits.dim() == 1 else logits.logsumexp(1)).contiguous()


def _lookups(found: Found) -> tuple[Lookup, ...]:
    """All tables; those by distance are one, which is their sum."""
    if not found.diagonals:
        return tuple(found.lookups)
    table, *others = found.diagonals
    for other in others:
        table = table + other
    q_len, kv_len = found.shape[2:]
    q_code = torch.arange(q_len, dtype=torch.int32, device=found.device) + (kv_len - 1)
    k_code = torch.arange(kv_len, dtype=torch.int32, device=found.device)
    return Lookup(table.contiguous(), q_code, k_code, True), *found.lookups


def _with_columns(q: Tensor, k: Tensor, found: Found) -> tuple[Tensor, Tensor]:
    """q and k with further columns, whose products times `sm_scale` are the bias."""
    q_parts, k_parts = [q], [k]
    for a, b in found.columns:
        # divided in the wider dtype, so that what is rounded is rounded once
        wide = torch.promote_types(a.dtype, found.compute)
        a_high, a_low = _split(a.to(wide) / found.sm_scale, q.dtype, a.dtype)
        b_high, b_low = _split(b, q.dtype, b.dtype)
        q_parts.append(a_high)
        k_parts.append(b_high)
        if a_low is not None:
            q_parts.append(a_low)
            k_parts.append(b_high)
        if b_low is not None:
            q_parts.append(a_high)
            k_parts.append(b_low)
    # rows of a multiple of 16 bytes, as the copy engine of a GPU takes them
    extra = -sum(t.shape[3] for t in q_parts) % 8
    if extra:
        q_parts.append(q.new_zeros(()).expand(*q.shape[:3], extra))
        k_parts.append(k.new_zeros(()).expand(*k.shape[:3], extra))
    return _beside(q_parts), _beside(k_parts)


def _split(t: Tensor, dtype: torch.dtype, given: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`t` in a dtype, and what that rounds away of a wider one that was given. Gradients take the first."""
    high = t.to(dtype)
    if torch.promote_types(given, dtype) == dtype:
        return high, None
    return high, (t.detach() - high.detach()).to(dtype)


def _beside(parts: list[Tensor]) -> Tensor:
    """Parts side by side, in memory in the order of the first one's dimensions."""
    strides = dense_strides(parts[0].shape, parts[0].stride())
    order = sorted(range(4), key=lambda d: (-strides[d], d))
    joined = torch.cat([t.permute(order) for t in parts], 3)
    return joined.permute([order.index(d) for d in range(4)])
