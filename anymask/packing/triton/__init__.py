"""The device twin of definition.py: the same `BlockMask`, field by field, from a few kernels and one synchronisation.

A kernel finds the kind of every tile and, on the way, counts tiles and marks the positions that have a pair: for a mask
by name `tiles_kernel`, which evaluates only what bounds leave undecided, for a dense tensor `dense_kernel`, which reads
it once and keeps the words of all tiles. From there all entries share `lists_of`: scan, synchronise for the sizes, and
fill the lists. Last come the words of the partial tiles, for both views.
"""

import torch
from torch import Tensor

from anymask.block_mask.block_mask import BlockMask
from anymask.launch import int_key, launch, on, tensor_key
from anymask.mask.expr import Mask, TileGrid
from anymask.mask.leaves import Dense
from anymask.packing.definition import tile_words
from anymask.packing.triton.kernels.bits import LAUNCH
from anymask.packing.triton.kernels.tiles import (
    copy_kernel,
    dense_kernel,
    tile_words_kernel,
    tiles_kernel,
    words_kernel,
)
from anymask.packing.triton.lists import block_mask_of, empty, lists_of, workspace_for
from anymask.packing.triton.program import READABLE, MaskProgram, mask_program, packed_program, prepare
from anymask.shapes import TileKinds, Words
from anymask.tiles import TILE, WORDS

# kv tiles that a program classifies: one a thread, or its warps would repeat each other's work; those that stay
# undecided it evaluates one after the other
SPAN = 256
# rows of a tile that a program evaluates at a time: few, as a deep expression has many values at once in registers
STRIP = 16


def pack_mask(mask: Mask, grid: TileGrid) -> BlockMask:
    """The `BlockMask` of a mask on the device of `grid`; what only torch can evaluate is evaluated there."""
    if isinstance(mask, Dense):
        return pack_dense(mask.tensor, grid.q_len, grid.kv_len)
    packed = pack_expression(mask, grid)
    if packed is not None:
        return packed
    return lists_from_tiles(*tile_words(mask, grid, write_words=words_of_tiles), grid)


def pack_dense(tensor: Tensor, q_len: int, kv_len: int) -> BlockMask:
    """The `BlockMask` of a tensor `[mask_batch, mask_heads, 1 or q_len, 1 or kv_len]`, non-zero = attend."""
    grid = TileGrid(q_len, kv_len, tensor.device)
    batch, heads = tensor.shape[:2]
    tensor = tensor.expand(batch, heads, q_len, kv_len)
    if tensor.dtype not in READABLE:
        tensor = tensor != 0
    with on(grid.device):
        work = workspace_for(batch, heads, grid)
        prepare(work)
        tiles = work.n_rows * grid.kv_tiles
        # of all tiles, written where partial
        both = empty(grid, 2, tiles, TILE, WORDS)
        if tiles:
            strides = tensor.stride()
            align = _alignment(tensor, kv_len)
            tensor = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            launch(
                dense_kernel,
                (tiles, 1, 1),
                (
                    tensor,
                    work.memory,
                    both[0],
                    both[1],
                    strides,
                    *work.starts,
                    heads,
                    *_shape(grid),
                    work.n_rows,
                    work.n_cols,
                ),
                {"ALIGN": align},
                (work.key, tensor_key(tensor), *map(int_key, strides)),
                num_warps=1 if align > 1 else 8,
                **LAUNCH,
            )
        lists = lists_of(work)
        n_partial = lists.n_partial
        if n_partial != tiles:
            all_words, both = both, empty(grid, 2, n_partial, TILE, WORDS)
            if n_partial:
                launch(
                    copy_kernel,
                    (2 * n_partial, 1, 1),
                    (
                        *(lists.tiles, lists.tile_rows, all_words[0], all_words[1], both[0], both[1]),
                        *(n_partial, grid.q_tiles, grid.kv_tiles),
                    ),
                    {},
                    work.key,
                    num_warps=1,
                    **LAUNCH,
                )
        return block_mask_of(grid, lists, both)


def pack_expression(mask: Mask, grid: TileGrid) -> BlockMask | None:
    """The `BlockMask` of a mask, on the device of `grid`; None if only torch can evaluate it."""
    with on(grid.device):
        program = mask_program(mask, grid)
        return None if program is None else _pack_program(program, *mask.planes, grid, None)


def lists_from_tiles(kinds: TileKinds, words: Words, grid: TileGrid) -> BlockMask:
    """The `BlockMask` of tile kinds and of the words of the partial tiles in row order."""
    with on(grid.device):
        return _pack_program(packed_program(kinds.contiguous(), words), kinds.shape[0], kinds.shape[1], grid, words)


def words_of_tiles(tiles: Tensor, places: Tensor, grid: TileGrid, words: Words, kinds: Tensor) -> None:
    """Write words `[n, 128, 4]` and int8 kinds `[n]` of bool tiles `[n, 128, 128]`, of any strides.

    `places`: int64 `[n, 4]`, plane batch, plane head, q tile and kv tile. Pairs outside the plane do not count.
    """
    strides, align = tiles.stride(), _alignment(tiles, grid.kv_len)
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


def _pack_program(program: MaskProgram, batch: int, heads: int, grid: TileGrid, words: Words | None) -> BlockMask:
    """`words`: those of the rows, if they are there already."""
    work = workspace_for(batch, heads, grid, program.n_extremes)
    prepare(work, program)
    mask = program.numbers, program.tensors or (work.memory,), program.layouts
    constants = {"nodes": program.nodes, "STRIP": STRIP}
    key = work.key, program.key
    n_rows, n_cols = work.n_rows, work.n_cols
    if n_rows * n_cols:
        launch(
            tiles_kernel,
            (n_rows * -(-grid.kv_tiles // SPAN), 1, 1),
            (*mask, work.memory, *work.starts, heads, *_shape(grid), n_rows, n_cols),
            {**constants, "SPAN": SPAN},
            key,
            num_warps=8,
            **LAUNCH,
        )
    lists = lists_of(work)
    n_partial = lists.n_partial
    entries, both = n_partial, empty(grid, 2, n_partial, TILE, WORDS)
    if words is not None:
        entries = 0
        both[0] = words
    if n_partial:
        launch(
            words_kernel,
            (entries + n_partial, 1, 1),
            (
                *mask,
                lists.tiles,
                lists.tile_rows,
                both[0],
                both[1],
                entries,
                n_partial,
                heads,
                *_shape(grid),
            ),
            constants,
            key,
            num_warps=2,
            **LAUNCH,
        )
    return block_mask_of(grid, lists, both)


def _shape(grid: TileGrid) -> tuple[int, int, int, int]:
    return grid.q_len, grid.kv_len, grid.q_tiles, grid.kv_tiles


def _alignment(t: Tensor, kv_len: int) -> int:
    """`ALIGN` of `load_words_t`."""
    *strides, last = t.stride()
    if t.element_size() != 1 or last != 1:
        return 1
    together = t.data_ptr() | kv_len
    for stride in strides:
        together |= stride
    return 16 if together % 16 == 0 else 4 if together % 4 == 0 else 1
