"""What is measured: shapes, masks, and which provider runs which mask.

Every mask is written twice, independently: as a dense tensor (what anymask and SDPA get, and what the fp64 reference
reads) and, where it has one, as a closed-form `mask_mod` for FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import anymask
from anymask import BlockMask, Mask, backends
from benchmarks.figures import Figure, build_figures, cpu_figures, gpu_figures, hopper_figures

GPU_BACKENDS = tuple(name for name in backends.NAMES if name not in ("cpu", "reference"))
PASSES = ("forward", "backward")

# (batch, head, query, key) index tensors -> bool, as FlexAttention takes it
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of q, k and v, all `[batch, heads, length, head_dim]`."""

    batch: int
    heads: int
    length: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} B{self.batch} H{self.heads} L{self.length} D{self.head_dim}"


@dataclass(frozen=True)
class Case:
    """One mask and the providers that run it."""

    name: str
    # (length in tokens, generator) -> bool [length, length]; None is no mask
    dense: Callable[[int, torch.Generator], Tensor] | None
    # None: the mask has no closed form
    closed_form: MaskMod | None
    # names for `providers.find`, without ours
    rivals: tuple[str, ...]
    # (length in tokens, device) -> the mask by name, where it has one
    symbolic: Callable[[int, str], Mask] | None = None


@dataclass(frozen=True)
class Suite:
    """Cases at one shape, on one kind of device."""

    name: str
    shape: Shape
    cases: tuple[Case, ...]
    # of "forward", "backward", "both"; none if only masks are built
    passes: tuple[str, ...]
    # names for `providers.find`, without the prefix of ours; the figures are about the first
    ours: tuple[str, ...]
    # what is promised at `figure_length` tokens
    figures: Callable[[], list[Figure]]
    figure_length: int
    # CPU only: the provider whose time is 1; times on a GPU are in ms
    baseline: str | None = None
    # whether building the masks is measured too
    packs: bool = True


@dataclass(frozen=True)
class Problem:
    """The tensors of one case. Inputs are standard normal; q, k, v require gradients."""

    case: Case
    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    # bool [length, length]; None is no mask
    mask: Tensor | None
    # the mask packed by anymask, None without a mask
    block_mask: BlockMask | None
    # torch.compile the rivals that are meant to be compiled
    compiled: bool
    # let rivals search for their launch options
    max_autotune: bool

    @property
    def pairs(self) -> int:
        """Attended pairs over all batches and heads, counted in the mask."""
        plane = self.shape.length**2 if self.mask is None else int(self.mask.sum())
        return plane * self.shape.batch * self.shape.heads

    @property
    def tile_pairs(self) -> int:
        """Pairs in the tiles that are not empty, over all batches and heads."""
        if self.block_mask is None:
            return self.pairs
        _, partial, full = self.block_mask.tile_counts
        return (partial + full) * 128 * 128 * self.shape.batch * self.shape.heads


def make_problem(suite: Suite, case: Case, device: str, seed: int, max_autotune: bool = False) -> Problem:
    """The inputs of `case`, the same for the same seed, device and shape."""
    generator = torch.Generator(device).manual_seed(seed)
    s = suite.shape
    size = (s.batch, s.heads, s.length, s.head_dim)
    q, k, v, do = (torch.randn(size, generator=generator, device=device, dtype=s.dtype) for _ in range(4))
    for t in (q, k, v):
        t.requires_grad_()
    mask = None if case.dense is None else case.dense(s.length, generator)
    block_mask = None if mask is None else anymask.pack(mask)
    return Problem(case, s, q, k, v, do, mask, block_mask, device == "cuda", max_autotune)


def random(share: float, rivals: tuple[str, ...]) -> Case:
    """Each pair attends with probability `share`."""

    def dense(length: int, generator: torch.Generator) -> Tensor:
        return torch.rand(length, length, generator=generator, device=generator.device) < share

    return Case(f"random{share:.0%}".rstrip("%"), dense, None, rivals)


def causal(rivals: tuple[str, ...]) -> Case:
    """Query i sees keys j <= i."""

    def dense(length: int, generator: torch.Generator) -> Tensor:
        return _ones(length, generator).tril()

    return Case("causal", dense, lambda b, h, i, j: i >= j, rivals, lambda length, device: anymask.causal())


def window(size: int, rivals: tuple[str, ...]) -> Case:
    """Query i sees keys `i - size <= j <= i`."""

    def dense(length: int, generator: torch.Generator) -> Tensor:
        return _ones(length, generator).tril().triu(-size)

    def symbolic(length: int, device: str) -> Mask:
        return anymask.sliding_window(size)

    return Case(f"window{size}", dense, lambda b, h, i, j: (i >= j) & (i - j <= size), rivals, symbolic)


def documents(count: int, length: int, rivals: tuple[str, ...]) -> Case:
    """`count` causal documents of `length // count` tokens; what is left over belongs to one more."""
    size = length // count

    def dense(length: int, generator: torch.Generator) -> Tensor:
        ids = torch.arange(length, device=generator.device).div(size, rounding_mode="floor")
        return (ids[:, None] == ids[None, :]).tril()

    def closed_form(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i // size == j // size)

    def symbolic(length: int, device: str) -> Mask:
        return anymask.causal() & anymask.document(torch.arange(length, device=device) // size)

    return Case(f"documents{count}_causal", dense, closed_form, rivals, symbolic)


def _ones(length: int, generator: torch.Generator) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=generator.device)


def quick_gpu() -> Suite:
    """The figures stated for a GPU; the most important masks first, in case time runs out."""
    shape = Shape(2, 16, 8192, 128, torch.float16)
    with_mask = ("flex", "flex-dense", "cudnn", "cudnn-bias", "efficient")
    cases = (
        random(0.5, with_mask),
        causal((*with_mask, "cudnn-causal", "flash-causal")),
        window(1024, with_mask),
        documents(8, shape.length, with_mask),
        Case("none", None, None, ("flex", "cudnn", "flash", "efficient")),
    )
    return Suite("quick", shape, cases, PASSES, GPU_BACKENDS, gpu_figures, shape.length)


def hopper(name: str, shape: Shape) -> Suite:
    """Against cuDNN without any mask, its own causal one, and FlexAttention: what the Hopper kernels are judged by."""
    cases = [Case("none", None, None, ("cudnn",))]
    if shape.length >= 8192:
        cases += [
            random(0.5, ("cudnn-unmasked",)),
            causal(("cudnn-causal",)),
            window(1024, ("flex",)),
            documents(8, shape.length, ("flex",)),
        ]
    ours = ("hopper", "hopper:deterministic")
    return Suite(name, shape, tuple(cases), PASSES, ours, partial(hopper_figures, name), shape.length, packs=False)


def build_gpu() -> Suite:
    """Building masks, against FlexAttention and against a copy of the dense tensor; no attention is computed."""
    shape = Shape(1, 1, 32768, 64, torch.float16)
    cases = (documents(8, shape.length, ()), causal(()), random(0.5, ()))
    return Suite("build", shape, cases, (), ("triton",), build_figures, shape.length)


GPU_SUITES: dict[str, Callable[[], Suite]] = {
    "quick": quick_gpu,
    "build": build_gpu,
    "hopper-d128": partial(hopper, "hopper-d128", Shape(2, 16, 8192, 128, torch.float16)),
    "hopper-d64": partial(hopper, "hopper-d64", Shape(2, 32, 8192, 64, torch.float16)),
    "hopper-short": partial(hopper, "hopper-short", Shape(16, 16, 1024, 128, torch.float16)),
}


def quick_cpu() -> Suite:
    """The figures stated for a CPU."""
    shape = Shape(1, 8, 2048, 64, torch.float32)
    cases = (random(0.5, ("sdpa",)), documents(8, shape.length, ("sdpa",)))
    return Suite("quick", shape, cases, (*PASSES, "both"), ("cpu",), cpu_figures, shape.length, baseline="sdpa")


def resized(suite: Suite, length: int) -> Suite:
    """The suite at another length in tokens. Its figures are then not measured; windows keep their size."""
    cases = tuple(documents(8, length, c.rivals) if c.name.startswith("documents") else c for c in suite.cases)
    return replace(suite, shape=replace(suite.shape, length=length), cases=cases)
