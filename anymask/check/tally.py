"""What `anymask check` counts: cases by check and backend, masks, worst ratios and failures."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from anymask.testing import DTYPE_NAMES, Record
from anymask.testing.rules import MAX_ERROR_LIMIT, RMSE_LIMIT


class Tally:
    """Counts of one job, or of many."""

    def __init__(self) -> None:
        """Nothing counted."""
        # check -> backend -> result -> cases
        self.cases: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        # forward + backward cases held against the oracle, by name of the mask
        self.masks: Counter[str] = Counter()
        # sets of inputs held against the oracle: grid, fuzzed, composed
        self.inputs: Counter[str] = Counter()
        # "f16 o max" -> ratio, limit, case, backend; `few` where so few rows are judged that the limit is wider: there
        # the worst share of the limit counts
        self.worst: dict[str, tuple[float, float, str, str]] = {}
        self.few: dict[str, tuple[float, float, str, str]] = {}
        self.failures: list[dict[str, str]] = []
        # the process can not go on: its GPU context is lost
        self.broken = False

    def count(self, check: str, by: str, result: str, n: int = 1) -> None:
        """Count cases of a check by a backend, `by`: passed, failed or not applicable."""
        self.cases[check][by][result] += n

    def add_record(self, record: Record, where: str, by: str) -> None:
        """Keep the comparison if none of its kind was worse."""
        usual = record.limit <= (MAX_ERROR_LIMIT if record.kind == "max" else RMSE_LIMIT)
        key = f"{DTYPE_NAMES[record.dtype]} {record.what} {record.kind}"
        self._keep(self.worst if usual else self.few, key, (record.ratio, record.limit, where, by))

    @staticmethod
    def _keep(table: dict[str, tuple[float, float, str, str]], key: str, new: tuple[float, float, str, str]) -> None:
        old = table.get(key)
        if old is None or new[0] / new[1] > old[0] / old[1]:
            table[key] = new

    def merge(self, other: Tally) -> None:
        """Add the counts of another."""
        for check, by_backend in other.cases.items():
            for by, results in by_backend.items():
                self.cases[check][by].update(results)
        self.masks.update(other.masks)
        self.inputs.update(other.inputs)
        for name in ("worst", "few"):
            for key, new in getattr(other, name).items():
                self._keep(getattr(self, name), key, tuple(new))
        self.failures += other.failures

    def total(self, result: str, check: str | None = None) -> int:
        """Cases with a result, of one check or of all."""
        return sum(
            results[result]
            for name, by_backend in self.cases.items()
            if check in (None, name)
            for results in by_backend.values()
        )

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `from_json` reads."""
        return dict(vars(self)) | {"cases": {c: {b: dict(r) for b, r in x.items()} for c, x in self.cases.items()}}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Tally:
        """What `to_json` wrote."""
        tally = cls()
        for check, by_backend in found["cases"].items():
            for by, results in by_backend.items():
                tally.cases[check][by].update(results)
        tally.masks.update(found["masks"])
        tally.inputs.update(found["inputs"])
        tally.worst = {key: tuple(x) for key, x in found["worst"].items()}
        tally.few = {key: tuple(x) for key, x in found["few"].items()}
        tally.failures, tally.broken = list(found["failures"]), found["broken"]
        return tally
