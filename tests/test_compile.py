"""Every Triton kernel compiles, without a GPU, for each architecture, and keeps its registers.

The launchers run as they are, on CPU tensors, against a driver that knows only its target; each launch is turned into a
compilation.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from anymask import causal, from_dense, pack
from anymask.backends import triton as backend
from anymask.mask import triton_pack

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing"),
]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class TargetOnly:
    """As much of a driver as compiling needs."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch):
    """A function that makes a target current and returns the list its compiled kernels are added to."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        # it remembers the first target it ran for
        self.device_caches.clear()
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)

    def start(target):
        monkeypatch.setattr(driver, "_active", TargetOnly(TARGETS[target]))
        return kernels

    yield start


def spilled_bytes(kernel) -> int:
    """Bytes a thread keeps in local memory (CUDA) or registers spilled (AMD)."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        return sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", text))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found, usage
    return sum(map(int, found.groups()))


def qkv(dtype, dim, v_dim=None, q_len=300, kv_len=300, kv_heads=2):
    shapes = (2, 2, q_len, dim), (2, kv_heads, kv_len, dim), (2, kv_heads, kv_len, v_dim or dim)
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def run_passes(dtype, dim, mask, v_dim=None):
    q, k, v = qkv(dtype, dim, v_dim)
    o, lse = backend.forward(q, k, v, mask, 0.1)
    backend.backward(q, k, v, o, lse, o, None, mask, 0.1)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(compiled, target, dim, masked):
    kernels = compiled(target)
    run_passes(torch.float16, dim, pack(causal(), q_len=300, kv_len=300) if masked else None)
    assert {k.metadata.name: spilled_bytes(k) for k in kernels} == dict.fromkeys(
        ["_fwd_kernel", "_bwd_delta_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel"], 0
    )


@pytest.mark.parametrize("target", TARGETS)
def test_packing_compiles(compiled, target):
    kernels = compiled(target)
    mask = torch.zeros(1, 1, 300, 300, dtype=torch.bool)
    # the sizes that the launcher would read back are not there: take them from the definition
    triton_pack.pack_dense(mask, 300, 300)
    triton_pack.lists_from_tiles(torch.ones(1, 1, 3, 3, dtype=torch.int8), torch.zeros(9, 128, 4, dtype=torch.int32), None)
    print([(k.metadata.name, spilled_bytes(k)) for k in kernels])
