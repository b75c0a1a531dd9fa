"""A hash of the machine code of every kernel of attention, compiled without a GPU: proof that a change changed none.

    python -m tests.helpers.machine_code > before.txt

A line a kernel: backend, target, pass and configuration, hash, number of instructions. Hopper kernels are hashed as
SASS, Triton kernels as PTX. Neither is told of source lines, which ptxas reads: with the same PTX otherwise they moved
instructions of one kernel in 92.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
import triton

from anymask import BlockMask, pack
from anymask.backends import hopper
from anymask.backends import triton as triton_backend
from tests.helpers.compile_only import compiling, sass

LENGTH = 300
DEBUG = re.compile(r"\s*(\.loc|\.file|//|\$L__tmp)")
LINE_INFO_OFF = "TRITON_DISABLE_LINE_INFO"


def masks() -> dict[str, BlockMask | None]:
    """No mask, one with all kinds of tiles, and one with keys that no query attends to."""
    return {
        "none": None,
        "mask": pack(torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()),
        "unused": pack(torch.arange(LENGTH).expand(LENGTH, LENGTH) < LENGTH - 100),
    }


def ptx(kernel: Any) -> list[str]:
    """Lines of a kernel's PTX, without those that name source lines."""
    code = kernel.asm["ptx"].split("\t.section")[0]
    return [line for line in code.splitlines() if line.strip() and not DEBUG.match(line)]


def digest(kernel: Any) -> tuple[str, int]:
    """Hash and number of instructions; which form is hashed depends on who wrote the kernel."""
    is_gluon = "ttir" not in kernel.asm
    lines = ["".join(line) for line in sass(kernel)] if is_gluon else ptx(kernel)
    return hashlib.sha1("\n".join(lines).encode()).hexdigest()[:12], len(lines)


def run(backend: Any, dtype: torch.dtype, dim: int, heads: int, q_len: int, mask: Any, scale: float, det: bool) -> None:
    """Forward and backward over zeros."""
    q = torch.zeros(2, heads, q_len, dim, dtype=dtype)
    k = torch.zeros(2, 2, LENGTH, dim, dtype=dtype)
    o, lse = backend.forward(q, k, k, mask, scale)
    backend.backward(q, k, k, o, lse, o, None, mask, scale, det)


def configurations() -> Iterator[tuple[str, str, Any, tuple[Any, ...]]]:
    """(target, name, backend, arguments of `run`)."""
    half, found = torch.float16, masks()
    for dim in (64, 128):
        for kind in ("none", "mask"):
            for det in (False, True):
                name = f"d{dim} {kind}" + " deterministic" * det
                yield "sm_90", name, hopper, (half, dim, 4, LENGTH, found[kind], 0.1, det)
        shared = pack(torch.ones(16, LENGTH, dtype=torch.bool).tril())
        yield "sm_90", f"d{dim} mask packed-gqa bf16", hopper, (torch.bfloat16, dim, 8, 16, shared, 0.1, False)
        for target in ("sm_90", "sm_80"):
            for kind in ("none", "mask", "unused"):
                yield target, f"d{dim} {kind}", triton_backend, (half, dim, 4, LENGTH, found[kind], 0.1, True)
    yield "sm_90", "d72 mask negative f32", triton_backend, (torch.float32, 72, 2, LENGTH, found["mask"], -0.1, True)


def main() -> None:
    """Print the table."""
    os.environ[LINE_INFO_OFF] = "1"
    seen: set[tuple[str, ...]] = set()
    for target, name, backend, arguments in configurations():
        with compiling(target) as kernels:
            run(backend, *arguments)
            for kernel in kernels:
                row = backend.__name__.rpartition(".")[2], target, kernel.metadata.name, name
                assert row not in seen
                seen.add(row)
                code, count = digest(kernel)
                print(f"{triton.__version__} {row[0]:7} {target} {row[2]:18} {name:28} {code} {count}", flush=True)


if __name__ == "__main__":
    main()
