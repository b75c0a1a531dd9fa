"""From one case to its rows: check every provider against fp64, then time those that are right, in turns."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import anymask
from benchmarks import check, models, timing
from benchmarks.cases import SUITES, Case, Inputs, Suite, make_inputs
from benchmarks.models import Batch
from benchmarks.providers import Prepared, Unsupported, failures, is_ours, prepare
from benchmarks.results import FAILED, OK, SKIPPED, WRONG, Row, reason

# floating-point operations per attended pair and dimension: products of head_dim, and of v_dim
FLOPS = {"inference": (2, 2), "forward": (2, 2), "backward": (6, 4), "both": (8, 6)}
# unmeasured calls on the wall clock: torch records a CUDA graph in the second
WARM_UP = 3


class Lost(Exception):
    """The GPU answers no more calls of this process."""


def errors_of(prepared: Prepared, inputs: Inputs | Batch, expected: Callable[[bool], Any]) -> check.Errors:
    """Errors of what it computes, or whether it builds the mask of the case; `expected` takes whether with the mask."""
    if isinstance(inputs, Batch):
        assert prepared.training is not None
        return models.errors(prepared.training, expected(True))
    if prepared.attend is None:
        built = prepared.builds[0]()
        right = not isinstance(built, anymask.BlockMask) or check.mask_is(built, inputs)
        return check.Errors(excess={"mask": 0.0 if right else math.inf})
    qkv, wanted = (inputs.q, inputs.k, inputs.v), expected(not prepared.unmasked)
    if prepared.forward_only or not {"backward", "both"} & set(inputs.case.passes):
        return check.errors(inputs, (prepared.attend(*(t.detach() for t in qkv)).detach(),), wanted)
    out = prepared.attend(*qkv)
    leaves = qkv if prepared.unmasked else inputs.inputs
    return check.errors(inputs, (out, *torch.autograd.grad(out, leaves, inputs.do)), wanted)


def rows_of(suite: Suite, case: Case, device: str, names: list[str], earlier: str | None) -> Iterator[Row]:
    """The rows of a case, those without numbers first."""
    inputs = _inputs(case, device, earlier)
    oracle: Any = models.expected if isinstance(inputs, Batch) else check.expected
    expected, ready = functools.cache(functools.partial(oracle, inputs)), {}
    for name in names:
        found = _ready(suite, inputs, expected, name)
        if isinstance(found, Prepared):
            ready[name] = found
        else:
            yield found
            if found.status == FAILED and _is_lost(device):
                raise Lost(f"the GPU answers no more calls after {case.name}, {name}: {found.note}")
    for step in case.passes:
        functions = {n: call for n, r in ready.items() if (call := _call(inputs, r, step)) is not None}
        if functions:
            yield from _timed(suite, inputs, step, functions, ready)


def _inputs(case: Case, device: str, earlier: str | None = None) -> Inputs | Batch:
    return make_inputs(case, device, earlier=earlier) if case.model is None else models.make_batch(case, device)


def _ready(suite: Suite, inputs: Inputs | Batch, expected: Callable[[bool], Any], name: str) -> Prepared | Row:
    """The provider ready to be timed, or the row that says why not."""
    case = inputs.case
    row = Row(suite.name, case.name, str(case.shape), name, "", FAILED, "")
    try:
        prepared = prepare(name, inputs)
        errors = errors_of(prepared, inputs, expected)
    except Unsupported as why:
        return replace(row, status=SKIPPED, note=str(why))
    except failures() as error:
        if is_ours(name):
            traceback.print_exception(error)
        return replace(row, note=reason(error))
    if errors.right:
        return replace(prepared, errors=errors)
    if errors.excess.get("o", math.inf) <= 1 and not is_ours(name):
        # the output of a baseline may still be timed; its gradients have no speed
        note = f"{prepared.note}; gradients WRONG: {errors}"
        return replace(prepared, forward_only=True, note=note, errors=errors)
    note = f"{prepared.note}; errors: {errors}"
    return replace(row, status=WRONG, note=note, errors=errors.total, error_ratios=errors.ratio)


def _call(inputs: Inputs | Batch, prepared: Prepared, step: str) -> Callable[[], object] | None:
    """The call that is timed, None if the provider has no such pass."""
    if isinstance(inputs, Batch):
        assert prepared.training is not None
        return prepared.training.step
    if step == "build":
        turns = itertools.cycle(prepared.builds)
        return lambda: next(turns)()
    attend, qkv, do = prepared.attend, (inputs.q, inputs.k, inputs.v), inputs.do
    leaves = qkv if prepared.unmasked else inputs.inputs
    assert attend is not None
    if step == "inference" or (step == "forward" and prepared.forward_only):
        detached = [t.detach() for t in qkv]
        return lambda: attend(*detached)
    if prepared.forward_only:
        return None
    if step == "forward":
        return lambda: attend(*qkv)
    if step == "backward":
        out = attend(*qkv)
        return lambda: torch.autograd.grad(out, leaves, do, retain_graph=True)

    def both() -> object:
        if inputs.case.mode == "reduce-overhead":
            # torch's CUDA graph writes over the results of the step before
            torch.compiler.cudagraph_mark_step_begin()
        return torch.autograd.grad(attend(*qkv), leaves, do)

    return both


def _timed(
    suite: Suite,
    inputs: Inputs | Batch,
    step: str,
    functions: dict[str, Callable[[], object]],
    ready: dict[str, Prepared],
) -> Iterator[Row]:
    case, on_gpu, rows = inputs.case, inputs.device == "cuda", {}
    for name, function in functions.items():
        rows[name] = Row(suite.name, case.name, str(case.shape), name, step, OK, ready[name].note)
        rows[name].errors, rows[name].error_ratios = ready[name].errors.total, ready[name].errors.ratio
        for _ in range(WARM_UP):
            function()
        if on_gpu and suite.memory:
            rows[name].extra_bytes = timing.extra_bytes(function)
    if by_events := on_gpu and suite.clock == "device":
        times = timing.cuda_ms(functions, suite.rounds, suite.block_ms)
    else:
        found = timing.wall_ms(functions, suite.rounds, inputs.device)
        times = {name: wall for name, (wall, _) in found.items()}
    s, pairs = case.shape, 0 if isinstance(inputs, Batch) else inputs.pairs
    for name, row in rows.items():
        row.ms, row.p20, row.p80 = times[name].median, times[name].p20, times[name].p80
        if suite.host:
            row.host_us = timing.host_us(functions[name]) if by_events else found[name][1]
        if step in FLOPS:
            seen = s.batch * s.heads * s.q_len * s.kv_len if ready[name].unmasked else pairs
            row.tflops = seen * (FLOPS[step][0] * s.head_dim + FLOPS[step][1] * s.v_dim) / row.ms / 1e9
    set_ratios(case, list(rows.values()), {n: ready[n].unmasked for n in rows})
    yield from rows.values()


def set_ratios(case: Case, rows: list[Row], unmasked: dict[str, bool]) -> None:
    """Each row's time over that of the fastest baseline that minds the mask, or of the fastest if none does."""
    baselines = [row for row in rows if row.provider in case.baselines]
    baselines = [row for row in baselines if not unmasked[row.provider]] or baselines
    if not baselines:
        return
    best = min(baselines, key=lambda row: row.ms or 0.0)
    for row in rows:
        if row.ms and best.ms:
            row.ratio, row.baseline = row.ms / best.ms, best.provider


def warm(suite: str, name: str, providers: list[str]) -> None:
    """Compile what ours and FlexAttention need for a case into the caches on disk. What fails here fails in the run."""
    case = next(case for case in SUITES[suite].cases if case.name == name)
    inputs = make_inputs(case, "cuda")
    for provider in (p for p in providers if p.partition(":")[0] in ("anymask", "pack", "flex")):
        # nothing is compared
        _ready(SUITES[suite], inputs, lambda with_mask: {}, provider)
    release()


def release() -> None:
    """Forget compiled code and freed memory before the next case."""
    if torch.cuda.is_available():
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _is_lost(device: str) -> bool:
    """Whether an error has ended this process's work on the GPU: after an illegal access every call fails."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
