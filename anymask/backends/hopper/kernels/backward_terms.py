"""What the Hopper backward kernel does to scores beside masking them; equations (10) and (11), on transposed scores."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from anymask.backends.hopper.kernels import ptx
from anymask.backends.hopper.kernels.blocks import block_at
from anymask.backends.hopper.kernels.pipeline import TILE, stage_and_phase
from anymask.backends.hopper.kernels.softmax import exp2, mask_exponents, masked_exp2, row_sum_partials
from anymask.backends.hopper.kernels.terms import (
    add_bias,
    add_pairs,
    axis_of,
    factor,
    least_kept,
    load_key_bias,
    load_seeds,
    random_words,
    scored,
)
from anymask.backends.hopper.kernels.turns import q_tile_at
from anymask.backends.hopper.kernels.words import ROWS, from_quad_view, load_column_words, to_quad_view


@gluon.jit
def column_bias(terms, column, like, G: gl.constexpr):
    """The bias of the keys of a column, for `like [ROWS, N]` scores of consumer warpgroup G; 0.0 without one."""
    bias = 0.0
    if len(terms) > 0:
        N: gl.constexpr = like.shape[1]
        LAYOUT: gl.constexpr = like.type.layout
        start = column.tile * TILE + G * ROWS
        bias = load_key_bias(terms, column.sample, column.head, start, ROWS, N, LAYOUT, True)
    return bias


@gluon.jit
def step_bias(terms, of_keys, column, start_q, like, G: gl.constexpr):
    """The bias of a step that starts at query `start_q`; 0.0 without one. `of_keys`: `column_bias`."""
    bias = of_keys
    if len(terms) > 0:
        N: gl.constexpr = like.shape[1]
        LAYOUT: gl.constexpr = like.type.layout
        start_k = column.tile * TILE + G * ROWS
        bias = add_bias(of_keys, terms, column.sample, column.head, start_q, start_k, ROWS, N, LAYOUT, True)
    return bias


@gluon.jit
def step_pairs(bias, step, LAYOUT: gl.constexpr, G: gl.constexpr):
    """The bias of pairs `[ROWS, BLOCK_M]` of a worker's step, as it lies in memory; 0 without one.

    It lies there by queries: a load turns it round on its way to registers (LDSM.T).
    """
    pairs = 0
    if len(bias) > 0:
        STAGES: gl.constexpr = bias.full.shape[0]
        stage, phase = stage_and_phase(step, STAGES)
        mbarrier.wait(bias.full.index(stage), phase)
        pairs = block_at(bias.bufs, stage * 2 + G).permute((1, 0)).load(LAYOUT)
    return pairs


@gluon.jit
def dropped_words(terms, column, start_q, like, W_LAYOUT: gl.constexpr, G: gl.constexpr):
    """int32 `[ROWS, 4]`: which pairs of a step dropout takes, as bits like those of a mask, low bits first."""
    N: gl.constexpr = like.shape[1] // 16
    L7: gl.constexpr = gl.zeros_like(like).reshape([ROWS // 16, 2, 8, N, 2, 4, 2]).type.layout
    # [block of keys, key of 8, block of queries, pair of queries]: what a thread calls the generator for
    x = gl.zeros([ROWS // 16, 8, N, 4], gl.int32, gl.SliceLayout(1, gl.SliceLayout(4, gl.SliceLayout(6, L7))))
    start_k, key = column.tile * TILE + G * ROWS, axis_of(x, 1)
    w0, w1, w2, w3 = random_words(
        # read here, they take no registers elsewhere
        load_seeds(terms),
        column.sample,
        column.head,
        (start_q // 16 + axis_of(x, 2)) * 8 + axis_of(x, 3) * 2 + key % 2,
        (start_k // 16 + axis_of(x, 0)) * 4 + key // 2,
    )
    first, second = gl.inline_asm_elementwise(
        ptx.dropped_asm(N),
        ptx.dropped_operands(N),
        [w0, w1, w2, w3, key % 2, least_kept(terms)],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=N,
    )
    # of the N summands one is not 0: no addition is left
    both = gl.join(gl.sum(first, 2), gl.sum(second, 2)).permute((0, 3, 1, 2))
    return gl.convert_layout(both.reshape([ROWS, 4]), W_LAYOUT, assert_trivial=True)


@gluon.jit
def read_ahead(column, offs, schedule, terms, like, cfg: gl.constexpr, G: gl.constexpr):
    """What a step reads ahead, for the first step of a column: words, first query, `dropped_words`; 0 if not asked for.

    `offs`: of words in a tile.
    """
    words, start_q, dropped = 0, 0, 0
    W_LAYOUT: gl.constexpr = offs.type.layout
    DROPS: gl.constexpr = len(terms.dropout) == 1 if len(terms) > 0 else False
    BY_QUERY: gl.constexpr = len(terms.queries) + len(terms.diagonals) + DROPS > 0 if len(terms) > 0 else False
    if cfg.HAS_MASK:
        words = load_column_words(schedule.lists.words, column, 0, offs, cfg)
    if BY_QUERY:
        start_q = q_tile_at(column, 0, schedule, cfg.HAS_MASK, cfg.IN_TURN) * TILE
    if DROPS:
        dropped = dropped_words(terms, column, start_q, like, W_LAYOUT, G)
    return words, start_q, dropped


@gluon.jit
def _turn_sign(x, words):
    """`x [ROWS, N]`, and -x where the bits of `words [ROWS, 4]` are set."""
    N: gl.constexpr = x.shape[1] // 2
    LAYOUT: gl.constexpr = x.type.layout
    x4 = gl.inline_asm_elementwise(
        ptx.sign_asm(N),
        ptx.sign_operands(N),
        [to_quad_view(x), words.expand_dims(1).expand_dims(3)],
        dtype=gl.float32,
        is_pure=True,
        pack=N,
    )
    return from_quad_view(x4, LAYOUT)


@gluon.jit
def _pack_positive(x, dtype: gl.constexpr):
    """`x [ROWS, N]` in 16 bits, 0 where it is below 0."""
    return gl.inline_asm_elementwise(
        ptx.pack_positive(dtype == gl.float16), "=r,f,f", [x], dtype=dtype.value, is_pure=True, pack=2
    )


@gluon.jit
def weights(
    s,
    lse_buf,
    w,
    bias,
    pairs,
    dropped,
    qk_scale,
    terms,
    dtype: gl.constexpr,
    MASKED: gl.constexpr,
    ARE_THERE: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """Of products `s [ROWS, N]`: the weights of v in 16 bits, and those of ds.

    The latter have the slope of a soft cap, and the sign of those that dropout takes is turned. `w`: words of the mask,
    if the step is MASKED; `bias`, `pairs`, `dropped`: of `step_bias`, `step_pairs`, `dropped_words`. `ARE_THERE`: or
    else the products before the last are waited for.
    """
    LAYOUT: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    CAPPED: gl.constexpr = len(terms.cap) == 1 if len(terms) > 0 else False
    HAS_PAIRS: gl.constexpr = len(terms.pairs) == 1 if len(terms) > 0 else False
    OTHERS: gl.constexpr = len(terms.keys) + len(terms.queries) + len(terms.diagonals) if len(terms) > 0 else 0
    # under a cap there are no registers for it yet
    lse2 = 0.0 if CAPPED else lse_buf.load(LAYOUT).expand_dims(0)
    if not ARE_THERE:
        s = warpgroup_mma_wait(1, deps=[s])
    if len(terms) == 0:
        z = s * qk_scale - lse2
        of_ds = masked_exp2(z, w) if MASKED else exp2(z)
        of_v = of_ds
    elif CAPPED:
        t = scored(s, add_pairs(bias, pairs, terms) if HAS_PAIRS else bias, qk_scale, terms)
        HIDES: gl.constexpr = MASKED or HAS_PAIRS or OTHERS > 0
        if MASKED:
            t = mask_exponents(t, w)
        # by pairs, or the compiler makes all powers first and has no registers
        of_v, of_ds = gl.inline_asm_elementwise(
            ptx.capped_weights_asm(dtype == gl.float16, HIDES),
            ptx.CAPPED_WEIGHTS_OPERANDS,
            [t, lse_buf.load(LAYOUT).expand_dims(0), factor(terms)],
            dtype=(dtype.value, gl.float32),
            is_pure=True,
            pack=2,
        )
    else:
        if HAS_PAIRS and OTHERS == 0:
            # two operations a pair
            z = s * qk_scale - (lse2 - pairs.to(gl.float32) * terms.pairs[0].unit)
        else:
            z = scored(s, add_pairs(bias, pairs, terms) if HAS_PAIRS else bias, qk_scale, terms) - lse2
        of_ds = masked_exp2(z, w) if MASKED else exp2(z)
        of_v = of_ds
    if len(terms) > 0:  # noqa: SIM102
        if len(terms.dropout) == 1:
            of_ds = _turn_sign(of_ds, dropped)
            # under a cap by the sign bit, as the slope may be 0
            is_taken = of_ds.to(gl.int32, bitcast=True) < 0
            of_v = gl.where(is_taken, 0.0, of_v) if CAPPED else _pack_positive(of_ds, dtype)
    return of_v.to(dtype), of_ds


@gluon.jit
def score_gradient(of_ds, dp, delta_buf, terms, LESS_DELTA: gl.constexpr):
    """ds of weights `of_ds [ROWS, N]`. `LESS_DELTA`: without dropout dp is less delta already."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, dp.type.layout)
    DROPS: gl.constexpr = len(terms.dropout) == 1 if len(terms) > 0 else False
    if DROPS:
        # one by one, or the compiler has no registers
        ds = gl.inline_asm_elementwise(
            ptx.DROPPED_GRADIENT,
            "=f,f,f,f,f",
            [of_ds, dp, delta_buf.load(LAYOUT).expand_dims(0), terms.dropout[0].scale],
            dtype=gl.float32,
            is_pure=True,
            pack=1,
        )
    elif LESS_DELTA:
        ds = of_ds * dp
    else:
        # delta is read off the way to dp, and so late that registers are free
        ds = of_ds * (dp - delta_buf.load(LAYOUT).expand_dims(0))
    return ds


@gluon.jit
def add_key_sums(sums, ds):
    """`sums [ROWS, 4]`, of each thread of a quad, and those of `ds [ROWS, N]` over queries."""
    LAYOUT: gl.constexpr = sums.type.layout
    return sums + row_sum_partials(ds, LAYOUT)


@gluon.jit
def store_key_sums(k_sums, sums, column, q_heads, kv_len, G: gl.constexpr):
    """Write `sums [ROWS, 4]` of a column to fp32 `k_sums [batch, q_heads, kv_len]`."""
    total = gl.sum(sums, 1)
    LAYOUT: gl.constexpr = total.type.layout
    keys = column.tile * TILE + G * ROWS + gl.arange(0, ROWS, layout=LAYOUT)
    plane = (column.sample * q_heads + column.head).to(gl.int64) * kv_len
    gl.store(k_sums + plane + keys, total, mask=keys < kv_len)
