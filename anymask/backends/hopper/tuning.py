"""Launch options of the Hopper kernels: literal tables and no search.

Those for 64 and 128 are chosen among what was timed on an NVIDIA H200 (Triton 3.6, fp16, L8192) on 2026-11-22;
docs/journal.md says what the others took, and `python -m benchmarks.tune --kernels hopper --head-dim 128` times them
again. Those above 128 are the fastest of two to four each on an NVIDIA H100 (Triton 3.6, bf16, L8192) on 2026-11-27.
"""

from dataclasses import dataclass
from typing import TypeAlias

from anymask.backends.gpu.arguments import TileConfig


@dataclass(frozen=True)
class ForwardConfig:
    """Keys of a step, pairs of consumer warpgroups, stages for k, v and for q, and whether the grid is persistent."""

    BLOCK_N: int
    CONSUMER_PAIRS: int
    STAGES: int
    Q_STAGES: int
    # without a mask, with one
    is_persistent: tuple[bool, bool]
    # row maxima by tensor code in place of PTX: slower, the same bits, for a test
    PLAIN_SOFTMAX: bool = False
    # columns of a block of q and k, and of a block of v and o; None: one block has all
    widths: tuple[int, int] | None = None
    # whether o leaves through the last stage of v, for want of memory
    O_IN_V: bool = False


@dataclass(frozen=True)
class DKDVConfig:
    """Columns of a block of q, k, v and do, stages for q and do, and for p on its way between warpgroups."""

    WIDTH: int
    STAGES: int
    P_STAGES: int


@dataclass(frozen=True)
class DQConfig:
    """Columns of a block of q, k, v and do, stages for k and for v."""

    WIDTH: int
    K_STAGES: int
    V_STAGES: int


# head_dim and v_dim up to which a warpgroup has registers for dk and dv of 64 keys
NARROW = 128
# padded head_dim and v_dim that there are kernels for, the smallest first
DIMS = ((64, 64), (96, 128), (128, 128), (192, 128), (192, 192), (256, 256))
# padded head_dim, or both of DIMS where they differ -> options
Forward: TypeAlias = dict[int | tuple[int, int], ForwardConfig]
FORWARD: Forward = {
    64: ForwardConfig(64, 2, 4, 2, (False, True)),
    # q and k in three blocks of 32 columns, on an H100 (docs/journal.md, E26)
    (96, 128): ForwardConfig(128, 1, 3, 1, (True, True), widths=(32, 128)),
    128: ForwardConfig(128, 1, 2, 2, (True, True)),
    (192, 128): ForwardConfig(64, 1, 3, 1, (True, True), widths=(64, 128)),
    192: ForwardConfig(64, 1, 3, 1, (True, True), widths=(64, 64)),
    256: ForwardConfig(64, 1, 2, 1, (True, True), widths=(128, 128)),
}
# the same with other scores than sinks: what they need beside the rest takes the registers of a second pair
FORWARD_TERMS: Forward = {
    64: ForwardConfig(128, 1, 4, 2, (True, True)),
    128: FORWARD[128],
}
# and with a bias of pairs alone, which has a stage for each of k (docs/journal.md, E35)
FORWARD_PAIRS: Forward = {
    64: ForwardConfig(64, 2, 2, 2, (True, True)),
    128: ForwardConfig(128, 1, 2, 1, (True, True), O_IN_V=True),
}
# and with other scores beside it
FORWARD_PAIRS_TERMS: Forward = {
    64: ForwardConfig(128, 1, 2, 2, (True, True)),
    128: FORWARD_PAIRS[128],
}
# with a bias of keys as more columns of k, alone and with dropout: at 64 their stages take the place of one of q
FORWARD_COLUMNS: Forward = {
    64: ForwardConfig(64, 2, 4, 1, (False, True)),
    128: ForwardConfig(128, 1, 2, 2, (True, True), O_IN_V=True),
}
FORWARD_COLUMNS_TERMS: Forward = {
    64: FORWARD_TERMS[64],
    128: FORWARD_COLUMNS[128],
}
# of the backward pass above 128
WIDE_DKDV = {
    (192, 128): DKDVConfig(64, 3, 2),
    (192, 192): DKDVConfig(64, 2, 2),
    (256, 256): DKDVConfig(256, 2, 1),
}
WIDE_DQ = {
    (192, 128): DQConfig(64, 3, 3),
    (192, 192): DQConfig(64, 3, 2),
    (256, 256): DQConfig(256, 2, 1),
}
# up to 128: whether a step issues the scores of the next one, and starts its sums of dp at -delta; an H100, 2026-11-28
SCORES_AHEAD = {64: True, 128: False}
# stages of a bias of pairs, by the padded head_dim; an H100, 2026-11-28: at 128 one takes 2 % longer, at 64 two do not
# fit (docs/journal.md, E35)
BIAS_STAGES = {64: 1, 128: 2}
# dq from a kernel of its own: the Triton kernel, whose other rows are in triton/tuning.py
DQ = TileConfig(128, 64, 8, 3)
# the same with other scores than sinks, and blocks of the gradient of a table, as in triton/tuning.py
DQ_TERMS = TileConfig(64, 64, 4, 2)
BIAS = TileConfig(64, 64, 4, 2)
# up to so many tiles a column, on average, it is faster than a sum in memory, with so many columns a multiprocessor; at
# head_dim 64 where samples have masks of their own, together with the Triton kernel of dk and dv
SHORT_COLUMN, MANY_COLUMNS = 3, 15
# by the padded head_dim: options of dq there, and those of dk and dv (docs/journal.md, E29)
SHORT_DQ = {64: DQ, 128: TileConfig(64, 32, 4, 2)}
SHORT_DKDV = {64: TileConfig(64, 64, 4, 3)}
# whether the kernel of dq makes delta too, for which it has do at hand
DELTA_IN_DQ = {64: False, 128: True}
# as SHORT_COLUMN, of a sum in turns, with any number of columns (an H100, 2026-11-28, docs/journal.md, E25: 0.588 ms
# instead of 0.822 for 4.5 tiles, 0.931 instead of 0.955 for 9, but 3.19 instead of 2.95 for 32)
SHORT_COLUMN_IN_TURN = 12
# of the sums over pairs: keys of a chunk, bytes of shared memory for stages, and the most stages of each kind
SUMS_CHUNK = 64
SUMS_SHARED = 232_448 - 512
MOST_Q_STAGES, MOST_KV_STAGES = 4, 6
