"""Plants bugs, one at a time, and says which tests see them: `python -m tests.mutate`, on a GPU `--gpu`.

Each bug of `tests/helpers/mutants.py` is planted in a copy of the checkout, where the tests named beside it must fail.
A bug that they do not see is a survivor: a test is missing. The exit code is the number of survivors and of bugs whose
tests could not run.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from queue import Queue

import torch

from tests.helpers.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
# folders that a copy needs, beside the files at the top
FOLDERS = ("anymask", "tests", "benchmarks", "examples", "docs")
# what pytest's exit codes say of a bug
VERDICTS = {0: "survived", 1: "killed"}


@dataclass(frozen=True)
class Found:
    """What the tests said of a bug."""

    mutant: Mutant
    # killed, survived, timeout, or what went wrong
    verdict: str
    seconds: float
    # the first test that failed, or the end of the output
    detail: str


def tracked_files() -> list[Path]:
    """Files of the checkout that a copy needs, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        files = [Path(name) for name in listed]
    except (FileNotFoundError, subprocess.CalledProcessError):
        # no git here, or a checkout that was copied without its repository
        inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
        files = [path.relative_to(ROOT) for path in [*ROOT.iterdir(), *inside] if "__pycache__" not in path.parts]
    wanted = [f for f in files if f.parts[0] in FOLDERS or len(f.parts) == 1]
    return sorted(f for f in wanted if (ROOT / f).is_file() and f.suffix not in (".png", ".json"))


def environment(mutant: Mutant, folder: Path) -> dict[str, str]:
    """What the tests of a bug run with: the copy, and Triton's interpreter if they are about it."""
    changed = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    if any("test_interpreter" in test for test in mutant.tests):
        changed["TRITON_INTERPRET"] = "1"
    return os.environ | changed


def copy_checkout(folder: Path) -> Path:
    """A copy of the checkout under `folder`, for one worker."""
    for file in tracked_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return folder


def plant(mutant: Mutant, source: str) -> str:
    """`source` with the bug; ValueError unless its place is there exactly once."""
    found = source.count(mutant.old)
    if found != 1:
        raise ValueError(f"{mutant.name}: its place is {found} times in {mutant.file}; allowed is once")
    return source.replace(mutant.old, mutant.new)


def judge(mutant: Mutant, folder: Path, gpu: bool, limit_s: float) -> Found:
    """Plant a bug in a copy, run its tests, and take it out again."""
    path = folder / mutant.file
    source = path.read_text()
    path.write_text(plant(mutant, source))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "gpu" if gpu else "not gpu"]
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *mutant.tests],
            cwd=folder,
            env=environment(mutant, folder),
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Found(mutant, "timeout", time.monotonic() - begun, f"not done after {limit_s:.0f} s")
    finally:
        path.write_text(source)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    detail = lines[0].split(" - ")[0] if lines else (done.stdout + done.stderr).strip()[-200:]
    verdict = VERDICTS.get(done.returncode, f"pytest exit code {done.returncode}")
    # a bug that no module survives importing shows nothing of the tests
    if verdict == "killed" and not any(line.startswith("FAILED") for line in lines):
        verdict = "error in set-up"
    return Found(mutant, verdict, time.monotonic() - begun, detail)


def run(mutants: Iterable[Mutant], gpu: bool, jobs: int, limit_s: float) -> list[Found]:
    """Judge bugs on `jobs` copies at a time, with a line for each as it comes."""
    mutants, found = list(mutants), []
    with tempfile.TemporaryDirectory() as top, ThreadPoolExecutor(jobs) as pool:
        folders: Queue[Path] = Queue()
        for i in range(jobs):
            folders.put(copy_checkout(Path(top) / str(i)))

        def take(mutant: Mutant) -> Found:
            folder = folders.get()
            try:
                return judge(mutant, folder, gpu, limit_s)
            finally:
                folders.put(folder)

        futures = [pool.submit(take, mutant) for mutant in mutants]
        for n, future in enumerate(as_completed(futures), start=1):
            one = future.result()
            found.append(one)
            print(
                f"{n:3}/{len(mutants)} {one.verdict:10} {one.seconds:6.1f} s  {one.mutant.name}: {one.detail}",
                flush=True,
            )
    order = {mutant.name: i for i, mutant in enumerate(mutants)}
    return sorted(found, key=lambda one: order[one.mutant.name])


def table(found: list[Found], gpu: bool) -> str:
    """The verdicts in Markdown, with what they were found on."""
    machine = torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores"
    killed = sum(one.verdict in ("killed", "timeout") for one in found)
    lines = [
        f"{killed} of {len(found)} planted bugs were seen: {date.today()}, {machine}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"`python -m tests.mutate{' --gpu' if gpu else ''}`.",
        "",
        "| planted | in | verdict | by |",
        "|---|---|---|---|",
    ]
    for one in found:
        by = one.detail.removeprefix("FAILED ").replace("|", "\\|") if one.verdict == "killed" else one.detail[:80]
        lines.append(f"| {one.mutant.name} | `{one.mutant.file}` | {one.verdict} | `{by}` |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Judge the bugs that are chosen, print what was found, and write it as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="those of GPU kernels, by tests that need a GPU")
    parser.add_argument("--only", default="", help="those whose name or file holds this text")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="copies at a time")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for the tests of a bug")
    parser.add_argument("--table", type=Path, help="write the verdicts there, in Markdown")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if m.gpu == options.gpu and options.only in f"{m.name} {m.file}"]
    found = run(chosen, options.gpu, options.jobs, options.limit)
    if options.table is not None:
        options.table.write_text(table(found, options.gpu))
    bad = [one for one in found if one.verdict not in ("killed", "timeout")]
    for one in bad:
        print(f"{one.verdict}: {one.mutant.name} in {one.mutant.file} by {' '.join(one.mutant.tests)}")
    print(f"{len(found) - len(bad)} of {len(found)} planted bugs were seen")
    return len(bad)


if __name__ == "__main__":
    sys.exit(main())
