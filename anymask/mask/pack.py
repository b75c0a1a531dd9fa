"""`pack`: from what a mask means to what kernels read. This file is the definition; triton_pack.py is its device twin.

Two stages. `tile_words` finds the kind of every tile and the words of the partial ones; `lists_from_tiles` sorts them
into the row and column lists of a `BlockMask`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from anymask.mask.bits import EMPTY, FULL, PARTIAL, TILE, WORDS, pack_bits, tiles_over, transpose_bits
from anymask.mask.block_mask import BlockMask, TileLists
from anymask.mask.builders import from_dense
from anymask.mask.expr import Grid, Mask
from anymask.mask.leaves import Dense
from anymask.shapes import TileBits, TileKinds, Words

# tiles evaluated at a time: 16 MiB of booleans, and as int64 the positions they are computed from, 128 MiB
CHUNK_TILES = 1024
# on a GPU, where chunks are fewer and so launches: twice as much
CUDA_CHUNK_TILES = 2048
# tiles evaluated before the words of the partial ones are picked out, which a GPU waits for: 64 MiB of words
GROUP_TILES = 2**15
# tiles classified at a time, from bounds of 8 bytes: 16 MiB each
STRIP_TILES = 2**21


def pack(
    mask: Mask | Tensor,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    device: torch.device | str | None = None,
) -> BlockMask:
    """The `BlockMask` of a mask. Pack once, use it in every layer and in the backward pass.

    Args:
        mask: a `Mask`, or a bool tensor broadcastable to `[batch, q_heads, q_len, kv_len]`. A tensor is read once;
            expanded (stride-0) dimensions are neither copied nor stored more than once.
        q_len, kv_len: lengths in tokens; for a tensor they default to its last two dimensions.
        device: where the result lives; defaults to the tensor's device, else the CPU.

    Returns:
        A `BlockMask` of 1 bit per pair of each partial tile, twice (by rows and by columns), plus lists of tiles.
        Temporary memory: one byte per tile, and a bounded chunk on the CPU and for functions, or on a GPU two bits per
        pair of a dense tensor.
        On a GPU it synchronises with the host once, for a function more often. There the first mask of each structure,
        whatever its numbers and tensors, compiles two kernels.

    Raises:
        ValueError: dtype, rank or shape of a tensor that cannot be a mask of these lengths. TypeError: no mask at all.
    """
    if not isinstance(mask, Mask):
        mask = from_dense(mask)
    if isinstance(mask, Dense):
        q_len = mask.tensor.shape[-2] if q_len is None else q_len
        kv_len = mask.tensor.shape[-1] if kv_len is None else kv_len
        device = mask.tensor.device if device is None else device
    for name, value in (("q_len", q_len), ("kv_len", kv_len)):
        if value is None:
            raise ValueError(f"{name} is None; a {type(mask).__name__} mask has no length, pass {name}=...")
        if value < 0:
            raise ValueError(f"{name} is {value}; allowed are 0 and more tokens")
    assert q_len is not None
    assert kv_len is not None
    mask.check(q_len, kv_len)
    place = torch.device(device or "cpu")
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    grid = Grid(q_len, kv_len, place)
    if place.type == "cuda":
        from anymask.mask import triton_pack

        if isinstance(mask, Dense):
            return triton_pack.pack_dense(mask.tensor.to(place), q_len, kv_len)
        packed = triton_pack.pack_expression(mask, grid)
        if packed is not None:
            return packed
    return _lists_of(*tile_words(mask.to(place), grid), grid)


def tile_words(mask: Mask, grid: Grid, known: BlockMask | None = None) -> tuple[TileKinds, Words]:
    """Kinds of all tiles, and the words of the partial ones in row order (plane, query tile, kv tile).

    Tiles that lie whole in `known`, the same mask of a smaller plane, are taken from it.
    """
    if isinstance(mask, Dense) and known is None:
        return _tile_words_dense(mask.tensor, grid)
    batch, heads = mask.planes
    kinds = torch.empty(batch, heads, grid.q_tiles, grid.kv_tiles, dtype=torch.int8, device=grid.device)
    lines = max(1, STRIP_TILES // max(1, batch * heads * grid.kv_tiles))
    for first in range(0, grid.q_tiles, lines):
        last = min(first + lines, grid.q_tiles)
        kinds[:, :, first:last] = mask.classify(replace(grid, first=first, last=last))
    if grid.kv_len % TILE:
        # the columns beyond kv_len are off, so the last kv tile is full for nobody
        kinds[..., -1].clamp_(max=PARTIAL)
    unknown = kinds == PARTIAL
    if known is not None:
        old, number = tile_tables(known, 0, tiles_over(known.q_len))
        whole = ..., slice(known.q_len // TILE), slice(known.kv_len // TILE)
        kinds[whole] = old[whole]
        unknown[whole] = False
        taken = number[whole][kinds[whole] == PARTIAL]
    within = torch.arange(TILE, device=grid.device)
    unknown = unknown.nonzero()
    kept = []
    size = CUDA_CHUNK_TILES if grid.device.type == "cuda" else CHUNK_TILES
    for group in unknown.split(GROUP_TILES):
        words = torch.empty(len(group), TILE, WORDS, dtype=torch.int32, device=grid.device)
        found = torch.empty(len(group), dtype=torch.int8, device=grid.device)
        for chunk, *results in zip(group.split(size), words.split(size), found.split(size), strict=True):
            b, h, q_tile, kv_tile = chunk[:, :, None, None].unbind(1)
            q = (q_tile * TILE + within[:, None]).clamp_(max=grid.q_len - 1)
            k = (kv_tile * TILE + within).clamp_(max=grid.kv_len - 1)
            bits = mask.evaluate(grid, b, h, q, k).expand(len(chunk), TILE, TILE)
            _words_of_tiles(bits, chunk, grid, *results)
        kinds[tuple(group.unbind(1))] = found
        kept.append(words[found == PARTIAL])
    words = torch.cat(kept) if kept else _no_words(grid)
    if known is not None:
        place = torch.full(kinds.shape, -1, dtype=torch.int64, device=grid.device)
        place[whole][kinds[whole] == PARTIAL] = taken
        # what is not taken is new, in the same order
        new = (kinds == PARTIAL) & (place < 0)
        place[new] = known.rows.words.shape[0] + torch.arange(words.shape[0], device=grid.device)
        words = torch.cat([known.rows.words, words])[place[kinds == PARTIAL]]
    return kinds, words


def _words_of_tiles(tiles: TileBits, places: Tensor, grid: Grid, words: Words, kinds: Tensor) -> None:
    """Write the words and the kinds of tiles at `places [n, 4]`: plane batch, plane head, q tile, kv tile."""
    if grid.device.type == "cuda":
        from anymask.mask import triton_pack

        triton_pack.words_of_tiles(tiles, places, grid, words, kinds)
        return
    within = torch.arange(TILE, device=grid.device)
    q, k = (places[:, 2:, None] * TILE + within).unbind(1)
    inside = (q < grid.q_len)[:, :, None] & (k < grid.kv_len)[:, None, :]
    words.copy_(pack_bits(tiles & inside))
    kinds.copy_(kind_of_words(words, places[:, 2], grid))


def grown(block_mask: BlockMask, mask: Mask, q_len: int, kv_len: int) -> BlockMask:
    """`BlockMask.grown`."""
    for name, old, new in (("q_len", block_mask.q_len, q_len), ("kv_len", block_mask.kv_len, kv_len)):
        if new < old:
            raise ValueError(f"{name} is {new} but the mask has {old} already; allowed are {old} and more")
    planes = block_mask.batch, block_mask.heads
    if mask.planes != planes:
        raise ValueError(f"mask has {mask.planes} planes but the packed one has {planes}; allowed is the same mask")
    if not mask.grows:
        raise ValueError("mask counts from the last query and key, which move; pack it again")
    mask = mask.to(block_mask.device)
    mask.check(q_len, kv_len)
    grid = Grid(q_len, kv_len, block_mask.device)
    return _lists_of(*tile_words(mask, grid, block_mask), grid)


def tile_tables(block_mask: BlockMask, first: int, lines: int) -> tuple[TileKinds, Tensor]:
    """Kinds, int8, and places in `rows.words`, int64, of the tiles of `lines` lines: `[batch, heads, lines, kv_tiles]`.

    Lines are q tiles from `first` on, past the end empty; a tile that is not partial has place 0.
    """
    rows, q_tiles = block_mask.rows, tiles_over(block_mask.q_len)
    shape = (block_mask.batch, block_mask.heads, lines, tiles_over(block_mask.kv_len))
    kinds = torch.full(shape, EMPTY, dtype=torch.int8, device=block_mask.device)
    number = torch.zeros(shape, dtype=torch.int64, device=block_mask.device)
    planes = shape[0] * shape[1]
    for kind, tiles in ((FULL, rows.full_tiles), (PARTIAL, rows.partial_tiles)):
        line = rows.line_numbers(kind)
        plane, line = line // max(1, q_tiles), line % max(1, q_tiles) - first
        inside = ((line >= 0) & (line < lines)).nonzero()[:, 0]
        at = plane[inside], line[inside], tiles[inside].long()
        kinds.view(planes, lines, shape[3])[at] = kind
        if kind == PARTIAL:
            number.view(planes, lines, shape[3])[at] = inside
    return kinds, number


def _tile_words_dense(tensor: Tensor, grid: Grid) -> tuple[TileKinds, Words]:
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
    return kinds, torch.cat(kept) if kept else _no_words(grid)


def queries_of(block_mask: BlockMask, start: int, stop: int) -> BlockMask:
    """`BlockMask.queries`: rows of words move as they are, from the one or two tiles that a new tile covers."""
    if not 0 <= start <= stop <= block_mask.q_len:
        q_len = block_mask.q_len
        raise ValueError(
            f"queries {start} to {stop} of a mask with q_len={q_len}; allowed are 0 <= start <= stop <= q_len"
        )
    rows, shift = block_mask.rows, start % TILE
    grid = Grid(stop - start, block_mask.kv_len, block_mask.device)
    # the old tiles that are covered, and one line below them
    kinds, number = (t.flatten(0, 1) for t in tile_tables(block_mask, start // TILE, grid.q_tiles + 1))
    found = torch.full((kinds.shape[0], grid.q_tiles, grid.kv_tiles), EMPTY, dtype=torch.int8, device=grid.device)
    touched = (torch.maximum(kinds[:, :-1], kinds[:, 1:]) != EMPTY).nonzero()
    kept, row = [], torch.arange(TILE, device=grid.device)
    for chunk in touched.split(CHUNK_TILES):
        plane, line, tile = chunk.unbind(1)
        halves = []
        for below in (0, 1):
            old = kinds[plane, line + below, tile][:, None, None]
            bits = (
                rows.words[number[plane, line + below, tile]] if rows.words.shape[0] else old.new_zeros(1, 1, 1).int()
            )
            halves.append(torch.where(old == PARTIAL, bits, -(old == FULL).to(torch.int32)).expand(-1, TILE, WORDS))
        words = torch.cat([halves[0][:, shift:], halves[1][:, :shift]], 1)
        words = torch.where((line[:, None] * TILE + row < grid.q_len)[..., None], words, 0)
        new = kind_of_words(words, line, grid)
        found[plane, line, tile] = new
        kept.append(words[new == PARTIAL])
    words = torch.cat(kept) if kept else _no_words(grid)
    return _lists_of(found.view(block_mask.batch, block_mask.heads, grid.q_tiles, grid.kv_tiles), words, grid)


def _lists_of(kinds: TileKinds, words: Words, grid: Grid) -> BlockMask:
    """`lists_from_tiles` where the tiles are."""
    if grid.device.type == "cuda":
        from anymask.mask import triton_pack

        return triton_pack.lists_from_tiles(kinds, words, grid)
    return lists_from_tiles(kinds, words, grid)


def _no_words(grid: Grid) -> Words:
    return torch.zeros(0, TILE, WORDS, dtype=torch.int32, device=grid.device)


def kind_of_words(words: Words, q_tile: Tensor, grid: Grid) -> Tensor:
    """int8 `[n]`: kind of each tile `[n, 128, 4]`; rows beyond q_len count for neither empty nor full."""
    row = q_tile[:, None] * TILE + torch.arange(TILE, device=words.device)
    full = ((words == -1).all(-1) | (row >= grid.q_len)).all(-1)
    empty = (words == 0).flatten(1).all(-1)
    return PARTIAL + full.to(torch.int8) - empty.to(torch.int8)


def lists_from_tiles(kinds: TileKinds, words: Words, grid: Grid) -> BlockMask:
    """The `BlockMask` of tile kinds and of the words of the partial tiles in row order."""
    rows = _lists(kinds, words, grid.q_len)
    number = torch.full(kinds.shape, -1, dtype=torch.int64, device=kinds.device)
    number[kinds == PARTIAL] = torch.arange(words.shape[0], device=words.device)
    swapped = kinds.transpose(-1, -2)
    by_column = number.transpose(-1, -2)[swapped == PARTIAL]
    words_t = [transpose_bits(words[n]) for n in by_column.split(CHUNK_TILES)]
    cols = _lists(swapped, torch.cat(words_t) if words_t else words.clone(), grid.kv_len)
    return BlockMask(grid.q_len, grid.kv_len, rows, cols)


def _lists(kinds: Tensor, words: Words, length: int) -> TileLists:
    batch, heads, lines, _ = kinds.shape
    found = {}
    for kind in (FULL, PARTIAL):
        hit = kinds == kind
        offsets = torch.zeros(batch * heads * lines + 1, dtype=torch.int32, device=kinds.device)
        offsets[1:] = hit.sum(-1).flatten().cumsum(0)
        found[kind] = offsets, hit.nonzero()[:, 3].to(torch.int32)
    order = (kinds != EMPTY).sum(-1).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    lists = TileLists(*found[FULL], *found[PARTIAL], words, order, words.new_zeros(0, dtype=torch.uint8))
    # a position lives in a full tile of its line, or by a bit in a partial one
    count = (kinds == FULL).any(-1).view(-1, 1).expand(-1, TILE).to(torch.int32).contiguous()
    count.index_add_(0, lists.line_numbers(PARTIAL), (words != 0).any(-1).to(torch.int32))
    live = (count.view(batch, heads, lines * TILE)[..., :length] != 0).to(torch.uint8)
    return lists if bool(live.all()) else replace(lists, live=live.flatten())
