"""Launches that end where Triton has compiled a kernel: no GPU is needed, and a launcher runs as it is."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from anymask import BlockMask, causal, launch, pack
from anymask.backends import hopper
from anymask.backends import triton as triton_backend
from anymask.packing.triton import plans as packing_plans

# target and the bytes of shared memory a program may have
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_89": (GPUTarget("cuda", 89, 32), 101_376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}
# of the portable backend, in the order of its launches
PASSES = ["_fwd_kernel", "_bwd_delta_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel"]


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


class Checking(Forgetful):
    """Finds no kernel, and knows that equal keys mean the same kernel."""

    def __setitem__(self, key: Any, kernel: Any) -> None:
        assert self.setdefault(key, kernel) is kernel, f"{kernel.metadata.name} depends on more than {key}"
        # a launch of the compiled kernel takes constants by position
        params, constants = kernel.src.fn.params, kernel.src.constants
        last = [i for i, param in enumerate(params) if param.is_constexpr]
        assert last == list(range(len(params)))[len(params) - len(last) :]
        assert tuple(constants[(i,)] for i in last) == key[len(key) - len(last) :]


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
        patch.setattr(hopper, "multiprocessors", lambda device: 132)
        packing_plans.forget()
        yield kernels
    packing_plans.forget()
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


def spilled_bytes(kernel: Any) -> int:
    """Bytes a thread keeps in local memory (CUDA), or registers spilled (AMD)."""
    if "amdgcn" in kernel.asm:
        return sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"]))
    usage = nvidia_tool("cuobjdump", kernel.asm["cubin"], "-res-usage")
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found, usage
    return sum(map(int, found.groups()))


def compile_passes(
    dtype: torch.dtype,
    dim: int,
    mask: BlockMask | None,
    v_dim: int | None = None,
    shape: tuple[int, int, int] = (2, 2, 300),
    group: int = 1,
) -> None:
    """Forward and backward over zeros: a launcher reads their shapes, strides and addresses only."""
    batch, kv_heads, length = shape
    q, k = (torch.zeros(batch, heads, length, dim, dtype=dtype) for heads in (kv_heads * group, kv_heads))
    v = torch.zeros(*shape, v_dim or dim, dtype=dtype)
    o, lse = triton_backend.forward(q, k, v, mask, 0.1)
    triton_backend.backward(q, k, v, o, lse, o, None, mask, 0.1, True)


def causal_mask() -> BlockMask:
    return pack(causal(), q_len=300, kv_len=300)


def padded_mask(length: int = 300) -> BlockMask:
    """Keys no query attends to, and a query without a key."""
    at = torch.arange(length)
    return pack((at < length * 2 // 3) & (at[:, None] > 0))


def assert_fits(kernels: list[Any], target: str, names: list[str]) -> None:
    assert [k.metadata.name for k in kernels] == names
    shared = {k.metadata.name: k.metadata.shared for k in kernels}
    assert max(shared.values()) <= TARGETS[target][1], shared
    # columns of Blackwell's tensor memory; of a kernel that takes more, Triton compiles a trap
    assert max(getattr(k.metadata, "tmem_size", 0) or 0 for k in kernels) <= 512
