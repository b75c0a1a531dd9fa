"""The rivals and ours: one small function each, from a problem to a call that is ready to be timed.

A provider that cannot do a problem raises `Unsupported` with the reason. What it prepares ahead of the call (a
packed mask, a block mask, compilation) is not in its time; `note` says how it was asked.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import anymask
from anymask import backends
from benchmarks.masks import MaskMod
from benchmarks.suites import Problem

OURS = "anymask:"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unsupported(Exception):
    """The provider cannot do this problem; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """`attend(q, k, v) -> o`, differentiable, and how it was set up."""

    attend: Attend
    note: str
    # it computes without the mask: what the same shape costs at best, checked against attention without a mask
    unmasked: bool = False
    # it has no backward pass
    forward_only: bool = False


def find(name: str) -> Callable[[Problem], Prepared]:
    """The provider called `name`; `anymask:<backend>` is ours, with `:deterministic` gradients if its name ends so."""
    if name.startswith(OURS):
        backend, _, rest = name.removeprefix(OURS).partition(":")
        return functools.partial(ours, backend=backend, deterministic=rest == "deterministic")
    return PROVIDERS[name]


def ours(problem: Problem, backend: str, deterministic: bool = False) -> Prepared:
    """`anymask.attention` by a named backend, the dense mask packed once."""
    reason = backends.load(backend).why_not(problem.q, problem.k, problem.v, problem.block_mask)
    if reason is not None:
        raise Unsupported(reason)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anymask.attention(q, k, v, problem.block_mask, backend=backend, deterministic=deterministic)

    note = "dense mask packed once" if problem.mask is not None else "no mask"
    return Prepared(attend, f"{note}, deterministic gradients" if deterministic else note)


def flex(problem: Problem) -> Prepared:
    """FlexAttention, compiled, with a closed-form mask function."""
    kind = problem.case.mask
    if kind is None:
        return _flex(problem, None, "no mask")
    if kind.rule is None:
        raise Unsupported("the mask has no closed form")
    return _flex(problem, kind.rule(problem.shape.length, problem.q.device.type), "closed-form mask_mod")


def flex_dense(problem: Problem) -> Prepared:
    """FlexAttention, compiled, with a mask function that reads the dense tensor."""
    return _flex(problem, captured(_mask(problem)), "mask_mod reads the dense tensor")


def captured(mask: Tensor) -> MaskMod:
    """A `mask_mod` that looks up a bool `[length, length]` tensor."""
    return lambda b, h, i, j: mask[i, j]


def flex_mask_builder(problem: Problem, compiled: bool) -> Callable[[MaskMod], FlexBlockMask]:
    """From a mask function to FlexAttention's block mask, shared by all batches and heads."""
    build = torch.compile(create_block_mask) if compiled else create_block_mask
    length, device = problem.shape.length, problem.q.device.type
    return lambda mask_mod: build(mask_mod, None, None, length, length, device=device)


def _flex(problem: Problem, mask_mod: MaskMod | None, note: str) -> Prepared:
    block_mask = None if mask_mod is None else flex_mask_builder(problem, compiled=False)(mask_mod)
    call, mode = _flex_eager, "eager"
    if problem.compiled:
        # the timed backward keeps its graph, which donated buffers forbid
        torch._functorch.config.donated_buffer = False
        options = "max-autotune-no-cudagraphs" if problem.max_autotune else "default"
        # fullgraph: an error rather than a silent return to the eager, dense form
        call = torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=options)
        mode = f"torch.compile, {options} mode"
    attend = functools.partial(call, block_mask=block_mask, enable_gqa=problem.grouped)
    # eager FlexAttention has a backward pass on GPUs only
    return Prepared(attend, f"{note}; {mode}", forward_only=problem.q.device.type == "cpu")


def _flex_eager(*args: Any, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        # that it is slow is what is measured
        warnings.filterwarnings("ignore", "flex_attention called without")
        return flex_attention(*args, **options)


def sdpa(problem: Problem) -> Prepared:
    """SDPA with whatever backend torch chooses."""
    return _sdpa(problem, None)


def cudnn(problem: Problem) -> Prepared:
    """SDPA, cuDNN backend."""
    return _sdpa(problem, SDPBackend.CUDNN_ATTENTION)


def cudnn_unmasked(problem: Problem) -> Prepared:
    """SDPA, cuDNN backend, without the mask of the case."""
    return replace(
        _sdpa(replace(problem, mask=None), SDPBackend.CUDNN_ATTENTION), note="the mask left out", unmasked=True
    )


def efficient(problem: Problem) -> Prepared:
    """SDPA, memory-efficient backend."""
    return _sdpa(problem, SDPBackend.EFFICIENT_ATTENTION)


def flash(problem: Problem) -> Prepared:
    """SDPA, FlashAttention backend."""
    if problem.mask is not None:
        raise Unsupported("the flash backend takes no mask tensor")
    return _sdpa(problem, SDPBackend.FLASH_ATTENTION)


def cudnn_bias(problem: Problem) -> Prepared:
    """SDPA, cuDNN backend, the mask given as the additive tensor that SDPA would make of it in each call."""
    mask = _mask(problem)
    bias = torch.zeros(mask.shape, dtype=problem.q.dtype, device=mask.device).masked_fill_(~mask, -float("inf"))
    return _sdpa(problem, SDPBackend.CUDNN_ATTENTION, bias, "additive mask prepared before")


def cudnn_causal(problem: Problem) -> Prepared:
    """SDPA, cuDNN backend, built-in causal mask."""
    return _sdpa_causal(problem, SDPBackend.CUDNN_ATTENTION)


def flash_causal(problem: Problem) -> Prepared:
    """SDPA, FlashAttention backend, built-in causal mask."""
    return _sdpa_causal(problem, SDPBackend.FLASH_ATTENTION)


def _sdpa(problem: Problem, kernel: SDPBackend | None, mask: Tensor | None = None, note: str = "bool mask") -> Prepared:
    mask = problem.mask if mask is None else mask
    planes = None if mask is None else mask[None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kernel is None:
            return scaled_dot_product_attention(q, k, v, planes, enable_gqa=problem.grouped)
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v, planes, enable_gqa=problem.grouped)

    return Prepared(attend, note if planes is not None else "no mask")


def _sdpa_causal(problem: Problem, kernel: SDPBackend) -> Prepared:
    _require_causal(problem)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=problem.grouped)

    return Prepared(attend, "is_causal=True")


def _require_causal(problem: Problem) -> None:
    if problem.case.mask is None or problem.case.mask.name != "causal":
        raise Unsupported("only the causal mask is built in")


def _mask(problem: Problem) -> Tensor:
    if problem.mask is None:
        raise Unsupported("there is no mask")
    return problem.mask


PROVIDERS: dict[str, Callable[[Problem], Prepared]] = {
    "flex": flex,
    "flex-dense": flex_dense,
    "sdpa": sdpa,
    "cudnn": cudnn,
    "cudnn-bias": cudnn_bias,
    "cudnn-unmasked": cudnn_unmasked,
    "cudnn-causal": cudnn_causal,
    "efficient": efficient,
    "flash": flash,
    "flash-causal": flash_causal,
}


def failures() -> tuple[type[BaseException], ...]:
    """What a provider may raise and the run survives, as a row that shows it."""
    known: tuple[type[BaseException], ...] = (
        # out of memory, CUDA, torch.compile and "not implemented" are all RuntimeErrors
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ImportError,
        AssertionError,
        Unsupported,
    )
    try:
        from triton.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)
