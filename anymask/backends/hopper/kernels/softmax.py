"""The online softmax with lazy rescaling, as in FlashAttention-4, on the scores `[ROWS, N]` of a warpgroup.

Exponents are `z = s * qk_scale - m`, with the row max `m` of the steps before. Any m that keeps `p = 2**z` in range is
exact, so m moves only when an exponent exceeds 8. `update_row_max_plain` is the rule as tensor code.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.backends.hopper.kernels import ptx
from anymask.backends.hopper.kernels.words import ROWS, from_quad_view, to_quad_view

HEADROOM = gl.constexpr(8.0)
# ptx.py writes all three in hexadecimal
TINY = gl.constexpr(2.0**-60)
# of a row max under a bias: that of a tile of -1e9 would be rounded to 128, and exponents of the next tile with it
LOWEST = gl.constexpr(-(2.0**14))


@gluon.jit
def exp2(x):
    """2**x in one instruction; denormals are 0."""
    return gl.inline_asm_elementwise(ptx.EXP2, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _select(z, w, EXP2: gl.constexpr):
    N: gl.constexpr = z.shape[1] // 2
    LAYOUT: gl.constexpr = z.type.layout
    z4 = gl.inline_asm_elementwise(
        ptx.select_asm(N, EXP2),
        ptx.select_operands(N),
        [to_quad_view(z), w.expand_dims(1).expand_dims(3)],
        dtype=gl.float32,
        is_pure=True,
        pack=N,
    )
    return from_quad_view(z4, LAYOUT)


@gluon.jit
def mask_exponents(z, w):
    """Exponents `z [ROWS, N]` where pairs attend, else -inf. `w [ROWS, 4]`: the words of the rows, low bits first."""
    return _select(z, w, False)


@gluon.jit
def masked_exp2(z, w):
    """`2**z [ROWS, N]` where pairs attend, else 0, whatever z is there."""
    return _select(z, w, True)


@gluon.jit
def masked(x, w):
    """`x [ROWS, N]` where pairs attend, else 0, whatever x is there."""
    N: gl.constexpr = x.shape[1] // 2
    LAYOUT: gl.constexpr = x.type.layout
    x4 = gl.inline_asm_elementwise(
        ptx.zero_asm(N),
        ptx.sign_operands(N),
        [to_quad_view(x), w.expand_dims(1).expand_dims(3)],
        dtype=gl.float32,
        is_pure=True,
        pack=N,
    )
    return from_quad_view(x4, LAYOUT)


@gluon.jit
def exponents(s, m, qk_scale):
    """`s [ROWS, N] * qk_scale - m [ROWS, 4]`."""
    LAYOUT: gl.constexpr = s.type.layout
    return from_quad_view(to_quad_view(s) * qk_scale - m.expand_dims(1).expand_dims(3), LAYOUT)


@gluon.jit
def update_row_max(z, m, w, W_LAYOUT: gl.constexpr, PLAIN: gl.constexpr, LIMITED: gl.constexpr):
    """Let the row max `m [ROWS, 4]` of exponents `z [ROWS, N]` follow them: (z in its terms, m, alpha).

    A row that has met no key has m = 0, and no other row has. `w [ROWS, 4]`, if not None: words of the rows; pairs that
    they mask out are not in a row max. Where no exponent of a warp exceeds 8 and every row has met a key, which is so
    in most steps, it costs a comparison each and a vote, and leaves the z of masked pairs as they are.

    PLAIN takes `update_row_max_plain` in place of PTX: the same z, m and alpha of pairs that attend, bit for bit.
    LIMITED: m is at least LOWEST. A row that has met lower scores alone has sums of 0, as one without a key.
    """
    if PLAIN:
        z, m, alpha = update_row_max_plain(z, m, w, W_LAYOUT, LIMITED)
    else:
        N: gl.constexpr = z.shape[1] // 2
        LAYOUT: gl.constexpr = z.type.layout
        HAS_WORDS: gl.constexpr = w is not None
        rows = [to_quad_view(z), m.to(gl.int32, bitcast=True).expand_dims(1).expand_dims(3)]
        z4, rest = gl.inline_asm_elementwise(
            ptx.update_row_max_asm(N, HAS_WORDS, LIMITED),
            ptx.update_row_max_operands(N, HAS_WORDS),
            rows + [w.expand_dims(1).expand_dims(3)] if HAS_WORDS else rows,
            dtype=(gl.float32, gl.int32),
            is_pure=True,
            pack=N,
        )
        # of the N // 4 summands one is not 0: no addition is left
        m, alpha = gl.split(rest)
        m = gl.convert_layout(gl.sum(m, 1), W_LAYOUT, assert_trivial=True).to(gl.float32, bitcast=True)
        alpha = gl.convert_layout(gl.sum(alpha, 1), W_LAYOUT, assert_trivial=True).to(gl.float32, bitcast=True)
        z = from_quad_view(z4, LAYOUT)
    return z, m, alpha


@gluon.jit
def update_row_max_plain(z, m, w, W_LAYOUT: gl.constexpr, LIMITED: gl.constexpr):
    """`update_row_max` as tensor code, slower: it finds every row max in every step."""
    if w is not None:
        z = mask_exponents(z, w)
    # [ROWS, 4]: the largest exponent of a row, once for each thread of the quad
    top = gl.max(gl.convert_layout(gl.max(gl.max(to_quad_view(z), 3), 1), W_LAYOUT, assert_trivial=True), 1)
    top = top.expand_dims(1) + gl.zeros([ROWS, 4], gl.float32, W_LAYOUT)
    has_key = m != 0.0
    moves = top > gl.where(has_key, HEADROOM, -float("inf"))
    # kept 2**-60 away from 0, the row max of a row that has met no key
    new = gl.where(m + top < 0.0, gl.minimum(m + top, -TINY), gl.maximum(m + top, TINY))
    if LIMITED:
        new = gl.maximum(new, LOWEST)
    shift = gl.where(moves, new, m) - m
    alpha = gl.where(has_key, exp2(-shift), 1.0)
    return exponents(z, shift, 1.0), gl.where(moves, new, m), alpha


@gluon.jit
def row_sum_partials(p, W_LAYOUT: gl.constexpr):
    """The part `[ROWS, 4]` of the row sums of `p [ROWS, N]` that each thread of a quad holds."""
    # one chain a row: the exponentials come no faster, and a tree keeps them waiting for registers
    return gl.convert_layout(gl.sum(gl.sum(to_quad_view(p), 3), 1), W_LAYOUT, assert_trivial=True)


@gluon.jit
def pack_halves(x, dtype: gl.constexpr):
    """`x [ROWS, N]` in 16 bits, two of them in each int32 `[ROWS, N // 8, 4]` (docs/kernels.md, finding 6)."""
    low, high = gl.split(to_quad_view(x))
    return gl.inline_asm_elementwise(
        ptx.pack_halves(dtype == gl.float16), "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unpack_halves(p, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """The `[ROWS, N]` that were packed to `p`."""
    low, high = gl.inline_asm_elementwise(
        ptx.UNPACK_HALVES, "=h,=h,r", [p], dtype=(dtype.value, dtype.value), is_pure=True, pack=1
    )
    pairs = gl.join(low, high)
    return gl.convert_layout(pairs.reshape([ROWS, p.shape[1] * 8]), LAYOUT, assert_trivial=True)


@gluon.jit
def after(l_i, words):
    """`l_i [ROWS, 4]`, at least 0, which ptxas takes to depend on all of int32 `words [ROWS, N // 8, 4]`."""
    N: gl.constexpr = words.shape[1] * 2
    any_bit = gl.inline_asm_elementwise(
        ptx.any_asm(N), ptx.any_operands(N), [words], dtype=gl.int32, is_pure=True, pack=N
    )
    any_bit = gl.convert_layout(gl.sum(any_bit, 1), l_i.type.layout, assert_trivial=True)
    return gl.inline_asm_elementwise(ptx.SAME_FLOAT, "=f,f,r", [l_i, any_bit], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def needs_rescale(alpha, l_i):
    """int32 `[ROWS, 4]`: not 0 in a warp in which an `alpha` is not 1.

    The vote stays in its place and depends on the row sums `l_i`, and so pins the exponentials before the wait that
    follows it (docs/kernels.md, finding 5).
    """
    return gl.inline_asm_elementwise(
        ptx.VOTE_RESCALE, "=r,=r,f,f,f,f", [alpha, l_i], dtype=gl.int32, is_pure=False, pack=2
    )


@gluon.jit
def rescale(acc, alpha, needed):
    """`acc [ROWS, D] * alpha [ROWS, 4]`; where it is not `needed` by a warp it costs a branch."""
    N: gl.constexpr = acc.shape[1] // 2
    LAYOUT: gl.constexpr = acc.type.layout
    W_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, to_quad_view(acc).type.layout))
    alpha = gl.convert_layout(alpha, W_LAYOUT, assert_trivial=True).expand_dims(1).expand_dims(3)
    needed = gl.convert_layout(needed, W_LAYOUT, assert_trivial=True).expand_dims(1).expand_dims(3)
    acc4 = gl.inline_asm_elementwise(
        ptx.rescale_asm(N), ptx.rescale_operands(N), [to_quad_view(acc), alpha, needed],
        dtype=gl.float32, is_pure=True, pack=N,
    )  # fmt: skip
    return from_quad_view(acc4, LAYOUT)
