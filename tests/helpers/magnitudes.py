"""Inputs of sizes that fp32 holds and parts of a lower precision may not."""

from collections.abc import Callable

import torch
from torch import Tensor


def _alternating(t: Tensor) -> Tensor:
    """Row 2i + 1 is minus row 2i but for one part in ten thousand."""
    other = t.clone()
    other[..., 1::2, :] = -t[..., 0::2, :] * (1 + 1e-4)
    return other


def _halves(t: Tensor, sign: float) -> Tensor:
    """The second half of the dimensions is the first, times about `sign`."""
    half = t[..., : t.shape[-1] // 2] * 8
    return torch.cat([half, half * (sign * (1 + 1e-6))], -1)


def _powers(t: Tensor, sign: int) -> Tensor:
    """Dimensions from 1e-15 to 1e15, or with `sign` -1 the other way round."""
    return t * torch.logspace(-15 * sign, 15 * sign, t.shape[-1], device=t.device)


# what becomes of normal q, k, v, do
VALUES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "normal": lambda q, k, v, do: (q, k, v, do),
    "v large": lambda q, k, v, do: (q, k, v * 1e30, do),
    "v small": lambda q, k, v, do: (q, k, v * 1e-30, do),
    "do large": lambda q, k, v, do: (q, k, v, do * 1e30),
    "do small": lambda q, k, v, do: (q, k, v, do * 1e-30),
    "v large, do small": lambda q, k, v, do: (q, k, v * 1e30, do * 1e-30),
    "q large, k small": lambda q, k, v, do: (q * 1e30, k * 1e-30, v, do),
    "q small, k large": lambda q, k, v, do: (q * 1e-30, k * 1e30, v, do),
    "all small": lambda q, k, v, do: (q * 1e-15, k * 1e-15, v * 1e-15, do * 1e-15),
    "each dimension its own": lambda q, k, v, do: (_powers(q, 1), _powers(k, -1), v, do),
    "each value its own": lambda q, k, v, do: (q, k, _powers(v, 1), _powers(do, -1)),
    "values cancel": lambda q, k, v, do: (q * 1e-3, k, _alternating(v), do),
    "scores cancel": lambda q, k, v, do: (_halves(q, 1), _halves(k, -1), v, do),
    "scores large": lambda q, k, v, do: (q * 10, k * 10, v, do),
}
