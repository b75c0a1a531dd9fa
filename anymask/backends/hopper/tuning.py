"""Launch options of the Hopper kernels: literal tables and no search.

Chosen among what was timed on an NVIDIA H200 (Triton 3.6, fp16, L8192) on 2026-11-22; docs/kernels.md says what the
others took, and `python -m benchmarks.tune_hopper --head-dim 128` times them again.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardConfig:
    """Slots for k, v and for q; whether scores are a tile ahead; and whether a program takes more than one item."""

    STAGES: int
    Q_STAGES: int
    DEEP: bool
    # without a mask, with one
    is_persistent: tuple[bool, bool]


# padded head_dim -> options
FORWARD = {64: ForwardConfig(4, 2, True, (True, False)), 128: ForwardConfig(2, 2, False, (True, True))}
# queries of a step of the backward pass
BLOCK_M = {64: 128, 128: 64}
