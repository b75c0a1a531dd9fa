"""Which pairs dropout keeps: a pure function of (seed, offset, sample, head, query, key), by a counter-based generator.

Philox-4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011: the fewest
that pass BigCrush). One call serves 8 pairs: queries `q, q + 8` and keys `k, k + 1, k + 8, k + 9`, k even, which lie in
one thread of a tensor-core accumulator by queries, and in two threads of one by keys. A word of the four has both
neighbouring keys of a query, as a register of packed weights has; of the 16 bits of a pair 15 decide, so that a
comparison of fp16 numbers decides two pairs. `backends/gpu/kernels/dropout.py` says the same in Triton.

Counter: number of the pair of queries, number of the four keys, `sample << 16 ^ head`, low half of the offset. Key: low
half of the seed, and its high half xor that of the offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
# values that the bits of a pair take: probabilities are multiples of 1 / STEPS
STEPS = 1 << 15
_LOW = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """A pair is kept if its bits are at least this: `dropout_p` as a multiple of 1 / 32768, 0 to 32767."""
    return min(round(dropout_p * STEPS), STEPS - 1)


def keep_scale(dropout_p: float) -> float:
    """What kept weights are multiplied by: one over the probability of being kept, as it is rounded."""
    return STEPS / (STEPS - threshold(dropout_p))


def keep(seed: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor, dropout_p: float) -> Tensor:
    """Whether pairs are kept: bool, of the shape that the indices broadcast to.

    Args:
        seed: int64 `[2]`, seed and offset, on the device of the indices. It is not read by the host.
        sample, head, query, key: int64, any shapes that broadcast: of the whole call, not of a slice of it.
        dropout_p: in [0, 1).
    """
    words = _words(seed, sample, head, query // 16 * 8 + query % 8, key // 16 * 4 + key % 8 // 2)
    q_half, k_half = query // 8 % 2 == 0, key // 8 % 2 == 0
    word = torch.where(q_half, torch.where(k_half, words[0], words[1]), torch.where(k_half, words[2], words[3]))
    return ((word >> (16 * (key % 2))) & (STEPS - 1)) >= threshold(dropout_p)


def keep_blocks(
    seed: Tensor, sample: Tensor, head: Tensor, q_blocks: Tensor, k_blocks: Tensor, dropout_p: float
) -> Tensor:
    """`keep` of whole blocks of 16 queries and 16 keys, for an eighth of the work: `[.., 16 q_blocks, 16 k_blocks]`.

    Args:
        seed, dropout_p: as of `keep`.
        sample, head: int64 `[.., 1, 1]`, shapes that broadcast.
        q_blocks, k_blocks: int64 `[n]`, numbers of blocks.
    """
    query, key = (
        (blocks[:, None] * n + torch.arange(n, device=seed.device)).flatten()
        for blocks, n in ((q_blocks, 8), (k_blocks, 4))
    )
    words = _words(seed, sample, head, query[:, None], key)
    least = threshold(dropout_p)
    kept = torch.empty(
        *words[0].shape[:-2], q_blocks.numel(), 2, 8, k_blocks.numel(), 2, 4, 2, dtype=torch.bool, device=seed.device
    )
    for which, word in enumerate(words):
        for neighbour in (0, 1):
            bits = (word >> (16 * neighbour)) & (STEPS - 1)
            of_word = (bits >= least).unflatten(-1, (-1, 4)).unflatten(-3, (-1, 8))
            kept[..., which // 2, :, :, which % 2, :, neighbour] = of_word
    return kept.flatten(-7, -5).flatten(-4, -1)


def _words(seed: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Four words of these counters of queries and keys."""
    seed_low, seed_high = seed[0] & _LOW, (seed[0] >> 32) & _LOW
    offset_low, offset_high = seed[1] & _LOW, (seed[1] >> 32) & _LOW
    counter = (query, key, ((sample << 16) ^ head) & _LOW, offset_low)
    return _philox(counter, (seed_low, seed_high ^ offset_high))


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 bits in int64, which holds the low 64 bits of a product exactly."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & _LOW, (k1 + KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits; the sign of int64 is bit 63 of the product."""
    product = word * multiplier
    return (product >> 32) & _LOW, product & _LOW
