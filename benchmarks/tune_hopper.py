"""Times launch options of the Hopper kernels in turns with cuDNN: the source of `backends/hopper/tuning.py`.

    python -m benchmarks.tune_hopper --head-dim 128

Each candidate is first checked against the portable kernels on the same inputs. Ratios are to cuDNN without a mask, for
the causal mask to cuDNN's own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import anymask
from anymask.backends import hopper
from anymask.backends import triton as triton_backend
from anymask.backends.hopper import tuning
from anymask.backends.hopper.tuning import ForwardConfig
from benchmarks import timing
from benchmarks.tune import is_close, make_inputs, masks

# shared memory that a program may have, without its barriers
SHARED_BYTES = 226 * 1024
Outputs = tuple[Tensor, ...]


def forward_candidates(head_dim: int) -> Iterator[ForwardConfig]:
    """What fits: for each pair of warpgroups, stages of k and v, and 128 rows of q and o, in 16 bits."""
    # two pairs have registers for 64 keys a step and 64 columns of o
    shapes = ((64, 2), (128, 1)) if head_dim == 64 else ((64, 1), (128, 1))
    for (block_n, pairs), stages, q_stages, persistent in itertools.product(shapes, (2, 3, 4), (1, 2), (False, True)):
        if pairs * head_dim * 2 * (2 * stages * block_n + (q_stages + 1) * 128) <= SHARED_BYTES:
            yield ForwardConfig(block_n, pairs, stages, q_stages, (persistent, persistent))


def forwards(args: Outputs, mask: anymask.BlockMask | None) -> dict[str, Callable[[], Outputs]]:
    """A call for each candidate."""
    q, k, v, *_ = args
    head_dim = q.shape[3]

    def call(config: ForwardConfig) -> Outputs:
        tuning.FORWARD[head_dim] = config
        return hopper.forward(q, k, v, mask, head_dim**-0.5)

    return {str(c): partial(call, c) for c in forward_candidates(head_dim)}


def backwards(args: Outputs, mask: anymask.BlockMask | None) -> dict[str, Callable[[], Outputs]]:
    """A call for each candidate, and the deterministic variant."""
    q, k, v, do, o, lse = args
    head_dim = q.shape[3]

    def call(block_m: int, deterministic: bool = False) -> Outputs:
        tuning.BLOCK_M[head_dim] = block_m
        return hopper.backward(q, k, v, o, lse, do, None, mask, head_dim**-0.5, deterministic)

    # 128 queries of 128 dimensions do not fit the registers
    steps = (64, 128) if head_dim == 64 else (64,)
    calls = {f"BLOCK_M={m}": partial(call, m) for m in steps}
    return calls | {"deterministic": partial(call, steps[-1], deterministic=True)}


def cudnn(args: Outputs, is_causal: bool) -> tuple[Callable[[], Outputs], Callable[[], Outputs]]:
    """cuDNN's forward and backward calls."""
    q, k, v = (t.detach().requires_grad_() for t in args[:3])

    def attend() -> Outputs:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return (scaled_dot_product_attention(q, k, v, is_causal=is_causal),)

    (out,) = attend()
    return attend, lambda: torch.autograd.grad(out, (q, k, v), args[3], retain_graph=True)


def main() -> None:
    """Parse the options, check, time in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, choices=(64, 128), default=128)
    parser.add_argument("--shape", type=int, nargs=3, default=(2, 16, 8192), metavar=("BATCH", "HEADS", "LENGTH"))
    options = parser.parse_args()
    q, k, v, do = make_inputs(*options.shape, options.head_dim, torch.float16)
    scale = options.head_dim**-0.5
    lines = [f"{torch.cuda.get_device_name()}, {options.shape}, D{options.head_dim}, fp16: parts of cuDNN's time"]
    for name, dense in track(masks(options.shape[2]).items(), "masks"):
        mask = None if dense is None else anymask.pack(dense)
        o, lse = triton_backend.forward(q, k, v, mask, scale)
        args = q, k, v, do, o, lse
        expected = triton_backend.backward(q, k, v, o, lse, do, None, mask, scale, True)
        attend, differentiate = cudnn(args, name == "causal")
        for step, calls, baseline, right in (
            ("forward", forwards(args, mask), attend, (o, lse)),
            ("backward", backwards(args, mask), differentiate, expected),
        ):
            kept = {n: call for n, call in calls.items() if is_close(call(), right)}
            times = timing.cuda_ms({"cuDNN": baseline} | kept, 5, 40.0)
            lines += [f"{step}, {name}: cuDNN {times['cuDNN'].median:.3f} ms"]
            lines += [f"  wrong: {n}" for n in calls if n not in kept]
            ranked = sorted(kept, key=lambda n: times[n].median)
            lines += [f"  {times[n].median / times['cuDNN'].median:.3f} {n}" for n in ranked]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
