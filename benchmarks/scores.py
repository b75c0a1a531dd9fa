"""What happens to scores beside a mask, each written twice: as anymask takes it, and as a function of one score.

FlexAttention gets the function; the fp64 oracle gets what the function gives on chunks of indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import anymask
from anymask.scores import dropout
from benchmarks.masks import Shape

# learned tensors by name, which require gradients
Leaves = dict[str, Tensor]
# (score, batch, head, query, key) -> score, as FlexAttention takes it
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
SEED = 0


@dataclass(frozen=True)
class ScoreKind:
    """One way to change scores, for any shape."""

    name: str
    # (shape, generator) -> tensors; (tensors) -> keywords of `attention`
    make: Callable[[Shape, torch.Generator], Leaves]
    keywords: Callable[[Leaves], dict[str, Any]]
    # of the tensors; it may leave a score as it is
    rule: Callable[[Leaves], ScoreMod] = lambda leaves: lambda s, b, h, i, j: s
    # probability of a weight to become 0
    dropout_p: float = 0.0

    def keep(self, device: str, b: int, heads: Tensor, rows: Tensor, kv_len: int) -> Tensor | None:
        """What the weights of some queries are multiplied by if torch's generator starts at `SEED`."""
        if not self.dropout_p:
            return None
        torch.manual_seed(SEED)
        seed = torch.randint(2**63 - 1, (2,), device=device)
        key, sample = torch.arange(kv_len, device=device), torch.tensor(b, device=device)
        kept = dropout.keep(seed, sample, heads[:, None, None], rows[:, None], key, self.dropout_p)
        return kept * dropout.keep_scale(self.dropout_p)


def _normal(s: Shape, generator: torch.Generator, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    drawn = torch.randn(size, generator=generator, device=generator.device, dtype=dtype or s.dtype)
    return drawn.requires_grad_()


def _dense(name: str, size: Callable[[Shape], tuple[int, int, int, int]]) -> ScoreKind:
    """A bias of which each size is 1 or the call's."""

    def rule(leaves: Leaves) -> ScoreMod:
        bias = leaves["bias"]
        b_step, h_step, q_step, k_step = (int(n > 1) for n in bias.shape)
        return lambda s, b, h, i, j: s + bias[b * b_step, h * h_step, i * q_step, j * k_step]

    return ScoreKind(name, lambda s, g: {"bias": _normal(s, g, *size(s))}, lambda leaves: leaves, rule)


PAIRS = _dense("bias of pairs", lambda s: (1, s.heads, s.q_len, s.kv_len))
KEYS = _dense("bias of keys", lambda s: (s.batch, 1, 1, s.kv_len))
ALIBI = ScoreKind(
    "alibi, learned slopes",
    lambda s, g: {"slopes": (2.0 ** -torch.arange(1.0, s.heads + 1, device=g.device)).requires_grad_()},
    lambda leaves: {"bias": anymask.alibi(leaves["slopes"])},
    lambda leaves: lambda s, b, h, i, j: s - leaves["slopes"][h] * (i - j).abs(),
)
RELATIVE = ScoreKind(
    "relative table",
    lambda s, g: {"table": _normal(s, g, s.heads, s.q_len + s.kv_len - 1, dtype=torch.float32)},
    lambda leaves: {"bias": anymask.relative(leaves["table"])},
    # entry q_len - 1 of kv_len = q_len is the diagonal
    lambda leaves: lambda s, b, h, i, j: s + leaves["table"][h, i - j + leaves["table"].shape[1] // 2],
)
SOFTCAP = ScoreKind(
    "soft cap 20",
    lambda s, g: {},
    lambda leaves: {"softcap": 20.0},
    lambda leaves: lambda s, b, h, i, j: 20.0 * torch.tanh(s / 20.0),
)
SINKS = ScoreKind("sinks", lambda s, g: {"sinks": _normal(s, g, s.heads, dtype=torch.float32)}, lambda leaves: leaves)
DROPOUT = ScoreKind("dropout 0.1", lambda s, g: {}, lambda leaves: {"dropout_p": 0.1}, dropout_p=0.1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: ScoreKind, leaves: Leaves, at: Any) -> Tensor:
    """Dense attention of some queries and heads `at` = (sample, heads, rows) in the dtype of q."""
    b, heads, rows = at
    key = torch.arange(k.shape[2], device=q.device)
    index = torch.tensor(b, device=q.device), heads[:, None, None], rows[:, None], key
    s = (q @ k.mT) / math.sqrt(q.shape[3])
    s = s + _part(leaves["bias"], at) if "bias" in leaves else kind.rule(leaves)(s, *index)
    s = s if mask is None else s.masked_fill(~mask, -math.inf)
    if "sinks" in leaves:
        s = torch.cat([s, leaves["sinks"][heads, None, None].to(s).expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(s, -1)[..., : k.shape[2]]
    keep = kind.keep(q.device.type, b, heads, rows, k.shape[2])
    return (p if keep is None else p * keep).to(q.dtype) @ v


def _part(bias: Tensor, at: Any) -> Tensor:
    """What a bias adds `at` some queries; reading it by an index of pairs would take long to differentiate."""
    b, heads, rows = at
    for dim, index in enumerate((torch.tensor([b], device=bias.device), heads, rows)):
        bias = bias.index_select(dim, index) if bias.shape[dim] > 1 else bias
    return bias
