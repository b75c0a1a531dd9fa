"""Every configuration of the Hopper kernels compiles for sm_90, without a GPU, fits the chip and keeps its registers.

Runs on the installed Triton and, from the Makefile, on the oldest one that is supported.
"""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import triton

from anymask import pack
from anymask.backends import hopper
from anymask.backends.gpu.arguments import kernel_options
from anymask.backends.gpu.passes import BackwardCall
from anymask.backends.hopper import pair_sums
from anymask.backends.hopper.kernels.backward_dq import DS_FULL
from tests.helpers import scored
from tests.helpers.compile_only import TARGETS, causal_mask, sass, spilled_bytes

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing"),
]
KERNELS = ["_fwd_kernel", "_bwd_delta_kernel", "_bwd_kernel", "_dq_kernel"]
WIDE_KERNELS = ["_fwd_kernel", "_bwd_delta_kernel", "_wide_dkdv_kernel", "_wide_dq_kernel"]
# scalars of the walk over work tiles and heads, kept outside the loops
FEW_BYTES = 96
# the same above 128, where accumulators fill the registers
FEW_WIDE_BYTES = 160
# innermost loops with products: one for each consumer partition
LOOPS = {("_fwd_kernel", 64): 4, ("_fwd_kernel", 128): 2, ("_bwd_kernel", 64): 2, ("_bwd_kernel", 128): 2}
# loop constants read back from there, of some 750 instructions: in one loop of dk, dv at head_dim 64 on Triton 3.9
FEW_LOADS = 8
# one number kept there for a step: bf16 with a tail at head_dim 64 on Triton 3.9
FEW_STORES = 1
IS_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
# of SASS, a barrier of both consumer warpgroups
MEETING = re.compile(r"BAR\.SYNC\S* \S+, 0x100\b")


@pytest.fixture
def hopper_kernels(compiled):
    """The list that kernels are added to as they compile for sm_90."""
    return compiled("sm_90")


def compile_both(
    kernels,
    dim,
    mask,
    dtype=torch.float16,
    group=1,
    scale=0.1,
    v_dim=None,
    length=384,
    deterministic=False,
    apart=False,
):
    """Forward and backward over zeros; returns the kernels by name; `apart`: dq has a kernel of its own."""
    q, k = (torch.zeros(2, heads, length, dim, dtype=dtype) for heads in (2 * group, 2))
    v = torch.zeros(2, 2, length, v_dim or dim, dtype=dtype)
    o, lse = hopper.forward(q, k, v, mask, scale)
    hopper.backward(q, k, v, o, lse, o, None, mask, scale, deterministic)
    # delta comes from the kernel of dq at head_dim 128
    names = [*KERNELS[: 1 + (dim == 64)], "_bwd_dq_kernel", "_bwd_kernel"] if apart else KERNELS
    names = WIDE_KERNELS if max(dim, v_dim or dim) > 128 else names
    assert [x.metadata.name for x in kernels] == names
    return dict(zip(names, kernels, strict=True))


def loops_with_products(kernel) -> list[list[str]]:
    """SASS instructions of the innermost loops that hold warpgroup products."""
    lines = [(label, re.sub(r"^@!?U?P\w+\s+", "", op)) for label, op in sass(kernel)]
    places = {label: i for i, (label, _) in enumerate(lines) if label}
    spans = []
    for i, (_, op) in enumerate(lines):
        target = re.match(r"BRA.*`\((\.L_x_\d+)\)", op)
        if target and places.get(target[1], i) < i:
            spans.append((places[target[1]], i))
    bodies = [[op for _, op in lines[a : b + 1] if op] for a, b in spans if not _holds_another((a, b), spans)]
    # the loop in which idle warps wait for work to do goes round everything, and leaves
    return [body for body in bodies if _has(body, "HGMMA") and not _has(body, "EXIT")]


def steps_go_on(kernel) -> list[bool]:
    """Of each innermost loop with warpgroup products: does it start from what a loop around it carries?

    In Triton's own code. Else the steps of every column would start from the same number.
    """
    found, around = [], []
    for line in kernel.asm["ttgir"].splitlines():
        indent = len(line) - len(line.lstrip())
        # a loop ends where a line stands further left
        while around and line.strip() and indent <= around[-1]["indent"]:
            around.pop()
        if loop := re.search(r"scf\.for %\w+ = %(\w+) to", line):
            carried = re.findall(r"%(\w+) =", line.partition("iter_args")[2])
            goes_on = any(loop[1] in outer["carried"] for outer in around)
            for outer in around:
                outer["is_innermost"] = False
            around.append(
                {"indent": indent, "carried": carried, "goes_on": goes_on, "is_innermost": True, "products": 0}
            )
            found.append(around[-1])
        elif "warp_group_dot %" in line and around:
            around[-1]["products"] += 1
    return [loop["goes_on"] for loop in found if loop["is_innermost"] and loop["products"]]


def _has(body: list[str], name: str) -> bool:
    return any(op.startswith(name) for op in body)


def _holds_another(span, spans) -> bool:
    # barriers spin in loops of a few instructions
    return any(span[0] <= a and b <= span[1] and (a, b) != span and b - a > 50 for a, b in spans)


def assert_keeps_its_registers(kernels, dim, masked):
    for name in ("_fwd_kernel", "_bwd_kernel"):
        kernel = kernels[name]
        assert kernel.metadata.shared <= TARGETS["sm_90"][1], name
        assert spilled_bytes(kernel) <= FEW_BYTES, name
        loops = loops_with_products(kernel)
        partial_apart = masked and (name, dim) == ("_fwd_kernel", 128)
        assert len(loops) == LOOPS[name, dim] * (2 if partial_apart else 1), name
        for body in loops:
            assert sum(op.startswith("STL") for op in body) <= FEW_STORES, name
            assert sum(op.startswith("LDL") for op in body) <= FEW_LOADS, name
            # products that ptxas serialised are each followed by a wait
            products = sum(op.startswith("HGMMA") for op in body)
            assert sum(op.startswith("WARPGROUP.DEPBAR") for op in body) <= products // 4, name
        if name == "_bwd_kernel":
            # as stages and barriers do, the steps of a column go on where those of the last one ended
            assert steps_go_on(kernel) == [True, True]
            # the hardware barriers that Triton takes by number, as ours are in registers
            of_triton = {int(n) for n in re.findall(r"\bbar(?:rier)?\.sync\s+(\d+)", kernel.asm["ptx"])}
            assert of_triton
            assert max(of_triton) < DS_FULL.value
            for body in loops:
                # the warpgroups meet once a step, for dq, and descriptors stay in uniform registers
                assert len([op for op in body if MEETING.match(op)]) == ("_dq_kernel" in kernels)
                assert not _has(body, "R2UR")
        if name == "_fwd_kernel":
            for body in loops:
                # exponentials run beside the product with v, not after it
                waits = [i for i, op in enumerate(body) if op.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0")]
                assert len(waits) == 1
                assert not _has(body[waits[0] :], "MUFU"), name


@pytest.mark.parametrize("dim", [64, 128])
def test_dq_apart_keeps_its_registers(hopper_kernels, dim):
    kernels = compile_both(hopper_kernels, dim, causal_mask(), apart=True, deterministic=True)
    assert_keeps_its_registers(kernels, dim, True)
    assert kernels["_bwd_dq_kernel"].metadata.shared <= TARGETS["sm_90"][1]
    assert spilled_bytes(kernels["_bwd_dq_kernel"]) == 0


SHARED, APART = ["_bwd_delta_kernel", "_bwd_kernel", "_dq_kernel"], ["_bwd_dq_kernel", "_bwd_kernel"]


@pytest.mark.parametrize(
    ("dim", "batch", "deterministic", "names"),
    [
        (128, 1, False, APART),
        (64, 1, False, SHARED),
        (64, 2, False, ["_bwd_delta_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel"]),
        (64, 2, True, ["_bwd_delta_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel"]),
    ],
)
@pytest.mark.parametrize("unused", [False, True])
def test_which_kernels_short_columns_take(hopper_kernels, monkeypatch, dim, batch, deterministic, names, unused):
    monkeypatch.setattr(hopper.tuning, "MANY_COLUMNS", 0)
    q, dense = (
        torch.zeros(2, 2, 384, dim, dtype=torch.bfloat16),
        torch.ones(batch, 1, 384, 384, dtype=torch.bool).tril(),
    )
    dense[..., 300:] &= not unused
    hopper.backward(q, q, q, q, torch.zeros(2, 2, 384), q, None, pack(dense), 0.1, deterministic)
    assert [kernel.metadata.name for kernel in hopper_kernels] == names
    for kernel in hopper_kernels:
        assert spilled_bytes(kernel) <= (FEW_BYTES if kernel.metadata.name == "_bwd_kernel" else 0)


def test_a_sum_in_turns_is_not_left_to_other_kernels(hopper_kernels, monkeypatch):
    monkeypatch.setattr(hopper.tuning, "MANY_COLUMNS", 0)
    monkeypatch.setattr(hopper.tuning, "SHORT_COLUMN_IN_TURN", 0)
    q, dense = torch.zeros(2, 2, 384, 64, dtype=torch.float16), torch.ones(2, 1, 384, 384, dtype=torch.bool).tril()
    hopper.backward(q, q, q, q, torch.zeros(2, 2, 384), q, None, pack(dense), 0.1, True)
    assert [kernel.metadata.name for kernel in hopper_kernels] == SHARED


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_keeps_its_registers(hopper_kernels, monkeypatch, dim, group, masked, deterministic):
    # in turns, though columns are short
    monkeypatch.setattr(hopper.tuning, "SHORT_COLUMN_IN_TURN", 0)
    mask = pack(torch.ones(384, 384, dtype=torch.bool).tril()) if masked else None
    kernels = compile_both(hopper_kernels, dim, mask, group=group, deterministic=deterministic)
    assert_keeps_its_registers(kernels, dim, masked)
    # programs that wait for each other run together
    assert bool(kernels["_bwd_kernel"].metadata.launch_cooperative_grid) is deterministic


# terms, whether there is a mask, and the most instructions of a step of 64 x 128 pairs; a cap has both its ways
SCORED = {
    # no more than without it
    "keys": ({"dense": ("keys",)}, False, 600),
    "distances": ({"tables": ("relative",)}, True, 940),
    "dropout": ({"dropout_p": 0.1}, True, 1150),
    "pairs": ({"dense": ("by_head",)}, True, 920),
    "pairs under a cap": ({"dense": ("by_head",), "softcap": 20.0}, False, 1600),
}


@pytest.mark.parametrize("kind", SCORED)
def test_scores_keep_their_registers(hopper_kernels, kind):
    terms, masked, most = SCORED[kind]
    call = scored.make_call("none", shape=(2, 4, 4, 384, 384), dims=(128, 128), **terms)
    mask = pack(torch.ones(384, 384, dtype=torch.bool).tril()) if masked else None
    hopper.forward(call.q, call.k, call.v, mask, 0.1, call.scores)
    *before, kernel = hopper_kernels
    # the columns of a bias of keys
    assert [x.metadata.name for x in before] == ["_columns_kernel"] * (kind == "keys")
    assert kernel.metadata.shared <= TARGETS["sm_90"][1]
    assert spilled_bytes(kernel) <= FEW_WIDE_BYTES
    loops = loops_with_products(kernel)
    assert len(loops) == LOOPS["_fwd_kernel", 128] * (1 + masked)
    for body in loops:
        assert len(body) <= most
        # Triton 3.9 keeps a number there for distances
        assert sum(op.startswith("STL") for op in body) <= 4 * FEW_STORES
        assert sum(op.startswith("LDL") for op in body) <= FEW_LOADS
        # exponentials run beside the product with v, not after it
        assert _after_products(body, "MUFU") <= 1
    # and so does the generator of dropout, but before Triton 3.9 not in loops that read bits of a mask
    late = [_after_products(body, "IMAD.WIDE") > 1 for body in loops]
    assert sum(late) <= (len(loops) // 2 if kind == "dropout" and IS_OLD else 0)


# terms, whether they get their gradient, and the most instructions of a step, without a mask, by head_dim
SCORED_BACKWARD = {
    "keys": ({"dense": ("keys",)}, False, {64: 680, 128: 470}),
    "keys with their gradient": ({"dense": ("keys",)}, True, {64: 860, 128: 510}),
    "distances": ({"tables": ("relative",)}, False, {64: 730, 128: 510}),
    "pairs": ({"dense": ("by_head",)}, False, {64: 760, 128: 520}),
    "distances with their gradient": ({"tables": ("relative",)}, True, {64: 1060, 128: 640}),
    # both its ways
    "cap": ({"softcap": 20.0}, False, {64: 1630, 128: 970}),
    "dropout": ({"dropout_p": 0.1}, False, {64: 1400, 128: 860}),
}
# of a step, what is kept in memory for it: masked steps at head_dim 64 have that few registers
FEW_SCORED_STORES = {64: 16, 128: 1}


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", SCORED_BACKWARD)
def test_scores_backward_keep_their_registers(hopper_kernels, kind, dim, masked):
    terms, with_gradient, most = SCORED_BACKWARD[kind]
    call = scored.make_call("none", shape=(1, 4, 2, 2048, 2048), dims=(dim, dim), **terms)
    mask = pack(torch.ones(2048, 2048, dtype=torch.bool).tril()) if masked else None
    no = call.needs._replace(
        dense=tuple(with_gradient for _ in call.scores.dense), tables=tuple(with_gradient for _ in call.scores.lookups)
    )
    hopper.backward_scores(
        call.q, call.k, call.v, call.do, torch.zeros(1, 4, 2048), call.do, None, mask, 0.1, False, call.scores, no
    )
    of_table = with_gradient and len(call.scores.lookups) > 0
    assert [x.metadata.name for x in hopper_kernels] == [
        *KERNELS[1:], *["_number_kernel"] * (of_table and masked), *["_table_kernel"] * of_table
    ]  # fmt: skip
    kernel = hopper_kernels[1]
    print(f"{kind}, head_dim {dim}: {kernel.metadata.shared} bytes shared, {spilled_bytes(kernel)} local")
    assert kernel.metadata.shared <= TARGETS["sm_90"][1]
    loops = loops_with_products(kernel)
    assert len(loops) == LOOPS["_bwd_kernel", dim]
    for body in loops:
        assert len(body) <= most[dim] + 160 * masked
        # sums by distance are addressed by each thread
        assert sum(op.startswith("STL") for op in body) <= FEW_SCORED_STORES[dim] + 5 * of_table
        products = sum(op.startswith("HGMMA") for op in body)
        # products that ptxas serialised are each followed by a wait
        assert sum(op.startswith("WARPGROUP.DEPBAR") for op in body) <= products // 4
        assert len([op for op in body if MEETING.match(op)]) == 1
        # a load turns a bias of pairs round: 8 x 8 of it at a time, four of those for each thread
        assert sum(".MT88.4" in op for op in body) == ({64: 8, 128: 4}[dim] if kind == "pairs" else 0)
        if kind == "dropout":
            # the generator runs beside the products of dq and dk: after the meeting
            meeting = next(i for i, op in enumerate(body) if MEETING.match(op))
            assert not [op for op in body[:meeting] if op.startswith("IMAD.WIDE")]


def _after_products(body, name):
    """How many instructions of a loop wait for all of its products."""
    last = max(i for i, op in enumerate(body) if op.startswith("WARPGROUP.DEPBAR"))
    return sum(op.startswith(name) for op in body[last:])


@pytest.mark.parametrize(("dim", "v_dim", "masked"), [(192, 128, True), (136, 192, False), (256, 256, True)])
def test_wide_dims_keep_their_registers(hopper_kernels, dim, v_dim, masked):
    mask = pack(torch.ones(384, 384, dtype=torch.bool).tril()) if masked else None
    kernels = compile_both(hopper_kernels, dim, mask, torch.bfloat16, v_dim=v_dim, group=2)
    for name in ("_fwd_kernel", "_wide_dkdv_kernel", "_wide_dq_kernel"):
        kernel = kernels[name]
        assert kernel.metadata.shared <= TARGETS["sm_90"][1], name
        assert spilled_bytes(kernel) <= FEW_WIDE_BYTES, name
        loops = loops_with_products(kernel)
        assert len(loops) == 2, name
        # forward, steps start one after what is carried
        assert steps_go_on(kernel) == [name != "_fwd_kernel"] * 2, name
        for body in loops:
            assert not [op for op in body if op.startswith("STL")], name
            assert sum(op.startswith("LDL") for op in body) <= FEW_LOADS, name
            products = sum(op.startswith("HGMMA") for op in body)
            # in pairs: for the products of one operand and for the sums that were issued with them
            assert sum(op.startswith("WARPGROUP.DEPBAR") for op in body) <= products // 4, name


@pytest.mark.parametrize("dim", [64, 128])
def test_heads_that_share_a_tile(hopper_kernels, dim):
    q, k = (torch.zeros(2, heads, n, dim, dtype=torch.float16) for heads, n in ((8, 16), (2, 384)))
    mask = pack(torch.ones(16, 384, dtype=torch.bool).tril())
    o, lse = hopper.forward(q, k, k, mask, 0.1)
    assert (o.shape, lse.shape) == (q.shape, q.shape[:3])
    (kernel,) = hopper_kernels
    assert spilled_bytes(kernel) <= FEW_BYTES
    for body in loops_with_products(kernel):
        assert not _has(body, "STL")


@pytest.mark.parametrize("dim", [64, 128])
def test_every_candidate_of_the_tuner_fits(hopper_kernels, monkeypatch, dim):
    from benchmarks.tune import hopper_candidates

    candidates = [hopper.tuning.ForwardConfig(*options) for options in hopper_candidates("fwd", dim)]
    chosen = hopper.tuning.FORWARD[dim]
    q = torch.zeros(1, 1, 128, dim, dtype=torch.float16)
    distinct = {replace(c, is_persistent=(False, False)) for c in candidates}
    assert replace(chosen, is_persistent=(False, False)) in distinct
    for config in distinct:
        monkeypatch.setitem(hopper.tuning.FORWARD, dim, config)
        hopper.forward(q, q, q, None, 0.1)
        assert hopper_kernels[-1].metadata.shared <= TARGETS["sm_90"][1], config


@pytest.mark.parametrize("dim", [64, 128])
def test_plain_row_maxima_compile(hopper_kernels, monkeypatch, dim):
    """The twin that a test on a GPU compares with; only its time depends on its registers."""
    q, mask = torch.zeros(1, 1, 128, dim, dtype=torch.float16), causal_mask()
    monkeypatch.setitem(hopper.tuning.FORWARD, dim, replace(hopper.tuning.FORWARD[dim], PLAIN_SOFTMAX=True))
    hopper.forward(torch.zeros(1, 1, 300, dim, dtype=torch.float16), *[q.new_zeros(1, 1, 300, dim)] * 2, mask, 0.1)
    ptx = hopper_kernels[-1].asm["ptx"]
    assert hopper_kernels[-1].metadata.shared <= TARGETS["sm_90"][1]
    assert "vote.sync.any" not in ptx
    assert "vote.sync.ballot" in ptx


@pytest.mark.parametrize("dim", [64, 128])
def test_bf16_with_a_tail(hopper_kernels, dim):
    assert_keeps_its_registers(compile_both(hopper_kernels, dim, None, torch.bfloat16, length=300), dim, False)


@pytest.mark.parametrize(("dim", "v_dim"), [(40, 64), (96, 96), (128, 72)])
def test_other_dims_fit(hopper_kernels, dim, v_dim):
    kernels = compile_both(hopper_kernels, dim, causal_mask(), torch.bfloat16, scale=-0.1, v_dim=v_dim, length=300)
    assert max(k.metadata.shared for k in kernels.values()) <= TARGETS["sm_90"][1]


def test_new_lengths_and_masks_compile_nothing(hopper_kernels):
    for length in (8, 128, 200, 384):
        for heads in (1, 3, 16):
            q = torch.zeros(1, heads, length, 64, dtype=torch.float16)
            mask = pack(torch.ones(1, heads, length, length, dtype=torch.bool).tril())
            o, lse = hopper.forward(q, q, q, mask, 0.1)
            hopper.backward(q, q, q, o, lse, o, None, mask, 0.1, False)
    by_name = {name: {id(k) for k in hopper_kernels if k.metadata.name == name} for name in KERNELS}
    assert {name: len(ids) for name, ids in by_name.items()} == dict.fromkeys(KERNELS, 1)


# beside a bias of pairs: what else there is, whether a mask, head_dim, the most instructions of a step of 64 x 128
# pairs, and the most numbers that are written to memory and read back in it
SUMS = {
    "32": ({}, False, 32, 560, 0, 0),
    "64": ({}, False, 64, 590, 0, 0),
    "64-masked": ({}, True, 64, 800, 0, 12),
    "96": ({}, False, 96, 720, 0, FEW_LOADS),
    "128-masked": ({}, True, 128, 910, 0, 18),
    "128-fp32": ({"bias_dtype": torch.float32}, False, 128, 690, 14, 32),
    "128-cap": ({"softcap": 2.0}, False, 128, 1800, 4, 18),
    "64-dropout": ({"dropout_p": 0.1}, True, 64, 1340, 0, 28),
}


@pytest.mark.parametrize("kind", SUMS)
def test_sums_over_pairs_keep_their_registers(hopper_kernels, monkeypatch, kind):
    # as of blocks that are many
    monkeypatch.setattr(pair_sums, "PARTS_EACH", 0)
    terms, masked, dim, most, most_stores, most_loads = SUMS[kind]
    call = scored.make_call("none", ("by_head",), shape=(2, 4, 2, 384, 384), dims=(dim, dim), **terms)
    mask = pack(torch.ones(384, 384, dtype=torch.bool).tril()) if masked else None
    rows = torch.zeros(2 * 4 * 384)
    made = BackwardCall(call.q, call.k, call.v, call.do, rows, rows, None, None, mask, 0.1)
    sums = pair_sums.HopperPairSums(made, call.scores, 132, kernel_options(hopper.tuning.BIAS, dim, dim, True))
    assert sums.of_bias(call.scores.dense[0]).dtype == call.scores.dense[0].dtype
    (kernel,) = hopper_kernels
    assert kernel.metadata.name == "_pair_sums_kernel"
    assert kernel.metadata.shared <= TARGETS["sm_90"][1]
    loops = loops_with_products(kernel)
    assert len(loops) == 2
    for body in loops:
        stores, loads = (sum(op.startswith(name) for op in body) for name in ("STL", "LDL"))
        print(f"{kind}: {len(body)} instructions, {stores} stores, {loads} loads")
        assert len(body) <= most
        assert (stores <= most_stores, loads <= most_loads) == (True, True)
        # both products of a chunk are waited for while those of the next one run
        assert sum(op.startswith("WARPGROUP.DEPBAR") for op in body) <= 4
        assert sum(op.startswith("LDSM") for op in body) == (0 if "bias_dtype" in terms else 8)
