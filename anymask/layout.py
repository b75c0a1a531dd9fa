"""Where outputs lie in memory: as the input that they answer to, so that a model's own views of them copy nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def empty_as(t: Tensor, dim: int | None = None) -> Tensor:
    """Memory of `t`'s shape, its last dimension `dim` if given, laid out as `t` is: see `dense_strides`."""
    shape = t.shape if dim is None else (*t.shape[:3], dim)
    return t.new_empty_strided(shape, _remembered(t.shape, t.stride(), dim))


def laid_out_as(result: Tensor, t: Tensor) -> Tensor:
    """`result`, of `t`'s shape but for the last dimension, in `t`'s dtype and layout; differentiable and mappable."""
    strides = dense_strides(t.shape, t.stride(), result.shape[3])
    order = sorted(range(4), key=lambda d: (-strides[d], d))
    laid = result.to(t.dtype).permute(order).contiguous()
    return laid.permute([order.index(d) for d in range(4)])


def dense_strides(shape: Sequence[int], strides: Sequence[int], dim: int | None = None) -> tuple[int, ...]:
    """Strides of dense memory whose dimensions follow each other as those of a tensor do.

    The last dimension stays innermost. A tensor with another one innermost, and one that repeats its elements by a
    stride of 0, have contiguous outputs. Torch's own attention and `empty_like` do the same.

    Args:
        shape, strides: of the tensor, `[batch, heads, length, dim]`; symbols of a traced function too.
        dim: the last size of the output, if it is another one.
    """
    lead = [0, 1, 2]
    copied = not (_surely(strides[3] == 1, True) or _surely(shape[3] == 1, False))
    repeated = any(_surely(strides[d] == 0, False) and not _surely(shape[d] == 1, False) for d in lead)
    if not (copied or repeated):
        # a stable insertion sort: dimensions of equal strides, one of which has size 1, stay as they are
        for end in (1, 2):
            for at in range(end, 0, -1):
                if _surely(strides[lead[at]] > strides[lead[at - 1]], False):
                    lead[at], lead[at - 1] = lead[at - 1], lead[at]
    step: int = shape[3] if dim is None else dim
    found = {3: 1}
    for d in reversed(lead):
        found[d] = _at_least_1(step)
        step = step * _at_least_1(shape[d])
    return found[0], found[1], found[2], 1


# asked at every call, for few different layouts
_remembered = lru_cache(maxsize=1024)(dense_strides)


def _at_least_1(size: int) -> int:
    # dynamo of torch 2.11 takes no `sym_max` of two numbers
    return max(size, 1) if isinstance(size, int) else torch.sym_max(size, 1)


def _surely(holds: bool | torch.SymBool, unknown: bool) -> bool:
    """`holds`, and `unknown` of sizes that only a run can tell."""
    if isinstance(holds, bool):
        return holds
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    return bool((guard_or_true if unknown else guard_or_false)(holds))
