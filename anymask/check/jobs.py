"""One job of `anymask check`: a case and what to check of it, as JSON for a process and a line of Python for a user."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from anymask import BlockMask, pack
from anymask.backends import Backend
from anymask.check import arguments
from anymask.check.tally import Tally
from anymask.testing import DTYPE_NAMES, RECORDS, Case, Inputs, judge_of, make_inputs, properties, run
from anymask.testing.expressions import names_of

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# what a case may raise and still be one failed case; anything else ends the process, which is one failed case too
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Runner:
    """A backend, and whether gradients must be repeatable."""

    backend: Backend
    deterministic: bool = False

    def __str__(self) -> str:
        return f"{self.backend}, deterministic" if self.deterministic else self.backend


@dataclass(frozen=True)
class Job:
    """`check` of a case by some backends: "oracle", "packing", "arguments", or a property of `anymask.testing`."""

    check: str
    case: Case
    runners: tuple[Runner, ...] = ()
    # of the property beside case, backend and device; of "arguments" the first combination and the one after the last
    args: tuple[float, ...] = ()
    fuzzed: bool = False

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `from_json` reads."""
        return asdict(self) | {"case": asdict(self.case) | {"dtype": DTYPE_NAMES[self.case.dtype]}}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Job:
        """What `to_json` wrote."""
        case = Case(**found["case"] | {"dtype": DTYPES[found["case"]["dtype"]]})
        runners = tuple(Runner(**runner) for runner in found["runners"])
        return cls(found["check"], case, runners, tuple(found["args"]), found["fuzzed"])

    def python(self, runner: Runner | None, device: str) -> str:
        """A line of Python that repeats it."""
        if self.check == "arguments":
            return f"from anymask.check import arguments; arguments.check_combination({int(self.args[0])}, {device!r})"
        by = f"{runner.backend!r}, {device!r}" if runner else repr(device)
        repeatable = ", deterministic=True" if runner and runner.deterministic else ""
        if self.check == "oracle":
            return f"import torch; from anymask.testing import *; check({self.case!r}, {by}{repeatable})"
        rest = "".join(f", {x!r}" if math.isfinite(x) else f", float({str(x)!r})" for x in self.args)
        return (
            "import torch; from anymask.testing import *; "
            f"properties.check_{self.check}({self.case!r}, {by}{rest}{repeatable})"
        )


# properties that know no `deterministic`
ALWAYS = ("memory", "growing_scores", "high_hidden_scores", "far_from_zero")


def execute(job: Job, device: str) -> Tally:
    """Run a job; what fails is in the tally, never raised."""
    tally = Tally()
    if job.check == "arguments":
        for number in range(int(job.args[0]), int(job.args[1])):
            one = replace(job, args=(number,))
            _attempt(tally, one, None, device, partial(arguments.check_combination, number, device))
    elif job.check == "packing":
        _attempt(tally, job, None, device, partial(properties.check_packing, job.case, device))
    elif job.check == "oracle":
        _run_oracle(tally, job, device)
    else:
        check = getattr(properties, f"check_{job.check}")
        for runner in job.runners:
            options = {} if job.check in ALWAYS else {"deterministic": runner.deterministic or None}
            call = partial(check, job.case, runner.backend, device, *job.args, **options)
            _attempt(tally, job, runner, device, call)
    return tally


def _run_oracle(tally: Tally, job: Job, device: str) -> None:
    """One set of inputs and one reference for all backends; the first takes the mask as a user has it."""
    case = job.case
    made: list[Any] = []

    def prepare() -> None:
        inputs = make_inputs(case, device)
        made.extend((inputs, judge_of(inputs, case), _packed(inputs)))

    if not _attempt(tally, job, None, device, prepare, name="packing of a case"):
        return
    inputs, judge, packed = made
    names = names_of(case.mask)
    tally.inputs["fuzzed" if job.fuzzed else "grid"] += 1
    tally.inputs["composed"] += len(names) > 1
    for n, runner in enumerate(job.runners):
        given = inputs if n == 0 else inputs._replace(mask=packed)

        def compare(given: Inputs = given, runner: Runner = runner) -> None:
            judge(run(given, case.scale, runner.backend, runner.deterministic or None))

        if _attempt(tally, job, runner, device, compare) is not None:
            kind = case.mask if len(names) == 1 else f"composed of {len(names)}"
            tally.masks[kind.strip("~")] += 1


def _packed(inputs: Inputs) -> BlockMask | None:
    if inputs.mask is None:
        return None
    assert not isinstance(inputs.mask, BlockMask)
    packed = pack(inputs.mask, q_len=inputs.q.shape[2], kv_len=inputs.k.shape[2], device=inputs.q.device)
    assert torch.equal(packed.to_dense().expand_as(inputs.dense), inputs.dense), "the packed mask has other pairs"
    return packed


def _attempt(
    tally: Tally, job: Job, runner: Runner | None, device: str, call: Callable[[], Any], name: str | None = None
) -> bool | None:
    """Count one case: True if it passed, False if not, None where the backend is not for it."""
    RECORDS.clear()
    check, by = name or job.check, str(runner or "-")
    try:
        call()
    except FAILURES as error:
        message = f"{type(error).__name__}: {error}"
        if runner and isinstance(error, ValueError) and _is_refusal(str(error), runner.backend):
            tally.count(check, by, "not applicable")
            return None
        tally.count(check, by, "failed")
        tally.failures.append({"check": check, "by": by, "error": message, "python": job.python(runner, device)})
        tally.broken = tally.broken or "CUDA error" in message or "AcceleratorError" in message
        return False
    tally.count(check, by, "passed")
    # errors of scores far from zero are those of fp32, which the property judges by itself
    if check == "oracle":
        for record in RECORDS:
            tally.add_record(record, f"{job.case} seed {job.case.seed}", by)
    return True


def _is_refusal(message: str, backend: str) -> bool:
    return message.startswith(f"backend {backend!r} cannot run this call")
