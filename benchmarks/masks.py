"""The masks that are measured, each written more than once, independently of the others.

`rule` is the closed form that FlexAttention gets, `symbolic` the mask by name that anymask can get, and the dense
tensor is what SDPA gets, what anymask packs, and what the fp64 reference reads. Tests compare all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import anymask
from anymask import Mask

# (batch, head, query, key) index tensors -> bool, as FlexAttention takes it
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# query rows of a dense mask that are made at a time
ROWS = 1024


@dataclass(frozen=True)
class MaskKind:
    """One mask, for any length in tokens."""

    name: str
    # (length, device) -> closed form; None: the mask has none
    rule: Callable[[int, str], MaskMod] | None = None
    # (length, device) -> the mask by name; None: it has none
    symbolic: Callable[[int, str], Mask] | None = None
    # (length, generator) -> bool [length, length], where it is written apart from `rule`
    tensor: Callable[[int, torch.Generator], Tensor] | None = None

    def dense(self, length: int, generator: torch.Generator) -> Tensor:
        """bool `[length, length]` on the generator's device."""
        if self.tensor is not None:
            return self.tensor(length, generator)
        assert self.rule is not None
        mod = self.rule(length, generator.device.type)
        zero = torch.zeros((), dtype=torch.int64, device=generator.device)
        at = torch.arange(length, device=generator.device)
        out = torch.empty(length, length, dtype=torch.bool, device=generator.device)
        for rows, part in zip(at.split(ROWS), out.split(ROWS), strict=True):
            part[:] = mod(zero, zero, rows[:, None], at[None, :])
        return out


def random(share: float) -> MaskKind:
    """Each pair attends with probability `share`."""

    def tensor(length: int, generator: torch.Generator) -> Tensor:
        out = torch.empty(length, length, dtype=torch.bool, device=generator.device)
        for rows in out.split(ROWS):
            rows[:] = torch.rand(rows.shape, generator=generator, device=generator.device) < share
        return out

    return MaskKind(f"random{share:.0%}".rstrip("%"), tensor=tensor)


def random_tiles(share: float) -> MaskKind:
    """This share of all tiles of 128 x 128 at random places; in them each pair attends with probability 1/2."""

    def tensor(length: int, generator: torch.Generator) -> Tensor:
        out, tiles = random(0.5).dense(length, generator), -(-length // 128)
        chosen = torch.randperm(tiles**2, generator=generator, device=generator.device) < round(share * tiles**2)
        keep = chosen.view(tiles, tiles)
        for line, rows in enumerate(out.split(128)):
            rows &= keep[line].repeat_interleave(128)[:length]
        return out

    return MaskKind(f"tiles{share:.0%}".rstrip("%"), tensor=tensor)


def causal() -> MaskKind:
    """Query i sees keys j <= i."""
    return MaskKind(
        "causal",
        lambda length, device: lambda b, h, i, j: i >= j,
        lambda length, device: anymask.causal(),
        lambda length, generator: _ones(length, generator).tril_(),
    )


def window(size: int) -> MaskKind:
    """Query i sees keys `i - size <= j <= i`."""
    return MaskKind(
        f"window{size}",
        lambda length, device: lambda b, h, i, j: (i >= j) & (i - j <= size),
        lambda length, device: anymask.sliding_window(size),
        lambda length, generator: _ones(length, generator).tril_().triu_(-size),
    )


def documents(count: int) -> MaskKind:
    """`count` causal documents of `length // count` tokens; what is left over belongs to one more."""

    def rule(length: int, device: str) -> MaskMod:
        size = length // count
        return lambda b, h, i, j: (i >= j) & (i // size == j // size)

    def symbolic(length: int, device: str) -> Mask:
        return anymask.causal() & anymask.document(torch.arange(length, device=device) // (length // count))

    def tensor(length: int, generator: torch.Generator) -> Tensor:
        ids = torch.arange(length, device=generator.device).div(length // count, rounding_mode="floor")
        return (ids[:, None] == ids[None, :]).tril_()

    return MaskKind(f"documents{count}_causal", rule, symbolic, tensor)


def _ones(length: int, generator: torch.Generator) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=generator.device)


def _draw(length: int, high: int, count: int, device: str) -> Tensor:
    """`count` numbers below `high`, the same for the same length on every device."""
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(length)).to(device)


def _ids(length: int, device: str) -> Tensor:
    """Document of each token: 16 documents, cut at random places."""
    cuts = _draw(length, length, 15, device).sort().values
    return torch.searchsorted(cuts, torch.arange(length, device=device), right=True)


def _packed_rule(length: int, device: str) -> MaskMod:
    ids = _ids(length, device)
    return lambda b, h, i, j: (i >= j) & (ids[i] == ids[j])


def packed_documents() -> MaskKind:
    """16 causal documents, cut at random places."""
    return MaskKind(
        "packed_documents",
        _packed_rule,
        lambda length, device: anymask.causal() & anymask.document(_ids(length, device)),
    )


def _bidirectional_rule(length: int, device: str) -> MaskMod:
    ids = _ids(length, device)
    return lambda b, h, i, j: ids[i] == ids[j]


def _prefix_rule(length: int, device: str) -> MaskMod:
    return lambda b, h, i, j: (i >= j) | (j < length // 4)


def _images(length: int, device: str) -> tuple[Tensor, Tensor]:
    """Bounds of each token's image: the first 576 tokens of every 1024."""
    at = torch.arange(length, device=device)
    start = at // 1024 * 1024
    inside = at - start < 576
    return torch.where(inside, start, 0), torch.where(inside, (start + 576).clamp(max=length), 0)


def _images_rule(length: int, device: str) -> MaskMod:
    start, end = _images(length, device)
    return lambda b, h, i, j: (i >= j) | ((j >= start[i]) & (j < end[i]))


def _answers(length: int, device: str) -> Tensor:
    """0 for a question of a quarter of the tokens, then the numbers of 6 answers."""
    question = length // 4
    at = torch.arange(length, device=device)
    return torch.where(at < question, 0, 1 + (at - question) * 6 // (length - question))


def _answers_rule(length: int, device: str) -> MaskMod:
    ids = _answers(length, device)
    return lambda b, h, i, j: (i >= j) & ((ids[i] == ids[j]) | (ids[j] == 0))


def _tree(length: int, device: str) -> tuple[Tensor, Tensor]:
    """Parent of each token, and the end of its subtree: 15 segments, each but the last 8 forking in two."""
    parents, end = torch.arange(-1, length - 1), torch.zeros(length, dtype=torch.int64)

    def grow(first: int, stop: int, parent: int, depth: int) -> None:
        mine = stop - first if depth == 0 else (stop - first) // (depth + 1)
        parents[first], end[first : first + mine] = parent, stop
        if depth:
            middle = (first + mine + stop) // 2
            grow(first + mine, middle, first + mine - 1, depth - 1)
            grow(middle, stop, first + mine - 1, depth - 1)

    grow(0, length, -1, 3)
    return parents.to(device), end.to(device)


def _tree_rule(length: int, device: str) -> MaskMod:
    # tokens are in the order of a walk, so that a subtree is a range
    end = _tree(length, device)[1]
    return lambda b, h, i, j: (i >= j) & (i < end[j])


def _diffusion_rule(length: int, device: str, block: int) -> MaskMod:
    half = length // 2

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mine, other = i % half // block, j % half // block
        own_noise = (j < half) & (i < half) & (mine == other)
        return own_noise | ((j >= half) & (other < mine + (i >= half)))

    return mod


def _image_sides(length: int) -> tuple[int, int]:
    """Height and width of the largest image of at most `length` pixels whose sides are powers of two."""
    bits = length.bit_length() - 1
    return 2 ** (bits // 2), 2 ** (bits - bits // 2)


def _pixels_rule(length: int, device: str, kernel: int) -> MaskMod:
    sides = _image_sides(length)

    def near(a: Tensor, b: Tensor, side: int) -> Tensor:
        # a window at the border is moved inside, not cut
        centre = a.clamp(kernel // 2, side - 1 - kernel // 2)
        return (centre - b).abs() <= kernel // 2

    return lambda b, h, i, j: near(i // sides[1], j // sides[1], sides[0]) & near(i % sides[1], j % sides[1], sides[1])


def _layout(length: int, device: str) -> Tensor:
    """A quarter of the blocks of 128 at random, and the diagonal."""
    blocks = -(-length // 128)
    return (_draw(length, 4, blocks**2, device) == 0).view(blocks, blocks) | torch.eye(blocks, device=device).bool()


def _layout_rule(length: int, device: str) -> MaskMod:
    layout = _layout(length, device)
    return lambda b, h, i, j: layout[i // 128, j // 128]


def kinds() -> tuple[MaskKind, ...]:
    """What models use, from almost empty to full of partial tiles."""
    return (
        random(0.5),
        causal(),
        window(1024),
        packed_documents(),
        MaskKind(
            "documents_both_ways", _bidirectional_rule, lambda length, device: anymask.document(_ids(length, device))
        ),
        MaskKind("prefix_lm", _prefix_rule, lambda length, device: anymask.prefix_lm(length // 4)),
        MaskKind(
            "images_in_text",
            _images_rule,
            lambda length, device: anymask.causal() | anymask.spans(*_images(length, device)),
        ),
        MaskKind(
            "shared_question",
            _answers_rule,
            lambda length, device: anymask.causal() & anymask.shared_prefix(_answers(length, device)),
        ),
        MaskKind("tree", _tree_rule, lambda length, device: anymask.tree(_tree(length, device)[0])),
        MaskKind(
            "block_diffusion",
            partial(_diffusion_rule, block=32),
            lambda length, device: anymask.block_diffusion(32, length // 2),
        ),
        MaskKind(
            "window_and_global",
            lambda length, device: lambda b, h, i, j: ((i - j).abs() <= 512) | (i < 64) | (j < 64),
            lambda length, device: anymask.sliding_window(512, 512) | anymask.global_tokens(64),
        ),
        MaskKind(
            "dilated",
            lambda length, device: lambda b, h, i, j: (i >= j) & (i - j <= 4 * 512) & ((i - j) % 4 == 0),
            lambda length, device: anymask.dilated(4, 512),
        ),
        MaskKind(
            "pixels_2d",
            partial(_pixels_rule, kernel=13),
            lambda length, device: anymask.neighbourhood_2d(_image_sides(length), 13),
        ),
        MaskKind(
            "random_blocks",
            _layout_rule,
            lambda length, device: anymask.block_sparse(_layout(length, device), 128),
        ),
    )
