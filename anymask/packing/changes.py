"""Packed masks from packed masks: some of the queries, or more tokens."""

import torch

from anymask.block_mask import BlockMask
from anymask.block_mask.tables import tile_tables
from anymask.mask import Mask
from anymask.mask.expr import TileGrid
from anymask.packing.definition import CHUNK_TILES, WriteWords, classified, evaluated, kind_of_words, no_words
from anymask.packing.device import implementation
from anymask.shapes import TileKinds, Words
from anymask.tiles import EMPTY, FULL, PARTIAL, TILE, WORDS, tiles_over


def slice_queries(block_mask: BlockMask, start: int, stop: int) -> BlockMask:
    """The mask of queries `start` to `stop - 1` and all keys: a step of decoding, a chunk of a prefill.

    Nothing is evaluated again: rows of words move as they are, from the one or two tiles that a new tile covers. Work
    and memory are those of the tiles of these queries.

    Raises:
        ValueError: a range beyond `q_len`. TypeError: no `BlockMask`, or bounds that are no integers.
    """
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask is a {type(block_mask).__name__}; allowed is a BlockMask")
    for name, value in (("start", start), ("stop", stop)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; allowed is an int")
    if not 0 <= start <= stop <= block_mask.q_len:
        q_len = block_mask.q_len
        raise ValueError(
            f"queries {start} to {stop} of a mask with q_len={q_len}; allowed are 0 <= start <= stop <= q_len"
        )
    if torch.compiler.is_compiling():
        # an operator of `anymask.mask_ops`, which compilers do not look into
        lengths = block_mask.q_len, block_mask.kv_len
        tensors = torch.ops.anymask.slice_queries(block_mask.tensors(), *lengths, start, stop)
        return BlockMask(stop - start, block_mask.kv_len, *tensors)
    rows, shift = block_mask.rows, start % TILE
    grid = TileGrid(stop - start, block_mask.kv_len, block_mask.device)
    # the old tiles that are covered, and one row of tiles below them
    kinds, number = (t.flatten(0, 1) for t in tile_tables(block_mask, start // TILE, grid.q_tiles + 1))
    found = torch.full((kinds.shape[0], grid.q_tiles, grid.kv_tiles), EMPTY, dtype=torch.int8, device=grid.device)
    touched = (torch.maximum(kinds[:, :-1], kinds[:, 1:]) != EMPTY).nonzero()
    kept, row = [], torch.arange(TILE, device=grid.device)
    for chunk in touched.split(CHUNK_TILES):
        plane, tile_row, tile = chunk.unbind(1)
        halves = []
        for below in (0, 1):
            old = kinds[plane, tile_row + below, tile][:, None, None]
            bits = (
                rows.words[number[plane, tile_row + below, tile]]
                if rows.words.shape[0]
                else old.new_zeros(1, 1, 1).int()
            )
            halves.append(torch.where(old == PARTIAL, bits, -(old == FULL).to(torch.int32)).expand(-1, TILE, WORDS))
        words = torch.cat([halves[0][:, shift:], halves[1][:, :shift]], 1)
        words = torch.where((tile_row[:, None] * TILE + row < grid.q_len)[..., None], words, 0)
        new = kind_of_words(words, tile_row, grid)
        found[plane, tile_row, tile] = new
        kept.append(words[new == PARTIAL])
    words = torch.cat(kept) if kept else no_words(grid)
    return implementation(grid.device).lists_from_tiles(
        found.view(block_mask.batch, block_mask.heads, grid.q_tiles, grid.kv_tiles), words, grid
    )


def extend(block_mask: BlockMask, mask: Mask, q_len: int, kv_len: int) -> BlockMask:
    """`pack(mask, q_len=q_len, kv_len=kv_len)`, where `block_mask` is the same mask at smaller lengths.

    Only tiles that do not lie whole in `block_mask` are evaluated. Tensors in `mask` have the new lengths, and say of
    old pairs what they said.

    Args:
        block_mask: the mask packed for fewer queries or keys.
        mask: the `Mask` that it was packed from.
        q_len, kv_len: the new lengths in tokens.

    Raises:
        ValueError: smaller lengths, other planes, or a lower-right mask. TypeError: no `BlockMask`, or no `Mask`.
    """
    for name, value, kind in (("block_mask", block_mask, BlockMask), ("mask", mask, Mask)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}; allowed is a {kind.__name__}")
    for name, old, new in (("q_len", block_mask.q_len, q_len), ("kv_len", block_mask.kv_len, kv_len)):
        if new < old:
            raise ValueError(f"{name} is {new} but the mask has {old} already; allowed are {old} and more")
    planes = block_mask.batch, block_mask.heads
    if mask.planes != planes:
        raise ValueError(f"mask has {mask.planes} planes but the packed one has {planes}; allowed is the same mask")
    if not mask.is_prefix_stable:
        raise ValueError("mask counts from the last query and key, which move; pack it again")
    mask = mask.to(block_mask.device)
    mask.check(q_len, kv_len)
    grid = TileGrid(q_len, kv_len, block_mask.device)
    twin = implementation(grid.device)
    return twin.lists_from_tiles(*_extended_tile_words(block_mask, mask, grid, twin.words_of_tiles), grid)


def _extended_tile_words(
    known: BlockMask, mask: Mask, grid: TileGrid, write_words: WriteWords
) -> tuple[TileKinds, Words]:
    """`definition.tile_words`, where tiles that lie whole in `known` are taken from it."""
    kinds = classified(mask, grid)
    old_kinds, old_number = tile_tables(known, 0, tiles_over(known.q_len))
    whole = ..., slice(known.q_len // TILE), slice(known.kv_len // TILE)
    kinds[whole] = old_kinds[whole]
    unknown = kinds == PARTIAL
    unknown[whole] = False
    words = evaluated(mask, grid, kinds, unknown, write_words)
    # where the words of each tile are: those of old tiles, then the new ones
    number = torch.full(kinds.shape, -1, dtype=torch.int64, device=grid.device)
    number[whole] = old_number[whole]
    new = kinds == PARTIAL
    new[whole] = False
    number[new] = known.rows.words.shape[0] + torch.arange(words.shape[0], device=grid.device)
    return kinds, torch.cat([known.rows.words, words])[number[kinds == PARTIAL]]
