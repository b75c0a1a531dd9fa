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
from pathlib import Path
from typing import Any

import torch

from anymask.collect_env import version_of

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
    # its time over that of the fastest baseline, and the baseline's name
    ratio: float | None = None
    baseline: str | None = None
    # of attended pairs
    tflops: float | None = None
    host_us: float | None = None
    # peak above what is held before the call, result included
    extra_bytes: int | None = None
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
        return Results(found["environment"], [Row(**row) for row in found["rows"]])

    def save(self, path: Path) -> None:
        """Write the file, one line a row."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(_compact(row)) for row in self.rows)
        path.write_text(f'{{"environment": {json.dumps(self.environment)},\n"rows": [\n{lines}\n]}}\n')


def _compact(row: Row) -> dict[str, Any]:
    """What a row has, numbers to 5 digits. NaN is no JSON: an error that is not a number is null."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(v) for key, v in value.items()}
        return (float(f"{value:.5g}") if math.isfinite(value) else None) if isinstance(value, float) else value

    return {k: short(v) for k, v in asdict(row).items() if v is not None and v != {}}


def reason(error: BaseException) -> str:
    """Type and first line of an error, without the folders of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return re.sub(r"(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", text)[:MAX_REASON]


def environment(device: str, command: str, commit: str | None = None) -> dict[str, str]:
    """What a reader needs to trust or repeat the numbers; nothing that names the machine or its folders."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "commit": commit or _commit(),
        "card": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
    }
    found |= {name: version for name in PACKAGES if (version := version_of(name)) != "not installed"}
    if device == "cuda":
        found["cuda"], found["cudnn"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
    else:
        found["threads"], found["load before"] = str(torch.get_num_threads()), f"{os.getloadavg()[0]:.1f}"
    return found


def _commit() -> str:
    """Commit of this checkout, with "+changes" if tracked files differ from it; "unknown" without git."""
    git, here = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"], Path(__file__).parent
    try:
        return subprocess.run(git, cwd=here, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
