"""Gradients of sinks. A sink is a key that every query of a head sees, and whose value is 0."""

import math

import torch
from torch import Tensor


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """fp32 `[q_heads]`: a sink is a key whose value is 0; `delta` `[batch, q_heads, q_len]`."""
    return -(sink_weights(sinks, lse) * delta).sum((0, 2))


def sink_weights(sinks: Tensor, lse: Tensor) -> Tensor:
    """The share of each row that its sink has; 0 where nothing, not even a sink, is in the denominator."""
    return torch.exp(sinks[:, None] - lse.masked_fill(lse == -math.inf, math.inf))
