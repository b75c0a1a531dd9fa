"""One driver for all benchmarks: `python -m benchmarks.run --quick`.

Rows are printed and saved as they are found; the report ends in the table of figures to reach. The exit code is 0 if
everything of ours ran and was right, 1 if not or if a call has crashed the GPU, which ends the run, 2 for wrong
arguments, 130 if interrupted. A missed figure is not an error of the run: it is in the table. `anymask bench` is the
same driver.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import check, compare, measure, report
from benchmarks.figures import Verdict, judge
from benchmarks.providers import OURS, failures
from benchmarks.results import FAILED, OK, SKIPPED, WRONG, Results, Row, Rows, environment, reason, slug
from benchmarks.suites import GPU_BACKENDS, GPU_SUITES, Case, Suite, make_problem, quick_cpu, resized

BUDGET = "the time budget is spent"


class Lost(Exception):
    """The GPU answers no more calls of this process; nothing that follows would say anything about who makes it."""


@dataclass(frozen=True)
class Job:
    """One case with the rows it will give, `(group, provider)` each."""

    case: Case
    wanted: tuple[tuple[str, str], ...]

    def names(self, group: str) -> list[str]:
        """Providers of a group."""
        return [provider for found, provider in self.wanted if found == group]


@dataclass(frozen=True)
class Runner:
    """A suite on a device, and where its rows go."""

    suite: Suite
    ours: tuple[str, ...]
    device: str
    seed: int
    max_autotune: bool
    # folder of the earlier package's module, for its provider
    earlier: str | None
    # seconds since `started` after which nothing new is begun
    budget: float
    started: float
    results: Results
    emit: Callable[[Row], None]
    say: Callable[[str], None]

    def run(self, jobs: list[Job]) -> None:
        """All jobs, leaving out the rows that are there already; device times of building masks come last."""
        for job in jobs:
            self._safely(self._missing(job), self._job)
        for job in jobs:
            self._safely(self._untimed(job), self._device_times)

    def _missing(self, job: Job) -> Job:
        """The part of a job that has no rows yet, or only such as another try may better."""
        wanted = []
        for group, provider in job.wanted:
            row = self.results.rows.find(group, job.case.name, provider)
            if row is None or row.status == FAILED or row.note == BUDGET or row.note.endswith("is not installed"):
                wanted.append((group, provider))
        baseline = "attention", self.suite.baseline
        if baseline in job.wanted and wanted and baseline not in wanted:
            # a ratio needs both sides
            wanted.append(baseline)
        return replace(job, wanted=tuple(wanted))

    def _untimed(self, job: Job) -> Job:
        rows = [self.results.rows.find("pack", job.case.name, provider) for provider in job.names("pack")]
        late = [row for row in rows if row is not None and row.status == OK and "wall_ms" in row.values]
        return replace(job, wanted=tuple(("pack", row.provider) for row in late if "device_ms" not in row.values))

    def _safely(self, job: Job, work: Callable[[Job], None]) -> None:
        if not job.wanted:
            return
        if self.spent():
            self._all(job, SKIPPED, BUDGET)
            return
        try:
            work(job)
        except failures() as error:
            # what no provider is to blame for: making the inputs, the reference, or timing what ran before
            traceback.print_exception(error)
            self._check_device(f"{job.case.name}: {reason(error)}")
            self._all(job, FAILED, reason(error))
        measure.release()

    def _device_times(self, job: Job) -> None:
        problem = make_problem(job.case, self.device, self.seed, self.max_autotune, self.earlier)
        for provider in job.names("pack"):
            row = self.results.rows.find("pack", job.case.name, provider)
            assert row is not None
            self.emit(measure.with_device_time(problem, row))

    def _job(self, job: Job) -> None:
        problem = make_problem(job.case, self.device, self.seed, self.max_autotune, self.earlier)
        attention = job.names("attention")
        expected = check.references(problem) if attention else {}
        ready: dict[str, measure.Ready] = {}
        for provider in attention:
            if self.spent():
                self.emit(Row("attention", job.case.name, provider, SKIPPED, BUDGET))
                continue
            found = measure.prepare(problem, provider, expected)
            if isinstance(found, Row):
                self._emit(found)
            else:
                ready[provider] = found
                self.say(f"{job.case.name}/{provider}: right, error in all/in a row {found.errors}")
        if ready:
            for row in measure.attention_rows(self.suite, problem, ready):
                self.emit(row)
        ready.clear()
        for provider in job.names("pack"):
            if self.spent():
                self.emit(Row("pack", job.case.name, provider, SKIPPED, BUDGET))
            else:
                self._emit(measure.pack_row(self.suite, problem, provider))

    def _emit(self, row: Row) -> None:
        self.emit(row)
        if row.status == FAILED:
            self._check_device(f"{row.case}/{row.provider}: {row.note}")

    def _check_device(self, what: str) -> None:
        if measure.is_lost(self.device):
            raise Lost(f"stopped, as the GPU answers no more calls after {what}; --resume goes on with what is missing")

    def spent(self) -> bool:
        """Whether the time budget is used up."""
        return time.monotonic() - self.started > self.budget

    def _all(self, job: Job, status: str, note: str) -> None:
        for group, provider in job.wanted:
            row = self.results.rows.find(group, job.case.name, provider)
            if row is None or row.note == BUDGET:
                self.emit(Row(group, job.case.name, provider, status, note))


def plan(suite: Suite, ours: tuple[str, ...], only: str) -> list[Job]:
    """The rows to measure, of which `group/case/provider` contains `only`."""
    jobs = []
    for case in suite.cases:
        wanted = [("attention", name) for name in (*ours, *case.rivals)] if suite.passes else []
        if case.mask is not None and suite.packs:
            wanted += [("pack", name) for name in measure.pack_providers(suite, case)]
        kept = {(g, p): None for g, p in wanted if only in f"{g}/{case.name}/{p}"}
        if suite.baseline is not None and any(g == "attention" for g, _ in kept):
            # a ratio needs both sides
            kept["attention", suite.baseline] = None
        if kept:
            jobs.append(Job(case, tuple(kept)))
    return jobs


def verdicts_of(suite: Suite, results: Results, ours: str) -> list[Verdict]:
    """The table of figures; at another length than theirs, none is measured."""
    if suite.judged:
        return judge(suite.figures(), results.rows, ours)
    note = f"stated for other lengths; this run has {suite.shape}"
    return [replace(v, note=note) for v in judge(suite.figures(), Rows(), ours)]


def exit_code(results: Results) -> int:
    """1 if anything of ours failed, was wrong, or could not run a case at all."""
    mine = [row for row in results.rows if row.provider.startswith("anymask")]
    if any(row.status in (FAILED, WRONG) for row in mine):
        return 1
    ran = {(row.group, row.case) for row in mine if row.status == OK}
    unexplained = [row for row in mine if (row.group, row.case) not in ran and row.note != BUDGET]
    return 1 if unexplained else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    chosen = p.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--quick", action="store_const", dest="suite", const="quick", help="the same as --suite quick")
    chosen.add_argument(
        "--compare", nargs=2, type=Path, metavar="FILE.json", help="show what changed between two runs beyond noise"
    )
    chosen.add_argument(
        "--suite", choices=tuple(GPU_SUITES), metavar="NAME", help=f"{', '.join(GPU_SUITES)}; a CPU has quick"
    )
    p.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    p.add_argument(
        "--backend",
        action="append",
        help=f"ours to measure, repeatable; for --quick on a GPU {', '.join(GPU_BACKENDS)}",
    )
    p.add_argument(
        "--out",
        type=Path,
        help="folder; default benchmarks/results/<device>, with --only or --length out/benchmarks/<device>",
    )
    p.add_argument("--threads", type=int, help="CPU threads of torch")
    p.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing new after this")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", default="", metavar="TEXT", help="only rows whose group/case/provider contains it")
    p.add_argument("--length", type=int, metavar="TOKENS", help="another length, at which the figures are not judged")
    p.add_argument("--max-autotune", action="store_true", help="let torch.compile search; takes minutes more")
    p.add_argument("--resume", action="store_true", help="keep the rows of an interrupted run of the same code")
    p.add_argument("--earlier", metavar="FOLDER", help="where the earlier package's fa2_custom_mask is, as a rival")
    p.add_argument("--json", action="store_true", help="print the result as JSON too, and progress to the error stream")
    p.add_argument("--commit", help="commit to record where the code is not a git checkout")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run and report; returns the exit code."""
    started = time.monotonic()
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments)
    if options.compare:
        try:
            changes = compare.compare(*options.compare)
        except ValueError as error:
            parser().error(str(error))
        print(compare.to_json(changes) if options.json else compare.to_text(changes))
        return 0
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    if device == "cpu" and options.suite != "quick":
        parser().error(f"--suite {options.suite} needs a GPU; a CPU has quick")
    suite = quick_cpu() if device == "cpu" else GPU_SUITES[options.suite]()
    if options.length:
        suite = resized(suite, options.length)
    partial = options.only or options.length
    folder = options.out or Path("out/benchmarks" if partial else "benchmarks/results") / slug(device)
    env = environment(device, suite.name, suite.shape, options.seed, command_line(arguments), options.commit)
    if options.resume and (env["commit"] == "unknown" or env["commit"].endswith("+changes")):
        parser().error(f"--resume needs rows of the same code, and the commit is {env['commit']}")
    try:
        results = Results.start(folder / f"{suite.name}.json", env, options.resume)
    except ValueError as error:
        parser().error(str(error))
    ours = tuple(OURS + name for name in options.backend or suite.ours)
    return drive(suite, ours, device, options, results, started)


def drive(
    suite: Suite, ours: tuple[str, ...], device: str, options: argparse.Namespace, results: Results, started: float
) -> int:
    """Run the plan under a progress bar, write the report, print the figures."""
    # rows are long: let the terminal wrap them, and keep them whole in a file
    console = Console(soft_wrap=True, highlight=False, markup=False, stderr=options.json)
    jobs = plan(suite, ours, options.only)
    total = sum(len(job.wanted) for job in jobs)
    console.print(
        f"{results.environment['device']}, {suite.shape}, {total} rows, commit {results.environment['commit']}"
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    code = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(suite.name, total=total, completed=0)

        def say(text: str) -> None:
            progress.console.print(f"{time.monotonic() - started:6.1f} s  {text}")

        def emit(row: Row) -> None:
            results.add(row)
            report.write(suite, results, verdicts_of(suite, results, ours[0]), with_plots=False)
            progress.update(task, completed=len(results.rows))
            say(f"[{len(results.rows)}/{total}] {report.summary_line(row)}")

        runner = Runner(
            suite,
            ours,
            device,
            options.seed,
            options.max_autotune,
            options.earlier,
            options.budget,
            started,
            results,
            emit,
            say,
        )
        try:
            runner.run(jobs)
        except KeyboardInterrupt:
            code = 130
        except Lost as error:
            say(str(error))
            code = 1
    verdicts = verdicts_of(suite, results, ours[0])
    results.environment["seconds"] = f"{time.monotonic() - started:.0f}"
    results.save()
    written = report.write(suite, results, verdicts, with_plots=True)
    console.print(report.verdict_table(verdicts))
    console.print(f"{time.monotonic() - started:.0f} s; wrote {', '.join(path.name for path in written)}")
    if options.json:
        print(results.path.read_text(), end="")
    return code or exit_code(results)


def command_line(arguments: list[str]) -> str:
    """The command as recorded: folders are the reader's own."""
    kept, skip = [], False
    for argument in arguments:
        own = argument.startswith(("--out", "--earlier"))
        if not (skip or own):
            kept.append(argument)
        if argument.startswith("--earlier"):
            kept.append("--earlier FOLDER")
        skip = own and "=" not in argument
    return " ".join(["python -m benchmarks.run", *kept])


if __name__ == "__main__":
    sys.exit(main())
