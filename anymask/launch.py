"""Launches of Triton kernels that skip Triton's inspection of the arguments after the first call.

The inspection takes as long as the launch, and small calls are bound by their launches.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from types import NoneType
from typing import Any

import torch
from torch import Tensor

# what a kernel is compiled for -> the compiled kernel
_kernels: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    key: tuple[Any, ...],
    **options: Any,
) -> Any:
    """`kernel[grid](*args, **constants, **options)`; the compiled kernel, or None off NVIDIA's GPUs.

    `constants` are its last parameters, in order. They, `options` and `key` say all that the compiled kernel depends
    on, the device included: of each argument what `args_key` says, unless it is always the same.
    """
    # kernels are never freed, and hash slowly
    key = (id(kernel), *key, *options.values(), *constants.values())
    known = _kernels.get(key)
    if known is None:
        compiled = kernel[grid](*args, **constants, **options)
        # the interpreter compiles nothing; on AMD a kernel also depends on how large tensors are
        if compiled is not None and compiled.metadata.target.backend == "cuda":
            _kernels[key] = compiled
            return compiled
    elif is_watched():
        known[grid](*args, *constants.values())
    else:
        # what the line above does when no profiler has hooks in Triton; looking for them costs half of a launch
        active = _driver().active
        stream = active.get_current_stream(active.get_current_device())
        known.run(*grid, stream, known.function, known.packed_metadata, None, None, None, *args, *constants.values())
    return known


def is_watched() -> bool:
    """Whether a profiler has hooks in Triton's launches."""
    hooks = _hooks()
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


@cache
def _hooks() -> Any:
    from triton import knobs

    return knobs.runtime


@cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver


def tensor_key(t: Tensor) -> tuple[Any, ...]:
    """What Triton compiles a kernel for, of a tensor."""
    return t.dtype, t.data_ptr() % 16 == 0


def int_key(n: int) -> Any:
    """What Triton compiles a kernel for, of an integer that it may specialise on."""
    return n if n == 1 else (n % 16 == 0, -(2**31) <= n < 2**31)


def args_key(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles a kernel for, of all its arguments, and more of those that it is told not to specialise on.

    They are tensors, ints, tuples of ints, floats, None, records (named tuples) of all these, and the descriptors of
    kernels that are not Gluon's.
    """
    return tuple([_KEYS.get(type(arg), _other_key)(arg) for arg in args])


@lru_cache(maxsize=4096)
def _ints_key(numbers: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(map(int_key, numbers))


def _other_key(arg: Any) -> Any:
    """Of a descriptor, a record of arguments, an operand of a plan, or a tensor of a class of its own."""
    if isinstance(arg, tuple):
        return tuple([_nested_key(x) for x in arg])
    return tensor_key(arg) if hasattr(arg, "data_ptr") else (type(arg), arg.base.dtype, *arg.block_shape)


def _nested_key(arg: Any) -> Any:
    """Of a member of a record, where tuples hold more than ints."""
    return tuple(map(_nested_key, arg)) if isinstance(arg, tuple) else _KEYS.get(type(arg), _other_key)(arg)


# by type, as asking `isinstance` for each in turn takes longer
_KEYS: dict[type, Callable[[Any], Any]] = {
    Tensor: tensor_key,
    int: int_key,
    tuple: _ints_key,
    float: type,
    NoneType: type,
}


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


# what packing calls it
on = device_guard
