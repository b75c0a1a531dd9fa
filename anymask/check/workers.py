"""Processes that run units of jobs: what kills one is one failed case, and another takes its place."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import anymask
from anymask.check.jobs import Job
from anymask.check.tally import Tally

# a case that compiles all its kernels takes a tenth of this
JOB_SECONDS = 300.0


class Worker:
    """One process of `anymask.check.worker`, started again whenever it ends."""

    def __init__(self, device: str, threads: int, seconds: float = JOB_SECONDS) -> None:
        """A worker for a device; a job that takes longer than `seconds` is a failed one."""
        self._command = [sys.executable, "-m", "anymask.check.worker", device, str(threads)]
        self._device, self._seconds = device, seconds
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self._late = self._closed = False

    def run(self, jobs: list[Job]) -> Tally | None:
        """Tally of all jobs; None if `close` came between."""
        total, done = Tally(), 0
        while done < len(jobs):
            if self._closed:
                return None
            process = self._started()
            answered, lost = self._stream(process, jobs[done:], total)
            done += answered
            if done == len(jobs) and not lost:
                break
            code = process.wait()
            if self._closed:
                return None
            if not lost:
                # the job after the last that answered ended the process
                late = f"no result after {self._seconds:g} s"
                message = late if self._late else f"the process ended with code {code}: {self._last_words()}"
                total.merge(_dead(jobs[done], message, self._device))
                done += 1
        return total

    def close(self) -> None:
        """End the process, and start no other."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
        self._let_go()

    def _let_go(self) -> None:
        """Wait for the process, which ends or is killed, and close its pipes."""
        if self._process is None or self._errors is None:
            return
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process = None

    def _stream(self, process: subprocess.Popen[str], jobs: list[Job], total: Tally) -> tuple[int, bool]:
        """How many jobs were answered, and whether the last of them lost the GPU's context, which ends the process."""
        assert process.stdin is not None
        assert process.stdout is not None
        self._late = False
        try:
            process.stdin.write(json.dumps([job.to_json() for job in jobs]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return 0, False
        for done in range(len(jobs)):
            timer = threading.Timer(self._seconds, self._kill_late, (process,))
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            if not line.endswith("\n"):
                return done, False
            tally = Tally.from_json(json.loads(line))
            total.merge(tally)
            if tally.broken:
                return done + 1, True
        return len(jobs), False

    def _kill_late(self, process: subprocess.Popen[str]) -> None:
        self._late = True
        process.kill()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._let_go()
            self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
            paths = [str(Path(anymask.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        return self._process

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        return " | ".join(self._errors.read().strip().splitlines()[-6:]) or "no message"


def _dead(job: Job, message: str, device: str) -> Tally:
    tally = Tally()
    tally.count(job.check, "process", "failed")
    python = job.python(job.runners[0] if job.runners else None, device)
    tally.failures.append({"check": job.check, "by": "process", "error": message, "python": python})
    return tally


def run_units(
    units: list[tuple[int, list[Job]]],
    device: str,
    jobs: int,
    threads: int,
    report: Callable[[int, Tally], Any],
    tick: Callable[[], Any],
    end: float = math.inf,
    grace: float = 40.0,
) -> None:
    """Run numbered units in `jobs` processes; `report` gets each tally in this thread, which calls `tick` every second.

    Once `time.monotonic()` is at `end` no unit starts; those that have may take `grace` seconds more, or are dropped.
    """
    waiting: queue.SimpleQueue[tuple[int, list[Job]]] = queue.SimpleQueue()
    finished: queue.SimpleQueue[tuple[int, Tally] | None] = queue.SimpleQueue()
    for unit in units:
        waiting.put(unit)
    workers = [Worker(device, threads) for _ in range(jobs)]
    for worker in workers:
        threading.Thread(target=_serve, args=(worker, waiting, finished, end), daemon=True).start()
    running = len(workers)
    try:
        while running and time.monotonic() < end + grace:
            try:
                found = finished.get(timeout=1.0)
            except queue.Empty:
                tick()
                continue
            if found is None:
                running -= 1
            else:
                report(*found)
    finally:
        for worker in workers:
            worker.close()


def _serve(
    worker: Worker,
    waiting: queue.SimpleQueue[tuple[int, list[Job]]],
    finished: queue.SimpleQueue[tuple[int, Tally] | None],
    end: float,
) -> None:
    try:
        while time.monotonic() < end:
            number, jobs = waiting.get_nowait()
            tally = worker.run(jobs)
            if tally is not None:
                finished.put((number, tally))
    except queue.Empty:
        pass
    finally:
        finished.put(None)
