"""Rows as a Markdown report and a CSV file, with pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path

from benchmarks import pictures
from benchmarks.check import NAMES
from benchmarks.figures import MISSED, NOT_MEASURED, REACHED, Verdict
from benchmarks.results import OK, Results, Row, write_atomic
from benchmarks.suites import Suite

METHOD = """\
Times: CUDA events, every call after a flush of the L2 cache, median (20 % to 80 %), providers of a mask taking turns.
Host: a call while the device lags behind, so that nothing waits.
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
Error: the Frobenius norm of the difference to fp64, in parts of the reference, on the first and the last head of k and
v and the query heads that read them. A provider whose error is too large is shown as wrong and has no speed; a rival of
which only the gradients are wrong has none backward, and its row says so."""


def to_csv(results: Results) -> str:
    """One line per row; columns are the union of all values, and where they come from."""
    rows, env = results.rows, results.environment
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "case", "provider", "status", "note", *keys, *env])
    for row in rows:
        numbers = [row.values.get(key, "") for key in keys]
        writer.writerow([row.group, row.case, row.provider, row.status, row.note, *numbers, *env.values()])
    return out.getvalue()


def to_markdown(results: Results, verdicts: list[Verdict], drawn: Iterable[Path] = ()) -> str:
    """The report: figures first, then every row, then where they come from."""
    rows, env = results.rows, results.environment
    on_cpu = any("forward_ratio" in row.values for row in rows) or env["device"].startswith("CPU")
    parts = [f"# Benchmark: {env['device']}", f"{env['shape']}, {env['date']}. `{env['command']}`"]
    counts = {kind: sum(v.reached == kind for v in verdicts) for kind in (REACHED, MISSED, NOT_MEASURED)}
    if verdicts:
        summary = f"{counts[REACHED]} reached, {counts[MISSED]} missed, {counts[NOT_MEASURED]} not measured."
        parts += ["## Figures to reach", summary, verdict_table(verdicts)]
    parts += [f"![{picture.stem}]({picture.name})" for picture in drawn]
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
    found = [e for name in NAMES if (e := row.get(f"error_{name}")) is not None]
    return ", ".join(f"{e:.1e}" for e in found) or "-"


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


def write(suite: Suite, results: Results, verdicts: list[Verdict], with_plots: bool) -> list[Path]:
    """CSV, Markdown and, with `with_plots`, PNG files beside the JSON; returns what was written."""
    folder, stem = results.path.parent, results.path.stem
    drawn: list[Path] = []
    if with_plots:
        drawn = pictures.draw(suite, results, folder, stem)
        for group in ("attention", "pack"):
            # a picture of an earlier run would show other numbers than the report
            for old in set(folder.glob(f"{stem}-{group}-*.png")) - set(drawn):
                old.unlink()
    files = {
        folder / f"{stem}.csv": to_csv(results),
        folder / f"{stem}.md": to_markdown(results, verdicts, drawn),
    }
    for path, text in files.items():
        write_atomic(path, text)
    return [results.path, *files, *drawn]
