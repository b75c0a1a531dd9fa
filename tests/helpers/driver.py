"""Stands for Triton and for the driver of a GPU: launches are written down, by kernel, grid and parameters."""

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from anymask import direct, launch
from anymask.backends import hopper
from anymask.backends import triton as triton_backend
from anymask.backends.triton import halves
from benchmarks import host

# the stream that launches must name
STREAM = 77


def _flat(args: Any, types: Any) -> Iterator[Any]:
    """Arguments as the driver gets them."""
    for arg, kind in zip(args, types, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(arg, kind)
        elif kind == "constexpr":
            continue
        elif kind.startswith("tensordesc"):
            yield "map", arg.base.data_ptr(), tuple(arg.shape), tuple(arg.strides)
            yield from (*arg.shape, *arg.strides)
        elif kind.startswith("*"):
            yield "address", arg.data_ptr()
        elif kind == "fp32":
            yield struct.unpack("f", struct.pack("f", arg))[0]
        else:
            yield arg


def _target() -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 90, 32)


class Driver:
    """Stands for Triton and for the driver, and writes down what each is asked to launch."""

    def __init__(self) -> None:
        self.by_triton: list[Any] = []
        self.direct: list[Any] = []
        self._compiled: list[Any] = []
        self._maps: dict[int, list[Any]] = {}
        # so that no two tensors of a pass have one address
        self._held: list[Any] = []

    def forget(self) -> None:
        """Nothing was launched."""
        self.by_triton.clear()
        self.direct.clear()
        self._held.clear()

    def run(self, function: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        _, specialization, options = function.device_caches[0][-1](*args, **named)
        types = [kind for kind, _ in specialization]
        compiled = host._compiled(_target(), dict(zip(function.arg_names, types, strict=True)))
        compiled.name = f"{function.__name__} {[s for s in specialization if s[0] != 'constexpr']} {options}"
        compiled.metadata.num_warps = options.get("num_warps", 4)
        compiled.function = len(self._compiled) + 1
        self._compiled.append(compiled)
        self._held.append(args)
        values = [*args, *[named[name] for name in function.arg_names[len(args) :]]]
        constants = [repr(v) for v, kind in zip(values, types, strict=True) if kind == "constexpr"]
        compiled.name += repr(constants)
        self.by_triton.append((compiled.name, tuple(grid), tuple(_flat(values, types))))
        return compiled

    def library(self) -> Any:
        return self.launch, self.replace, self.encode

    def encode(self, place: int, dtype: int, rank: int, address: Any, *rest: Any) -> int:
        shape, strides = (
            ctypes.cast(t, ctypes.POINTER(ctypes.c_uint64))[:n] for t, n in zip(rest[:2], (rank, rank - 1), strict=True)
        )
        # of elements of two bytes, as the stubs say
        self._maps[place] = [None, tuple(shape[::-1]), (*[s // 2 for s in strides[::-1]], 1)]
        return 0

    def replace(self, place: int, address: int) -> int:
        self._maps[place][0] = address
        return 0

    def launch(self, config: int, function: int, params: int, extra: None) -> int:
        of, compiled = direct._Config.from_address(config), self._compiled[function - 1]
        assert tuple(of.block) == (32 * compiled.metadata.num_warps, 1, 1)
        assert of.stream == STREAM
        assert of.n_attributes == 0
        places = iter(ctypes.cast(params, ctypes.POINTER(ctypes.c_uint64))[:200])
        values = tuple(self._read(places, tuple(compiled.src.signature.values())))
        # scratch memory, of which there is none
        assert [ctypes.c_uint64.from_address(next(places)).value for _ in range(2)] == [0, 0]
        self.direct.append((compiled.name, tuple(of.grid), values))
        return 0

    def _read(self, places: Iterator[int], types: tuple[Any, ...]) -> Iterator[Any]:
        for kind in types:
            if isinstance(kind, tuple):
                yield from self._read(places, kind)
            elif kind.startswith("tensordesc"):
                place = next(places)
                assert place % 128 == 0
                address, shape, strides = self._maps[place]
                yield "map", address, shape, strides
                yield from [ctypes.c_int32.from_address(next(places)).value for _ in shape]
                yield from [ctypes.c_int64.from_address(next(places)).value for _ in strides]
            elif kind.startswith("*"):
                yield "address", ctypes.c_uint64.from_address(next(places)).value
            elif kind != "constexpr":
                of = {"fp32": ctypes.c_float, "i32": ctypes.c_int32, "i64": ctypes.c_int64}[kind]
                yield of.from_address(next(places)).value


class Forgetful(dict[Any, Any]):
    """Finds no kernel, so that every launch by Triton is written down."""

    def get(self, key: Any, default: Any = None) -> Any:
        return default


@contextmanager
def in_place_of_triton() -> Iterator[tuple[Driver, pytest.MonkeyPatch]]:
    """A `Driver` that all launches go to, and what is undone after it."""
    from triton import knobs
    from triton.runtime import driver as of_triton
    from triton.runtime.jit import JITFunction

    if knobs.runtime.interpret:
        pytest.skip("the interpreter has no driver")
    found = Driver()
    with host.stubbed(), pytest.MonkeyPatch.context() as patch:
        run = JITFunction.run

        def both(*args: Any, **named: Any) -> Any:
            # the stubs clear what they ran
            run(*args, **named)
            return found.run(*args, **named)

        patch.setattr(JITFunction, "run", both)
        patch.setattr(of_triton.active, "get_current_stream", lambda device: STREAM)
        patch.setattr(direct, "_library", found.library)
        patch.setattr(launch, "_kernels", Forgetful())
        yield found, patch


@contextmanager
def launches() -> Iterator[Driver]:
    """What calls of the GPU backends launch, of CPU tensors."""
    precision = torch.backends.cuda.matmul.fp32_precision
    triton_backend._options.cache_clear()
    with in_place_of_triton() as (found, patch):
        patch.setattr(triton_backend, "why_not", lambda *args: None)
        # dq apart for columns of few tiles
        patch.setattr(hopper.tuning, "MANY_COLUMNS", 0)
        # fp32 in parts for calls of 600
        patch.setattr(halves, "FEWEST", 600)
        yield found
    triton_backend._options.cache_clear()
    torch.backends.cuda.matmul.fp32_precision = precision
