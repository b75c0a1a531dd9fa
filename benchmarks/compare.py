"""What changed between two runs, beyond their noise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import OK, Results

# of two runs, changes below this share are not shown as such however quiet the runs were: clocks drift
DRIFT = 0.03
# values that two runs are compared by: those with a spread
TIMED = ("forward_ms", "backward_ms", "forward_ratio", "backward_ratio", "both_ratio", "wall_ms")
FASTER, SLOWER, SAME, APPEARED, LOST = "faster", "slower", "same", "appeared", "lost"


@dataclass(frozen=True)
class Change:
    """One number of one provider in two runs; None where a run has no such number."""

    row: str
    value: str
    before: float | None
    after: float | None
    # of FASTER, SLOWER, SAME, APPEARED, LOST
    verdict: str

    @property
    def ratio(self) -> float | None:
        """New time over old time."""
        return None if self.before is None or self.after is None else self.after / self.before


def compare(before: Path, after: Path) -> list[Change]:
    """Every timed number of both files. A change counts if the spreads, 20 % to 80 %, do not touch and the medians
    differ by more than `DRIFT`.

    Raises:
        ValueError: a file is no result of this driver, or the runs measured different things.
    """
    runs = [Results.load(path) for path in (before, after)]
    differ = [key for key in ("suite", "shape", "device") if len({run.environment.get(key) for run in runs}) > 1]
    if differ:
        both = "; ".join(" and ".join(str(run.environment.get(key)) for run in runs) for key in differ)
        raise ValueError(f"{before.name} and {after.name} differ in {', '.join(differ)}: {both}")
    numbers = [
        {(row.name, key): row for row in run.rows if row.status == OK for key in TIMED if key in row.values}
        for run in runs
    ]
    changes = []
    for name, key in dict.fromkeys((*numbers[0], *numbers[1])):
        old, new = (found.get((name, key)) for found in numbers)
        if old is None or new is None:
            present = old or new
            assert present is not None
            values = (None, present.values[key]) if old is None else (present.values[key], None)
            changes.append(Change(name, key, *values, APPEARED if old is None else LOST))
            continue
        verdict = SAME
        if abs(new.values[key] / old.values[key] - 1) > DRIFT:
            if new.values[f"{key}_p80"] < old.values[f"{key}_p20"]:
                verdict = FASTER
            elif new.values[f"{key}_p20"] > old.values[f"{key}_p80"]:
                verdict = SLOWER
        changes.append(Change(name, key, old.values[key], new.values[key], verdict))
    return changes


def to_text(changes: list[Change]) -> str:
    """The changes beyond noise, the largest first, and how many numbers stayed as they were."""
    moved = sorted((c for c in changes if c.verdict != SAME), key=lambda c: c.ratio or 0.0, reverse=True)
    lines = [f"{c.verdict:8} {_number(c.before)} -> {_number(c.after)} {_factor(c)}  {c.row} {c.value}" for c in moved]
    return "\n".join([*lines, f"{len(changes) - len(moved)} of {len(changes)} numbers did not change beyond noise"])


def to_json(changes: list[Change]) -> str:
    """All numbers, for a machine to read."""
    return json.dumps([vars(c) | {"ratio": c.ratio} for c in changes], indent=1)


def _number(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.4g'):>8}"


def _factor(change: Change) -> str:
    return f"{'' if change.ratio is None else format(change.ratio, '.3f') + 'x':>8}"
