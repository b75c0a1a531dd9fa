"""From one problem to its rows: check every provider against fp64, then time those that are right, in turns."""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import anymask
from benchmarks import check, timing
from benchmarks.masks import MaskMod
from benchmarks.providers import OURS, Prepared, Unsupported, captured, failures, find, flex_mask_builder
from benchmarks.results import FAILED, OK, SKIPPED, WRONG, Row, reason
from benchmarks.suites import DENSE_LENGTH, Case, Problem, Suite

# floating-point operations per attended pair and dimension: two products forward, five backward
FLOPS = {"forward": 4, "backward": 10, "both": 14}
# copies of the mask that packing cycles through, so that none is still in the L2 cache when its turn comes
COPIES = 4

References = dict[tuple[int, int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Ready:
    """A provider whose result is right, prepared and warm."""

    prepared: Prepared
    # output with its graph: what the backward pass is timed on
    out: Tensor
    errors: check.Errors


def prepare(problem: Problem, provider: str, expected: References) -> Ready | Row:
    """The provider ready to be timed, or the row that says why not."""

    def row(status: str, note: str, values: dict[str, float] | None = None) -> Row:
        return Row("attention", problem.case.name, provider, status, note, values or {})

    try:
        prepared = find(provider)(problem)
        leaves = (problem.q, problem.k, problem.v)
        if prepared.forward_only:
            leaves = tuple(t.detach() for t in leaves)
        out = prepared.attend(*leaves)
        grads = () if prepared.forward_only else torch.autograd.grad(out, leaves, problem.do, retain_graph=True)
        if prepared.unmasked:
            expected = check.references(replace(problem, mask=None))
        errors = check.errors(problem, (out, *grads), expected)
    except Unsupported as why:
        return row(SKIPPED, str(why))
    except failures() as error:
        if provider.startswith(OURS):
            traceback.print_exception(error)
        return row(FAILED, reason(error))
    if errors.right:
        return Ready(prepared, out, errors)
    of_output = replace(errors, total={"o": errors.total["o"]}, worst_row={"o": errors.worst_row["o"]})
    if of_output.right and not provider.startswith(OURS):
        # the output of a rival may still be measured; its gradients have no speed
        note = f"{prepared.note}; gradients WRONG, error in all/in a row: {errors}"
        return Ready(replace(prepared, forward_only=True, note=note), out.detach(), of_output)
    limits = f"more than {errors.tolerance:.0e}/{errors.tolerance * check.ROW_FACTOR:.0e}"
    return row(WRONG, f"error in all/in a row: {errors}, {limits}; {prepared.note}", error_values(errors))


def error_values(errors: check.Errors) -> dict[str, float]:
    """The errors as numbers of a row."""
    values = {f"error_{name}": e for name, e in errors.total.items()}
    return values | {f"worst_row_{name}": e for name, e in errors.worst_row.items()}


def attention_rows(suite: Suite, problem: Problem, ready: dict[str, Ready]) -> Iterator[Row]:
    """The timed rows of the providers that are ready."""
    case = problem.case.name
    if suite.baseline is not None and suite.baseline not in ready:
        for name in ready:
            yield Row("attention", case, name, SKIPPED, f"{suite.baseline} is not there to compare with")
        return
    all_pairs, masked_pairs = replace(problem, mask=None).pairs, problem.pairs
    pairs = {name: all_pairs if r.prepared.unmasked else masked_pairs for name, r in ready.items()}
    values = {name: error_values(r.errors) | {"pairs": float(pairs[name])} for name, r in ready.items()}
    calls = {name: _calls(suite, problem, r) for name, r in ready.items()}
    if suite.baseline is None:
        for name, r in ready.items():
            values[name] |= _memory(problem, calls[name])
            if not suite.host:
                continue
            values[name] |= {f"{step}_host_us": timing.host_us(call) for step, call in calls[name].items()}
            detached = [t.detach() for t in (problem.q, problem.k, problem.v)]
            values[name]["inference_host_us"] = timing.host_us(functools.partial(r.prepared.attend, *detached))
    for step in suite.passes:
        functions = {name: c[step] for name, c in calls.items() if step in c}
        if suite.baseline is not None:
            ratios = timing.cpu_ratios(functions, suite.baseline)
            for name, found in ratios.of.items():
                values[name] |= _quantiles(f"{step}_ratio", found)
                values[name] |= {f"{step}_rounds": float(ratios.rounds), f"{step}_quiet_rounds": float(ratios.quiet)}
            continue
        for name, found in timing.cuda_ms(functions, suite.rounds, suite.block_ms).items():
            flop = FLOPS[step] * problem.shape.head_dim
            values[name] |= _quantiles(f"{step}_ms", found)
            values[name][f"{step}_tflops"] = flop * pairs[name] / found.median / 1e9
            if name.startswith(OURS):
                values[name][f"{step}_tile_tflops"] = flop * problem.tile_pairs / found.median / 1e9
    for name, r in ready.items():
        yield Row("attention", case, name, OK, r.prepared.note, values[name])


def _calls(suite: Suite, problem: Problem, ready: Ready) -> dict[str, timing.Function]:
    """The passes of a suite that the provider has."""
    leaves, do, attend = (problem.q, problem.k, problem.v), problem.do, ready.prepared.attend
    if ready.prepared.forward_only:
        detached = [t.detach() for t in leaves]
        return {"forward": lambda: attend(*detached)}
    every = {
        "forward": lambda: attend(*leaves),
        "backward": lambda: torch.autograd.grad(ready.out, leaves, do, retain_graph=True),
        "both": lambda: torch.autograd.grad(attend(*leaves), leaves, do),
    }
    return {step: every[step] for step in suite.passes}


def _memory(problem: Problem, calls: dict[str, timing.Function]) -> dict[str, float]:
    """Peak extra bytes of a forward and of a backward call, beside the bytes of their results."""
    rows = problem.q.numel() // problem.q.shape[-1]
    values = {
        # lse is fp32
        "result_bytes": float(problem.q.nbytes + 4 * rows),
        "gradient_bytes": float(problem.q.nbytes + problem.k.nbytes + problem.v.nbytes),
    }
    for step, call in calls.items():
        requested, allocated = timing.extra_bytes(call)
        values[f"{step}_extra_bytes"] = float(requested)
        values[f"{step}_extra_allocated_bytes"] = float(allocated)
    return values


def _quantiles(key: str, found: timing.Quantiles) -> dict[str, float]:
    return {key: found.median, f"{key}_p20": found.p20, f"{key}_p80": found.p80}


def pack_providers(suite: Suite, case: Case) -> tuple[str, ...]:
    """Who builds the mask of a case: ours from what it can be given, and on a GPU FlexAttention's ways and a copy."""
    assert case.mask is not None
    if suite.baseline is not None:
        return ("anymask",)
    if case.shape.length > DENSE_LENGTH:
        return ("anymask:symbolic",)
    ours = ("anymask",) if case.mask.symbolic is None else ("anymask", "anymask:symbolic")
    if case.mask.rule is not None:
        return (*ours, "anymask:function", "flex-build", "flex-build-eager")
    return (*ours, "flex-build-dense", "flex-build-dense-eager", "copy")


def pack_row(suite: Suite, problem: Problem, provider: str) -> Row:
    """Time on the host's clock, and bytes, of building one plane's mask."""
    case, values = problem.case.name, {}
    try:
        builds, note = _builds(problem, provider)
        if provider.startswith("anymask"):
            found = builds[0]()
            assert isinstance(found, anymask.BlockMask)
            right, how = _is_right(problem, found)
            note = f"{note}{how}"
            if not right:
                return Row("pack", case, provider, WRONG, f"to_dense() is not the mask that was packed; {note}")
            values = {
                "words_bytes": float(found.rows.words.nbytes + found.cols.words.nbytes),
                "held_bytes": float(found.nbytes),
                "dense_bytes": float(problem.shape.length**2),
            }
            del found
        if suite.baseline is None:
            for build in builds:
                build()
            values |= _quantiles("wall_ms", timing.wall_ms(builds))
            values["extra_bytes"] = float(timing.extra_bytes(builds[0])[0])
    except failures() as error:
        if provider.startswith("anymask"):
            traceback.print_exception(error)
        return Row("pack", case, provider, FAILED, reason(error))
    return Row("pack", case, provider, OK, note, values)


def with_device_time(problem: Problem, row: Row) -> Row:
    """The row with the work of the device. Once the profiler has run, launches of this process take longer."""
    builds, _ = _builds(problem, row.provider)
    return replace(row, values=row.values | {"device_ms": timing.device_work_ms(builds * 2)})


def _builds(problem: Problem, provider: str) -> tuple[list[Callable[[], object]], str]:
    """Calls that build the mask, each from memory of its own where it is read, and what they do."""
    if provider == "copy":
        return _copies(problem)
    if not provider.startswith("anymask"):
        return _flex_builds(problem, provider)
    mask, kind, length, device = problem.mask, problem.case.mask, problem.shape.length, problem.q.device.type
    assert kind is not None
    if provider == "anymask":
        assert mask is not None
        sources = [mask] if device == "cpu" else [mask.clone() for _ in range(COPIES)]
        builds: list[Callable[[], object]] = [functools.partial(anymask.pack, source) for source in sources]
        return builds, "pack of a dense tensor: tiles and bits, both views"
    if provider == "anymask:symbolic":
        assert kind.symbolic is not None
        lazy, note = kind.symbolic(length, device), "pack of the mask by name"
    else:
        lazy, note = anymask.from_function(_rule(problem)), "pack of from_function(the closed form)"
    return [functools.partial(anymask.pack, lazy, q_len=length, kv_len=length, device=device)], note


def _is_right(problem: Problem, found: anymask.BlockMask) -> tuple[bool, str]:
    """Whether the mask is that of the problem, and how much of it was compared if not all."""
    if problem.mask is None:
        return check.lines_match(found, _rule(problem)), f", checked on {check.LINES} lines of tiles"
    return torch.equal(found.to_dense()[0, 0], problem.mask), ""


def _rule(problem: Problem) -> MaskMod:
    """The closed form of the mask, where the plan says that it has one."""
    rule = problem.rule
    assert rule is not None
    return rule


def _copies(problem: Problem) -> tuple[list[Callable[[], object]], str]:
    """A copy of the dense mask: one read and one write of its bytes."""
    assert problem.mask is not None
    sources, target = [problem.mask.clone() for _ in range(COPIES)], torch.empty_like(problem.mask)
    return [functools.partial(target.copy_, source) for source in sources], "a copy of the dense tensor, for scale"


def _flex_builds(problem: Problem, provider: str) -> tuple[list[Callable[[], object]], str]:
    """Calls that build FlexAttention's block mask, which lists tiles and holds no bits."""
    compiled = problem.compiled and not provider.endswith("-eager")
    if provider.startswith("flex-build-dense"):
        assert problem.mask is not None
        mods, source = [captured(problem.mask.clone()) for _ in range(COPIES)], "a function that reads the dense tensor"
    else:
        mods, source = [_rule(problem)] * COPIES, "the closed form"
    build = flex_mask_builder(problem, compiled)
    note = f"create_block_mask of {source}, {'compiled' if compiled else 'eager'}: tiles without bits"
    return [functools.partial(build, mod) for mod in mods], note


def is_lost(device: str) -> bool:
    """Whether an error has ended this process's work on the GPU: after an illegal access every call fails."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def release() -> None:
    """Forget compiled code and freed memory before the next case."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
