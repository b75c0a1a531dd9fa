"""Split-KV: the forward pass of few queries over many keys, by programs that share the keys.

Where there are fewer work tiles than multiprocessors, as when a model decodes, each of S splits walks a share of a
line's tiles, and a second kernel joins their sums in order (FlashDecoding; Dao et al., 2023). Results are bit-equal from
run to run on one GPU; S depends on the batch, and so do the last bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.backends.gpu import target
from anymask.backends.gpu.arguments import (
    LOG2_E,
    TINY_SCALE,
    TileConfig,
    can_use_tma,
    has_pair,
    kernel_options,
    launch_triton,
    mask_lists,
    padded_dim,
    plane_strides,
    source,
)
from anymask.block_mask import BlockMask
from anymask.launch import device_guard
from anymask.layout import empty_as
from anymask.tiles import TILE, tiles_over

MAX_SPLITS = 64


class Rows(NamedTuple):
    """The rows that share keys: heads of a group that are packed, and rows of a program."""

    packed: int
    count: int
    block: int


def rows_of(q: Tensor, k: Tensor, block_mask: BlockMask | None) -> Rows:
    q_heads, q_len = q.shape[1:3]
    packed = q_heads // k.shape[1] if q_len <= TILE and (block_mask is None or block_mask.heads == 1) else 1
    count = packed * q_len
    return Rows(packed, count, 16 if count <= 16 else 32 if count <= 32 else 64)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float, splits: int, config: TileConfig,
    use_tma: bool = False, use_pdl: bool = False, column: int = 64, join: bool = True,
) -> tuple[Tensor, Tensor]:
    """`(o, lse)`."""
    from anymask.backends.gpu.kernels.split import _join_kernel, _split_kernel

    batch, q_heads, q_len, head_dim = q.shape
    v_dim = v.shape[3]
    rows = rows_of(q, k, block_mask)
    o = empty_as(q, v_dim)
    lines = batch * q_heads * q_len
    floats = q.new_empty(lines * (1 + splits * (v_dim + 2)), dtype=torch.float32)
    lse = floats[:lines].view(batch, q_heads, q_len)
    sums = floats[lines:]
    parts = floats[lines * (1 + 2 * splits) :]
    kv_has_pair = has_pair(block_mask, "cols")
    with device_guard(q.device):
        current = target.current_target()
        constants, options = kernel_options(config, head_dim, v_dim, use_tma)
        blocks = -(-rows.count // config.BLOCK_M)
        launch_triton(
            _split_kernel,
            (blocks * splits, q_heads // rows.packed, batch),
            (
                q,
                source(k, use_tma, config.BLOCK_N, constants["BLOCK_D"]),
                source(v, use_tma, config.BLOCK_N, constants["BLOCK_DV"]),
                parts,
                sums,
                *(t.stride()[:3] for t in (q, k, v)),
                *mask_lists(block_mask, "rows")[:5],
                kv_has_pair,
                plane_strides(block_mask),
                q_heads,
                q_heads // k.shape[1],
                rows.packed,
                q_len,
                k.shape[2],
                splits,
                (abs(sm_scale) or TINY_SCALE) * LOG2_E,
            ),
            {
                **constants,
                "IS_NEGATIVE": sm_scale < 0,
                "USE_ASM": current[0] == "cuda" and not target.interprets(),
                "USE_PDL": use_pdl,
            },
            q.device,
            options,
        )
        if not join:
            return o, lse
        column = min(column, constants["BLOCK_DV"])
        launch_triton(
            _join_kernel,
            (lines, constants["BLOCK_DV"] // column, 1),
            (parts, sums, o, lse, o.stride()[:3], splits, q_heads, q_len),
            {"V_DIM": v_dim, "BLOCK_DV": column, "MAX_SPLITS": max(16, 1 << (splits - 1).bit_length()), "USE_PDL": use_pdl},
            q.device,
            {"launch_pdl": True, "num_warps": 4} if use_pdl else {"num_warps": 4},
        )
    return o, lse
