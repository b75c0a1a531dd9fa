"""Rows as pictures: lines where a size grows, dots where many masks stand side by side, bars for a few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import OK, Results, Row, Rows
from benchmarks.suites import Case, Curves, Suite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# ours in strong colours, each rival in the same one everywhere
COLOURS = {
    "anymask": "#d1495b",
    "anymask:hopper": "#d1495b",
    "anymask:hopper:deterministic": "#8f2d3c",
    "anymask:triton": "#e8935c",
    "anymask:cpu": "#d1495b",
    "anymask:symbolic": "#8f2d3c",
    "anymask:function": "#e8935c",
    "flex": "#5b8db8",
    "flex-dense": "#a9c7de",
    "cudnn": "#6aa56a",
    "cudnn-bias": "#a6cfa6",
    "cudnn-causal": "#3d7a3d",
    "cudnn-unmasked": "#3d7a3d",
    "efficient": "#b9a3cc",
    "flash": "#c9b458",
    "flash-causal": "#9c8a34",
    "fa4": "#4a4a4a",
    "flashinfer": "#7fb8b8",
    "xformers": "#c48fb0",
    "earlier": "#a58a6f",
    "sdpa": "#6aa56a",
    "flex-build": "#5b8db8",
    "flex-build-dense": "#a9c7de",
    "flex-build-eager": "#8fa7bd",
    "flex-build-dense-eager": "#d3e2ee",
}
OTHER = "#999999"
# more cases than this are dots, not bars
MOST_BARS = 6
# inches: what a README shows without scaling
WIDTH = 9.0


def draw(suite: Suite, results: Results, folder: Path, stem: str) -> list[Path]:
    """One picture for each pass, and one for building masks; returns the files written."""
    title = f"{results.environment['device']}, {results.environment['shape']}"
    suffix, unit = ("ms", "ms, less is better") if suite.baseline is None else ("ratio", "time in parts of SDPA's")
    keys = {f"{step}_{suffix}": f"{step}, {unit}" for step in ("forward", "backward", "both")}
    wanted = [("attention", key, label) for key, label in (suite.curves.y if suite.curves else keys).items()]
    wanted.append(("pack", "device_ms", "building the mask, device time in ms, less is better"))
    written = []
    for group, key, label in wanted:
        rows = Rows(r for r in results.rows if r.group == group and r.status == OK and r.get(key) is not None)
        if not rows:
            continue
        path = folder / f"{stem}-{group}-{key.rsplit('_', 1)[0]}.png"
        if suite.curves is not None and group == "attention":
            figure = _lines(suite.cases, suite.curves, rows, key)
        elif len(rows.cases(group)) > MOST_BARS:
            figure = _dots(suite.cases, rows, key)
        else:
            figure = _bars(rows, key)
        figure.suptitle(f"{label}\n{title}", fontsize=10)
        figure.savefig(path, dpi=130, metadata={"Description": json.dumps(results.environment)})
        written.append(path)
    return written


def _figure(panels: int, across: int, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    down = -(-panels // across)
    figure = Figure(figsize=(WIDTH, down * height + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(down, across, n + 1) for n in range(panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
        one.tick_params(labelsize=8)
    return figure, axes


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """Every provider once, under the panels."""
    found = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def _log(axes: Axes, which: str) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def _value(row: Row, key: str) -> float:
    return row.values[key] / 2**20 if key.endswith("_bytes") else row.values[key]


def _style(provider: str) -> dict[str, object]:
    ours = provider.startswith("anymask")
    return {"color": COLOURS.get(provider, OTHER), "label": provider, "zorder": 3 if ours else 2}


def _panels(cases: tuple[Case, ...], rows: Rows) -> dict[str, list[Case]]:
    """The cases that have rows, by panel."""
    have, panels = {row.case for row in rows}, {}
    for case in cases:
        if case.name in have:
            panels.setdefault(case.panel, []).append(case)
    return panels


def _lines(cases: tuple[Case, ...], curves: Curves, rows: Rows, key: str) -> Figure:
    panels = _panels(cases, rows)
    figure, axes = _figure(len(panels), min(2, len(panels)), 3.1)
    for one, (title, members) in zip(axes, panels.items(), strict=True):
        place = {case.name: case.x for case in members}
        for provider in rows.providers("attention"):
            found = sorted((place[r.case], _value(r, key)) for r in rows if r.provider == provider and r.case in place)
            if found:
                width = 2.2 if provider.startswith("anymask") else 1.3
                one.plot(*zip(*found, strict=True), marker="o", markersize=3.5, linewidth=width, **_style(provider))
        if curves.log_x:
            ticks = sorted(set(place.values()))
            one.set_xscale("log", base=2)
            one.set_xticks(ticks, [f"{x:,.0f}" for x in ticks], fontsize=7, rotation=30)
            one.minorticks_off()
        if curves.log_y:
            _log(one, "y")
        else:
            one.set_ylim(bottom=0)
        one.set_xlabel(curves.x, fontsize=8)
        one.set_title(title, fontsize=9)
    _legend(figure, axes)
    return figure


def _dots(cases: tuple[Case, ...], rows: Rows, key: str) -> Figure:
    panels = _panels(cases, rows)
    figure, axes = _figure(len(panels), min(2, len(panels)), 0.5 + 0.26 * max(map(len, panels.values())))
    for one, (title, members) in zip(axes, panels.items(), strict=True):
        # a case is named after its panel too
        names = [case.mask.name if case.mask and case.panel else case.name for case in members]
        line = {case.name: y for y, case in enumerate(members)}
        for provider in dict.fromkeys(row.provider for row in rows):
            found = [(_value(r, key), line[r.case]) for r in rows if r.provider == provider and r.case in line]
            if found:
                mark = "D" if provider.startswith("anymask") else "o"
                one.plot(*zip(*found, strict=True), mark, markersize=5, linestyle="none", **_style(provider))
        one.set_yticks(range(len(names)), names, fontsize=8)
        one.invert_yaxis()
        _log(one, "x")
        one.set_title(title, fontsize=9)
    _legend(figure, axes)
    return figure


def _bars(rows: Rows, key: str) -> Figure:
    figure, (axes,) = _figure(1, 1, 3.5)
    cases, shown = list(dict.fromkeys(row.case for row in rows)), set()
    for x, case in enumerate(cases):
        found = [r for r in rows if r.case == case]
        width = min(0.86 / len(found), 0.2)
        for n, row in enumerate(found):
            style = _style(row.provider)
            if row.provider in shown:
                del style["label"]
            shown.add(row.provider)
            bar = axes.bar(x + (n - (len(found) - 1) / 2) * width, _value(row, key), width * 0.92, **style)
            axes.bar_label(bar, fmt="%.2f", fontsize=7, padding=2, rotation=90 if len(rows) > 12 else 0)
    axes.set_xticks(range(len(cases)), cases)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.15)
    _legend(figure, [axes])
    return figure
