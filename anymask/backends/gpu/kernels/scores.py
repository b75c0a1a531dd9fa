"""What kernels do to scores beside masking them: biases, lookups in tables, soft cap, dropout, and their derivatives.

A kernel that gets no `Terms` is compiled without any of this.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from anymask.backends.gpu.kernels.dropout import keep_pairs
from anymask.tiles import TILE

STRIP = tl.constexpr(TILE)


class Bias(NamedTuple):
    """A dense term: a pointer and its strides.

    `batch` and `head` are 0 where it is shared, `q` and `k` are () there, else `(stride,)` and `(stride, stride)`:
    Triton before 3.9 takes functions for the same whose arguments have as many leaves of the same types, so a term of
    queries after one of keys would be read as one of keys.
    """

    source: Any
    batch: Any
    head: Any
    q: Any
    k: Any


class Table(NamedTuple):
    """A term read from `table[head, q_code[i] - k_code[j]]`, or from `table[head, i - j + kv_len - 1]`.

    `head` is the stride of the heads, 0 if they share the table; `codes` are two pointers, or () for positions.
    """

    source: Any
    head: Any
    codes: Any


class Tiled(NamedTuple):
    """The term that the copy engine reads, if any: through a descriptor that a kernel has beside its `Terms`.

    `batch` and `head` are 1, or 0 where it is shared. `strips`: () of a dense term; of a table `(query tiles,)`, whose
    diagonals of tiles lie one below the other, 128 x 128 each, from the last query tile and first kv tile on.
    """

    batch: Any
    head: Any
    strips: Any


class Terms(NamedTuple):
    """All that is done to scores; () where something is not asked for, as Triton compares no tuple with a None in it.

    Scores are held in base 2: `z = qk_scale * s + bias_scale * bias`, and with a soft cap `z` is `log2(e)` times two
    over the cap, so that `cap * tanh` of it, `cap` in base 2, comes of one exponential.
    """

    dense: Any
    tables: Any
    # (Tiled,)
    tiled: Any
    bias_scale: Any
    # (cap,)
    cap: Any
    # (fp32 [q_heads],)
    sinks: Any
    # `Dropout`
    dropout: Any


class Dropout(NamedTuple):
    """Seed and offset, int64 `[2]`; the threshold of a pair's 16 bits, a float as integers are specialised on."""

    seed: Any
    below: Any
    scale: Any


class Scoring(NamedTuple):
    """How a program makes scores: `qk_scale` alone, or `Terms` of a sample and head. Tiles start at `start`.

    `blocks`: a descriptor of blocks of a step's size, of the term that is `Tiled`, or None.
    `start` is the first query of a program that holds queries, the first key of one that holds keys.
    """

    qk_scale: Any
    terms: Any
    blocks: Any
    off_b: Any
    off_h: Any
    q_len: Any
    kv_len: Any
    start: Any


class Stats(NamedTuple):
    """Pointers to `lse2` and `delta` of a head's queries."""

    lse2: Any
    delta: Any


@triton.jit
def _load_bias(term, x, q_index, k_index):
    """A dense term of pairs, fp32, of a shape that broadcasts to theirs; 0 beyond the lengths."""
    ptrs = term.source + x.off_b.to(tl.int64) * term.batch + x.off_h.to(tl.int64) * term.head
    if len(term.q) == 1:
        ptrs += q_index.to(tl.int64) * term.q[0]
    if len(term.k) > 0:
        ptrs += k_index.to(tl.int64) * term.k[0]
    if len(term.q) + len(term.k) == 3:
        value = tl.load(ptrs, mask=(q_index < x.q_len) & (k_index < x.kv_len), other=0.0)
    elif len(term.q) == 1:
        value = tl.load(ptrs, mask=q_index < x.q_len, other=0.0)
    elif len(term.k) > 0:
        value = tl.load(ptrs, mask=k_index < x.kv_len, other=0.0)
    else:
        # a block, since the interpreter cannot spread a scalar
        value = tl.load(ptrs + 0 * q_index)
    return value.to(tl.float32)


@triton.jit
def _load_tiled(term, x, start_q, start_k, QUERIES: tl.constexpr, KEYS: tl.constexpr, BY_KEY: tl.constexpr):
    """A block of a term that the copy engine reads, fp32; 0 beyond its edges."""
    row, column = start_q, start_k
    if len(term.strips) == 1:
        row = (start_k // STRIP - start_q // STRIP + term.strips[0] - 1) * STRIP + start_q % STRIP
        column = start_k % STRIP
    block = x.blocks.load([x.off_b * term.batch, x.off_h * term.head, row, column])
    value = tl.reshape(block, [QUERIES, KEYS])
    if BY_KEY:
        value = value.T
    return value.to(tl.float32)


@triton.jit
def _look_up(term, x, q_index, k_index):
    """A term from a table of pairs, fp32; 0 beyond the lengths."""
    inside = (q_index < x.q_len) & (k_index < x.kv_len)
    if len(term.codes) == 0:
        entry = q_index - k_index + (x.kv_len - 1)
    else:
        q_code = tl.load(term.codes[0] + q_index, mask=q_index < x.q_len, other=0)
        entry = q_code - tl.load(term.codes[1] + k_index, mask=k_index < x.kv_len, other=0)
    return tl.load(term.source + x.off_h.to(tl.int64) * term.head + entry, mask=inside, other=0.0)


@triton.jit
def _add(total, term):
    """The sum of two terms. -inf hides a pair whatever the other is, NaN too."""
    hidden = (total == -float("inf")) | (term == -float("inf"))
    return tl.where(hidden, -float("inf"), total + term)


@triton.jit
def soft_cap(z, cap, EXACT: tl.constexpr):
    """`cap * tanh` of scores that were scaled by 2 log2(e), and its derivative, from one exponential.

    tanh(y) = (1 - e) / (1 + e) with e = exp(-2 |y|), whose derivative is 4 e / (1 + e)**2. The numerator cancels for
    small y; with `EXACT` a polynomial stands for it there.
    """
    e = tl.math.exp2(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    t = (1.0 - e) * r
    t = tl.where(z < 0, -t, t)
    if EXACT:
        # tanh(y) / y in powers of y**2, by least squares at Chebyshev nodes of |y| < 0.55: to 1e-9
        y = z * 0.34657359027997264
        y2 = y * y
        rest = -0.3333331048488617 + y2 * (
            0.13332468271255493 + y2 * (-0.05384336784482002 + y2 * (0.021042168140411377 + y2 * -0.006238845642656088))
        )
        t = tl.where(tl.abs(y) < 0.55, y + y * (y2 * rest), t)
    capped = tl.where(z == -float("inf"), -float("inf"), cap * t)
    return capped, 4.0 * e * r * r


@triton.jit
def score_pairs(
    s, x, start_q, start_k, QUERIES: tl.constexpr, KEYS: tl.constexpr, BY_KEY: tl.constexpr, EXACT: tl.constexpr
):
    """Scores in base 2 of products `s [QUERIES, KEYS]`, and the derivative of the soft cap, 1.0 without one.

    With `BY_KEY` all are transposed.
    """
    terms = x.terms
    z = s * x.qk_scale
    DENSE: tl.constexpr = len(terms.dense)
    TABLES: tl.constexpr = len(terms.tables)
    if BY_KEY:
        q_index = (start_q + tl.arange(0, QUERIES))[None, :]
        k_index = (start_k + tl.arange(0, KEYS))[:, None]
    else:
        q_index = (start_q + tl.arange(0, QUERIES))[:, None]
        k_index = (start_k + tl.arange(0, KEYS))[None, :]
    if DENSE + TABLES + len(terms.tiled) > 0:
        # sums start with what every other term is added to
        if len(terms.tiled) == 1:
            bias = _load_tiled(terms.tiled[0], x, start_q, start_k, QUERIES, KEYS, BY_KEY)
        elif DENSE > 0:
            bias = _load_bias(terms.dense[0], x, q_index, k_index)
        else:
            bias = _look_up(terms.tables[0], x, q_index, k_index)
        for i in tl.static_range(1 - len(terms.tiled), DENSE):
            bias = _add(bias, _load_bias(terms.dense[i], x, q_index, k_index))
        for i in tl.static_range(0 if DENSE + len(terms.tiled) > 0 else 1, TABLES):
            bias = _add(bias, _look_up(terms.tables[i], x, q_index, k_index))
        z += bias * terms.bias_scale
    slope = 1.0
    if len(terms.cap) == 1:
        z, slope = soft_cap(z, terms.cap[0], EXACT)
    return z, slope


@triton.jit
def score_gradient(p, dp, delta, slope, kept, terms):
    """ds of weights `p` before dropout, by equation (7), through dropout and the soft cap.

    `kept`: int1 of dropout, unused without it.
    """
    if len(terms.dropout) > 0:
        dp = tl.where(kept, dp, 0.0) * terms.dropout.scale
    ds = p * (dp - delta)
    if len(terms.cap) == 1:
        # of a hidden pair the derivative may be NaN
        ds = tl.where(p == 0.0, 0.0, ds * slope)
    return ds


@triton.jit
def keep(x, start_q, start_k, QUERIES: tl.constexpr, KEYS: tl.constexpr, BY_KEY: tl.constexpr):
    """`keep_pairs` of a tile; True without dropout."""
    kept = True
    if len(x.terms.dropout) > 0:
        dropout = x.terms.dropout
        kept = keep_pairs(dropout.seed, dropout.below, x.off_b, x.off_h, start_q, start_k, QUERIES, KEYS, BY_KEY)
    return kept
