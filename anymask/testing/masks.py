"""Masks by name: every builder, compositions, broadcasts and the shapes that break attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anymask.mask import (
    Mask,
    causal,
    causal_lower_right,
    dilated,
    document,
    from_dense,
    global_tokens,
    key_padding,
    prefix_lm,
    sliding_window,
)

NamedMask = tuple[Mask | Tensor | None, Tensor]

# name -> function(batch, q_heads, q_len, kv_len, seed=0, device="cpu") -> (the mask as a user passes it, the same as a
# bool tensor broadcastable to [batch, q_heads, q_len, kv_len])
MASKS: dict[str, Callable[..., NamedMask]] = {}


class Sizes(NamedTuple):
    """What a named mask is made for, its positions, and its random numbers, the same on every device."""

    batch: int
    q_heads: int
    q_len: int
    kv_len: int
    device: torch.device
    generator: torch.Generator

    @property
    def i(self) -> Tensor:
        """Positions of the queries, `[q_len, 1]`."""
        return torch.arange(self.q_len, device=self.device)[:, None]

    @property
    def j(self) -> Tensor:
        """Positions of the keys, `[1, kv_len]`."""
        return torch.arange(self.kv_len, device=self.device)[None, :]

    @property
    def longest(self) -> int:
        """The longer of both lengths."""
        return max(self.q_len, self.kv_len)

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), the same on every device."""
        return torch.rand(shape, generator=self.generator).to(self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Of 0 to `high - 1`."""
        return torch.randint(max(high, 1), shape, generator=self.generator).to(self.device)

    def number(self, low: int, high: int) -> int:
        """One of `low` to `high`."""
        return low + int(torch.randint(max(high - low + 1, 1), (), generator=self.generator))

    def labels(self, count: int, *lead: int) -> Tensor:
        """int64 `[*lead, longest]`: ascending labels of at most `count` runs of random lengths, such as documents."""
        cuts = self.randint(self.longest, *lead, count - 1)
        return (torch.arange(self.longest, device=self.device)[:, None] >= cuts[..., None, :]).sum(-1)

    def zeros(self, *shape: int) -> Tensor:
        """All False."""
        return torch.zeros(shape, dtype=torch.bool, device=self.device)


def register(table: dict[str, Callable[..., NamedMask]], make: Callable[[Sizes], Tensor | NamedMask]) -> None:
    """Put `make` into a table of masks under its name."""

    def named(
        batch: int, q_heads: int, q_len: int, kv_len: int, seed: int = 0, device: torch.device | str = "cpu"
    ) -> NamedMask:
        generator = torch.Generator().manual_seed(seed)
        made = make(Sizes(batch, q_heads, q_len, kv_len, torch.device(device), generator))
        return (made, made) if isinstance(made, Tensor) else made

    table[make.__name__.strip("_")] = named


def _mask(make: Callable[[Sizes], Tensor | NamedMask]) -> Callable[[Sizes], Tensor | NamedMask]:
    register(MASKS, make)
    return make


@_mask
def _none(m: Sizes) -> NamedMask:
    return None, ~m.zeros(1, 1)


@_mask
def _causal(m: Sizes) -> NamedMask:
    return causal(), m.j <= m.i


@_mask
def _causal_dense(m: Sizes) -> Tensor:
    return m.j <= m.i


@_mask
def _causal_offset(m: Sizes) -> NamedMask:
    return causal(offset=37), m.j <= m.i + 37


@_mask
def _causal_behind(m: Sizes) -> NamedMask:
    # the first 5 queries see nothing
    return causal(offset=-5), m.j <= m.i - 5


@_mask
def _causal_lower_right(m: Sizes) -> NamedMask:
    return causal_lower_right(), m.j <= m.i + m.kv_len - m.q_len


@_mask
def _window(m: Sizes) -> NamedMask:
    return sliding_window(20), (m.j <= m.i) & (m.j >= m.i - 20)


@_mask
def _window_both(m: Sizes) -> NamedMask:
    return sliding_window(150, 3), (m.j <= m.i + 3) & (m.j >= m.i - 150)


@_mask
def _composed_and(m: Sizes) -> NamedMask:
    dense = m.rand(m.q_len, m.kv_len) < 0.7
    return causal() & from_dense(dense), (m.j <= m.i) & dense


@_mask
def _composed_or(m: Sizes) -> NamedMask:
    dense = m.rand(m.batch, 1, 1, m.kv_len) < 0.1
    return sliding_window(9, 9) | from_dense(dense), ((m.j - m.i).abs() <= 9) | dense


@_mask
def _composed_not(m: Sizes) -> NamedMask:
    return ~sliding_window(40, 40), (m.j - m.i).abs() > 40


@_mask
def _composed_deep(m: Sizes) -> NamedMask:
    dense = m.rand(1, m.q_heads, m.q_len, m.kv_len) < 0.2
    mask = (causal(offset=3) & ~sliding_window(60)) | (from_dense(dense) & ~causal_lower_right())
    window = (m.j <= m.i) & (m.j >= m.i - 60)
    return mask, ((m.j <= m.i + 3) & ~window) | (dense & (m.j > m.i + m.kv_len - m.q_len))


@_mask
def _random(m: Sizes) -> Tensor:
    return m.rand(m.q_len, m.kv_len) < 0.5


@_mask
def _random_1(m: Sizes) -> Tensor:
    return m.rand(m.q_len, m.kv_len) < 0.01


@_mask
def _random_99(m: Sizes) -> Tensor:
    return m.rand(m.q_len, m.kv_len) < 0.99


@_mask
def _per_batch(m: Sizes) -> Tensor:
    return m.rand(m.batch, 1, m.q_len, m.kv_len) < 0.5


@_mask
def _per_head(m: Sizes) -> Tensor:
    # three dimensions: the batch is missing
    return m.rand(m.q_heads, m.q_len, m.kv_len) < 0.5


@_mask
def _per_batch_head(m: Sizes) -> Tensor:
    return m.rand(m.batch, m.q_heads, m.q_len, m.kv_len) < m.rand(m.batch, m.q_heads, 1, 1)


@_mask
def _expanded_heads(m: Sizes) -> Tensor:
    return (m.rand(m.batch, 1, m.q_len, m.kv_len) < 0.4).expand(-1, m.q_heads, -1, -1)


@_mask
def _expanded_batch(m: Sizes) -> Tensor:
    return (m.rand(1, m.q_heads, m.q_len, m.kv_len) < 0.4).expand(m.batch, -1, -1, -1)


@_mask
def _row(m: Sizes) -> Tensor:
    return m.rand(1, m.kv_len) < 0.5


@_mask
def _column(m: Sizes) -> Tensor:
    return m.rand(m.q_len, 1) < 0.5


@_mask
def _tiles(m: Sizes) -> Tensor:
    """Whole 128 x 128 tiles, half of them, by head."""
    return _by_tile(m, m.rand(1, m.q_heads, m.q_len // 128 + 1, m.kv_len // 128 + 1) < 0.5)


@_mask
def _tiles_random(m: Sizes) -> Tensor:
    return _by_tile(m, m.rand(1, 1, m.q_len // 128 + 1, m.kv_len // 128 + 1) < 0.5) & (m.rand(m.q_len, m.kv_len) < 0.5)


def _by_tile(m: Sizes, chosen: Tensor) -> Tensor:
    wide = chosen.repeat_interleave(128, -1)[..., : m.kv_len]
    return wide.repeat_interleave(128, -2)[..., : m.q_len, :]


@_mask
def _documents(m: Sizes) -> NamedMask:
    ids = m.labels(6, m.batch)
    mask = causal() & document(ids[:, : m.q_len], kv_ids=ids[:, : m.kv_len])
    return mask, (ids[:, None, : m.q_len, None] == ids[:, None, None, : m.kv_len]) & (m.j <= m.i)


@_mask
def _documents_bidirectional(m: Sizes) -> NamedMask:
    ids = m.labels(4)
    return document(ids[: m.q_len], kv_ids=ids[: m.kv_len]), ids[: m.q_len, None] == ids[None, : m.kv_len]


@_mask
def _prefix_lm(m: Sizes) -> NamedMask:
    prefix_len = m.randint(m.kv_len, m.batch)
    return prefix_lm(prefix_len), (m.j <= m.i) | (m.j < prefix_len[:, None, None, None])


@_mask
def _empty_rows(m: Sizes) -> Tensor:
    return (m.rand(m.q_len, m.kv_len) < 0.5) & (m.rand(m.batch, 1, m.q_len, 1) < 0.7)


@_mask
def _empty_columns(m: Sizes) -> Tensor:
    return (m.rand(m.q_len, m.kv_len) < 0.5) & (m.rand(1, m.q_heads, 1, m.kv_len) < 0.7)


@_mask
def _key_padding(m: Sizes) -> NamedMask:
    lengths = m.randint(m.kv_len, m.batch) + 1
    return key_padding(lengths), m.j < lengths[:, None, None, None]


@_mask
def _causal_key_padding(m: Sizes) -> NamedMask:
    # padding on the left, so that the first queries have no key
    padding = m.j >= m.randint(m.kv_len, m.batch, 1, 1, 1)
    return causal() & from_dense(padding), (m.j <= m.i) & padding


@_mask
def _all_empty(m: Sizes) -> Tensor:
    return m.zeros(m.q_len, m.kv_len)


@_mask
def _all_full(m: Sizes) -> Tensor:
    return ~m.zeros(m.q_len, m.kv_len)


@_mask
def _one_pair(m: Sizes) -> Tensor:
    return (m.i == m.q_len // 3) & (m.j == 2 * m.kv_len // 3)


@_mask
def _one_missing(m: Sizes) -> Tensor:
    return ~((m.i == m.q_len // 3) & (m.j == 2 * m.kv_len // 3))


@_mask
def _empty_sample(m: Sizes) -> Tensor:
    dense = m.rand(m.batch, 1, m.q_len, m.kv_len) < 0.5
    dense[m.batch // 2] = False
    return dense


@_mask
def _empty_head(m: Sizes) -> Tensor:
    dense = m.rand(1, m.q_heads, m.q_len, m.kv_len) < 0.5
    dense[:, m.q_heads // 2] = False
    return dense


@_mask
def _transposed(m: Sizes) -> Tensor:
    return (m.rand(m.batch, 1, m.kv_len, m.q_len) < 0.5).mT


@_mask
def _strided(m: Sizes) -> Tensor:
    """Every second query and every third key of a larger mask, heads outermost in memory."""
    return (m.rand(m.q_heads, m.batch, 2 * m.q_len, 3 * m.kv_len) < 0.5)[..., ::2, ::3].transpose(0, 1)


@_mask
def _tree(m: Sizes) -> Tensor:
    """Each token sees itself and its ancestors in a random tree, as in speculative decoding."""
    ancestors = torch.eye(m.longest, dtype=torch.bool)
    parents = (torch.rand(m.longest, generator=m.generator) * torch.arange(m.longest)).long().tolist()
    for token in range(1, m.longest):
        ancestors[token] |= ancestors[parents[token]]
    return ancestors[: m.q_len, : m.kv_len].to(m.device)


@_mask
def _block_diffusion(m: Sizes) -> Tensor:
    """A noisy half and a clean half in blocks of 16: a noisy block sees itself and the clean blocks before it."""
    half = m.longest // 2
    i_clean, j_clean = m.i >= half, m.j >= half
    i_block, j_block = (m.i - half * i_clean) // 16, (m.j - half * j_clean) // 16
    noisy = (~i_clean & ~j_clean & (i_block == j_block)) | (~i_clean & j_clean & (j_block < i_block))
    return noisy | (i_clean & j_clean & (j_block <= i_block))


@_mask
def _global_window(m: Sizes) -> NamedMask:
    near = (m.i - m.j).abs() <= 16
    return sliding_window(16, 16) | global_tokens(4), near | (m.j < 4) | (m.i < 4)


@_mask
def _dilated(m: Sizes) -> NamedMask:
    return dilated(7, 40), ((m.i - m.j) % 7 == 0) & (m.j <= m.i) & (m.i - m.j <= 280)


@_mask
def _checkerboard(m: Sizes) -> Tensor:
    return (m.i + m.j) % 2 == 0


@_mask
def _diagonal(m: Sizes) -> Tensor:
    return m.i == m.j
