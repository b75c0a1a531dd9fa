"""What this machine has: versions, GPUs, and the backends that can run on it."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

import anymask
from anymask import backends


def collect_env() -> dict[str, Any]:
    """`versions` by name, `gpus` with name, capability and memory in GiB, and `backends`: "yes", or why not."""
    has_gpu = torch.cuda.is_available()
    sample = torch.zeros(1, 1, 8, 64, device="cuda" if has_gpu else "cpu", dtype=torch.float16)
    return {
        "versions": {
            "anymask": anymask.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "cuda": torch.version.cuda or "none",
            "driver": nvidia_smi("driver_version")[0] if has_gpu else "none",
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        # by a small call in fp16 on the device that would run it
        "backends": {name: reason or "yes" for name, reason in backends.reasons(sample, sample, sample, None).items()},
    }


def version_of(package: str) -> str:
    """Version of an installed package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def nvidia_smi(*queries: str) -> list[str]:
    """Answers of `nvidia-smi --query-gpu` about the first GPU, "unknown" each where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={','.join(queries)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ["unknown"] * len(queries)
    return done.stdout.strip().split(", ")


def _gpu(index: int) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "memory_gib": f"{properties.total_memory / 2**30:.0f}",
    }
