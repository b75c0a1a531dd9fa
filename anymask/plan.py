"""Plans: what a pass does with tensors of some sizes and layout, worked out once and run at every such call.

A pass is written as if for tensors: it allocates, launches kernels, and calls torch. Given tensors it does so at once.
Given the operands of a plan, which have all of a tensor but its address and its values, it writes down what to do. So a
plan depends on nothing that its operands do not say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor

from anymask import launch as now
from anymask.direct import Address, Direct, TileMap

# memory of sizes, strides and dtype on the current device: what compiled graphs of torch allocate with, in half of the
# time of a tensor's method; None in a torch without it
empty_on_cuda: Any = getattr(_C._dynamo.guards, "_empty_strided_cuda", None)


class Operand:
    """A tensor of a plan. Its address is known modulo 16."""

    def __init__(
        self,
        plan: Plan,
        slot: int,
        shape: Sequence[int] | None,
        strides: Sequence[int],
        dtype: torch.dtype,
        residue: int,
    ) -> None:
        """`shape` None is one that the plan does not know."""
        self.plan, self.slot, self.dtype, self.residue = plan, slot, dtype, residue
        # reading the sizes of one without raises
        self.shape: Any = None if shape is None else torch.Size(shape)
        self.strides = tuple(strides)

    @property
    def device(self) -> torch.device:
        """Of all tensors of the plan."""
        return self.plan.device

    @property
    def is_cuda(self) -> bool:
        """As of a tensor."""
        return self.plan.device.type == "cuda"

    def stride(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.strides if dim is None else self.strides[dim]

    def data_ptr(self) -> int:
        """The address modulo 16."""
        return self.residue

    def element_size(self) -> int:
        """As of a tensor."""
        return self.dtype.itemsize

    def numel(self) -> int:
        """As of a tensor."""
        return prod(self.shape)

    def new_empty_strided(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype | None = None) -> Any:
        """As of a tensor."""
        return self.plan.allocate(shape, strides, dtype or self.dtype)

    def new_empty(self, *shape: int, dtype: torch.dtype | None = None) -> Any:
        """As of a tensor."""
        strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
        return self.plan.allocate(shape, strides, dtype or self.dtype)

    def reshape(self, *shape: int) -> Operand:
        """As of a tensor: the same memory where that can be."""
        reshaped = self.meta().reshape(shape)
        if not reshaped._is_view():
            found: Operand = apply(lambda t: t.reshape(shape), self)
            return found
        return Operand(self.plan, self.slot, reshaped.shape, reshaped.stride(), self.dtype, self.residue)

    def contiguous(self) -> Operand:
        """As of a tensor."""
        if self.meta().is_contiguous():
            return self
        found: Operand = apply(Tensor.contiguous, self)
        return found

    def meta(self) -> Tensor:
        """A tensor without memory that is like it."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


class Count(NamedTuple):
    """How many programs a launch has, where each call says it anew; with 0 nothing is launched."""

    slot: int


class Plan:
    """Steps over a list of tensors: those of the call, and behind them what the steps add."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._index = device.index if device.type == "cuda" else None
        self.outputs: tuple[int, ...] = ()
        self._steps: list[Callable[[list[Any]], None]] = []
        self._n = 0

    def operand(self, shape: Sequence[int] | None, strides: Sequence[int], dtype: torch.dtype, residue: int) -> Any:
        """The next tensor."""
        self._n += 1
        return Operand(self, self._n - 1, shape, strides, dtype, residue)

    def count(self) -> Count:
        """The next of what a call gives, an int in the place of a tensor."""
        self._n += 1
        return Count(self._n - 1)

    def allocate(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Any:
        """Memory of the plan's device, aligned."""
        shape, strides = tuple(shape), tuple(strides)
        on_cuda: Any = empty_on_cuda if self.device.type == "cuda" else None

        def step(tensors: list[Any]) -> None:
            tensors.append(tensors[0].new_empty_strided(shape, strides, dtype=dtype))

        def step_on_cuda(tensors: list[Any]) -> None:
            # the device of the plan is the current one
            tensors.append(on_cuda(shape, strides, dtype))

        self._steps.append(step if on_cuda is None else step_on_cuda)
        return self.operand(shape, strides, dtype, 0)

    def finish(self, outputs: tuple[Any, ...]) -> None:
        """What a call returns."""
        self.outputs = tuple(t.slot for t in outputs)

    def add(self, step: Callable[[list[Any]], None]) -> None:
        """The next step."""
        self._steps.append(step)

    def __call__(self, *tensors: Any) -> tuple[Tensor, ...]:
        """The outputs for the tensors of a call, in the order of their operands."""
        found = list(tensors)
        index = self._index
        if index is None or index == _C._cuda_getDevice():
            for step in self._steps:
                step(found)
        else:
            with torch.cuda.device(index):
                for step in self._steps:
                    step(found)
        return tuple([found[slot] for slot in self.outputs])


def apply(function: Callable[..., Any], *tensors: Any) -> Any:
    """`function(*tensors)`, a new tensor on the same device, or its operand, which is aligned."""
    plan = _plan_of(tensors)
    if plan is None:
        return function(*tensors)
    slots = [t.slot for t in tensors]
    like = function(*[t.meta() for t in tensors])
    expected = like.shape, like.stride(), like.dtype, 0

    def step(found: list[Any]) -> None:
        made = function(*[found[slot] for slot in slots])
        assert (made.shape, made.stride(), made.dtype, made.data_ptr() % 16) == expected
        found.append(made)

    plan.add(step)
    return plan.operand(*expected)


def apply_in_place(function: Callable[..., Any], *tensors: Any) -> None:
    """`function(*tensors)`, which writes to them."""
    plan = _plan_of(tensors)
    if plan is None:
        function(*tensors)
        return
    slots = [t.slot for t in tensors]

    def step(found: list[Any]) -> None:
        function(*[found[slot] for slot in slots])

    plan.add(step)


def is_same_memory(a: Any, b: Any) -> bool:
    """Whether two tensors, or operands, begin at one address."""
    return bool(a.slot == b.slot if isinstance(a, Operand) else a.data_ptr() == b.data_ptr())


def launch(
    kernel: Any,
    grid: tuple[Any, int, int],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    key: tuple[Any, ...],
    **options: Any,
) -> None:
    """`anymask.launch.launch`, now or as a step of the plan, where the first number of `grid` may be a `Count`."""
    plan = _plan_of(args)
    if plan is None:
        now.launch(kernel, grid, args, constants, key, **options)
        return
    step = _Launch(kernel, grid, args, constants, key, options)
    plan.add(step.counted if isinstance(grid[0], Count) else step)


class _Launch:
    """A launch of a plan: by Triton until it is known to be asked for again, then through the driver."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[Any, int, int],
        args: tuple[Any, ...],
        constants: dict[str, Any],
        key: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        self._kernel, self._grid, self._args, self._constants = kernel, grid, args, constants
        self._key, self._options = key, options
        self._direct: Direct | None = None
        self._is_known = False

    def __call__(self, tensors: list[Any], programs: int | None = None) -> None:
        if self._direct is None or now.is_watched() or not self._direct(tensors, programs):
            self._by_triton(tensors, programs)

    def counted(self, tensors: list[Any]) -> None:
        """The same of as many programs as the call says."""
        programs = tensors[self._grid[0].slot]
        if programs:
            self(tensors, programs)

    def _by_triton(self, tensors: list[Any], programs: int | None) -> None:
        grid = self._grid if programs is None else (programs, *self._grid[1:])
        args = tuple([_with_tensors(arg, tensors) for arg in self._args])
        compiled = now.launch(self._kernel, grid, args, self._constants, self._key, **self._options)
        if self._is_known and compiled is not None and self._direct is None:
            self._direct = Direct.of(compiled, grid, [_with_slots(arg) for arg in self._args])
        self._is_known = True


def _plan_of(args: Sequence[Any]) -> Plan | None:
    for arg in args:
        base = getattr(arg, "base", arg)
        if isinstance(base, Operand):
            return base.plan
    return None


def _with_tensors(arg: Any, tensors: list[Any]) -> Any:
    """An argument of a launch, with the tensors of a call."""
    if isinstance(arg, Operand):
        return tensors[arg.slot]
    if type(arg) is tuple and arg and isinstance(arg[0], Operand):
        return tuple([tensors[x.slot] for x in arg])
    base = getattr(arg, "base", None)
    if not isinstance(base, Operand):
        return arg
    # a descriptor of either of Triton's classes
    made: Any = object.__new__(type(arg))
    made.__dict__.update(arg.__dict__)
    made.base = tensors[base.slot]
    return made


def _with_slots(arg: Any) -> Any:
    """An argument of a launch, as `Direct` takes it."""
    if isinstance(arg, Operand):
        return Address(arg.slot)
    if type(arg) is tuple and arg and isinstance(arg[0], Operand):
        return tuple([Address(x.slot) for x in arg])
    base = getattr(arg, "base", None)
    return TileMap(base.slot, tuple(arg.shape), tuple(arg.strides)) if isinstance(base, Operand) else arg
