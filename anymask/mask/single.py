"""Functions of one pair, called for many at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class _IndexByTensors(TorchFunctionMode):
    """`table[b]` and `table[b, 3]` read no value of an index: `torch.vmap` has none, a GPU would wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            table, index = args
            parts = index if isinstance(index, tuple) else (index,)
            if all(type(x) is int or (isinstance(x, Tensor) and x.dtype == torch.int64) for x in parts):
                at = [torch.tensor(x, device=table.device) if type(x) is int else x for x in parts]
                return torch.ops.aten.index(table, at)
        return func(*args, **(kwargs or {}))


def one_pair_at_a_time(fn: MaskFunction) -> MaskFunction:
    """The function of index tensors that broadcast, made by `torch.vmap` of `fn`, a function of single indices."""

    def one(*index: Tensor) -> Tensor:
        found = fn(*index)
        if not isinstance(found, Tensor) or found.dtype != torch.bool:
            what = f"dtype {found.dtype}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
            raise ValueError(f"fn returned a result of {what}; allowed is a tensor of torch.bool")
        if found.dim():
            raise ValueError(f"fn returned shape {tuple(found.shape)} for single indices; allowed is a single bool")
        return found

    def many(*index: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(*(x.shape for x in index))
        if 0 in shape:
            return torch.empty(shape, dtype=torch.bool, device=index[0].device)
        index = tuple(x[(None,) * (len(shape) - x.dim())] for x in index)
        mapped: Callable[..., Tensor] = one
        # the innermost dimension first; a tensor takes part where it is not shared
        for dim in reversed(range(len(shape))):
            if shape[dim] != 1:
                mapped = torch.vmap(mapped, in_dims=tuple(None if x.shape[dim] == 1 else 0 for x in index))
        with _IndexByTensors():
            return mapped(*(x.squeeze() for x in index)).view(shape)

    many.__name__ = getattr(fn, "__name__", type(fn).__name__)
    return many
