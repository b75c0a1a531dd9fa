"""The device twin of definition.py: the same `BlockMask`, field by field, from a few kernels and one synchronisation.

A kernel finds the kind of every tile and, on the way, counts tiles and marks the positions that have a pair: for a mask
by name `tiles_kernel`, which evaluates only what bounds leave undecided, for a dense tensor `dense_kernel`, which reads
it once and keeps the words of all tiles. From there all entries share `_listed`: wait for the sizes, and fill the
lists. Last come the words of the partial tiles, for both views. What is launched `plans` know.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from anymask import plan
from anymask.block_mask.block_mask import BlockMask
from anymask.block_mask.parts import padded
from anymask.launch import int_key, launch, on, tensor_key
from anymask.mask.expr import Mask, TileGrid
from anymask.mask.leaves import Dense
from anymask.mask.program import program_of
from anymask.packing.definition import tile_words
from anymask.packing.triton import plans
from anymask.packing.triton.answer import Totals, take
from anymask.packing.triton.kernels.bits import LAUNCH
from anymask.packing.triton.kernels.tiles import tile_words_kernel
from anymask.packing.triton.program import is_too_large, readable
from anymask.shapes import TileKinds, Words
from anymask.tiles import PARTIAL, TILE, WORDS


def pack_mask(mask: Mask, grid: TileGrid) -> BlockMask:
    """The `BlockMask` of a mask on the device of `grid`; what only torch can evaluate is evaluated there."""
    if isinstance(mask, Dense):
        return pack_dense(mask.tensor.to(grid.device), grid.q_len, grid.kv_len)
    packed = pack_expression(mask, grid)
    if packed is not None:
        return packed
    return lists_from_tiles(*tile_words(mask.to(grid.device), grid, write_words=words_of_tiles), grid)


def pack_dense(tensor: Tensor, q_len: int, kv_len: int) -> BlockMask:
    """The `BlockMask` of a tensor `[mask_batch, mask_heads, 1 or q_len, 1 or kv_len]`, non-zero = attend."""
    device = tensor.device
    with on(device):
        tensor = readable(tensor.expand(*tensor.shape[:2], q_len, kv_len))
        steps = plans.of_dense(q_len, kv_len, device, plans.kind_of(tensor))
        found = _listed(steps, tensor)
        (words,) = found.read
        if found.totals.partial != words.shape[1]:
            words = _write_words(steps, found, 2)
        return _block_mask_of(steps, found, words)


def pack_expression(mask: Mask, grid: TileGrid) -> BlockMask | None:
    """The `BlockMask` of a mask, on the device of `grid`; None if only torch can evaluate it."""
    program = program_of(mask)
    if program is None or is_too_large(program, grid):
        return None
    device = grid.device
    with on(device):
        tensors = [readable(t if t.device == device else t.to(device)) for t in program.tensors]
        kinds = [plans.kind_of(t) for t in tensors]
        key = program.nodes, program.numbers, mask.planes, grid.q_len, grid.kv_len, device
        steps = plans.of_expression(*key, *kinds)
        if steps is None:
            return None
        found = _listed(steps, *tensors)
        return _block_mask_of(steps, found, _write_words(steps, found, 1))


def lists_from_tiles(kinds: TileKinds, words: Words, grid: TileGrid) -> BlockMask:
    """The `BlockMask` of tile kinds and of the words of the partial tiles in row order."""
    with on(grid.device):
        kinds = kinds.contiguous()
        place = (kinds == PARTIAL).flatten().cumsum(0, dtype=torch.int32) - 1
        some = [(None, *plans.kind_of(t)[1:]) for t in (place, words)]
        planes = kinds.shape[0], kinds.shape[1]
        steps = plans.of_packed(planes, grid.q_len, grid.kv_len, grid.device, plans.kind_of(kinds), *some)
        found = _listed(steps, kinds, place, words)
        return _block_mask_of(steps, found, _write_words(steps, found, 1))


def words_of_tiles(tiles: Tensor, places: Tensor, grid: TileGrid, words: Words, kinds: Tensor) -> None:
    """Write words `[n, 128, 4]` and int8 kinds `[n]` of bool tiles `[n, 128, 128]`, of any strides.

    `places`: int64 `[n, 4]`, plane batch, plane head, q tile and kv tile. Pairs outside the plane do not count.
    """
    strides, align = tiles.stride(), plans.alignment(tiles, grid.kv_len)
    with on(grid.device):
        launch(
            tile_words_kernel,
            (tiles.shape[0], 1, 1),
            (tiles.view(torch.uint8), places, words, kinds, strides, *places.stride(), grid.q_len, grid.kv_len),
            {"ALIGN": align},
            (grid.device, *map(tensor_key, (tiles, places, words, kinds)), *map(int_key, strides)),
            num_warps=1 if align > 1 else 8,
            **LAUNCH,
        )


class _Listed(NamedTuple):
    """A mask but for its words."""

    totals: Totals
    # int32, see `block_mask.parts`
    lists: Tensor
    # int32: global numbers of the rows of partial tiles, then of their columns; freed after the call
    tile_rows: Tensor
    # of the workspace
    memory: Tensor
    # what the words are made of
    read: tuple[Tensor, ...]


def _listed(steps: plans.Steps, *tensors: Tensor) -> _Listed:
    """Look at the tiles, wait for the sizes, the only time, and fill the lists."""
    work = steps.work
    device = work.grid.device
    answer = take(device)
    memory, *read = steps.look(all_used(device, work.batch, work.heads), answer.tensor, *tensors)
    totals = answer.wait(device)
    n_partial, n_full = padded(totals.partial), totals.full
    size = steps.tiles_start + 2 * n_partial + padded(n_full) + n_full
    # no program writes the offsets of no row
    lists = _empty(device, size) if work.n_rows and work.n_cols else _empty(device, size).zero_()
    tile_rows = _empty(device, 2 * n_partial)
    steps.fill(memory, lists, tile_rows)
    return _Listed(totals, lists, tile_rows, memory, tuple(read))


def _write_words(steps: plans.Steps, found: _Listed, programs: int) -> Words:
    """The words of both views; `programs` a partial tile."""
    words = _empty(found.lists.device, 2, found.totals.partial, TILE, WORDS)
    steps.words(found.memory, found.lists, found.tile_rows, words, programs * found.totals.partial, *found.read)
    return words


def _block_mask_of(steps: plans.Steps, found: _Listed, words: Words) -> BlockMask:
    """The result; `words` of both views."""
    work, totals = steps.work, found.totals
    batch, heads, grid = work.batch, work.heads, work.grid
    q_has_pair = kv_has_pair = all_used(grid.device, batch, heads)
    if totals.used_queries < work.n_queries or totals.used_keys < work.n_keys:
        # copies, as a part would keep all of the memory
        octets = found.memory.view(torch.uint8)
        if totals.used_queries < work.n_queries:
            part = octets[16 * work.starts.q_has_pair :][: work.n_queries]
            q_has_pair = part.clone().view(batch, heads, grid.q_len)
        if totals.used_keys < work.n_keys:
            kv_has_pair = octets[16 * work.starts.kv_has_pair :][: work.n_keys].clone().view(batch, heads, grid.kv_len)
    return BlockMask(grid.q_len, grid.kv_len, found.lists, words, q_has_pair, kv_has_pair)


def _empty(device: torch.device, *shape: int) -> Tensor:
    """int32, not written; the device is the current one."""
    if device.type != "cuda" or plan.empty_on_cuda is None:
        return torch.empty(shape, dtype=torch.int32, device=device)
    strides = (shape[1] * TILE * WORDS, TILE * WORDS, WORDS, 1) if len(shape) > 1 else (1,)
    made: Tensor = plan.empty_on_cuda(shape, strides, torch.int32)
    return made


@cache
def all_used(device: torch.device, batch: int, heads: int) -> Tensor:
    """`q_has_pair`, or `kv_has_pair`, where every position has a pair."""
    with torch.inference_mode(False):
        return torch.empty(batch, heads, 0, dtype=torch.uint8, device=device)
