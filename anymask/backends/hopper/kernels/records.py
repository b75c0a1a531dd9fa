"""What the parts of the Hopper kernels hand to each other.

Triton flattens a record to its fields, in their order: records cost nothing, but another order of fields that a loop
carries may give other registers (docs/kernels.md, finding 11). A field must not be called `index` or `count`, which are
methods of tuples.
"""

from typing import Any, NamedTuple


class MaskLists(NamedTuple):
    """Pointers to the tensors of one view of a BlockMask."""

    full_offsets: Any
    full_tiles: Any
    partial_offsets: Any
    partial_tiles: Any
    words: Any
    order: Any


class PlaneStrides(NamedTuple):
    """Planes of the mask from one sample to the next, and from one query head to the next."""

    sample: Any
    head: Any


class Worker(NamedTuple):
    """One of the workers that share the work tiles: a pair of consumer warpgroups forward, a program backward."""

    worker_id: Any
    num_workers: Any


class WorkTile(NamedTuple):
    """What a worker computes at a time: a tile of queries of a head forward, a tile of keys of a kv head backward."""

    tile: Any
    head: Any
    sample: Any


class TileRange(NamedTuple):
    """Entries of the mask's lists: the tiles that a work tile meets."""

    partial_begin: Any
    n_partial: Any
    full_begin: Any
    n_full: Any


class ForwardSizes(NamedTuple):
    """Sizes of a call; `mask_rows`: queries of a head, of which a tile of packed heads has several times as many."""

    q_tiles: Any
    q_heads: Any
    q_len: Any
    kv_len: Any
    mask_rows: Any


class ForwardSchedule(NamedTuple):
    """What says which work tiles there are, in which order, and what each of them meets.

    `samples`: their number, if those of a head follow each other, since they share a bias; else ().
    """

    lists: MaskLists
    plane_strides: PlaneStrides
    sizes: ForwardSizes
    n_work_tiles: Any
    swizzle_heads: Any
    samples: Any


class ForwardConfig(NamedTuple):
    """Constants of the forward kernel, see there."""

    D_BLOCKS: Any
    V_BLOCKS: Any
    HAS_MASK: Any
    STAGES: Any
    Q_STAGES: Any
    BIAS_STAGES: Any
    PACK_GQA: Any
    PLAIN_SOFTMAX: Any


class Scoring(NamedTuple):
    """How scores are made of products: by `qk_scale` alone if there are no `terms`, (), else by `Terms` of terms.py.

    Terms depend on the work tile and on its kv tiles.
    """

    qk_scale: Any
    terms: Any
    tile: WorkTile
    lists: MaskLists
    tile_range: TileRange
    # `load_seeds`, of dropout
    seeds: Any
    # stages of a bias of pairs, or ()
    bias: Any


class QPipeline(NamedTuple):
    """Stages of q `[1, 1, ROWS, width]`, one for each warpgroup and block, with a full and an empty barrier a stage."""

    bufs: Any
    full: Any
    empty: Any


class KVPipeline(NamedTuple):
    """Stages of k and v `[1, 1, BLOCK_N, width]`, a buffer a block. Their loads end apart, their stage is given back as
    one.

    `v_full` has one more barrier, for a v of which the producer zeroes rows before it is full.
    """

    k_bufs: Any
    k_full: Any
    v_bufs: Any
    v_full: Any
    empty: Any


class BiasPipeline(NamedTuple):
    """Stages of a bias of pairs `[1, 1, ROWS, BLOCK_N]`, a buffer a warpgroup; a full and an empty barrier each."""

    bufs: Any
    full: Any
    empty: Any


class ConsumerPair(NamedTuple):
    """Shared memory of a pair of consumer warpgroups and their producer, and which worker they are.

    `bias`: a `BiasPipeline`, or () without a bias of pairs.
    """

    q: QPipeline
    kv: KVPipeline
    bias: Any
    o_bufs: Any
    worker: Worker


class SoftmaxState(NamedTuple):
    """What a step of the mainloop hands to the next: p in 16 bits, and the output's blocks, row sums and row maxima so
    far."""

    p: Any
    acc: Any
    l_i: Any
    m_i: Any


class PartialTiles(NamedTuple):
    """Where the next words are (None without a mask), the words of the next step, and rows of the mask in a tile."""

    words: Any
    next_w: Any
    mask_rows: Any


class BackwardSizes(NamedTuple):
    """Sizes of a call; `group`: query heads of a kv head."""

    q_tiles: Any
    kv_tiles: Any
    kv_heads: Any
    group: Any


class HasPair(NamedTuple):
    """Pointers to the maps of queries and keys that have a pair, each None where all have, and lengths of a plane's."""

    queries: Any
    keys: Any
    q_len: Any
    kv_len: Any


class BackwardSchedule(NamedTuple):
    """What says which work tiles there are, in which order, what each of them meets, and which worker this is."""

    lists: MaskLists
    plane_strides: PlaneStrides
    sizes: BackwardSizes
    n_work_tiles: Any
    swizzle_heads: Any
    worker: Worker


class BackwardConfig(NamedTuple):
    """Constants of the backward kernel, see there."""

    HEAD_DIM: Any
    BLOCK_M: Any
    STAGES: Any
    SCORES_AHEAD: Any
    HAS_MASK: Any
    HAS_TAIL: Any
    HAS_DQ: Any
    IN_TURN: Any


class Turns(NamedTuple):
    """How many columns have added to each query tile, and how many have to before an entry of the lists may.

    The latter is None without a mask. Steps are those from one sample or head to the next.
    """

    counters: Any
    full: Any
    partial: Any
    sample_step: Any
    head_step: Any


class Column(NamedTuple):
    """A tile of keys, one of the query heads that attend to it, and the entries of their query tiles."""

    sample: Any
    head: Any
    tile: Any
    full_begin: Any
    n_full: Any
    partial_begin: Any
    n_partial: Any


class KVBuffers(NamedTuple):
    """The keys and values of a work tile: one stage with a full and an empty barrier.

    `landed`: two barriers, `full` and one for tiles of which the producer zeroes rows before they are full.
    """

    k_bufs: Any
    v_bufs: Any
    landed: Any
    full: Any
    empty: Any


class QStages(NamedTuple):
    """Stages of q and lse2 with their full barriers, and one more as in `KVPipeline`."""

    bufs: Any
    lse_bufs: Any
    full: Any


class DOStages(NamedTuple):
    """Stages of do and delta with their full barriers, and one more as in `KVPipeline`."""

    bufs: Any
    delta_bufs: Any
    full: Any


class BackwardPipelines(NamedTuple):
    """Shared memory of a program: two stages of ds for both consumers, and buffers of dq, and of dk and dv, of each.

    Without dq, `ds_bufs` and `dq_bufs` are None.
    """

    kv: KVBuffers
    q: QStages
    do: DOStages
    ds_bufs: Any
    dq_bufs: Any
    out_bufs: Any


class Ring(NamedTuple):
    """Stages of q and lse2, or of do and delta, with a full and an empty barrier a stage."""

    bufs: Any
    row_bufs: Any
    full: Any
    empty: Any


class Exchange(NamedTuple):
    """Stages of p in fp32 between two warpgroups, with a full and an empty barrier a stage."""

    bufs: Any
    full: Any
    empty: Any


class DKDVPipelines(NamedTuple):
    """Shared memory of a program of the kernel of dk and dv; k and v have one stage."""

    k_bufs: Any
    v_bufs: Any
    kv_full: Any
    kv_empty: Any
    q: Ring
    do: Ring
    p: Exchange


class DKDVConfig(NamedTuple):
    """Constants of the wide kernel of dk and dv, see there."""

    D_BLOCKS: Any
    V_BLOCKS: Any
    STAGES: Any
    P_STAGES: Any
    HAS_MASK: Any


class DQPipelines(NamedTuple):
    """Shared memory of a program of the wide kernel of dq: q with do, and k and v, whose stages are apart."""

    q: Ring
    k: Ring
    v: Ring


class DQConfig(NamedTuple):
    """Constants of the wide kernel of dq, see there."""

    D_BLOCKS: Any
    V_BLOCKS: Any
    K_STAGES: Any
    V_STAGES: Any
    HAS_MASK: Any
