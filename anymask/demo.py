"""The demonstration: train on packed documents, prove that nothing leaks, then measure several masks.

Plain functions; `anymask.cli` prints what they return.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from statistics import median
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from anymask.api import attention
from anymask.backends import Backend
from anymask.block_mask import BlockMask
from anymask.mask import Mask, causal, from_dense, sliding_window
from anymask.packing import pack

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]

# byte-level tokens, and one more for the unused end of a row
VOCABULARY, PADDING = 257, 256
# of loss and gradients, relative to the largest entry of each: fp32 rounding stays a hundred times below
TOLERANCE = 1e-4
# of the table, relative to the largest entry: ten times what rounding to the dtype gives
TABLE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}


@dataclass(frozen=True)
class Sizes:
    """How much the demonstration does."""

    # tokens of a row: the packed rows of text, and the masks of the table
    row_len: int
    # rows of a batch
    rows: int
    steps: int
    # of the table: heads, head_dim and repeated timings
    heads: int
    head_dim: int
    dtype: torch.dtype
    repeats: int

    @staticmethod
    def choose(device: torch.device, quick: bool = False, steps: int | None = None) -> Sizes:
        """Sizes for a minute on two cores or on a GPU; `quick` for a few seconds."""
        if quick:
            return Sizes(500, 2, 3 if steps is None else steps, 2, 32, torch.float32, 1)
        steps = 40 if steps is None else steps
        if device.type == "cuda":
            return Sizes(4000, 2, steps, 8, 64, torch.float16, 20)
        return Sizes(2000, 2, steps, 4, 64, torch.float32, 5)


@dataclass(frozen=True)
class Batch:
    """Documents packed one after another into rows; all int64 `[rows, row_len]`."""

    tokens: Tensor
    # number of the document within its row, -1 in the unused end
    ids: Tensor
    # tokens since the start of the document
    positions: Tensor
    # the next token of the same document, or -100 (no loss)
    targets: Tensor

    def mask(self) -> Mask:
        """Causal within a document; the unused end attends to nothing."""
        ids = self.ids[:, None, :, None]
        return causal() & from_dense((ids == ids.mT) & (ids >= 0))

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(*(t.to(device) for t in (self.tokens, self.ids, self.positions, self.targets)))

    def alone(self) -> Iterator[Batch]:
        """Each document as a batch of its own, without padding."""
        for row in range(self.ids.shape[0]):
            for number in range(int(self.ids[row].max()) + 1):
                where = self.ids[row] == number
                yield Batch(*(t[row, where][None] for t in (self.tokens, self.ids, self.positions, self.targets)))


def documents(longest: int) -> list[Tensor]:
    """English text that ships with Python: int64 bytes of each help topic, cut after a paragraph to `longest`."""
    found = []
    for name in sorted(topics):
        text = topics[name].encode()
        text = text[:longest].rpartition(b"\n\n")[0] if len(text) > longest else text
        if len(text) > 1:
            found.append(torch.tensor(list(text)))
    return found


def pack_rows(texts: list[Tensor], rows: int, row_len: int, generator: torch.Generator) -> Batch:
    """Rows of documents drawn at random, each with as many as fit."""
    tokens = torch.full((rows, row_len), PADDING)
    ids, positions, targets = torch.full_like(tokens, -1), torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for row in range(rows):
        start, number = 0, 0
        for index in torch.randperm(len(texts), generator=generator).tolist():
            text = texts[index]
            stop = start + len(text)
            if stop <= row_len:
                tokens[row, start:stop] = text
                ids[row, start:stop] = number
                positions[row, start:stop] = torch.arange(len(text))
                targets[row, start : stop - 1] = text[1:]
                start, number = stop, number + 1
    return Batch(tokens, ids, positions, targets)


class Layer(nn.Module):
    """Pre-norm attention with rotary positions and two query heads per kv head, then pre-norm MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, angles: Tensor, attend: Attend) -> Tensor:
        """`x [rows, row_len, width]` after attention and MLP."""
        kv_heads = self.heads // 2
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        q, k, v = heads.split((self.heads, kv_heads, kv_heads), dim=1)
        o = attend(_rotate(q, angles), _rotate(k, angles), v)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        mlp: Tensor = self.mlp(self.mlp_norm(x))
        return x + mlp


class Model(nn.Module):
    """A small causal transformer over bytes."""

    frequencies: Tensor

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        frequencies = 10_000.0 ** -torch.linspace(0, 1, width // heads // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, batch: Batch, attend: Attend) -> Tensor:
        """Cross-entropy summed over the targets, in nats."""
        angles = batch.positions[:, None, :, None] * self.frequencies
        x = self.embed(batch.tokens)
        for layer in self.layers:
            x = layer(x, angles, attend)
        logits = self.head(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits, batch.targets.flatten(), ignore_index=-100, reduction="sum")


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """`x [batch, heads, length, dim]` with each pair (i, i + dim / 2) turned by its angle."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def under(mask: BlockMask) -> Attend:
    """Attention under a packed mask, for all layers and the backward pass."""
    return lambda q, k, v: attention(q, k, v, mask)


def plain_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own causal attention: the truth for a document alone, a leak over a packed row."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    # the plain formula: fused kernels of some GPUs round fp32 products to TF32
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def train(model: Model, batches: Iterator[Batch]) -> Iterator[float]:
    """One optimiser step per batch, the mask packed once for each; yields the loss in nats per token."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches:
        length = batch.tokens.shape[1]
        mask = pack(batch.mask(), q_len=length, kv_len=length, device=batch.tokens.device)
        loss = model(batch, under(mask)) / (batch.targets >= 0).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield loss.item()


@dataclass(frozen=True)
class Comparison:
    """Loss (nats per token) of one batch, and how far each way of computing it is from the documents run alone."""

    documents: int
    tokens: int
    loss_alone: float
    loss_packed: float
    loss_leaky: float
    # largest over all parameters of max |difference| / max |gradient|, with the parameter's name
    grad_packed: float
    grad_leaky: float
    worst_packed: str
    worst_leaky: str

    @property
    def equal(self) -> bool:
        """Packed gives the loss and every gradient of the documents alone, to rounding."""
        return max(self.grad_packed, abs(self.loss_packed / self.loss_alone - 1)) <= TOLERANCE

    @property
    def leaks(self) -> bool:
        """Plain causal attention over the packed rows does not, so the comparison can tell."""
        return self.grad_leaky > TOLERANCE


def compare(model: Model, batch: Batch, mask: BlockMask) -> Comparison:
    """Loss and every parameter's gradient: packed under `mask`, each document alone, packed under plain causal."""
    count = int((batch.targets >= 0).sum())

    def run(parts: list[Batch], attend: Attend) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        total = 0.0
        for part in parts:
            loss = model(part, attend) / count
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone = list(batch.alone())
    loss_alone, truth = run(alone, plain_causal)
    loss_packed, packed = run([batch], under(mask))
    loss_leaky, leaky = run([batch], plain_causal)
    grad_packed, worst_packed = max((_relative(packed[name], truth[name]), name) for name in truth)
    grad_leaky, worst_leaky = max((_relative(leaky[name], truth[name]), name) for name in truth)
    return Comparison(
        len(alone), count, loss_alone, loss_packed, loss_leaky, grad_packed, grad_leaky, worst_packed, worst_leaky
    )


def _relative(x: Tensor, truth: Tensor) -> float:
    """max |x - truth| / max |truth|; inf if x is not finite, which a maximum would hide."""
    if not bool(x.isfinite().all()):
        return float("inf")
    difference, largest = (x.double() - truth.double()).abs().max().item(), truth.abs().max().item()
    return difference / largest if largest else difference


@dataclass(frozen=True)
class Row:
    """One mask of the table."""

    mask: str
    density: float
    # empty, partial, full
    tiles: tuple[int, int, int]
    # max |x - fp64| / max |fp64| of o, dq, dk, dv
    errors: dict[str, float]
    dense_bytes: int
    packed_bytes: int
    # time over that of torch's scaled_dot_product_attention with the dense mask; packing is apart, in milliseconds
    forward_ratio: float
    both_ratio: float
    pack_ms: float
    # cores that other programs used while it was timed, and whether they were cores that these threads wanted
    others: float
    busy: bool
    ok: bool


def table_masks(batch: Batch, heads: int, seed: int) -> Iterator[tuple[str, Mask | Tensor, Tensor]]:
    """Name, mask as a user gives it, and the same as a dense bool tensor made without the library."""
    length, device = batch.tokens.shape[1], batch.tokens.device
    generator = torch.Generator().manual_seed(seed)
    at = torch.arange(length, device=device)
    distance = at[:, None] - at

    def chance(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device) < 0.5

    lower = distance >= 0
    window = length // 8
    yield "causal", causal(), lower
    yield f"sliding window {window}", sliding_window(window), lower & (distance <= window)
    ids = batch.ids[0]
    same = (ids[:, None] == ids) & (ids[:, None] >= 0)
    yield "documents, causal", causal() & from_dense(same), lower & same
    prefix = lower | (at < length // 3)
    yield "prefix-LM", prefix, prefix
    half = chance(length, length)
    yield "random 50 %", half, half
    tiles = chance(-(-length // 128), -(-length // 128)).repeat_interleave(128, 0).repeat_interleave(128, 1)
    blocks = tiles[:length, :length].contiguous()
    yield "random tiles", blocks, blocks
    per_head = chance(1, heads, length, length)
    yield "random per head", per_head, per_head


def measure(name: str, mask: Mask | Tensor, dense: Tensor, sizes: Sizes, seed: int) -> Row:
    """Exactness against fp64 and cost against torch's attention, for one mask.

    Raises:
        AssertionError: the packed mask is not the dense one.
    """
    length, device = dense.shape[-1], dense.device
    generator = torch.Generator().manual_seed(seed)
    shape = (1, sizes.heads, length, sizes.head_dim)
    q, k, v, do = (torch.randn(shape, generator=generator).to(device, sizes.dtype) for _ in range(4))

    block_mask = pack(mask, q_len=length, kv_len=length, device=device)
    if not torch.equal(block_mask.to_dense().squeeze(), dense.squeeze()):
        raise AssertionError(f"the packed mask {name!r} differs from its dense form")
    pack_ms = _milliseconds([lambda: pack(mask, q_len=length, kv_len=length, device=device)], device, 1)[0]

    def grads(dtype: torch.dtype, backend: Backend | None) -> list[Tensor]:
        x, y, z = (t.to(dtype).requires_grad_() for t in (q, k, v))
        o = attention(x, y, z, block_mask, backend=backend)
        return [o.detach(), *torch.autograd.grad(o, (x, y, z), do.to(dtype))]

    pairs = zip(("o", "dq", "dk", "dv"), grads(sizes.dtype, None), grads(torch.float64, "reference"), strict=True)
    errors = {letter: _relative(x, truth) for letter, x, truth in pairs}

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    def both(attend: Attend) -> Callable[[], object]:
        x, y, z = (t.clone().requires_grad_() for t in (q, k, v))
        return lambda: torch.autograd.grad(attend(x, y, z), (x, y, z), do)

    ours = under(block_mask)
    start, others = time.perf_counter(), _others_s()
    forward = _milliseconds([lambda: ours(q, k, v), lambda: theirs(q, k, v)], device, sizes.repeats)
    forward_backward = _milliseconds([both(ours), both(theirs)], device, sizes.repeats)
    wall, others = time.perf_counter() - start, _others_s() - others
    return Row(
        mask=name,
        density=dense.double().mean().item(),
        tiles=block_mask.tile_counts,
        errors=errors,
        dense_bytes=dense.numel(),
        packed_bytes=block_mask.nbytes,
        forward_ratio=forward[0] / forward[1],
        both_ratio=forward_backward[0] / forward_backward[1],
        pack_ms=pack_ms,
        others=others / wall,
        busy=is_busy(wall, others),
        ok=max(errors.values()) <= TABLE_TOLERANCE[sizes.dtype],
    )


def _milliseconds(calls: list[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """Median time of each call. They take turns, so that a slow spell of the machine meets them all."""
    times: list[list[float]] = [[] for _ in calls]
    # larger than the L2 cache of a GPU, written before each call so that none finds its inputs there
    flush = torch.empty(2**28 if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    for turn in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            if device.type == "cuda":
                flush.zero_()
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[0].record()
                call()
                events[1].record()
                events[1].synchronize()
                elapsed = events[0].elapsed_time(events[1])
            else:
                start = time.perf_counter()
                call()
                elapsed = (time.perf_counter() - start) * 1e3
            # the first turn warms up
            if turn:
                found.append(elapsed)
    return [median(found) for found in times]


def is_busy(wall: float, others: float) -> bool:
    """Whether other programs, which used `others` core seconds in `wall` seconds, took cores from torch's threads."""
    free = max(0, (os.cpu_count() or 1) - torch.get_num_threads())
    # a quarter of a core is a system that does nothing; the second term is a few ticks of its clock
    return others > (free + 0.25) * wall + 0.05


def _others_s() -> float:
    """Core seconds of other programs since the system started; minus our own where it does not say."""
    own = time.process_time()
    try:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return -own
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own
