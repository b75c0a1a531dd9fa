"""What the Hopper backward kernel does to scores beside masking them; equations (10) and (11), on transposed scores.

Weights of a step have a sign: those that dropout takes away are below 0, so that a step needs to keep no bits beside
them until dp is there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.backends.hopper.kernels.pipeline import TILE
from anymask.backends.hopper.kernels.softmax import exp2, masked_exp2, row_sum_partials
from anymask.backends.hopper.kernels.terms import add_bias, factor, keep, load_key_bias, scored
from anymask.backends.hopper.kernels.words import ROWS


@gluon.jit
def column_bias(terms, column, like, G: gl.constexpr):
    """The bias of the keys of a column, for `like [ROWS, N]` scores of consumer warpgroup G; 0.0 without one."""
    LAYOUT: gl.constexpr = like.type.layout
    start = column.tile * TILE + G * ROWS
    return load_key_bias(terms, column.sample, column.head, start, like.shape[0], like.shape[1], LAYOUT, True)


@gluon.jit
def step_terms(terms, seeds, of_keys, column, start_q, like, G: gl.constexpr):
    """The bias of a step, 0.0 without one, and which weights dropout keeps, 0 without it; see `column_bias`."""
    sample, head, start_k = column.sample, column.head, column.tile * TILE + G * ROWS
    LAYOUT: gl.constexpr = like.type.layout
    bias = add_bias(of_keys, terms, sample, head, start_q, start_k, like.shape[0], like.shape[1], LAYOUT, True)
    kept = 0
    if len(terms.dropout) == 1:
        kept = keep(terms, seeds, sample, head, start_q, start_k, like, True)
    return bias, kept


@gluon.jit
def weights_and_slopes(s, lse2, w, bias, kept, qk_scale, terms, MASKED: gl.constexpr):
    """Of products `s [ROWS, N]`: the weights of v, and those of ds, with the slope of a soft cap and a sign."""
    t = scored(s, bias, qk_scale, terms)
    z = t * factor(terms) - lse2.expand_dims(0)
    p = masked_exp2(z, w) if MASKED else exp2(z)
    of_v, of_ds = p, p
    if len(terms.cap) == 1:
        # of a hidden pair it would be -inf or NaN, and is 0
        of_ds = p * gl.maximum(1.0 - t * t, 0.0)
    if len(terms.dropout) == 1:
        of_v = gl.where(kept, p, 0.0)
        of_ds = gl.where(kept, of_ds, -of_ds)
    return of_v, of_ds


@gluon.jit
def score_gradient(of_ds, dp, delta, terms, LESS_DELTA: gl.constexpr):
    """ds of weights `of_ds [ROWS, N]`; `delta [N]`. `LESS_DELTA`: without dropout dp is less delta already."""
    delta = delta.expand_dims(0)
    if len(terms.dropout) == 1:
        ds = of_ds * gl.where(of_ds > 0.0, dp * terms.dropout[0].scale - delta, delta)
    elif LESS_DELTA:
        ds = of_ds * dp
    else:
        ds = of_ds * (dp - delta)
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
