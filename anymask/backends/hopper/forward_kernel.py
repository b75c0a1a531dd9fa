"""The forward kernel for Hopper: one producer warp feeds a pair of consumer warpgroups.

A work item is one query tile of one head, 128 queries; each consumer group of a pair has 64 of them. A program has one
pair, or two that share nothing but the multiprocessor. A grid may have a pair for every item or one program per
multiprocessor: with fewer pairs than items, the producer loads the next item while the consumers finish the last.
docs/kernels.md draws who waits for whom.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from anymask.backends.hopper.attend import attend, slot
from anymask.backends.hopper.compat import tma_load, tma_store
from anymask.backends.hopper.items import ask, place_at, rounds, start, told
from anymask.backends.hopper.softmax import ROWS, load_words, no_words
from anymask.backends.hopper.tiles import TILE, barriers

LN_2 = gl.constexpr(0.6931471805599453)
# consumer groups of a pair
GROUPS = gl.constexpr(2)


@gluon.jit
def _words_of(runs, lists):
    """Where the words of an item's partial tiles begin."""
    return lists[4] + runs[0].to(gl.int64) * (TILE * 4)


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    pair,
    work,
    group,
    MASKED: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
):
    """The producer warp: loads q of every item, then k and v of the steps through its kv tiles.

    v runs one step behind k, which is the order that the consumers want them in.
    """
    q_ring, kv_ring, _, seat = pair
    lists, n_items = work[0], work[3]
    q_bufs, q_ready, q_empty = q_ring
    k_bufs, k_ready, v_bufs, v_ready, kv_empty = kv_ring
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[2]
    STEPS: gl.constexpr = TILE // BLOCK_N
    first = 0
    runs, place, after = start(seat, work, MASKED)
    for round_ in range(rounds(n_items, seat)):
        partial_begin, n_partial, full_begin, n_full = runs
        tile, head, sample = place
        kv_head = head // group
        n = (n_partial + n_full) * STEPS
        q_stage, q_phase = slot(round_, Q_STAGES)
        mbarrier.wait(q_empty.index(q_stage), q_phase ^ 1)
        mbarrier.expect(q_ready.index(q_stage), GROUPS * q_desc.block_type.nbytes)
        for g in gl.static_range(GROUPS):
            tma_load(
                q_desc,
                [sample, head, tile * TILE + g * ROWS, 0],
                q_ready.index(q_stage),
                q_bufs.index(q_stage * GROUPS + g),
            )
        later = place_at(round_ + 2, seat, work)
        asked = ask(after, later, work, MASKED)
        kv_tile = _listed(0, lists, partial_begin, n_partial, full_begin, n_full, MASKED)
        last_row = 0
        for t in range(n):
            stage, phase = slot(first + t, STAGES)
            row = kv_tile * TILE + t % STEPS * BLOCK_N
            # read one step ahead: it is an indirection
            kv_tile = _listed((t + 1) // STEPS, lists, partial_begin, n_partial, full_begin, n_full, MASKED)
            mbarrier.wait(kv_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [sample, kv_head, row, 0], k_ready.index(stage), k_bufs.index(stage))
            if t > 0:
                _load_v(v_desc, sample, kv_head, last_row, v_bufs, v_ready, slot(first + t - 1, STAGES)[0])
            last_row = row
        first += n
        if n > 0:
            stage, phase = slot(first, STAGES)
            mbarrier.wait(kv_empty.index(stage), phase ^ 1)
            _load_v(v_desc, sample, kv_head, last_row, v_bufs, v_ready, slot(first - 1, STAGES)[0])
        place = after
        runs, after = told(asked, later, work, MASKED)


@gluon.jit
def _load_v(v_desc, sample, kv_head, row, v_bufs, v_ready, stage):
    mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
    tma_load(v_desc, [sample, kv_head, row, 0], v_ready.index(stage), v_bufs.index(stage))


@gluon.jit
def _listed(t, lists, partial_begin, n_partial, full_begin, n_full, MASKED: gl.constexpr):
    """The `t`-th kv tile of an item, partial ones first; 0 past the end."""
    if MASKED:
        entry = lists[3] + (partial_begin + t) if t < n_partial else lists[1] + (full_begin + t - n_partial)
        tile = gl.load(entry, mask=t < n_partial + n_full, other=0)
    else:
        # the last tile first: it alone can end early
        tile = gl.where(t == 0, n_full, t) - 1
    return tile


@gluon.jit
def _consume(
    o_desc,
    lse,
    pair,
    work,
    qk_scale,
    HEAD_DIM: gl.constexpr,
    MASKED: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    PACK_GQA: gl.constexpr,
):
    """A consumer warpgroup: ROWS queries of every item, their `o` and `lse`."""
    q_ring, kv_ring, o_bufs, seat = pair
    lists, _strides, sizes, n_items, _section = work
    q_bufs, q_ready, q_empty = q_ring
    _, q_heads, q_len, kv_len, mask_rows = sizes
    BLOCK_N: gl.constexpr = kv_ring[0].shape[3]
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    R_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    W_LAYOUT: gl.constexpr = no_words(BLOCK_N, S_LAYOUT).type.layout
    first = 0
    runs, place, after = start(seat, work, MASKED)
    w = no_words(BLOCK_N, S_LAYOUT)
    if MASKED:
        w = load_words(_words_of(runs, lists), GROUP * ROWS, runs[1] > 0, mask_rows, W_LAYOUT, PACK_GQA)
    for round_ in range(rounds(n_items, seat)):
        tile, head, sample = place
        n_partial = runs[1]
        n = (n_partial + runs[3]) * (TILE // BLOCK_N)
        words = lists[4]
        if MASKED:
            words = _words_of(runs, lists)
        # the lists are read items ahead, as they lead from one to the other
        later = place_at(round_ + 2, seat, work)
        asked = ask(after, later, work, MASKED)
        q_stage, q_phase = slot(round_, Q_STAGES)
        q = q_bufs.index(q_stage * GROUPS + GROUP).reshape([ROWS, HEAD_DIM])
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, O_LAYOUT)
        l_i = no_words(BLOCK_N, S_LAYOUT).to(gl.float32)
        m_i = l_i
        mbarrier.wait(q_ready.index(q_stage), q_phase)
        if n > 0:
            acc, l_i, m_i = attend(
                q, kv_ring, words, w, n_partial, n, mask_rows, kv_len, qk_scale, first, MASKED, GROUP, STAGES, PACK_GQA
            )
        first += n
        place = after
        runs, after = told(asked, later, work, MASKED)
        if MASKED:
            # for the first step of the next item, while o of this one is stored
            w = load_words(_words_of(runs, lists), GROUP * ROWS, runs[1] > 0, mask_rows, W_LAYOUT, PACK_GQA)
        l_i = gl.convert_layout(gl.sum(l_i, 1), R_LAYOUT, assert_trivial=True)
        m_i = gl.convert_layout(gl.max(m_i, 1), R_LAYOUT, assert_trivial=True)
        mbarrier.arrive(q_empty.index(q_stage))
        row = tile * TILE + GROUP * ROWS
        rows = row + gl.arange(0, ROWS, layout=R_LAYOUT)
        lse_rows = lse + (sample * q_heads + head).to(gl.int64) * q_len + rows
        gl.store(lse_rows, (m_i + gl.log2(l_i)) * LN_2, mask=rows < q_len)
        scale = gl.convert_layout(1.0 / gl.where(l_i == 0.0, 1.0, l_i), gl.SliceLayout(1, O_LAYOUT))
        o = (acc * scale.expand_dims(1)).to(o_desc.dtype)
        o_buf = o_bufs.index(GROUP)
        tma.store_wait(0)
        o_buf.reshape([ROWS, HEAD_DIM]).store(o)
        fence_async_shared()
        tma_store(o_desc, [sample, head, row, 0], o_buf)
    tma.store_wait(0)


@gluon.jit
def _pair(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    PAIR: gl.constexpr,
    PAIRS: gl.constexpr,
):
    """A pair of groups of a program: the ring of q, those of k and v, the buffers of o, its seat among all pairs."""
    dtype: gl.constexpr = q_desc.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [Q_STAGES * GROUPS] + q_desc.block_type.shape, q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    o_bufs = gl.allocate_shared_memory(dtype, [GROUPS] + o_desc.block_type.shape, o_desc.layout)
    q_ring = q_bufs, barriers(Q_STAGES, 1), barriers(Q_STAGES, GROUPS)
    kv_ring = k_bufs, barriers(STAGES, 1), v_bufs, barriers(STAGES, 1), barriers(STAGES, GROUPS)
    return q_ring, kv_ring, o_bufs, (gl.program_id(0) * PAIRS + PAIR, gl.num_programs(0) * PAIRS)


@gluon.jit(
    do_not_specialize=[
        "sample_planes",
        "head_planes",
        "q_tiles",
        "q_heads",
        "group",
        "q_len",
        "kv_len",
        "mask_rows",
        "n_items",
        "section",
    ],
    do_not_specialize_on_alignment=[
        "lse",
        "full_offsets",
        "full_tiles",
        "partial_offsets",
        "partial_tiles",
        "words",
        "order",
    ],
)
def _fwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    lse,
    full_offsets,
    full_tiles,
    partial_offsets,
    partial_tiles,
    words,
    order,
    sample_planes,
    head_planes,
    q_tiles,
    q_heads,
    group,
    q_len,
    kv_len,
    mask_rows,
    n_items,
    section,
    qk_scale,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    PAIRS: gl.constexpr,
    PACK_GQA: gl.constexpr,
):
    """Writes `o` and `lse`; equations (1) to (4) of docs/kernels.md.

    Grid: (programs), so many that there is an item for each, `n_items = batch * q_heads * q_tiles`. Descriptors are
    `[batch, heads, length, D]` with blocks `[1, 1, ROWS, D]` for q and o, `[1, 1, BLOCK_N, D]` for k and v, of which
    BLOCK_N divides a tile: no block leaves its head, and what a block has beyond its length is read as 0 and not
    written.

    PACK_GQA: rows of q are `mask_rows` queries of one head after the other, and a row of the mask is for all of them.

    Each of `PAIRS` pairs of consumers has `STAGES` slots for k and v and `Q_STAGES` for q in shared memory.
    """
    MASKED: gl.constexpr = words is not None
    if MASKED:
        lists = full_offsets, full_tiles, partial_offsets, partial_tiles, words, order
    else:
        lists = lse, lse, lse, lse, lse, lse
    work = lists, (sample_planes, head_planes), (q_tiles, q_heads, q_len, kv_len, mask_rows), n_items, section
    a = _pair(q_desc, k_desc, v_desc, o_desc, STAGES, Q_STAGES, 0, PAIRS)
    # argument lists are written inline: through a variable constexprs would become tensors
    # fmt: off
    if PAIRS == 1:
        gl.warp_specialize(
            [
                (_consume, (
                    o_desc, lse, a, work, qk_scale, HEAD_DIM, MASKED, gl.constexpr(0), STAGES, Q_STAGES, PACK_GQA,
                )),
                (_consume, (
                    o_desc, lse, a, work, qk_scale, HEAD_DIM, MASKED, gl.constexpr(1), STAGES, Q_STAGES, PACK_GQA,
                )),
                (_produce, (q_desc, k_desc, v_desc, a, work, group, MASKED, STAGES, Q_STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        b = _pair(q_desc, k_desc, v_desc, o_desc, STAGES, Q_STAGES, 1, PAIRS)
        gl.warp_specialize(
            [
                (_consume, (
                    o_desc, lse, a, work, qk_scale, HEAD_DIM, MASKED, gl.constexpr(0), STAGES, Q_STAGES, PACK_GQA,
                )),
                (_consume, (
                    o_desc, lse, a, work, qk_scale, HEAD_DIM, MASKED, gl.constexpr(1), STAGES, Q_STAGES, PACK_GQA,
                )),
                (_consume, (
                    o_desc, lse, b, work, qk_scale, HEAD_DIM, MASKED, gl.constexpr(0), STAGES, Q_STAGES, PACK_GQA,
                )),
                (_consume, (
                    o_desc, lse, b, work, qk_scale, HEAD_DIM, MASKED, gl.constexpr(1), STAGES, Q_STAGES, PACK_GQA,
                )),
                (_produce, (q_desc, k_desc, v_desc, a, work, group, MASKED, STAGES, Q_STAGES)),
                (_produce, (q_desc, k_desc, v_desc, b, work, group, MASKED, STAGES, Q_STAGES)),
            ],
            [4, 4, 4, 1, 1],
            [112, 112, 112, 24, 24],
        )
    # fmt: on
