"""Arguments of builders: checks whose errors say what came and what is allowed, and the name a mask is known by."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec

import torch
from torch import Tensor

from anymask.mask.expr import FEW, Mask, brief
from anymask.vmap import is_mapped_tensor

P = ParamSpec("P")
# numbers in tokens: their sums and products fit int64
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32)


def builder(fn: Callable[P, Mask]) -> Callable[P, Mask]:
    """`fn`, whose masks show its call in their `repr`, and whose errors begin with its name.

    Inside `torch.compile` it is `fn` alone, as a text would make constants of its numbers.
    """
    names = list(signature(fn).parameters)

    @wraps(fn)
    def named(*args: P.args, **kwargs: P.kwargs) -> Mask:
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        try:
            mask = fn(*args, **kwargs)
        except (TypeError, ValueError) as error:
            if not str(error).startswith(fn.__name__):
                error.args = (f"{fn.__name__}: {error}",)
            raise
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        text = ", ".join(f"{name}={brief(value)}" for name, value in given.items())
        return replace(mask, label=f"{fn.__name__}({text})")

    return named


def check_int(name: str, value: int) -> int:
    """`value`, once it is known to be an int."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {brief(value)} of type {type(value).__name__}; allowed is an int")
    return value


def check_natural(name: str, value: int) -> int:
    """`value`, once it is known to be 0 or more."""
    if check_int(name, value) < 0:
        raise ValueError(f"{name} is {value}; allowed are 0 and more")
    return value


def check_positive(name: str, value: int) -> int:
    """`value`, once it is known to be 1 or more."""
    if check_int(name, value) < 1:
        raise ValueError(f"{name} is {value}; allowed are 1 and more")
    return value


def check_flag(name: str, value: bool) -> bool:
    """`value`, once it is known to be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {brief(value)} of type {type(value).__name__}; allowed is a bool")
    return value


def check_sizes(name: str, value: Any, count: int) -> tuple[int, ...]:
    """`value` as a tuple, once it is known to be `count` ints, 1 or more each."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is {brief(value)} of type {type(value).__name__}; allowed is a tuple of {count} ints")
    if len(value) != count:
        raise ValueError(f"{name} is {tuple(value)}; allowed are {count} sizes")
    return tuple(check_positive(name, n) for n in value)


def check_dense(name: str, t: Tensor | None, kind: str) -> Tensor:
    """`t`, once it is known to be a tensor of plain strides; `kind` is what is allowed, in words."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}; allowed is {kind}")
    if t.is_nested or t.layout != torch.strided:
        what = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a tensor that is {what}; allowed is {kind} that is dense in memory")
    return t


def check_integers(name: str, t: Tensor | None, dims: tuple[int, ...], allowed: str = "") -> Tensor:
    """`t`, once it is known to be an integer tensor of one of `dims` dimensions; `allowed` says so for errors."""
    t = check_dense(name, t, "an int tensor")
    if t.dtype not in INTEGERS or t.dim() not in dims:
        allowed = allowed or f"integers of up to int64 in {' or '.join(map(str, dims))} dimensions"
        raise ValueError(f"{name} is {t.dtype} of shape {tuple(t.shape)}; allowed are {allowed}")
    return t


def check_one_device(**tensors: Tensor | None) -> None:
    """Raise ValueError if tensors, by their names, are on several devices."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    for name, t in given[1:]:
        if t.device != given[0][1].device:
            raise ValueError(
                f"{name} is on {t.device} but {given[0][0]} is on {given[0][1].device}; allowed is one device"
            )


def values(name: str, t: Tensor) -> list[Any]:
    """`t.tolist()`, of a tensor that has values."""
    if t.is_meta:
        raise ValueError(f"{name} is on meta, where tensors have no values; allowed are devices that keep them")
    if is_mapped_tensor(t):
        raise ValueError(f"{name} is mapped by torch.vmap, where tensors have no values; allowed is one for all")
    listed: list[Any] = t.tolist()
    return listed


def per_token(name: str, t: Tensor | None) -> Tensor:
    """A copy of `t`, int64 `[batch or 1, heads or 1, length]`: a mask does not change when its tensors are written."""
    t = check_integers(name, t, (1, 2, 3))
    t = t[None, None] if t.dim() == 1 else t[:, None] if t.dim() == 2 else t
    return shared_once(t).to(torch.int64, copy=True)


def shared_once(t: Tensor) -> Tensor:
    """`t`, whose first two dimensions have size 1 where they were expanded."""
    for dim in (0, 1):
        if t.shape[dim] > 1 and t.stride(dim) == 0:
            t = t.narrow(dim, 0, 1)
    return t


def abbreviate(numbers: Sequence[int]) -> str:
    """The first of many numbers."""
    shown = ", ".join(map(str, numbers[:FEW]))
    return f"[{shown}, ...]" if len(numbers) > FEW else f"[{shown}]"
