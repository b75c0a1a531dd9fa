"""What a sanitizer says is read right, and it sees kernels of few programs."""

import pytest
import torch

from anymask import backends
from tests import sanitize

RACE = (
    "========= Error: Race reported between Read access at _fwd_kernel+0x140 in {}\n"
    "=========     and Write access at _fwd_kernel+0x77e0 in {} [12 hazards]\n"
    "========= RACECHECK SUMMARY: 1 hazards displayed (1 errors, 0 warnings)"
)


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [
        ("x\n========= ERROR SUMMARY: 0 errors\n", 0, "clean"),
        ("AssertionError: dq\n========= ERROR SUMMARY: 0 errors", 1, "exit code 1: AssertionError: dq"),
        (RACE.format(*list(sanitize.handshake())[:2]), 0, "clean, but for Triton's handshake"),
        (RACE.format(*list(sanitize.handshake())[:2]), 1, "1 hazards displayed"),
        (RACE.format("forward_kernel.py:1", "x.py:2"), 0, "1 hazards displayed (1 errors, 0 warnings) forwa"),
    ],
)
def test_what_a_sanitizer_says(output: str, code: int, expected: str) -> None:
    assert sanitize.verdict(output, code).startswith(expected)


def test_kernels_run_on_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    hopper = backends.load("hopper")
    monkeypatch.setattr(hopper, "multiprocessors", hopper.multiprocessors)
    sanitize.use_few_programs()
    assert hopper.multiprocessors(torch.device("cpu")) == sanitize.PROGRAMS
