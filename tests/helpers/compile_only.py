"""Launches that end where Triton has compiled a kernel: no GPU is needed, and a launcher runs as it is."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from anymask import launch
from anymask.backends import hopper
from anymask.backends import triton as triton_backend

# target and the bytes of shared memory a program may have
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_89": (GPUTarget("cuda", 89, 32), 101_376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}


class TargetOnly:
    """As much of a driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Forgetful(dict[Any, Any]):
    """Finds no kernel, so that every launch compiles."""

    def get(self, key: Any, default: Any = None) -> Any:
        return default


@contextmanager
def compiling(target: str, known: dict[Any, Any] | None = None) -> Iterator[list[Any]]:
    """The list that kernels are added to as launches compile them for `target`, a name in `TARGETS`.

    `known`: what stands for the dictionary in which `launch` keeps kernels; by default one that remembers none.
    """
    kernels: list[Any] = []
    ran: set[JITFunction] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if self not in ran:
            # it remembers the first target it ever ran for
            self.device_caches.clear()
            ran.add(self)
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    triton_backend._options.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(launch, "_kernels", Forgetful() if known is None else known)
        patch.setattr(driver, "_active", TargetOnly(TARGETS[target][0]))
        patch.setattr(hopper, "_multiprocessors", lambda device: 132)
        yield kernels
    triton_backend._options.cache_clear()
    for function in ran:
        function.device_caches.clear()


def nvidia_tool(name: str, cubin: bytes, *flags: str) -> str:
    """What one of the tools that come with Triton prints of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *flags, file.name], capture_output=True, text=True, check=True).stdout


def sass(kernel: Any) -> list[tuple[str, str]]:
    """(label, "") or ("", instruction with its predicate and operands) of a kernel, in order."""
    text = nvidia_tool("nvdisasm", kernel.asm["cubin"])
    return re.findall(r"^(\.L_x_\d+):|/\*[0-9a-f]{4,6}\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*);", text, re.MULTILINE)
