"""PTX of the Hopper kernels: strings and what makes them. Each function of softmax.py that uses one says what it does.

In the accumulator of a warpgroup a thread has elements of two rows, two of the first and two of the second in turn.
Where it works on `n` elements at once, element `i` is of its first row if `i & 2` is 0, else of its second.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MOVE = gl.constexpr("mov.b32 $0, $1;")
LANE_ID = gl.constexpr("mov.u32 $0, %laneid;")
EXP2 = gl.constexpr("ex2.approx.ftz.f32 $0, $1;")
UNPACK_HALVES = gl.constexpr("mov.b32 {$0, $1}, $2;")
# a vote whose result depends on row sums, and is not 0 in a warp in which an alpha is not 1; an alpha is at most 1
VOTE_RESCALE = gl.constexpr(
    "{ .reg .pred p; .reg .f32 t, u; mul.f32 t, $2, $3; add.f32 u, $4, $5; fma.rn.f32 t, u, 0f00000000, t; "
    "setp.neu.f32 p, t, 0f3F800000; vote.sync.ballot.b32 $0, p, 0xffffffff; mov.b32 $1, $0; }"
)
# a warp reads the counter at $1 until it is $2; what it gives the copy engine then comes after what was counted
WAIT_FOR_COUNT = gl.constexpr(
    "{ .reg .pred p; .reg .b32 x; AGAIN: ld.acquire.gpu.global.b32 x, [$1]; setp.ne.s32 p, x, $2; @p bra AGAIN; "
    "fence.proxy.async.global; mov.b32 $0, x; }"
)
# a warp waits until all that it gave the copy engine is written, not just read, and adds 1 to the counter at $1
COUNT_WHEN_DONE = gl.constexpr(
    "{ .reg .pred p; .reg .b32 x; cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; mov.u32 x, %laneid; "
    "setp.eq.s32 p, x, 0; @p red.release.gpu.global.add.s32 [$1], 1; mov.b32 $0, x; }"
)
# ds of weight $1, below 0 if dropout takes it, dp $2, delta $3 and the factor $4 of what dropout keeps
DROPPED_GRADIENT = gl.constexpr(
    "{ .reg .f32 t, u; max.f32 t, $1, 0f00000000; mul.f32 u, $2, $4; mul.f32 t, t, u; abs.f32 u, $1; neg.f32 u, u; "
    "fma.rn.f32 $0, u, $3, t; }"
)
# p may be as large as 2**8, which fp16 holds with its full precision
HEADROOM = "41000000"  # 8.0
# the row max of a row that has met a key is at least this far from 0, which is that of one that has met none
TINY = "21800000"  # 2**-60


@gluon.constexpr_function
def shuffle(lane: int):
    """PTX that gives every thread of a warp the word of one lane."""
    return f"shfl.sync.idx.b32 $0, $1, {lane}, 31, 0xffffffff;"


@gluon.constexpr_function
def barrier(op: str, warps: int):
    """PTX that arrives at the hardware barrier $1 of so many warps, and with `sync` waits there."""
    return f"bar.{op} $1, {32 * warps}; mov.b32 $0, $1;"


@gluon.constexpr_function
def pack_halves(is_fp16: bool):
    """PTX that rounds two floats to 16 bits and puts them into one word, the first one low."""
    return ("cvt.rn.f16x2.f32" if is_fp16 else "cvt.rn.bf16x2.f32") + " $0, $2, $1;"


@gluon.constexpr_function
def pack_positive(is_fp16: bool):
    """PTX that rounds two floats to 16 bits, those below 0 to 0, and puts them into one word, the first one low."""
    return ("cvt.rn.relu.f16x2.f32" if is_fp16 else "cvt.rn.relu.bf16x2.f32") + " $0, $2, $1;"


@gluon.constexpr_function
def _of_row(n: int, row: int):
    """Which of the `n` elements of a thread are of its first row, 0, or of its second, 2."""
    return [i for i in range(n) if i & 2 == row]


@gluon.constexpr_function
def _test_bit(word: str, b: int):
    """PTX for predicate p, bit `b` of a word: a constant, so that ptxas moves several bits to predicates (R2P)."""
    return f"and.b32 x, {word}, {1 << b}; setp.ne.u32 p, x, 0;"


@gluon.constexpr_function
def select_asm(n: int, exp2: bool):
    """PTX that keeps `n` exponents of a thread, or with `exp2` their powers of 2, where their bit is set.

    Outputs are elements $0 to $n-1, inputs the `n` after them; $2n and $2n+2 are the words of both rows.
    """
    lines = []
    for row in (0, 2):
        for b, i in enumerate(_of_row(n, row)):
            lines.append(_test_bit(f"${2 * n + row}", b))
            if exp2:
                lines.append(f"ex2.approx.ftz.f32 t, ${n + i}; selp.f32 ${i}, t, 0f00000000, p;")
            else:
                lines.append(f"selp.f32 ${i}, ${n + i}, 0fFF800000, p;")
    return "{ .reg .pred p; .reg .b32 x; .reg .f32 t; " + "\n".join(lines) + " }"


@gluon.constexpr_function
def sign_asm(n: int):
    """PTX that turns the sign of `n` numbers of a thread, $0 to $n-1, in place, where their bit is set.

    $2n and $2n+2 are the words of both rows.
    """
    lines = []
    for row in (0, 2):
        for b, i in enumerate(_of_row(n, row)):
            # a ^ (b & c)
            lines.append(
                f"shl.b32 x, ${2 * n + row}, {31 - b}; mov.b32 y, ${i}; lop3.b32 y, y, x, 0x80000000, 0x78; "
                f"mov.b32 ${i}, y;"
            )
    return "{ .reg .b32 x, y; " + "\n".join(lines) + " }"


@gluon.constexpr_function
def zero_asm(n: int):
    """PTX that makes `n` numbers of a thread, $0 to $n-1, in place, 0 where their bit is not set; words as above."""
    lines = []
    for row in (0, 2):
        for b, i in enumerate(_of_row(n, row)):
            lines.append(_test_bit(f"${2 * n + row}", b) + f" selp.f32 ${i}, ${i}, 0f00000000, p;")
    return "{ .reg .pred p; .reg .b32 x; " + "\n".join(lines) + " }"


@gluon.constexpr_function
def sign_operands(n: int):
    """Constraints of `sign_asm` and `zero_asm`."""
    return in_place(n) + ",r" * n


@gluon.constexpr_function
def select_operands(n: int):
    """Constraints of `select_asm`."""
    return ",".join(["=f"] * n + ["f"] * n + ["r"] * n)


@gluon.constexpr_function
def update_row_max_asm(n: int, has_words: bool):
    """PTX of `update_row_max` for the `n` exponents of a thread, $0 to $n-1, in place.

    $n to $n+3 are, as bits: row max of the first row, in place, its alpha, row max of the second, its alpha; zeros
    follow, as many as make `n`. With `has_words`, $4n and $4n+2 are the words of both rows.
    """
    # does a thread of the warp have an exponent above the headroom? floats above 0 have the order of their bits, the
    # others are negative in both; two maxima are one VIMNMX3
    chains = "abcd"
    lines = [f"mov.b32 {c}, ${i};" for i, c in enumerate(chains)]
    for i in range(4, n, 2):
        c = chains[i // 2 % 4]
        lines.append(f"mov.b32 x, ${i}; mov.b32 y, ${i + 1}; max.s32 {c}, {c}, x; max.s32 {c}, {c}, y;")
    lines.append(f"max.s32 a, a, b; max.s32 a, a, c; max.s32 a, a, d; setp.gt.s32 p, a, 0x{HEADROOM};")
    # or a row that has met no key? its row max is 0, and so is the product, or NaN with an infinity
    lines.append(
        f"mul.f32 t, ${n}, ${n + 2}; setp.equ.or.f32 q, t, 0f00000000, p; vote.sync.any.pred p, q, 0xffffffff;"
    )
    # if not, alpha is 1 and all is done
    lines.append(f"mov.b32 ${n + 1}, 0x3F800000; mov.b32 ${n + 3}, 0x3F800000;")
    lines += [f"mov.b32 ${i}, 0;" for i in range(n + 4, 2 * n)]
    lines.append("@!p bra KEEP;")
    for row in (0, 2):
        lines += _update_row_asm(n, row, has_words)
    return "{ .reg .pred p, q; .reg .b32 a, b, c, d, x, y; .reg .f32 t, u; " + "\n".join(lines) + " KEEP: }"


@gluon.constexpr_function
def _update_row_asm(n: int, row: int, has_words: bool):
    """The slow path of `update_row_max_asm` for one row: u is the maximum of its exponents, then how far m moves."""
    m, alpha = f"${n + row}", f"${n + row + 1}"
    elements = [f"${i}" for i in _of_row(n, row)]
    lines = []
    if has_words:
        for b, z in enumerate(elements):
            lines.append(_test_bit(f"${4 * n + row}", b) + f" selp.f32 {z}, {z}, 0fFF800000, p;")
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
    return lines + [f"sub.f32 {x}, {x}, u;" for x in elements]


@gluon.constexpr_function
def update_row_max_operands(n: int, has_words: bool):
    """Constraints of `update_row_max_asm`: outputs are tied to inputs (docs/kernels.md, finding 4)."""
    return ",".join(["=f"] * n + ["=r"] * n + [str(i) for i in range(2 * n)] + ["r"] * (n * has_words))


@gluon.constexpr_function
def any_asm(n: int):
    """PTX that makes $0 the bits that any of `n` words, from $n on, has, and $1 to $n-1 zeros."""
    lines = [f"or.b32 x, x, ${i};" for i in range(n + 1, 2 * n)]
    zeros = [f"mov.b32 ${i}, 0;" for i in range(1, n)]
    return f"{{ .reg .b32 x; mov.b32 x, ${n}; " + " ".join(lines) + "\n" + " ".join(zeros) + " mov.b32 $0, x; }"


@gluon.constexpr_function
def any_operands(n: int):
    """Constraints of `any_asm`."""
    return ",".join(["=&r"] * n + ["r"] * n)


@gluon.constexpr_function
def rescale_asm(n: int):
    """PTX that multiplies `n` elements of a thread, in place, by the `n` from $2n, unless $3n is 0."""
    lines = [f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)]
    return f"{{ .reg .pred p; setp.eq.b32 p, ${3 * n}, 0; @p bra KEEP; " + "\n".join(lines) + " KEEP: }"


@gluon.constexpr_function
def rescale_operands(n: int):
    """Constraints of `rescale_asm`."""
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n + ["r"] * n)


# tanh(z / 4) / z in powers of z**2 where |z| < 2, the least largest error: 1.3e-7 of tanh
TANH = "3e7fffd9", "bbaa9a0d", "39069b36", "b631a756"
HALF_LOG2_E = "3f38aa3b"


@gluon.constexpr_function
def soft_cap_asm(n: int):
    """PTX that makes tanh(z / 4) of `n` scores z of a thread, $0 to $n-1, in place; -inf stays.

    Where no score of a warp is 2 or more, whose exponent has its highest bit, it is a polynomial. Else
    1 - 2 / (1 + exp(z / 2)), whose error is that of numbers around 1.
    """
    lines = ["mov.b32 a, $0;"]
    lines += [f"mov.b32 x, ${i}; or.b32 a, a, x;" for i in range(1, n)]
    lines.append("and.b32 a, a, 0x40000000; setp.ne.u32 p, a, 0; vote.sync.any.pred q, p, 0xffffffff; @q bra LARGE;")
    c0, c1, c2, c3 = TANH
    for i in range(n):
        lines.append(
            f"mul.f32 u, ${i}, ${i}; fma.rn.f32 t, u, 0f{c3}, 0f{c2}; fma.rn.f32 t, t, u, 0f{c1}; "
            f"fma.rn.f32 t, t, u, 0f{c0}; mul.f32 ${i}, ${i}, t;"
        )
    lines.append("bra END; LARGE:")
    for i in range(n):
        lines.append(
            f"mul.f32 t, ${i}, 0f{HALF_LOG2_E}; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
            f"rcp.approx.ftz.f32 t, t; fma.rn.f32 t, t, 0fC0000000, 0f3F800000; "
            f"setp.eq.f32 p, ${i}, 0fFF800000; selp.f32 ${i}, ${i}, t, p;"
        )
    return "{ .reg .pred p, q; .reg .b32 a, x; .reg .f32 t, u; " + "\n".join(lines) + " END: }"


@gluon.constexpr_function
def capped_weights_asm(is_fp16: bool, hides: bool):
    """PTX for two capped scores t, $3 and $4, of factor $7 and lse2 $5, $6: $0 is 2**(t $7 - $5) of both in 16 bits.

    $1 and $2 are the same times the derivative of the cap, 1 - t**2; with `hides` it is 0 where t is -inf.
    """
    at_least_0 = "max.f32 t, t, 0f00000000;" if hides else ""
    lines = []
    for i in range(2):
        lines.append(
            f"neg.f32 t, ${5 + i}; fma.rn.f32 p{i}, ${3 + i}, ${7 + i}, t; ex2.approx.ftz.f32 p{i}, p{i}; "
            f"neg.f32 t, ${3 + i}; fma.rn.f32 t, t, ${3 + i}, 0f3F800000; {at_least_0} "
            f"mul.f32 ${1 + i}, p{i}, t;"
        )
    pack = "cvt.rn.f16x2.f32" if is_fp16 else "cvt.rn.bf16x2.f32"
    return "{ .reg .f32 t, p0, p1; " + "\n".join(lines) + f" {pack} $0, p1, p0; }}"


CAPPED_WEIGHTS_OPERANDS = gl.constexpr("=r,=&f,=&f,f,f,f,f,f,f")


@gluon.constexpr_function
def in_place(n: int):
    """Constraints of PTX that works on `n` floats in place (docs/kernels.md, finding 4)."""
    return ",".join(["=f"] * n + [str(i) for i in range(n)])


@gluon.constexpr_function
def shift_asm(n: int):
    """PTX that moves `n` elements, from $n on, by two: outputs are $2n, $2n+1, then all inputs but the last two."""
    return "\n".join(f"mov.b32 ${i}, ${2 * n + i if i < 2 else n + i - 2};" for i in range(n))


@gluon.constexpr_function
def shift_operands(n: int):
    """Constraints of `shift_asm`."""
    return ",".join(["=&f"] * n + ["f"] * (2 * n))
