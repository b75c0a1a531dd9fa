"""One driver for all benchmarks: `python -m benchmarks.run --suite trades --out FOLDER`.

Every call is checked against fp64 before it is timed, and providers of a case take turns. FOLDER/SUITE.json is whole
after every case; the table comes last. The exit code is 0 if everything of ours that ran was right, 1 if not or if a
call has crashed the GPU, which ends the run, 2 for wrong arguments, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
    what.add_argument("--quick", action="store_true", help="suite quick on a GPU, cpu on a CPU")
    what.add_argument("--list", action="store_true", help="suites, and what they measure")
    what.add_argument("--table", action="store_true", help="write docs/performance.md's tables again, from the results")
    what.add_argument("--pictures", action="store_true", help="draw the pictures again, from the results")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--provider", action="append", choices=tuple(PROVIDERS), metavar="NAME", help="only these; repeat it"
    )
    p.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains it")
    p.add_argument("--tiny", action="store_true", help="sizes that a CPU bears: everything but the times is real")
    p.add_argument("--earlier", metavar="FOLDER", help="a checkout of flashattention2-custom-mask, as a rival")
    p.add_argument(
        "--processes", type=int, default=min(PROCESSES, os.cpu_count() or 1), help="to compile ahead, 0: none"
    )
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
    if options.table or options.pictures:
        for path in report.write_page() if options.table else report.draw_all():
            print(f"wrote {path}")
        return 0
    suite = SUITES[options.suite or ("quick" if options.device == "cuda" else "cpu")]
    if options.device == "cpu" and suite.name != "cpu" and not options.tiny:
        parser().error(f"--suite {suite.name} needs a GPU; a CPU has --suite cpu, and every suite with --tiny")
    suite = tiny(suite) if options.tiny else suite
    cases = [case for case in suite.cases if options.case in case.name]
    if not cases:
        parser().error(f"--case is {options.case!r}; allowed are parts of {', '.join(c.name for c in suite.cases)}")
    return drive(
        replace(suite, cases=cases), options, Results(environment(options.device, _command(arguments), options.commit))
    )


def drive(suite: Suite, options: argparse.Namespace, results: Results) -> int:
    """All cases, with a line of progress for each row."""
    started, path, code = time.monotonic(), options.out / f"{suite.name}.json", 0

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    say(f"{suite.name}: {len(suite.cases)} cases on {results.environment['card']}")
    try:
        if options.device == "cuda" and options.processes:
            for text in compile_ahead(suite, options):
                say(text)
        for n, case in enumerate(suite.cases, 1):
            try:
                for row in measure.rows_of(suite, case, options.device, names_of(case, options), options.earlier):
                    results.rows.append(row)
                    say(f"[{n}/{len(suite.cases)}] {report.row_line(row)}")
            except failures() as error:
                # what no provider is to blame for: making the inputs, the oracle, or timing what ran before
                measure.traceback.print_exception(error)
                row = Row(suite.name, case.name, str(case.shape), case.ours[0], "", FAILED, reason(error))
                results.rows.append(row)
                say(f"[{n}/{len(suite.cases)}] {report.row_line(row)}")
            results.save(path)
            measure.release()
    except measure.Lost as error:
        say(str(error))
        code = 1
    except KeyboardInterrupt:
        code = 130
    results.environment["seconds"] = f"{time.monotonic() - started:.0f}"
    results.save(path)
    print(f"\n{report.table(results)}\n\n{report.untimed(results)}\n{report.source(results)}")
    print(f"{results.environment['seconds']} s; wrote {path}")
    failed = any(row.status in (FAILED, WRONG) and is_ours(row.provider) for row in results.rows)
    return code or int(failed)


def names_of(case: Case, options: argparse.Namespace) -> list[str]:
    """Providers of a case, ours first."""
    names = dict.fromkeys((*case.ours, *case.rivals))
    return [name for name in names if options.provider is None or name in options.provider]


def compile_ahead(suite: Suite, options: argparse.Namespace) -> list[str]:
    """Fill the caches of compilers in parallel; what to say about it. Failures show again, and count, in the run."""
    begin, failed = time.monotonic(), []
    try:
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            work = [pool.submit(measure.warm, suite.name, case.name, names_of(case, options)) for case in suite.cases]
            failed = [text for future in work for text in future.result()]
    except BrokenProcessPool:
        failed = ["a process that compiled ahead has died"]
    return [*failed, f"compiled ahead in {time.monotonic() - begin:.0f} s"]


def _command(arguments: list[str]) -> str:
    """The command as recorded: folders are the reader's own."""
    kept = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        kept.append("FOLDER" if before in ("--out", "--earlier") else argument)
    return " ".join(["python -m benchmarks.run", *kept])


if __name__ == "__main__":
    sys.exit(main())
