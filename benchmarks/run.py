"""One driver for all benchmarks: `python -m benchmarks.run --suite trades --out FOLDER`.

Every call is checked against fp64 before it is timed, and providers of a case take turns. FOLDER/SUITE.json is whole
after every case; the table comes last. The exit code is 0 if everything of ours that ran was right, 2 for wrong
arguments, else 1: also if the run was interrupted, or a call has crashed the GPU, which ends it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import measure, report
from benchmarks.cases import SUITES, Case, Suite, tiny
from benchmarks.providers import PROVIDERS, failures, is_ours
from benchmarks.results import FAILED, WRONG, Results, Row, environment, reason

# processes that compile ahead; each has a context of its own on the GPU
PROCESSES = 8


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__.splitlines()[0])
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=tuple(SUITES), metavar="NAME", help=", ".join(SUITES))
    what.add_argument("--list", action="store_true", help="suites, and what they measure")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    names = tuple(PROVIDERS)
    p.add_argument("--provider", action="append", choices=names, metavar="NAME", help="only these; repeat it")
    p.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains it")
    p.add_argument("--tiny", action="store_true", help="sizes that a CPU bears: everything but the times is real")
    p.add_argument("--earlier", metavar="FOLDER", help="a checkout of flashattention2-custom-mask, as a baseline")
    p.add_argument("--commit", help="commit to record where the code is no git checkout")
    p.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder of the JSON; default %(default)s")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run and report; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments)
    if options.list:
        print("\n".join(f"{s.name:13}{len(s.cases):4} cases  {s.about}" for s in SUITES.values()))
        return 0
    suite = SUITES[options.suite]
    if options.device == "cpu" and suite.name != "cpu" and not options.tiny:
        parser().error(f"--suite {suite.name} needs a GPU; a CPU has --suite cpu, and every suite with --tiny")
    suite = tiny(suite) if options.tiny else suite
    cases = [case for case in suite.cases if options.case in case.name]
    if not cases:
        parser().error(f"--case is {options.case!r}; allowed are parts of {', '.join(c.name for c in suite.cases)}")
    # folders are the reader's own
    said = re.sub(r"(--out|--earlier)[ =]\S+", r"\1 FOLDER", " ".join(["python -m benchmarks.run", *arguments]))
    results = Results(environment(options.device, said, options.commit))
    return drive(replace(suite, cases=cases), options, results)


def drive(suite: Suite, options: argparse.Namespace, results: Results) -> int:
    """All cases, with a line of progress for each row."""
    started, path, code = time.monotonic(), options.out / f"{suite.name}.json", 0

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    def record(row: Row, n: int) -> None:
        results.rows.append(row)
        say(f"[{n}/{len(suite.cases)}] {report.row_line(row)}")

    say(f"{suite.name}: {len(suite.cases)} cases on {results.environment['card']}")
    try:
        if options.device == "cuda":
            compile_ahead(suite, options)
            say("compiled ahead")
        for n, case in enumerate(suite.cases, 1):
            try:
                for row in measure.rows_of(suite, case, options.device, names_of(case, options), options.earlier):
                    record(row, n)
            except failures() as error:
                # what no provider is to blame for: making the inputs, the oracle, or timing what ran before
                measure.traceback.print_exception(error)
                record(Row(suite.name, case.name, str(case.shape), case.ours[0], "", FAILED, reason(error)), n)
            results.save(path)
            measure.release()
    except (measure.Lost, KeyboardInterrupt) as error:
        say(f"stopped: {error!r}")
        code = 1
    results.environment["seconds"] = f"{time.monotonic() - started:.0f}"
    results.save(path)
    print(f"\n{report.table(results)}\n\n{report.untimed(results)}\n{report.source(results)}")
    print(f"{results.environment['seconds']} s; wrote {path}")
    failed = any(row.status in (FAILED, WRONG) and is_ours(row.provider) for row in results.rows)
    return code or int(failed)


def names_of(case: Case, options: argparse.Namespace) -> list[str]:
    """Providers of a case, ours first."""
    return [name for name in (*case.ours, *case.baselines) if name in (options.provider or PROVIDERS)]


def compile_ahead(suite: Suite, options: argparse.Namespace) -> None:
    """Fill the caches of compilers in parallel. What fails here fails again in the run, which says why."""
    with ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        # a model compiles next to nothing that another process could
        for case in (case for case in suite.cases if case.model is None):
            pool.submit(measure.warm, suite.name, case.name, names_of(case, options))


if __name__ == "__main__":
    sys.exit(main())
