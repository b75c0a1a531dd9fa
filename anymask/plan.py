"""Plans: what a pass does with tensors of some sizes and layout, worked out once and run at every such call.

A pass is written as if for tensors: it allocates, launches kernels, and calls torch. Given tensors it does so at once.
Given the operands of a plan, which have all of a tensor but its address and its values, it writes down what to do: also
where it calls a function or a method of torch. So a plan depends on nothing that its operands do not say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor

from anymask import launch as now
from anymask.direct import Address, Direct, TileMap

# memory of sizes, strides and dtype on the current device: what compiled graphs of torch allocate with, in half of the
# time of a tensor's method; None in a torch without it
empty_on_cuda: Any = getattr(_C._dynamo.guards, "_empty_strided_cuda", None)

# of Python, which looks for them at the class
OPERATORS = (
    "__abs__", "__add__", "__and__", "__eq__", "__floordiv__", "__ge__", "__getitem__", "__gt__", "__invert__",
    "__le__", "__lt__", "__matmul__", "__mod__", "__mul__", "__ne__", "__neg__", "__or__", "__pow__", "__radd__",
    "__rfloordiv__", "__rmul__", "__rpow__", "__rsub__", "__rtruediv__", "__sub__", "__truediv__", "__xor__",
)  # fmt: skip
# those that write to their tensor
WRITING = ("__iadd__", "__iand__", "__ior__", "__imul__", "__isub__", "__itruediv__", "__setitem__")


class Unplanned(TypeError):
    """A pass asks for what no plan knows of a tensor: its values, or sizes that calls of one kind do not share."""


class Operand:
    """A tensor of a plan, or another view of its memory. Its address is known modulo 16."""

    def __init__(
        self,
        plan: Plan,
        slot: int,
        shape: Sequence[int] | None,
        strides: Sequence[int],
        dtype: torch.dtype,
        residue: int,
        is_view: bool = False,
    ) -> None:
        """`shape` None is one that the plan does not know. `is_view`: the tensor of the call has other sizes."""
        self.plan, self.slot, self.dtype, self.residue, self.is_view = plan, slot, dtype, residue, is_view
        self._shape = None if shape is None else torch.Size(shape)
        self.strides = tuple(strides)

    @property
    def shape(self) -> torch.Size:
        """As of a tensor."""
        if self._shape is None:
            raise Unplanned("sizes of a mask's lists, which masks of one structure do not share")
        return self._shape

    def like(self, plan: Plan) -> Operand:
        """The next tensor of another plan, of the same kind."""
        found: Operand = plan.operand(self._shape, self.strides, self.dtype, self.residue)
        return found

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

    def new_empty(self, *shape: Any, dtype: torch.dtype | None = None) -> Any:
        """As of a tensor."""
        shape = shape if not shape or isinstance(shape[0], int) else tuple(shape[0])
        strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
        return self.plan.allocate(shape, strides, dtype or self.dtype)

    def meta(self) -> Tensor:
        """A tensor without memory that is like it."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")

    def of(self, tensors: list[Any]) -> Tensor:
        """The tensor of a call."""
        t: Tensor = tensors[self.slot]
        return t.as_strided(self.shape, self.strides) if self.is_view else t

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A function of torch."""
        return _write_down(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """A method of tensors, or an attribute."""
        of_tensor = getattr(Tensor, name)
        if callable(of_tensor):
            return lambda *args, **kwargs: _write_down(of_tensor, (self, *args), kwargs)
        return _write_down(partial(_attribute, name=name), (self,), {})

    def _value(self) -> Any:
        """What Python asks a tensor for."""
        raise Unplanned("the value of a tensor")

    __bool__ = __float__ = __int__ = __index__ = __iter__ = _value


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
        # what steps read, and what those of torch made
        self._reads: list[set[int]] = []
        self._made: set[int] = set()
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

        self.add(step if on_cuda is None else step_on_cuda)
        return self.operand(shape, strides, dtype, 0)

    def finish(self, outputs: tuple[Any, ...]) -> None:
        """What a call returns. What torch made on the way goes after the last step that reads it."""
        _refuse_tensors(outputs)
        self.outputs = tuple([self._whole(t).slot for t in outputs])
        last = {slot: n for n, reads in enumerate(self._reads) for slot in reads & self._made - {*self.outputs}}
        for slot, n in sorted(last.items(), key=lambda found: -found[1]):
            self._steps.insert(n + 1, partial(_drop, slot))

    def _whole(self, operand: Operand) -> Operand:
        """An operand whose tensor has its sizes."""
        if not operand.is_view:
            return operand
        self.add(lambda tensors: tensors.append(operand.of(tensors)), operand)
        whole: Operand = self.operand(operand.shape, operand.strides, operand.dtype, operand.residue)
        return whole

    def add(self, step: Callable[[list[Any]], None], *reads: Any) -> None:
        """The next step, and what it reads operands of."""
        self._steps.append(step)
        self._reads.append(set(_slots_in(reads)))

    def made(self, layout: tuple[Any, ...], residue: int) -> Any:
        """The tensor of shape, strides and dtype that the step before has made, and no one needs for long."""
        self._made.add(self._n)
        shape, strides, dtype = layout
        return self.operand(shape, strides, dtype, residue)

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
    """`function(*tensors)`, by one step of a plan where it calls torch more than once."""
    return function(*tensors) if _plan_of(tensors) is None else _write_down(function, tensors, {})


def _write_down(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a function of torch returns: an operand for a tensor.

    A view that begins where its operand does takes no step: whoever needs it makes it of the operand.

    Raises:
        Unplanned: it needs values, or more tensors than the plan's.
    """
    if "out" in kwargs:
        raise Unplanned(f"{function} with out=...")
    metas: dict[Operand, Tensor] = {}

    def meta(operand: Operand) -> Tensor:
        return metas.setdefault(operand, operand.meta())

    try:
        named = {name: _replaced(value, meta) for name, value in kwargs.items()}
        like = function(*[_replaced(arg, meta) for arg in args], **named)
    except (NotImplementedError, RuntimeError) as error:
        raise Unplanned(f"what {function} does not find in sizes alone") from error
    plan = next(iter(metas)).plan
    if _writes(function):
        plan.add(_Call(function, args, kwargs, None), args, kwargs)
    if not isinstance(like, Tensor):
        if any(isinstance(part, Tensor) for part in (like if isinstance(like, (list, tuple)) else ())):
            raise Unplanned(f"several tensors of {function}")
        return like
    layout = like.shape, like.stride(), like.dtype
    of = next((o for o, t in metas.items() if like.untyped_storage()._cdata == t.untyped_storage()._cdata), None)
    offset = int(like.storage_offset()) * like.element_size()
    if of is not None and offset == 0 and of.dtype == like.dtype:
        is_other = of.is_view or layout[:2] != (of.shape, of.strides)
        return Operand(plan, of.slot, *layout, residue=of.residue, is_view=True) if is_other else of
    residue = 0 if of is None else (of.residue + offset) % 16
    plan.add(_Call(function, args, kwargs, (*layout, residue)), args, kwargs)
    return plan.made(layout, residue)


def _writes(function: Callable[..., Any]) -> bool:
    """Whether a function writes to a tensor that it is given, by torch's rule for names."""
    name = getattr(function, "__name__", "")
    return name in WRITING or (name.endswith("_") and not name.endswith("__"))


class _Call:
    """A call of a function of torch."""

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], expected: Any
    ) -> None:
        """`expected`: shape, strides, dtype and address modulo 16 of the new tensor; None if it only writes."""
        self._function, self._args, self._kwargs, self._expected = function, args, kwargs, expected
        self._is_checked = expected is None

    def __call__(self, tensors: list[Any]) -> None:
        def of(operand: Operand) -> Tensor:
            return operand.of(tensors)

        kwargs = {name: _replaced(value, of) for name, value in self._kwargs.items()}
        made = self._function(*[_replaced(arg, of) for arg in self._args], **kwargs)
        if not self._is_checked:
            assert (made.shape, made.stride(), made.dtype, made.data_ptr() % 16) == self._expected
            # the layout of the next calls can only be the same
            self._is_checked = True
        if self._expected is not None:
            tensors.append(made)


def _replaced(value: Any, of: Callable[[Operand], Any]) -> Any:
    """A value, or those of a list or tuple, with something for each operand."""
    if isinstance(value, Operand):
        return of(value)
    if isinstance(value, Tensor):
        raise Unplanned("a tensor that no call gives")
    if isinstance(value, (list, tuple)):
        return _tuple_of(value, [_replaced(part, of) for part in value])
    return value


def _slots_in(value: Any) -> Iterator[int]:
    """Of the operands in an argument."""
    if isinstance(value, Operand):
        yield value.slot
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _slots_in(part)
    elif isinstance(base := getattr(value, "base", None), Operand):
        yield base.slot


def _drop(slot: int, tensors: list[Any]) -> None:
    tensors[slot] = None


def _tuple_of(like: Any, parts: list[Any]) -> Any:
    """A list, a tuple or a record as another one, of other parts."""
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def _attribute(t: Any, name: str) -> Any:
    return getattr(t, name)


def _operator(name: str) -> Callable[..., Any]:
    return lambda *args: _write_down(getattr(Tensor, name), args, {})


for _name in (*OPERATORS, *WRITING):
    setattr(Operand, _name, _operator(_name))


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
    _refuse_tensors(args)
    step = _Launch(kernel, grid, args, constants, key, options)
    plan.add(step.counted if isinstance(grid[0], Count) else step, args)


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


def _refuse_tensors(args: Sequence[Any]) -> None:
    """Raise Unplanned for a tensor of this call alone, which other calls of the plan would read or write."""
    for arg in args:
        if isinstance(arg, Tensor) or isinstance(getattr(arg, "base", None), Tensor):
            raise Unplanned("a tensor that is no operand")
        if isinstance(arg, tuple):
            _refuse_tensors(arg)


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
    if isinstance(arg, tuple):
        return _tuple_of(arg, [_with_tensors(part, tensors) for part in arg])
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
    if isinstance(arg, tuple):
        return tuple(map(_with_slots, arg))
    base = getattr(arg, "base", None)
    return TileMap(base.slot, tuple(arg.shape), tuple(arg.strides)) if isinstance(base, Operand) else arg
