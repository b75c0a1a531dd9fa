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

    QUERIES and KEYS are multiples of 16, as start_q and start_k are.
    """
    seed, offset = tl.load(seed_ptr).to(tl.uint64), tl.load(seed_ptr + 1).to(tl.uint64)
    # queries are q_block, q_half, q_low, keys are k_block, k_half, k_low; of [queries, keys], or keys first
    Q: tl.constexpr = 3 if BY_KEY else 0
    K: tl.constexpr = 0 if BY_KEY else 3
    q_block, q_half, q_low = _axis(QUERIES // 16, Q), _axis(2, Q + 1), _axis(8, Q + 2)
    k_block, k_half, k_low = _axis(KEYS // 16, K), _axis(2, K + 1), _axis(8, K + 2)
    w0, w1, w2, w3 = _philox(
        ((start_q // 16 + q_block) * 8 + q_low).to(tl.uint32),
        ((start_k // 16 + k_block) * 4 + (k_low >> 1)).to(tl.uint32),
        (sample.to(tl.uint32) << 16) ^ head.to(tl.uint32),
        (offset & LOW).to(tl.uint32),
        seed & LOW,
        (seed >> 32) ^ (offset >> 32),
    )
    # of the halves of keys last, or Triton 3.9 carries words through shared memory
    word = tl.where(k_half == 0, tl.where(q_half == 0, w0, w2), tl.where(q_half == 0, w1, w3))
    # 15 bits of its half decide, moved to the top
    word = tl.where(k_low % 2 == 0, word << 17, word << 1)
    kept = word >= (tl.cast(drop_below, tl.uint32) << 17)
    return tl.reshape(kept, [KEYS, QUERIES] if BY_KEY else [QUERIES, KEYS])


@triton.jit
def _axis(SIZE: tl.constexpr, D: tl.constexpr):
    """int32 indices along dimension D of six, of size 1 along the others."""
    i = tl.arange(0, SIZE)
    for d in tl.static_range(6):
        if d != D:
            i = tl.expand_dims(i, d)
    return i
