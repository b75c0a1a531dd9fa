"""The host's part of small calls, on any machine: `python -m benchmarks.host`.

Calls of the Hopper backend on CPU tensors, whose launches end where the driver would begin. Times are given in
microseconds and in loops of Python, `LOOP` additions each, so that machines compare and a test can hold calls to it.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import anymask
from anymask import attention, causal, document, pack

LOOP = 1000
# calls of a block, and blocks
CALLS, BLOCKS = 25, 30
LENGTH = 512


def loop() -> int:
    """What calls are compared with: it has never anything to do with torch."""
    total = 0
    for i in range(LOOP):
        total += i * i
    return total


@contextmanager
def stubbed() -> Iterator[None]:
    """The Hopper backend takes CPU tensors, and compiles and launches nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from anymask import calls, direct, launch
    from anymask.backends import hopper
    from anymask.backends.gpu import split, target

    sm90 = GPUTarget("cuda", 90, 32)
    ran: set[JITFunction[Any]] = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        ran.add(self)
        _, specialization, _ = self.device_caches[0][-1](*args, **named)
        types = [kind for kind, _ in specialization]
        return _compiled(sm90, dict(zip(self.arg_names, types, strict=True)))

    active = SimpleNamespace(
        get_current_target=lambda: sm90, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )

    def why_not(q: Any, k: Any, v: Any, *rest: Any) -> str | None:
        # what the real one does for tensors on a GPU
        layout = tuple((t.stride(), t.data_ptr() % 16) for t in (q, k, v))
        return hopper._why_not(q.device, q.dtype, q.shape, v.shape[3], layout)

    def forget() -> None:
        hopper._why_not.cache_clear()
        calls.forget()
        anymask.forget()

    with ExitStack() as stack:
        for where, name, stub in (
            (JITFunction, "run", run),
            (driver, "_active", active),
            (launch, "_kernels", {}),
            (direct, "_library", _library),
            (hopper, "why_not", why_not),
            (hopper, "_unusable", lambda device: None),
            (target, "is_installed", lambda: True),
            *((module, "multiprocessors", lambda device: 132) for module in (hopper, target)),
        ):
            stack.enter_context(patch.object(where, name, stub))
        assert split.target is target
        forget()
        yield
        forget()
        for function in ran:
            function.device_caches.clear()


def _compiled(target: Any, signature: dict[str, Any]) -> Any:
    """What Triton would compile, as far as a launch asks."""
    blocks = [re.findall(r"\[(.*?)\]", str(kind))[0].split(",") for kind in signature.values() if "desc" in str(kind)]
    options = {"swizzle": 3, "elem_size": 2, "elem_type": 8, "fp4_padded": False}
    none = ("shared", "launch_pdl", "launch_cooperative_grid", "global_scratch_size", "profile_scratch_size")
    metadata = SimpleNamespace(
        target=target,
        tensordesc_meta=[options | {"block_size": list(map(int, block))} for block in blocks],
        num_warps=4,
        num_ctas=1,
        **dict.fromkeys(none, 0),
    )
    source = SimpleNamespace(signature=signature)
    return SimpleNamespace(metadata=metadata, src=source, function=1, packed_metadata=0, run=lambda *args: None)


def _library() -> Any:
    """In place of the driver's functions: one of C that does next to nothing, called with as many arguments."""
    waits, writes = ctypes.CDLL(None).labs, ctypes.PyDLL(None).labs
    waits.argtypes, writes.argtypes = [ctypes.c_void_p] * 4, [ctypes.c_void_p] * 2
    return lambda *args: waits(*args) and 0, lambda *args: writes(*args) and 0, lambda *args: 0


@dataclass(frozen=True)
class HostTime:
    """What a call takes of the host."""

    us: float  # of the fastest block
    loops: float  # the median of blocks, each beside one of loops of Python


def measure(compiled: bool) -> dict[str, HostTime]:
    """All calls in turns, each block beside one of loops, so that a slow spell of the machine meets both."""
    with stubbed():
        found: dict[str, list[tuple[float, float]]] = {}
        functions = calls(compiled)
        for call in functions.values():
            _seconds(call)
        for _ in range(BLOCKS):
            for name, call in functions.items():
                found.setdefault(name, []).append((_seconds(call), _seconds(loop)))
    return {
        name: HostTime(min(own for own, _ in blocks) * 1e6, statistics.median(own / of_loop for own, of_loop in blocks))
        for name, blocks in found.items()
    }


def _seconds(call: Callable[[], object]) -> float:
    """Of one call, by the thread's clock, which stops while others have the core."""
    start = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - start) / CALLS


def calls(compiled: bool) -> dict[str, Callable[[], object]]:
    """The calls by name, B1 H8 L512 D128, bf16; `compiled`: those of compiled functions too."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 8, LENGTH, 128, generator=generator).to(torch.bfloat16) for _ in range(4))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    packed, dense = pack(causal(), q_len=LENGTH, kv_len=LENGTH), torch.rand(LENGTH, LENGTH, generator=generator) < 0.5
    lazy, three = causal(), causal() & document(torch.arange(LENGTH) // 100) & anymask.key_padding(dense[0] | True)

    def both(attend: Callable[..., Any]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*leaves, packed), leaves, do)

    found: dict[str, Callable[[], object]] = {
        "forward": lambda: attention(q, k, v, packed),
        "forward, gradients recorded": lambda: attention(*leaves, packed),
        "forward and backward": both(attention),
        "a mask of one leaf": lambda: attention(q, k, v, lazy),
        "a mask of three leaves": lambda: attention(q, k, v, three),
        "a tensor seen before": lambda: attention(q, k, v, dense),
        "a view made anew": lambda: attention(q, k, v, dense[None, None]),
        "a soft cap": lambda: attention(q, k, v, packed, softcap=20.0),
    }
    if compiled:
        attend = torch.compile(lambda q, k, v, mask: attention(q, k, v, mask), fullgraph=True)
        found |= {"compiled forward": lambda: attend(q, k, v, packed), "compiled forward and backward": both(attend)}
    return found


def main() -> int:
    """Print the table; `--eager` leaves compiled functions out."""
    print(f"{'host time of':32}{'us':>8}{'loops':>8}")
    for name, found in measure(compiled="--eager" not in sys.argv[1:]).items():
        print(f"{name:32}{found.us:8.1f}{found.loops:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
