"""What is measured: which masks, at which shapes, by which providers, in which passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import anymask
from anymask import BlockMask
from benchmarks import masks, scores
from benchmarks.masks import CAUSAL, DECODE, RANDOM, MaskKind, Shape
from benchmarks.scores import ScoreKind

BOTH = ("forward", "backward")
OURS = ("anymask", "anymask:triton")
# longest mask, in tokens, that is made as a tensor: 16 GiB
DENSE_LENGTH = 131072
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# names of `providers.PROVIDERS`
WITH_MASK = ("flex", "flex:dense", "cudnn", "cudnn:bias", "efficient", "fa4", "earlier")


@dataclass(frozen=True)
class Model:
    """A model of Hugging Face transformers that is made from a configuration, and trained on one batch."""

    # of `benchmarks.models.KINDS`
    kind: str
    layers: int = 12
    vocab: int = 32000
    # whose losses are compared
    steps: int = 50


@dataclass(frozen=True)
class Case:
    """One mask at one shape, and who runs it."""

    name: str
    shape: Shape
    # None is no mask
    mask: MaskKind | None
    baselines: tuple[str, ...]
    ours: tuple[str, ...] = ("anymask",)
    # of "inference" (no gradients recorded), "forward", "backward", "both", "build" (the mask alone), "train" (a step)
    passes: tuple[str, ...] = BOTH
    # "eager", or the call is compiled by torch: "default", "reduce-overhead"
    mode: str = "eager"
    # whether tensors are views of `[batch, length, heads, dim]`, as those of layers of models are
    transposed: bool = False
    # whose layers attend so
    model: Model | None = None
    # what happens to scores beside the mask
    scores: ScoreKind | None = None


@dataclass(frozen=True)
class Suite:
    """Cases that are reported in one table."""

    name: str
    about: str
    cases: list[Case]
    # "device" are CUDA events, "wall" the host's clock from an idle device to an idle device
    clock: str = "device"
    # how often providers take turns, and for how many ms each; on the wall clock for one call each
    rounds: int = 3
    block_ms: float = 15.0
    # whether the host's time and the peak of memory are taken too
    host: bool = field(default=False, kw_only=True)
    memory: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Inputs:
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
    # tensors of the scores, which require gradients
    leaves: dict[str, Tensor] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.q, self.k, self.v, *self.leaves.values()

    @property
    def device(self) -> str:
        """Where the tensors are: "cuda" or "cpu"."""
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


def make_inputs(case: Case, device: str, seed: int = 0, earlier: str | None = None) -> Inputs:
    """The inputs of `case`, the same for the same seed, device and shape."""
    generator, s = torch.Generator(device).manual_seed(seed), case.shape

    def draw(heads: int, length: int, dim: int) -> Tensor:
        sizes = (length, heads) if case.transposed else (heads, length)
        found = torch.randn(s.batch, *sizes, dim, generator=generator, device=device, dtype=s.dtype)
        return found.transpose(1, 2) if case.transposed else found

    q, k = draw(s.heads, s.q_len, s.head_dim), draw(s.kv_heads, s.kv_len, s.head_dim)
    v, do = draw(s.kv_heads, s.kv_len, s.v_dim), draw(s.heads, s.q_len, s.v_dim)
    kind, mask, block_mask = case.mask, None, None
    if kind is not None and s.kv_len <= DENSE_LENGTH:
        mask = kind.dense(s, generator)
        source = mask if kind.forms is None else kind.forms(s, device)[1]
        block_mask = anymask.pack(source, q_len=s.q_len, kv_len=s.kv_len, device=device)
    leaves = {} if case.scores is None else case.scores.make(s, generator)
    return Inputs(case, *(t.requires_grad_() for t in (q, k, v)), do, mask, block_mask, earlier, leaves)


def _at(shape: Shape, ours: tuple[str, ...], *baselines_of: tuple[MaskKind | None, tuple[str, ...]]) -> list[Case]:
    """One case for each mask, all at one shape."""
    return [Case("none" if m is None else m.name, shape, m, baselines, ours) for m, baselines in baselines_of]


CUDNN, CUDNN_CAUSAL = ("cudnn:unmasked",), ("cudnn:causal",)
BUILD: dict[str, Any] = {"passes": ("build",)}


def _hopper(shape: Shape) -> list[Case]:
    masked = [(RANDOM, CUDNN), (CAUSAL, CUDNN_CAUSAL), (masks.window(1024), ("flex",)), (masks.documents(8), ("flex",))]
    wanted = [(None, ("cudnn",)), *(masked if shape.q_len >= 8192 else ())]
    return _at(shape, ("anymask", "anymask:deterministic"), *wanted)


def _trades() -> list[Case]:
    d256, mla = Shape(1, 8, 8192, 256, BF16, 4), Shape(1, 16, 8192, 192, BF16, v_dim=128)
    bert, rows = masks.padding("padding", 1 / 16), masks.padding("rows", 1 / 2)
    packed = [Shape(b, 16, n, 128, BF16) for b, n in ((128, 256), (64, 512), (32, 1024), (16, 2048))]
    cached = [Shape(b, 32, 1, 128, BF16, 8, n) for b, n in ((1, 8192), (1, 131072), (4, 131072))]
    fa4 = [Shape(2, heads, 8192, dim) for heads, dim in ((16, 128), (32, 64))]
    long, short = Shape(1, 16, 32768, 128, kv_heads=4), Shape(4, 32, 1024, 128)
    return [
        Case("fp32, random", Shape(2, 16, 2048, 64, F32), RANDOM, ("efficient", "math")),
        Case("D256, causal", d256, CAUSAL, CUDNN_CAUSAL),
        Case("D256, random", d256, RANDOM, CUDNN),
        Case("D192/128, causal", mla, CAUSAL, CUDNN_CAUSAL),
        Case("D192/128, random", mla, RANDOM, CUDNN),
        *(Case(f"D{d}, random", Shape(1, h, 8192, d, BF16), RANDOM, CUDNN) for d, h in ((96, 16), (80, 16), (32, 32))),
        Case("BERT, padding", Shape(64, 12, 512, 64, BF16), bert, ("flex",)),
        Case("Swin, mask per window", Shape(2048, 8, 64, 32, BF16), masks.SHIFTED_WINDOWS, ("efficient",)),
        Case("AlphaFold rows", Shape(384, 8, 384, 32, BF16), rows, ("flash:unmasked",)),
        *(Case(f"packed samples L{s.q_len}", s, masks.SHORT_DOCUMENTS, ("flex",)) for s in packed),
        *(Case(f"decoding B{s.batch} {s.kv_len}", s, DECODE, CUDNN, passes=("forward",)) for s in cached),
        *(Case(f"FA4, none D{s.head_dim}", s, None, ("fa4", "cudnn")) for s in fa4),
        *(Case(f"FA4, causal D{s.head_dim}", s, CAUSAL, ("fa4", *CUDNN_CAUSAL)) for s in fa4),
        *(Case(f"FA4, causal L{s.q_len}", s, CAUSAL, ("fa4", *CUDNN_CAUSAL)) for s in (long, short)),
    ]


def _masks() -> list[Case]:
    shapes = [Shape(b, 16, n, d, kv_heads=4) for n, b in ((8192, 2), (32768, 1)) for d in (128, 64)]
    # cuDNN takes the same time for every mask, and without one
    plan = [(s, m, (*CUDNN, "cudnn") if m is RANDOM else ()) for s in shapes for m in masks.KINDS]
    return [Case(f"{m.name}, L{s.q_len} D{s.head_dim}", s, m, ("flex", "fa4", *more), OURS) for s, m, more in plan]


def _scaling() -> list[Case]:
    baselines, sizes = (*CUDNN_CAUSAL, "flex", "fa4"), [2**n for n in range(7)]
    return [
        *(Case(f"{n} heads, B1 L4096", Shape(1, n, 4096, 128), CAUSAL, baselines, OURS) for n in sizes),
        *(Case(f"{n} samples, H8 L2048", Shape(n, 8, 2048, 128), CAUSAL, baselines, OURS) for n in sizes),
    ]


def _build() -> list[Case]:
    def case(mask: MaskKind, length: int, who: tuple[str, ...], baselines: tuple[str, ...]) -> Case:
        return Case(f"{mask.name}, {length} tokens", Shape(1, 1, length, 64), mask, baselines, who, **BUILD)

    ways, flex = ("pack:named", "pack", "pack:function"), ("flex:build", "flex:build-eager")
    return [
        *(case(m, 32768, ways, flex) for m in (masks.documents(8), CAUSAL)),
        *(case(RANDOM, n, ("pack",), ("copy", "flex:build-dense")) for n in (8192, 32768)),
        case(masks.documents(256), 2**20, ("pack:named",), ()),
    ]


def _latency() -> list[Case]:
    small, long, host = Shape(1, 8, 512, 128, BF16), Shape(1, 1, 32768, 64), ("inference", "forward")
    baselines, short = (*CUDNN_CAUSAL, "flash:causal", "flex", "fa4"), [Shape(1, 8, 2**k, 128) for k in range(7, 12)]
    return [
        Case("eager", small, RANDOM, CUDNN, passes=(*host, "both")),
        Case("compiled", small, RANDOM, CUDNN, passes=("forward", "both"), mode="default"),
        Case("reduce-overhead", small, RANDOM, CUDNN, passes=("both",), mode="reduce-overhead"),
        Case("dense tensor", small, RANDOM, ("anymask",), ("anymask:dense", "anymask:view"), ("inference",)),
        Case("layer of a model", small, CAUSAL, ("anymask",), ("anymask:layer",), (*host, "both"), transposed=True),
        Case("causal B4 H32 L1024", Shape(4, 32, 1024, 128), CAUSAL, ("fa4",), passes=("backward",)),
        Case("documents by name, L32768", long, masks.documents(8), ("flex:build",), ("pack:named",), **BUILD),
        *(Case(f"causal L{s.q_len}", s, CAUSAL, baselines, OURS, (*host, "backward")) for s in short),
    ]


def _models() -> list[Case]:
    """Each implementation makes its mask of what the model is given, in each step."""

    def case(name: str, shape: Shape, mask: MaskKind, model: Model) -> Case:
        return Case(name, shape, mask, ("sdpa:model", "flex:model"), ("anymask:model",), ("train",), model=model)

    llama, bert = Model("llama"), Model("bert", vocab=30522)
    return [
        *(case(f"Llama, packed, B{b}", Shape(b, 16, 4096, 64, BF16), masks.PACKED_DOCUMENTS, llama) for b in (1, 4)),
        case("BERT, padded", Shape(64, 12, 512, 64, BF16), masks.padding("padding", 1 / 16), bert),
    ]


def _scores() -> list[Case]:
    shape, who = Shape(2, 16, 8192, 128), ("anymask", "anymask:plain")
    triangle, padded = Shape(512, 4, 512, 32, BF16), masks.padding("padding", 1 / 2)
    one = [scores.PAIRS, scores.KEYS, scores.ALIBI, scores.RELATIVE, scores.SOFTCAP, scores.SINKS]
    dense = [scores.PAIRS, scores.KEYS]
    return [
        *(Case(s.name, shape, None, ("flex", *(("efficient",) if s in dense else ())), who, scores=s) for s in one),
        Case("dropout 0.1", shape, None, (), who, scores=scores.DROPOUT),
        Case("bias of pairs, causal", shape, CAUSAL, ("flex",), who, scores=scores.PAIRS),
        Case("triangle attention", triangle, padded, ("flex", "efficient"), who, scores=scores.PAIRS),
    ]


def _classic() -> list[Case]:
    causal = (*CUDNN_CAUSAL, "fa4", "flex", "flex:dense", "cudnn", "efficient", "earlier")
    plain = ("cudnn", "flash", "fa4", "efficient", "flex", "earlier")
    return [
        Case(f"{'none' if m is None else m.name}, H{h} L{n}", Shape(4, h, n, 64), m, baselines, OURS)
        for h in (32, 16)
        for m, baselines in ((CAUSAL, causal), (None, plain))
        for n in (2**k for k in range(8, 15))
    ]


def _suites() -> Iterator[Suite]:
    long: dict[str, Any] = {"rounds": 5, "block_ms": 40.0}
    quick, wide, cpu = Shape(2, 16, 8192, 128), Shape(1, 16, 16384, 128), Shape(1, 8, 2048, 64, F32)
    wanted = [(m, WITH_MASK) for m in (RANDOM, CAUSAL, masks.window(1024), masks.documents(8))]
    wanted[1] = (CAUSAL, (*WITH_MASK, *CUDNN_CAUSAL, "flash:causal"))
    wanted.append((None, ("flex", "cudnn", "flash", "efficient", "fa4")))
    yield Suite("quick", f"Everyone, {quick}.", _at(quick, OURS, *wanted), **long, host=True, memory=True)
    for name, shape in (("d128", quick), ("d64", Shape(2, 32, 8192, 64)), ("short", Shape(16, 16, 1024, 128))):
        about = f"The Hopper kernels beside cuDNN without a mask, its causal mask, and FlexAttention: {shape}."
        yield Suite(f"hopper-{name}", about, _hopper(shape), **long, host=True)
    yield Suite("trades", "Shapes at the edges, each beside the best of what its users have today.", _trades())
    yield Suite("masks", "Fourteen masks, four query heads to one of k and v, fp16.", _masks())
    shares = [masks.random_tiles(n / 100) for n in (0, 5, *range(10, 101, 10))]
    tiles = _at(wide, OURS, *((m, CUDNN) for m in shares))
    yield Suite("density", f"Random tiles, each half full, {wide}.", tiles, **long)
    lengths = [
        Case(f"{m.name}, L{n}", Shape(131072 // n, 8, n, 128), m, (*cudnn, "flex", "fa4"), OURS)
        for m, cudnn in ((CAUSAL, CUDNN_CAUSAL), (masks.PACKED_DOCUMENTS, ()))
        for n in (2**k for k in range(8, 18))
    ]
    yield Suite("lengths", "131,072 tokens in sequences of one length, 8 heads, head_dim 128, fp16.", lengths)
    yield Suite("scaling", "A causal mask by the number of heads and of samples, head_dim 128, fp16.", _scaling())
    yield Suite("build", "Building the mask of one plane.", _build(), "wall", rounds=100, memory=True)
    baselines = ("flex:dense", "cudnn", "cudnn:bias", "efficient")
    peaks = [Case(f"L{n}", Shape(1, 8, n, 128), RANDOM, baselines, OURS) for n in (2**k for k in range(10, 16))]
    about = "Random bits, 8 heads, head_dim 128, fp16: peak bytes of a call above what is held before it."
    yield Suite("memory", about, peaks, rounds=1, block_ms=10.0, memory=True)
    about = "Small calls on the wall clock, B1 H8 D128; a time holds the host and the device."
    yield Suite("latency", about, _latency(), "wall", rounds=400, host=True)
    about = "What happens to scores beside a mask, with gradients of its tensors; ours without any of it too."
    yield Suite("scores", about, _scores(), memory=True)
    about = "Training steps of 12-layer models of transformers on the wall clock, forward to optimizer, masks included."
    yield Suite("models", about, _models(), "wall", rounds=20, host=True)
    yield Suite("classic", "The shapes of flashattention2-custom-mask: B4 D64, fp16.", _classic())
    ways = ((RANDOM, "flex:dense"), (masks.documents(8), "flex"))
    both = [Case(m.name, cpu, m, ("sdpa", flex), passes=(*BOTH, "both")) for m, flex in ways]
    yield Suite("cpu", "A CPU: times over that of SDPA with the same mask.", both, rounds=15)


SUITES = {suite.name: suite for suite in _suites()}


def tiny(suite: Suite) -> Suite:
    """The suite at sizes that a CPU bears: every row is built, checked and timed once."""

    most, cases = {"batch": 2, "head_dim": 32, "v_dim": 16, "q_len": 256, "kv_len": 256}, []
    for case in suite.cases:
        sizes = {name: min(getattr(case.shape, name), size) for name, size in most.items()}
        heads = {"heads": case.shape.heads // case.shape.kv_heads, "kv_heads": 1}
        model = None if case.model is None else replace(case.model, layers=2, vocab=64, steps=3)
        cases.append(replace(case, shape=replace(case.shape, **sizes, **heads), model=model))
    return replace(suite, cases=cases, rounds=1, block_ms=1.0)
