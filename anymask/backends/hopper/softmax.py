"""The forward kernel's masking and its one copy of the online softmax, on the scores `[ROWS, N]` of a warpgroup."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# query rows of a consumer group
ROWS = gl.constexpr(64)
# p may be as large as 2**8, which fp16 holds with its full precision
HEADROOM = "41000000"  # 8.0
# the reference of a row that has met a key is at least this far from 0, which is that of one that has met none
TINY = "21800000"  # 2**-60


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
def load_words(words, first_row, pred, mask_rows, W_LAYOUT: gl.constexpr, PACK_GQA: gl.constexpr):
    """int32 `[ROWS, 4]`: words of the rows of a tile that starts at `words`, all ones without `pred`.

    PACK_GQA: rows of several heads, which have the same `mask_rows` of the mask.
    """
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, W_LAYOUT))
    if PACK_GQA:
        rows = rows % mask_rows
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
def _of_row(n: int, row: int):
    """Which of the `n` scores of a thread are of its first row, 0, or of its second, 2: 4 at a time 2 of each."""
    return [i for i in range(n) if i & 2 == row]


@gluon.constexpr_function
def _attends(word: str, b: int):
    """PTX for `p`, bit `b` of a word; a constant, so that ptxas moves several bits at once to predicates (R2P)."""
    return f"and.b32 x, {word}, {1 << b}; setp.ne.u32 p, x, 0;"


@gluon.constexpr_function
def _where_asm(n: int, powers: bool):
    """PTX that keeps `n` exponents of a thread, or powers of 2, whose bit is set, one row after the other."""
    lines = []
    for row in (0, 2):
        for b, i in enumerate(_of_row(n, row)):
            lines.append(_attends(f"${2 * n + row}", b))
            if powers:
                lines.append(f"ex2.approx.ftz.f32 t, ${n + i}; selp.f32 ${i}, t, 0f00000000, p;")
            else:
                lines.append(f"selp.f32 ${i}, ${n + i}, 0fFF800000, p;")
    return "{ .reg .pred p; .reg .b32 x; .reg .f32 t; " + "\n".join(lines) + " }"


@gluon.constexpr_function
def _where_operands(n: int):
    return ",".join(["=f"] * n + ["f"] * n + ["r"] * n)


@gluon.jit
def _where(z, w, POWERS: gl.constexpr):
    N: gl.constexpr = z.shape[1] // 2
    LAYOUT: gl.constexpr = z.type.layout
    z4 = gl.inline_asm_elementwise(
        _where_asm(N, POWERS),
        _where_operands(N),
        [by_quads(z), w.expand_dims(1).expand_dims(3)],
        dtype=gl.float32,
        is_pure=True,
        pack=N,
    )
    return by_rows(z4, LAYOUT)


@gluon.jit
def hide(z, w):
    """Exponents `z [ROWS, N]` where pairs attend, else -inf. `w [ROWS, 4]`: the words of the rows, low bits first."""
    return _where(z, w, False)


@gluon.jit
def exp2_where(z, w):
    """`2**z [ROWS, N]` where pairs attend, else 0, whatever z is there."""
    return _where(z, w, True)


@gluon.jit
def exponents(s, m, qk_scale):
    """`s [ROWS, N] * qk_scale - m [ROWS, 4]`."""
    LAYOUT: gl.constexpr = s.type.layout
    return by_rows(by_quads(s) * qk_scale - m.expand_dims(1).expand_dims(3), LAYOUT)


@gluon.constexpr_function
def _follow_asm(n: int, hides: bool):
    """PTX for the `n` exponents of a thread, in place.

    Then come, as bits, for each element of these rows: m of the first row in place, its alpha, m of the second, its
    alpha, and zeros. If it `hides`, words follow.
    """
    # floats above 0 have the order of their bits, the others are negative in both; two maxima are one VIMNMX3
    chains = "abcd"
    lines = [f"mov.b32 {c}, ${i};" for i, c in enumerate(chains)]
    for i in range(4, n, 2):
        c = chains[i // 2 % 4]
        lines.append(f"mov.b32 x, ${i}; mov.b32 y, ${i + 1}; max.s32 {c}, {c}, x; max.s32 {c}, {c}, y;")
    lines.append(f"max.s32 a, a, b; max.s32 a, a, c; max.s32 a, a, d; setp.gt.s32 p, a, 0x{HEADROOM};")
    # a product of 0, or of 0 and infinity: one of the rows has met no key
    lines.append(
        f"mul.f32 t, ${n}, ${n + 2}; setp.equ.or.f32 q, t, 0f00000000, p; vote.sync.any.pred p, q, 0xffffffff;"
    )
    lines.append(f"mov.b32 ${n + 1}, 0x3F800000; mov.b32 ${n + 3}, 0x3F800000;")
    lines += [f"mov.b32 ${i}, 0;" for i in range(n + 4, 2 * n)]
    lines.append("@!p bra KEEP;")
    for row in (0, 2):
        m, alpha = f"${n + row}", f"${n + row + 1}"
        elements = [f"${i}" for i in _of_row(n, row)]
        if hides:
            for b, z in enumerate(elements):
                lines.append(_attends(f"${4 * n + row}", b) + f" selp.f32 {z}, {z}, 0fFF800000, p;")
        lines.append(f"mov.b32 u, {elements[0]};")
        lines += [f"max.f32 u, u, {x};" for x in elements[1:]]
        lines += [f"shfl.sync.bfly.b32 t, u, {lanes}, 31, 0xffffffff; max.f32 u, u, t;" for lanes in (1, 2)]
        lines.append(
            f"""
            setp.eq.f32 p, {m}, 0f00000000; selp.f32 t, 0fFF800000, 0f{HEADROOM}, p; setp.gt.f32 q, u, t;
            add.f32 u, u, {m}; abs.f32 t, u; max.f32 t, t, 0f{TINY}; copysign.f32 t, u, t;
            selp.f32 t, t, {m}, q; sub.f32 u, t, {m}; mov.b32 {m}, t;
            neg.f32 t, u; ex2.approx.ftz.f32 t, t; selp.f32 {alpha}, 0f3F800000, t, p;
            """
        )
        lines += [f"sub.f32 {x}, {x}, u;" for x in elements]
    return "{ .reg .pred p, q; .reg .b32 a, b, c, d, x, y; .reg .f32 t, u; " + "\n".join(lines) + " KEEP: }"


@gluon.constexpr_function
def _follow_operands(n: int, hides: bool):
    return ",".join(["=f"] * n + ["=r"] * n + [str(i) for i in range(2 * n)] + ["r"] * (n * hides))


@gluon.jit
def follow(z, m, w, W_LAYOUT: gl.constexpr):
    """Let the reference `m [ROWS, 4]` of exponents `z [ROWS, N]` follow their maxima: (z in its terms, m, alpha).

    Any m that keeps `p` in range is exact, so m follows a maximum only when that has grown by 2**8: most steps leave
    every m of a warp where it was, and cost a vote. A row that has met no key has m = 0, and no other row has.

    `w [ROWS, 4]`, if not None: words of the rows. Pairs that they hide may call for the maxima, but are not in them.
    """
    N: gl.constexpr = z.shape[1] // 2
    LAYOUT: gl.constexpr = z.type.layout
    HIDES: gl.constexpr = w is not None
    rows = [by_quads(z), m.to(gl.int32, bitcast=True).expand_dims(1).expand_dims(3)]
    z4, rest = gl.inline_asm_elementwise(
        _follow_asm(N, HIDES),
        _follow_operands(N, HIDES),
        rows + [w.expand_dims(1).expand_dims(3)] if HIDES else rows,
        dtype=(gl.float32, gl.int32),
        is_pure=True,
        pack=N,
    )
    # of the N // 4 summands one is not 0: no addition is left
    m, alpha = gl.split(rest)
    m = gl.convert_layout(gl.sum(m, 1), W_LAYOUT, assert_trivial=True).to(gl.float32, bitcast=True)
    alpha = gl.convert_layout(gl.sum(alpha, 1), W_LAYOUT, assert_trivial=True).to(gl.float32, bitcast=True)
    return by_rows(z4, LAYOUT), m, alpha


@gluon.jit
def partial_sums(p, W_LAYOUT: gl.constexpr):
    """The part `[ROWS, 4]` of the row sums of `p [ROWS, N]` that each thread of a quad holds."""
    # one chain a row: the exponentials come no faster, and a tree keeps them waiting for registers
    return gl.convert_layout(gl.sum(gl.sum(by_quads(p), 3), 1), W_LAYOUT, assert_trivial=True)


@gluon.jit
def packed(x, dtype: gl.constexpr):
    """`x [ROWS, N]` in 16 bits, two of them in each int32 `[ROWS, N // 8, 4]`.

    A loop carries 16-bit values one by one, and then some copies of it put every pair together again.
    """
    low, high = gl.split(by_quads(x))
    convert: gl.constexpr = "cvt.rn.f16x2.f32" if dtype == gl.float16 else "cvt.rn.bf16x2.f32"
    return gl.inline_asm_elementwise(
        convert + " $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unpacked(p, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """The `[ROWS, N]` that were packed to `p`."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [p], dtype=(dtype.value, dtype.value), is_pure=True, pack=1
    )
    pairs = gl.join(low, high)
    return gl.convert_layout(pairs.reshape([ROWS, p.shape[1] * 8]), LAYOUT, assert_trivial=True)


@gluon.jit
def moved(alpha, l_i):
    """int32 `[ROWS, 4]`: not 0 in a warp in which an `alpha` is not 1. Whoever waits for it has the sums `l_i`."""
    # alpha is at most 1; the vote, which stays in its place, depends on the sums, or ptxas would move the exponentials
    # to after the next wait
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .f32 t, u; mul.f32 t, $2, $3; add.f32 u, $4, $5; fma.rn.f32 t, u, 0f00000000, t; "
        "setp.neu.f32 p, t, 0f3F800000; vote.sync.ballot.b32 $0, p, 0xffffffff; mov.b32 $1, $0; }",
        "=r,=r,f,f,f,f",
        [alpha, l_i],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.constexpr_function
def _rescale_asm(n: int):
    """PTX that multiplies `n` elements of a thread by their factors, unless its warp has none that is not 1."""
    lines = [f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)]
    return f"{{ .reg .pred p; setp.eq.b32 p, ${3 * n}, 0; @p bra KEEP; " + "\n".join(lines) + " KEEP: }"


@gluon.constexpr_function
def _rescale_operands(n: int):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n + ["r"] * n)


@gluon.jit
def rescale(acc, alpha, is_moved):
    """`acc [ROWS, D] * alpha [ROWS, 4]`; where every alpha of a warp is 1 it costs a branch."""
    N: gl.constexpr = acc.shape[1] // 2
    LAYOUT: gl.constexpr = acc.type.layout
    W_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, by_quads(acc).type.layout))
    alpha = gl.convert_layout(alpha, W_LAYOUT, assert_trivial=True).expand_dims(1).expand_dims(3)
    is_moved = gl.convert_layout(is_moved, W_LAYOUT, assert_trivial=True).expand_dims(1).expand_dims(3)
    acc4 = gl.inline_asm_elementwise(
        _rescale_asm(N), _rescale_operands(N), [by_quads(acc), alpha, is_moved], dtype=gl.float32, is_pure=True, pack=N
    )
    return by_rows(acc4, LAYOUT)
