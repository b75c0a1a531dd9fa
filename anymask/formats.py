"""Masks of other libraries, in and out: `from_...` gives a `Mask`, `to_...` takes a `BlockMask`, both exact."""

from __future__ import annotations

from functools import reduce
from math import gcd
from operator import or_
from typing import Any

import torch
from torch import Tensor

from anymask.block_mask import BlockMask
from anymask.block_mask.tables import tile_tables
from anymask.mask import Mask, causal_lower_right, from_dense, from_function
from anymask.mask.builders import whole_numbers
from anymask.mask.leaves import Band, Between, Blocks, Positions
from anymask.tiles import FULL, PARTIAL, TILE, tiles_over

# a row beyond every length
NEVER = 2**31 - 1
BYTE = 8


def from_flex(block_mask: Any) -> Mask:
    """The mask of a `BlockMask` of `torch.nn.attention.flex_attention`: its blocks, and its `mask_mod` in partial ones.

    Args:
        block_mask: with block lists `[batch, heads, q blocks, kv blocks]`, blocks of any size.

    Raises:
        TypeError: it is none. ValueError: its lists have other dimensions. Packing the result raises what the
            `mask_mod` raises; that of a sliced `BlockMask` always does.
    """
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    if not isinstance(block_mask, FlexBlockMask):
        kind = type(block_mask)
        raise TypeError(
            f"block_mask is a {kind.__module__}.{kind.__name__}; allowed is a BlockMask of torch's flex_attention"
        )
    counts = block_mask.kv_num_blocks
    if counts.dim() != 3:
        raise ValueError(f"kv_num_blocks has shape {tuple(counts.shape)}; allowed are 3 dimensions")
    batch, heads, _ = counts.shape
    q_size, kv_size = block_mask.BLOCK_SIZE
    lengths = block_mask.seq_lengths
    # both sides in blocks of one size
    size = gcd(q_size, kv_size)

    def layout(counts: Tensor, indices: Tensor) -> Blocks:
        listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        found = torch.zeros_like(indices, dtype=torch.int32).scatter_add_(3, indices.long(), listed.to(torch.int32)) > 0
        wide = found.repeat_interleave(q_size // size, 2).repeat_interleave(kv_size // size, 3)
        return Blocks(wide[:, :, : -(-lengths[0] // size), : -(-lengths[1] // size)], size)

    partial = layout(counts, block_mask.kv_indices) & from_function(block_mask.mask_mod, batch=batch, heads=heads)
    if block_mask.full_kv_num_blocks is None or block_mask.full_kv_indices is None:
        return partial
    return partial | layout(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)


def to_flex(block_mask: BlockMask) -> Any:
    """A `BlockMask` of `torch.nn.attention.flex_attention` with the same tiles; its `mask_mod` reads the same bits."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    words, batch, heads = block_mask.rows.words, block_mask.batch, block_mask.heads
    kinds, number = tile_tables(block_mask, 0, tiles_over(block_mask.q_len))
    # a row to read where no tile is partial
    words = torch.cat([words, words.new_zeros(1, *words.shape[1:])])

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        at = b if batch > 1 else b * 0, h if heads > 1 else h * 0, q_idx // TILE, kv_idx // TILE
        column = kv_idx % TILE
        word = words[number[at], q_idx % TILE, column % 8 // 2]
        bit = (word >> (column // 8 * 2 + column % 2)) & 1
        kind = kinds[at]
        return (kind == FULL) | ((kind == PARTIAL) & (bit == 1))

    def lists(kind: int) -> tuple[Tensor, Tensor]:
        hit = kinds == kind
        # the tiles listed come first, each part in ascending order
        listed = hit.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
        return hit.sum(-1, dtype=torch.int32), listed.to(torch.int32)

    return FlexBlockMask.from_kv_blocks(
        *lists(PARTIAL),
        *lists(FULL),
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=(block_mask.q_len, block_mask.kv_len),
    )


def from_startend_row_indices(indices: Tensor, causal: bool, *, q_heads: int | None = None) -> Mask:
    """FlashMask: ranges of queries that each key is hidden from.

    Args:
        indices: int `[batch, 1 or kv_heads, kv_len, n]`. Causal, lower-right: n = 1 hides `[start, ...)`, n = 2 hides
            `[start, end)`. Not causal: n = 2 hides `[start, ...)` and `[..., end)`, n = 4 hides `[start, end)` twice.
        causal: which of the two it is.
        q_heads: query heads, if there are more than kv_heads planes.

    Raises:
        ValueError: dtype or shape is none of these, or q_heads no multiple. TypeError: no tensor.
    """
    allowed = (1, 2) if causal else (2, 4)
    if whole_numbers("indices", indices, (4,)).shape[3] not in allowed:
        raise ValueError(
            f"indices has shape {tuple(indices.shape)}; allowed are [batch, 1 or kv_heads, kv_len, {allowed[0]} or "
            f"{allowed[1]}] with causal={causal}"
        )
    planes = indices.shape[1]
    if q_heads is not None and planes > 1:
        if q_heads % planes:
            raise ValueError(f"q_heads is {q_heads}; allowed are multiples of the {planes} planes of indices")
        indices = indices.repeat_interleave(q_heads // planes, 1)
    bounds = [t.long() for t in indices.unbind(3)]
    if len(bounds) == 1:
        bounds.append(torch.full_like(bounds[0], NEVER))
    elif not causal and len(bounds) == 2:
        bounds = [bounds[0], torch.full_like(bounds[0], NEVER), torch.zeros_like(bounds[0]), bounds[1]]
    hidden = [
        Between(None, start, end, of_query=True, name="indices")
        for start, end in zip(bounds[::2], bounds[1::2], strict=True)
    ]
    seen = ~reduce(or_, hidden)
    return causal_lower_right() & seen if causal else seen


def to_startend_row_indices(block_mask: BlockMask, causal: bool) -> Tensor:
    """FlashMask's indices of a mask, int32 `[batch, heads, kv_len, 2]` if causal, else `[..., 4]`. Makes it dense.

    Raises:
        ValueError: a key is hidden from more ranges of queries than the format has, or a causal one is seen too early.
    """
    dense, q_len, kv_len = block_mask.to_dense(), block_mask.q_len, block_mask.kv_len
    at = torch.arange(q_len, device=dense.device)[:, None]
    open_ = at + (kv_len - q_len) >= torch.arange(kv_len, device=dense.device) if causal else at >= 0
    if (dense & ~open_).any():
        raise ValueError("the mask shows a key to a query before it; allowed with causal=True are masks that do not")
    hidden = ~dense & open_
    begins = hidden & ~torch.nn.functional.pad(hidden, (0, 0, 1, 0))[..., :-1, :]
    most, limit = int(begins.sum(-2).max()) if begins.numel() else 0, 1 if causal else 2
    if most > limit:
        raise ValueError(f"a key is hidden from {most} ranges of queries; allowed with causal={causal} are {limit}")
    ends = hidden & ~torch.nn.functional.pad(hidden, (0, 0, 0, 1))[..., 1:, :]
    columns = []
    # the last range first, as the format has it: below the diagonal, then above
    for flip in (True, False)[:limit]:
        for edges, beyond in ((begins, 0), (ends, 1)):
            edges = edges.flip(-2) if flip else edges
            found, place = edges.max(-2) if q_len else (edges.any(-2), edges.sum(-2))
            place = q_len - 1 - place if flip else place
            columns.append(torch.where(found, place + beyond, 0))
    if not causal:
        # one range only: not twice
        twice = columns[0] == columns[2]
        columns[2:] = [torch.where(twice, 0, c) for c in columns[2:]]
    return torch.stack(columns, -1).to(torch.int32)


def from_bits(bits: Tensor, q_len: int, kv_len: int) -> Mask:
    """Packed bits, such as FlashInfer's `packed_custom_mask` of one request.

    Args:
        bits: uint8 `[..., ceil(q_len * kv_len / 8)]`, pairs row by row, the first in the lowest bit
            (`bitorder="little"`); leading dimensions are none, heads, or batch and heads.
        q_len, kv_len: lengths in tokens.

    Raises:
        ValueError: dtype or size is another.
    """
    size = -(-q_len * kv_len // BYTE)
    if bits.dtype != torch.uint8 or not 1 <= bits.dim() <= 3 or bits.shape[-1] != size:
        raise ValueError(
            f"bits is {bits.dtype} of shape {tuple(bits.shape)}; allowed is torch.uint8 [..., {size}] for "
            f"q_len={q_len}, kv_len={kv_len}"
        )
    pairs = (bits[..., None] >> torch.arange(BYTE, device=bits.device)) & 1
    return from_dense(pairs.flatten(-2)[..., : q_len * kv_len].unflatten(-1, (q_len, kv_len)) != 0)


def to_bits(block_mask: BlockMask) -> Tensor:
    """uint8 `[batch, heads, ceil(q_len * kv_len / 8)]` as `from_bits` reads it. Makes the mask dense."""
    pairs = block_mask.to_dense().flatten(2).to(torch.uint8)
    pairs = torch.nn.functional.pad(pairs, (0, -pairs.shape[2] % BYTE)).unflatten(2, (-1, BYTE))
    bits: Tensor = (pairs << torch.arange(BYTE, dtype=torch.uint8, device=pairs.device)).sum(-1, dtype=torch.uint8)
    return bits


def from_ranges(
    q_ranges: list[tuple[int, int]], k_ranges: list[tuple[int, int]], types: list[int] | None = None
) -> Mask:
    """MagiAttention: rectangles of queries and keys, `[start, end)` each, with a type.

    Args:
        q_ranges, k_ranges: as many of each.
        types: 0 all pairs (the default), 1 causal from the lower right corner, 2 from the upper left corner on, 3 both.

    Raises:
        ValueError: numbers of ranges that differ, a range that ends before it starts, another type.
    """
    types = [0] * len(q_ranges) if types is None else list(types)
    if not len(q_ranges) == len(k_ranges) == len(types) or not types:
        raise ValueError(f"{len(q_ranges)} q_ranges, {len(k_ranges)} k_ranges, {len(types)} types; allowed are as many")
    masks = []
    for (q_start, q_end), (k_start, k_end), kind in zip(q_ranges, k_ranges, types, strict=True):
        if kind not in (0, 1, 2, 3) or not (0 <= q_start <= q_end and 0 <= k_start <= k_end):
            raise ValueError(
                f"a range is q {q_start, q_end}, k {k_start, k_end} of type {kind}; allowed are 0 <= start <= end and "
                "types 0 to 3"
            )
        inside = Positions(q_start, q_end, of_query=True) & Positions(k_start, k_end, of_query=False)
        band = Band(k_start - q_start if kind & 2 else None, k_end - q_end if kind & 1 else None)
        masks.append(inside & band)
    return reduce(or_, masks)


def from_xformers(bias: Any, q_len: int, kv_len: int) -> Mask:
    """The mask of an `AttentionBias` of xformers, by its `materialize`: finite values must be 0.

    Raises:
        ValueError: it adds something else than 0 and minus infinity.
    """
    values = bias.materialize((q_len, kv_len))
    seen = values != -float("inf")
    if (values[seen] != 0).any():
        raise ValueError(f"{type(bias).__name__} adds values other than 0 and -inf; allowed are masks, not biases")
    return from_dense(seen)
