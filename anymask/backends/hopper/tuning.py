"""Launch options of the Hopper kernels: literal tables and no search.

Chosen among what was timed on an NVIDIA H200 (Triton 3.6, fp16, L8192) on 2026-11-22; docs/kernels.md says what the
others took, and `python -m benchmarks.tune --kernels hopper --head-dim 128` times them again.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardConfig:
    """Keys of a step, pairs of consumer groups, slots for k, v and for q, and whether a pair takes several items."""

    BLOCK_N: int
    PAIRS: int
    STAGES: int
    Q_STAGES: int
    # without a mask, with one
    is_persistent: tuple[bool, bool]


# padded head_dim -> options
FORWARD = {64: ForwardConfig(64, 2, 4, 2, (False, True)), 128: ForwardConfig(128, 1, 2, 2, (True, True))}
# queries of a step of the backward pass
BLOCK_M = {64: 128, 128: 64}
# up to so many tiles a line of keys, on average, dq from its own kernel is faster than as a sum in memory; timed with
# so many lines a multiprocessor, and with few its launch takes the host longer than it saves
SHORT_LINE, MANY_LINES = 2, 60
