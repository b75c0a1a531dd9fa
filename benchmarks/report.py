"""Rows as a Markdown report, a CSV file and bar charts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path

from benchmarks.check import NAMES
from benchmarks.figures import MISSED, NOT_MEASURED, REACHED, Verdict
from benchmarks.providers import OURS
from benchmarks.results import OK, Results, Row, Rows, write_atomic

# ours in a strong colour, each rival in the same one everywhere
COLOURS = {
    "flex": "#5b8db8",
    "flex-dense": "#a9c7de",
    "cudnn": "#6aa56a",
    "cudnn-bias": "#a6cfa6",
    "cudnn-causal": "#3d7a3d",
    "cudnn-unmasked": "#86c5a8",
    "efficient": "#b9a3cc",
    "flash": "#c9b458",
    "flash-causal": "#9c8a34",
    "sdpa": "#6aa56a",
    "flex-build": "#5b8db8",
    "flex-build-dense": "#a9c7de",
    "flex-build-dense-eager": "#d3e2ee",
}
OUR_COLOURS = ("#d1495b", "#e8935c")

METHOD = """\
Times: CUDA events, every call after a flush of the L2 cache, median (20 % to 80 %), providers of a mask taking turns.
Backward: `torch.autograd.grad(out, (q, k, v), do, retain_graph=True)` on a prepared output.
TFLOP/s count attended pairs only: 4 · batch · heads · pairs · head_dim forward, 2.5 times that backward; "tile" counts
all pairs of the tiles that are not empty. Preparing a mask (packing, block masks, compilation) is not in a call's time.
Memory: peak of requested bytes above what is held before the call, its result included."""
METHOD_CPU = """\
CPU times are given only as parts of the time of SDPA with the same bool mask in the same round, because they depend on
what else the machine does: median (20 % to 80 %) over rounds in which all take turns, in alternating order. Rounds in
which other processes used the cores are left out if at least three others remain, else "machine busy" says so and no
figure is judged."""
CHECK = """\
Error: the Frobenius norm of the difference to fp64, in parts of the reference, on the first and the last (batch, head)
plane. A provider whose error is too large is shown as wrong and has no speed."""


def to_csv(rows: Rows) -> str:
    """One line per row; columns are the union of all values."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "case", "provider", "status", "note", *keys])
    for row in rows:
        numbers = [row.values.get(key, "") for key in keys]
        writer.writerow([row.group, row.case, row.provider, row.status, row.note, *numbers])
    return out.getvalue()


def to_markdown(results: Results, verdicts: list[Verdict], pictures: Iterable[Path] = ()) -> str:
    """The report: figures first, then every row, then where they come from."""
    rows, env = results.rows, results.environment
    on_cpu = any("forward_ratio" in row.values for row in rows) or env["device"].startswith("CPU")
    parts = [f"# Benchmark: {env['device']}", f"{env['shape']}, {env['date']}. `{env['command']}`"]
    counts = {kind: sum(v.reached == kind for v in verdicts) for kind in (REACHED, MISSED, NOT_MEASURED)}
    summary = f"{counts[REACHED]} reached, {counts[MISSED]} missed, {counts[NOT_MEASURED]} not measured."
    table = _table(("figure", "target", "measured", "reached", "note"), [astuple(v) for v in verdicts])
    parts += ["## Figures to reach", summary, table]
    parts += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    for case in rows.cases("attention"):
        found = [r for r in rows if (r.group, r.case) == ("attention", case)]
        parts += [f"## {case}", _cpu_table(found) if on_cpu else _gpu_table(found)]
    if any(r.group == "pack" for r in rows):
        parts += ["## Building the mask", _pack_table([r for r in rows if r.group == "pack"])]
    parts += ["## How it was measured", METHOD_CPU if on_cpu else METHOD, CHECK]
    parts.append(_table(("", ""), [(key, f"`{value}`") for key, value in env.items()]))
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rows = [head, ("---",) * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _gpu_table(rows: list[Row]) -> str:
    head = (
        "provider",
        "forward ms",
        "TFLOP/s",
        "backward ms",
        "TFLOP/s",
        "error o, dq, dk, dv",
        "memory MiB",
        "host us",
        "how",
    )
    lines = []
    for r in rows:
        speed = [cell for step in ("forward", "backward") for cell in (_spread(r, f"{step}_ms", 3), _flops(r, step))]
        memory = [_mib(r, f"{step}_extra_bytes") for step in ("forward", "backward")]
        host = [_us(r, f"{step}_host_us") for step in ("forward", "backward")]
        lines.append((_name(r), *speed, _errors(r), " / ".join(memory), " / ".join(host), _how(r)))
    return _table(head, lines)


def _cpu_table(rows: list[Row]) -> str:
    head = ("provider", "forward", "backward", "forward + backward", "error o, dq, dk, dv", "how")
    steps = ("forward", "backward", "both")
    return _table(head, [(_name(r), *(_ratio(r, s) for s in steps), _errors(r), _how(r)) for r in rows])


def _pack_table(rows: list[Row]) -> str:
    head = (
        "mask",
        "provider",
        "device ms",
        "host ms",
        "peak MiB",
        "bytes of bits",
        "bytes held",
        "bytes as bool",
        "how",
    )
    lines = []
    for r in rows:
        device = "-" if r.get("device_ms") is None else f"{r.values['device_ms']:.3f}"
        sizes = [
            "-" if r.get(k) is None else f"{r.values[k]:,.0f}" for k in ("words_bytes", "held_bytes", "dense_bytes")
        ]
        peak = "-" if r.get("extra_bytes") is None else f"{r.values['extra_bytes'] / 2**20:.1f}"
        lines.append((r.case, _name(r), device, _spread(r, "wall_ms", 3), peak, *sizes, _how(r)))
    return _table(head, lines)


def _name(row: Row) -> str:
    return f"**{row.provider}**" if row.provider.startswith("anymask") else row.provider


def _how(row: Row) -> str:
    return row.note if row.status == OK else f"**{row.status}**: {row.note}"


def _spread(row: Row, key: str, digits: int) -> str:
    if row.status != OK or row.get(key) is None:
        return "-"
    median, low, high = (row.values[k] for k in (key, f"{key}_p20", f"{key}_p80"))
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _ratio(row: Row, step: str) -> str:
    return _spread(row, f"{step}_ratio", 2) + ("" if row.quiet(step) else ", machine busy")


def _flops(row: Row, step: str) -> str:
    if row.status != OK or row.get(f"{step}_tflops") is None:
        return "-"
    tile = row.get(f"{step}_tile_tflops")
    return f"{row.values[f'{step}_tflops']:.0f}" + ("" if tile is None else f" (tile {tile:.0f})")


def _errors(row: Row) -> str:
    found = [row.get(f"error_{name}") for name in NAMES]
    return "-" if None in found else ", ".join(f"{e:.1e}" for e in found)


def _mib(row: Row, key: str) -> str:
    value = row.get(key)
    return "-" if row.status != OK or value is None else f"{value / 2**20:.1f}"


def _us(row: Row, key: str) -> str:
    value = row.get(key)
    return "-" if row.status != OK or value is None else f"{value:.0f}"


def summary_line(row: Row) -> str:
    """One line for the terminal."""
    parts = [f"{row.name:<42}", f"{row.status:<7}"]
    for step in ("forward", "backward", "both"):
        if row.get(f"{step}_ms") is not None:
            parts.append(f"{step} {row.values[f'{step}_ms']:8.3f} ms {_flops(row, step):>16} TFLOP/s ")
        if row.get(f"{step}_ratio") is not None:
            parts.append(f"{step} {row.values[f'{step}_ratio']:.2f}x{'' if row.quiet(step) else ' (machine busy)'} ")
    if row.get("device_ms") is not None:
        parts.append(f"device {row.values['device_ms']:.3f} ms, host {row.values['wall_ms']:.3f} ms ")
    parts.append(row.note if row.status != OK else f"[{row.note}]")
    return " ".join(parts)


def verdict_table(verdicts: list[Verdict]) -> str:
    """The figures for the terminal, as Markdown."""
    return _table(("figure", "target", "measured", "reached", "note"), [astuple(v) for v in verdicts])


def plots(rows: Rows, folder: Path, stem: str, title: str) -> list[Path]:
    """One bar chart per pass and one for building; returns the files written."""
    suffix = "ratio" if any("forward_ratio" in row.values for row in rows) else "ms"
    unit = "time in parts of SDPA's" if suffix == "ratio" else "ms, less is better"
    charts = [("attention", f"{step}_{suffix}", step, unit) for step in ("forward", "backward", "both")]
    charts.append(("pack", "device_ms", "building the mask, device time", "ms, less is better"))
    written = []
    for group, key, what, label in charts:
        bars = [row for row in rows if row.group == group and row.status == OK and row.get(key) is not None]
        if bars:
            path = folder / f"{stem}-{group}-{key.rsplit('_', 1)[0]}.png"
            _bar_chart(Rows(bars), group, key, label, f"{what}: {title}", path)
            written.append(path)
    return written


def _bar_chart(rows: Rows, group: str, key: str, label: str, title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases, providers = rows.cases(group), rows.providers(group)
    ours = [p for p in providers if p.startswith((OURS, "anymask"))]
    colours = COLOURS | dict(zip(ours, OUR_COLOURS, strict=False))
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown: set[str] = set()
    for x, case in enumerate(cases):
        found = [r for r in rows if r.case == case]
        width = 0.86 / max(len(found), 1)
        for n, row in enumerate(found):
            left = x - 0.43 + n * width
            bar = axes.bar(left + width / 2, row.values[key], width * 0.92, color=colours.get(row.provider, "#999999"))
            axes.bar_label(bar, fmt="%.2f", fontsize=7, padding=2, rotation=90 if len(rows) > 12 else 0)
            if row.provider not in shown:
                bar.set_label(row.provider)
                shown.add(row.provider)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=min(len(shown), 6), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def write(results: Results, verdicts: list[Verdict], with_plots: bool) -> list[Path]:
    """CSV, Markdown and, with `with_plots`, PNG files beside the JSON; returns what was written."""
    folder, stem = results.path.parent, results.path.stem
    pictures: list[Path] = []
    if with_plots:
        env = results.environment
        pictures = plots(results.rows, folder, stem, f"{env['device']}, {env['shape']}")
        for group in ("attention", "pack"):
            # a picture of an earlier run would show other numbers than the report
            for old in set(folder.glob(f"{stem}-{group}-*.png")) - set(pictures):
                old.unlink()
    files = {
        folder / f"{stem}.csv": to_csv(results.rows),
        folder / f"{stem}.md": to_markdown(results, verdicts, pictures),
    }
    for path, text in files.items():
        write_atomic(path, text)
    return [results.path, *files, *pictures]
