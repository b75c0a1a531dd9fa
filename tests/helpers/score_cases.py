"""Biases of every kind, the tensors that they stand for, and what dropout leaves, for comparisons with fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anymask import Bias, alibi, low_rank, relative, relative_buckets
from anymask.scores import dropout

F64 = torch.float64
# batch, q_heads, kv_heads, q_len, kv_len
SIZES = 2, 4, 2, 12, 150


def leaf(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def distances(q_len: int, kv_len: int) -> Tensor:
    return torch.arange(q_len)[:, None] - torch.arange(kv_len)


Made = tuple[Bias | Tensor, Callable[[], Tensor], list[Tensor]]


def tensor_bias(*shape: int, hidden: float = 0.0) -> Made:
    t = torch.randn(shape, dtype=F64)
    if hidden:
        t[torch.rand(shape) < hidden] = -math.inf
        t[..., -1, :] = -math.inf
    t.requires_grad_()
    return t, lambda: t, [t]


def table_of_buckets(table: Tensor, q_len: int, kv_len: int, max_distance: int) -> Tensor:
    """T5's buckets for both directions, one distance at a time; `table` is `[buckets, heads]`."""
    buckets = table.shape[0] // 2
    exact = buckets // 2
    rows = []
    for ahead in range(kv_len - 1, -q_len, -1):
        distance = abs(ahead)
        if distance >= exact:
            grown = math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact)
            distance = min(exact + math.floor(grown + 1e-6), buckets - 1)
        rows.append(table[distance + (buckets if ahead > 0 else 0)])
    by_entry = torch.stack(rows, -1)
    return by_entry[:, distances(q_len, kv_len) + kv_len - 1]


def make_bias(kind: str, sizes: tuple[int, int, int, int, int] = SIZES) -> Made:
    """A bias, the tensor that it stands for, and what gradients reach."""
    batch, heads, kv_heads, q_len, kv_len = sizes
    d = distances(q_len, kv_len)
    shapes = {
        "full": (batch, heads, q_len, kv_len), "by head": (heads, q_len, kv_len), "one plane": (q_len, kv_len),
        "keys": (batch, 1, 1, kv_len), "queries": (heads, q_len, 1), "number": (),
    }  # fmt: skip
    if kind in shapes:
        return tensor_bias(*shapes[kind])
    if kind == "hides":
        return tensor_bias(1, heads, q_len, kv_len, hidden=0.3)
    if kind == "alibi":
        slopes = leaf(heads)
        return alibi(slopes, offset=3), lambda: -slopes[:, None, None] * (d + 3).abs(), [slopes]
    if kind == "relative":
        table = leaf(1, q_len + kv_len - 1)
        return relative(table), lambda: table[:, d + kv_len - 1], [table]
    if kind == "buckets":
        embedding = nn.Embedding(8, heads, dtype=F64)
        made = relative_buckets(embedding, max_distance=40)
        return made, lambda: table_of_buckets(embedding.weight, q_len, kv_len, 40), [embedding.weight]
    if kind == "low rank":
        a, b = leaf(heads, q_len, 3), leaf(batch, kv_heads, kv_len, 3)
        return low_rank(a, b), lambda: a @ b.repeat_interleave(heads // kv_heads, 1).mT, [a, b]
    assert kind == "sum"
    parts = [make_bias(name, sizes) for name in ("keys", "alibi", "relative", "one plane", "low rank")]
    return (
        parts[0][0] + (parts[1][0] + parts[2][0]) + parts[3][0] + parts[4][0],
        lambda: sum((part[1]() for part in parts), torch.zeros((), dtype=F64)),
        [t for part in parts for t in part[2]],
    )


KINDS = [
    "full", "by head", "keys", "queries", "number", "hides", "alibi", "relative", "buckets", "low rank", "sum",
]  # fmt: skip


def seed_of(call: Callable[[], Any]) -> tuple[Any, Tensor]:
    """What a call returns, and the seed that it draws first."""
    state = torch.get_rng_state()
    seed = torch.randint(2**63 - 1, (2,))
    torch.set_rng_state(state)
    return call(), seed


def kept(seed: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    axes = [torch.arange(n).view([-1 if d == i else 1 for i in range(4)]) for d, n in enumerate(shape)]
    return dropout.keep(seed, *axes, p).double() * dropout.keep_scale(p)


def assert_same(got: Any, want: Any, at: Any, limit: float = 1e-9) -> None:
    for n, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.shape == y.shape, (at, n)
        assert torch.equal(x == -math.inf, y == -math.inf), (at, n)
        x, y = (t.detach().double().nan_to_num(neginf=0.0) for t in (x, y))
        error = float((x - y).abs().max()) if x.numel() else 0.0
        assert error <= limit * (1 + float(y.abs().max()) if y.numel() else 0.0), (at, n, error)
