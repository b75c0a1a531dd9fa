"""From one case to its rows: check every provider against fp64, then time those that are right, in turns."""

from __future__ import annotations

import functools
import gc
import itertools
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

import anymask
from benchmarks import check, timing
from benchmarks.cases import SUITES, Case, Problem, Suite, make_problem
from benchmarks.providers import Prepared, Unsupported, failures, is_ours, prepare
from benchmarks.results import FAILED, OK, SKIPPED, WRONG, Row, reason

# floating-point operations per attended pair and dimension: products of head_dim, and of v_dim
FLOPS = {"inference": (2, 2), "forward": (2, 2), "backward": (6, 4), "both": (8, 6)}
# unmeasured calls on the wall clock: torch records a CUDA graph in the second
WARM_UP = 3


class Lost(Exception):
    """The GPU answers no more calls of this process; nothing that follows would say anything about who makes it."""


class Wrong(Exception):
    """A mask that was built is not the one that was asked for."""


@dataclass(frozen=True)
class Ready:
    """A provider whose result is right."""

    prepared: Prepared
    errors: check.Errors | None


class Judge:
    """The fp64 results of a problem, with and without its mask, each computed when it is first asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.expected = functools.cache(functools.partial(check.expected, problem))

    def errors(self, prepared: Prepared) -> check.Errors | None:
        """Errors of what it computes; None of a mask that is as it should be."""
        p, masked = self.problem, not prepared.unmasked
        if prepared.attend is None:
            built = prepared.builds[0]()
            if isinstance(built, anymask.BlockMask) and not check.mask_is(built, p):
                raise Wrong("it packs another mask")
            return None
        leaves = p.q, p.k, p.v
        if prepared.forward_only or not {"backward", "both"} & set(p.case.passes):
            return check.errors(p, (prepared.attend(*(t.detach() for t in leaves)),), self.expected(masked))
        out = prepared.attend(*leaves)
        return check.errors(p, (out, *torch.autograd.grad(out, leaves, p.do)), self.expected(masked))


def rows_of(suite: Suite, case: Case, device: str, names: list[str], earlier: str | None) -> Iterator[Row]:
    """The rows of a case, those without numbers first."""
    problem = make_problem(case, device, earlier=earlier)
    judge, ready = Judge(problem), {}
    for name in names:
        found = _ready(suite, judge, name)
        if isinstance(found, Ready):
            ready[name] = found
        else:
            yield found
            if found.status == FAILED and _is_lost(device):
                raise Lost(f"stopped, as the GPU answers no more calls after {case.name}, {name}: {found.note}")
    for step in case.passes:
        functions = {n: call for n, r in ready.items() if (call := _call(problem, r.prepared, step)) is not None}
        if functions:
            yield from _timed(suite, problem, step, functions, ready)


def _ready(suite: Suite, judge: Judge, name: str) -> Ready | Row:
    """The provider ready to be timed, or the row that says why not."""
    case = judge.problem.case
    row = Row(suite.name, case.name, str(case.shape), name, "", FAILED, "")
    try:
        prepared = prepare(name, judge.problem)
        errors = judge.errors(prepared)
    except Unsupported as why:
        return replace(row, status=SKIPPED, note=str(why))
    except Wrong as why:
        return replace(row, status=WRONG, note=str(why))
    except failures() as error:
        if is_ours(name):
            traceback.print_exception(error)
        return replace(row, note=reason(error))
    if errors is None or errors.right:
        return Ready(prepared, errors)
    if errors.excess["o"] <= 1 and not is_ours(name):
        # the output of a rival may still be timed; its gradients have no speed
        note = f"{prepared.note}; gradients WRONG: {errors}"
        return Ready(replace(prepared, forward_only=True, note=note), errors)
    note = f"{prepared.note}; errors: {errors}"
    return replace(row, status=WRONG, note=note, errors=errors.total, error_ratios=errors.ratio)


def _call(problem: Problem, prepared: Prepared, step: str) -> Callable[[], object] | None:
    """The call that is timed, None if the provider has no such pass."""
    if step == "build":
        turns = itertools.cycle(prepared.builds)
        return lambda: next(turns)()
    attend, leaves, do = prepared.attend, (problem.q, problem.k, problem.v), problem.do
    assert attend is not None
    if step == "inference" or (step == "forward" and prepared.forward_only):
        detached = [t.detach() for t in leaves]
        return lambda: attend(*detached)
    if prepared.forward_only:
        return None
    if step == "forward":
        return lambda: attend(*leaves)
    if step == "backward":
        out = attend(*leaves)
        return lambda: torch.autograd.grad(out, leaves, do, retain_graph=True)

    def both() -> object:
        if problem.case.mode == "reduce-overhead":
            # torch's CUDA graph writes over the results of the step before
            torch.compiler.cudagraph_mark_step_begin()
        return torch.autograd.grad(attend(*leaves), leaves, do)

    return both


def _timed(
    suite: Suite, problem: Problem, step: str, functions: dict[str, Callable[[], object]], ready: dict[str, Ready]
) -> Iterator[Row]:
    case, on_gpu = problem.case, problem.device == "cuda"
    rows = {}
    for name in functions:
        row = Row(suite.name, case.name, str(case.shape), name, step, OK, ready[name].prepared.note)
        if (errors := ready[name].errors) is not None:
            row.errors, row.error_ratios = errors.total, errors.ratio
        rows[name] = row
    for name, function in functions.items():
        for _ in range(WARM_UP):
            function()
        if on_gpu and suite.memory:
            rows[name].extra_bytes = timing.extra_bytes(function)
        if on_gpu and suite.host and suite.clock == "device":
            rows[name].host_us = timing.host_us(function)
    if on_gpu and suite.clock == "device":
        times = timing.cuda_ms(functions, suite.rounds, suite.block_ms)
    else:
        found = timing.wall_ms(functions, suite.rounds, problem.device)
        times = {name: wall for name, (wall, _) in found.items()}
        for name, (_, us) in found.items():
            rows[name].host_us = us if suite.host else None
    s, pairs = case.shape, problem.pairs
    for name, row in rows.items():
        row.ms, row.p20, row.p80 = times[name].median, times[name].p20, times[name].p80
        if on_gpu:
            row.sm_clock_mhz = timing.sm_clock_mhz(functions[name])
        if step in FLOPS:
            seen = s.batch * s.heads * s.q_len * s.kv_len if ready[name].prepared.unmasked else pairs
            row.tflops = seen * (FLOPS[step][0] * s.head_dim + FLOPS[step][1] * s.v_dim) / row.ms / 1e9
    set_ratios(case, list(rows.values()), {n: ready[n].prepared.unmasked for n in rows})
    yield from rows.values()


def set_ratios(case: Case, rows: list[Row], unmasked: dict[str, bool]) -> None:
    """Each row's time over that of the fastest rival that minds the mask, or of the fastest if none does."""
    rivals = [row for row in rows if row.provider in case.rivals]
    rivals = [row for row in rivals if not unmasked[row.provider]] or rivals
    if not rivals:
        return
    best = min(rivals, key=lambda row: row.ms or 0.0)
    for row in rows:
        if row.ms and best.ms:
            row.ratio, row.rival = row.ms / best.ms, best.provider


def warm(suite: str, name: str, providers: list[str]) -> list[str]:
    """Compile what ours and FlexAttention need for a case into the caches on disk; what failed, to be tried again."""
    case, failed = next(case for case in SUITES[suite].cases if case.name == name), []
    try:
        judge = Judge(make_problem(case, "cuda"))
    except failures() as error:
        return [f"{name}: {reason(error)}"]
    # nothing is compared
    judge.expected = lambda with_mask: {}  # type: ignore[assignment]
    for provider in (p for p in providers if p.partition(":")[0] in ("anymask", "pack", "flex")):
        row = _ready(SUITES[suite], judge, provider)
        if isinstance(row, Row) and row.status == FAILED:
            failed.append(f"{name}, {provider}: {row.note}")
    release()
    return failed


def release() -> None:
    """Forget compiled code and freed memory before the next case."""
    if torch.cuda.is_available():
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _is_lost(device: str) -> bool:
    """Whether an error has ended this process's work on the GPU: after an illegal access every call fails."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
