"""The rivals and ours: one small function each, from a problem to a call that is ready to be timed.

A provider that cannot do a problem raises `Unsupported` with the reason. What it prepares ahead of the call (a
packed mask, a block mask, compilation) is not in its time; `note` says how it was asked.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import anymask
from anymask import backends
from benchmarks.masks import MaskMod
from benchmarks.suites import Problem

OURS = "anymask:"
# longest mask, in tokens, of which FlexAttention lists the blocks without being compiled for it: 10 GiB
EAGER_LENGTH = 32768
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
    rule = problem.rule
    if problem.case.mask is None:
        return _flex(problem, None, "no mask")
    if rule is None:
        raise Unsupported("the mask has no closed form")
    return _flex(problem, rule, "closed-form mask_mod")


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
    # eager, it makes a tensor of all pairs
    long = problem.shape.length > EAGER_LENGTH
    block_mask = None if mask_mod is None else flex_mask_builder(problem, compiled=long)(mask_mod)
    call, mode = _flex_eager, "eager"
    if problem.compiled:
        # the timed backward keeps its graph, which donated buffers forbid
        functorch.donated_buffer = False
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


def fa4(problem: Problem) -> Prepared:
    """FlashAttention-4 (`flash_attn.cute`)."""
    _require_package("flash_attn.cute", "flash-attn-4")
    from benchmarks import fa4 as rival

    attend, note = rival.prepare(problem.q, problem.k, problem.v, problem.do, problem.mask)
    return Prepared(attend, note)


def flashinfer(problem: Problem) -> Prepared:
    """FlashInfer's prefill with a custom mask; it has no backward pass."""
    _require_package("flashinfer", "flashinfer-python")
    import flashinfer as rival

    s, mask, scale = problem.shape, problem.mask, problem.shape.head_dim**-0.5
    # one mask after the other, packed by `plan`
    masks = None if mask is None else mask.flatten().repeat(s.batch)
    wrapper = rival.BatchPrefillWithRaggedKVCacheWrapper(
        torch.empty(2**28, dtype=torch.uint8, device=problem.q.device), "NHD", backend="fa2"
    )
    offsets = torch.arange(s.batch + 1, dtype=torch.int32, device=problem.q.device) * s.length
    wrapper.plan(
        offsets,
        offsets.clone(),
        s.heads,
        s.kv_heads,
        s.head_dim,
        custom_mask=masks,
        sm_scale=scale,
        q_data_type=s.dtype,
        kv_data_type=s.dtype,
    )
    # its own order, [tokens, heads, head_dim], made ahead: it is how its users have it
    ragged = [t.detach().transpose(1, 2).flatten(0, 1).contiguous() for t in (problem.q, problem.k, problem.v)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = wrapper.run(*ragged)
        return out.view(s.batch, s.length, s.heads, s.head_dim).transpose(1, 2)

    return Prepared(attend, "mask packed and planned before" if mask is not None else "no mask", forward_only=True)


def xformers(problem: Problem) -> Prepared:
    """xformers' memory-efficient attention with the mask as an additive tensor."""
    _require_package("xformers", "xformers")
    if problem.grouped:
        raise Unsupported("its kernels with a bias have no grouped heads")
    from xformers.ops import fmha, memory_efficient_attention

    s, mask, bias = problem.shape, problem.mask, None
    if mask is not None:
        # rows of a multiple of 8 elements, as the kernel wants them
        storage = torch.zeros(s.length, -(-s.length // 8) * 8, dtype=s.dtype, device=mask.device)
        storage[:, : s.length].masked_fill_(~mask, -float("inf"))
        bias = storage[:, : s.length].expand(s.batch, s.heads, s.length, s.length)
    kernels = fmha.cutlass.FwOp, fmha.cutlass.BwOp

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        swapped = (t.transpose(1, 2) for t in (q, k, v))
        out: Tensor = memory_efficient_attention(*swapped, attn_bias=bias, op=kernels)
        return out.transpose(1, 2)

    return Prepared(attend, "no mask" if mask is None else "additive mask prepared before")


def earlier(problem: Problem) -> Prepared:
    """The kernels that this package began as, `fa2_custom_mask`, from the folder given with `--earlier`."""
    if problem.earlier is None:
        raise Unsupported("not asked for; --earlier names its folder")
    s, mask = problem.shape, problem.mask
    if s.dtype != torch.float16 or s.length % 128 or problem.grouped or s.head_dim not in (32, 64, 128, 256):
        raise Unsupported(
            "fp16, lengths of a multiple of 128, head_dim 32 to 256 in powers of two and equal heads only"
        )
    module = _load_earlier(Path(problem.earlier))
    planes = None if mask is None else mask.expand(s.batch, s.heads, s.length, s.length)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module.flash_attention_custom_mask(q, k, v, planes, s.head_dim**-0.5)
        return out

    return Prepared(attend, "bool mask" if mask is not None else "no mask")


@functools.cache
def _load_earlier(folder: Path) -> ModuleType:
    """The package in `folder`, beside our module of the same name: its files import each other by that name."""
    name, package = "fa2_custom_mask", folder / "fa2_custom_mask"
    if not (package / "__init__.py").is_file():
        raise Unsupported(f"there is no {name}/__init__.py in the folder of --earlier")
    mine = {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] == name}
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for n in [n for n in sys.modules if n.partition(".")[0] == name]:
            del sys.modules[n]
        sys.modules.update(mine)
    return module


def _require_package(module: str, package: str) -> None:
    """Raise Unsupported if a rival is not installed; one that is, and breaks, fails aloud."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise Unsupported(f"{package} is not installed")


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
    "fa4": fa4,
    "flashinfer": flashinfer,
    "xformers": xformers,
    "earlier": earlier,
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
