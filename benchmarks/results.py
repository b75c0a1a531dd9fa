"""Rows, where they come from, and the JSON file of a suite: one line a row, whole after every case."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

OK, WRONG, SKIPPED, FAILED = "ok", "wrong", "skipped", "failed"
# packages whose versions matter if they are there
PACKAGES = ("torch", "triton", "flash-attn-4")
MAX_REASON = 200


@dataclass
class Row:
    """One provider in one pass of one case. Numbers are there only if `status` is "ok"; errors also if "wrong"."""

    suite: str
    case: str
    shape: str
    provider: str
    # "inference", "forward", "backward", "both", "build"; "" if the provider did not come so far
    step: str
    status: str
    # how the provider was set up, or why there are no numbers
    note: str
    # median, 20 % and 80 %
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    # its time over that of the fastest rival, and the rival's name
    ratio: float | None = None
    rival: str | None = None
    # of attended pairs
    tflops: float | None = None
    host_us: float | None = None
    # peak above what is held before the call, result included
    extra_bytes: int | None = None
    sm_clock_mhz: float | None = None
    # relative to fp64, and over the error of eager torch
    errors: dict[str, float] = field(default_factory=dict)
    error_ratios: dict[str, float] = field(default_factory=dict)


@dataclass
class Results:
    """What a run of a suite has found so far."""

    environment: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    @staticmethod
    def load(path: Path) -> Results:
        """The result in a file that `save` wrote."""
        found = json.loads(path.read_text())
        return Results(found["environment"], [Row(step=row.pop("pass"), **row) for row in found["rows"]])

    def save(self, path: Path) -> None:
        """Replace the file, so that a reader, or an interruption, sees the old or the new one and nothing between."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(_compact(row)) for row in self.rows]
        text = f'{{"environment": {json.dumps(self.environment)},\n"rows": [\n' + ",\n".join(lines) + "\n]}\n"
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        os.replace(part, path)

    def find(self, case: str, provider: str, step: str) -> Row | None:
        """The row with numbers, or None."""
        wanted = case, provider, step, OK
        return next((r for r in self.rows if (r.case, r.provider, r.step, r.status) == wanted), None)


def _compact(row: Row) -> dict[str, Any]:
    """What a row has, numbers to 5 digits. NaN is no JSON: an error that is not a number is null."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(v) for key, v in value.items()}
        return (float(f"{value:.5g}") if math.isfinite(value) else None) if isinstance(value, float) else value

    names = {"step": "pass"}
    return {names.get(k, k): short(v) for k, v in asdict(row).items() if v is not None and v != {}}


def reason(error: BaseException) -> str:
    """Type and first line of an error, without the folders of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    text = re.sub(r"(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", text)
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"


def environment(device: str, command: str, commit: str | None = None) -> dict[str, str]:
    """What a reader needs to trust or repeat the numbers; nothing that names the machine or its folders."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "commit": commit or _commit(),
        "card": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
    }
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    found |= {name: installed[name] for name in PACKAGES if name in installed}
    if device == "cuda":
        found["cuda"], found["cudnn"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
    else:
        found["threads"], found["load before"] = str(torch.get_num_threads()), f"{os.getloadavg()[0]:.1f}"
    return found


def _commit() -> str:
    """Commit of this checkout, with "+changes" if tracked files differ from it; "unknown" without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, changes = (
            subprocess.run([*git, *arguments], capture_output=True, text=True, check=True, timeout=30).stdout.strip()
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changes else "")
