"""The report of `anymask check`: Markdown for people and the same figures as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anymask.check.tally import Tally
from anymask.testing import BUILDERS, MASKS

# masks that any attention has built in
CAUSAL = {name for name in (*MASKS, *BUILDERS) if name.startswith(("causal", "drawn_causal"))} | {"none", "all_full"}
# what 16-bit results should reach, beside the limits that they must
WANTED = {"max": 1.0, "rmse": 1.05}
# failures that the Markdown shows; JSON has all
SHOWN = 50


@dataclass(frozen=True)
class Run:
    """How a check was run."""

    command: str
    date: str
    seed: int
    device: str
    machine: dict[str, Any]
    seconds: float
    units: int
    units_done: int


def figures(run: Run, tally: Tally) -> dict[str, Any]:
    """Everything, as JSON."""
    other = {name: n for name, n in tally.masks.items() if name not in CAUSAL}
    sixteen = {key: x for key, x in tally.worst.items() if key.startswith(("f16", "bf16")) and "lse" not in key}
    worst = {kind: max((x[0] for key, x in sixteen.items() if key.endswith(kind)), default=None) for kind in WANTED}
    return {
        "run": vars(run),
        "passed": tally.total("failed") == 0,
        "complete": run.units_done == run.units,
        "cases": tally.to_json()["cases"],
        "oracle_cases": tally.total("passed", "oracle") + tally.total("failed", "oracle"),
        "not_causal_cases": sum(other.values()),
        "not_causal_kinds": len(other),
        "inputs": dict(tally.inputs),
        "masks": dict(tally.masks.most_common()),
        "worst_16_bit": worst,
        "worst": tally.worst,
        "worst_of_few_rows": tally.few,
        "failures": tally.failures,
    }


def markdown(run: Run, tally: Tally) -> str:
    """The report for people."""
    found = figures(run, tally)
    verdict = "passed" if found["passed"] else f"{len(tally.failures)} cases FAILED"
    part = "" if found["complete"] else f", {run.units_done} of {run.units} parts of the plan"
    versions = ", ".join(f"{name} {version}" for name, version in run.machine["versions"].items())
    gpus = ", ".join(gpu["name"] for gpu in run.machine["gpus"]) or "none"
    lines = [
        f"# anymask check: {verdict}{part}",
        "",
        f"`{run.command}`, {run.date}, seed {run.seed}, {run.seconds:.0f} s on {run.device}. {versions}. GPUs: {gpus}.",
        "",
        f"{found['oracle_cases']:,} cases, forward and backward, were compared with dense fp64 attention, "
        f"{found['not_causal_cases']:,} of them under {found['not_causal_kinds']} kinds of masks that are not causal. "
        f"Their inputs: {tally.inputs['grid']:,} of the grid and {tally.inputs['fuzzed']:,} fuzzed; "
        f"{tally.inputs['composed']:,} have composed masks.",
        "",
        "| check | backend | passed | failed | not for it |",
        "|---|---|---|---|---|",
    ]
    for check, by_backend in sorted(tally.cases.items()):
        for by, results in sorted(by_backend.items()):
            counts = " | ".join(f"{results[name]:,}" for name in ("passed", "failed", "not applicable"))
            lines.append(f"| {check.replace('_', ' ')} | {by} | {counts} |")
    return "\n".join([*lines, "", *_ratios(found, tally), *_masks(tally), *_failures(tally)])


def _ratios(found: dict[str, Any], tally: Tally) -> list[str]:
    text = (
        "Worst errors as a share of those of eager torch in the same dtype. Limits are 2 for the largest error and 1.1 "
        "for the RMSE in 16 bit (of cases with 900 rows or more), 2 in fp32; lse and fp64 have limits of their own, "
        "which are 1."
    )
    for kind, wanted in WANTED.items():
        worst = found["worst_16_bit"][kind]
        if worst is not None:
            verdict = "as wanted" if worst <= wanted else "more than wanted"
            text += f" Worst 16-bit {kind}: {worst:.3f}; {wanted} is wanted: {verdict}."
    lines = [text, "", "| dtype | tensor | rule | worst | of | case |", "|---|---|---|---|---|---|"]
    for key, (ratio, limit, where, by) in sorted(tally.worst.items()):
        # a bar ends a cell, in code too
        shown = where.replace("|", "\\|")
        lines.append(f"| {' | '.join(key.split())} | {ratio:.3f} | {limit:g} | {by}: `{shown}` |")
    lines += ["", "Where fewer rows are judged the limits are wider; the worst shares of them:", ""]
    shares = [f"{key} {ratio / limit:.2f}" for key, (ratio, limit, _, _) in sorted(tally.few.items())]
    return [*lines, ", ".join(shares) + ".", ""]


def _masks(tally: Tally) -> list[str]:
    counts = ", ".join(f"{name} {n:,}" for name, n in sorted(tally.masks.items()))
    return [f"Cases by kind of mask: {counts}.", ""]


def _failures(tally: Tally) -> list[str]:
    if not tally.failures:
        return ["No case failed.", ""]
    lines = [f"## Failures, {min(len(tally.failures), SHOWN)} of {len(tally.failures)}", ""]
    for failure in tally.failures[:SHOWN]:
        lines += [
            f"- {failure['check']}, {failure['by']}: {failure['error']}",
            "",
            "  ```python",
            f"  {failure['python']}",
            "  ```",
        ]
    return [*lines, ""]
