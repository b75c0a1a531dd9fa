"""Tile lists on a device: from the kinds of all tiles and their counts to the lists of a `BlockMask` but for its words.

Scan the counts, synchronise for the sizes, and fill.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.block_mask.block_mask import BlockMask, TileLists
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
    """Both views but for their words. The tensors share memory, each part of which starts at a multiple of 16 bytes."""

    # int32: full_offsets and partial_offsets of rows, of columns, then both orders
    offsets: tuple[Tensor, ...]
    # int32: full_tiles of rows, of columns, then partial_tiles of rows, of columns
    tiles: Tensor
    # int32: global numbers of the rows of partial tiles, then of their columns; freed after the call
    tile_rows: Tensor
    n_full: int
    n_partial: int
    has_pair: tuple[Tensor, Tensor]


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
    planes = work.batch * work.heads
    n_queries, n_keys = planes * grid.q_len, planes * grid.kv_len
    row, col = [n_rows + 1, -(n_rows + 1) % 4], [n_cols + 1, -(n_cols + 1) % 4]
    sizes = [*row, *row, *col, *col, n_rows, -n_rows % 4, n_cols, -n_cols % 4]
    offsets = empty(grid, sum(sizes))
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
    parts = offsets.split_with_sizes(sizes)[::2]
    row_order = parts[4].view(work.batch, work.heads, grid.q_tiles)
    col_order = parts[5].view(work.batch, work.heads, grid.kv_tiles)
    has_pair = all_used(grid.device)
    # sizes of the lists, and how many positions have a pair
    n_full, n_partial, used_queries, used_keys = memory[: TOTALS.value].tolist()
    tiles = empty(grid, 2 * (_up(n_full) + _up(n_partial)))
    tile_rows = empty(grid, 2 * _up(n_partial))
    if n_rows + n_cols:
        launch(
            fill_kernel,
            (n_rows + n_cols, 1, 1),
            (
                *(memory, offsets, tiles, tile_rows, *work.starts),
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
            has_pair = octets[16 * work.starts.q_has_pair :][:n_queries].clone(), has_pair[1]
        if used_keys < n_keys:
            has_pair = has_pair[0], octets[16 * work.starts.kv_has_pair :][:n_keys].clone()
    return Lists((*parts[:4], row_order, col_order), tiles, tile_rows, n_full, n_partial, has_pair)


def block_mask_of(grid: TileGrid, lists: Lists, words: Words, words_t: Words) -> BlockMask:
    """The result: views of a few tensors."""
    row_full, row_partial, col_full, col_partial, row_order, col_order = lists.offsets
    full, partial = [lists.n_full, -lists.n_full % 4], [lists.n_partial, -lists.n_partial % 4]
    row_tiles, col_tiles, row_partial_tiles, col_partial_tiles = lists.tiles.split_with_sizes(
        [*full, *full, *partial, *partial]
    )[::2]
    row_has_pair, col_has_pair = lists.has_pair
    return BlockMask(
        grid.q_len,
        grid.kv_len,
        TileLists(row_full, row_tiles, row_partial, row_partial_tiles, words, row_order, row_has_pair),
        TileLists(col_full, col_tiles, col_partial, col_partial_tiles, words_t, col_order, col_has_pair),
    )


def _up(n: int) -> int:
    return n + -n % 4


@cache
def all_used(device: torch.device) -> tuple[Tensor, Tensor]:
    """`has_pair` of rows and columns where every position has a pair."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8, device=device), torch.empty(0, dtype=torch.uint8, device=device)
