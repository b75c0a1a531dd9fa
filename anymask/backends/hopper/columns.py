"""A bias of keys as more columns of k: the tensor that the forward kernel reads; kernels/columns.py has the idea."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymask.backends.gpu.arguments import LOG2_E
from anymask.backends.hopper.descriptors import block_of, tile_descriptor
from anymask.launch import tensor_key
from anymask.plan import launch

# columns of the smallest product in 16 bits, and those that hold a number of fp32
COLUMNS, PARTS = 16, 3
# keys of a program
BLOCK = 128
# a bias over the scale has the range of fp32; below it, biases that calls have would leave it
LEAST_SCALE = 1e-6


def key_columns(bias: Tensor, kv_len: int, sm_scale: float) -> Tensor:
    """Columns `[batch or 1, heads or 1, kv_len, COLUMNS]` in bf16 of a bias `[batch or 1, heads or 1, kv_len or 1]`."""
    from anymask.backends.hopper.kernels.columns import _columns_kernel

    bias = bias.expand(-1, -1, kv_len)
    batch, heads, _ = bias.shape
    columns = bias.new_empty(batch, heads, kv_len, COLUMNS, dtype=torch.bfloat16)
    launch(
        _columns_kernel,
        (-(-kv_len // BLOCK), batch * heads, 1),
        (bias, columns, *bias.stride(), heads, kv_len, 1.0 / sm_scale),
        {"LOG2_E": LOG2_E, "BLOCK": BLOCK, "COLUMNS": COLUMNS, "PARTS": PARTS},
        (bias.device, *tensor_key(bias), *[step < 2**31 for step in bias.stride()]),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return columns


def planes_of(columns: Tensor) -> Any:
    """`KeyColumns` of kernels/columns.py."""
    from anymask.backends.hopper.kernels.columns import KeyColumns

    return KeyColumns(-(columns.shape[0] > 1), -(columns.shape[1] > 1))


def columns_descriptor(columns: Tensor, keys: int) -> Any:
    """A descriptor of blocks of so many keys."""
    return tile_descriptor(columns, tuple(columns.shape), block_of((1, 1, keys, COLUMNS), columns.dtype))
