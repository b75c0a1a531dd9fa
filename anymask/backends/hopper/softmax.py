"""The forward kernel's masking and its one copy of the online softmax, on the scores `[ROWS, TILE]` of a warpgroup."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.backends.hopper.tiles import TILE

# query rows of a consumer group
ROWS = gl.constexpr(64)
# p may be as large as 2**HEADROOM, which fp16 holds with its full precision
HEADROOM = gl.constexpr(8.0)


@gluon.jit
def no_words(S_LAYOUT: gl.constexpr):
    """int32 `[ROWS, 4]` zeros, in the layout that gives every thread the words of its own scores."""
    L4: gl.constexpr = gl.zeros([ROWS, TILE], gl.int32, S_LAYOUT).reshape([ROWS, TILE // 8, 4, 2]).type.layout
    return gl.zeros([ROWS, 4], gl.int32, gl.SliceLayout(1, gl.SliceLayout(3, L4)))


@gluon.jit
def load_words(words, first_row, pred, other, W_LAYOUT: gl.constexpr):
    """int32 `[ROWS, 4]`: words of the rows of a tile that starts at `words`, `other` without `pred`."""
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, W_LAYOUT))
    offs = rows.expand_dims(1) * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, W_LAYOUT)).expand_dims(0)
    return gl.load(words + offs, mask=pred, other=other)


@gluon.jit
def end_words(columns, W_LAYOUT: gl.constexpr):
    """int32 `[ROWS, 4]`: words of a tile that ends after `columns` of its 128 columns."""
    c = gl.arange(0, 4, layout=gl.SliceLayout(0, W_LAYOUT))
    # columns ascend with the bits of a word (mask/bits.py), so a word is a run of ones from its lowest bit
    bits = columns // 8 * 2 + gl.minimum(gl.maximum(columns % 8 - 2 * c, 0), 2)
    words = gl.where(bits == 32, -1, (1 << (bits & 31)) - 1)
    return words.expand_dims(0) + gl.zeros([ROWS, 4], gl.int32, W_LAYOUT)


@gluon.constexpr_function
def _hide_asm():
    """PTX that keeps 64 scores whose bit is set: of one thread, 4 at a time 2 of its first row, 2 of its second.

    One row after the other, with the bit as a constant: so ptxas moves several bits at once to predicates (R2P).
    """
    lines = []
    for row in (0, 2):
        for b in range(32):
            i = b // 2 * 4 + row + b % 2
            lines.append(
                f"and.b32 t, ${128 + row}, {1 << b}; setp.ne.u32 p, t, 0; selp.f32 ${i}, ${64 + i}, 0fFF800000, p;"
            )
    return "{ .reg .pred p; .reg .b32 t; " + "\n".join(lines) + " }"


@gluon.constexpr_function
def _hide_operands():
    return ",".join(["=f"] * 64 + ["f"] * 64 + ["r"] * 64)


@gluon.jit
def hide(s, w):
    """Scores `s [ROWS, TILE]` where the pair attends, else -inf. `w [ROWS, 4]` are the words of the rows."""
    LAYOUT: gl.constexpr = s.type.layout
    s4 = s.reshape([ROWS, TILE // 8, 4, 2])
    s4 = gl.inline_asm_elementwise(
        _hide_asm(), _hide_operands(), [s4, w.expand_dims(1).expand_dims(3)], dtype=gl.float32, is_pure=True, pack=64
    )
    return gl.convert_layout(s4.reshape([ROWS, TILE]), LAYOUT, assert_trivial=True)


@gluon.constexpr_function
def _rescale_asm(n: int):
    """PTX that multiplies `n` elements of a thread by their factors, unless those of all its warp are 1."""
    lines = [f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)]
    return (
        "{ .reg .pred p, q; "
        f"setp.neu.f32 p, ${2 * n}, 0f3F800000; setp.neu.or.f32 q, ${2 * n + 2}, 0f3F800000, p; "
        "vote.sync.any.pred p, q, 0xffffffff; @!p bra KEEP; " + "\n".join(lines) + " KEEP: }"
    )


@gluon.constexpr_function
def _rescale_operands(n: int):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def rescale(acc, alpha):
    """`acc [ROWS, D] * alpha [ROWS]`; most tiles leave every maximum where it was, and cost a branch."""
    D: gl.constexpr = acc.shape[1]
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout), assert_trivial=True).expand_dims(1)
    return gl.inline_asm_elementwise(
        _rescale_asm(D // 2), _rescale_operands(D // 2), [acc, alpha], dtype=gl.float32, is_pure=True, pack=D // 2
    )


@gluon.jit
def softmax_step(s, m_i, qk_scale):
    """Fold scores `s [ROWS, TILE]` into the reference `m` of the exponents: (exponents of p, m, exponent of alpha).

    Any m that keeps `p` in range is exact, so m follows the maximum only when that has grown by 2**HEADROOM.
    """
    # by pairs, fours and fours: one chain over a row would wait for every comparison
    s5 = s.reshape([ROWS, 4, 4, 4, 2])
    m_max = gl.max(gl.max(gl.max(gl.max(s5, 4), 2), 1), 1) * qk_scale
    m_max = gl.convert_layout(m_max, gl.SliceLayout(1, s.type.layout), assert_trivial=True)
    m_new = gl.where(m_max > m_i + HEADROOM, m_max, m_i)
    # a row with no key yet has m = -inf, and -inf - -inf would be NaN
    m_safe = gl.where(m_new == -float("inf"), 0.0, m_new)
    return s * qk_scale - m_safe.expand_dims(1), m_new, m_i - m_safe


@gluon.jit
def partial_sums(p):
    """The part `[ROWS, 4]` of the row sums of `p [ROWS, TILE]` that each thread of a quad holds."""
    return gl.sum(gl.sum(p.reshape([ROWS, TILE // 8, 4, 2]), 3), 1)


@gluon.jit
def decay_sums(l_i, alpha):
    """`l_i [ROWS, 4] * alpha [ROWS]`."""
    return l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout), assert_trivial=True).expand_dims(1)
