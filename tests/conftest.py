"""What every test runs under: poisoned memory, one thread a worker, and a summary of the worst errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from anymask import calls, plan, testing

INT_GARBAGE = 0x6B6B6B6B6B6B6B6B


def poison(t: Tensor) -> Tensor:
    """`t` filled with what no correct output holds: NaN, or a large number."""
    if isinstance(t, FakeTensor) or t.device.type == "meta" or torch.compiler.is_compiling():
        return t
    with torch.no_grad():
        if t.dtype.is_floating_point or t.dtype.is_complex:
            return t.fill_(float("nan"))
        if t.dtype == torch.bool:
            return t.fill_(True)
        return t.fill_(INT_GARBAGE & torch.iinfo(t.dtype).max)


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is garbage in every test, so an output that nobody writes shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            return poison(make(*args, **kwargs))

        return make_poisoned

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided")),
            (Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
        if plan.empty_on_cuda is not None:
            patch.setattr(plan, "empty_on_cuda", poisoned(plan.empty_on_cuda))
        yield


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # workers of pytest-xdist share the cores already
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    """Tests put other functions where plans would remember those that were there."""
    calls.forget()


@pytest.fixture(autouse=True)
def seed() -> int:
    """0, which torch's generators start from in every test."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def _hopper(request: pytest.FixtureRequest) -> None:
    """Skip what needs that GPU where there is another, or none."""
    if request.node.get_closest_marker("hopper") is None:
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU of compute capability 9.0")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of tests marked gpu, on which the eager yardstick accumulates in fp32."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    matmul = torch.backends.cuda.matmul
    for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
        monkeypatch.setattr(matmul, name, False)
    return "cuda"


@pytest.fixture
def compiled() -> Iterator[Callable[[str], list[Any]]]:
    """A function that makes a target current and returns the list that its compiled kernels are added to."""
    # needs Triton
    from tests.helpers.compile_only import Checking, compiling

    with ExitStack() as stack:
        yield lambda target: stack.enter_context(compiling(target, Checking()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    testing.RECORDS.clear()
    try:
        return (yield)
    finally:
        worst: dict[str, float] = {}
        for r in testing.RECORDS:
            key = f"{testing.DTYPE_NAMES[r.dtype]} {r.what} {r.kind}"
            worst[key] = max(worst.get(key, 0.0), r.ratio)
        # properties travel from the workers of pytest-xdist with the report
        item.user_properties.append(("worst_ratios", worst))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print, for each dtype and tensor, the largest error ratio of the passed tests and where it was."""
    worst: dict[str, tuple[float, str]] = {}
    for report in terminalreporter.stats.get("passed", []):
        # their cases fail on purpose
        if any(name in report.nodeid for name in ("test_testing", "test_check")):
            continue
        for key, ratio in dict(report.user_properties).get("worst_ratios", {}).items():
            worst[key] = max(worst.get(key, (0.0, "")), (ratio, report.nodeid))
    if worst:
        terminalreporter.section("worst error ratios (limits: max 2, rmse 1.1; lse and f64: 1)")
    for key, (ratio, where) in sorted(worst.items()):
        terminalreporter.write_line(f"{key:14} {ratio:8.4f}  {where}")
