"""Times candidate launch options of the Triton kernels and prints them fastest first: the source of tuning.py's rows.

    python -m benchmarks.tune --head-dim 128 --pass fwd

Each candidate is first checked against the default options on the same inputs. Compilation runs in parallel processes,
so that the timed process finds every kernel compiled.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

import anymask
from anymask.backends import triton as backend
from anymask.backends.gpu.arguments import TileConfig
from anymask.backends.gpu.target import current_target
from anymask.backends.triton import tuning

PASSES = ("fwd", "dq", "dkdv")
# norm of an error, in parts of that of the result
TOLERANCE = 2e-3
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def candidates(which: str) -> Iterator[TileConfig]:
    """Configs worth a try: queries and keys of a step, warps, stages."""
    held, stepped = (32, 64, 128), (32, 64, 128)
    for outer, inner, warps, stages in itertools.product(held, stepped, (4, 8), (2, 3, 4)):
        if outer * inner < 64 * 32 or outer == 32 or (warps == 8 and outer * inner < 64 * 64):
            continue
        # dkdv holds keys and steps over queries
        block_m, block_n = (inner, outer) if which == "dkdv" else (outer, inner)
        yield TileConfig(block_m, block_n, warps, stages)


def row(which: str, use_tma: bool) -> dict[int, TileConfig]:
    """The table's row of a pass on the current device, by padded head_dim."""
    return tuning.TABLE[tuning.family(*current_target(), use_tma)][which]


def make_inputs(batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, do of normal noise."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, heads, length, head_dim)
    return tuple(torch.randn(shape, device="cuda", dtype=dtype, generator=generator) for _ in range(4))


def run_pass(which: str, inputs: Inputs, mask: anymask.BlockMask | None) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the pass. dq and dkdv come together: only one of them changes its config at a time."""
    q, k, v, do, o, lse = inputs
    scale = q.shape[3] ** -0.5
    if which == "fwd":
        return lambda: backend.forward(q, k, v, mask, scale)
    return lambda: backend.backward(q, k, v, o, lse, do, None, mask, scale, True)


def read_through_pointers() -> None:
    """Make the launchers take the path of inputs that the copy engine cannot read."""
    backend.can_use_tma = lambda *_: False


def compile_one(which: str, head_dim: int, dtype: torch.dtype, use_tma: bool, config: TileConfig) -> str | None:
    """Compile the kernels of `config` into Triton's cache; the reason if it does not fit the machine."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    if not use_tma:
        read_through_pointers()
    configs = row(which, use_tma)
    before, configs[max(64, head_dim)] = configs[max(64, head_dim)], config
    backend._options.cache_clear()
    q, k, v, do = make_inputs(2, 2, 256, head_dim, dtype)
    o, lse = torch.zeros_like(q), torch.zeros(q.shape[:3], device="cuda")
    try:
        for mask in (None, anymask.pack(torch.ones(256, 256, dtype=torch.bool, device="cuda"))):
            run_pass(which, (q, k, v, do, o, lse), mask)()
    except (OutOfResources, CompilationError) as error:
        return str(error).splitlines()[0]
    finally:
        # the next candidate may be one of another pass
        configs[max(64, head_dim)] = before
    return None


def is_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether a candidate's tensors are those of kernels that are known to be right; a NaN is not."""
    return all(
        float((a.float() - e.float()).norm()) <= TOLERANCE * float(e.float().norm())
        for a, e in zip(found, expected, strict=True)
    )


def masks(length: int) -> dict[str, Tensor | None]:
    """The masks timed: none, random 50 %, causal, causal documents of length / 8."""
    generator = torch.Generator("cuda").manual_seed(1)
    causal = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    ids = torch.arange(length, device="cuda") // (length // 8)
    return {
        "none": None,
        "random50": torch.rand(length, length, device="cuda", generator=generator) < 0.5,
        "causal": causal,
        "documents": causal & (ids[:, None] == ids[None, :]),
    }


def main() -> None:
    """Parse the options, compile, check, time, print."""
    from triton.testing import do_bench

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pass", dest="passes", choices=PASSES, action="append")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--shape", type=int, nargs=3, default=(2, 16, 8192), metavar=("BATCH", "HEADS", "LENGTH"))
    parser.add_argument("--pointers", action="store_true", help="tune for inputs that the copy engine cannot read")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--top", type=int, default=12)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    passes = args.passes or list(PASSES)
    jobs = [(which, config) for which in passes for config in candidates(which)]
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        work = [(which, args.head_dim, dtype, not args.pointers, config) for which, config in jobs]
        reasons = list(pool.map(compile_one, *zip(*work, strict=True)))
    if args.pointers:
        read_through_pointers()
    fits = [job for job, reason in zip(jobs, reasons, strict=True) if reason is None]
    print(f"{torch.cuda.get_device_name()}: {len(fits)} of {len(jobs)} candidates fit", flush=True)
    q, k, v, do = make_inputs(*args.shape, args.head_dim, dtype)
    packed = {n: None if m is None else anymask.pack(m) for n, m in masks(args.shape[2]).items()}
    for which in passes:
        configs = row(which, not args.pointers)
        default = configs[max(64, args.head_dim)]
        rows: list[tuple[list[float], TileConfig]] = []
        inputs = {n: (q, k, v, do, *backend.forward(q, k, v, m, args.head_dim**-0.5)) for n, m in packed.items()}
        expected = run_pass(which, inputs["random50"], packed["random50"])()
        for config in (c for w, c in fits if w == which):
            configs[max(64, args.head_dim)] = config
            backend._options.cache_clear()
            actual = run_pass(which, inputs["random50"], packed["random50"])()
            times = [do_bench(run_pass(which, inputs[n], m), 10, 50, return_mode="median") for n, m in packed.items()]
            rows.append((times if is_close(actual, expected) else [math.nan] * len(times), config))
        configs[max(64, args.head_dim)] = default
        backend._options.cache_clear()
        rows.sort(key=lambda entry: entry[0][1])
        print(f"{which} D{args.head_dim} {args.dtype} ms for {list(packed)}; default {default}")
        for times, config in rows[: args.top]:
            print("  ", *(f"{t:7.3f}" for t in times), config, flush=True)


if __name__ == "__main__":
    main()
