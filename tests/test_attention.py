"""The CPU and reference backends over the grid: every mask, shape, dtype, layout and scale, forward and backward."""

import gc
import weakref
from typing import Any

import pytest
import torch

from anymask import attention, causal, pack
from anymask.backends import cpu
from anymask.testing import LAYOUTS, MASKS, Case, check, make_inputs, reference, run
from tests.helpers import grid
from tests.helpers.grid import BF16, F16, F32, F64, cases
from tests.helpers.memory import AllocationMode

BACKENDS = ("cpu", "reference")


@cases(BACKENDS, [Case(m, 239, 129, 64, t) for m in MASKS for t in (F16, BF16, F32, F64)])
def test_masks(backend: str, case: Case) -> None:
    check(case, backend)


@cases(BACKENDS, [Case(m, 129, 300, 32, F32, q_heads=4) for m in MASKS])
def test_masks_with_grouped_heads(backend: str, case: Case) -> None:
    check(case, backend)


@cases(BACKENDS, [Case(m, q, kv, 32, t) for q, kv in grid.LENGTHS for m in grid.LENGTH_MASKS for t in (F16, F32)])
def test_lengths(backend: str, case: Case) -> None:
    check(case, backend)


@cases(BACKENDS, [Case(m, 63, 137, d, t, dv) for d, dv in grid.DIMS for m in ("random", "causal") for t in (F32, BF16)])
def test_head_dims(backend: str, case: Case) -> None:
    check(case, backend)


@cases(
    BACKENDS,
    [
        Case(m, 70, 150, 16, t, q_heads=h, kv_heads=g)
        for h, g in grid.HEADS
        for m in grid.HEAD_MASKS
        for t in (F32, F16)
    ],
)
def test_heads(backend: str, case: Case) -> None:
    check(case, backend)


@cases(
    BACKENDS,
    [
        Case(m, n, 150, 32, t, 48, q_heads=4, layout=layout)
        for layout in LAYOUTS
        for n in (70, 150)
        for m in ("none", "documents")
        for t in (F32, BF16)
    ],
)
def test_layouts(backend: str, case: Case) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", grid.ORDERS)
def test_outputs_lie_as_inputs_do(order: tuple[int, ...], backend: str) -> None:
    grid.check_layouts(order, (4, 2, 70, 150), backend)


@cases(
    BACKENDS,
    [
        Case(m, 70, 150, 32, t, scale=s)
        for s in (-0.3, 0.0, 1e-3, 1.0, 3)
        for m in ("none", "random")
        for t in (F32, F16)
    ],
)
def test_scales(backend: str, case: Case) -> None:
    check(case, backend)


# more kv tiles than a step of the CPU backend, and more heads than fit one step
@cases(
    BACKENDS,
    [
        Case(m, 140, 2200, 16, t, batch=1)
        for m in ("none", "random", "tiles", "documents", "empty_columns")
        for t in (F32, F16)
    ]
    # scores large enough to need a running maximum over several steps
    + [Case(m, 140, 2200, 16, t, batch=1, scale=2.0) for m in ("none", "random", "documents") for t in (F32, F16)]
    + [Case(m, 130, 1100, 8, F32, batch=1, q_heads=20, kv_heads=20) for m in ("none", "per_head")]
    + [Case(m, 130, 1100, 8, F32, batch=1, q_heads=20, kv_heads=10) for m in ("random", "per_head")],
)
def test_many_tiles_and_heads(backend: str, case: Case) -> None:
    check(case, backend)


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(BACKENDS, [Case(m, 140, 300, 16, t) for m in grid.UNUSED_MASKS for t in (F32, BF16)])
def test_unused_keys_reach_nothing(backend: str, case: Case, value: float) -> None:
    grid.check_unused_keys_reach_nothing(case, backend, "cpu", value)


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(BACKENDS, [Case(m, 300, 140, 16) for m in ("empty_rows", "column", "all_empty", "one_pair", "causal_behind")])
def test_unused_queries_reach_nothing(backend: str, case: Case, value: float) -> None:
    grid.check_unused_queries_reach_nothing(case, backend, "cpu", value)


@cases(BACKENDS, [Case("random", 200, 300, 32, t, q_heads=4) for t in (F16, BF16, F32, F64)])
def test_emptied_rows_leave_the_others(backend: str, case: Case) -> None:
    grid.check_emptied_rows_leave_the_others(case, backend, "cpu")


@cases(BACKENDS, [Case("causal", 300, 200, 32, t) for t in (F16, F32)])
def test_forms_of_a_mask_agree(backend: str, case: Case) -> None:
    grid.check_forms_of_a_mask_agree(case, backend, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_does_not_outlive_its_call(backend: str) -> None:
    grid.check_a_mask_does_not_outlive_its_call(backend, "cpu")


@cases(BACKENDS, [Case(m, 100, 300, 32, t) for m in ("causal_lower_right", "random", "none") for t in (F32, BF16)])
def test_growing_scores(backend: str, case: Case) -> None:
    grid.check_growing_scores(case, backend, "cpu")


@cases(("cpu",), [Case(m, 30, 2500, 32, F32) for m in ("random", "none")])
def test_growing_scores_of_many_keys(backend: str, case: Case) -> None:
    grid.check_growing_scores(case, backend, "cpu")


@cases(BACKENDS, [Case(m, 100, 400, 32, F32) for m in ("random", "none")])
def test_a_first_tile_of_zero_scores(backend: str, case: Case) -> None:
    grid.check_a_first_tile_of_zero_scores(case, backend, "cpu")


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(BACKENDS, [Case("random", 150, 200, 16, F32, q_heads=h, kv_heads=2) for h in (2, 4)])
def test_unused_rows_that_differ_by_head(backend: str, case: Case, value: float) -> None:
    grid.check_unused_rows_that_differ_by_head(case, backend, "cpu", value)


@cases(BACKENDS, [Case(m, 100, 300, 32, t) for m in ("causal_lower_right", "random", "none") for t in (F32, BF16)])
def test_high_hidden_scores(backend: str, case: Case) -> None:
    grid.check_high_hidden_scores(case, backend, "cpu")


@pytest.mark.parametrize("shift", [-50.0, -89.0, -1000.0, -10000.0, 1000.0])
@cases(BACKENDS, [Case("random", 130, kv, 32, t) for kv in (1, 64, 127, 129, 192) for t in (F32, BF16)])
def test_far_from_zero_scores(backend: str, case: Case, shift: float) -> None:
    grid.check_far_from_zero(case, backend, "cpu", shift)


@pytest.mark.parametrize("backend", BACKENDS)
class TestGradients:
    def test_without_lse(self, backend: str) -> None:
        i = make_inputs(Case("random", 70, 50, 16))
        o = attention(i.q, i.k, i.v, i.mask, backend=backend)
        got = torch.autograd.grad(o, [i.q, i.k, i.v], i.do)
        expected = reference(i.q, i.k, i.v, i.dense, None, i.do)
        for a, b in zip(got, expected[2:], strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)

    def test_of_lse_alone(self, backend: str) -> None:
        i = make_inputs(Case("empty_rows", 70, 50, 16))
        _, lse = attention(i.q, i.k, i.v, i.mask, return_lse=True, backend=backend)
        dq, dk, dv = torch.autograd.grad(lse, [i.q, i.k, i.v], i.dlse)
        expected = reference(i.q, i.k, i.v, i.dense, None, torch.zeros_like(i.do), i.dlse)
        torch.testing.assert_close(dq.double(), expected.dq, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dk.double(), expected.dk, atol=1e-5, rtol=1e-5)
        assert not dv.count_nonzero()

    @pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
    def test_of_some_inputs(self, backend: str, wanted: tuple[int, ...]) -> None:
        i = make_inputs(Case("random", 70, 50, 16))
        everything = run(i, backend=backend)
        inputs = [t.detach().requires_grad_(n in wanted) for n, t in enumerate(i[:3])]
        o, lse = attention(*inputs, i.mask, return_lse=True, backend=backend)
        torch.autograd.backward([o, lse], [i.do, i.dlse])
        for n, t in enumerate(inputs):
            assert (t.grad is not None) == (n in wanted)
            assert t.grad is None or torch.equal(t.grad, everything[2 + n])

    def test_needed_by_nobody(self, backend: str) -> None:
        i = make_inputs(Case("random", 70, 50, 16))
        with torch.no_grad():
            assert not attention(i.q, i.k, i.v, i.mask, backend=backend).requires_grad
        with torch.inference_mode():
            assert attention(i.q, i.k, i.v, i.mask, backend=backend).isfinite().all()

    def test_nothing_stays_alive(self, backend: str) -> None:
        i = make_inputs(Case("random", 70, 50, 16))
        o = attention(i.q, i.k, i.v, i.mask, backend=backend)
        o.sum().backward()
        gone = weakref.ref(o)
        del o
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_runs_repeat(dtype: torch.dtype) -> None:
    grid.check_repeats(Case("per_head", 300, 300, 32, dtype), "cpu", "cpu", 20)


@pytest.mark.parametrize("mask", ["causal", "random"])
def test_cpu_memory_is_not_proportional_to_the_pairs(mask: str) -> None:
    i = make_inputs(Case(mask, 3072, 3072, 8, batch=1, q_heads=1, kv_heads=1))
    block_mask = pack(i.mask, q_len=3072, kv_len=3072)
    with AllocationMode() as memory:
        run(i._replace(mask=block_mask), backend="cpu")
    # a step of scores in fp32; all pairs as bytes are 9 MiB, as fp32 36 MiB
    assert memory.largest <= 4 * cpu.steps.STEP_SCORES < 3072 * 3072


def test_empty_tiles_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    steps = cpu.Call.steps

    def counted(self: Any, line: Any) -> Any:
        for step in steps(self, line):
            computed.append(step.bias.shape[1] // 128 + step.n_full)
            yield step

    monkeypatch.setattr(cpu.Call, "steps", counted)
    q = torch.randn(1, 1, 1024, 8)
    attention(q, q, q, causal() & ~causal(offset=-128), backend="cpu")
    # two tiles a line, one in the first
    assert sum(computed) == 15
