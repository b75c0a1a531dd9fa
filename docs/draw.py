"""Writes the tables of docs/performance.md and draws the pictures, from benchmarks/results: `python -m docs.draw`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cases import BOTH
from benchmarks.providers import PROVIDERS, is_ours
from benchmarks.report import name, source, table, untimed
from benchmarks.results import OK, Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent
RESULTS, PAGE, PICTURES = DOCS.parent / "benchmarks/results", DOCS / "performance.md", DOCS / "pictures"
BLOCK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
# a bar this many times another needs a logarithmic axis
FAR = 20.0
# of the curves
LENGTHS = tuple(2**n for n in range(8, 15))


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


def write_page() -> Path:
    """Write docs/performance.md's tables again."""
    PAGE.write_text(page(PAGE.read_text()))
    return PAGE


def _find(results: Results, case: str, provider: str, step: str) -> Row | None:
    """The row with numbers, or None."""
    wanted = case, provider, step, OK
    return next((r for r in results.rows if (r.case, r.provider, r.step, r.status) == wanted), None)


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
    found = {(p, step): _find(results, case, p, step) for p in wanted for step in BOTH}
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
        plain = _find(results, "none", "cudnn", step)
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
            found = {length: _find(results, f"{case}, H32 L{length}", provider, step) for length in LENGTHS}
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


if __name__ == "__main__":
    print("\n".join(f"wrote {path}" for path in (write_page(), *draw_all())))
