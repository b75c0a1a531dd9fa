"""The figures to reach, computed from rows. A figure whose rows are missing is shown as not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.results import FAILED, OK, WRONG, Row, Rows

REACHED, MISSED, NOT_MEASURED = "yes", "NO", "not measured"
# rivals with the same mask, of which the fastest counts; cudnn-bias is listed too, as it can only be faster
SAME_MASK = ("flex-dense", "cudnn", "cudnn-bias", "efficient")
PACK_MS = 0.10


@dataclass(frozen=True)
class Measured:
    """A number to compare with a limit; None if rows are missing. The note says what it was computed from."""

    value: float | None
    note: str


@dataclass(frozen=True)
class Figure:
    """A promise: `measure(rows, ours)` is at most `limit`."""

    name: str
    limit: float
    # "x" for a ratio, "ms"
    unit: str
    of: str
    measure: Callable[[Rows, str], Measured]


@dataclass(frozen=True)
class Verdict:
    """One line of the table."""

    figure: str
    target: str
    measured: str
    reached: str
    note: str


def judge(figures: list[Figure], rows: Rows, ours: str) -> list[Verdict]:
    """The table, one verdict per figure, for our provider `ours`."""
    verdicts = []
    for figure in figures:
        found = figure.measure(rows, ours)
        target = f"≤ {figure.limit:.2f} {figure.unit} {figure.of}".strip()
        if found.value is None:
            verdicts.append(Verdict(figure.name, target, "-", NOT_MEASURED, found.note))
        else:
            reached = REACHED if found.value <= figure.limit else MISSED
            verdicts.append(Verdict(figure.name, target, f"{found.value:.3f} {figure.unit}", reached, found.note))
    return verdicts


def gpu_figures() -> list[Figure]:
    """One GPU, all in one run."""
    fastest = "the fastest rival with the same mask"
    figures = [
        Figure("random50 forward", 0.80, "x", fastest, _against_fastest("random50", "forward_ms")),
        Figure("random50 backward", 0.85, "x", fastest, _against_fastest("random50", "backward_ms")),
    ]
    for case in ("causal", "window1024", "documents8_causal"):
        for step in ("forward", "backward"):
            measure = _against(case, f"{step}_ms", "flex")
            figures.append(Figure(f"{case} {step}", 1.00, "x", "FlexAttention, closed form", measure))
    figures.append(Figure("packing, device time", PACK_MS, "ms", "", _packing))
    figures.append(words_figure())
    for case in ("random50", "causal"):
        figures.append(Figure(f"{case} forward, peak extra memory", 1.00, "x", "o + lse", _forward_memory(case)))
    return figures


def hopper_figures(suite: str) -> list[Figure]:
    """The Hopper kernels, in parts of the time of cuDNN without any mask unless said; all rivals in the same case."""
    if suite == "hopper-short":
        return [Figure("no mask, forward", 1.10, "x", "cuDNN", _against("none", "forward_ms", "cudnn")), *_host("none")]
    limits = {"hopper-d128": (0.93, 0.99, 0.70), "hopper-d64": (0.88, 0.98, 0.75)}[suite]
    bases = {
        ("none", "cudnn", "cuDNN"): (limits[0], 1.00),
        ("random50", "cudnn-unmasked", "cuDNN without the mask"): (limits[1], 1.03),
        ("causal", "cudnn-causal", "cuDNN's built-in causal"): (1.00, 1.05),
        ("window1024", "flex", "FlexAttention, closed form"): (limits[2], limits[2]),
        ("documents8_causal", "flex", "FlexAttention, closed form"): (limits[2], limits[2]),
    }
    figures = []
    for (case, rival, of), both in bases.items():
        for step, limit in zip(("forward", "backward"), both, strict=True):
            figures.append(Figure(f"{case} {step}", limit, "x", of, _against(case, f"{step}_ms", rival)))
    for case in ("none", "random50"):
        measure = _against_own(case, "backward_ms", ":deterministic")
        figures.append(Figure(f"{case} backward, deterministic", 1.35, "x", "the default", measure))
    return [*figures, *_host("random50")]


def _host(case: str) -> Iterator[Figure]:
    """Host time of a call, eager, with a packed mask if the case has one."""

    def measure(key: str, rows: Rows, ours: str) -> Measured:
        row = _usable(rows, "attention", case, ours, key)
        return Measured(None, row) if isinstance(row, str) else Measured(row.values[key], f"eager, {case}")

    for key, what in (("inference_host_us", "host time a call"), ("forward_host_us", "with gradients recorded")):
        yield Figure(f"forward, {what}", 60, "us", "", partial(measure, key))


def _against_own(case: str, key: str, variant: str) -> Callable[[Rows, str], Measured]:
    return lambda rows, ours: _quotient(rows, "attention", case, key, ours + variant, ours)


def build_figures() -> list[Figure]:
    """Building a mask of 32,768 x 32,768 pairs, or of a million tokens, on one GPU, all in one run."""
    documents, symbolic, function = "documents8_causal", "anymask:symbolic", "anymask:function"
    flex, eager, million = "flex-build", "flex-build-eager", "documents256_causal L1048576"

    def absolute(key: str, unit: float, name: str, case: str = documents) -> Callable[[Rows, str], Measured]:
        def measure(rows: Rows, ours: str) -> Measured:
            row = _usable(rows, "pack", case, symbolic, key)
            return Measured(None, row) if isinstance(row, str) else Measured(row.values[key] / unit, name)

        return measure

    def against(case: str, key: str, mine: str, theirs: str, scale: float = 1.0) -> Callable[[Rows, str], Measured]:
        return lambda rows, ours: _quotient(rows, "pack", case, key, mine, theirs, scale)

    host, device, peak = "wall_ms", "device_ms", "extra_bytes"
    return [
        Figure("causal documents by name, build", 0.2, "ms", "", absolute(host, 1, "on the host's clock")),
        Figure(
            "causal documents by name, build",
            0.25,
            "x",
            "FlexAttention compiled",
            against(documents, host, symbolic, flex),
        ),
        Figure("causal documents by name, peak memory", 8, "MiB", "", absolute(peak, 2**20, "the result included")),
        # a copy reads once and writes once
        Figure(
            "random50 dense, build",
            2.0,
            "x",
            "one read at copy speed",
            against("random50", device, "anymask", "copy", 2.0),
        ),
        Figure("from_function, build", 1.0, "x", "FlexAttention eager", against(documents, host, function, eager)),
        Figure(
            "from_function, peak memory", 0.05, "x", "FlexAttention eager", against(documents, peak, function, eager)
        ),
        Figure("a million tokens by name, build", 20, "ms", "", absolute(host, 1, "on the host's clock", million)),
        Figure("a million tokens by name, peak", 256, "MiB", "", absolute(peak, 2**20, "result included", million)),
    ]


def density_figures(shares: tuple[float, ...]) -> list[Figure]:
    """Time in proportion to the tiles that are not empty, from 10 % of them on."""

    def measure(key: str, rows: Rows, ours: str) -> Measured:
        found = {share: _usable(rows, "attention", f"tiles{share:.0%}".rstrip("%"), ours, key) for share in shares}
        wanted = {share: row for share, row in found.items() if share >= 0.1}
        missing = [row for row in wanted.values() if isinstance(row, str)]
        if missing:
            return Measured(None, missing[0])
        times = {share: row.values[key] for share, row in wanted.items() if not isinstance(row, str)}
        off = {share: abs(ms / (share * times[1.0]) - 1) for share, ms in times.items()}
        worst = max(off, key=off.__getitem__)
        note = f"at {worst:.0%}: {times[worst]:.3f} ms where {worst * times[1.0]:.3f} are in proportion"
        return Measured(off[worst], note)

    return [
        Figure(
            f"{step}, off proportion, 10 to 100 % of tiles",
            0.10,
            "x",
            "of the time in proportion",
            partial(measure, f"{step}_ms"),
        )
        for step in ("forward", "backward")
    ]


def cpu_figures() -> list[Figure]:
    """A CPU: ratios only."""
    figures = [
        Figure(f"{case} forward + backward", limit, "x", "SDPA with the same mask", _ratio(case))
        for case, limit in (("random50", 1.5), ("documents8_causal", 0.6))
    ]
    return [*figures, words_figure()]


def words_figure() -> Figure:
    """Memory kept for backward at 50 % random density."""
    return Figure("random50, words of both views", 0.25, "x", "the bool bytes", _words)


def _usable(rows: Rows, group: str, case: str, provider: str, key: str) -> Row | str:
    """The row if it has the number, else why there is none."""
    row = rows.find(group, case, provider)
    if row is None:
        return f"{provider}: no row"
    if row.status != OK or row.get(key) is None:
        return f"{provider} {row.status}: {row.note}"
    return row


def _quotient(rows: Rows, group: str, case: str, key: str, mine: str, theirs: str, scale: float = 1.0) -> Measured:
    """`scale` times the number `key` of one provider over that of another, or what is missing."""
    a, b = (_usable(rows, group, case, provider, key) for provider in (mine, theirs))
    if isinstance(a, str) or isinstance(b, str):
        return Measured(None, "; ".join(why for why in (a, b) if isinstance(why, str)))
    x, y, unit = a.values[key], b.values[key], key.rpartition("_")[2]
    return Measured(x / y * scale, f"{x:,.3f} {unit} against {y:,.3f} {unit}")


def _against(case: str, key: str, rival: str) -> Callable[[Rows, str], Measured]:
    return lambda rows, ours: _quotient(rows, "attention", case, key, ours, rival)


def _against_fastest(case: str, key: str) -> Callable[[Rows, str], Measured]:
    def measure(rows: Rows, ours: str) -> Measured:
        mine = _usable(rows, "attention", case, ours, key)
        if isinstance(mine, str):
            return Measured(None, mine)
        times, lost = {}, []
        for rival in SAME_MASK:
            row = rows.find("attention", case, rival)
            # a rival that could not run is out of the race; one that was not asked leaves the race undecided
            if row is None or row.status not in (OK, FAILED, WRONG):
                return Measured(None, f"{rival}: {'no row' if row is None else row.note}")
            if row.status == OK and key in row.values:
                times[rival] = row.values[key]
            elif row.status == OK:
                lost.append(f"{rival} has no such pass")
            else:
                lost.append(f"{rival} {row.status}")
        if not times:
            return Measured(None, "no rival ran: " + ", ".join(lost))
        best = min(times, key=times.__getitem__)
        note = f"{mine.values[key]:.3f} ms against {times[best]:.3f} ms of {best}"
        return Measured(mine.values[key] / times[best], "; ".join([note, *lost]))

    return measure


def _packing(rows: Rows, ours: str) -> Measured:
    row = _usable(rows, "pack", "random50", "anymask", "device_ms")
    if isinstance(row, str):
        return Measured(None, row)
    wall = row.values["wall_ms"]
    return Measured(row.values["device_ms"], f"one plane; {wall:.3f} ms on the host's clock, synchronisation included")


def _words(rows: Rows, ours: str) -> Measured:
    row = _usable(rows, "pack", "random50", "anymask", "words_bytes")
    if isinstance(row, str):
        return Measured(None, row)
    words, held, dense = (row.values[f"{kind}_bytes"] for kind in ("words", "held", "dense"))
    return Measured(words / dense, f"{words:,.0f} of {dense:,.0f} bytes; with lists {held:,.0f}")


def _forward_memory(case: str) -> Callable[[Rows, str], Measured]:
    def measure(rows: Rows, ours: str) -> Measured:
        row = _usable(rows, "attention", case, ours, "forward_extra_bytes")
        if isinstance(row, str):
            return Measured(None, row)
        keys = ("forward_extra_bytes", "result_bytes", "forward_extra_allocated_bytes")
        extra, expected, allocated = (row.values[key] for key in keys)
        note = f"{extra:,.0f} bytes requested of {expected:,.0f}; {allocated:,.0f} with the allocator's rounding"
        return Measured(extra / expected, note)

    return measure


def _ratio(case: str) -> Callable[[Rows, str], Measured]:
    def measure(rows: Rows, ours: str) -> Measured:
        row = _usable(rows, "attention", case, ours, "both_ratio")
        if isinstance(row, str):
            return Measured(None, row)
        steps = [f"{step} {row.values[f'{step}_ratio']:.2f}x" for step in ("forward", "backward") if row.quiet(step)]
        if not row.quiet("both"):
            return Measured(None, "; ".join(["other work kept the cores busy", *steps]))
        return Measured(row.values["both_ratio"], ", ".join(steps))

    return measure
