"""Runs kernels under compute-sanitizer: `python -m tests.sanitize` checks memory, then races.

Every case is a process of its own. Its mask is packed, attention runs forward and backward, the Hopper kernels on few
programs, and results are compared with fp64. The exit code is the number of cases in which a tool found something or a
result was wrong.

One report of racecheck is left out, and said to be: Triton wakes the warps of a partition with a word in shared memory,
written and read between barriers of all warps of the program (`barrier.sync 1`). The tool sees no order in them, as
every partition waits at an instruction of its own.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from anymask import backends
from anymask.testing import Case, check

TOOLS = ("memcheck", "racecheck")
# a tool makes kernels hundreds of times slower
LIMIT_S = 300
# programs of a kernel: each takes several work tiles, one after another
PROGRAMS = 3
F16, BF16 = torch.float16, torch.bfloat16
# lengths of whole tiles and not, longer and shorter than one, with and without groups of heads
HOPPER = (
    *(
        Case(*sizes, batch=1, q_heads=heads, kv_heads=kv_heads)
        for dim in (128, 64)
        for heads, kv_heads, *sizes in (
            (2, 2, "none", 256, 256, dim, F16),
            (2, 2, "random", 256, 384, dim, F16),
            (4, 2, "causal", 300, 300, dim, BF16),
            (4, 1, "random_1", 200, 500, dim, F16),
            (2, 2, "none", 130, 70, dim, BF16),
        )
    ),
    *(Case("random", 256, 256, dim, F16, batch=1) for dim in (96, 40)),
)
# masks by name and by function, of each kind of leaf, and rows and keys that are unused
TRITON = (
    Case("random", 256, 384, 64, F16, batch=1),
    Case("documents", 300, 300, 128, BF16, batch=2, q_heads=4, kv_heads=2),
    Case("empty_columns", 200, 300, 64, torch.float32, batch=1),
    Case("causal_key_padding", 130, 260, 128, torch.float32, batch=2),
    Case("random_1", 140, 150, 256, F16, batch=1),
    Case("drawn_block_sparse", 300, 300, 192, BF16, 128, batch=1),
    Case("drawn_from_function & per_head", 200, 130, 72, F16, batch=1),
    Case("drawn_tree | drawn_dilated", 257, 257, 32, BF16, batch=1),
    Case("none", 100, 130, 31, F16, batch=1),
)
CASES = (*(("hopper", case) for case in HOPPER), *(("triton", case) for case in TRITON))


def use_few_programs() -> None:
    """Make the launchers believe in a GPU of few multiprocessors."""
    backends.load("hopper").multiprocessors = lambda device: PROGRAMS  # type: ignore[attr-defined]


def handshake() -> Iterator[str]:
    """`file:line` where Triton wakes partitions: in the kernels themselves, whose functions use all shared memory."""
    for path in (Path(backends.__file__).parent / "hopper").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in ("_fwd_kernel", "_bwd_kernel"):
                yield from (f"{path.name}:{n}" for n in range(node.lineno, (node.end_lineno or node.lineno) + 1))


def verdict(output: str, code: int) -> str:
    """What a tool's output says: "clean", its count of errors, or the end of what went wrong."""
    places = re.findall(r"(?:Read|Write) access at \S+ in (\S+:\d+)", output)
    if places and not code and set(places) <= set(handshake()):
        return "clean, but for Triton's handshake"
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    if summary is not None and not re.match(r"0 (errors|hazards)", summary[1]):
        return f"{summary[1]} {', '.join(dict.fromkeys(places))}"
    return f"exit code {code}: {output.strip()[-200:]}" if code or summary is None else "clean"


def inspect(tool: str, i: int) -> str:
    """The verdict of `tool` on the case at `i`."""
    command = ["compute-sanitizer", "--tool", tool, sys.executable, "-m", "tests.sanitize", "--case", str(i)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {LIMIT_S} s"
    return verdict(done.stdout + done.stderr, done.returncode)


def main() -> int:
    """Run all cases under all tools, or with `--case` one case under none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, help="run this one without a tool")
    parser.add_argument("--tool", choices=TOOLS, action="append")
    options = parser.parse_args()
    if options.case is not None:
        use_few_programs()
        backend, case = CASES[options.case]
        check(case, backend, "cuda")
        return 0
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    tools, bad = options.tool or TOOLS, 0
    # mostly imports and compilation, on cores of their own
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [pool.map(inspect, tools, [i] * len(tools)) for i in range(len(CASES))]
        for i, verdicts in enumerate(map(list, found)):
            bad += not all(v.startswith("clean") for v in verdicts)
            said = "; ".join(map(" ".join, zip(tools, verdicts, strict=True)))
            print(f"[{i + 1}/{len(CASES)}] {' '.join(map(str, CASES[i]))}: {said}", flush=True)
    print(f"{len(CASES) - bad} of {len(CASES)} cases are clean")
    return bad


if __name__ == "__main__":
    sys.exit(main())
