"""Which pairs of a tile dropout keeps: the bits of anymask/scores/dropout.py, in the order of an accumulator."""

import triton
import triton.language as tl

from anymask.scores import dropout

ROUNDS = tl.constexpr(dropout.ROUNDS)
MULTIPLIER_0 = tl.constexpr(dropout.MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(dropout.MULTIPLIERS[1])
KEY_STEP_0 = tl.constexpr(dropout.KEY_STEPS[0])
KEY_STEP_1 = tl.constexpr(dropout.KEY_STEPS[1])
LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Four words of uint32. Shapes broadcast as late as they can: the first rounds mix few numbers."""
    for i in tl.static_range(ROUNDS):
        product0 = c0.to(tl.uint64) * MULTIPLIER_0
        product1 = c2.to(tl.uint64) * MULTIPLIER_1
        round_k0 = ((k0 + i * KEY_STEP_0) & LOW).to(tl.uint32)
        round_k1 = ((k1 + i * KEY_STEP_1) & LOW).to(tl.uint32)
        c0 = (product1 >> 32).to(tl.uint32) ^ (c1 ^ round_k0)
        c2 = (product0 >> 32).to(tl.uint32) ^ (c3 ^ round_k1)
        c1 = (product1 & LOW).to(tl.uint32)
        c3 = (product0 & LOW).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep_pairs(
    seed_ptr,
    drop_below,
    sample,
    head,
    start_q,
    start_k,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """Whether pairs are kept, int1 `[QUERIES, KEYS]`, or `[KEYS, QUERIES]` with `BY_KEY`.

    QUERIES is a multiple of 16 and start_q too, KEYS of 16 and start_k of KEYS.
    """
    seed, offset = tl.load(seed_ptr).to(tl.uint64), tl.load(seed_ptr + 1).to(tl.uint64)
    # a call of the generator serves 8 keys apart by 8, of which short blocks have two
    FOURS: tl.constexpr = KEYS // 32 if KEYS >= 32 else 1
    OF_FOUR: tl.constexpr = KEYS // 8 // FOURS
    first_four = (start_k // 8) % 4 if KEYS < 32 else 0
    q_pair, half, q_low = tl.arange(0, QUERIES // 16), tl.arange(0, 2), tl.arange(0, 8)
    k_four, which, k_low = tl.arange(0, FOURS), first_four + tl.arange(0, OF_FOUR), tl.arange(0, 8)
    # [QUERIES // 16, 2, 8, FOURS, OF_FOUR, 8], or the last three first
    if BY_KEY:
        k_four, which, k_low = (
            k_four[:, None, None, None, None, None],
            which[None, :, None, None, None, None],
            k_low[None, None, :, None, None, None],
        )
        q_pair, half, q_low = (
            q_pair[None, None, None, :, None, None],
            half[None, None, None, None, :, None],
            q_low[None, None, None, None, None, :],
        )
    else:
        q_pair, half, q_low = (
            q_pair[:, None, None, None, None, None],
            half[None, :, None, None, None, None],
            q_low[None, None, :, None, None, None],
        )
        k_four, which, k_low = (
            k_four[None, None, None, :, None, None],
            which[None, None, None, None, :, None],
            k_low[None, None, None, None, None, :],
        )
    w0, w1, w2, w3 = _philox(
        ((start_q // 16 + q_pair) * 8 + q_low).to(tl.uint32),
        ((start_k // 32 + k_four) * 8 + k_low).to(tl.uint32),
        (sample.to(tl.uint32) << 16) ^ head.to(tl.uint32),
        (offset & LOW).to(tl.uint32),
        seed & LOW,
        (seed >> 32) ^ (offset >> 32),
    )
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    # its high half decides, so a low half is moved up
    word = tl.where(half == 1, word, word << 16)
    kept = word >= (tl.cast(drop_below, tl.uint32) << 16)
    return tl.reshape(kept, [KEYS, QUERIES] if BY_KEY else [QUERIES, KEYS])
