"""Descriptors for the copy engine: which part of a tensor a block is, and how it lies in shared memory."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

# queries or keys of a consumer warpgroup
WARPGROUP_ROWS = 64

# Gluon's descriptor class, the shape of a block and its layout in shared memory
Block: TypeAlias = tuple[type, list[int], Any]


@cache
def block_of(shape: tuple[int, ...], dtype: torch.dtype) -> Block:
    """What all descriptors of such blocks have in common."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}[dtype]
    return TensorDescriptor, list(shape), gl.NVMMASharedLayout.get_default_for(list(shape), element)


def tile_descriptor(t: Tensor, shape: tuple[int, ...], block: Block) -> Any:
    """A descriptor of blocks `[1, 1, rows, columns]` of `t [batch, heads, length, dim]`."""
    b, h, m, _ = t.stride()
    return descriptor(t, shape, (b, h, m, 1), block)


def descriptor(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: Block) -> Any:
    """A descriptor of blocks of `t`; its constructor would check at every call what the backend has checked."""
    made: Any = object.__new__(block[0])
    made.base, made.shape, made.strides = t, shape, strides
    _, made.block_shape, made.layout = block
    return made
