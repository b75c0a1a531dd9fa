"""Runs the tests of interpreted kernels in a process of their own, where Triton interprets."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

NAMES = (
    "interpreter",
    "interpreter_split",
    "interpreter_scores",
    "interpreter_packing",
    "interpreter_diagonals",
    "fp32",
    "fp32_parts",
)
FILES = [f"tests/test_{name}.py" for name in NAMES]
MINIMUM = 400


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_under_the_interpreter() -> None:
    root = Path(__file__).parent.parent
    # the parent's worker settings must not reach the child's
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    workers = ["-n", "2"] if find_spec("xdist") else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *FILES, "-q", *workers],
        cwd=root, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) >= MINIMUM
    print(done.stdout[-3000:])
