"""Tile lists on a device: from the kinds of all tiles and their counts to the lists of a `BlockMask` but for its words.

Scan the counts, synchronise for the sizes, and fill.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.block_mask.block_mask import BlockMask
from anymask.block_mask.parts import padded, sizes_of, starts_of
from anymask.launch import launch
from anymask.mask.expr import TileGrid
from anymask.packing.triton.kernels.bits import LAUNCH
from anymask.packing.triton.kernels.lists import TOTALS, fill_kernel, scan_kernel
from anymask.shapes import Words

# kinds of the tiles of a row, or counts of the rows of a plane, that a program reads at a time
CHUNK = 1024
# positions that a program counts
POSITION_CHUNK = 8192


class Starts(NamedTuple):
    """Where the parts of a workspace start, in units of 16 bytes."""

    q_has_pair: int
    kv_has_pair: int
    extremes: int
    kinds: int


class Workspace(NamedTuple):
    """Memory of one call: what is known of the tiles once each has been looked at. One allocation, not written yet.

    The parts as they lie, each from a multiple of 16 bytes on; `kernels.lists.views` points to them.

        totals     int32 [4]                           full tiles, partial tiles, used queries, used keys     0 at first
        counts     int32 [2 * n_rows + 2 * n_cols]     full tiles of rows, partial ones, full ones of columns, partial
        q_has_pair  uint8 [planes * q_len]             1 where a partial tile has a pair
        kv_has_pair uint8 [planes * kv_len]            the same of keys                                       0 so far
        extremes   int64 [n, 2]                        minimum and maximum of tiles of positions
        kinds      int8 [planes, q_tiles, kv_tiles]
    """

    memory: Tensor
    starts: Starts
    batch: int
    heads: int
    grid: TileGrid
    # rows and columns of tiles of all planes
    n_rows: int
    n_cols: int
    # device, and whether integers fit int32: what kernels are compiled for, of the arguments that are made here
    key: tuple[Any, ...]

    @property
    def zeros(self) -> int:
        """Integers at the head that are 0 at first."""
        return 4 * self.starts.extremes


class Lists(NamedTuple):
    """A mask but for its words."""

    # int32, see `block_mask.parts`, and where its lists of tiles begin
    lists: Tensor
    tiles_start: int
    # int32: global numbers of the rows of partial tiles, then of their columns; freed after the call
    tile_rows: Tensor
    n_partial: int
    q_has_pair: Tensor
    kv_has_pair: Tensor

    @property
    def tiles(self) -> Tensor:
        """partial_tiles of rows and of columns, then full_tiles."""
        return self.lists[self.tiles_start :]


def empty(grid: TileGrid, *shape: int) -> Tensor:
    """int32, not written, where the tiles are."""
    return torch.empty(shape, dtype=torch.int32, device=grid.device)


def workspace_for(batch: int, heads: int, grid: TileGrid, extremes: int = 0) -> Workspace:
    """For as many planes, and entries of `extremes`."""
    planes = batch * heads
    n_rows, n_cols = planes * grid.q_tiles, planes * grid.kv_tiles
    q_has_pair = -(-(TOTALS.value + 2 * (n_rows + n_cols)) // 4)
    kv_has_pair = q_has_pair - (-planes * grid.q_len // 16)
    first = kv_has_pair - (-planes * grid.kv_len // 16)
    kinds = first + extremes
    end = kinds - (-n_rows * grid.kv_tiles // 16)
    key = grid.device, planes * max(grid.q_len, grid.kv_len) < 2**31
    starts = Starts(q_has_pair, kv_has_pair, first, kinds)
    return Workspace(empty(grid, 4 * end), starts, batch, heads, grid, n_rows, n_cols, key)


def lists_of(work: Workspace) -> Lists:
    """Scan, synchronise for the sizes, the only time, and fill."""
    memory, grid, n_rows, n_cols = work.memory, work.grid, work.n_rows, work.n_cols
    batch, heads = work.batch, work.heads
    n_queries, n_keys = batch * heads * grid.q_len, batch * heads * grid.kv_len
    offsets = empty(grid, 2 * (padded(n_rows + 1) + padded(n_cols + 1)))
    chunks = -(-n_queries // POSITION_CHUNK) - (-n_keys // POSITION_CHUNK)
    launch(
        scan_kernel,
        (4 + chunks, 1, 1),
        (memory, offsets, *work.starts, n_rows, n_cols, n_queries, n_keys, grid.q_len, grid.kv_len),
        {"CHUNK": CHUNK, "POSITION_CHUNK": POSITION_CHUNK},
        work.key,
        **LAUNCH,
    )
    # what can be done while the device counts
    q_has_pair = kv_has_pair = all_used(grid.device, batch, heads)
    # sizes of the lists, and how many positions have a pair
    n_full, n_partial, used_queries, used_keys = memory[: TOTALS.value].tolist()
    starts = starts_of(sizes_of(n_rows, n_cols, n_partial, n_full))
    # no program writes the offsets of no row
    lists = empty(grid, starts[-1]) if n_rows and n_cols else empty(grid, starts[-1]).zero_()
    tile_rows = empty(grid, 2 * padded(n_partial))
    if n_rows + n_cols:
        launch(
            fill_kernel,
            (n_rows + n_cols, 1, 1),
            (
                *(memory, offsets, lists, tile_rows, *work.starts),
                *(n_rows, n_cols, grid.q_tiles, grid.kv_tiles, n_full, n_partial),
            ),
            {"CHUNK": CHUNK},
            work.key,
            num_warps=8,
            **LAUNCH,
        )
    if used_queries < n_queries or used_keys < n_keys:
        # copies, as a part would keep all of the memory
        octets = memory.view(torch.uint8)
        if used_queries < n_queries:
            q_has_pair = octets[16 * work.starts.q_has_pair :][:n_queries].clone().view(batch, heads, grid.q_len)
        if used_keys < n_keys:
            kv_has_pair = octets[16 * work.starts.kv_has_pair :][:n_keys].clone().view(batch, heads, grid.kv_len)
    # partial tiles of rows are the seventh part
    return Lists(lists, starts[6], tile_rows, n_partial, q_has_pair, kv_has_pair)


def block_mask_of(grid: TileGrid, lists: Lists, words: Words) -> BlockMask:
    """The result; `words` of rows, and of columns."""
    return BlockMask(grid.q_len, grid.kv_len, lists.lists, words, lists.q_has_pair, lists.kv_has_pair)


@cache
def all_used(device: torch.device, batch: int, heads: int) -> Tensor:
    """`q_has_pair`, or `kv_has_pair`, where every position has a pair."""
    with torch.inference_mode(False):
        return torch.empty(batch, heads, 0, dtype=torch.uint8, device=device)
