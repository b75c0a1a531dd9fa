"""Rows as lines, tables and pictures. docs/performance.md has a table of every suite, written from its JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cases import BOTH
from benchmarks.providers import PROVIDERS, is_ours
from benchmarks.results import FAILED, OK, WRONG, Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, PICTURES = ROOT / "benchmarks/results", ROOT / "docs/performance.md", ROOT / "docs/pictures"
BLOCK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
# what a table shows where it is not ms: the number, its unit, and a factor
METRIC = {"memory": ("extra_bytes", "MiB", 2**-20), "cpu": ("ratio", "parts of the fastest rival's time", 1.0)}
HOST = ("host_us", "host us", 1.0)
# a table with a column for each provider that would have fewer of its cells filled has a line for each pass instead
SPARSE = 0.4
# a bar this many times another needs a logarithmic axis
FAR = 20.0
# of the curves
LENGTHS = tuple(2**n for n in range(8, 15))


def name(provider: str) -> str:
    """What a reader calls it."""
    return PROVIDERS[provider][1]


def row_line(row: Row) -> str:
    """One line of progress."""
    head = f"{row.case}, {row.step}: {name(row.provider)}" if row.step else f"{row.case}: {name(row.provider)}"
    if row.status != OK:
        return f"{head} {row.status.upper()}: {row.note}"
    ratio = f", {row.ratio:.3f} of {name(row.rival)}" if row.ratio is not None and row.rival is not None else ""
    errors = ", ".join(f"{k} {v:.2f}" for k, v in row.error_ratios.items())
    clock = f", {row.sm_clock_mhz:.0f} MHz" if row.sm_clock_mhz else ""
    return f"{head} {row.ms:.4f} ms{ratio}{clock}" + (f"; errors over eager's: {errors}" if errors else "")


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
    metric = METRIC.get(rows[0].suite, ("ms", "ms", 1.0) if any(row.ms for row in rows) else HOST)
    cases, providers = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("case", "provider"))
    filled = len({(row.case, row.provider) for row in rows})
    if filled < SPARSE * len(cases) * len(providers):
        return _by_pass(rows, metric)
    providers.sort(key=list(PROVIDERS).index)
    cells = {(c, p): _cell(rows, c, p, metric) for c in cases for p in providers}
    steps = " / ".join(dict.fromkeys(row.step for row in rows))
    corner = f"{metric[1]}, {steps}"
    if len(cases) < len(providers):
        return _markdown([corner, *cases], [[name(p), *(cells[c, p] for c in cases)] for p in providers])
    return _markdown([corner, *map(name, providers)], [[c, *(cells[c, p] for p in providers)] for c in cases])


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _value(row: Row, metric: tuple[str, str, float]) -> float | None:
    value = getattr(row, metric[0])
    return None if value is None else value * metric[2]


def _cell(rows: list[Row], case: str, provider: str, metric: tuple[str, str, float]) -> str:
    """Its numbers for all passes, bold where nobody with the same mask is as fast."""
    shown = []
    for step in dict.fromkeys(row.step for row in rows if row.case == case):
        beside = {
            r.provider: v for r in rows if (r.case, r.step) == (case, step) if (v := _value(r, metric)) is not None
        }
        value = beside.get(provider)
        least = min((v for p, v in beside.items() if not p.endswith(":unmasked")), default=None)
        text = "-" if value is None else _short(value)
        shown.append(f"**{text}**" if value is not None and value == least and len(beside) > 1 else text)
    return "" if set(shown) <= {"-"} else " / ".join(shown)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.2f}"


def _by_pass(rows: list[Row], metric: tuple[str, str, float]) -> str:
    """A line for each pass of each case of ours, beside the fastest rival."""
    head = f"case|shape|pass|anymask, {metric[1]}|rival, {metric[1]}|rival|ratio|error / eager's".split("|")
    lines = []
    for row in rows:
        if is_ours(row.provider) and row.rival != row.provider:
            rival = next((r for r in rows if (r.case, r.step, r.provider) == (row.case, row.step, row.rival)), None)
            mine, theirs = ("" if r is None or (v := _value(r, metric)) is None else _short(v) for r in (row, rival))
            case = row.case if row.provider == "anymask" else f"{row.case} ({name(row.provider)})"
            beside = [name(row.rival), f"{row.ratio:.3f}"] if row.rival is not None and row.ratio else ["none ran", ""]
            worst = f"{max(row.error_ratios.values()):.2f}" if row.error_ratios else ""
            lines.append([case, row.shape, row.step, mine, theirs, *beside, worst])
    return _markdown(head, lines)


def untimed(results: Results) -> str:
    """Who was wrong or failed, and in how many cases; "" if nobody."""
    bad = [
        (name(row.provider), row.status, row.note.split(". ")[0])
        for row in results.rows
        if row.status in (WRONG, FAILED)
    ]
    said = [f"{who}, {bad.count((who, how, why))} cases {how}: {why}" for who, how, why in dict.fromkeys(bad)]
    return f"Not timed: {'; '.join(said)}." if said else ""


def page(text: str, folder: Path = RESULTS) -> str:
    """The page with its tables as the results have them.

    Raises:
        ValueError: a result has no table, or a table no end.
    """

    def block(found: re.Match[str]) -> str:
        path = folder / f"{found[1]}.json"
        if not path.exists():
            shown = "This suite has no recorded run."
        else:
            results = Results.load(path)
            shown = "\n\n".join(filter(None, (table(results), untimed(results), source(results))))
        return f"<!-- table: {found[1]} -->\n{shown}\n<!-- end -->"

    missing = {path.stem for path in folder.glob("*.json")} - set(BLOCK.findall(text))
    if missing:
        raise ValueError(f"docs/performance.md has no table for {', '.join(sorted(missing))}")
    return BLOCK.sub(block, text)


def write_page() -> list[Path]:
    """Write docs/performance.md's tables again."""
    PAGE.write_text(page(PAGE.read_text()))
    return [PAGE]


def draw_all() -> list[Path]:
    """Draw the pictures of the README and of docs/performance.md again."""
    PICTURES.mkdir(exist_ok=True)
    drawn = {"headline": headline, "classic": classic}
    for stem, suite in (("headline", "quick"), ("classic", "classic")):
        drawn[stem](Results.load(RESULTS / f"{suite}.json")).savefig(PICTURES / f"{stem}.png", dpi=110)
    return [PICTURES / f"{stem}.png" for stem in drawn]


def _figure(height: float, rows: int, results: Results) -> tuple[Figure, list[Axes]]:
    """Two panels a row, with where the numbers come from below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, 2, sharey="row" if rows == 1 else "none", squeeze=False).flat)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=9)
    e = results.environment
    figure.supxlabel(f"{e['card']}, torch {e['torch'].partition('+')[0]}, {e['date'][:10]}", fontsize=8.5)
    return figure, axes


def headline(results: Results) -> Figure:
    """A random mask: a bar for each provider, forward and backward, and cuDNN without any mask as a line."""
    case, wanted = "random 50%", ("efficient", "flex:dense", "cudnn", "fa4", "anymask")
    found = {(p, step): results.find(case, p, step) for p in wanted for step in BOTH}
    wanted = tuple(p for p in wanted if found[p, "forward"] is not None)
    figure, axes = _figure(2.9, 1, results)
    for one, step in zip(axes, BOTH, strict=True):
        times = [row.ms or 0.0 if (row := found[p, step]) is not None else 0.0 for p in wanted]
        bars = one.barh(
            [name(p).removesuffix(", reads the tensor") for p in wanted], times, color=[PROVIDERS[p][2] for p in wanted]
        )
        one.bar_label(bars, [f"{ms:.2f}" if ms else "no such pass" for ms in times], padding=5, fontsize=9, zorder=4,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
        if max(times) > FAR * min(ms for ms in times if ms):
            one.set_xscale("log")
        plain = results.find("none", "cudnn", step)
        assert plain is not None
        assert plain.ms is not None
        one.axvline(plain.ms, color="#222222", linestyle="--", linewidth=1.2)
        text = f"cuDNN without any mask: {plain.ms:.2f}"
        one.annotate(text, (plain.ms, 1), (3, 2), fontsize=8.5, textcoords="offset points",
                     xycoords=("data", "axes fraction"))  # fmt: skip
        one.set_title(f"{step}, ms", fontsize=10.5, pad=16)
        one.margins(x=0.17)
    figure.suptitle(f"A random mask, half of all pairs: {results.rows[0].shape}", fontsize=10.5)
    return figure


def classic(results: Results) -> Figure:
    """TFLOP/s of attended pairs by length: a causal mask as a tensor and none, forward and backward, 32 heads."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    providers = sorted({row.provider for row in results.rows}, key=list(PROVIDERS).index)
    figure, axes = _figure(7.2, 2, results)
    panels = [(case, step) for case in ("causal", "none") for step in BOTH]
    for one, (case, step) in zip(axes, panels, strict=True):
        for n, provider in enumerate(providers):
            found = {length: results.find(f"{case}, H32 L{length}", provider, step) for length in LENGTHS}
            points = [(length, row.tflops) for length, row in found.items() if row is not None]
            if points:
                # large marks under small ones, lines and dashes: equal curves show both
                one.plot(*zip(*points, strict=True), label=name(provider), color=PROVIDERS[provider][2],
                         marker="osD^vP*Xp<"[n % 10], markersize=9 - 6 * n / len(providers),
                         linewidth=2.4 if is_ours(provider) else 1.3, linestyle=("-", "--")[n % 2])  # fmt: skip
        one.set_title("no mask" if case == "none" else "causal mask", fontsize=10)
        one.set_ylabel(f"{step}, TFLOP/s", fontsize=9)
        one.set(xscale="log", yscale="log")
        one.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS], fontsize=8)
        one.xaxis.set_minor_locator(NullLocator())
        one.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        one.yaxis.set_minor_formatter(NullFormatter())
        one.grid(alpha=0.25)
    handles = {label: h for one in axes for h, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=8.5, frameon=False)
    return figure
