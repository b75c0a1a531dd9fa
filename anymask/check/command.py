"""`anymask check`, whose options are read here: without typer and rich it is `python -m anymask.check`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch

import anymask
from anymask import backends
from anymask.check.jobs import Job
from anymask.check.plan import FULL, QUICK, plan
from anymask.check.report import Run, figures, markdown
from anymask.check.tally import Tally
from anymask.check.workers import run_units
from anymask.collect_env import collect_env

# between two lines of progress where nobody watches
LINE_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `anymask check`.

    Returns:
        0 if every case passed, else 1; 2 for wrong options.
    """
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as leave:
        return int(leave.code or 0)
    try:
        device = _device(options.device)
        return _check(options, device)
    except (ValueError, OSError) as error:
        print(f"anymask check: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anymask check", description="Is attention on this machine correct?")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="about a minute (the default)")
    size.add_argument("--full", action="store_true", help="more than 40,000 cases; minutes on a GPU")
    parser.add_argument("--backend", action="append", default=[], choices=backends.NAMES, help="only this; repeatable")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--jobs", type=int, help="processes; half of the cores unless given")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs")
    parser.add_argument("--seconds", type=float, help="end after so long; --resume goes on later")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what is done there, and do the rest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a report in Markdown there")
    return parser


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"--device is {name}; allowed are auto, cpu, cuda and cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {name}, but torch finds {torch.cuda.device_count()} GPUs")
    return name


def _check(options: argparse.Namespace, device: str) -> int:
    cores = os.cpu_count() or 1
    jobs = max(1, cores // 2) if options.jobs is None else options.jobs
    for name, value in (("--jobs", jobs), ("--seconds", options.seconds)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; allowed are numbers above 0")
    started = time.monotonic()
    units = plan(FULL if options.full else QUICK, device, options.seed, options.backend)
    size = "full" if options.full else "quick"
    header = {"anymask": anymask.__version__, "size": size, "seed": options.seed, "device": device.partition(":")[0]}
    header |= {"backends": options.backend, "units": len(units)}
    total, done = Tally(), set[int]()
    for path in (options.json, options.report):
        if path is not None:
            # a path that cannot be written says so now, not after minutes
            path.open("a").close()
    log = _resumed(options.resume, header, total, done) if options.resume else None
    progress = _Progress(units, total, done)

    def report(number: int, tally: Tally) -> None:
        total.merge(tally)
        done.add(number)
        if log is not None:
            log.write(json.dumps({"unit": number, "tally": tally.to_json()}) + "\n")
            log.flush()
        progress()

    left = [(number, unit) for number, unit in enumerate(units) if number not in done]
    end = started + (options.seconds or float("inf"))
    try:
        run_units(left, device, min(jobs, max(len(left), 1)), max(1, cores // jobs), report, progress, end)
    finally:
        progress.close()
        if log is not None:
            log.close()
    return _finish(options, device, started, total, len(units), len(done))


def _finish(options: argparse.Namespace, device: str, started: float, total: Tally, units: int, done: int) -> int:
    command = "anymask check " + ("--full" if options.full else "--quick")
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    seconds = time.monotonic() - started
    run = Run(command, now, options.seed, device, collect_env(), seconds, units, done)
    text = markdown(run, total)
    if options.json is not None:
        options.json.write_text(json.dumps(figures(run, total), indent=1) + "\n")
    if options.report is not None:
        options.report.write_text(text)
    else:
        print(text)
    cases, failed = total.total("passed") + total.total("failed"), total.total("failed")
    rest = "" if done == units else f"; {units - done} of {units} parts are left, --resume goes on"
    print(f"anymask check: {cases:,} cases in {seconds:.0f} s, {failed} failed{rest}")
    return 1 if failed else 0


def _resumed(path: Path, header: dict[str, Any], total: Tally, done: set[int]) -> IO[str]:
    """The open file of what is done, whose tallies are added to `total`; a line that was cut off is not read."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    if found and found[0] != header:
        raise ValueError(f"--resume is {path}, which holds another check: {found[0]}; this one is {header}")
    for line in found[1:]:
        total.merge(Tally.from_json(line["tally"]))
        done.add(line["unit"])
    with path.open("w") as kept:
        kept.writelines(json.dumps(line) + "\n" for line in (found or [header]))
    return path.open("a")


class _Progress:
    """A bar of rich on a terminal, else a line every ten seconds."""

    def __init__(self, units: list[list[Job]], total: Tally, done: set[int]) -> None:
        self._units, self._total, self._done = units, total, done
        self._next = self._started = time.monotonic()
        self._bar: Callable[[int, str], None] | None = None
        self._rich: Any = None
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import Progress
            except ModuleNotFoundError:
                return
            self._rich = Progress(console=Console(stderr=True))
            self._task = self._rich.add_task("checking", total=len(units))
            self._rich.start()

    def __call__(self) -> None:
        """Show how far it is."""
        total = self._total
        failed = total.total("failed")
        text = f"{total.total('passed') + failed:,} cases, {failed} failed"
        if self._rich is not None:
            self._rich.update(self._task, completed=len(self._done), description=text)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_SECONDS
            share = len(self._done) / max(len(self._units), 1)
            print(f"{time.monotonic() - self._started:4.0f} s  {text}, {share:.0%} of the plan", file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._rich is not None:
            self._rich.stop()
