"""The forward kernel's masking and its one copy of the online softmax, on the scores `[ROWS, N]` of a warpgroup."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# query rows of a consumer group
ROWS = gl.constexpr(64)
# p may be as large as 2**HEADROOM, which fp16 holds with its full precision
HEADROOM = 8.0
# reference of a row that has met no key: finite, so that no difference is a NaN
LOWEST = gl.constexpr(-3.0e38)


@gluon.jit
def by_quads(x):
    """`x [ROWS, N]` of an accumulator as `[ROWS, N // 8, 4, 2]`: the third index is a thread of the quad."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def by_rows(x, LAYOUT: gl.constexpr):
    """Undo `by_quads`; nothing moves."""
    return gl.convert_layout(x.reshape([x.shape[0], x.shape[1] * 8]), LAYOUT, assert_trivial=True)


@gluon.jit
def no_words(BLOCK_N: gl.constexpr, S_LAYOUT: gl.constexpr):
    """int32 `[ROWS, 4]` zeros, in the layout that gives every thread what belongs to its own scores."""
    L4: gl.constexpr = by_quads(gl.zeros([ROWS, BLOCK_N], gl.int32, S_LAYOUT)).type.layout
    return gl.zeros([ROWS, 4], gl.int32, gl.SliceLayout(1, gl.SliceLayout(3, L4)))


@gluon.jit
def load_words(words, first_row, pred, W_LAYOUT: gl.constexpr):
    """int32 `[ROWS, 4]`: words of the rows of a tile that starts at `words`, all ones without `pred`."""
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, W_LAYOUT))
    offs = rows.expand_dims(1) * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, W_LAYOUT)).expand_dims(0)
    return gl.load(words + offs, mask=pred, other=-1)


@gluon.jit
def end_words(columns, W_LAYOUT: gl.constexpr):
    """int32 `[ROWS, 4]`: words of a tile that ends after `columns` of its 128 columns."""
    c = gl.arange(0, 4, layout=gl.SliceLayout(0, W_LAYOUT))
    # columns ascend with the bits of a word (mask/bits.py), so a word is a run of ones from its lowest bit
    bits = columns // 8 * 2 + gl.minimum(gl.maximum(columns % 8 - 2 * c, 0), 2)
    words = gl.where(bits == 32, -1, (1 << (bits & 31)) - 1)
    return words.expand_dims(0) + gl.zeros([ROWS, 4], gl.int32, W_LAYOUT)


@gluon.constexpr_function
def _hide_asm(n: int):
    """PTX that keeps `n` scores whose bit is set: of one thread, 4 at a time 2 of its first row, 2 of its second.

    One row after the other, with the bit as a constant: so ptxas moves several bits at once to predicates (R2P).
    """
    lines = []
    for row in (0, 2):
        for b in range(n // 2):
            i = b // 2 * 4 + row + b % 2
            lines.append(
                f"and.b32 t, ${2 * n + row}, {1 << b}; setp.ne.u32 p, t, 0; selp.f32 ${i}, ${n + i}, 0fFF800000, p;"
            )
    return "{ .reg .pred p; .reg .b32 t; " + "\n".join(lines) + " }"


@gluon.constexpr_function
def _hide_operands(n: int):
    return ",".join(["=f"] * n + ["f"] * n + ["r"] * n)


@gluon.jit
def hide(s, w):
    """Scores `s [ROWS, N]` where the pair attends, else -inf. `w [ROWS, 4]`: the words of the rows, low bits first."""
    N: gl.constexpr = s.shape[1] // 2
    LAYOUT: gl.constexpr = s.type.layout
    s4 = gl.inline_asm_elementwise(
        _hide_asm(N),
        _hide_operands(N),
        [by_quads(s), w.expand_dims(1).expand_dims(3)],
        dtype=gl.float32,
        is_pure=True,
        pack=N,
    )
    return by_rows(s4, LAYOUT)


@gluon.jit
def maxima(s, W_LAYOUT: gl.constexpr):
    """`[ROWS, 4]`: the largest of the scores `s [ROWS, N]` that each thread of a quad holds."""
    # by pairs, fours and fours: one chain over a row would wait for every comparison
    s5 = s.reshape([ROWS, s.shape[1] // 32, 4, 4, 2])
    return gl.convert_layout(gl.max(gl.max(gl.max(s5, 4), 2), 1), W_LAYOUT, assert_trivial=True)


@gluon.constexpr_function
def _follow_asm():
    """PTX for two rows: m and l in place, alpha out ($4, $5), largest exponent of this thread in ($10, $11)."""
    return (
        "{ .reg .pred p, q; .reg .f32 t, u, d, limit0, limit1; "
        f"add.f32 limit0, $0, {HEADROOM}; add.f32 limit1, $1, {HEADROOM}; "
        "setp.gt.f32 p, $10, limit0; setp.gt.or.f32 q, $11, limit1, p; vote.sync.any.pred p, q, 0xffffffff; "
        "mov.f32 $4, 0f3F800000; mov.f32 $5, 0f3F800000; @!p bra KEEP; "
        + "".join(
            f"shfl.sync.bfly.b32 t, ${10 + r}, 1, 31, 0xffffffff; max.f32 u, t, ${10 + r}; "
            "shfl.sync.bfly.b32 t, u, 2, 31, 0xffffffff; max.f32 u, t, u; "
            f"setp.gt.f32 q, u, limit{r}; selp.f32 u, u, ${r}, q; sub.f32 d, ${r}, u; mov.f32 ${r}, u; "
            f"ex2.approx.ftz.f32 ${4 + r}, d; mul.f32 ${2 + r}, ${2 + r}, ${4 + r}; "
            for r in range(2)
        )
        + "KEEP: }"
    )


@gluon.jit
def follow(m, l_i, top):
    """Let the reference `m` of exponents follow their maxima `top`: (m, `l_i` in its terms, alpha), all `[ROWS, 4]`.

    Any m that keeps `p` in range is exact, so m follows a maximum only when that has grown by 2**HEADROOM: most tiles
    leave every m of a warp where it was, and cost a vote.
    """
    return gl.inline_asm_elementwise(
        _follow_asm(),
        # alpha is written before the inputs are read for the last time
        "=f,=f,=f,=f,=&f,=&f,0,1,2,3,f,f",
        [m, l_i, top],
        dtype=(gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def exponents(s, m, qk_scale):
    """`s [ROWS, N] * qk_scale - m [ROWS, 4]`."""
    LAYOUT: gl.constexpr = s.type.layout
    return by_rows(by_quads(s) * qk_scale - m.expand_dims(1).expand_dims(3), LAYOUT)


@gluon.jit
def partial_sums(p, W_LAYOUT: gl.constexpr):
    """The part `[ROWS, 4]` of the row sums of `p [ROWS, N]` that each thread of a quad holds."""
    # one chain a row: the exponentials come no faster, and a tree keeps them waiting for registers
    return gl.convert_layout(gl.sum(gl.sum(by_quads(p), 3), 1), W_LAYOUT, assert_trivial=True)


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
    """`acc [ROWS, D] * alpha [ROWS, 4]`; where every alpha of a warp is 1 it costs a branch."""
    N: gl.constexpr = acc.shape[1] // 2
    LAYOUT: gl.constexpr = acc.type.layout
    W_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, by_quads(acc).type.layout))
    alpha = gl.convert_layout(alpha, W_LAYOUT, assert_trivial=True).expand_dims(1).expand_dims(3)
    acc4 = gl.inline_asm_elementwise(
        _rescale_asm(N), _rescale_operands(N), [by_quads(acc), alpha], dtype=gl.float32, is_pure=True, pack=N
    )
    return by_rows(acc4, LAYOUT)
