"""Rows, where they come from, and the JSON file that holds them after every single one."""

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

import torch

from anymask.collect_env import nvidia_smi, version_of

OK, WRONG, SKIPPED, FAILED = "ok", "wrong", "skipped", "failed"
# what two runs must share for their rows to stand in one file
SAME = ("suite", "shape", "device", "driver", "torch", "triton", "cudnn", "python", "commit", "seed")
MAX_REASON = 200
# packages whose versions matter if they are there
RIVALS = ("flash-attn-4", "flashinfer-python", "xformers")


@dataclass(frozen=True)
class Row:
    """One provider on one case. Numbers are there only if `status` is "ok"; errors also if it is "wrong"."""

    # "attention" or "pack"
    group: str
    case: str
    provider: str
    status: str
    # how the provider was set up, or why there are no numbers
    note: str
    # names carry their units: forward_ms, forward_tflops, forward_extra_bytes, error_dq ...
    values: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`group/case/provider`."""
        return f"{self.group}/{self.case}/{self.provider}"

    def get(self, key: str) -> float | None:
        """The value, or None if this row has no such number."""
        return self.values.get(key)

    def quiet(self, step: str) -> bool:
        """Whether the ratio of a pass comes from rounds that other processes did not disturb."""
        return self.values.get(f"{step}_quiet_rounds") == self.values.get(f"{step}_rounds")


class Rows(list[Row]):
    """Rows in the order they were measured."""

    def find(self, group: str, case: str, provider: str) -> Row | None:
        """The row of a provider on a case, or None."""
        return next((r for r in self if (r.group, r.case, r.provider) == (group, case, provider)), None)

    def cases(self, group: str) -> list[str]:
        """Cases of a group, in order."""
        return list(dict.fromkeys(r.case for r in self if r.group == group))

    def providers(self, group: str) -> list[str]:
        """Providers of a group, in order."""
        return list(dict.fromkeys(r.provider for r in self if r.group == group))


@dataclass
class Results:
    """Everything a run has found so far. `save` is atomic: the file is whole whenever it is read."""

    path: Path
    environment: dict[str, str]
    rows: Rows = field(default_factory=Rows)

    @staticmethod
    def start(path: Path, environment: dict[str, str], resume: bool = False) -> Results:
        """An empty result, or with `resume` the one in the file.

        Raises:
            ValueError: the file's rows were measured elsewhere or with other code.
        """
        results = Results(path, environment)
        if resume and path.exists():
            old = Results.load(path)
            changed = [key for key in SAME if old.environment.get(key) != environment.get(key)]
            if changed:
                raise ValueError(f"cannot resume {path.name}: it differs from this run in {', '.join(changed)}")
            results.environment["resumed"] = f"rows of {old.environment['date']} are kept"
            results.environment["command"] = f"{old.environment['command']}; {environment['command']}"
            results.rows = old.rows
        return results

    @staticmethod
    def load(path: Path) -> Results:
        """The result in a file that `save` wrote.

        Raises:
            ValueError: the file holds something else, or is not there.
        """
        try:
            found = json.loads(path.read_text())
            results = Results(path, found["environment"])
            for row in found["rows"]:
                row["values"] = {k: math.nan if v is None else v for k, v in row["values"].items()}
                results.rows.append(Row(**row))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no result of this benchmark: {type(error).__name__}: {error}") from error
        return results

    def add(self, row: Row) -> None:
        """Put the row in, replacing an older one of the same name, and save."""
        self.rows[:] = [r for r in self.rows if r.name != row.name]
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Replace the JSON file by the present rows."""
        # NaN is no JSON: an error that is not a number is null
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["values"] = {k: v if math.isfinite(v) else None for k, v in row["values"].items()}
        write_atomic(self.path, json.dumps({"environment": self.environment, "rows": rows}, indent=1) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader, or an interruption, sees the old or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def reason(error: BaseException) -> str:
    """Type and first line of an error, without the folders of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    text = re.sub(r"(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", text)
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"


def environment(device: str, suite: str, shape: str, seed: int, command: str, commit: str | None) -> dict[str, str]:
    """What a reader needs to trust or repeat the numbers; nothing that names the machine or its folders."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "suite": suite,
        "shape": shape,
        "seed": str(seed),
        "commit": commit or git_commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
    }
    found |= {name: version for name in RIVALS if (version := version_of(name)) != "not installed"}
    if device == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        asked = "driver_version", "power.limit", "clocks.max.sm"
        found |= dict(zip(("driver", "power limit", "max SM clock"), nvidia_smi(*asked), strict=True))
    else:
        found["threads"] = str(torch.get_num_threads())
        # ratios of a busy machine say little: threads wait for each other
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        found["load before"] = f"{load:.1f} on {os.cpu_count()} cores"
    return found


def slug(device: str) -> str:
    """Name of the folder of a device's results: `nvidia-h200`, `cpu`."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def git_commit() -> str:
    """Commit of this checkout, with "+changes" if tracked files differ from it; "unknown" without git."""
    here = Path(__file__).parent
    try:
        head = _output(["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"])
        changes = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changes else "")


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
