"""How many heads are swizzled together: which work tiles run at the same time, and so share the L2 cache.

`decode_work_tile` of the scheduler says in which order the work tiles of such a block of heads come.
"""

from functools import lru_cache

import torch

# up to so many tiles a row or column, on average, work tiles do not meet in the L2 cache unless their heads do
SHORT_LIST = 9
# what a work tile takes beyond its tiles, in tiles
WORK_TILE = 2.0
# waves of work tiles by which blocks of heads are compared, and what each wave at work at a time costs
WAVES, WAVE_COST = 16, 0.02


def swizzle_heads(mean_tiles: int | None, tiles: int, heads: int, num_workers: int) -> int:
    """How many heads are swizzled together, of `tiles` work tiles each, with `mean_tiles` tiles on average.

    Without a mask (None) one: all work tiles are equal. With long lists so many that their work tiles are about four
    waves, and an odd number of such blocks: with an even one, what each leaves uneven adds up. With short ones as few
    as are even, up to two waves (docs/journal.md, E29).
    """
    if mean_tiles is None:
        return 1
    if mean_tiles <= SHORT_LIST:
        return _few_heads(mean_tiles, tiles, heads, num_workers)
    blocks = max(1, tiles * heads // (4 * num_workers))
    return -(-heads // (blocks - (blocks % 2 == 0)))


@lru_cache(maxsize=4096)
def _few_heads(mean_tiles: int, tiles: int, heads: int, num_workers: int) -> int:
    """The block of heads of the least cost: the load of the busiest worker over the mean, and the waves at work."""
    most = min(heads, max(1, 2 * num_workers // tiles))
    together: list[int] = sorted({*range(1, min(8, most) + 1), *(max(1, most * n // 4) for n in (1, 2, 3, 4))})
    imbalance, spread = _loads(mean_tiles, tiles, heads, num_workers, together)
    waves = spread + torch.tensor(together, device="cpu") * tiles / num_workers
    return together[int((imbalance + WAVE_COST * waves).argmin())]


def _loads(
    mean_tiles: int, tiles: int, heads: int, num_workers: int, together: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each size of a block of heads, of two kinds of lists the worse: the largest load over the mean, and by how
    many work tiles workers are apart, on average.

    Lists fall from rank to rank, as under a causal mask, or all but the last ones have the same length, as in a window.
    """
    heads = max(1, min(heads, WAVES * num_workers // tiles))
    n, rank = tiles * heads, torch.arange(tiles, device="cpu")
    falling = 2 * mean_tiles * (1 - (rank + 0.5) / tiles)
    load = torch.stack([falling, (tiles - rank).clamp(max=mean_tiles)]) + WORK_TILE
    size, work = torch.tensor(together, device="cpu")[:, None], torch.arange(n, device="cpu")
    # as `decode_work_tile`
    first_head = work // (size * tiles) * size
    heads_left = heads - first_head
    rank = (work - first_head * tiles) // torch.minimum(size, heads_left)
    rank = torch.where((heads_left - 1) // size % 2 == 0, rank, tiles - 1 - rank)
    # as `work_index`: [kind of lists, size, wave, worker]
    waves = torch.nn.functional.pad(load[:, rank], (0, -n % num_workers)).view(2, len(together), -1, num_workers)
    waves[:, :, 1::2] = waves[:, :, 1::2].flip(3)
    done = waves.cumsum(2)
    imbalance = done[:, :, -1].amax(2) / done[:, :, -1].mean(2)
    spread = (done.amax(3) - done.amin(3)).mean(2) / load.mean(1, keepdim=True)
    return imbalance.amax(0), spread.amax(0)
