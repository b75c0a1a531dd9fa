"""The forward kernel for Hopper: one producer warp feeds two consumer warpgroups.

A work item is one query tile of one head, 128 queries; each consumer group has 64 of them. A grid may have a program
for every item or one per multiprocessor: with fewer programs than items, the producer loads the next item while the
consumers finish the last. docs/kernels.md draws who waits for whom.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from anymask.backends.hopper.compat import tma_load, tma_store
from anymask.backends.hopper.softmax import (
    ROWS,
    decay_sums,
    end_words,
    hide,
    load_words,
    no_words,
    partial_sums,
    rescale,
    softmax_step,
)
from anymask.backends.hopper.tiles import TILE, barriers, exp2, runs

LN_2 = gl.constexpr(0.6931471805599453)
# consumer groups
GROUPS = gl.constexpr(2)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """Slot of a ring after `stage`, and the parity of its barrier there."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _item(round_):
    """The item that this program takes in a round: forth and back, so that long and short lines even out."""
    place, programs = gl.program_id(0), gl.num_programs(0)
    return round_ * programs + gl.where(round_ % 2 == 0, place, programs - 1 - place)


@gluon.jit
def _rounds(n_items):
    """How many items this program takes."""
    full = n_items // gl.num_programs(0)
    return full + (_item(full) < n_items).to(gl.int32)


@gluon.jit
def _line(item, lists, plane_strides, sizes, MASKED: gl.constexpr):
    """Item -> (query tile, head, sample, first partial entry, partial tiles, first full entry, full tiles).

    Tiles of a head follow each other in descending order of work. Without a mask all tiles count as full.
    """
    q_tiles, q_heads, _, kv_len = sizes
    tile = item % q_tiles
    head = item // q_tiles % q_heads
    sample = item // q_tiles // q_heads
    line = 0
    if MASKED:
        plane = sample * plane_strides[0] + head * plane_strides[1]
        tile = gl.load(lists[5] + plane * q_tiles + tile)
        line = plane * q_tiles + tile
    full_begin, n_full, partial_begin, n_partial = runs(lists, line, (kv_len + TILE - 1) // TILE, MASKED)
    return tile, head, sample, partial_begin, n_partial, full_begin, n_full


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    q_ring,
    kv_ring,
    lists,
    plane_strides,
    sizes,
    group,
    n_items,
    MASKED: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
):
    """The producer warp: loads q of every item, then k and v of its kv tiles.

    v runs one tile behind k, which is the order that the consumers want them in.
    """
    q_bufs, q_ready, q_empty = q_ring
    k_bufs, k_ready, v_bufs, v_ready, kv_empty = kv_ring
    q_stage, q_phase, stage, phase = 0, 0, 0, 0
    for round_ in range(_rounds(n_items)):
        item = _item(round_)
        tile, head, sample, partial_begin, n_partial, full_begin, n_full = _line(
            item, lists, plane_strides, sizes, MASKED
        )
        kv_head = head // group
        n = n_partial + n_full
        mbarrier.wait(q_empty.index(q_stage), q_phase ^ 1)
        mbarrier.expect(q_ready.index(q_stage), GROUPS * q_desc.block_type.nbytes)
        for g in gl.static_range(GROUPS):
            tma_load(
                q_desc,
                [sample, head, tile * TILE + g * ROWS, 0],
                q_ready.index(q_stage),
                q_bufs.index(q_stage * GROUPS + g),
            )
        q_stage, q_phase = _next(q_stage, q_phase, Q_STAGES)
        kv_tile = _listed(0, lists, partial_begin, n_partial, full_begin, n_full, MASKED)
        last_row = 0
        # not `stage`: a name that enters a loop with another's value and leaves it so is taken for constant
        v_stage = 0
        for t in range(n):
            row = kv_tile * TILE
            # read one tile ahead: it is an indirection
            kv_tile = _listed(t + 1, lists, partial_begin, n_partial, full_begin, n_full, MASKED)
            mbarrier.wait(kv_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [sample, kv_head, row, 0], k_ready.index(stage), k_bufs.index(stage))
            if t > 0:
                _load_v(v_desc, sample, kv_head, last_row, v_bufs, v_ready, v_stage)
            last_row = row
            v_stage = stage
            stage, phase = _next(stage, phase, STAGES)
        if n > 0:
            mbarrier.wait(kv_empty.index(stage), phase ^ 1)
            _load_v(v_desc, sample, kv_head, last_row, v_bufs, v_ready, v_stage)


@gluon.jit
def _load_v(v_desc, sample, kv_head, row, v_bufs, v_ready, stage):
    mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
    tma_load(v_desc, [sample, kv_head, row, 0], v_ready.index(stage), v_bufs.index(stage))


@gluon.jit
def _listed(t, lists, partial_begin, n_partial, full_begin, n_full, MASKED: gl.constexpr):
    """The kv tile that an item visits at step `t`, partial ones first; 0 past the end."""
    if MASKED:
        entry = lists[3] + (partial_begin + t) if t < n_partial else lists[1] + (full_begin + t - n_partial)
        tile = gl.load(entry, mask=t < n_partial + n_full, other=0)
    else:
        # the last tile first: it alone can end early
        tile = gl.where(t == 0, n_full, t) - 1
    return tile


@gluon.jit
def _scores(q, k_buf):
    """Issue `q @ k.T`, `[ROWS, TILE]`, without waiting for it."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    zero = gl.zeros([ROWS, TILE], gl.float32, S_LAYOUT)
    k = k_buf.reshape([TILE, q.shape[1]])
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _attend(
    q,
    kv_ring,
    words,
    n_partial,
    n,
    kv_len,
    qk_scale,
    stage,
    phase,
    MASKED: gl.constexpr,
    IS_NEGATIVE: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    DEEP: gl.constexpr,
):
    """The `n >= 1` tiles of an item, partial ones first: output `[ROWS, D]` before division, row sums and maxima.

    The tensor cores must never wait for a softmax, so each product with k is issued early: with DEEP during the softmax
    of the tile before, else together with the product of the tile before with v.
    """
    k_bufs, k_ready, v_bufs, v_ready, kv_empty = kv_ring
    D: gl.constexpr = q.shape[1]
    dtype: gl.constexpr = q.dtype
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    W_LAYOUT: gl.constexpr = no_words(S_LAYOUT).type.layout
    FIRST_ROW: gl.constexpr = GROUP * ROWS
    # words of this tile and, read one tile ahead, of the next
    if MASKED:
        w = load_words(words, FIRST_ROW, n_partial > 0, -1, W_LAYOUT)
        words += TILE * 4
        w_next = load_words(words, FIRST_ROW, n_partial > 1, -1, W_LAYOUT)
    else:
        w = end_words(kv_len - (n - 1) * TILE, W_LAYOUT)
        w_next = w
    mbarrier.wait(k_ready.index(stage), phase)
    s = _scores(q, k_bufs.index(stage))
    s = warpgroup_mma_wait(0, deps=[s])
    if IS_NEGATIVE:
        s = -s
    s = hide(s, w)
    m_i = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    x, m_i, _ = softmax_step(s, m_i, qk_scale)
    s_flying = 0
    if DEEP:
        s_flying = _scores_ahead(q, k_bufs, k_ready, stage, phase, n > 1, STAGES)
    x = exp2(x)
    l_i = partial_sums(x)
    mbarrier.wait(v_ready.index(stage), phase)
    mbarrier.arrive(kv_empty.index(stage))
    p = gl.convert_layout(x.to(dtype), P_LAYOUT)
    acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    last = stage
    stage, phase = _next(stage, phase, STAGES)
    for t in range(1, n):
        w = w_next
        if MASKED:
            words += TILE * 4
            w_next = load_words(words, FIRST_ROW, t + 1 < n_partial, -1, W_LAYOUT)
        if DEEP:
            # ptxas serialises a product from the last step of the loop unless nothing else flies when it is waited for
            s = warpgroup_mma_wait(0, deps=[s_flying])
        else:
            mbarrier.wait(k_ready.index(stage), phase)
            s_flying = _scores(q, k_bufs.index(stage))
        acc_flying = warpgroup_mma(p, v_bufs.index(last).reshape([TILE, D]), acc, is_async=True)
        if not DEEP:
            s = warpgroup_mma_wait(1, deps=[s_flying])
            s_flying = 0
        if IS_NEGATIVE:
            s = -s
        # one loop and a uniform branch: between two loops p would be unpacked and packed again
        if MASKED:  # noqa: SIM102
            if t < n_partial:
                s = hide(s, w)
        x, m_i, decay = softmax_step(s, m_i, qk_scale)
        if DEEP:
            s_flying = _scores_ahead(q, k_bufs, k_ready, stage, phase, t + 1 < n, STAGES)
        x = exp2(x)
        alpha = exp2(decay)
        l_i = decay_sums(l_i, alpha) + partial_sums(x)
        # here and not before the product: its branch keeps ptxas from moving the wait below to above the softmax
        mbarrier.wait(v_ready.index(stage), phase)
        acc, p = warpgroup_mma_wait(1 if DEEP else 0, deps=[acc_flying, p])
        mbarrier.arrive(kv_empty.index(stage))
        acc = rescale(acc, alpha)
        p = gl.convert_layout(x.to(dtype), P_LAYOUT)
        last = stage
        stage, phase = _next(stage, phase, STAGES)
    acc_flying = warpgroup_mma(p, v_bufs.index(last).reshape([TILE, D]), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc_flying, p])
    if DEEP:
        warpgroup_mma_wait(0, deps=[s_flying])
    return acc, l_i, m_i, stage, phase


@gluon.jit
def _scores_ahead(q, k_bufs, k_ready, stage, phase, has_next, STAGES: gl.constexpr):
    """Issue the product of the tile after `stage`; the last tile issues its own again, which nobody reads.

    A condition around the product instead would make ptxas serialise it.
    """
    next_stage, next_phase = _next(stage, phase, STAGES)
    stage, phase = gl.where(has_next, next_stage, stage), gl.where(has_next, next_phase, phase)
    mbarrier.wait(k_ready.index(stage), phase)
    return _scores(q, k_bufs.index(stage))


@gluon.jit
def _consume(
    o_desc,
    lse,
    q_ring,
    kv_ring,
    o_bufs,
    lists,
    plane_strides,
    sizes,
    n_items,
    qk_scale,
    HEAD_DIM: gl.constexpr,
    MASKED: gl.constexpr,
    IS_NEGATIVE: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DEEP: gl.constexpr,
):
    """A consumer warpgroup: ROWS queries of every item, their `o` and `lse`."""
    q_bufs, q_ready, q_empty = q_ring
    _, q_heads, q_len, kv_len = sizes
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    R_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    q_stage, q_phase, stage, phase = 0, 0, 0, 0
    line = _line(_item(0), lists, plane_strides, sizes, MASKED)
    for round_ in range(_rounds(n_items)):
        tile, head, sample, partial_begin, n_partial, _, n_full = line
        # read one item ahead: it is two indirections
        line = _line(gl.minimum(_item(round_ + 1), n_items - 1), lists, plane_strides, sizes, MASKED)
        words = lists[4]
        if MASKED:
            words += partial_begin.to(gl.int64) * (TILE * 4)
        q = q_bufs.index(q_stage * GROUPS + GROUP).reshape([ROWS, HEAD_DIM])
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, O_LAYOUT)
        m_i = gl.full([ROWS], -float("inf"), gl.float32, R_LAYOUT)
        l_i = no_words(S_LAYOUT).to(gl.float32)
        mbarrier.wait(q_ready.index(q_stage), q_phase)
        if n_partial + n_full > 0:
            acc, l_i, m_i, stage, phase = _attend(
                q,
                kv_ring,
                words,
                n_partial,
                n_partial + n_full,
                kv_len,
                qk_scale,
                stage,
                phase,
                MASKED,
                IS_NEGATIVE,
                GROUP,
                STAGES,
                DEEP,
            )
        l_i = gl.convert_layout(gl.sum(l_i, 1), R_LAYOUT, assert_trivial=True)
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
        q_stage, q_phase = _next(q_stage, q_phase, Q_STAGES)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["sample_planes", "head_planes", "q_tiles", "q_heads", "group", "q_len", "kv_len", "n_items"],
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
    n_items,
    qk_scale,
    HEAD_DIM: gl.constexpr,
    IS_NEGATIVE: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DEEP: gl.constexpr,
):
    """Writes `o` and `lse`; equations (1) to (4) of docs/kernels.md.

    Grid: (programs), between 1 and `n_items = batch * q_heads * q_tiles`. Descriptors are `[batch, heads, length, D]`
    with blocks `[1, 1, ROWS, D]` for q and o, `[1, 1, TILE, D]` for k and v: no block leaves its head, and what a block
    has beyond its length is read as 0 and not written. `IS_NEGATIVE`: qk_scale is the magnitude of a negative scale.

    `STAGES` slots for k and v and `Q_STAGES` for q in shared memory; `DEEP`: see `_attend`.
    """
    dtype: gl.constexpr = q_desc.dtype
    MASKED: gl.constexpr = words is not None
    q_bufs = gl.allocate_shared_memory(dtype, [Q_STAGES * GROUPS] + q_desc.block_type.shape, q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    o_bufs = gl.allocate_shared_memory(dtype, [GROUPS] + o_desc.block_type.shape, o_desc.layout)
    q_ring = q_bufs, barriers(Q_STAGES, 1), barriers(Q_STAGES, GROUPS)
    kv_ring = k_bufs, barriers(STAGES, 1), v_bufs, barriers(STAGES, 1), barriers(STAGES, GROUPS)
    if MASKED:
        lists = full_offsets, full_tiles, partial_offsets, partial_tiles, words, order
    else:
        lists = lse, lse, lse, lse, lse, lse
    plane_strides = sample_planes, head_planes
    sizes = q_tiles, q_heads, q_len, kv_len
    # argument lists are written inline: through a variable constexprs would become tensors
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                o_desc, lse, q_ring, kv_ring, o_bufs, lists, plane_strides, sizes, n_items, qk_scale,
                HEAD_DIM, MASKED, IS_NEGATIVE, gl.constexpr(0), STAGES, Q_STAGES, DEEP,
            )),
            (_consume, (
                o_desc, lse, q_ring, kv_ring, o_bufs, lists, plane_strides, sizes, n_items, qk_scale,
                HEAD_DIM, MASKED, IS_NEGATIVE, gl.constexpr(1), STAGES, Q_STAGES, DEEP,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_ring, kv_ring, lists, plane_strides, sizes, group, n_items,
                MASKED, STAGES, Q_STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on
