"""A consumer warpgroup's walk through the tiles of an item: two products and the softmax between them.

docs/kernels.md says what runs beside what.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from anymask.backends.hopper.softmax import (
    ROWS,
    end_words,
    exp2_where,
    exponents,
    follow,
    hide,
    load_words,
    moved,
    no_words,
    packed,
    partial_sums,
    rescale,
    unpacked,
)
from anymask.backends.hopper.tiles import TILE, exp2


@gluon.jit
def slot(i, STAGES: gl.constexpr):
    """Slot of a ring for what passes through it as the `i`-th, and the parity of its barriers then."""
    i = i.to(gl.uint32)
    return (i % STAGES).to(gl.int32), (i // STAGES & 1).to(gl.int32)


@gluon.jit
def _scores(q, k_buf):
    """Issue `q @ k.T`, `[ROWS, BLOCK_N]`, without waiting for it."""
    BLOCK_N: gl.constexpr = k_buf.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    k = k_buf.reshape([BLOCK_N, q.shape[1]])
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _next_words(words, wanted, mask_rows, GROUP: gl.constexpr, W_LAYOUT: gl.constexpr, PACK_GQA: gl.constexpr):
    """Where the words of the tile after that of `words` begin, and those words, all ones unless `wanted`."""
    words += TILE * 4
    return words, load_words(words, GROUP * ROWS, wanted, mask_rows, W_LAYOUT, PACK_GQA)


@gluon.jit
def _steps(
    begin,
    end,
    last_hidden,
    state,
    q,
    kv_ring,
    masking,
    qk_scale,
    HIDES: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PACK_GQA: gl.constexpr,
):
    """Steps `begin` to `end` of a pair, partial tiles up to step `last_hidden`: their share of `state`.

    HIDES: "none" of the steps has pairs to hide, or "all", or "some", of which a uniform branch takes care.

    The tensor cores must never wait for a softmax, so the product with k is issued together with the product of the
    step before with v.
    """
    p, acc, l_i, m_i = state
    k_bufs, k_ready, v_bufs, v_ready, kv_empty = kv_ring
    # words: those of the next step are read one step ahead
    words, w_next, mask_rows = masking
    D: gl.constexpr = q.shape[1]
    BLOCK_N: gl.constexpr = k_bufs.shape[3]
    STEPS: gl.constexpr = TILE // BLOCK_N
    dtype: gl.constexpr = q.dtype
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    W_LAYOUT: gl.constexpr = m_i.type.layout
    for i in range(begin, end):
        last = slot(i - 1, STAGES)[0]
        stage, phase = slot(i, STAGES)
        mbarrier.wait(k_ready.index(stage), phase)
        s_flying = _scores(q, k_bufs.index(stage))
        p = unpacked(p, dtype, P_LAYOUT)
        acc_flying = warpgroup_mma(p, v_bufs.index(last).reshape([BLOCK_N, D]), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_flying])
        z = exponents(s, m_i, qk_scale)
        if HIDES == "all":
            gl.static_assert(STEPS == 1)
            w = w_next
            words, w_next = _next_words(words, i < last_hidden, mask_rows, GROUP, W_LAYOUT, PACK_GQA)
            z, m_i, alpha = follow(z, m_i, w, W_LAYOUT)
            x = exp2_where(z, w)
        else:
            if HIDES == "some":  # noqa: SIM102
                if i <= last_hidden:
                    step = slot(i, STEPS)[0]
                    z = hide(z, w_next >> (step * (BLOCK_N // 4)))
                    if words is not None:  # noqa: SIM102
                        if step == STEPS - 1:
                            words, w_next = _next_words(words, i < last_hidden, mask_rows, GROUP, W_LAYOUT, PACK_GQA)
            z, m_i, alpha = follow(z, m_i, None, W_LAYOUT)
            x = exp2(z)
        l_i = l_i * alpha + partial_sums(x, W_LAYOUT)
        is_moved = moved(alpha, l_i)
        # here and not before the product: its branch keeps ptxas from moving the wait below to above the softmax
        mbarrier.wait(v_ready.index(stage), phase)
        acc, p = warpgroup_mma_wait(0, deps=[acc_flying, p])
        mbarrier.arrive(kv_empty.index(stage))
        acc = rescale(acc, alpha, is_moved)
        p = packed(x, dtype)
    return p, acc, l_i, m_i


@gluon.jit
def attend(
    q,
    kv_ring,
    words,
    w,
    n_partial,
    n,
    mask_rows,
    kv_len,
    qk_scale,
    first,
    MASKED: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PACK_GQA: gl.constexpr,
):
    """The `n >= 1` steps of an item, partial tiles first: output `[ROWS, D]` before division, row sums and references.

    The pair's steps before are `first`, whole tiles. `w`: with a mask, the words of the first tile.
    """
    k_bufs, k_ready, v_bufs, v_ready, kv_empty = kv_ring
    D: gl.constexpr = q.shape[1]
    BLOCK_N: gl.constexpr = k_bufs.shape[3]
    STEPS: gl.constexpr = TILE // BLOCK_N
    dtype: gl.constexpr = q.dtype
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    W_LAYOUT: gl.constexpr = no_words(BLOCK_N, S_LAYOUT).type.layout
    if MASKED:
        n_hidden = n_partial * STEPS
        w_next = w
        if STEPS == 1:
            words, w_next = _next_words(words, n_partial > 1, mask_rows, GROUP, W_LAYOUT, PACK_GQA)
        masking = words, w_next, mask_rows
    else:
        n_hidden = STEPS
        w = end_words(kv_len - (n // STEPS - 1) * TILE, W_LAYOUT)
        masking = None, w, mask_rows
    stage, phase = slot(first, STAGES)
    mbarrier.wait(k_ready.index(stage), phase)
    s = _scores(q, k_bufs.index(stage))
    s = warpgroup_mma_wait(0, deps=[s])
    m_i = gl.zeros([ROWS, 4], gl.float32, W_LAYOUT)
    z = hide(exponents(s, m_i, qk_scale), w)
    z, m_i, _ = follow(z, m_i, None, W_LAYOUT)
    x = exp2(z)
    l_i = partial_sums(x, W_LAYOUT)
    mbarrier.wait(v_ready.index(stage), phase)
    mbarrier.arrive(kv_empty.index(stage))
    acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    state = packed(x, dtype), acc, l_i, m_i
    begin, end, last_hidden = first + 1, first + n, first + n_hidden - 1
    # one loop for all where two pairs share the multiprocessor: two loops were slower there
    REST: gl.constexpr = "some" if STEPS > 1 else "none"
    # fmt: off
    if MASKED and STEPS == 1:
        full_begin = last_hidden + 1
        state = _steps(
            begin, full_begin, last_hidden, state, q, kv_ring, masking, qk_scale, "all", GROUP, STAGES, PACK_GQA,
        )
        begin = gl.maximum(begin, full_begin)
    state = _steps(
        begin, end, last_hidden, state, q, kv_ring, masking, qk_scale, REST, GROUP, STAGES, PACK_GQA,
    )
    # fmt: on
    p, acc, l_i, m_i = state
    last = slot(first + n - 1, STAGES)[0]
    p = unpacked(p, dtype, P_LAYOUT)
    acc_flying = warpgroup_mma(p, v_bufs.index(last).reshape([BLOCK_N, D]), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc_flying, p])
    return acc, l_i, m_i
