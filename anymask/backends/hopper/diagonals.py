"""The gradient of a table by distance: what the backward kernel writes of it, and the sum of that."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anymask.backends.gpu.arguments import mask_lists, plane_strides
from anymask.block_mask import BlockMask
from anymask.launch import args_key
from anymask.plan import launch
from anymask.scores import Needs
from anymask.tiles import TILE, tiles_over

# keys and queries of a run, and sums of the runs of a tile
BLOCK, TILE_SUMS = 64, 512
# most sums of all runs, 1 GiB; with more a kernel makes ds again
MAX_SUMS = 2**28
# runs that a program reads at a time
ROWS = 16


class Runs(NamedTuple):
    """Sums of ds along the diagonals of all blocks that the mask leaves.

    `sums`: fp32, 2 x 2 runs of 128 for each tile of the columns, by the halves of its queries, then of its keys; again
    for each head that shares the plane. Entry i of a run: `key - query` is i - 64 in its block.
    """

    sums: Tensor
    # tiles of the columns of all planes
    n_tiles: int


def empty_runs(needs: Needs, lse: Tensor, kv_len: int, block_mask: BlockMask | None) -> Runs | None:
    """Memory for the runs of a call, None if no table needs a gradient or they are too many; `lse [.., q_len]`."""
    if not any(needs.tables):
        return None
    batch, q_heads, q_len = lse.shape
    copies, n_tiles = batch * q_heads, tiles_over(q_len) * tiles_over(kv_len)
    if block_mask is not None:
        copies //= block_mask.batch * block_mask.heads
        n_tiles = block_mask.cols.partial_tiles.numel() + block_mask.cols.full_tiles.numel()
    size = copies * n_tiles * TILE_SUMS
    return Runs(lse.new_empty(size), n_tiles) if size <= MAX_SUMS else None


def sum_runs(runs: Runs, lse: Tensor, kv_len: int, block_mask: BlockMask | None) -> Tensor:
    """fp32 `[q_heads, q_len + kv_len - 1]`: entry `i - j + kv_len - 1` of query i and key j, summed over samples."""
    from anymask.backends.hopper.kernels.diagonals import _table_kernel

    batch, q_heads, q_len = lse.shape
    out = lse.new_empty(q_heads, q_len + kv_len - 1)
    numbers = None if block_mask is None else tile_numbers(block_mask)
    args = (runs.sums, numbers, out, runs.n_tiles, *plane_strides(block_mask), q_heads, batch, q_len, kv_len)
    blocks = (tiles_over(q_len) + tiles_over(kv_len)) * (TILE // BLOCK)
    launch(
        _table_kernel,
        (blocks, q_heads, 1),
        args,
        {"TILE": TILE, "BLOCK": BLOCK, "ROWS": ROWS},
        (lse.device, *args_key(args)),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def tile_numbers(block_mask: BlockMask) -> Tensor:
    """int32 `[planes * kv tiles, q tiles]`: which of all tiles one is, column by column, partial ones first; or -1."""
    from anymask.backends.hopper.kernels.diagonals import _number_kernel

    cols, q_tiles = block_mask.cols, tiles_over(block_mask.q_len)
    columns = cols.full_offsets.numel() - 1
    found = torch.empty(columns, q_tiles, dtype=torch.int32, device=block_mask.device)
    launch(
        _number_kernel,
        (columns, 1, 1),
        (*mask_lists(block_mask, "cols")[:4], found, q_tiles),
        {"SIZE": TILE},
        (block_mask.device,),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return found
