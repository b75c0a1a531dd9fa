"""Builders of biases; each docstring says which keys get what."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymask.mask.arguments import check_flag, check_int, check_positive
from anymask.scores.bias import Bias, Found, check_floats
from anymask.scores.record import Lookup
from anymask.scores.score_mod import ScoreMod


def alibi(slopes: Tensor, offset: int = 0) -> Bias:
    """`-slopes[h] |i + offset - j|`: nearer keys weigh more (ALiBi, Press et al., 2022).

    Args:
        slopes: `[q_heads]` or `[1]`, floats; gradients reach them.
        offset: tokens by which queries stand further right; with `kv_len - q_len` the last query is at the last key.

    Raises:
        ValueError: slopes of other shapes or dtypes. TypeError: no tensor.
    """
    if check_floats("slopes", slopes).dim() != 1:
        raise ValueError(f"slopes has shape {tuple(slopes.shape)}; allowed is one dimension, [q_heads]")
    return Alibi(slopes, check_int("offset", offset))


def relative(table: Tensor) -> Bias:
    """`table[h, i - j + kv_len - 1]`: one number for each distance of a query and a key (Shaw et al., 2018; T5).

    Args:
        table: `[q_heads or 1, q_len + kv_len - 1]`, floats; entry 0 is of the first query and the last key. Gradients
            reach it.

    Raises:
        ValueError: a table of other shapes or dtypes. TypeError: no tensor.
    """
    if check_floats("table", table).dim() != 2:
        raise ValueError(f"table has shape {tuple(table.shape)}; allowed are [q_heads or 1, q_len + kv_len - 1]")
    return Relative(table)


def relative_buckets(
    table: Tensor | torch.nn.Embedding, *, bidirectional: bool = True, max_distance: int = 128, offset: int = 0
) -> Bias:
    """`table[bucket(j - i - offset), h]`: distances share a number, the more the further (T5, Raffel et al., 2020).

    Half of a direction's buckets are one distance each, the others grow as its logarithm up to `max_distance`.

    Args:
        table: `[buckets, q_heads]`, floats, or the `nn.Embedding` that holds it; gradients reach it.
        bidirectional: half of the buckets are for keys after the query, as in encoders; without it those share one.
        max_distance: tokens from which on all distances share the last bucket; more than half a direction's buckets.
        offset: tokens by which queries stand further right, as those of a decoder with a cache do.

    Raises:
        ValueError: a table of other shapes or dtypes, or too few buckets. TypeError: no tensor.
    """
    weight = table.weight if isinstance(table, torch.nn.Embedding) else table
    if check_floats("table", weight, "a float tensor or an nn.Embedding").dim() != 2:
        raise ValueError(f"table has shape {tuple(weight.shape)}; allowed are two dimensions, [buckets, q_heads]")
    per_direction = weight.shape[0] // (2 if check_flag("bidirectional", bidirectional) else 1)
    if per_direction < 2:
        raise ValueError(f"table has {weight.shape[0]} buckets; allowed are 2 and more for each direction")
    if check_positive("max_distance", max_distance) <= per_direction // 2:
        raise ValueError(f"max_distance is {max_distance}; allowed are {per_direction // 2 + 1} and more")
    return Buckets(table, bidirectional, max_distance, check_int("offset", offset))


def relative_2d(table: Tensor, height: int, width: int) -> Bias:
    """`table[(y - y' + height - 1) (2 width - 1) + x - x' + width - 1, h]` of two places in a window (Swin).

    Queries and keys are the places of a `height x width` window, row by row (Liu et al., 2021).

    Args:
        table: `[(2 height - 1) (2 width - 1), q_heads]`, floats; gradients reach it.
        height, width: of the window in tokens; `height * width` is q_len and kv_len.

    Raises:
        ValueError: a table of other shapes or dtypes, sizes below 1. TypeError: no tensor.
    """
    n = (2 * check_positive("height", height) - 1) * (2 * check_positive("width", width) - 1)
    if check_floats("table", table).dim() != 2 or table.shape[0] != n:
        raise ValueError(f"table has shape {tuple(table.shape)}; allowed is [{n}, q_heads] for {height} x {width}")
    return Window(table, height, width)


def low_rank(a: Tensor, b: Tensor) -> Bias:
    """`a[i] . b[j]`: a bias of rank r as r more columns of q and k, exact and as cheap (FlashBias, Wu et al., 2025).

    Args:
        a: `[.., q_len, r]`, floats, broadcastable to `[batch, q_heads, q_len, r]`. A wider dtype than that of q is kept
            by three columns for each one. Gradients reach a and b.
        b: `[.., kv_len, r]`, broadcastable to `[batch, kv_heads, kv_len, r]`.

    Raises:
        ValueError: shapes or dtypes that do not fit. TypeError: no tensor.
    """
    for name, t in (("a", a), ("b", b)):
        if not 2 <= check_floats(name, t).dim() <= 4:
            raise ValueError(f"{name} has shape {tuple(t.shape)}; allowed are 2 to 4 dimensions, [.., length, r]")
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a has rank {a.shape[-1]} but b has {b.shape[-1]}; allowed are equal sizes")
    return LowRank(a, b)


def from_score_mod(fn: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> Bias:
    """The bias that a `score_mod` of FlexAttention adds: `fn(0, b, h, i, j)`, evaluated at each call.

    It becomes a tensor with a size for each index that fn reads, and 1 for the others. `attention` raises unless
    `fn(s, ...) - s` is the same for several s. Gradients reach what fn has captured.

    Args:
        fn: `fn(score, b, h, q_idx, kv_idx)` of a score and single indices, tensors of no dimensions; returns the new
            score. It is called under `torch.vmap`.

    Raises:
        TypeError: fn is no function.
    """
    if not callable(fn):
        raise TypeError(f"fn is a {type(fn).__name__}; allowed is a function of score, b, h, q_idx, kv_idx")
    return ScoreMod(fn)


@dataclass(frozen=True, eq=False)
class Alibi(Bias):
    """`alibi`."""

    slopes: Tensor
    offset: int

    def add_to(self, found: Found) -> None:
        """Add a table of distances."""
        slopes = found.table("slopes", found.checked("slopes", self.slopes)[:, None])
        found.diagonals.append(-slopes * found.distances(self.offset).abs())


@dataclass(frozen=True, eq=False)
class Relative(Bias):
    """`relative`."""

    table: Tensor

    def add_to(self, found: Found) -> None:
        """Add the table."""
        n = found.shape[2] + found.shape[3] - 1
        if self.table.shape[1] != n:
            raise ValueError(
                f"table has {self.table.shape[1]} distances; allowed are {n} for q_len={found.shape[2]}, "
                f"kv_len={found.shape[3]}"
            )
        found.diagonals.append(found.table("table", found.checked("table", self.table)))


@dataclass(frozen=True, eq=False)
class Buckets(Bias):
    """`relative_buckets`; holds a module itself, whose weight may be another one at each call."""

    table: Any
    bidirectional: bool
    max_distance: int
    offset: int

    def add_to(self, found: Found) -> None:
        """Add the table that has the bucket's number at each distance."""
        table = self.table.weight if isinstance(self.table, torch.nn.Embedding) else self.table
        table = found.table("table", found.checked("table", table).mT)
        found.diagonals.append(table[:, self._buckets(-found.distances(self.offset), table.shape[1])])

    def _buckets(self, ahead: Tensor, buckets: int) -> Tensor:
        """int64, the bucket of keys `ahead` of the query; the arithmetic is fp32, as that of models trained with it."""
        first = torch.zeros_like(ahead)
        if self.bidirectional:
            buckets //= 2
            first, distance = (ahead > 0) * buckets, ahead.abs()
        else:
            distance = (-ahead).clamp(min=0)
        exact = buckets // 2
        far = (distance.clamp(min=exact).float() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (far * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, far)


@dataclass(frozen=True, eq=False)
class Window(Bias):
    """`relative_2d`."""

    table: Tensor
    height: int
    width: int

    def add_to(self, found: Found) -> None:
        """Add the table, with the codes of places: a difference of codes tells both distances."""
        length, step = self.height * self.width, 2 * self.width - 1
        if found.shape[2:] != (length, length):
            raise ValueError(
                f"height {self.height} and width {self.width} are {length} tokens but q_len is {found.shape[2]} and "
                f"kv_len {found.shape[3]}; allowed are equal numbers"
            )
        table = found.table("table", found.checked("table", self.table).mT)
        y, x = (torch.arange(n, device=found.device, dtype=torch.int32) for n in (self.height, self.width))
        code = (y[:, None] * step + x).flatten()
        found.lookups.append(Lookup(table, code + ((self.height - 1) * step + self.width - 1), code, False))


@dataclass(frozen=True, eq=False)
class LowRank(Bias):
    """`low_rank`."""

    a: Tensor
    b: Tensor

    def add_to(self, found: Found) -> None:
        """Add columns of q and of k."""
        if found.sm_scale == 0:
            raise ValueError("scale is 0; allowed with low_rank are other numbers")
        batch, q_heads, q_len, kv_len = found.shape
        pair = []
        for name, t, heads, length in (("a", self.a, q_heads, q_len), ("b", self.b, found.kv_heads, kv_len)):
            t = found.checked(name, t)[(None,) * (4 - t.dim())]
            for dim, (what, size) in enumerate((("batch", batch), ("heads", heads))):
                if t.shape[dim] not in (1, size):
                    raise ValueError(f"{name} has {t.shape[dim]} along {what}; allowed are 1 and {size}")
            if t.shape[2] != length:
                raise ValueError(f"{name} has {t.shape[2]} rows; allowed are {length}, as many as there are tokens")
            pair.append(t.expand(batch, heads, -1, -1))
        found.columns.append((pair[0], pair[1]))
