"""A mask of every builder, and its definition by comparisons of positions."""

from collections.abc import Callable

import torch
from torch import Tensor

import anymask
from anymask import Mask, causal


def document_ids(length: int) -> Tensor:
    """Documents of 70 tokens, and one id that comes back."""
    ids = torch.arange(length) // 70
    ids[ids == 4] = 1
    return ids


def random_flags(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.2


def _span_bounds(length: int) -> tuple[Tensor, Tensor]:
    """Spans of 90 tokens after 60 tokens of text each."""
    at = torch.arange(length)
    inside = at % 150 >= 60
    start = torch.where(inside, at // 150 * 150 + 60, 0)
    return start, torch.where(inside, start + 90, 0)


def _parents(length: int) -> Tensor:
    """A tree in no particular order, with a second root."""
    generator = torch.Generator().manual_seed(length)
    parents = (torch.rand(length, generator=generator) * torch.arange(length)).long()
    parents[0] = -1
    parents[length // 2] = -1
    places = torch.randperm(length, generator=generator)
    moved = torch.empty(length, dtype=torch.long)
    moved[places] = torch.where(parents < 0, -1, places[parents.clamp(min=0)])
    return moved


def _ancestors(parents: Tensor) -> Tensor:
    found = torch.eye(len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents.tolist()):
        while parent >= 0:
            found[token, parent] = True
            parent = int(parents[parent])
    return found


def _layout(length: int) -> Tensor:
    return random_flags(2, -(-length // 48), -(-length // 48))


def diffusion(length: int, block: int) -> Tensor:
    i, j = torch.arange(2 * length)[:, None], torch.arange(2 * length)[None, :]
    i_clean, j_clean = i >= length, j >= length
    i_block, j_block = i % length // block, j % length // block
    return torch.where(
        i_clean, j_clean & (j_block <= i_block), torch.where(j_clean, j_block < i_block, i_block == j_block)
    )


# name -> (mask of a length, its definition by query i, key j and length)
CASES: dict[str, tuple[Callable[[int], Mask], Callable[[Tensor, Tensor, int], Tensor]]] = {
    "open window": (lambda n: anymask.sliding_window(None, 3, offset=-70), lambda i, j, n: j <= i - 70 + 3),
    "window of documents": (
        lambda n: anymask.document_window(torch.tensor([0, n // 3, n // 3, n]), 40, 9),
        lambda i, j, n: ((i < n // 3) == (j < n // 3)) & (i - 40 <= j) & (j <= i + 9),
    ),
    "dilated": (lambda n: anymask.dilated(3, 50), lambda i, j, n: (j <= i) & (i - j <= 150) & ((i - j) % 3 == 0)),
    "dilated 1": (lambda n: anymask.dilated(1, 9), lambda i, j, n: (j <= i) & (i - j <= 9)),
    "strided": (lambda n: anymask.strided(40), lambda i, j, n: (j <= i) & ((i - j < 40) | ((i - j) % 40 == 0))),
    "chunked": (lambda n: anymask.chunked(100), lambda i, j, n: i // 100 == j // 100),
    "causal chunks": (lambda n: causal() & anymask.chunked(128), lambda i, j, n: (i // 128 == j // 128) & (j <= i)),
    "blocks": (lambda n: anymask.block_diffusion(48), lambda i, j, n: j // 48 <= i // 48),
    "document": (lambda n: anymask.document(document_ids(n)), lambda i, j, n: document_ids(n)[i] == document_ids(n)[j]),
    "cu_seqlens": (
        lambda n: anymask.document(cu_seqlens=torch.tensor([0, n // 3, n // 3, n])),
        lambda i, j, n: (i < n // 3) == (j < n // 3),
    ),
    "position_ids": (
        lambda n: anymask.document(position_ids=torch.arange(n) % 90),
        lambda i, j, n: i // 90 == j // 90,
    ),
    "lengths": (lambda n: anymask.key_padding(torch.tensor([n // 2])), lambda i, j, n: (j < n // 2) & (i >= 0)),
    "keep": (lambda n: anymask.key_padding(random_flags(1, n)), lambda i, j, n: random_flags(1, n)[0][j] & (i >= 0)),
    "prefix_lm": (lambda n: anymask.prefix_lm(130), lambda i, j, n: (j <= i) | (j < 130)),
    "prefix_lm of samples": (lambda n: anymask.prefix_lm(torch.tensor([7])), lambda i, j, n: (j <= i) | (j < 7)),
    "spans": (
        lambda n: causal() | anymask.spans(*_span_bounds(n)),
        lambda i, j, n: (j <= i) | ((i // 150 == j // 150) & (i % 150 >= 60) & (j % 150 >= 60)),
    ),
    "global_tokens": (lambda n: anymask.global_tokens(3), lambda i, j, n: (i < 3) | (j < 3)),
    "global positions": (
        lambda n: anymask.global_tokens(torch.tensor([5, 130, 3, 4, 131, 200])),
        lambda i, j, n: sum((x == t) for x in (i, j) for t in (3, 4, 5, 130, 131, 200)) > 0,
    ),
    "no global position": (
        lambda n: anymask.global_tokens(torch.tensor([], dtype=torch.int64)),
        lambda i, j, n: (i < 0) & (j < 0),
    ),
    "global flags": (
        lambda n: anymask.global_tokens(random_flags(n)),
        lambda i, j, n: random_flags(n)[i] | random_flags(n)[j],
    ),
    "shared_prefix": (
        lambda n: causal() & anymask.shared_prefix(torch.arange(n) // 110),
        lambda i, j, n: (j <= i) & ((j < 110) | (i // 110 == j // 110)),
    ),
    "shared_question": (
        lambda n: causal() & anymask.shared_question(torch.arange(n) // 240, torch.arange(n) // 60 % 4),
        lambda i, j, n: (j <= i) & (i // 240 == j // 240) & ((j // 60 % 4 == 0) | (i // 60 == j // 60)),
    ),
    "tree": (lambda n: anymask.tree(_parents(n)), lambda i, j, n: _ancestors(_parents(n))),
    "block_sparse": (
        lambda n: anymask.block_sparse(_layout(n)[0], 48),
        lambda i, j, n: _layout(n)[0][i // 48, j // 48],
    ),
    "function": (
        lambda n: anymask.from_function(lambda b, h, q_idx, kv_idx: (q_idx * kv_idx) % 3 == 1),
        lambda i, j, n: (i * j) % 3 == 1,
    ),
    "function of queries": (
        lambda n: anymask.from_function(lambda b, h, q_idx, kv_idx: q_idx > 4),
        lambda i, j, n: (i > 4) & (j >= 0),
    ),
}
