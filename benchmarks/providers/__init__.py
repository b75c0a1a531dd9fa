"""The baselines and ours, a file each: from the inputs of a case to a call that is ready to be timed.

A provider that cannot take them raises `Unsupported` with the reason. What it prepares ahead of the call (a packed
mask, a block mask, compilation) is not in its time; `note` says how it was asked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor

from benchmarks.cases import Inputs
from benchmarks.check import Errors
from benchmarks.models import Batch, Training

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unsupported(Exception):
    """The provider cannot take this case; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A way to attend, to build the mask, or to train a model, and how it was set up."""

    # differentiable; None if the provider does something else
    attend: Attend | None
    note: str
    # it computes without the mask, and is checked against attention without it
    unmasked: bool = False
    # it has no backward pass
    forward_only: bool = False
    # ways to build the mask, each from memory of its own where it is read
    builds: tuple[Callable[[], object], ...] = ()
    training: Training | None = None
    # how far its result is from fp64, once that is known
    errors: Errors = field(default_factory=Errors)


# name, and a variant of it after ":" -> its file and function, the name of a reader, its colour
PROVIDERS: dict[str, tuple[str, str, str]] = {
    "anymask": ("ours.attention", "anymask", "#d1495b"),
    "pack": ("ours.pack", "anymask, from a bool tensor", "#d1495b"),
    "pack:named": ("ours.pack", "anymask, by name", "#8f2d3c"),
    "pack:function": ("ours.pack", "anymask, from a function", "#e8935c"),
    "anymask:triton": ("ours.attention", "anymask, portable kernels", "#e8935c"),
    "anymask:deterministic": ("ours.attention", "anymask, deterministic", "#8f2d3c"),
    "anymask:dense": ("ours.attention", "anymask, bool tensor seen before", "#e8935c"),
    "anymask:view": ("ours.attention", "anymask, view made anew", "#8f2d3c"),
    "anymask:plain": ("ours.attention", "anymask, mask and scores left out", "#e8935c"),
    "anymask:layer": ("ours.layer", "anymask, in a layer of transformers", "#e8935c"),
    "anymask:model": ("models.train", "anymask", "#d1495b"),
    "sdpa:model": ("models.train", "sdpa", "#6aa56a"),
    "flex:model": ("models.train", "flex_attention", "#5b8db8"),
    "copy": ("ours.copy", "a copy of the tensor", "#999999"),
    "flex": ("flex.attention", "FlexAttention, compiled", "#5b8db8"),
    "flex:dense": ("flex.attention", "FlexAttention, compiled, reads the tensor", "#a9c7de"),
    "flex:build": ("flex.build", "FlexAttention, compiled", "#5b8db8"),
    "flex:build-eager": ("flex.build", "FlexAttention, eager", "#a9c7de"),
    "flex:build-dense": ("flex.build", "FlexAttention, compiled, reads the tensor", "#a9c7de"),
    "sdpa": ("sdpa.attention", "SDPA with the mask", "#6aa56a"),
    "math": ("sdpa.attention", "SDPA, math kernel", "#d9c9e3"),
    "efficient": ("sdpa.attention", "SDPA, efficient kernel", "#b9a3cc"),
    "flash": ("sdpa.attention", "SDPA, flash kernel", "#c9b458"),
    "flash:causal": ("sdpa.attention", "SDPA, flash kernel, causal built in", "#c9b458"),
    "flash:unmasked": ("sdpa.attention", "SDPA, flash kernel, mask left out", "#c9b458"),
    "cudnn": ("sdpa.attention", "cuDNN with the mask", "#6aa56a"),
    "cudnn:bias": ("sdpa.attention", "cuDNN, mask as a bias made before", "#a6cfa6"),
    "cudnn:causal": ("sdpa.attention", "cuDNN, causal built in", "#2f6b2f"),
    "cudnn:unmasked": ("sdpa.attention", "cuDNN without the mask", "#2f6b2f"),
    "fa4": ("fa4.attention", "FlashAttention-4", "#4a4a4a"),
    "earlier": ("earlier.attention", "flashattention2-custom-mask", "#a58a6f"),
}


def prepare(name: str, inputs: Inputs | Batch) -> Prepared:
    """The provider called `name`, ready for the inputs."""
    module, _, function = PROVIDERS[name][0].partition(".")
    base, _, variant = name.partition(":")
    if base == "fa4" and importlib.util.find_spec("flash_attn") is None:
        raise Unsupported("flash-attn-4 is not installed")
    made: Prepared = getattr(import_module(f"benchmarks.providers.{module}"), function)(inputs, base, variant)
    return made


def is_ours(name: str) -> bool:
    """Whether a provider runs this project's code."""
    return name.partition(":")[0] in ("anymask", "pack")


def compiled(inputs: Inputs, attend: Attend) -> Attend:
    """The call as the mode of the case has it."""
    mode = inputs.case.mode
    return attend if mode == "eager" else torch.compile(attend, dynamic=False, fullgraph=True, mode=mode)


def mask_of(inputs: Inputs) -> Tensor:
    """The dense mask, or Unsupported."""
    if inputs.mask is None:
        raise Unsupported("there is no mask")
    return inputs.mask


def failures() -> tuple[type[BaseException], ...]:
    """What a provider may raise and the run survives, as a row that shows it."""
    # out of memory, CUDA, torch.compile and "not implemented" are all RuntimeErrors
    known = RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError
    try:
        from triton.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)
