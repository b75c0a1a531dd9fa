"""Turns: the order in which columns add to each tile of dq, so that the sum has the same bits in every run.

A column of tiles may add to a query tile when all columns of earlier turns have. Turns follow the time at which it
would be there if every tile took as long as any other, and a work tile some more: by its worker's before it.

Nobody waits for ever. All workers run at the same time, and of the tiles not added yet the one of the least time, and
of those the first in the lists, waits for none: tiles of earlier turns, and those before it in its own worker, come
before it in that order.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from anymask.block_mask import BlockMask

# of the mask's tiles, times the heads that share it, whose turns are sorted at once
CHUNK = 2**22
# what a work tile takes beyond its tiles, in tiles (docs/journal.md, E29)
WORK_TILE = 2


class Grid(NamedTuple):
    """What workers share: the work tiles of `batch x kv_heads` heads, each a column for every head of a group."""

    batch: int
    kv_heads: int
    group: int
    num_workers: int
    swizzle_heads: int


class Turns(NamedTuple):
    """What the kernel takes: a counter a query tile of each head, and the turns of a mask's tiles, None without one.

    `counters`: int32 `[batch * q_heads * q_tiles]`, how many columns have added. `full`, `partial`: int32, the turns of
    the entries of the lists of columns, again for every sample and every head that share a plane, from one of which to
    the next it is `sample_step` and `head_step`.
    """

    counters: Tensor
    full: Tensor | None
    partial: Tensor | None
    sample_step: int | None
    head_step: int | None


def of_call(block_mask: BlockMask | None, grid: Grid, q_tiles: int, like: Tensor) -> Turns:
    """Counters at 0 and the turns of a call, remembered with the mask; `like` is a tensor on the device."""
    counters = like.new_zeros(grid.batch * grid.kv_heads * grid.group * q_tiles, dtype=torch.int32)
    if block_mask is None:
        return Turns(counters, None, None, None, None)
    # those of a graph that is captured exist when it runs, and another stream would have to wait for them
    if counters.is_cuda and torch.cuda.is_current_stream_capturing():
        found = of_mask(block_mask, grid)
    else:
        key = grid, torch.cuda.current_stream(counters.device).cuda_stream if counters.is_cuda else 0
        known = _known.setdefault(block_mask, {})
        if key not in known:
            known[key] = of_mask(block_mask, grid)
        found = known[key]
    n_full, heads = block_mask.cols.full_tiles.numel(), grid.kv_heads * grid.group
    sample_step = found.shape[1] * (1 if block_mask.heads > 1 else heads) * (block_mask.batch == 1)
    return Turns(counters, found[:, :n_full], found[:, n_full:], sample_step, found.shape[1] * (block_mask.heads == 1))


def of_mask(block_mask: BlockMask, grid: Grid) -> Tensor:
    """int32 `[copies, n_full + n_partial]`: turns of the entries of the lists of columns, full ones first.

    `copies`: samples times heads that share each plane. Waits for nothing.
    """
    cols, rows = block_mask.cols, block_mask.rows
    kv_tiles, q_tiles = cols.order.shape[2], rows.order.shape[2]
    n_full, n_partial = cols.full_offsets.diff(), cols.partial_offsets.diff()
    columns, places, tiles = [], [], []
    for offsets, length, list_tiles, before in (
        (cols.full_offsets, n_full, cols.full_tiles, n_partial),
        (cols.partial_offsets, n_partial, cols.partial_tiles, torch.zeros_like(n_full)),
    ):
        entries = torch.arange(list_tiles.numel(), device=offsets.device)
        column = torch.arange(length.numel(), device=offsets.device).repeat_interleave(
            length, output_size=list_tiles.numel()
        )
        # the walk starts within the list, see `list_index` of the scheduler
        turned = (entries - offsets[column] - column % kv_tiles) % length[column]
        columns.append(column)
        places.append(before[column] + turned)
        tiles.append(column // kv_tiles * q_tiles + list_tiles)
    column, place, row = torch.cat(columns), torch.cat(places), torch.cat(tiles)
    in_row = rows.full_offsets + rows.partial_offsets
    # by rows, those of all copies alike
    turn = torch.arange(row.numel(), device=row.device) - in_row[:-1].repeat_interleave(
        in_row.diff(), output_size=row.numel()
    )
    found = []
    for some in starts(n_full + n_partial, block_mask, grid).split(max(1, CHUNK // max(1, row.numel()))):
        time = some[:, column] + place
        by_time = ((row << 32) + time).sort(dim=1, stable=True).indices
        found.append(turn.to(torch.int32)[by_time.argsort(dim=1)])
    return torch.cat(found)


def starts(counts: Tensor, block_mask: BlockMask, grid: Grid) -> Tensor:
    """int64 `[copies, planes * kv_tiles]`: what a column's worker has done before it, in tiles.

    `counts`: tiles of each column of all planes. The work tiles are those of `decode_work_tile` and `work_index`.
    """
    batch, kv_heads, group, num_workers, swizzle_heads = grid
    tiles, planes = block_mask.cols.order.shape[2], (block_mask.batch, block_mask.heads)
    q_heads = kv_heads * group
    heads, n = batch * kv_heads, batch * kv_heads * tiles
    work = torch.arange(n, device=counts.device)
    first_head = work // (swizzle_heads * tiles) * swizzle_heads
    in_block, heads_left = work - first_head * tiles, heads - first_head
    block_heads = heads_left.clamp(max=swizzle_heads)
    head, rank = first_head + in_block % block_heads, in_block // block_heads
    rank = torch.where((heads_left - 1) // swizzle_heads % 2 == 0, rank, tiles - 1 - rank)
    order = block_mask.cols.order.expand(batch, q_heads if planes[1] > 1 else kv_heads, tiles)
    order = order[:, :: group if planes[1] > 1 else 1].reshape(heads, tiles)
    column = head * tiles + order[head, rank]
    # [batch, kv_heads, group, tiles]
    each = counts.view(*planes, tiles).expand(batch, q_heads, tiles).reshape(batch, kv_heads, group, tiles)
    loads = each.sum(2).flatten()[column] + WORK_TILE
    # waves of work tiles, every second one backwards: then a column is what a worker takes
    waves = torch.nn.functional.pad(loads, (0, -n % num_workers)).view(-1, num_workers)
    waves[1::2] = waves[1::2].flip(1)
    before = waves.cumsum(0) - waves
    before[1::2] = before[1::2].flip(1)
    start = before.flatten()[column.argsort()].view(batch, kv_heads, 1, tiles) + each.cumsum(2) - each
    # copies of a plane first: [samples that share it, heads that share it, planes * tiles]
    start = start.view(batch // planes[0], planes[0], q_heads // planes[1], planes[1], tiles)
    return start.transpose(1, 2).reshape(-1, planes[0] * planes[1] * tiles)


# the turns of masks by call and stream
_known: WeakKeyDictionary[BlockMask, dict[tuple[Grid, int], Tensor]] = WeakKeyDictionary()
