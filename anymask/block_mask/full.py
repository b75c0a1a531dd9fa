"""The lists of a mask of every pair, by counting."""

import torch
from torch import Tensor

from anymask.block_mask.bits import pack_bits
from anymask.block_mask.tile_lists import TileLists
from anymask.tiles import TILE, tiles_over

CPU = torch.device("cpu")


def full_lists(q_len: int, kv_len: int, planes: tuple[int, int]) -> tuple[TileLists, TileLists]:
    """Both views, on the CPU: every tile is full, but for the last column if `kv_len` ends inside it."""
    q_tiles, whole, tail = tiles_over(q_len), kv_len // TILE, kv_len % TILE
    # partial columns, 0 or 1
    n = int(tail > 0)
    bits = (torch.arange(TILE, device=CPU) < tail).repeat(q_tiles * n, TILE, 1)
    if n and q_len % TILE:
        bits[-1, q_len % TILE :] = False
    columns, tile_rows = torch.arange(whole, device=CPU), torch.arange(q_tiles, device=CPU)
    rows = _lists(
        (q_len, kv_len),
        planes,
        ([whole] * q_tiles, columns.repeat(q_tiles)),
        ([n] * q_tiles, torch.full((q_tiles * n,), whole, device=CPU)),
        bits,
    )
    cols = _lists(
        (kv_len, q_len),
        planes,
        ([q_tiles] * whole + [0] * n, tile_rows.repeat(whole)),
        ([0] * whole + [q_tiles] * n, tile_rows.repeat(n)),
        bits.mT,
    )
    return rows, cols


def _lists(
    lengths: tuple[int, int],
    planes: tuple[int, int],
    full: tuple[list[int], Tensor],
    partial: tuple[list[int], Tensor],
    bits: Tensor,
) -> TileLists:
    """A view of planes that are alike. Of one: how many tiles each row has, which, and bits of the partial ones."""
    count, tile_rows = planes[0] * planes[1], tiles_over(lengths[0])
    order = torch.arange(tile_rows, dtype=torch.int32, device=CPU).repeat(*planes, 1)
    # without a position on the other side no position here has a pair
    has_pair = torch.zeros(0 if lengths[1] else count * lengths[0], dtype=torch.uint8, device=CPU)
    words = pack_bits(bits).repeat(count, 1, 1)
    return TileLists(*_repeated(*full, count), *_repeated(*partial, count), words, order, has_pair)


def _repeated(counts: list[int], tiles: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Offsets and tiles of all planes."""
    offsets = torch.zeros(planes * len(counts) + 1, dtype=torch.int32, device=CPU)
    offsets[1:] = torch.tensor(counts, dtype=torch.int64, device=CPU).repeat(planes).cumsum(0)
    return offsets, tiles.to(torch.int32).repeat(planes)
