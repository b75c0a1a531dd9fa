"""What the parts of the kernel of sums over pairs hand to each other, as `records` for the other kernels."""

from typing import Any, NamedTuple

from anymask.backends.hopper.kernels.records import PlaneStrides, Worker


class PairSumsConfig(NamedTuple):
    """Constants of the kernel of sums over pairs, see there."""

    HEAD_DIM: Any
    V_DIM: Any
    CHUNK: Any
    Q_STAGES: Any
    KV_STAGES: Any
    BIAS_STAGES: Any
    RESIDENT: Any
    HAS_MASK: Any


class QueryStages(NamedTuple):
    """Stages of q and do with lse2 and delta, which are full and empty together."""

    q_bufs: Any
    do_bufs: Any
    lse_bufs: Any
    delta_bufs: Any
    full: Any
    empty: Any


class KeyStages(NamedTuple):
    """Stages of chunks of k and v, which are full and empty together."""

    k_bufs: Any
    v_bufs: Any
    full: Any
    empty: Any


class BiasPipeline(NamedTuple):
    """Stages of the bias that blocks are of, a buffer for each warpgroup and chunk, two barriers for each warpgroup."""

    bufs: Any
    full: Any
    empty: Any


class PairSumsPipelines(NamedTuple):
    """Shared memory of a program of the kernel of sums over pairs."""

    q: QueryStages
    kv: KeyStages
    bias: BiasPipeline


class PairSumsSizes(NamedTuple):
    """Sizes of a call, what a block is summed over, the output's planes, and strips of a row of blocks."""

    q_tiles: Any
    kv_tiles: Any
    q_len: Any
    kv_len: Any
    q_heads: Any
    group: Any
    samples: Any
    heads: Any
    out_samples: Any
    out_heads: Any
    parts: Any
    strips: Any


class PairSumsSchedule(NamedTuple):
    """What says which strips there are and which blocks are empty, and which worker this is."""

    tile_map: Any
    plane_strides: PlaneStrides
    sizes: PairSumsSizes
    n_work_tiles: Any
    worker: Worker


class Strip(NamedTuple):
    """Blocks of a row that a program sums one after the other, and the sharers that it sums over.

    `plane`: of the output, parts first; `sample` and `head` are those of its first sharer.
    """

    plane: Any
    sample: Any
    head: Any
    q_tile: Any
    kv_begin: Any
    kv_end: Any
    first: Any
    last: Any


class Sharer(NamedTuple):
    """A sample and a query head that share a block."""

    sample: Any
    head: Any


class PairScoring(NamedTuple):
    """How the kernel of sums over pairs makes ds of products: `Terms`, and words of the mask."""

    qk_scale: Any
    terms: Any
    seeds: Any
    words: Any


class StageUses(NamedTuple):
    """Of a step, the uses of the stages of q with do, of its first chunk of k with v, and of the bias."""

    q: Any
    kv: Any
    bias: Any


class PairStep(NamedTuple):
    """A block of one sharer: where it is, its words, rows of it, and the stages that it is read from."""

    sharer: Sharer
    start_q: Any
    start_k: Any
    entry: Any
    w: Any
    lse2: Any
    delta: Any
    kv_use: Any
    bias_stage: Any
