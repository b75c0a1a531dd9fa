"""A bias of keys as 16 more columns of k, whose product with a block of ones beside q is the bias.

The tensor cores add it to the scores: equation (10) costs the softmax nothing. Columns are bf16, whatever q and k are,
as bf16 has the range of fp32: three of them hold all bits of a number, and the rest are 0.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from anymask.backends.hopper.kernels.blocks import block_at
from anymask.backends.hopper.kernels.compat import tma_load
from anymask.backends.hopper.kernels.words import ROWS

# largest absolute value of a finite bias: beyond it the row max is rounded by more than an exponent may be above 0
LARGEST = tl.constexpr(2.0**26)


class KeyColumns(NamedTuple):
    """Which planes of the columns a work tile reads: `batch` and `head` are -1, or 0 where a plane is shared."""

    batch: Any
    head: Any


class ColumnStages(NamedTuple):
    """Stages of the columns `[1, 1, BLOCK_N, COLUMNS]`, full and empty with those of k, and the block of ones."""

    bufs: Any
    ones: Any


@gluon.jit
def allocate_columns(desc, STAGES: gl.constexpr):
    """`ColumnStages` of a pair of consumer warpgroups, () if `desc` is None."""
    if desc is None:
        return ()
    else:
        bufs = gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_type.shape, desc.layout)
        SHAPE: gl.constexpr = [ROWS, desc.block_type.shape[3]]
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, desc.dtype)
        # of the four warps that the kernel begins with
        value = gl.full(SHAPE, 1.0, desc.dtype, gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))
        ones = gl.allocate_shared_memory(desc.dtype, SHAPE, LAYOUT, value)
        fence_async_shared()
        return ColumnStages(bufs, ones)


@gluon.jit
def load_columns(desc, planes, tile, key, full, bufs, stage):
    """Load the columns of keys from `key` on to a stage; `full` counts their bytes beside those of k."""
    tma_load(desc, [tile.sample & planes.batch, tile.head & planes.head, key, 0], full, bufs.index(stage))


@gluon.jit
def issue_bias(s, columns, stage):
    """Issue `s + bias` without waiting for it; s itself without columns."""
    if len(columns) > 0:
        s = warpgroup_mma(columns.ones, block_at(columns.bufs, stage).permute((1, 0)), s, is_async=True)
    return s


@triton.jit(do_not_specialize=["batch_step", "head_step", "key_step", "heads", "kv_len"])
def _columns_kernel(
    bias_ptr, columns_ptr, batch_step, head_step, key_step, heads, kv_len, unit, LOG2_E: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Writes `columns [batch, heads, kv_len, COLUMNS]` of a bias `[batch, heads, kv_len]`, in the unit of q.k.

    The sum of a row is `bias * unit`, exactly as fp32 has it, of a bias up to LARGEST. Grid: (blocks of keys,
    planes).
    """
    keys = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(1).to(tl.int64)
    base = bias_ptr + plane // heads * batch_step + plane % heads * head_step
    bias = tl.load(base + keys.to(tl.int64) * key_step, mask=keys < kv_len, other=0.0).to(tl.float32)
    # -inf hides a pair, as does what is -inf in base 2; NaN is not clamped
    x = tl.where(tl.abs(bias) > LARGEST, tl.where(bias > 0.0, LARGEST, -LARGEST), bias) * unit
    x = tl.where(tl.abs(bias * LOG2_E) == float("inf"), bias * float("inf"), x)
    column = tl.arange(0, COLUMNS)[None, :]
    out = tl.zeros([BLOCK, COLUMNS], tl.bfloat16)
    for i in tl.static_range(PARTS):
        part = x.to(tl.bfloat16)
        out = tl.where(column == i, part[:, None], out)
        x = tl.where(tl.abs(x) == float("inf"), 0.0, x - part.to(tl.float32))
    rows = columns_ptr + (plane * kv_len + keys) * COLUMNS
    tl.store(rows[:, None] + column, out, mask=(keys < kv_len)[:, None])
