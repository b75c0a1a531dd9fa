"""Tile lists on a device: from the kinds of all tiles and their counts to the lists of a `BlockMask` but for its words.

Scan the counts, wait for the sizes, and fill. Scanning and filling are steps of plans (`anymask.plan`).
"""

from typing import Any, NamedTuple

import torch

from anymask.block_mask.parts import padded
from anymask.mask.expr import TileGrid
from anymask.packing.triton.kernels.bits import LAUNCH
from anymask.packing.triton.kernels.lists import TOTALS, fill_kernel, scan_kernel
from anymask.plan import launch

# kinds of the tiles of a row, or counts of the rows of a plane, that a program reads at a time
CHUNK = 1024
# rows of tiles of which a program counts the positions
ROWS = 8


class Starts(NamedTuple):
    """Where the parts of a workspace start, in units of 16 bytes."""

    q_has_pair: int
    kv_has_pair: int
    extremes: int
    offsets: int
    kinds: int


class Workspace(NamedTuple):
    """Memory of one call: what is known of the tiles once each has been looked at. One allocation, not written yet.

    The parts as they lie, each from a multiple of 16 bytes on; `kernels.lists.views` points to them.

        totals     int32 [8]                           see `kernels.lists.TOTALS`                             0 at first
        counts     int32 [2 * n_rows + 2 * n_cols]     full tiles of rows, partial ones, full ones of columns, partial
        q_has_pair  uint8 [planes * q_len]             1 where a partial tile has a pair
        kv_has_pair uint8 [planes * kv_len]            the same of keys                                       0 so far
        extremes   int64 [n, 2]                        minimum and maximum of tiles of positions
        offsets    int32                               those of the lists of a `BlockMask`, as they lie there
        kinds      int8 [planes, q_tiles, kv_tiles]
    """

    # an operand of a plan
    memory: Any
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

    @property
    def n_queries(self) -> int:
        """Of all planes."""
        return self.batch * self.heads * self.grid.q_len

    @property
    def n_keys(self) -> int:
        """Of all planes."""
        return self.batch * self.heads * self.grid.kv_len


def workspace_for(like: Any, batch: int, heads: int, grid: TileGrid, extremes: int = 0) -> Workspace:
    """For as many planes, and entries of `extremes`; `like` is an operand of the plan that gets the memory."""
    planes = batch * heads
    n_rows, n_cols = planes * grid.q_tiles, planes * grid.kv_tiles
    q_has_pair = -(-(TOTALS.value + 2 * (n_rows + n_cols)) // 4)
    kv_has_pair = q_has_pair - (-planes * grid.q_len // 16)
    first = kv_has_pair - (-planes * grid.kv_len // 16)
    offsets = first + extremes
    kinds = offsets + (padded(n_rows + 1) + padded(n_cols + 1)) // 2
    end = kinds - (-n_rows * grid.kv_tiles // 16)
    key = grid.device, planes * max(grid.q_len, grid.kv_len) < 2**31
    starts = Starts(q_has_pair, kv_has_pair, first, offsets, kinds)
    memory = like.new_empty(4 * end, dtype=torch.int32)
    return Workspace(memory, starts, batch, heads, grid, n_rows, n_cols, key)


def scan(work: Workspace, answer: Any) -> None:
    """From counts to offsets, in `work`, and to totals, in `answer`."""
    chunks = -(-work.n_rows // ROWS) - (-work.n_cols // ROWS)
    launch(
        scan_kernel,
        (4 + chunks, 1, 1),
        (work.memory, answer, *work.starts, work.n_rows, work.n_cols, work.grid.q_len, work.grid.kv_len),
        {"CHUNK": CHUNK, "ROWS": ROWS},
        work.key,
        **LAUNCH,
    )


def fill(work: Workspace, lists: Any, tile_rows: Any) -> None:
    """Write `lists`, those of a `BlockMask`, and the global numbers of the rows, and columns, of its partial tiles."""
    if work.n_rows + work.n_cols:
        launch(
            fill_kernel,
            (work.n_rows + work.n_cols, 1, 1),
            (
                *(work.memory, lists, tile_rows, *work.starts),
                *(work.n_rows, work.n_cols, work.grid.q_tiles, work.grid.kv_tiles),
            ),
            {"CHUNK": CHUNK},
            work.key,
            num_warps=8,
            **LAUNCH,
        )
