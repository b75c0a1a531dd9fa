"""IEEE products of fp32 in torch, whatever `torch.set_float32_matmul_precision` says; and log2(e)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

LOG2_E = math.log2(math.e)

# the setting that a matrix product of a device reads, by torch's names of its libraries
_LIBRARY = {"cpu": "mkldnn", "cuda": "cuda"}
_EXACT = ("ieee", "none")


class _Setting:
    """The fp32 precision of matrix products of one library: a setting of the process, lent while a backend runs.

    Threads share it, so the first one in sets it and the last one out gives the user's value back. A user who changes
    it in between, from another thread, keeps the new value.
    """

    def __init__(self, library: str) -> None:
        self._library = library
        self._lock = threading.Lock()
        self._inside = 0
        self._lent = False
        self._before = ""

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            now = _get(self._library, "matmul")
            if now not in _EXACT:
                # what equals the library's own value follows it, and goes on to do so
                self._before = "none" if now == _get(self._library, "all") else now
                self._lent = True
                _set(self._library, "matmul", "ieee")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._lent and not self._inside:
                self._lent = False
                if _get(self._library, "matmul") == "ieee":
                    _set(self._library, "matmul", self._before)


_get: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
_set: Callable[[str, str, str], Any] = torch._C._set_fp32_precision_setter

_settings = {device: _Setting(library) for device, library in _LIBRARY.items()}


def ieee_products(function: Callable[P, R]) -> Callable[P, R]:
    """`function(q, ...)` with matrix products of fp32 in fp32: not in TF32, and not in pieces of bf16.

    Costs nothing to speak of where products are exact already, which is torch's default.
    """

    @wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        q: Any = args[0]
        setting = _settings.get(q.device.type)
        if setting is None:
            return function(*args, **kwargs)
        with setting:
            return function(*args, **kwargs)

    return exact
