"""Lines that fit one tile, such as an image's windows: both passes by one launch, a head of a sample a program."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from anymask.backends.gpu import target
from anymask.backends.gpu.arguments import (
    LOG2_E,
    TINY_SCALE,
    TileConfig,
    has_pair,
    has_tma,
    kernel_options,
    launch_triton,
    plane_strides,
)
from anymask.block_mask import BlockMask
from anymask.launch import device_guard
from anymask.layout import empty_as
from anymask.tiles import TILE

DTYPES = (torch.float16, torch.bfloat16)
# queries, keys and dimensions of a program: all of a line is in its registers and shared memory
MAX_LENGTH, MAX_DIM = TILE, 64


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these kernels take the call."""
    _, _, q_len, head_dim = q.shape
    _, _, kv_len, v_dim = v.shape
    length, dim = max(q_len, kv_len), max(head_dim, v_dim)
    if q.dtype not in DTYPES or length > MAX_LENGTH or dim > MAX_DIM:
        return False
    # before Hopper, operands of products are in registers, which hold half as much
    return length * dim <= MAX_LENGTH * MAX_DIM // 2 or has_tma(target.current_target())


def forward(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float) -> tuple[Tensor, Tensor]:
    """`(o, lse)` of a call that `fits`."""
    from anymask.backends.gpu.kernels.windows import _window_fwd_kernel

    batch, q_heads, q_len, head_dim = q.shape
    o = empty_as(q, v.shape[3])
    lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    constants, options = _options(q_len, k.shape[2], head_dim, v.shape[3])
    with device_guard(q.device):
        launch_triton(
            _window_fwd_kernel,
            (q_heads, batch, 1),
            (
                q,
                k,
                v,
                o,
                lse,
                *(t.stride()[:3] for t in (q, k, v, o)),
                *_mask_of(block_mask),
                has_pair(block_mask, "cols"),
                plane_strides(block_mask),
                q_heads // k.shape[1],
                q_len,
                k.shape[2],
                (abs(sm_scale) or TINY_SCALE) * LOG2_E,
            ),
            {
                **constants,
                "IS_NEGATIVE": sm_scale < 0,
                "USE_ASM": target.current_target()[0] == "cuda" and not target.interprets(),
            },
            q.device,
            options,
        )
    return o, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    block_mask: BlockMask | None,
    sm_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)` of a call that `fits`, bit-equal from run to run."""
    from anymask.backends.gpu.kernels.windows import _window_bwd_kernel

    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    dq, dk, dv = empty_as(q), empty_as(k), empty_as(v)
    constants, options = _options(q_len, kv_len, head_dim, v_dim)
    with device_guard(q.device):
        launch_triton(
            _window_bwd_kernel,
            (kv_heads, batch, 1),
            (
                q,
                k,
                v,
                o,
                do,
                lse.contiguous(),
                dlse,
                dq,
                dk,
                dv,
                *(t.stride()[:3] for t in (q, k, v, o, do)),
                (0, 0, 0) if dlse is None else dlse.stride(),
                *(t.stride()[:3] for t in (dq, dk, dv)),
                *_mask_of(block_mask),
                has_pair(block_mask, "rows"),
                has_pair(block_mask, "cols"),
                plane_strides(block_mask),
                q_heads,
                q_heads // kv_heads,
                q_len,
                kv_len,
                sm_scale,
                sm_scale * LOG2_E,
            ),
            constants,
            q.device,
            options,
        )
    return dq, dk, dv


def _mask_of(block_mask: BlockMask | None) -> tuple[Tensor | None, ...]:
    """What says which tiles there are, and their words by queries."""
    if block_mask is None:
        return None, None, None
    rows = block_mask.rows
    return rows.full_offsets, rows.partial_offsets, rows.words


@cache
def _options(q_len: int, kv_len: int, head_dim: int, v_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of a launch: blocks that hold the lengths, and a warp for each 16 of the longer one."""
    block_m, block_n = _block(q_len), _block(kv_len)
    warps = max(1, max(block_m, block_n) // 16)
    return kernel_options(TileConfig(block_m, block_n, warps, 1), head_dim, v_dim, False)


def _block(length: int) -> int:
    """The least of 16, 32, 64 and 128 that holds `length`."""
    return max(16, 1 << (length - 1).bit_length())
