"""Launches of the backward kernel for head_dim up to 128: dk with dv and a sum of dq."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymask.backends.gpu.arguments import mask_lists, plane_strides
from anymask.backends.gpu.passes import BackwardCall
from anymask.backends.hopper import diagonals, tuning, turns
from anymask.backends.hopper.descriptors import WARPGROUP_ROWS, block_of, descriptor, tile_descriptor
from anymask.backends.hopper.scores import BackwardTerms
from anymask.plan import launch
from anymask.tiles import TILE, tiles_over


def launch_dkdv(
    call: BackwardCall,
    dk: Tensor,
    dv: Tensor,
    dq_acc: Tensor | None,
    grid: turns.Grid,
    in_turn: turns.Turns | None,
    scores: BackwardTerms,
    k_sums: Tensor | None,
    runs: diagonals.Runs | None,
) -> None:
    """dk and dv, `dq_acc` if there is one, with `in_turn` in that order, `k_sums` and `runs`, see the kernel."""
    from anymask.backends.hopper.kernels.backward import _bwd_kernel

    block_mask, maps = call.block_mask, (call.q_has_pair, call.kv_has_pair)
    batch, q_heads, q_len, head_dim = call.q.shape
    kv_heads, kv_len, v_dim = call.k.shape[1], call.k.shape[2], call.v.shape[3]
    columns = block_d(head_dim, v_dim)
    block_m = _block_m(columns)
    launch(
        _bwd_kernel,
        (grid.num_workers, 1, 1),
        (
            *_descriptors(call, scores.lse2, dk, dv, dq_acc, columns, block_m),
            *(in_turn or (None,) * 5),
            *mask_lists(block_mask, "cols"),
            *maps,
            *plane_strides(block_mask),
            tiles_over(q_len),
            kv_heads,
            q_heads // kv_heads,
            q_len,
            kv_len,
            tiles_over(kv_len) * kv_heads * batch,
            grid.swizzle_heads,
            call.sm_scale,
            *scores.arguments(block_m),
            k_sums,
            *(runs or (None, 0)),
        ),
        {
            "HEAD_DIM": columns,
            "BLOCK_M": block_m,
            "STAGES": 2,
            "SCORES_AHEAD": tuning.SCORES_AHEAD[columns],
            "BIAS_STAGES": 0 if scores.pairs is None else tuning.BIAS_STAGES[columns],
            "HAS_TAIL": block_mask is None and kv_len % TILE != 0,
        },
        (
            call.q.device,
            call.q.dtype,
            call.do.dtype,
            q_heads // kv_heads,
            *[x is None for x in (dq_acc, in_turn, block_mask, *maps, k_sums, runs)],
            *scores.key,
        ),
        num_warps=4,
        enable_fp_fusion=True,
        # a program that waits for one that cannot start would wait for ever
        launch_cooperative_grid=in_turn is not None,
    )


def _descriptors(
    call: BackwardCall, lse2: Tensor, dk: Tensor, dv: Tensor, dq_acc: Tensor | None, columns: int, block_m: int
) -> tuple[Any, ...]:
    """Those of the kernel, in its order; steps have `block_m` queries."""
    q, k, v = call.q, call.k, call.v
    q_shape, k_shape, v_shape = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    blocks = (block_of((1, 1, rows, columns), q.dtype) for rows in (block_m, TILE, WARPGROUP_ROWS))
    (block_q, block_kv, block_out), block_rows = blocks, block_of((block_m,), torch.float32)
    padded, dq_tiles = lse2.numel(), None
    if dq_acc is not None:
        dq_shape = padded * columns // 32, 32
        dq_tiles = descriptor(dq_acc, dq_shape, (32, 1), block_of((block_m * columns // 64, 32), torch.float32))
    return (
        tile_descriptor(q, q_shape, block_q),
        tile_descriptor(k, k_shape, block_kv),
        tile_descriptor(v, v_shape, block_kv),
        tile_descriptor(call.do, (*q_shape[:3], v_shape[3]), block_q),
        descriptor(lse2, (padded,), (1,), block_rows),
        descriptor(call.delta, (padded,), (1,), block_rows),
        dq_tiles,
        tile_descriptor(dk, k_shape, block_out),
        tile_descriptor(dv, v_shape, block_out),
    )


def _block_m(columns: int) -> int:
    """Queries of a step: each consumer warpgroup has 64 x 64 of dq."""
    return 2 * WARPGROUP_ROWS * 64 // columns


def block_d(head_dim: int, v_dim: int) -> int:
    """What head_dim and v_dim are padded to."""
    return 64 if max(head_dim, v_dim) <= 64 else 128
