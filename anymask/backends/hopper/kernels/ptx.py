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
# $1, at least 0: the least of it and of a number with any bits $2, which is infinity or NaN
SAME_FLOAT = gl.constexpr("{ .reg .b32 x; lop3.b32 x, $2, 0x7F800000, 0x80000000, 0x54; min.f32 $0, $1, x; }")
# two weights in 16 bits, $1, each 0 if the low 15 bits of its half of $2 are less than those of $3. As numbers of fp16
# without a sign they have the order of integers, and what is NaN is more than all $3, which are infinity at most
KEEP = gl.constexpr("{ .reg .b32 x; abs.f16x2 x, $2; set.geu.u32.f16x2 x, x, $3; and.b32 $0, $1, x; }")
# ds of weight $1, below 0 if dropout takes it, dp $2, delta $3 and the factor $4 of what dropout keeps
DROPPED_GRADIENT = gl.constexpr(
    "{ .reg .f32 t, u; max.f32 t, $1, 0f00000000; mul.f32 u, $2, $4; mul.f32 t, t, u; abs.f32 u, $1; neg.f32 u, u; "
    "fma.rn.f32 $0, u, $3, t; }"
)
# p may be as large as 2**8, which fp16 holds with its full precision
HEADROOM = "41000000"  # 8.0
# the row max of a row that has met a key is at least this far from 0, which is that of one that has met none
TINY = "21800000"  # 2**-60
LOWEST = "C6800000"  # -2**14


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
def dropped_asm(n: int):
    """PTX that makes of random words which pairs of a thread dropout takes, as bits.

    A thread has two keys 8 apart, and of `n` blocks of 16 queries four each: 2c, 2c + 1, and those 8 after. It has the
    words of query 2c or 2c + 1, as its keys are even or odd, for both them and their neighbours, which the thread 4
    lanes on has; those of the other query come from there.

    $0 are the bits of the first key, zeros follow to $n-1; $n those of the second, and zeros. Words are $2n to $6n-1:
    first query and first key of all blocks, first and second, second and first, both second. $6n is 1 if keys are odd,
    $7n the least bits that are kept, twice.
    """
    lines = [f"setp.ne.u32 o, ${6 * n}, 0; selp.b32 own, 0x7632, 0x5410, o; xor.b32 other, own, 0x2222;"]
    lines.append("mov.b32 a0, 0; mov.b32 a1, 0;")
    for block in range(n):
        for r in (0, 1):
            words = f"${(2 + 2 * r) * n + block}, ${(3 + 2 * r) * n + block}"
            bit = 4 * (block % 4) + 2 * r
            lines.append(
                f"prmt.b32 k, {words}, own; prmt.b32 s, {words}, other; shfl.sync.bfly.b32 s, s, 4, 31, 0xffffffff; "
                "selp.b32 x, s, k, o; selp.b32 y, k, s, o;"
            )
            for x, b in (("x", bit), ("y", bit + 1)):
                # a | (x & c)
                lines.append(
                    f"abs.f16x2 {x}, {x}; set.lt.u32.f16x2 {x}, {x}, ${7 * n}; "
                    f"lop3.b32 a{block // 4}, a{block // 4}, {x}, {0x10001 << b}, 0xf8;"
                )
    lines += [f"mov.b32 ${i}, 0;" for i in range(2 * n) if i % n]
    lines.append(f"prmt.b32 $0, a0, a1, 0x5410; prmt.b32 ${n}, a0, a1, 0x7632;")
    return "{ .reg .pred o; .reg .b32 own, other, k, s, x, y, a0, a1; " + "\n".join(lines) + " }"


@gluon.constexpr_function
def dropped_operands(n: int):
    """Constraints of `dropped_asm`."""
    return ",".join(["=&r"] * (2 * n) + ["r"] * (6 * n))


@gluon.constexpr_function
def update_row_max_asm(n: int, has_words: bool, limited: bool):
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
        lines += _update_row_asm(n, row, has_words, limited)
    return "{ .reg .pred p, q; .reg .b32 a, b, c, d, x, y; .reg .f32 t, u; " + "\n".join(lines) + " KEEP: }"


@gluon.constexpr_function
def _update_row_asm(n: int, row: int, has_words: bool, limited: bool):
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
    limit = f" max.f32 t, t, 0f{LOWEST};" if limited else ""
    lines.append(
        f"""
        setp.eq.f32 p, {m}, 0f00000000; selp.f32 t, 0fFF800000, 0f{HEADROOM}, p; setp.gt.f32 q, u, t;
        add.f32 u, u, {m}; abs.f32 t, u; max.f32 t, t, 0f{TINY}; copysign.f32 t, u, t;{limit}
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


DIAGONAL_ELEMENTS = gl.constexpr(32)


@gluon.constexpr_function
def diagonal_sums_asm():
    """PTX that sums ds of a warp, 16 keys and 64 queries of transposed scores, along diagonals of `key - query`.

    Element 4 j + 2 a + b of a thread, from $32 on, is of key r + 8 a and query 8 j + 2 c + b, where r is lane / 4 and c
    lane % 4. Outputs $0 to $3: of 8 (4 i + c) + (r - 2 c) % 8 - 64 in $i, of the keys of the warpgroup, zero elsewhere;
    $4 to $31 are 0.
    """
    lines = [
        "mov.u32 lane, %laneid; and.b32 y, lane, 3; shr.u32 z, lane, 2; shl.b32 y, y, 1;"
        # r < 2 c, or 2 c + 1: the distance of the first query of 8 is below that of the key of 8
        "setp.lt.u32 below0, z, y; setp.le.u32 below1, z, y;"
        # bits of c, and of the warp
        "and.b32 y, lane, 1; setp.ne.u32 c0, y, 0; and.b32 y, lane, 2; setp.ne.u32 c1, y, 0;"
        "and.b32 y, $64, 16; setp.ne.u32 w0, y, 0; and.b32 y, $64, 32; setp.ne.u32 w1, y, 0;"
        # of every four runs of 8 a lane keeps two, then one
        "xor.pred high, c1, w0; not.pred p, c1; and.pred carry, p, w0;"
        "add.u32 next, lane, 4; selp.b32 y, -9, 9, c0; add.u32 other, lane, y;"
    ]
    for b in (0, 1):
        # those whose keys and queries are as many times 8 apart are in one thread
        for k in range(9):
            pairs = [(a, a + 7 - k) for a in (0, 1) if 0 <= a + 7 - k < 8]
            xs = [f"${32 + 4 * j + 2 * a + b}" for a, j in pairs]
            lines.append(f"add.f32 s{k}, {xs[0]}, {xs[1]};" if len(xs) == 2 else f"mov.b32 s{k}, {xs[0]};")
        zero = "0f00000000"
        for k in range(10):
            lower, upper = f"s{k}" if k < 9 else zero, f"s{k - 1}" if k else zero
            lines.append(f"selp.f32 t{b}{k}, {lower}, {upper}, below{b};")
    for k in range(10):
        lines.append(f"shfl.sync.idx.b32 x, t1{k}, next, 31, 0xffffffff; mov.b32 u, x; add.f32 t0{k}, t0{k}, u;")
    for k in (0, 1, 4, 5):
        lines.append(
            f"selp.f32 u, t0{k}, t0{k + 2}, high; selp.f32 t0{k}, t0{k + 2}, t0{k}, high; mov.b32 x, u;"
            f"shfl.sync.bfly.b32 x, x, 18, 31, 0xffffffff; mov.b32 u, x; add.f32 t0{k}, t0{k}, u;"
        )
    for k in (8, 9):
        lines.append(
            f"mov.b32 x, t0{k}; shfl.sync.bfly.b32 x, x, 18, 31, 0xffffffff; mov.b32 u, x; add.f32 u, t0{k}, u;"
            f"selp.f32 t0{k}, {zero}, u, high;"
        )
    for i, k in enumerate((0, 4, 8)):
        lines.append(
            f"selp.f32 u, t0{k}, t0{k + 1}, c0; selp.f32 s{i}, t0{k + 1}, t0{k}, c0; mov.b32 x, u;"
            f"shfl.sync.idx.b32 x, x, other, 31, 0xffffffff; mov.b32 u, x; add.f32 s{i}, s{i}, u;"
        )
    # the keys of a warp are 16 from those of the next, two runs of 8
    lines.append(f"selp.f32 s2, s1, s2, carry; selp.f32 s1, s0, s1, carry; selp.f32 s0, {zero}, s0, carry;")
    for i in range(4):
        upper, lower = f"s{i - 1}" if i else zero, f"s{i}" if i < 3 else zero
        lines.append(f"selp.f32 u, {upper}, {lower}, w1; mov.b32 ${i}, u;")
    lines += [f"mov.b32 ${i}, 0;" for i in range(4, 32)]
    registers = ", ".join([f"s{k}" for k in range(9)] + [f"t{b}{k}" for b in (0, 1) for k in range(10)])
    return (
        "{ .reg .pred p, below0, below1, c0, c1, w0, w1, high, carry; .reg .b32 x, y, z, lane, next, other;"
        f".reg .f32 u, {registers}; " + "\n".join(lines) + " }"
    )


@gluon.constexpr_function
def diagonal_sums_operands():
    """Constraints of `diagonal_sums_asm`."""
    return ",".join(["=r"] * 32 + ["f"] * 32 + ["r"] * 32)
