"""What is measured: which masks, at which shapes, by which providers, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import anymask
from anymask import BlockMask, backends
from benchmarks import masks
from benchmarks.figures import (
    Figure,
    build_figures,
    cpu_figures,
    density_figures,
    gpu_figures,
    hopper_figures,
)
from benchmarks.masks import MaskKind, MaskMod

GPU_BACKENDS = tuple(name for name in backends.NAMES if name not in ("cpu", "reference"))
PASSES = ("forward", "backward")
# longest mask, in tokens, that is made as a tensor: 16 GiB
DENSE_LENGTH = 131072
# shares of the tiles that are not empty, in the suite of that name
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Shape:
    """Sizes of q `[batch, heads, length, head_dim]`, and of k and v, which have `kv_heads`."""

    batch: int
    heads: int
    length: int
    head_dim: int
    dtype: torch.dtype
    # 0: as many as `heads`
    kv_heads: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)

    def __str__(self) -> str:
        return summary([self])


def summary(shapes: list[Shape]) -> str:
    """`float16 B2 H16:4 L256..8192 D128`: each size, or from the least to the most."""

    def span(name: str) -> str:
        found = [getattr(shape, name) for shape in shapes]
        return str(found[0]) if len(set(found)) == 1 else f"{min(found)}..{max(found)}"

    dtypes = dict.fromkeys(str(shape.dtype).removeprefix("torch.") for shape in shapes)
    heads = span("heads") + ("" if all(s.heads == s.kv_heads for s in shapes) else f":{span('kv_heads')}")
    return f"{'/'.join(dtypes)} B{span('batch')} H{heads} L{span('length')} D{span('head_dim')}"


@dataclass(frozen=True)
class Case:
    """One mask at one shape, and who runs it."""

    name: str
    shape: Shape
    # None is no mask
    mask: MaskKind | None
    # names for `providers.find`, without ours
    rivals: tuple[str, ...]
    # where it stands in a picture of curves: the title of its panel, and its place along x
    panel: str = ""
    x: float = 0.0


@dataclass(frozen=True)
class Curves:
    """Pictures in which every provider is a line."""

    x: str
    # value of a row -> what it is, with its unit
    y: dict[str, str]
    # x and y in powers of two and of ten
    log_x: bool = True
    log_y: bool = False


@dataclass(frozen=True)
class Suite:
    """Cases on one kind of device."""

    name: str
    cases: tuple[Case, ...]
    # of "forward", "backward", "both"; none if only masks are built
    passes: tuple[str, ...]
    # names for `providers.find`, without the prefix of ours; the figures are about the first
    ours: tuple[str, ...]
    # what is promised
    figures: Callable[[], list[Figure]] = field(default=lambda: [])
    # whether this is the suite that promises it, and not one at another length
    judged: bool = True
    # CPU only: the provider whose time is 1; times on a GPU are in ms
    baseline: str | None = None
    # whether building the masks is measured too
    packs: bool = False
    # None: a bar for every case and provider
    curves: Curves | None = None
    # whether the host's time of a call is measured too
    host: bool = False
    # of the clock: how often providers take turns, and for how many ms each
    rounds: int = 5
    block_ms: float = 40.0

    @property
    def shape(self) -> str:
        """Sizes of all cases."""
        return summary([case.shape for case in self.cases])


@dataclass(frozen=True)
class Problem:
    """The tensors of one case. Inputs are standard normal; q, k, v require gradients."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    # bool [length, length]; None is no mask, or one too long for a tensor, which is only built
    mask: Tensor | None
    # the mask packed by anymask, None without a mask
    block_mask: BlockMask | None
    # torch.compile the rivals that are meant to be compiled
    compiled: bool
    # let rivals search for their launch options
    max_autotune: bool
    # folder of the earlier package's module, for its provider
    earlier: str | None = None

    @property
    def shape(self) -> Shape:
        """Sizes of q, k and v."""
        return self.case.shape

    @property
    def rule(self) -> MaskMod | None:
        """The closed form of the mask, if it has one."""
        kind = self.case.mask
        if kind is None or kind.rule is None:
            return None
        return kind.rule(self.shape.length, self.q.device.type)

    @property
    def grouped(self) -> bool:
        """Whether several query heads share one of k and v."""
        return self.shape.heads != self.shape.kv_heads

    @property
    def pairs(self) -> int:
        """Attended pairs over all batches and heads, counted in the mask."""
        plane = self.shape.length**2 if self.mask is None else sum(int(rows.sum()) for rows in self.mask.split(4096))
        return plane * self.shape.batch * self.shape.heads

    @property
    def tile_pairs(self) -> int:
        """Pairs in the tiles that are not empty, over all batches and heads."""
        if self.block_mask is None:
            return self.pairs
        _, partial, full = self.block_mask.tile_counts
        return (partial + full) * 128 * 128 * self.shape.batch * self.shape.heads


def make_problem(case: Case, device: str, seed: int, max_autotune: bool = False, earlier: str | None = None) -> Problem:
    """The inputs of `case`, the same for the same seed, device and shape."""
    generator = torch.Generator(device).manual_seed(seed)
    s = case.shape
    q, k, v, do = (
        torch.randn(s.batch, heads, s.length, s.head_dim, generator=generator, device=device, dtype=s.dtype)
        for heads in (s.heads, s.kv_heads, s.kv_heads, s.heads)
    )
    for t in (q, k, v):
        t.requires_grad_()
    mask = None if case.mask is None or s.length > DENSE_LENGTH else case.mask.dense(s.length, generator)
    block_mask = None if mask is None else anymask.pack(mask)
    return Problem(case, q, k, v, do, mask, block_mask, device == "cuda", max_autotune, earlier)


def _cases(shape: Shape, *rivals_of: tuple[MaskKind | None, tuple[str, ...]]) -> tuple[Case, ...]:
    """One case for each mask, all at one shape."""
    return tuple(Case("none" if m is None else m.name, shape, m, rivals) for m, rivals in rivals_of)


def quick_gpu() -> Suite:
    """The figures stated for a GPU; the most important masks first, in case time runs out."""
    with_mask = ("flex", "flex-dense", "cudnn", "cudnn-bias", "efficient", "fa4", "flashinfer", "xformers", "earlier")
    cases = _cases(
        Shape(2, 16, 8192, 128, torch.float16),
        (masks.random(0.5), with_mask),
        (masks.causal(), (*with_mask, "cudnn-causal", "flash-causal")),
        (masks.window(1024), with_mask),
        (masks.documents(8), with_mask),
        (None, ("flex", "cudnn", "flash", "efficient", "fa4")),
    )
    return Suite("quick", cases, PASSES, GPU_BACKENDS, gpu_figures, packs=True, host=True)


def hopper(name: str, shape: Shape) -> Suite:
    """Against cuDNN without any mask, its own causal one, and FlexAttention: what the Hopper kernels are judged by."""
    wanted: list[tuple[MaskKind | None, tuple[str, ...]]] = [(None, ("cudnn",))]
    if shape.length >= 8192:
        wanted += [
            (masks.random(0.5), ("cudnn-unmasked",)),
            (masks.causal(), ("cudnn-causal",)),
            (masks.window(1024), ("flex",)),
            (masks.documents(8), ("flex",)),
        ]
    ours = ("hopper", "hopper:deterministic")
    return Suite(name, _cases(shape, *wanted), PASSES, ours, partial(hopper_figures, name), host=True)


def build() -> Suite:
    """Building masks, against FlexAttention and against a copy of the dense tensor; no attention is computed."""
    shape = Shape(1, 1, 32768, 64, torch.float16)
    cases = _cases(shape, (masks.documents(8), ()), (masks.causal(), ()), (masks.random(0.5), ()))
    # no [length, length] anything: 256 documents of 4096 tokens in one row
    million = Case("documents256_causal L1048576", replace(shape, length=2**20), masks.documents(256), ())
    return Suite("build", (*cases, million), (), ("triton",), build_figures, packs=True)


TFLOPS = {"forward_tflops": "forward, TFLOP/s of attended pairs", "backward_tflops": "backward, TFLOP/s"}
MS = {"forward_ms": "forward, ms", "backward_ms": "backward, ms"}


def _sweep(name: str, cases: list[Case], y: dict[str, str], x: str = "tokens", **more: Any) -> Suite:
    """Curves over many cases, each timed in a shorter time than those of which figures are stated."""
    return Suite(name, tuple(cases), PASSES, GPU_BACKENDS, curves=Curves(x, y), rounds=3, block_ms=15.0, **more)


def classic() -> Suite:
    """The curves of the package that this one began as: no mask, and a causal one as a tensor, by length."""
    rivals_of = {
        masks.causal(): ("cudnn-causal", "fa4", "flex", "flex-dense", "cudnn", "efficient", "earlier"),
        None: ("cudnn", "flash", "fa4", "efficient", "flex", "earlier"),
    }
    cases = []
    for heads in (32, 16):
        for mask, rivals in rivals_of.items():
            name, kind = ("none", "no mask") if mask is None else (mask.name, "causal mask as a tensor")
            for length in (256, 512, 1024, 2048, 4096, 8192, 16384):
                shape = Shape(4, heads, length, 64, torch.float16)
                cases.append(Case(f"{name} H{heads} L{length}", shape, mask, rivals, f"{kind}, {heads} heads", length))
    return _sweep("classic", cases, TFLOPS)


def zoo() -> Suite:
    """Many kinds of masks, 4 query heads to one of k and v."""
    cases = []
    for length, batch in ((8192, 2), (32768, 1)):
        for head_dim in (128, 64):
            shape = Shape(batch, 16, length, head_dim, torch.float16, kv_heads=4)
            panel = f"{length:,} tokens, batch {batch}, head_dim {head_dim}"
            for m in masks.kinds():
                # cuDNN takes the same time for every mask, and without one
                rivals = ("flex", "fa4", "cudnn-unmasked", "cudnn") if m.name == "random50" else ("flex", "fa4")
                cases.append(Case(f"{m.name} L{length} D{head_dim}", shape, m, rivals, panel))
    return Suite("masks", tuple(cases), PASSES, GPU_BACKENDS, rounds=3, block_ms=15.0)


def density() -> Suite:
    """Time against the share of tiles that are not empty: random tiles, each with random bits."""
    shape, panel = Shape(1, 16, 16384, 128, torch.float16), "random tiles, each half full"
    kinds = {share: masks.random_tiles(share) for share in SHARES}
    cases = tuple(Case(m.name, shape, m, ("cudnn-unmasked",), panel, 100 * share) for share, m in kinds.items())
    curves = Curves("tiles that are not empty, %", MS, log_x=False)
    return Suite("density", cases, PASSES, GPU_BACKENDS, partial(density_figures, SHARES), curves=curves)


def lengths() -> Suite:
    """131,072 tokens in sequences of 256 to 131,072."""
    cases = []
    for mask, rivals in (
        (masks.causal(), ("cudnn-causal", "flex", "fa4")),
        (masks.packed_documents(), ("flex", "fa4")),
    ):
        for length in (2**n for n in range(8, 18)):
            shape = Shape(131072 // length, 8, length, 128, torch.float16)
            cases.append(Case(f"{mask.name} L{length}", shape, mask, rivals, mask.name, length))
    return _sweep("lengths", cases, TFLOPS)


def memory() -> Suite:
    """Peak bytes of a call above what is held before it, the mask as a tensor."""
    rivals, random = ("flex-dense", "cudnn", "cudnn-bias", "efficient"), masks.random(0.5)
    cases = tuple(
        Case(f"random50 L{n}", Shape(1, 8, n, 128, torch.float16), random, rivals, "random bits, 1 x 8 heads", n)
        for n in (1024, 2048, 4096, 8192, 16384, 32768)
    )
    peaks = {f"{step}_extra_bytes": f"{step}, peak extra memory in MiB" for step in PASSES}
    curves = Curves("tokens", peaks, log_y=True)
    return Suite("memory", cases, PASSES, GPU_BACKENDS, curves=curves, rounds=1, block_ms=10.0)


def latency() -> Suite:
    """Small shapes, where the host decides."""
    rivals, causal = ("cudnn-causal", "flash-causal", "flex", "fa4"), masks.causal()
    cases = [
        Case(f"causal L{n}", Shape(1, 8, n, 128, torch.float16), causal, rivals, "causal, 1 x 8 heads", n)
        for n in (128, 256, 512, 1024, 2048)
    ]
    us = {
        "inference_host_us": "forward without gradients, host us a call",
        "forward_host_us": "forward with gradients recorded, host us a call",
        "backward_host_us": "backward, host us a call",
    }
    return _sweep("latency", cases, us, host=True)


def scaling() -> Suite:
    """More heads, and more samples."""
    rivals, cases = ("cudnn-causal", "flex", "fa4"), []
    for n in (1, 2, 4, 8, 16, 32, 64):
        for what, panel, shape in (
            ("heads", "causal, batch 1, 4096 tokens", Shape(1, n, 4096, 128, torch.float16)),
            ("batch", "causal, 8 heads, 2048 tokens", Shape(n, 8, 2048, 128, torch.float16)),
        ):
            cases.append(Case(f"causal {what} {n}", shape, masks.causal(), rivals, f"{what}: {panel}", n))
    return _sweep("scaling", cases, TFLOPS, x="heads, or batch")


GPU_SUITES: dict[str, Callable[[], Suite]] = {
    "quick": quick_gpu,
    "classic": classic,
    "masks": zoo,
    "density": density,
    "lengths": lengths,
    "build": build,
    "memory": memory,
    "latency": latency,
    "scaling": scaling,
    "hopper-d128": partial(hopper, "hopper-d128", Shape(2, 16, 8192, 128, torch.float16)),
    "hopper-d64": partial(hopper, "hopper-d64", Shape(2, 32, 8192, 64, torch.float16)),
    "hopper-short": partial(hopper, "hopper-short", Shape(16, 16, 1024, 128, torch.float16)),
}


def quick_cpu() -> Suite:
    """The figures stated for a CPU."""
    cases = _cases(
        Shape(1, 8, 2048, 64, torch.float32),
        (masks.random(0.5), ("sdpa", "flex-dense")),
        (masks.documents(8), ("sdpa", "flex")),
    )
    return Suite("quick", cases, (*PASSES, "both"), ("cpu",), cpu_figures, baseline="sdpa", packs=True)


def resized(suite: Suite, length: int) -> Suite:
    """The suite at another length in tokens, at which its figures are not stated; windows keep their size."""
    cases = []
    for c in suite.cases:
        name = c.name.replace(f"L{c.shape.length}", f"L{length}")
        x = length if c.x == c.shape.length else c.x
        cases.append(replace(c, shape=replace(c.shape, length=length), name=name, x=x))
    # cases that differed in nothing but their length are one now
    return replace(suite, cases=tuple({c.name: c for c in cases}.values()), judged=False)
