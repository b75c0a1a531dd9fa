"""Launches of the backward kernels for head_dim 129 to 256: dk with dv, and dq."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anymask.backends.gpu.arguments import LOG2_E, mask_lists, plane_strides
from anymask.backends.gpu.passes import BackwardCall
from anymask.backends.hopper import tuning
from anymask.backends.hopper.descriptors import block_of, descriptor, tile_descriptor
from anymask.plan import launch
from anymask.tiles import tiles_over

# keys or queries of a consumer warpgroup and of a step, and how many of them a tile has
ROWS, HALVES = 64, 2


class Grid(NamedTuple):
    """Programs, the work tiles that they share, and how many heads are swizzled together."""

    programs: int
    n_work_tiles: int
    swizzle_heads: int


def launch_dkdv(call: BackwardCall, dk: Tensor, dv: Tensor, dims: tuple[int, int], grid: Grid) -> None:
    """Launch the kernel of dk and dv, for head_dim and v_dim padded to `dims`."""
    from anymask.backends.hopper.kernels.wide_dkdv import _wide_dkdv_kernel

    q, k, v, do, block_mask = call.q, call.k, call.v, call.do, call.block_mask
    q_shape, k_shape, v_shape = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    config = tuning.WIDE_DKDV[dims]
    block, block_rows = block_of((1, 1, ROWS, config.WIDTH), q.dtype), block_of((ROWS,), torch.float32)
    padded = call.lse2.numel()
    launch(
        _wide_dkdv_kernel,
        (grid.programs, 1, 1),
        (
            tile_descriptor(q, q_shape, block),
            tile_descriptor(k, k_shape, block),
            tile_descriptor(v, v_shape, block),
            tile_descriptor(do, (*q_shape[:3], v_shape[3]), block),
            descriptor(call.lse2, (padded,), (1,), block_rows),
            descriptor(call.delta, (padded,), (1,), block_rows),
            tile_descriptor(dk, k_shape, block),
            tile_descriptor(dv, v_shape, block),
            *mask_lists(block_mask, "cols"),
            *plane_strides(block_mask),
            tiles_over(q_shape[2]),
            k_shape[1],
            q_shape[1] // k_shape[1],
            k_shape[2],
            grid.n_work_tiles,
            grid.swizzle_heads,
            call.sm_scale,
            call.sm_scale * LOG2_E,
        ),
        {
            "D_BLOCKS": dims[0] // config.WIDTH,
            "V_BLOCKS": dims[1] // config.WIDTH,
            "STAGES": config.STAGES,
            "P_STAGES": config.P_STAGES,
        },
        (q.device, q.dtype, config.WIDTH, block_mask is None),
        num_warps=4,
        enable_fp_fusion=True,
    )


def launch_dq(call: BackwardCall, dq: Tensor, dims: tuple[int, int], grid: Grid) -> None:
    """Launch the kernel of dq, for head_dim and v_dim padded to `dims`."""
    from anymask.backends.hopper.kernels.wide_dq import _wide_dq_kernel

    q, k, v, do, block_mask = call.q, call.k, call.v, call.do, call.block_mask
    q_shape, k_shape, v_shape = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    config = tuning.WIDE_DQ[dims]
    block = block_of((1, 1, ROWS, config.WIDTH), q.dtype)
    launch(
        _wide_dq_kernel,
        (grid.programs, 1, 1),
        (
            tile_descriptor(q, q_shape, block),
            tile_descriptor(k, k_shape, block),
            tile_descriptor(v, v_shape, block),
            tile_descriptor(do, (*q_shape[:3], v_shape[3]), block),
            tile_descriptor(dq, q_shape, block),
            call.lse2,
            call.delta,
            *mask_lists(block_mask, "rows"),
            *plane_strides(block_mask),
            tiles_over(q_shape[2]),
            q_shape[1],
            q_shape[1] // k_shape[1],
            q_shape[2],
            k_shape[2],
            grid.n_work_tiles,
            grid.swizzle_heads,
            call.sm_scale,
            call.sm_scale * LOG2_E,
        ),
        {
            "D_BLOCKS": dims[0] // config.WIDTH,
            "V_BLOCKS": dims[1] // config.WIDTH,
            "K_STAGES": config.K_STAGES,
            "V_STAGES": config.V_STAGES,
        },
        (q.device, q.dtype, config.WIDTH, block_mask is None),
        num_warps=4,
        enable_fp_fusion=True,
    )
