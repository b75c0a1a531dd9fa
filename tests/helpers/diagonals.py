"""Runs of the gradient of a table by distance, as the Hopper backward kernel writes them, of a dense ds."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymask import BlockMask, causal, pack
from anymask.backends.hopper import diagonals
from anymask.scores import Needs
from anymask.tiles import TILE, tiles_over

ALL = Needs((), (True,), False)
Q_LEN, KV_LEN = 300, 400


def masks() -> dict[str, BlockMask]:
    """Masks of 2 samples and 3 heads by what shares a plane, with full, partial and empty tiles."""
    tiles = torch.rand(2, 3, 3, 4).repeat_interleave(128, 2).repeat_interleave(128, 3)[..., :Q_LEN, :KV_LEN]
    dense = (tiles > 0.5) | (tiles > 0.2) & (torch.rand(2, 3, Q_LEN, KV_LEN) < 0.5)
    return {
        "causal": pack(causal(), q_len=Q_LEN, kv_len=KV_LEN),
        "all": pack(dense),
        "samples": pack(dense[:, :1]),
        "heads": pack(dense[:1]),
        "nothing": pack(torch.zeros(Q_LEN, KV_LEN, dtype=torch.bool)),
    }


def run_of(ds: Tensor) -> Tensor:
    """`[128]`: sums of `ds [64 keys, 64 queries]` by `key - query + 64`."""
    apart = torch.arange(64)[:, None] - torch.arange(64) + 64
    return ds.new_zeros(128).index_add_(0, apart.flatten(), ds.flatten())


def runs_of(ds: Tensor, mask: BlockMask | None) -> diagonals.Runs:
    """The runs of `ds [batch, q_heads, q_len, kv_len]`, NaN where the kernel writes none."""
    batch, q_heads, q_len, kv_len = ds.shape
    runs = diagonals.empty_runs(ALL, ds[..., 0], kv_len, mask)
    assert runs is not None
    found = runs.sums.fill_(torch.nan).view(-1, 2, 2, 128)
    padded = pad(ds, (0, -kv_len % TILE, 0, -q_len % TILE))
    for b in range(batch):
        for h in range(q_heads):
            is_shared = (True, True) if mask is None else (mask.batch == 1, mask.heads == 1)
            copy = {(True, True): b * q_heads + h, (True, False): b, (False, True): h, (False, False): 0}[is_shared]
            for at, i, j in _tiles(mask, b, h, q_len, kv_len):
                for half in range(4):
                    q, k = i * TILE + half // 2 * 64, j * TILE + half % 2 * 64
                    block = padded[b, h, q : q + 64, k : k + 64]
                    found[copy * runs.n_tiles + at, half // 2, half % 2] = run_of(block.mT.contiguous())
    return runs


def _tiles(mask: BlockMask | None, b: int, h: int, q_len: int, kv_len: int) -> list[tuple[int, int, int]]:
    """`(number, query tile, kv tile)` of the tiles of a head: by columns, partial ones first."""
    q_tiles, kv_tiles = tiles_over(q_len), tiles_over(kv_len)
    if mask is None:
        return [(j * q_tiles + i, i, j) for j in range(kv_tiles) for i in range(q_tiles)]
    cols, found = mask.cols, []
    plane = b % mask.batch * mask.heads + h % mask.heads
    for j in range(kv_tiles):
        column = plane * kv_tiles + j
        full = cols.full_tiles[cols.full_offsets[column] : cols.full_offsets[column + 1]].tolist()
        partial = cols.partial_tiles[cols.partial_offsets[column] : cols.partial_offsets[column + 1]].tolist()
        first = int(cols.full_offsets[column] + cols.partial_offsets[column])
        found += [(first + n, i, j) for n, i in enumerate(partial + full)]
    return found
