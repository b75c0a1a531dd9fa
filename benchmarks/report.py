"""Rows as lines and tables."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.providers import PROVIDERS, is_ours
from benchmarks.results import FAILED, OK, WRONG, Results, Row


class Metric(NamedTuple):
    """What a table shows: a field of `Row`, its unit there, and the factor to it."""

    field: str
    unit: str
    factor: float = 1.0

    def of(self, row: Row) -> float | None:
        """The number of a row, if it has one."""
        value = getattr(row, self.field)
        return None if value is None else value * self.factor


METRIC = {
    "memory": Metric("extra_bytes", "MiB", 2**-20),
    "cpu": Metric("ratio", "parts of the fastest baseline's time"),
}
MS, HOST = Metric("ms", "ms"), Metric("host_us", "host us")
# a table with a column for each provider that would have fewer of its cells filled has a line for each pass instead
SPARSE = 0.4


def name(provider: str) -> str:
    """What a reader calls it."""
    return PROVIDERS[provider][1]


def row_line(row: Row) -> str:
    """One line of progress."""
    head = f"{row.case}, {row.step}: {name(row.provider)}" if row.step else f"{row.case}: {name(row.provider)}"
    if row.status != OK:
        return f"{head} {row.status.upper()}: {row.note}"
    ratio = f", {row.ratio:.3f} of {name(row.baseline)}" if row.ratio is not None and row.baseline is not None else ""
    errors = ", ".join(f"{k} {v:.2f}" for k, v in row.error_ratios.items())
    return f"{head} {row.ms:.4f} ms{ratio}" + (f"; errors over eager's: {errors}" if errors else "")


def source(results: Results) -> str:
    """Where the numbers come from, in a line."""
    e = results.environment
    versions = [f"{k} {e[k]}" for k in ("torch", "triton", "cudnn", "flash-attn-4") if k in e]
    return f"{e['card']}, {e['date']}, {', '.join(versions)}, commit {e['commit']}, `{e['command']}`"


def table(results: Results) -> str:
    """Markdown: a column for each provider, or, where few have all cases, a line for each pass of each case."""
    rows = [row for row in results.rows if row.status == OK]
    if not rows:
        return "No row has numbers."
    metric = METRIC.get(rows[0].suite, MS if any(row.ms for row in rows) else HOST)
    cases, providers = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("case", "provider"))
    filled = len({(row.case, row.provider) for row in rows})
    if filled < SPARSE * len(cases) * len(providers):
        return _by_pass(rows, metric)
    providers.sort(key=list(PROVIDERS).index)
    cells = {(c, p): _cell(rows, c, p, metric) for c in cases for p in providers}
    corner = f"{metric.unit}, {' / '.join(dict.fromkeys(row.step for row in rows))}"
    if len(cases) < len(providers):
        return _markdown([corner, *cases], [[name(p), *(cells[c, p] for c in cases)] for p in providers])
    return _markdown([corner, *map(name, providers)], [[c, *(cells[c, p] for p in providers)] for c in cases])


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _cell(rows: list[Row], case: str, provider: str, metric: Metric) -> str:
    """Its numbers for all passes, bold where nobody with the same mask is as fast."""
    shown = []
    for step in dict.fromkeys(row.step for row in rows if row.case == case):
        of_step = {r.provider: metric.of(r) for r in rows if (r.case, r.step) == (case, step)}
        beside = {p: v for p, v in of_step.items() if v is not None}
        value = beside.get(provider)
        least = min((v for p, v in beside.items() if not p.endswith(":unmasked")), default=None)
        text = _short(value) or "-"
        shown.append(f"**{text}**" if value is not None and value == least and len(beside) > 1 else text)
    return "" if set(shown) <= {"-"} else " / ".join(shown)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.2f}"


def _by_pass(rows: list[Row], metric: Metric) -> str:
    """A line for each pass of each case of ours, beside the fastest baseline."""
    head = f"case|shape|pass|anymask, {metric.unit}|baseline, {metric.unit}|baseline|ratio|error / eager's".split("|")
    times, lines = {(r.case, r.step, r.provider): metric.of(r) for r in rows}, []
    for row in rows:
        if is_ours(row.provider) and row.baseline != row.provider:
            mine, theirs = (_short(times.get((row.case, row.step, p))) for p in (row.provider, row.baseline))
            case = row.case if row.provider == "anymask" else f"{row.case} ({name(row.provider)})"
            beside = [name(row.baseline), f"{row.ratio:.3f}"] if row.baseline and row.ratio else ["none ran", ""]
            worst = f"{max(row.error_ratios.values()):.2f}" if row.error_ratios else ""
            lines.append([case, row.shape, row.step, mine, theirs, *beside, worst])
    return _markdown(head, lines)


def untimed(results: Results) -> str:
    """Who was wrong or failed, and in how many cases; "" if nobody."""
    rows = [row for row in results.rows if row.status in (WRONG, FAILED)]
    bad = [(name(row.provider), row.status, row.note.split(". ")[0]) for row in rows]
    said = [f"{who}, {bad.count((who, how, why))} cases {how}: {why}" for who, how, why in dict.fromkeys(bad)]
    return f"Not timed: {'; '.join(said)}." if said else ""
