"""Launches of compiled Triton kernels through the CUDA driver, with parameters that stay in memory between calls.

Triton's own launcher unpacks every argument, asks the driver for each pointer and makes each descriptor of the copy
engine anew. Of two calls of one plan only addresses differ, so here a call writes those into what the driver reads.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from ctypes import addressof, c_byte, c_int, c_uint, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

# bytes of a descriptor of the copy engine, to which CUDA 13 aligns it, and of any other parameter, at most
MAP_BYTES, CELL = 128, 8
# of the driver's enumerations
PROGRAMMATIC_STREAM_SERIALIZATION = 6
L2_PROMOTION_128B = 2
THREADS_PER_WARP = 32


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_uint), ("pad", c_byte * 4), ("value", c_int), ("rest", c_byte * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("n_attributes", c_uint),
    )


class Address(NamedTuple):
    """A kernel's parameter that is the address of a tensor of a call."""

    slot: int


class TileMap(NamedTuple):
    """A kernel's parameter that is a descriptor of the copy engine: blocks of a tensor of a call."""

    slot: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unsupported(Exception):
    """A kernel that Triton's own launcher has to launch."""


@cache
def _library() -> Any:
    """The driver's functions; those that only write memory keep the interpreter's lock, which takes less time."""
    name = "libcuda.so.1"
    waits, writes = ctypes.CDLL(name), ctypes.PyDLL(name)
    waits.cuLaunchKernelEx.argtypes = [c_void_p] * 4
    writes.cuTensorMapReplaceAddress.argtypes = [c_void_p] * 2
    encode = writes.cuTensorMapEncodeTiled
    encode.argtypes = [c_void_p, c_int, c_uint32, *[c_void_p] * 5, *[c_int] * 4]
    return waits.cuLaunchKernelEx, writes.cuTensorMapReplaceAddress, encode


class Direct:
    """A compiled kernel, a grid, and its parameters, of which addresses change from call to call."""

    def __init__(self, compiled: Any, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
        """`args`: those before the constants, with an `Address` or a `TileMap` for each tensor.

        Raises:
            Unsupported: the kernel needs what only Triton's launcher provides.
        """
        metadata = compiled.metadata
        _check(metadata)
        # Triton unloads the code of a kernel that nobody holds
        self._compiled = compiled
        self._launch, self._replace, encode = _library()
        found = list(_parameters(args, list(compiled.src.signature.values())[: len(args)]))
        addresses = [value.slot for _, value in found if isinstance(value, Address)]
        tiles = [value for _, value in found if isinstance(value, TileMap)]
        maps = list(metadata.tensordesc_meta or ())
        if len(maps) != len(tiles):
            raise Unsupported("descriptors that the kernel reads as pointers")
        # descriptors, then addresses, then the rest
        size = len(tiles) * MAP_BYTES + (len(found) + 2) * CELL
        self._memory = ctypes.create_string_buffer(size + MAP_BYTES)
        start = addressof(self._memory)
        offset = first = -start % MAP_BYTES
        places, self._maps = {}, []
        for tile, options in zip(tiles, maps, strict=True):
            places[id(tile)] = start + offset
            _encode(encode, start + offset, tile, options)
            self._maps.append((start + offset, tile.slot))
            offset += MAP_BYTES
        self._n_addresses, self._offset = len(addresses), offset
        self._slots = [*addresses, *[slot for _, slot in self._maps]]
        # the addresses that are in memory now, of `_slots`
        self._written: list[int] | None = None
        self._pack = struct.Struct(f"{len(addresses)}Q").pack_into
        rest = offset + CELL * len(addresses)
        pointers, next_address = [], offset
        for kind, value in [*found, ("q", 0), ("q", 0)]:
            if isinstance(value, TileMap):
                pointers.append(places[id(value)])
            elif isinstance(value, Address):
                pointers.append(start + next_address)
                next_address += CELL
            else:
                struct.pack_into(kind, self._memory, rest, value)
                pointers.append(start + rest)
                rest += CELL
        assert rest <= first + size
        self._pointers = (c_void_p * len(pointers))(*pointers)
        self._attribute = _Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        block = metadata.num_warps * THREADS_PER_WARP, 1, 1
        self._config = _Config(grid, block, metadata.shared, None, addressof(self._attribute), int(metadata.launch_pdl))
        self._call = addressof(self._config), compiled.function, addressof(self._pointers), None
        from triton.runtime import driver

        self._stream, self._device = driver.active.get_current_stream, driver.active.get_current_device()
        self._lock = threading.Lock()

    @staticmethod
    def of(compiled: Any, grid: tuple[int, int, int], args: Sequence[Any]) -> Direct | None:
        """The launch of `args`, those before the constants; None where it takes Triton's launcher."""
        try:
            return Direct(compiled, grid, args)
        except Unsupported:
            return None

    def __call__(self, tensors: Sequence[Tensor], programs: int | None = None) -> bool:
        """Launch the kernel; False if the driver refused, and nothing was launched.

        `programs` takes the place of the grid's first number; a launch is always given it, or never.
        """
        wanted = [tensors[slot].data_ptr() for slot in self._slots]
        # the driver copies the parameters before it returns
        with self._lock:
            # calls of a loop find most of their memory where the calls before had it
            written = self._written
            if wanted != written:
                self._written, at, failed = None, self._n_addresses, 0
                self._pack(self._memory, self._offset, *wanted[:at])
                for place, _ in self._maps:
                    if written is None or wanted[at] != written[at]:
                        failed |= self._replace(place, wanted[at])
                    at += 1
                if failed:
                    return False
                self._written = wanted
            if programs is not None:
                self._config.grid[0] = programs
            self._config.stream = self._stream(self._device)
            return not self._launch(*self._call)


def _check(metadata: Any) -> None:
    scratch = metadata.global_scratch_size or metadata.profile_scratch_size
    if metadata.target.backend != "cuda" or scratch or metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
        raise Unsupported("scratch memory, clusters or a cooperative grid")
    if getattr(metadata, "instrumentation_mode", ""):
        raise Unsupported("instrumentation")


def _parameters(args: Sequence[Any], types: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The parameters of the compiled kernel in order: the letter of `struct` and the value, or where it comes from."""
    for arg, kind in zip(args, types, strict=True):
        if isinstance(kind, tuple):
            yield from _parameters(arg, kind)
        elif isinstance(arg, TileMap):
            yield "", arg
            for letter, numbers in (("i", arg.shape), ("q", arg.strides)):
                yield from ((letter, n) for n in numbers)
        elif kind == "constexpr":
            continue
        elif kind.startswith("*") and isinstance(arg, Address):
            yield "Q", arg
        elif kind in ("i1", "i8", "i16", "i32", "i64") and isinstance(arg, int):
            # the driver reads the lower bytes of the cell
            yield "q", int(arg)
        elif kind in ("fp32", "f32"):
            yield "f", float(arg)
        else:
            raise Unsupported(f"an argument of type {kind}")


def _encode(encode: Callable[..., int], place: int, tile: TileMap, options: dict[str, Any]) -> None:
    """Write a descriptor; its address is that of the first call."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if options["fp4_padded"] or options.get("is_im2col"):
        raise Unsupported("a descriptor of another kind than tiles")
    rank, item = len(tile.shape), options["elem_size"]
    shape = (c_uint64 * rank)(*reversed(tile.shape))
    strides = (c_uint64 * rank)(*[item * s for s in reversed(tile.strides[:-1])])
    block = (c_uint32 * rank)(*reversed(options["block_size"]))
    steps = (c_uint32 * rank)(*[1] * rank)
    dtype = TMA_DTYPE_DEVICE_TO_HOST[options["elem_type"]]
    arrays = [c_void_p(addressof(t)) for t in (shape, strides, block, steps)]
    # no interleaving, and zeros beyond the tensor; any aligned address will do
    failed = encode(place, dtype, rank, c_void_p(256), *arrays, 0, options["swizzle"], L2_PROMOTION_128B, 0)
    if failed:
        raise Unsupported(f"a descriptor that the driver does not take, error {failed}")
