"""What Triton compiles for on this machine. Triton is imported when asked."""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def is_installed() -> bool:
    """Whether there is a Triton to import."""
    return find_spec("triton") is not None


@cache
def interprets() -> bool:
    """Whether Triton interprets its kernels on the CPU, as TRITON_INTERPRET=1 asks."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def current_target() -> tuple[str, int | str]:
    """Triton's backend and architecture for the current device; the interpreter behaves as sm_80."""
    if interprets():
        return "cuda", 80
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return target.backend, target.arch


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, or compute units of AMD's."""
    return torch.cuda.get_device_properties(device).multi_processor_count
