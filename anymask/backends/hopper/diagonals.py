"""The gradient of a table by distance: what the backward kernel writes of it, and the sum of that."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anymask.backends.gpu.arguments import plane_strides
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
    n_entries: int


def empty_runs(needs: Needs, lse: Tensor, kv_len: int, block_mask: BlockMask | None) -> Runs | None:
    """Memory for the runs of a call, None if no table needs a gradient or they are too many; `lse [.., q_len]`."""
    if not any(needs.tables):
        return None
    batch, q_heads, q_len = lse.shape
    copies, n_entries = batch * q_heads, tiles_over(q_len) * tiles_over(kv_len)
    if block_mask is not None:
        copies //= block_mask.batch * block_mask.heads
        n_entries = block_mask.cols.partial_tiles.numel() + block_mask.cols.full_tiles.numel()
    size = copies * n_entries * TILE_SUMS
    return Runs(lse.new_empty(size), n_entries) if size <= MAX_SUMS else None


def sum_runs(runs: Runs, lse: Tensor, kv_len: int, block_mask: BlockMask | None) -> Tensor:
    """fp32 `[q_heads, q_len + kv_len - 1]`: entry `i - j + kv_len - 1` of query i and key j, summed over samples."""
    from anymask.backends.hopper.kernels.diagonals import _table_kernel

    batch, q_heads, q_len = lse.shape
    out = lse.new_empty(q_heads, q_len + kv_len - 1)
    entries = None if block_mask is None else _entries(block_mask)
    args = (
        runs.sums,
        entries,
        out,
        runs.n_entries,
        *plane_strides(block_mask),
        q_heads,
        batch,
        q_len,
        kv_len,
    )
    blocks = (tiles_over(q_len) + tiles_over(kv_len)) * (TILE // BLOCK)
    launch(
        _table_kernel,
        (blocks, q_heads, 1),
        args,
        {"TILE": TILE, "BLOCK": BLOCK, "ROWS": ROWS},
        (lse.device, *args_key(args)),
        num_warps=4,
    )
    return out


def _entries(block_mask: BlockMask) -> Tensor:
    """int32 `[planes * kv tiles, q tiles]`: which of all tiles one is, column by column, partial ones first; or -1."""
    cols, q_tiles = block_mask.cols, tiles_over(block_mask.q_len)
    columns = torch.arange(cols.full_offsets.numel() - 1, device=block_mask.device)
    found = torch.full((columns.numel(), q_tiles), -1, dtype=torch.int32, device=block_mask.device)
    for offsets, tiles, before in (
        (cols.partial_offsets, cols.partial_tiles, cols.full_offsets[:-1]),
        (cols.full_offsets, cols.full_tiles, cols.partial_offsets[1:]),
    ):
        # told the size, torch need not wait for the GPU
        column = columns.repeat_interleave(offsets.diff().long(), output_size=tiles.numel())
        number = torch.arange(tiles.numel(), device=block_mask.device) + before[column]
        found.view(-1).index_copy_(0, column * q_tiles + tiles, number.int())
    return found
