"""What packing gives, in torch: the definition of which the kernels of `packing/triton` are the twin.

Two stages. `tile_words` finds the kind of every tile and the words of the partial ones; `lists_from_tiles` sorts them
into the row and column lists of a `BlockMask`.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from anymask.block_mask.bits import pack_bits, transpose_bits
from anymask.block_mask.block_mask import BlockMask, TileLists
from anymask.mask.expr import Mask, TileGrid
from anymask.mask.leaves import Dense
from anymask.shapes import TileBits, TileKinds, Words
from anymask.tiles import EMPTY, FULL, PARTIAL, TILE, WORDS

# tiles evaluated at a time: 16 MiB of booleans, and as int64 the positions they are computed from, 128 MiB
CHUNK_TILES = 1024
# on a GPU twice as many: each chunk costs its launches
CUDA_CHUNK_TILES = 2048
# tiles evaluated before the words of the partial ones are picked out, which a GPU waits for: 64 MiB of words
GROUP_TILES = 2**15
# tiles classified at a time, from bounds of 8 bytes: 16 MiB each
STRIP_TILES = 2**21


def pack_mask(mask: Mask, grid: TileGrid) -> BlockMask:
    """The `BlockMask` of a mask on the device of `grid`."""
    return lists_from_tiles(*tile_words(mask.to(grid.device), grid), grid)


class WriteWords(Protocol):
    """`words_of_tiles`, or its twin on a GPU."""

    def __call__(self, tiles: TileBits, places: Tensor, grid: TileGrid, words: Words, kinds: Tensor, /) -> None:
        """Write the words and the kinds of tiles."""


def tile_words(mask: Mask, grid: TileGrid, write_words: WriteWords | None = None) -> tuple[TileKinds, Words]:
    """Kinds of all tiles, and the words of the partial ones in row order (plane, query tile, kv tile)."""
    if isinstance(mask, Dense):
        return _tile_words_dense(mask.tensor, grid)
    kinds = classified(mask, grid)
    return kinds, evaluated(mask, grid, kinds, kinds == PARTIAL, write_words or words_of_tiles)


def classified(mask: Mask, grid: TileGrid) -> TileKinds:
    """int8 `[mask_batch, mask_heads, q_tiles, kv_tiles]`: from bounds; PARTIAL where those do not say."""
    batch, heads = mask.planes
    kinds = torch.empty(batch, heads, grid.q_tiles, grid.kv_tiles, dtype=torch.int8, device=grid.device)
    step = max(1, STRIP_TILES // max(1, batch * heads * grid.kv_tiles))
    for first in range(0, grid.q_tiles, step):
        rows = grid.rows[first : first + step]
        kinds[:, :, rows.start : rows.stop] = mask.classify(grid, rows)
    if grid.kv_len % TILE:
        # the columns beyond kv_len are off, so the last kv tile is full for nobody
        kinds[..., -1].clamp_(max=PARTIAL)
    return kinds


def evaluated(mask: Mask, grid: TileGrid, kinds: TileKinds, chosen: Tensor, write_words: WriteWords) -> Words:
    """Words of the tiles of `chosen`, bool like `kinds`, that turn out partial, in row order; writes their `kinds`."""
    within = torch.arange(TILE, device=grid.device)
    size = CUDA_CHUNK_TILES if grid.device.type == "cuda" else CHUNK_TILES
    kept = [no_words(grid)]
    for group in chosen.nonzero().split(GROUP_TILES):
        words = torch.empty(len(group), TILE, WORDS, dtype=torch.int32, device=grid.device)
        found = torch.empty(len(group), dtype=torch.int8, device=grid.device)
        for chunk, *results in zip(group.split(size), words.split(size), found.split(size), strict=True):
            b, h, q_tile, kv_tile = chunk[:, :, None, None].unbind(1)
            q = (q_tile * TILE + within[:, None]).clamp_(max=grid.q_len - 1)
            k = (kv_tile * TILE + within).clamp_(max=grid.kv_len - 1)
            bits = mask.evaluate(grid, b, h, q, k).expand(len(chunk), TILE, TILE)
            write_words(bits, chunk, grid, *results)
        kinds[tuple(group.unbind(1))] = found
        kept.append(words[found == PARTIAL])
    return torch.cat(kept)


def words_of_tiles(tiles: TileBits, places: Tensor, grid: TileGrid, words: Words, kinds: Tensor) -> None:
    """Write the words and the kinds of tiles at `places [n, 4]`: plane batch, plane head, q tile, kv tile."""
    within = torch.arange(TILE, device=grid.device)
    q, k = (places[:, 2:, None] * TILE + within).unbind(1)
    inside = (q < grid.q_len)[:, :, None] & (k < grid.kv_len)[:, None, :]
    words.copy_(pack_bits(tiles & inside))
    kinds.copy_(kind_of_words(words, places[:, 2], grid))


def _tile_words_dense(tensor: Tensor, grid: TileGrid) -> tuple[TileKinds, Words]:
    batch, heads = tensor.shape[:2]
    shape = (batch, heads, grid.q_tiles, grid.kv_tiles)
    kinds = torch.full(shape, EMPTY, dtype=torch.int8, device=grid.device)
    kept = []
    strip_tiles = max(1, CHUNK_TILES // max(1, grid.kv_tiles))
    for b in range(batch):
        for h in range(heads):
            plane = tensor[b, h].expand(grid.q_len, grid.kv_len)
            for first in range(0, grid.q_tiles if grid.kv_tiles else 0, strip_tiles):
                last = min(first + strip_tiles, grid.q_tiles)
                rows = plane[first * TILE : last * TILE]
                strip = rows.new_zeros((last - first) * TILE, grid.kv_tiles * TILE, dtype=torch.bool)
                strip[: rows.shape[0], : grid.kv_len] = rows != 0
                tiles = strip.view(last - first, TILE, grid.kv_tiles, TILE).transpose(1, 2)
                words = pack_bits(tiles)
                q_tile = torch.arange(first, last, device=grid.device)[:, None].expand(words.shape[:2])
                found = kind_of_words(words.flatten(0, 1), q_tile.flatten(), grid)
                kinds[b, h, first:last] = found.view(words.shape[:2])
                kept.append(words.flatten(0, 1)[found == PARTIAL])
    return kinds, torch.cat(kept) if kept else no_words(grid)


def no_words(grid: TileGrid) -> Words:
    """Words of no tile."""
    return torch.zeros(0, TILE, WORDS, dtype=torch.int32, device=grid.device)


def kind_of_words(words: Words, q_tile: Tensor, grid: TileGrid) -> Tensor:
    """int8 `[n]`: kind of each tile `[n, 128, 4]`; rows beyond q_len count for neither empty nor full."""
    row = q_tile[:, None] * TILE + torch.arange(TILE, device=words.device)
    full = ((words == -1).all(-1) | (row >= grid.q_len)).all(-1)
    empty = (words == 0).flatten(1).all(-1)
    return PARTIAL + full.to(torch.int8) - empty.to(torch.int8)


def lists_from_tiles(kinds: TileKinds, words: Words, grid: TileGrid) -> BlockMask:
    """The `BlockMask` of tile kinds and of the words of the partial tiles in row order."""
    number = torch.full(kinds.shape, -1, dtype=torch.int64, device=kinds.device)
    number[kinds == PARTIAL] = torch.arange(words.shape[0], device=words.device)
    swapped = kinds.transpose(-1, -2)
    by_column = number.transpose(-1, -2)[swapped == PARTIAL]
    both = words.new_empty(2, *words.shape)
    both[0] = words
    for n, found in zip(by_column.split(CHUNK_TILES), both[1].split(CHUNK_TILES), strict=True):
        found.copy_(transpose_bits(words[n]))
    rows, cols = _lists(kinds, both[0], grid.q_len), _lists(swapped, both[1], grid.kv_len)
    return BlockMask.of_views(grid.q_len, grid.kv_len, rows, cols, both)


def _lists(kinds: Tensor, words: Words, length: int) -> TileLists:
    batch, heads, tile_rows, _ = kinds.shape
    found = {}
    for kind in (FULL, PARTIAL):
        hit = kinds == kind
        offsets = torch.zeros(batch * heads * tile_rows + 1, dtype=torch.int32, device=kinds.device)
        offsets[1:] = hit.sum(-1).flatten().cumsum(0)
        found[kind] = offsets, hit.nonzero()[:, 3].to(torch.int32)
    order = (kinds != EMPTY).sum(-1).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    lists = TileLists(*found[FULL], *found[PARTIAL], words, order, words.new_zeros(0, dtype=torch.uint8))
    # a position has a pair if its row of tiles has a full one, or a bit of a partial one is set
    count = (kinds == FULL).any(-1).view(-1, 1).expand(-1, TILE).to(torch.int32).contiguous()
    count.index_add_(0, lists.tile_row_numbers(PARTIAL), (words != 0).any(-1).to(torch.int32))
    has_pair = (count.view(batch, heads, tile_rows * TILE)[..., :length] != 0).to(torch.uint8)
    return lists if bool(has_pair.all()) else replace(lists, has_pair=has_pair.flatten())
