"""The masks that are measured, each written twice, independently: a closed form, and the mask by name.

FlexAttention gets the closed form, anymask the mask by name; SDPA and the fp64 oracle get the dense tensor that the
closed form makes. Tests compare both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import anymask
from anymask import Mask

# (batch, head, query, key) index tensors -> bool, as FlexAttention takes it
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# rows of a dense mask that are made at a time
ROWS = 1024


@dataclass(frozen=True)
class Shape:
    """Sizes of q `[batch, heads, q_len, head_dim]`, k `[batch, kv_heads, kv_len, head_dim]`, v `[…, v_dim]`."""

    batch: int
    heads: int
    q_len: int
    head_dim: int
    dtype: torch.dtype = torch.float16
    # 0: as many as `heads`, as long as `q_len`, as wide as `head_dim`
    kv_heads: int = 0
    kv_len: int = 0
    v_dim: int = 0

    def __post_init__(self) -> None:
        for name, default in (("kv_heads", self.heads), ("kv_len", self.q_len), ("v_dim", self.head_dim)):
            object.__setattr__(self, name, getattr(self, name) or default)

    def __str__(self) -> str:
        heads = f"H{self.heads}" + (f":{self.kv_heads}" if self.kv_heads != self.heads else "")
        length = f"L{self.q_len}" + (f"x{self.kv_len}" if self.kv_len != self.q_len else "")
        dim = f"D{self.head_dim}" + (f"/{self.v_dim}" if self.v_dim != self.head_dim else "")
        return f"{str(self.dtype).removeprefix('torch.')} B{self.batch} {heads} {length} {dim}"


Forms = tuple[MaskMod, Mask]


@dataclass(frozen=True)
class MaskKind:
    """One mask, for any shape."""

    name: str
    # (shape, device) -> closed form and mask by name; None: a random mask has neither
    forms: Callable[[Shape, str], Forms] | None
    # (shape, generator) -> bool [1, 1, q_len, kv_len] of a random mask
    tensor: Callable[[Shape, torch.Generator], Tensor] | None = None
    # whether each sample has a mask of its own
    per_sample: bool = field(default=False, kw_only=True)

    def dense(self, s: Shape, generator: torch.Generator) -> Tensor:
        """bool `[batch or 1, 1, q_len, kv_len]` on the generator's device."""
        if self.tensor is not None:
            return self.tensor(s, generator)
        assert self.forms is not None
        device = generator.device
        mod, _ = self.forms(s, device.type)
        b = torch.arange(s.batch if self.per_sample else 1, device=device)[:, None, None, None]
        i, j, zero = torch.arange(s.q_len, device=device), torch.arange(s.kv_len, device=device), torch.zeros_like(b)
        out = torch.empty(len(b), 1, s.q_len, s.kv_len, dtype=torch.bool, device=device)
        for rows, part in zip(i.split(ROWS), out.split(ROWS, 2), strict=True):
            part[:] = mod(b, zero, rows[:, None], j)
        return out


def random(share: float) -> MaskKind:
    """Each pair attends with probability `share`."""

    def tensor(s: Shape, generator: torch.Generator) -> Tensor:
        out = torch.empty(1, 1, s.q_len, s.kv_len, dtype=torch.bool, device=generator.device)
        for rows in out.split(ROWS, 2):
            rows[:] = torch.rand(rows.shape, generator=generator, device=generator.device) < share
        return out

    return MaskKind(f"random {share:.0%}", None, tensor)


def random_tiles(share: float) -> MaskKind:
    """This share of all tiles of 128 x 128 at random places; in them each pair attends with probability 1/2."""

    def tensor(s: Shape, generator: torch.Generator) -> Tensor:
        out, tiles = random(0.5).dense(s, generator), -(-s.q_len // 128)
        chosen = torch.randperm(tiles**2, generator=generator, device=generator.device) < round(share * tiles**2)
        for keep, rows in zip(chosen.view(tiles, tiles), out.split(128, 2), strict=True):
            rows &= keep.repeat_interleave(128)[: s.q_len]
        return out

    return MaskKind(f"{share:.0%} of tiles", None, tensor)


def window(size: int) -> MaskKind:
    """Query i sees keys `i - size <= j <= i`."""
    forms = lambda b, h, i, j: (i >= j) & (i - j <= size), anymask.sliding_window(size)
    return MaskKind(f"window {size}", lambda s, device: forms)


def documents(count: int) -> MaskKind:
    """`count` causal documents of `q_len // count` tokens; what is left over belongs to one more."""

    def forms(s: Shape, device: str) -> Forms:
        size = s.q_len // count
        named = anymask.causal() & anymask.document(torch.arange(s.q_len, device=device) // size)
        return lambda b, h, i, j: (i >= j) & (i // size == j // size), named

    return MaskKind(f"{count} documents", forms)


def padding(name: str, least: float) -> MaskKind:
    """Keys up to a random length of each sample, from the share `least` of all keys."""

    def forms(s: Shape, device: str) -> Forms:
        low = int(least * s.kv_len)
        ends = low + _draw(s.kv_len, s.kv_len + 1 - low, s.batch, device)
        return lambda b, h, i, j: (j < ends[b]) & (i >= 0), anymask.key_padding(ends)

    return MaskKind(name, forms, per_sample=True)


def _short_documents(s: Shape, device: str) -> Forms:
    """Causal documents of 40 to 200 tokens, others in each sample."""
    count = -(-s.q_len // 40)
    cuts = (40 + _draw(s.q_len, 161, s.batch * count, device)).view(s.batch, count).cumsum(1)
    ids = torch.searchsorted(cuts, torch.arange(s.q_len, device=device).repeat(s.batch, 1), right=True)
    return lambda b, h, i, j: (i >= j) & (ids[b, i] == ids[b, j]), anymask.causal() & anymask.document(ids)


def _shifted_windows(s: Shape, device: str) -> Forms:
    """Swin: 8 x 8 windows of 8 x 8 pixels an image, shifted by 4, so that the last ones hold up to 4 regions."""
    at, window = torch.arange(s.q_len, device=device), torch.arange(s.batch, device=device)[:, None] % 64
    low, right = (window // 8 == 7) & (at // 8 >= 4), (window % 8 == 7) & (at % 8 >= 4)
    region = 2 * low.long() + right
    return lambda b, h, i, j: region[b, i] == region[b, j], anymask.document(region)


def _draw(seed: int, high: int, count: int, device: str) -> Tensor:
    """`count` numbers below `high`, the same for the same seed on every device."""
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(seed)).to(device)


def _both_ways(s: Shape, device: str) -> Forms:
    """16 documents, cut at random places."""
    cuts = _draw(s.q_len, s.q_len, 15, device).sort().values
    ids = torch.searchsorted(cuts, torch.arange(s.q_len, device=device), right=True)
    return lambda b, h, i, j: ids[i] == ids[j], anymask.document(ids)


def _packed(s: Shape, device: str) -> Forms:
    rule, named = _both_ways(s, device)
    return lambda b, h, i, j: (i >= j) & rule(b, h, i, j), anymask.causal() & named


def _images(s: Shape, device: str) -> Forms:
    """The first 576 tokens of every 1024 are an image, which attends both ways."""
    at = torch.arange(s.q_len, device=device)
    inside, first = at % 1024 < 576, at // 1024 * 1024
    start, end = torch.where(inside, first, 0), torch.where(inside, (first + 576).clamp(max=s.q_len), 0)
    named = anymask.causal() | anymask.spans(start, end)
    return lambda b, h, i, j: (i >= j) | ((j >= start[i]) & (j < end[i])), named


def _answers(s: Shape, device: str) -> Forms:
    """A question of a quarter of the tokens, number 0, then 6 answers."""
    question, at = s.q_len // 4, torch.arange(s.q_len, device=device)
    ids = torch.where(at < question, 0, 1 + (at - question) * 6 // (s.q_len - question))
    named = anymask.causal() & anymask.shared_prefix(ids)
    return lambda b, h, i, j: (i >= j) & ((ids[i] == ids[j]) | (ids[j] == 0)), named


def _tree(s: Shape, device: str) -> Forms:
    """15 segments in the order of a walk, each but the last 8 forking in two, so that a subtree is a range."""
    parents, ends = torch.arange(-1, s.q_len - 1), torch.zeros(s.q_len, dtype=torch.int64)

    def grow(first: int, stop: int, parent: int, depth: int) -> None:
        mine = stop - first if depth == 0 else (stop - first) // (depth + 1)
        parents[first], ends[first : first + mine] = parent, stop
        if depth:
            middle = (first + mine + stop) // 2
            grow(first + mine, middle, first + mine - 1, depth - 1)
            grow(middle, stop, first + mine - 1, depth - 1)

    grow(0, s.q_len, -1, 3)
    end = ends.to(device)
    return lambda b, h, i, j: (i >= j) & (i < end[j]), anymask.tree(parents.to(device))


def _diffusion(s: Shape, device: str) -> Forms:
    half, block = s.q_len // 2, 32

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mine, other = i % half // block, j % half // block
        return ((j < half) & (i < half) & (mine == other)) | ((j >= half) & (other < mine + (i >= half)))

    return mod, anymask.block_diffusion(block, half)


def _pixels(s: Shape, device: str) -> Forms:
    """13 x 13 pixels of the largest image of at most `q_len` pixels whose sides are powers of two."""
    bits, kernel = s.q_len.bit_length() - 1, 13
    height, width = 2 ** (bits // 2), 2 ** (bits - bits // 2)

    def near(a: Tensor, b: Tensor, side: int) -> Tensor:
        # a window at the border is moved inside, not cut
        return (a.clamp(kernel // 2, side - 1 - kernel // 2) - b).abs() <= kernel // 2

    named = anymask.neighbourhood_2d((height, width), kernel)
    return lambda b, h, i, j: near(i // width, j // width, height) & near(i % width, j % width, width), named


def _blocks(s: Shape, device: str) -> Forms:
    """A quarter of the blocks of 128 at random, and the diagonal."""
    n = -(-s.q_len // 128)
    layout = (_draw(s.q_len, 4, n**2, device) == 0).view(n, n) | torch.eye(n, device=device).bool()
    return lambda b, h, i, j: layout[i // 128, j // 128], anymask.block_sparse(layout, 128)


def _prefix(s: Shape, device: str) -> Forms:
    return lambda b, h, i, j: (i >= j) | (j < s.q_len // 4), anymask.prefix_lm(s.q_len // 4)


GLOBAL: Forms = (
    lambda b, h, i, j: ((i - j).abs() <= 512) | (i < 64) | (j < 64),
    anymask.sliding_window(512, 512) | anymask.global_tokens(64),
)
DILATED: Forms = lambda b, h, i, j: (i >= j) & (i - j <= 4 * 512) & ((i - j) % 4 == 0), anymask.dilated(4, 512)
RANDOM = random(0.5)
CAUSAL = MaskKind("causal", lambda s, device: (lambda b, h, i, j: i >= j, anymask.causal()))
LOWER_RIGHT = anymask.causal_lower_right()
# one query at the end of a cache sees every key
DECODE = MaskKind("decode", lambda s, device: (lambda b, h, i, j: i + s.kv_len - s.q_len >= j, LOWER_RIGHT))
PACKED_DOCUMENTS = MaskKind("16 documents of any length", _packed)
SHORT_DOCUMENTS = MaskKind("short documents", _short_documents, per_sample=True)
SHIFTED_WINDOWS = MaskKind("shifted windows", _shifted_windows, per_sample=True)
# what models use, from almost empty to full of partial tiles
KINDS = (
    RANDOM,
    CAUSAL,
    window(1024),
    PACKED_DOCUMENTS,
    MaskKind("the same, both ways", _both_ways),
    MaskKind("prefix-LM", _prefix),
    MaskKind("images in text", _images),
    MaskKind("answers to one question", _answers),
    MaskKind("tree", _tree),
    MaskKind("block diffusion", _diffusion),
    MaskKind("window and global tokens", lambda s, device: GLOBAL),
    MaskKind("dilated window", lambda s, device: DILATED),
    MaskKind("pixels 13 x 13", _pixels),
    MaskKind("random blocks", _blocks),
)
