"""Runs the Hopper kernels under compute-sanitizer: `python -m benchmarks.sanitize` checks memory, then races.

Every case is a process of its own, forward and backward, compared with the portable kernels. The exit code is the
number of cases in which a tool found something or a result was wrong.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

TOOLS = ("memcheck", "racecheck")
# a tool makes kernels hundreds of times slower
LIMIT_S = 300


@dataclass(frozen=True)
class Case:
    """Sizes of a call, and the share of pairs that attend: None is no mask, 1.0 causal."""

    head_dim: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    dtype: str
    share: float | None

    def __str__(self) -> str:
        mask = {None: "no mask", 1.0: "causal"}.get(self.share, f"random {self.share}")
        return f"D{self.head_dim} {self.q_len}x{self.kv_len} H{self.q_heads}:{self.kv_heads} {self.dtype} {mask}"


CASES = (
    Case(128, 256, 256, 2, 2, "float16", None),
    Case(128, 256, 384, 2, 2, "float16", 0.5),
    Case(128, 300, 300, 4, 2, "bfloat16", 1.0),
    Case(128, 200, 500, 4, 1, "float16", 0.1),
    Case(128, 130, 70, 2, 2, "bfloat16", None),
    Case(96, 256, 256, 2, 2, "float16", 0.5),
    Case(64, 256, 256, 2, 2, "float16", None),
    Case(64, 256, 384, 2, 2, "float16", 0.5),
    Case(64, 300, 300, 4, 2, "bfloat16", 1.0),
    Case(64, 200, 500, 4, 1, "float16", 0.1),
    Case(64, 130, 70, 2, 2, "bfloat16", None),
    Case(40, 256, 256, 2, 2, "float16", 0.5),
)


def run(case: Case) -> None:
    """One forward and one backward call; raises AssertionError if they differ from the portable kernels'."""
    import anymask

    dtype = getattr(torch, case.dtype)
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, case.head_dim, device="cuda", dtype=dtype, generator=generator)

    q, k, v = normal(case.q_heads, case.q_len), *(normal(case.kv_heads, case.kv_len) for _ in range(2))
    mask = None
    if case.share is not None:
        mask = torch.rand(case.q_len, case.kv_len, device="cuda", generator=generator) < case.share
        mask = mask.tril() if case.share == 1.0 else mask
    results = []
    for backend in ("hopper", "triton"):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        o = anymask.attention(*leaves, mask, backend=backend)
        results.append((o, *torch.autograd.grad(o, leaves, o.detach())))
    for name, x, y in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        assert float((x.float() - y.float()).norm()) <= 2e-2 * float(y.float().norm()), name


def verdict(output: str, code: int) -> str:
    """What a tool's output says: "clean", its count of errors, or the end of what went wrong."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    if summary is None:
        return f"no summary: {output.strip()[-200:]}"
    if code or not re.match(r"0 (errors|hazards)", summary[1]):
        return summary[1] if not summary[1].startswith("0") else f"exit code {code}: {output.strip()[-200:]}"
    return "clean"


def main() -> int:
    """Run all cases under all tools, or with `--case` one case under none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, help="run this one without a tool")
    parser.add_argument("--tool", choices=TOOLS, action="append")
    options = parser.parse_args()
    if options.case is not None:
        run(CASES[options.case])
        return 0
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    table, bad = Table("case", *(options.tool or TOOLS)), 0
    for i, case in track(list(enumerate(CASES)), "cases"):
        verdicts = []
        for tool in options.tool or TOOLS:
            command = [
                "compute-sanitizer",
                "--tool",
                tool,
                sys.executable,
                "-m",
                "benchmarks.sanitize",
                "--case",
                str(i),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
            verdicts.append(verdict(done.stdout + done.stderr, done.returncode))
        bad += any(v != "clean" for v in verdicts)
        table.add_row(str(case), *verdicts)
    Console().print(table)
    return bad


if __name__ == "__main__":
    sys.exit(main())
