"""What is measured: which masks, at which shapes, by which providers, in which passes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import anymask
from anymask import BlockMask
from benchmarks import masks
from benchmarks.masks import CAUSAL, DECODE, MaskKind, Shape

BOTH = ("forward", "backward")
OURS = ("anymask", "anymask:triton")
# longest mask, in tokens, that is made as a tensor: 16 GiB
DENSE_LENGTH = 131072
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# names of `providers.PROVIDERS`
WITH_MASK = ("flex", "flex:dense", "cudnn", "cudnn:bias", "efficient", "fa4", "earlier")


@dataclass(frozen=True)
class Case:
    """One mask at one shape, and who runs it."""

    name: str
    shape: Shape
    # None is no mask
    mask: MaskKind | None
    rivals: tuple[str, ...]
    ours: tuple[str, ...] = ("anymask",)
    # of "inference" (no gradients recorded), "forward", "backward", "both", "build" (the mask alone)
    passes: tuple[str, ...] = BOTH
    # "eager", or the call is compiled by torch: "default", "reduce-overhead"
    mode: str = "eager"


@dataclass(frozen=True)
class Suite:
    """Cases that are reported in one table."""

    name: str
    about: str
    cases: tuple[Case, ...]
    # "device" are CUDA events, "wall" the host's clock from an idle device to an idle device
    clock: str = "device"
    # how often providers take turns, and for how many ms each; on the wall clock for one call each
    rounds: int = 3
    block_ms: float = 15.0
    # whether the host's time and the peak of memory are taken too
    host: bool = field(default=False, kw_only=True)
    memory: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Problem:
    """The tensors of one case. Inputs are standard normal; q, k, v require gradients."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    # bool [batch or 1, 1, q_len, kv_len]; None is no mask, or one too long for a tensor, which is only built
    mask: Tensor | None
    # the mask packed by anymask, by name if it has one; None without a mask
    block_mask: BlockMask | None
    # folder of the earlier package, for its provider
    earlier: str | None = None

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return self.q.device.type

    @property
    def grouped(self) -> bool:
        """Whether several query heads share one of k and v."""
        return self.case.shape.heads != self.case.shape.kv_heads

    @property
    def pairs(self) -> int:
        """Attended pairs over all batches and heads, counted in the mask."""
        s = self.case.shape
        if self.mask is None:
            return s.batch * s.heads * s.q_len * s.kv_len
        return sum(int(rows.sum()) for rows in self.mask.split(4096, 2)) * s.heads * (s.batch // len(self.mask))


def make_problem(case: Case, device: str, seed: int = 0, earlier: str | None = None) -> Problem:
    """The inputs of `case`, the same for the same seed, device and shape."""
    generator, s = torch.Generator(device).manual_seed(seed), case.shape
    q, k, v, do = (
        torch.randn(s.batch, *sizes, generator=generator, device=device, dtype=s.dtype)
        for sizes in (
            (s.heads, s.q_len, s.head_dim),
            (s.kv_heads, s.kv_len, s.head_dim),
            (s.kv_heads, s.kv_len, s.v_dim),
            (s.heads, s.q_len, s.v_dim),
        )
    )
    for t in (q, k, v):
        t.requires_grad_()
    kind, mask, block_mask = case.mask, None, None
    if kind is not None and s.kv_len <= DENSE_LENGTH:
        mask = kind.dense(s, generator)
        source = mask if kind.forms is None else kind.forms(s, device)[1]
        block_mask = anymask.pack(source, q_len=s.q_len, kv_len=s.kv_len, device=device)
    return Problem(case, q, k, v, do, mask, block_mask, earlier)


def _at(shape: Shape, *rivals_of: tuple[MaskKind | None, tuple[str, ...]], ours: tuple[str, ...]) -> tuple[Case, ...]:
    """One case for each mask, all at one shape."""
    return tuple(Case("none" if m is None else m.name, shape, m, rivals, ours) for m, rivals in rivals_of)


def _quick() -> Suite:
    cases = _at(
        Shape(2, 16, 8192, 128),
        (masks.random(0.5), WITH_MASK),
        (CAUSAL, (*WITH_MASK, "cudnn:causal", "flash:causal")),
        (masks.window(1024), WITH_MASK),
        (masks.documents(8), WITH_MASK),
        (None, ("flex", "cudnn", "flash", "efficient", "fa4")),
        ours=OURS,
    )
    return Suite("quick", "Everyone, B2 H16 L8192 D128, fp16.", cases, rounds=5, block_ms=40.0, host=True, memory=True)


def _hopper(name: str, shape: Shape) -> Suite:
    wanted: list[tuple[MaskKind | None, tuple[str, ...]]] = [(None, ("cudnn",))]
    if shape.q_len >= 8192:
        wanted += [(masks.random(0.5), ("cudnn:unmasked",)), (CAUSAL, ("cudnn:causal",))]
        wanted += [(masks.window(1024), ("flex",)), (masks.documents(8), ("flex",))]
    cases = _at(shape, *wanted, ours=("anymask", "anymask:deterministic"))
    about = f"The Hopper kernels beside cuDNN without a mask, its causal mask, and FlexAttention: {shape}."
    return Suite(name, about, cases, rounds=5, block_ms=40.0, host=True)


def _trades() -> Suite:
    random, unmasked, causal = masks.random(0.5), ("cudnn:unmasked",), ("cudnn:causal",)
    grouped, mla = Shape(1, 8, 8192, 256, BF16, 4), Shape(1, 16, 8192, 192, BF16, v_dim=128)
    cases = [
        Case("fp32, random", Shape(2, 16, 2048, 64, F32), random, ("efficient", "math")),
        Case("D256, causal", grouped, CAUSAL, causal),
        Case("D256, random", grouped, random, unmasked),
        Case("D192/128, causal", mla, CAUSAL, causal),
        Case("D192/128, random", mla, random, unmasked),
        Case("D96, random", Shape(1, 16, 8192, 96, BF16), random, unmasked),
        Case("D80, random", Shape(1, 16, 8192, 80, BF16), random, unmasked),
        Case("D32, random", Shape(1, 32, 8192, 32, BF16), random, unmasked),
        Case("BERT, padding", Shape(64, 12, 512, 64, BF16), masks.padding("padding", 1 / 16), ("flex",)),
        Case("Swin, mask per window", Shape(2048, 8, 64, 32, BF16), masks.SHIFTED_WINDOWS, ("efficient",)),
        Case("AlphaFold rows", Shape(384, 8, 384, 32, BF16), masks.padding("rows", 1 / 2), ("flash:unmasked",)),
    ]
    for batch, length in ((128, 256), (64, 512), (32, 1024), (16, 2048)):
        shape = Shape(batch, 16, length, 128, BF16)
        cases.append(Case(f"packed samples L{length}", shape, masks.SHORT_DOCUMENTS, ("flex",)))
    for batch, length in ((1, 8192), (1, 131072), (4, 131072)):
        shape = Shape(batch, 32, 1, 128, BF16, 8, length)
        cases.append(Case(f"decoding B{batch} {length}", shape, DECODE, unmasked, passes=("forward",)))
    for dim, heads in ((128, 16), (64, 32)):
        shape = Shape(2, heads, 8192, dim)
        cases += [
            Case(f"FA4, none D{dim}", shape, None, ("fa4",)),
            Case(f"FA4, causal D{dim}", shape, CAUSAL, ("fa4",)),
        ]
    cases.append(Case("FA4, causal L32768", Shape(1, 16, 32768, 128, kv_heads=4), CAUSAL, ("fa4",)))
    return Suite("trades", "Shapes at the edges, each beside the best of what its users have today.", tuple(cases))


def _masks() -> Suite:
    cases = []
    for length, batch in ((8192, 2), (32768, 1)):
        for head_dim in (128, 64):
            shape = Shape(batch, 16, length, head_dim, kv_heads=4)
            for m in masks.KINDS:
                # cuDNN takes the same time for every mask, and without one
                rivals = ("flex", "fa4", *(("cudnn:unmasked", "cudnn") if m.name == "random 50%" else ()))
                cases.append(Case(f"{m.name}, L{length} D{head_dim}", shape, m, rivals, OURS))
    return Suite("masks", "Fourteen masks, four query heads to one of k and v, fp16.", tuple(cases))


def _density() -> Suite:
    shape = Shape(1, 16, 16384, 128)
    kinds = [masks.random_tiles(n / 100) for n in (0, 5, *range(10, 101, 10))]
    cases = tuple(Case(m.name, shape, m, ("cudnn:unmasked",), OURS) for m in kinds)
    return Suite("density", f"Random tiles, each half full, {shape}.", cases, rounds=5, block_ms=40.0)


def _lengths() -> Suite:
    cases = []
    for m, rivals in ((CAUSAL, ("cudnn:causal", "flex", "fa4")), (masks.PACKED_DOCUMENTS, ("flex", "fa4"))):
        for length in (2**n for n in range(8, 18)):
            cases.append(Case(f"{m.name}, L{length}", Shape(131072 // length, 8, length, 128), m, rivals, OURS))
    return Suite("lengths", "131,072 tokens in sequences of one length, 8 heads, head_dim 128, fp16.", tuple(cases))


def _scaling() -> Suite:
    cases = []
    for what, shapes in (
        ("heads, B1 L4096", [Shape(1, 2**n, 4096, 128) for n in range(7)]),
        ("samples, H8 L2048", [Shape(2**n, 8, 2048, 128) for n in range(7)]),
    ):
        for n, shape in enumerate(shapes):
            cases.append(Case(f"{2**n} {what}", shape, CAUSAL, ("cudnn:causal", "flex", "fa4"), OURS))
    return Suite("scaling", "A causal mask by the number of heads and of samples, head_dim 128, fp16.", tuple(cases))


def _memory() -> Suite:
    rivals, random = ("flex:dense", "cudnn", "cudnn:bias", "efficient"), masks.random(0.5)
    cases = tuple(Case(f"L{n}", Shape(1, 8, n, 128), random, rivals, OURS) for n in (2**k for k in range(10, 16)))
    about = "Random bits, 8 heads, head_dim 128, fp16: peak bytes of a call above what is held before it."
    return Suite("memory", about, cases, rounds=1, block_ms=10.0, memory=True)


def _build() -> Suite:
    def case(mask: MaskKind, length: int, who: tuple[str, ...], rivals: tuple[str, ...]) -> Case:
        name = f"{mask.name}, {length} tokens"
        return Case(name, Shape(1, 1, length, 64), mask, rivals, who, ("build",))

    # no [length, length] anything in the last: 256 documents of 4096 tokens in one row
    ways, flex = ("pack:named", "pack", "pack:function"), ("flex:build", "flex:build-eager")
    cases = (
        *(case(m, 32768, ways, flex) for m in (masks.documents(8), CAUSAL)),
        *(case(masks.random(0.5), n, ("pack",), ("copy", "flex:build-dense")) for n in (8192, 32768)),
        case(masks.documents(256), 2**20, ("pack:named",), ()),
    )
    return Suite("build", "Building the mask of one plane.", cases, "wall", rounds=100, memory=True)


def _latency() -> Suite:
    small, causal = Shape(1, 8, 512, 128, BF16), ("cudnn:causal", "flash:causal", "flex", "fa4")
    host, random = ("inference", "forward", "both"), masks.random(0.5)
    cases = [
        Case("eager", small, random, ("cudnn:unmasked",), passes=host),
        Case("compiled", small, random, ("cudnn:unmasked",), passes=("forward", "both"), mode="default"),
        Case("reduce-overhead", small, random, ("cudnn:unmasked",), passes=("both",), mode="reduce-overhead"),
        Case("dense tensor", small, random, ("anymask",), ("anymask:dense", "anymask:view"), ("inference",)),
        Case("causal B4 H32 L1024", Shape(4, 32, 1024, 128), CAUSAL, ("fa4",), passes=("backward",)),
        Case("documents by name, L32768", Shape(1, 1, 32768, 64), masks.documents(8), ("flex:build",),
             ("pack:named",), ("build",)),
        *(Case(f"causal L{n}", Shape(1, 8, n, 128), CAUSAL, causal, OURS, (*host[:2], "backward"))
          for n in (128, 256, 512, 1024, 2048)),
    ]  # fmt: skip
    about = "Small calls on the wall clock, B1 H8 D128; a time holds the host and the device."
    return Suite("latency", about, tuple(cases), "wall", rounds=400, host=True)


def _classic() -> Suite:
    cases = []
    for heads in (32, 16):
        for m, rivals in (
            (CAUSAL, ("cudnn:causal", "fa4", "flex", "flex:dense", "cudnn", "efficient", "earlier")),
            (None, ("cudnn", "flash", "fa4", "efficient", "flex", "earlier")),
        ):
            for length in (2**n for n in range(8, 15)):
                name = f"{'none' if m is None else m.name}, H{heads} L{length}"
                cases.append(Case(name, Shape(4, heads, length, 64), m, rivals, OURS))
    return Suite("classic", "The shapes of flashattention2-custom-mask: B4 D64, fp16.", tuple(cases))


def _cpu() -> Suite:
    shape, passes = Shape(1, 8, 2048, 64, F32), (*BOTH, "both")
    cases = (
        Case("random 50%", shape, masks.random(0.5), ("sdpa", "flex:dense"), passes=passes),
        Case("8 documents", shape, masks.documents(8), ("sdpa", "flex"), passes=passes),
    )
    return Suite("cpu", "A CPU: times over that of SDPA with the same mask; absolute times would mean nothing.", cases)


SUITES = {
    suite.name: suite
    for suite in (
        _quick(),
        _hopper("hopper-d128", Shape(2, 16, 8192, 128)),
        _hopper("hopper-d64", Shape(2, 32, 8192, 64)),
        _hopper("hopper-short", Shape(16, 16, 1024, 128)),
        _trades(), _masks(), _density(), _lengths(), _scaling(), _build(), _memory(), _latency(), _classic(), _cpu(),
    )
}  # fmt: skip


def tiny(suite: Suite) -> Suite:
    """The suite at sizes that a CPU bears: every row is built, checked and timed once."""

    def shrunk(case: Case) -> Case:
        s = case.shape
        group = s.heads // s.kv_heads
        sizes = {"batch": min(s.batch, 2), "heads": group, "kv_heads": 1, "head_dim": min(s.head_dim, 32)}
        lengths = {"q_len": min(s.q_len, 256), "kv_len": min(s.kv_len, 256), "v_dim": min(s.v_dim, 16)}
        return replace(case, shape=replace(s, **sizes, **lengths))

    return replace(suite, cases=tuple(map(shrunk, suite.cases)), rounds=1, block_ms=1.0)
