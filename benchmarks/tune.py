"""Times launch options of the kernels and prints them fastest first: the source of the `tuning.py` tables.

    python -m benchmarks.tune --kernels triton --pass fwd --head-dim 128
    python -m benchmarks.tune --kernels hopper --head-dim 128

Each candidate is first checked against the table's own options on the same inputs. Candidates of the portable kernels
are compiled in parallel processes, so that the timed process finds them in Triton's cache.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

import anymask
from anymask import backends
from anymask.backends.gpu.arguments import TileConfig
from anymask.backends.gpu.target import current_target
from benchmarks import masks, timing
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.masks import Shape
from benchmarks.providers import failures
from benchmarks.results import reason

# norm of an error, in parts of that of the result
TOLERANCE = 2e-3
# shared memory that a program may have, without its barriers
SHARED_BYTES = 226 * 1024
PROCESSES, TOP = 8, 12
Options = tuple[Any, ...]


def use_triton(which: str, head_dim: int, options: Options | None, pointers: bool) -> None:
    """Make the portable kernels launch pass `which` with `TileConfig(*options)`; None leaves the table as it is."""
    triton = backends.load("triton")
    if pointers:
        # the path of inputs that the copy engine cannot read
        triton.can_use_tma = lambda *_: False  # type: ignore[attr-defined]
    if options is not None:
        family = triton.tuning.family(*current_target(), not pointers)
        triton.tuning.TABLE[family][which][max(64, head_dim)] = TileConfig(*options)
    triton._options.cache_clear()


def use_hopper(which: str, head_dim: int, options: Options | None) -> None:
    """Make the Hopper kernels launch a pass with these options; None leaves the table as it is."""
    tuning = backends.load("hopper").tuning
    if options is not None and which == "fwd":
        tuning.FORWARD[head_dim] = tuning.ForwardConfig(*options)
    elif options is not None:
        tuning.SCORES_AHEAD[head_dim] = options[0]


def triton_candidates(which: str) -> Iterator[Options]:
    """Queries and keys of a step, warps, stages."""
    for outer, inner, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        if warps == 4 or outer * inner >= 64 * 64:
            # dkdv holds keys and steps over queries
            yield (inner, outer, warps, stages) if which == "dkdv" else (outer, inner, warps, stages)


def hopper_candidates(which: str, head_dim: int) -> Iterator[Options]:
    """What fits: keys of a step, pairs of groups, stages of k and v, and of q, persistence; or scores ahead."""
    if which != "fwd":
        yield from ((False,), (True,))
        return
    # two pairs have registers for 64 keys a step and 64 columns of o
    shapes = ((64, 2), (128, 1)) if head_dim == 64 else ((64, 1), (128, 1))
    for (block_n, pairs), stages, q_stages, persistent in itertools.product(shapes, (2, 3, 4), (1, 2), (False, True)):
        if pairs * head_dim * 2 * (2 * stages * block_n + (q_stages + 1) * 128) <= SHARED_BYTES:
            yield block_n, pairs, stages, q_stages, (persistent, persistent)


def run_pass(kernels: str, which: str, p: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the pass by the backend itself. dq and dkdv come together: one of them changes its options."""
    backend, scale = backends.load(kernels), p.case.shape.head_dim**-0.5
    q, k, v, mask = p.q.detach(), p.k.detach(), p.v.detach(), p.block_mask
    if which == "fwd":
        return lambda: backend.forward(q, k, v, mask, scale)
    o, lse = anymask.attention(q, k, v, mask, return_lse=True)
    return lambda: backend.backward(q, k, v, o, lse, p.do, None, mask, scale, kernels == "triton")


def all_inputs(a: argparse.Namespace, shape: Sequence[int]) -> dict[str, Inputs]:
    """What is timed: no mask, random bits, causal, documents."""
    sizes = Shape(*shape, a.head_dim, getattr(torch, a.dtype))
    kinds = {"none": None} | {kind.name: kind for kind in (masks.RANDOM, masks.CAUSAL, masks.documents(8))}
    return {name: make_inputs(Case(name, sizes, kind, ()), "cuda") for name, kind in kinds.items()}


def compile_one(a: argparse.Namespace, options: Options) -> str | None:
    """Compile the portable kernels of these options into Triton's cache; the reason if they do not fit the machine."""
    use_triton(a.which, a.head_dim, options, a.pointers)
    try:
        for p in list(all_inputs(a, (2, 2, 256)).values())[:2]:
            run_pass("triton", a.which, p)()
    except failures() as error:
        return reason(error)
    return None


def is_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether a candidate's tensors are those of options that are known to be right; a NaN is not."""
    pairs = ((a.float(), e.float()) for a, e in zip(found, expected, strict=True))
    return all(float((a - e).norm()) <= TOLERANCE * float(e.norm()) for a, e in pairs)


def main() -> None:
    """Compile, check against the table's own options, time in turns with them, print."""
    p = argparse.ArgumentParser("python -m benchmarks.tune", description=__doc__.splitlines()[0])
    p.add_argument("--kernels", choices=("triton", "hopper"), required=True)
    p.add_argument("--pass", dest="which", choices=("fwd", "dq", "dkdv", "bwd"), default="fwd", help="bwd is hopper's")
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    p.add_argument("--shape", type=int, nargs=3, default=(2, 16, 8192), metavar=("BATCH", "HEADS", "LENGTH"))
    p.add_argument("--pointers", action="store_true", help="for inputs that the copy engine cannot read")
    a = p.parse_args()
    if a.kernels == "triton":
        use, every = partial(use_triton, a.which, a.head_dim, pointers=a.pointers), list(triton_candidates(a.which))
        use(options=None)
        with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
            reasons = dict(zip(every, pool.map(partial(compile_one, a), every), strict=True))
        print("\n".join(f"does not fit: {options}: {why}" for options, why in reasons.items() if why), flush=True)
        fits = [options for options in every if reasons[options] is None]
    else:
        use, fits = partial(use_hopper, a.which, a.head_dim), list(hopper_candidates(a.which, a.head_dim))
    print(f"{torch.cuda.get_device_name()}, D{a.head_dim} {a.dtype}, {a.which}: {len(fits)} candidates", flush=True)

    def with_options(options: Options, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        use(options=options)
        return call()

    calls = {name: run_pass(a.kernels, a.which, p) for name, p in all_inputs(a, a.shape).items()}
    # before a candidate has replaced the table's own options
    expected = {name: call() for name, call in calls.items()}
    for name, call in calls.items():
        tried = {str(options): partial(with_options, options, call) for options in fits}
        right = {n: c for n, c in tried.items() if is_close(c(), expected[name])}
        times = timing.cuda_ms(right, 3, 30.0)
        lines = [f"  {times[n].median:8.3f} {n}" for n in sorted(right, key=lambda n: times[n].median)[:TOP]]
        print("\n".join([f"{name}, ms:", *lines, *(f"  wrong: {n}" for n in tried if n not in right)]), flush=True)


if __name__ == "__main__":
    main()
