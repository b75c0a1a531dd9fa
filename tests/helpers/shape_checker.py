"""A type checker for jaxtyping's import hook that reads the names of `anymask.shapes` and no other annotation."""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

from jaxtyping import AbstractArray

# names of functions that were called with tensors whose shapes have names
CHECKED: set[str] = set()


def check_shapes(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, which raises TypeError at a tensor of another shape or dtype than its annotation's."""
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        hints = typing.get_type_hints(fn)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check(f"{fn.__qualname__}: {name}", value, hints.get(name))
        result = fn(*args, **kwargs)
        _check(f"{fn.__qualname__}: its result", result, hints.get("return"))
        return result

    return checked


def _check(what: str, value: Any, hint: Any) -> None:
    if typing.get_origin(hint) is tuple and isinstance(value, tuple):
        for part, part_hint in zip(value, typing.get_args(hint), strict=False):
            _check(what, part, part_hint)
    elif isinstance(hint, type) and issubclass(hint, AbstractArray):
        CHECKED.add(what.split(":")[0])
        if not isinstance(value, hint):
            raise TypeError(f"{what} is {value.dtype} {tuple(value.shape)}, not {hint.__name__}")
