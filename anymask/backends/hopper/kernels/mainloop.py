"""The mainloop of a consumer warpgroup over the tiles of a work tile: two products and the softmax between them.

docs/kernels.md, section 4, says what runs beside what.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from anymask.backends.hopper.kernels.blocks import block_at, issue_scores, issue_sums, wait_sums
from anymask.backends.hopper.kernels.columns import issue_bias
from anymask.backends.hopper.kernels.pipeline import TILE, stage_and_phase
from anymask.backends.hopper.kernels.records import PartialTiles, SoftmaxState
from anymask.backends.hopper.kernels.scheduler import load_kv_tile
from anymask.backends.hopper.kernels.softmax import (
    after,
    exp2,
    exponents,
    mask_exponents,
    masked_exp2,
    needs_rescale,
    pack_halves,
    rescale,
    row_sum_partials,
    unpack_halves,
    update_row_max,
)
from anymask.backends.hopper.kernels.terms import add_pairs, drop, factor, load_bias, scored, words_of
from anymask.backends.hopper.kernels.words import ROWS, from_quad_view, load_words, tail_words, to_quad_view, zero_words


@gluon.jit
def _next_words(words, wanted, mask_rows, WARPGROUP: gl.constexpr, W_LAYOUT: gl.constexpr, PACK_GQA: gl.constexpr):
    """Where the words of the tile after that of `words` begin, and those words, all ones unless `wanted`."""
    words += TILE * 4
    return words, load_words(words, WARPGROUP * ROWS, wanted, mask_rows, W_LAYOUT, PACK_GQA)


@gluon.jit
def _start_of(step, scoring, cfg: gl.constexpr, BLOCK_N: gl.constexpr):
    """The first key of a step of a work tile."""
    STEPS: gl.constexpr = TILE // BLOCK_N
    kv_tile = load_kv_tile(step // STEPS, scoring.lists, scoring.tile_range, cfg.HAS_MASK)
    return kv_tile * TILE + step % STEPS * BLOCK_N


@gluon.jit
def _bias_of(start_k, scoring, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, WARPGROUP: gl.constexpr):
    """`load_bias` of a step."""
    tile = scoring.tile
    start_q = tile.tile * TILE + WARPGROUP * ROWS
    return load_bias(scoring.terms, tile.sample, tile.head, start_q, start_k, ROWS, BLOCK_N, S_LAYOUT, False)


@gluon.jit
def _pairs_of(step, scoring, S_LAYOUT: gl.constexpr, WARPGROUP: gl.constexpr):
    """The bias of pairs `[ROWS, N]` of the worker's step, as it lies in memory; 0 without one.

    Its stage goes back with that of k. Beside products that read shared memory too, loads to registers end late, and a
    barrier does not wait for them, but the branch on all row maxima does, which comes before.
    """
    pairs = 0
    if len(scoring.bias) > 0:
        full, bufs = scoring.bias.full, scoring.bias.bufs
        STAGES: gl.constexpr = full.shape[0]
        stage, phase = stage_and_phase(step, STAGES)
        mbarrier.wait(full.index(stage), phase)
        pairs = block_at(bufs, stage * 2 + WARPGROUP).load(S_LAYOUT)
    return pairs


@gluon.jit
def _exponents(s, m_i, bias, pairs, scoring):
    """`z [ROWS, N]` of products s; `bias` of `load_bias` and `pairs` of `_pairs_of`, if terms ask for them."""
    terms = scoring.terms
    if len(terms) == 0:
        z = exponents(s, m_i, scoring.qk_scale)
    elif len(terms.pairs) == 0:
        z = exponents(scored(s, bias, scoring.qk_scale, terms), m_i, factor(terms))
    elif len(terms.keys) + len(terms.queries) + len(terms.diagonals) + len(terms.cap) == 0:
        LAYOUT: gl.constexpr = s.type.layout
        minus = m_i.expand_dims(1).expand_dims(3) - to_quad_view(pairs.to(gl.float32)) * terms.pairs[0].unit
        z = from_quad_view(to_quad_view(s * scoring.qk_scale) - minus, LAYOUT)
    else:
        bias = add_pairs(bias, pairs, terms)
        z = exponents(scored(s, bias, scoring.qk_scale, terms), m_i, factor(terms))
    return z


@gluon.jit
def _random_words(like, start_k, scoring, WARPGROUP: gl.constexpr):
    """`words_of` a step, of the shape and layout of packed weights `like`; 0 without dropout."""
    words = 0
    if len(scoring.terms) > 0:  # noqa: SIM102
        if len(scoring.terms.dropout) == 1:
            tile = scoring.tile
            start_q = tile.tile * TILE + WARPGROUP * ROWS
            words = words_of(like, scoring.terms, scoring.seeds, tile.sample, tile.head, start_q, start_k)
    return words


@gluon.jit
def _drop(p, words, scoring):
    """Packed weights `p` of a step where dropout keeps them, else 0; themselves without dropout."""
    if len(scoring.terms) > 0:  # noqa: SIM102
        if len(scoring.terms.dropout) == 1:
            p = drop(p, words, scoring.terms)
    return p


@gluon.jit
def _steps(
    begin,
    end,
    last_partial,
    step_base,
    state,
    q,
    kv,
    partial,
    scoring,
    cfg: gl.constexpr,
    MASK_STEPS: gl.constexpr,
    WARPGROUP: gl.constexpr,
):
    """Fold steps `begin .. end` of the worker, partial tiles up to step `last_partial`, into `state`.

    MASK_STEPS: "none" of the steps has pairs to mask out, or "all", or "some", of which a uniform branch takes care.

    The tensor cores must never wait for a softmax, so the product with k is issued together with the product of the
    step before with v.
    """
    p, acc, l_i, m_i = state.p, state.acc, state.l_i, state.m_i
    # words of the next step are read one step ahead
    words, w_next, mask_rows = partial.words, partial.next_w, partial.mask_rows
    BLOCK_N: gl.constexpr = kv.k_bufs.shape[3]
    STEPS: gl.constexpr = TILE // BLOCK_N
    STAGES: gl.constexpr = cfg.STAGES
    PACK_GQA: gl.constexpr = cfg.PACK_GQA
    PLAIN: gl.constexpr = cfg.PLAIN_SOFTMAX
    dtype: gl.constexpr = kv.k_bufs.dtype
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, acc[0].type.layout, 2)
    W_LAYOUT: gl.constexpr = m_i.type.layout
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    HAS_TERMS: gl.constexpr = len(scoring.terms) > 0
    DROPS: gl.constexpr = len(scoring.terms.dropout) == 1 if HAS_TERMS else False
    # with a bias that may hide keys by large numbers
    n_biases: gl.constexpr = len(scoring.terms.keys) + len(scoring.terms.pairs) if HAS_TERMS else 0
    LIMITED: gl.constexpr = len(kv.columns) + n_biases > 0
    if HAS_TERMS:
        next_k = _start_of(begin - step_base, scoring, cfg, BLOCK_N)
    for i in range(begin, end):
        last = stage_and_phase(i - 1, STAGES)[0]
        stage, phase = stage_and_phase(i, STAGES)
        mbarrier.wait(kv.k_full.index(stage), phase)
        s_flying = issue_bias(issue_scores(q, kv.k_bufs, stage), kv.columns, stage)
        p = unpack_halves(p, dtype, P_LAYOUT)
        acc_flying = issue_sums(p, kv.v_bufs, last, acc)
        step_bias, pairs, start_k = 0.0, 0, 0
        if HAS_TERMS:
            # read one step ahead: it is an indirection
            start_k, next_k = next_k, _start_of(i + 1 - step_base, scoring, cfg, BLOCK_N)
            step_bias = _bias_of(start_k, scoring, S_LAYOUT, BLOCK_N, WARPGROUP)
            pairs = _pairs_of(i, scoring, S_LAYOUT, WARPGROUP)
        s = warpgroup_mma_wait(1, deps=[s_flying])
        z = _exponents(s, m_i, step_bias, pairs, scoring)
        if MASK_STEPS == "all":
            gl.static_assert(STEPS == 1)
            w = w_next
            words, w_next = _next_words(words, i < last_partial, mask_rows, WARPGROUP, W_LAYOUT, PACK_GQA)
            z, m_i, alpha = update_row_max(z, m_i, w, W_LAYOUT, PLAIN, LIMITED)
            x = masked_exp2(z, w)
        else:
            if MASK_STEPS == "some":  # noqa: SIM102
                if i <= last_partial:
                    step = stage_and_phase(i, STEPS)[0]
                    z = mask_exponents(z, w_next >> (step * (BLOCK_N // 4)))
                    if words is not None:  # noqa: SIM102
                        if step == STEPS - 1:
                            wanted = i < last_partial
                            words, w_next = _next_words(words, wanted, mask_rows, WARPGROUP, W_LAYOUT, PACK_GQA)
            z, m_i, alpha = update_row_max(z, m_i, None, W_LAYOUT, PLAIN, LIMITED)
            x = exp2(z)
        l_i = l_i * alpha + row_sum_partials(x, W_LAYOUT)
        # words and not weights: a second p in 16 bits would be moved to where the product reads it
        random = _random_words(state.p, start_k, scoring, WARPGROUP)
        # masked steps have no registers for it
        needed = needs_rescale(alpha, after(l_i, random) if DROPS and MASK_STEPS != "all" else l_i)
        # here and not before the product: its branch keeps ptxas from moving the wait below to above the softmax
        mbarrier.wait(kv.v_full.index(stage), phase)
        acc, p = wait_sums(acc_flying, p)
        mbarrier.arrive(kv.empty.index(stage))
        acc = [rescale(block, alpha, needed) for block in acc]
        p = _drop(pack_halves(x, dtype), random, scoring)
    return SoftmaxState(p, acc, l_i, m_i)


@gluon.jit
def mainloop(
    q,
    kv,
    words,
    w,
    n_partial,
    n,
    sizes,
    scoring,
    step_base,
    acc,
    cfg: gl.constexpr,
    WARPGROUP: gl.constexpr,
):
    """The `n >= 1` steps of a work tile, partial tiles first: output before division, row sums, row maxima.

    `q`: blocks of columns `[ROWS, width]`. `acc`: those of the output, zeros. `step_base`: steps of the worker before,
    whole tiles. `w`: with a mask, the words of the first tile.
    """
    BLOCK_N: gl.constexpr = kv.k_bufs.shape[3]
    STEPS: gl.constexpr = TILE // BLOCK_N
    STAGES: gl.constexpr = cfg.STAGES
    dtype: gl.constexpr = kv.k_bufs.dtype
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, acc[0].type.layout, 2)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    W_LAYOUT: gl.constexpr = zero_words(BLOCK_N, S_LAYOUT).type.layout
    if cfg.HAS_MASK:
        partial_steps = n_partial * STEPS
        w_next = w
        if STEPS == 1:
            words, w_next = _next_words(words, n_partial > 1, sizes.mask_rows, WARPGROUP, W_LAYOUT, cfg.PACK_GQA)
        partial = PartialTiles(words, w_next, sizes.mask_rows)
    else:
        partial_steps = STEPS
        w = tail_words(sizes.kv_len - (n // STEPS - 1) * TILE, W_LAYOUT)
        partial = PartialTiles(None, w, sizes.mask_rows)
    stage, phase = stage_and_phase(step_base, STAGES)
    mbarrier.wait(kv.k_full.index(stage), phase)
    s = issue_bias(issue_scores(q, kv.k_bufs, stage), kv.columns, stage)
    bias, pairs, start_k = 0.0, 0, 0
    if len(scoring.terms) > 0:
        start_k = _start_of(0, scoring, cfg, BLOCK_N)
        bias = _bias_of(start_k, scoring, S_LAYOUT, BLOCK_N, WARPGROUP)
        pairs = _pairs_of(step_base, scoring, S_LAYOUT, WARPGROUP)
    s = warpgroup_mma_wait(0, deps=[s])
    m_i = gl.zeros([ROWS, 4], gl.float32, W_LAYOUT)
    z = mask_exponents(_exponents(s, m_i, bias, pairs, scoring), w)
    n_biases: gl.constexpr = len(scoring.terms.keys) + len(scoring.terms.pairs) if len(scoring.terms) > 0 else 0
    LIMITED: gl.constexpr = len(kv.columns) + n_biases > 0
    z, m_i, _alpha = update_row_max(z, m_i, None, W_LAYOUT, cfg.PLAIN_SOFTMAX, LIMITED)
    x = exp2(z)
    l_i = row_sum_partials(x, W_LAYOUT)
    mbarrier.wait(kv.v_full.index(stage), phase)
    if cfg.O_IN_V:
        # o of the work tile before has left, or v would be loaded over it
        tma.store_wait(0)
    mbarrier.arrive(kv.empty.index(stage))
    p = pack_halves(x, dtype)
    state = SoftmaxState(_drop(p, _random_words(p, start_k, scoring, WARPGROUP), scoring), acc, l_i, m_i)
    begin, end, last_partial = step_base + 1, step_base + n, step_base + partial_steps - 1
    # one loop for all where two pairs share the multiprocessor: two loops were slower there
    REST: gl.constexpr = "some" if STEPS > 1 else "none"
    if cfg.HAS_MASK and STEPS == 1:
        full_begin = last_partial + 1
        state = _steps(
            begin, full_begin, last_partial, step_base, state, q, kv, partial, scoring, cfg, "all", WARPGROUP
        )
        begin = gl.maximum(begin, full_begin)
    state = _steps(begin, end, last_partial, step_base, state, q, kv, partial, scoring, cfg, REST, WARPGROUP)
    last = stage_and_phase(step_base + n - 1, STAGES)[0]
    p = unpack_halves(state.p, dtype, P_LAYOUT)
    acc_flying = issue_sums(p, kv.v_bufs, last, state.acc)
    acc, p = wait_sums(acc_flying, p)
    return acc, state.l_i, state.m_i
