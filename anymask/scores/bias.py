"""`Bias`: a lazy expression of what is added to scores, before any length or device is known."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from anymask.scores.record import Lookup

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMES = ("batch", "q_heads", "q_len", "kv_len")


@dataclass(frozen=True)
class Found:
    """A call, and the terms of its bias so far; each `Bias` adds its own.

    Attributes:
        shape: `(batch, q_heads, q_len, kv_len)`.
        kv_heads: heads of k.
        dtype: of q.
        device: of q.
        sm_scale: factor of the scores.
        dense: terms `[batch or 1, q_heads or 1, q_len or 1, kv_len or 1]`.
        diagonals: tables `[1 or q_heads, q_len + kv_len - 1]`, whose entry `q - k + kv_len - 1` is added.
        lookups: other tables.
        columns: pairs `[.., q_len, r]` and `[.., kv_len, r]` whose products are added.
    """

    shape: tuple[int, int, int, int]
    kv_heads: int
    dtype: torch.dtype
    device: torch.device
    sm_scale: float
    dense: list[Tensor] = field(default_factory=list)
    diagonals: list[Tensor] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    columns: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def compute(self) -> torch.dtype:
        """The dtype of tables and sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def distances(self, offset: int = 0) -> Tensor:
        """int64 `[q_len + kv_len - 1]`: `i + offset - j` for the entries of a diagonal table."""
        q_len, kv_len = self.shape[2:]
        first = offset - kv_len + 1
        return torch.arange(first, max(first, first + q_len + kv_len - 1), device=self.device)

    def checked(self, name: str, t: Any, allowed: str = "a float tensor") -> Tensor:
        """`t`, once it is known to be a tensor of floats on the device of q."""
        floats = check_floats(name, t, allowed)
        if floats.device != self.device:
            raise ValueError(f"{name} is on {floats.device} but q is on {self.device}; allowed is the device of q")
        return floats

    def table(self, name: str, t: Tensor) -> Tensor:
        """A table `[1 or q_heads, n]` in the dtype of tables."""
        heads = self.shape[1]
        if t.shape[0] not in (1, heads):
            raise ValueError(f"{name} has {t.shape[0]} heads but q has {heads}; allowed are 1 and {heads}")
        return t.to(self.compute).contiguous()


@dataclass(frozen=True, eq=False)
class Bias(ABC):
    """What is added to the scores of pairs, as an expression: `alibi(slopes) + tensor`.

    A bias has no lengths: `attention` gives it some. Its tensors are read when it runs, and gradients reach them.
    """

    @abstractmethod
    def add_to(self, found: Found) -> None:
        """Add the terms of a call. Raises ValueError where they do not fit it."""

    def to_dense(
        self, q_len: int, kv_len: int, *, batch: int = 1, q_heads: int = 1, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The bias of a call of these sizes, fp32 `[batch or 1, q_heads or 1, q_len, kv_len]`, differentiable."""
        total = torch.zeros(1, 1, q_len, kv_len, device=device)
        # by `total`, whose device has a number
        found = Found((batch, q_heads, q_len, kv_len), q_heads, torch.float32, total.device, 1.0)
        self.add_to(found)
        for term in found.dense:
            total = total + term
        i, j = (torch.arange(n, device=device) for n in (q_len, kv_len))
        for table in found.diagonals:
            total = total + table[:, i[:, None] - j + kv_len - 1]
        for lookup in found.lookups:
            total = total + lookup.table[:, lookup.q_code[:, None] - lookup.k_code]
        for a, b in found.columns:
            total = total + a.float() @ b.float().mT
        return total

    def __add__(self, other: Bias | Tensor) -> Bias:
        return _sum(self, other) if isinstance(other, (Bias, Tensor)) else NotImplemented

    def __radd__(self, other: Bias | Tensor) -> Bias:
        return _sum(other, self) if isinstance(other, (Bias, Tensor)) else NotImplemented

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A sum with a tensor, of which torch is asked first."""
        if kwargs or func not in (torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, operator.add):
            return NotImplemented
        return _sum(*args)


@dataclass(frozen=True, eq=False)
class Sum(Bias):
    """Several terms."""

    terms: tuple[Bias, ...]

    def add_to(self, found: Found) -> None:
        """Add those of all terms."""
        for term in self.terms:
            term.add_to(found)


@dataclass(frozen=True, eq=False)
class Dense(Bias):
    """A tensor."""

    tensor: Tensor
    name: str = "bias"

    def add_to(self, found: Found) -> None:
        """Add the tensor in 4 dimensions, those that are expanded of size 1."""
        t = found.checked(self.name, self.tensor, "None, a float tensor, a Bias")
        if t.dim() > 4:
            raise ValueError(f"{self.name} has shape {tuple(t.shape)}; allowed are up to 4 dimensions")
        t = t[(None,) * (4 - t.dim())]
        for dim, name in enumerate(_NAMES):
            if t.shape[dim] not in (1, found.shape[dim]):
                raise ValueError(
                    f"{self.name} has shape {tuple(self.tensor.shape)}, {t.shape[dim]} along {name}; allowed are 1 and "
                    f"{found.shape[dim]}"
                )
        t = _once(t)
        found.dense.append(t.float() if t.dtype == torch.float64 != found.dtype else t)


def as_bias(bias: Bias | Tensor) -> Bias:
    """A tensor as a `Bias`."""
    return bias if isinstance(bias, Bias) else Dense(bias)


def check_floats(name: str, t: Any, allowed: str = "a float tensor") -> Tensor:
    """`t`, once it is known to be a dense tensor of floats."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}; allowed is {allowed}")
    if t.is_nested or t.layout != torch.strided:
        what = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a tensor that is {what}; allowed is {allowed} that is dense in memory")
    if t.dtype not in FLOATS:
        hint = ": a bool tensor is a mask, pass mask=..." if t.dtype == torch.bool else ""
        raise ValueError(f"{name} has dtype {t.dtype}; allowed are {', '.join(map(str, FLOATS))}{hint}")
    return t


def _sum(*terms: Bias | Tensor) -> Sum:
    flat: list[Bias] = []
    for term in map(as_bias, terms):
        flat += term.terms if isinstance(term, Sum) else [term]
    return Sum(tuple(flat))


def _once(t: Tensor) -> Tensor:
    """`t` with size 1 where it is expanded, so that nothing repeats what it holds."""
    sizes = [1 if stride == 0 else size for size, stride in zip(t.shape, t.stride(), strict=True)]
    # a compiled function sees no strides of its inputs that may be others at its next call, and a transform of
    # torch.func, or a forward-mode derivative, not what lies behind an autograd function
    if torch.compiler.is_compiling() or sizes == list(t.shape):
        return t
    if _C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return t
    once: Any = _Once
    found: Tensor = once.apply(t, sizes)
    return found


class _Once(torch.autograd.Function):
    """One of the equal parts of an expanded tensor; its gradient is spread over them all, by a stride of 0."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, sizes: list[int]) -> Tensor:
        """`t` with these sizes, each its own or 1."""
        ctx.shape = t.shape
        for dim, size in enumerate(sizes):
            t = t.narrow(dim, 0, size)
        return t

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """What sums to the gradient along the dimensions of size 1."""
        (grad,) = grads
        return (grad / (ctx.shape.numel() // max(1, grad.numel()))).expand(ctx.shape), None
