"""The host's part of small calls, held to a loop of Python: a change that makes every call slower is seen here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import host

ROOT = Path(__file__).parent.parent
# loops that a call may take: twice what they took, as other programs on the machine make a third of difference
MOST = {
    "forward": 1.4,
    "forward, gradients recorded": 2.1,
    "forward and backward": 8.5,
    "a soft cap": 2.0,
}


@pytest.fixture(scope="module")
def loops() -> dict[str, float]:
    """Of a process of its own: in this one all memory is filled with NaN."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host", "--eager"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = [re.fullmatch(r"(.+?) +([\d.]+) +([\d.]+)", line) for line in done.stdout.splitlines()[1:]]
    return {row[1]: float(row[3]) for row in found if row is not None}


def test_calls_take_few_loops(loops: dict[str, float]) -> None:
    for name, most in MOST.items():
        assert loops[name] <= most, f"{name} took {loops[name]:.2f} loops of Python; allowed are {most}"


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("a mask of one leaf", 0.7),
        ("a mask of three leaves", 1.0),
        ("a tensor seen before", 0.6),
        ("a view made anew", 0.7),
    ],
)
def test_a_mask_that_is_remembered_costs_little(loops: dict[str, float], name: str, most: float) -> None:
    """Beside the call with the packed mask."""
    assert loops[name] - loops["forward"] <= most


def test_the_stubs_run_the_hopper_backend_and_leave_nothing() -> None:
    from anymask import explain, launch
    from anymask.backends import hopper

    q = torch.randn(1, 2, 128, 64, dtype=torch.bfloat16)
    before = hopper.why_not, launch._kernels
    with host.stubbed():
        assert explain(q, q, q).backend == "hopper"
        assert host.calls(compiled=False)["forward"]().shape == (1, 8, host.LENGTH, 128)
        assert len(launch._kernels) == 1
    assert (hopper.why_not, launch._kernels) == before
    assert explain(q, q, q).backend != "hopper"
