"""What the Hopper kernels do to scores beside masking them: bias, soft cap, dropout; equations (10) and (11).

A tile of scores lies as an accumulator: `[queries, keys]` forward, `[keys, queries]`, `BY_KEY`, backward. What is not
asked for is () in `Terms`, and no code of it is compiled.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.backends.hopper.kernels import ptx
from anymask.backends.hopper.kernels.words import to_quad_view
from anymask.scores import dropout

ROUNDS = gl.constexpr(dropout.ROUNDS)
MULTIPLIER_0 = gl.constexpr(dropout.MULTIPLIERS[0])
MULTIPLIER_1 = gl.constexpr(dropout.MULTIPLIERS[1])
KEY_STEP_0 = gl.constexpr(dropout.KEY_STEPS[0])
KEY_STEP_1 = gl.constexpr(dropout.KEY_STEPS[1])
LOW = gl.constexpr(0xFFFFFFFF)


class Vector(NamedTuple):
    """A bias of keys or of queries: fp32, contiguous, whole tiles long; strides of samples and heads, 0 if shared."""

    source: Any
    batch: Any
    head: Any


class Diagonals(NamedTuple):
    """A bias by distance: entry `i - j + origin` of query i and key j; fp32, contiguous, for whole tiles of both."""

    source: Any
    head: Any
    origin: Any


class Pairs(NamedTuple):
    """A bias of pairs, 16 bits, that the copy engine reads through a descriptor which a kernel has beside its `Terms`.

    `batch` and `head` are -1, or 0 where it is shared; `unit` is its factor. `samples`: (their number,) if they follow
    each other in the order of work tiles, else ().
    """

    batch: Any
    head: Any
    unit: Any
    samples: Any


class Dropout(NamedTuple):
    """Seed and offset, int64 `[2]`; the threshold of a pair's 16 bits; what kept weights are multiplied by."""

    seed: Any
    below: Any
    scale: Any


class Terms(NamedTuple):
    """All that is done to scores; () where something is not asked for.

    `qk_scale` of a call and all biases have the factor that `scored` leaves to `factor`: scores in base 2 are
    `factor * scored(...)`. Without a cap `factor` is 1, with a cap c it is `c log2(e)`, and 4 / c the unit of the rest.
    """

    # (`Vector`,)
    keys: Any
    # (`Vector`,)
    queries: Any
    # (`Diagonals`,)
    diagonals: Any
    # (`Pairs`,)
    pairs: Any
    # (factor,), with a cap
    cap: Any
    # (`Dropout`,)
    dropout: Any


@gluon.jit
def add(total, term):
    """The sum of two biases. -inf hides a pair whatever the other is, NaN too."""
    hidden = (total == -float("inf")) | (term == -float("inf"))
    return gl.where(hidden, -float("inf"), total + term)


@gluon.jit
def _load_vector(term, sample, head, start, index):
    base = term.source + (sample.to(gl.int64) * term.batch + head.to(gl.int64) * term.head + start)
    return gl.load(base + index)


@gluon.jit
def load_bias(
    terms,
    sample,
    head,
    start_q,
    start_k,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr,
    BY_KEY: gl.constexpr,
):
    """The bias of a tile that starts at query `start_q` and key `start_k`: fp32, broadcastable to `[ROWS, COLUMNS]`.

    0.0 without such a bias, and that of pairs is not in it. Beyond the lengths it is finite.
    """
    bias = load_key_bias(terms, sample, head, start_k, ROWS, COLUMNS, LAYOUT, BY_KEY)
    return add_bias(bias, terms, sample, head, start_q, start_k, ROWS, COLUMNS, LAYOUT, BY_KEY)


@gluon.jit
def load_key_bias(
    terms, sample, head, start_k, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr, BY_KEY: gl.constexpr
):
    """The part of `load_bias` that is the same for all queries; 0.0 without a bias of keys."""
    bias = 0.0
    if len(terms.keys) == 1:
        if BY_KEY:
            keys = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)).expand_dims(1)
        else:
            keys = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)).expand_dims(0)
        bias = _load_vector(terms.keys[0], sample, head, start_k, keys)
    return bias


@gluon.jit
def add_bias(
    bias,
    terms,
    sample,
    head,
    start_q,
    start_k,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr,
    BY_KEY: gl.constexpr,
):
    """`load_bias` from `bias`, its part of `load_key_bias`."""
    if len(terms.queries) == 1:
        if BY_KEY:
            queries = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)).expand_dims(0)
        else:
            queries = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)).expand_dims(1)
        of_queries = _load_vector(terms.queries[0], sample, head, start_q, queries)
        bias = add(bias, of_queries) if len(terms.keys) == 1 else of_queries
    if len(terms.diagonals) == 1:
        term = terms.diagonals[0]
        base = term.source + (head.to(gl.int64) * term.head + start_q - start_k + term.origin)
        by_distance = _load_diagonals(base, ROWS, COLUMNS, LAYOUT, BY_KEY)
        bias = add(bias, by_distance) if len(terms.keys) + len(terms.queries) > 0 else by_distance
    return bias


@gluon.jit
def _load_diagonals(base, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr, BY_KEY: gl.constexpr):
    """`[ROWS, COLUMNS]` of entries by distance; `base`: that of the first query and key.

    Of a thread's two rows, 8 apart, the second has the entries of the first one 8 columns before.
    """
    # [warp, 8 rows, 8 columns, pair of columns, column]: the first rows of threads
    L6: gl.constexpr = (
        gl.zeros([ROWS, COLUMNS], gl.int32, LAYOUT).reshape([ROWS // 16, 2, 8, COLUMNS // 8, 4, 2]).type.layout
    )
    x = gl.zeros([ROWS // 16, 8, COLUMNS // 8, 4, 2], gl.int32, gl.SliceLayout(1, L6))
    row = axis_of(x, 0) * 16 + axis_of(x, 1)
    column = axis_of(x, 3) * 2 + axis_of(x, 4)
    distance = column - row if BY_KEY else row - column
    step: gl.constexpr = 8 if BY_KEY else -8
    first = gl.load(base + (distance + axis_of(x, 2) * step))
    before = gl.load(base + (distance - step)) + gl.zeros_like(first)
    N: gl.constexpr = COLUMNS // 4
    second = gl.inline_asm_elementwise(
        ptx.shift_asm(N), ptx.shift_operands(N), [first, before], dtype=gl.float32, is_pure=True, pack=N
    )
    both = gl.join(first, second).permute((0, 5, 1, 2, 3, 4)).reshape([ROWS, COLUMNS])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def add_pairs(bias, pairs, terms):
    """The sum of `bias`, of `load_bias`, and `pairs`, the bias of pairs as it lies in memory."""
    of_pairs = pairs.to(gl.float32) * terms.pairs[0].unit
    return add(bias, of_pairs) if len(terms.keys) + len(terms.queries) + len(terms.diagonals) > 0 else of_pairs


@gluon.jit
def scored(s, bias, qk_scale, terms):
    """Scores `[ROWS, COLUMNS]` of products s, in base 2 but for `factor(terms)`.

    `bias`: of `load_bias`; with that of pairs, if there is one beside a cap or another bias.
    """
    z = s * qk_scale
    HAS_PAIRS: gl.constexpr = len(terms.pairs) + len(terms.cap) == 2
    if len(terms.keys) + len(terms.queries) + len(terms.diagonals) > 0 or HAS_PAIRS:
        z = z + bias
    if len(terms.cap) == 1:
        N: gl.constexpr = z.shape[1] // 2
        z = gl.inline_asm_elementwise(ptx.soft_cap_asm(N), ptx.in_place(N), [z], dtype=gl.float32, is_pure=True, pack=N)
    return z


@gluon.jit
def factor(terms):
    """What scores of `scored` are multiplied by."""
    if len(terms.cap) == 1:
        return terms.cap[0]
    else:
        return 1.0


@gluon.jit
def axis_of(x, D: gl.constexpr):
    """int32 indices along dimension D of a tensor, of size 1 along the others."""
    RANK: gl.constexpr = len(x.shape)
    LAYOUT: gl.constexpr = _slices(x.type.layout, D, RANK)
    i = gl.arange(0, x.shape[D], layout=LAYOUT)
    for d in gl.static_range(RANK):
        if d != D:
            i = i.expand_dims(d)
    return i


@gluon.constexpr_function
def _slices(layout: Any, d: int, rank: int) -> Any:
    """The layout of dimension `d` of `rank` alone."""
    for i in range(rank - 1, -1, -1):
        if i != d:
            layout = gl.SliceLayout(i, layout)
    return layout


@gluon.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Four words of uint32. Shapes broadcast as late as they can: the first rounds mix few numbers."""
    for i in gl.static_range(ROUNDS):
        product0 = c0.to(gl.uint64) * MULTIPLIER_0
        product1 = c2.to(gl.uint64) * MULTIPLIER_1
        round_k0 = ((k0.to(gl.uint64) + i * KEY_STEP_0) & LOW).to(gl.uint32)
        round_k1 = ((k1.to(gl.uint64) + i * KEY_STEP_1) & LOW).to(gl.uint32)
        c0 = (product1 >> 32).to(gl.uint32) ^ (c1 ^ round_k0)
        c2 = (product0 >> 32).to(gl.uint32) ^ (c3 ^ round_k1)
        c1 = (product1 & LOW).to(gl.uint32)
        c3 = (product0 & LOW).to(gl.uint32)
    return c0, c1, c2, c3


@gluon.jit
def load_seeds(terms):
    """What the generator of dropout starts from: the low half of the offset and two keys, uint32; zeros without it."""
    low, key_0, key_1 = 0, 0, 0
    if len(terms) > 0:  # noqa: SIM102
        if len(terms.dropout) == 1:
            drop = terms.dropout[0]
            seed, offset = gl.load(drop.seed).to(gl.uint64), gl.load(drop.seed + 1).to(gl.uint64)
            low, key_0 = (offset & LOW).to(gl.uint32), (seed & LOW).to(gl.uint32)
            key_1 = ((seed >> 32) ^ (offset >> 32)).to(gl.uint32)
    return low, key_0, key_1


@gluon.jit
def random_words(seeds, sample, head, q_number, k_number):
    """Four words of the generator for these numbers of pairs of queries and of four keys, of anymask/scores/dropout.py.

    `seeds`: of `load_seeds`. The words are those of the first query with keys k, k + 1 and k + 8, k + 9, and of the
    second; a pair has the low 15 bits of a half.
    """
    return _philox(
        q_number.to(gl.uint32),
        k_number.to(gl.uint32),
        (sample.to(gl.uint32) << 16) ^ head.to(gl.uint32),
        seeds[0],
        seeds[1],
        seeds[2],
    )


@gluon.jit
def least_kept(terms):
    """The least bits of a pair that is kept, in both halves of a word."""
    return terms.dropout[0].below.to(gl.uint32) * 0x10001


@gluon.jit
def words_of(like, terms, seeds, sample, head, start_q, start_k):
    """Random words int32 `[ROWS, N // 8, 4]` of a tile, one for each pair of weights that `pack_halves` makes.

    `like`: of their shape and layout. The tile starts at multiples of 16 queries and keys.
    """
    R: gl.constexpr = like.shape[0]
    C: gl.constexpr = like.shape[1]
    LAYOUT: gl.constexpr = like.type.layout
    x6 = gl.zeros([R, C, 4], gl.int32, LAYOUT).reshape([R // 16, 2, 8, C // 2, 2, 4])
    w0, w1, w2, w3 = random_words(
        seeds,
        sample,
        head,
        (start_q // 16 + axis_of(x6, 0)) * 8 + axis_of(x6, 2),
        (start_k // 16 + axis_of(x6, 3)) * 4 + axis_of(x6, 5),
    )
    q_half, k_half = axis_of(x6, 1), axis_of(x6, 4)
    word = gl.where(q_half == 0, gl.where(k_half == 0, w0, w1), gl.where(k_half == 0, w2, w3))
    word = gl.convert_layout(word.reshape([R, C, 4]), LAYOUT, assert_trivial=True)
    return word.to(gl.int32, bitcast=True)


@gluon.jit
def keep(terms, seeds, sample, head, start_q, start_k, like):
    """Whether dropout keeps the pairs of a tile, by queries: int1, of the shape of `like [ROWS, N]`."""
    LAYOUT: gl.constexpr = like.type.layout
    HALVES: gl.constexpr = gl.SliceLayout(3, to_quad_view(like).type.layout)
    packed = gl.zeros([like.shape[0], like.shape[1] // 8, 4], gl.int32, HALVES)
    words = words_of(packed, terms, seeds, sample, head, start_q, start_k)
    kept = gl.join(words & 0x7FFF, (words >> 16) & 0x7FFF) >= terms.dropout[0].below.to(gl.int32)
    return gl.convert_layout(kept.reshape(like.shape), LAYOUT, assert_trivial=True)


@gluon.jit
def drop(p, words, terms):
    """Weights `p [ROWS, N // 8, 4]`, of `pack_halves`, where dropout keeps them by their `words_of`, else 0."""
    return gl.inline_asm_elementwise(
        ptx.KEEP, "=r,r,r,r", [p, words, least_kept(terms)], dtype=gl.int32, is_pure=True, pack=1
    )
