"""Masks of other libraries, in and out: `from_...` gives a `Mask`, `to_...` takes a `BlockMask`, both exact.

Wrong types raise TypeError and what does not fit ValueError, with the argument, what came and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from heapq import heappop, heappush
from math import gcd
from operator import or_
from typing import Any

import torch
from torch import Tensor

from anymask.block_mask import BlockMask
from anymask.block_mask.tables import tile_tables
from anymask.mask import Mask, causal, causal_lower_right, from_dense, from_function
from anymask.mask.arguments import (
    builder,
    check_dense,
    check_flag,
    check_int,
    check_integers,
    check_natural,
    check_positive,
    shared_once,
    values,
)
from anymask.mask.expr import brief
from anymask.mask.leaves import Between, Blocks
from anymask.mask.parts import for_lengths, union
from anymask.tiles import FULL, PARTIAL, TILE, tiles_over

# a row beyond every length
NEVER = 2**31 - 1
BYTE = 8


@builder
def from_flex(block_mask: Any) -> Mask:
    """The mask of a `BlockMask` of `torch.nn.attention.flex_attention`: its blocks, and its `mask_mod` in partial ones.

    Args:
        block_mask: with block lists `[batch, heads, q blocks, any width]`, blocks of any size. The host looks at them:
            entries beyond their count mean nothing and may be anything.

    Raises:
        TypeError: it is none. ValueError: its lists have other dimensions or name a negative block; or it was
            sliced, which takes its `mask_mod` away, and has partial blocks. Packing it for other lengths than its own.
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
    batch, heads, q_blocks = counts.shape
    q_size, kv_size = block_mask.BLOCK_SIZE
    # a mask of fewer lines of blocks keeps the length it was sliced from
    q_len, kv_len = min(block_mask.seq_lengths[0], q_blocks * q_size), block_mask.seq_lengths[1]
    # both sides in blocks of one size
    size = gcd(q_size, kv_size)

    def layout(name: str, counts: Tensor, indices: Tensor) -> Blocks:
        found = _listed_blocks(name, counts, indices, -(-kv_len // kv_size))
        wide = found.repeat_interleave(q_size // size, 2).repeat_interleave(kv_size // size, 3)
        return Blocks(wide[:, :, : -(-q_len // size), : -(-kv_len // size)], size)

    if getattr(block_mask.mask_mod, "__name__", "") == "_sliced_mask_mod_error" and counts.any():
        raise ValueError(
            "block_mask was sliced, which takes its mask_mod away; allowed are one whose mask_mod was set again, and "
            "slice_queries of the packed one"
        )
    seen: Mask = layout("kv_indices", counts, block_mask.kv_indices)
    seen &= from_function(block_mask.mask_mod, batch=batch, heads=heads)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        seen |= layout("full_kv_indices", block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return for_lengths("block_mask", q_len, kv_len, counts.device) & seen


def _listed_blocks(name: str, counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """bool `[batch, heads, q blocks, blocks]`: the first `counts` entries of each line of `indices`."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    negative = listed & (indices < 0)
    if negative.any():
        raise ValueError(f"{name} names block {int(indices[negative][0])}; allowed are 0 and more")
    # one block more takes what is not listed, and blocks of no keys, which a mask that torch made shorter still names
    found = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(3, torch.where(listed, indices, blocks).clamp(max=blocks).long(), True)[..., :blocks]


def to_flex(block_mask: BlockMask) -> Any:
    """A `BlockMask` of `torch.nn.attention.flex_attention` with the same tiles; its `mask_mod` reads the same bits."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    _check_packed(block_mask)
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


@builder
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
    allowed = (1, 2) if check_flag("causal", causal) else (2, 4)
    if check_integers("indices", indices, (4,)).shape[3] not in allowed:
        raise ValueError(
            f"indices has shape {tuple(indices.shape)}; allowed are [batch, 1 or kv_heads, kv_len, {allowed[0]} or "
            f"{allowed[1]}] with causal={causal}"
        )
    planes = indices.shape[1]
    if q_heads is not None and check_positive("q_heads", q_heads) and planes > 1:
        if q_heads % planes:
            raise ValueError(f"q_heads is {q_heads}; allowed are multiples of the {planes} planes of indices")
        indices = indices.repeat_interleave(q_heads // planes, 1)
    bounds = [t.to(torch.int64, copy=True) for t in indices.unbind(3)]
    if len(bounds) == 1:
        bounds.append(torch.full_like(bounds[0], NEVER))
    elif not causal and len(bounds) == 2:
        bounds = [bounds[0], torch.full_like(bounds[0], NEVER), torch.zeros_like(bounds[0]), bounds[1]]
    hidden = [
        Between(None, start, end, of_query=True, name="from_startend_row_indices: indices")
        for start, end in zip(bounds[::2], bounds[1::2], strict=True)
    ]
    seen = ~reduce(or_, hidden)
    return causal_lower_right() & seen if causal else seen


def to_startend_row_indices(block_mask: BlockMask, causal: bool) -> Tensor:
    """FlashMask's indices of a mask, int32 `[batch, heads, kv_len, 2]` if causal, else `[..., 4]`. Makes it dense.

    Raises:
        ValueError: a key is hidden from more ranges of queries than the format has, or a causal one is seen too early.
    """
    check_flag("causal", causal)
    dense, q_len, kv_len = _check_packed(block_mask).to_dense(), block_mask.q_len, block_mask.kv_len
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


@builder
def from_bits(bits: Tensor, q_len: int, kv_len: int) -> Mask:
    """Packed bits, such as FlashInfer's `packed_custom_mask` of one request.

    Args:
        bits: uint8 `[..., ceil(q_len * kv_len / 8)]`, pairs row by row, the first in the lowest bit
            (`bitorder="little"`); leading dimensions are none, heads, or batch and heads.
        q_len, kv_len: lengths in tokens.

    Raises:
        ValueError: dtype or size is another. TypeError: no tensor, or lengths that are no ints.
    """
    check_dense("bits", bits, "a uint8 tensor")
    size = -(-check_natural("q_len", q_len) * check_natural("kv_len", kv_len) // BYTE)
    if bits.dtype != torch.uint8 or not 1 <= bits.dim() <= 3 or bits.shape[-1] != size:
        raise ValueError(
            f"bits is {bits.dtype} of shape {tuple(bits.shape)}; allowed is torch.uint8 [..., {size}] for "
            f"q_len={q_len}, kv_len={kv_len}"
        )
    pairs = (bits[..., None] >> torch.arange(BYTE, device=bits.device)) & 1
    return from_dense(pairs.flatten(-2)[..., : q_len * kv_len].unflatten(-1, (q_len, kv_len)) != 0)


def to_bits(block_mask: BlockMask) -> Tensor:
    """uint8 `[batch, heads, ceil(q_len * kv_len / 8)]` as `from_bits` reads it. Makes the mask dense."""
    pairs = _check_packed(block_mask).to_dense().flatten(2).to(torch.uint8)
    pairs = torch.nn.functional.pad(pairs, (0, -pairs.shape[2] % BYTE)).unflatten(2, (-1, BYTE))
    bits: Tensor = (pairs << torch.arange(BYTE, dtype=torch.uint8, device=pairs.device)).sum(-1, dtype=torch.uint8)
    return bits


@builder
def from_ranges(
    q_ranges: Sequence[tuple[int, int]] | Tensor,
    k_ranges: Sequence[tuple[int, int]] | Tensor,
    types: Sequence[int] | Tensor | None = None,
    *,
    q_len: int | None = None,
) -> Mask:
    """MagiAttention: rectangles of queries and keys, `[start, end)` each, with a type.

    Args:
        q_ranges, k_ranges: as many of each, pairs or int `[ranges, 2]`. Read by the host.
        types: 0 all pairs (the default), 1 causal from the lower right corner, 2 from the upper left corner on, 3 both;
            ints or int `[ranges]`.
        q_len: queries in all, those of no range see nothing; default the end of the last range.

    Raises:
        ValueError: numbers of ranges that differ, a range that ends before it starts, another type, a q_len that ranges
            exceed. TypeError: no ranges of ints.
    """
    q_pairs, k_pairs = _pairs("q_ranges", q_ranges), _pairs("k_ranges", k_ranges)
    if types is None:
        kinds = torch.zeros(len(q_pairs), dtype=torch.int64)
    else:
        kinds = _whole("types", types, "ints or an int tensor [ranges]", 1)
    if not len(q_pairs) == len(k_pairs) == len(kinds) or not len(kinds):
        raise ValueError(f"{len(q_pairs)} q_ranges, {len(k_pairs)} k_ranges, {len(kinds)} types; allowed are as many")
    q_start, q_end, k_start, k_end = *q_pairs.unbind(1), *k_pairs.unbind(1)
    bad = (q_start < 0) | (q_start > q_end) | (k_start < 0) | (k_start > k_end) | (kinds < 0) | (kinds > 3)
    if bad.any():
        first = int(bad.nonzero()[0])
        q_pair, k_pair = (tuple(pairs[first].tolist()) for pairs in (q_pairs, k_pairs))
        raise ValueError(
            f"a range is q {q_pair}, k {k_pair} of type {int(kinds[first])}; allowed are 0 <= start <= end < 2**31 and "
            "types 0 to 3"
        )
    last = int(q_end.max())
    length = last if q_len is None else check_natural("q_len", q_len)
    if length < last:
        raise ValueError(f"q_len is {length} but a range of q_ranges ends at {last}; allowed are {last} and more")
    # each query of a range sees a range of keys; those of several ranges need as many layers
    layers, number = _layers(q_pairs.tolist())
    size = q_end - q_start
    owner = torch.arange(len(size)).repeat_interleave(size)
    query = torch.arange(len(owner)) - (size.cumsum(0) - size)[owner] + q_start[owner]
    low = k_start[owner] + torch.where(kinds[owner] & 2 > 0, query - q_start[owner], 0)
    until = k_end[owner] - torch.where(kinds[owner] & 1 > 0, q_end[owner] - 1 - query, 0)
    found = torch.zeros(2, layers, length, dtype=torch.int64)
    found[:, torch.tensor(number)[owner], query] = torch.stack([low, until])
    device = q_ranges.device if isinstance(q_ranges, Tensor) else None
    lows, ends = found.to(device)[:, :, None, None].unbind(0)
    return union([Between(None, *bounds, False, "from_ranges: q_len") for bounds in zip(lows, ends, strict=True)])


def _pairs(name: str, ranges: Any) -> Tensor:
    """int64 `[ranges, 2]` on the host."""
    pairs = _whole(name, ranges, "pairs of ints or an int tensor [ranges, 2]", 2)
    if not len(pairs):
        return pairs.view(0, 2)
    if pairs.shape[1] != 2:
        raise ValueError(f"{name} has {pairs.shape[1]} numbers in a range; allowed are 2, start and end")
    return pairs


def _whole(name: str, numbers: Any, allowed: str, dims: int) -> Tensor:
    """int64 on the host, of ints in lists of `dims` levels or of a tensor."""
    if isinstance(numbers, Tensor):
        return torch.tensor(values(name, check_integers(name, numbers, (dims,))), dtype=torch.int64)
    if not isinstance(numbers, (list, tuple)):
        raise TypeError(f"{name} is a {type(numbers).__name__}; allowed are {allowed}")
    for entry in numbers:
        if dims == 1:
            check_natural(f"an entry of {name}", entry)
        elif not isinstance(entry, (list, tuple)) or len(entry) != dims:
            raise TypeError(f"an entry of {name} is {brief(entry)}; allowed are {allowed}")
        else:
            for bound in entry:
                if not -(2**63) <= check_int(f"a bound in {name}", bound) < 2**63:
                    raise ValueError(f"a bound in {name} is {bound}; allowed are 0 to 2**31 - 1")
    return torch.tensor(numbers, dtype=torch.int64)


def _layers(ranges: list[list[int]]) -> tuple[int, list[int]]:
    """The fewest layers in which no ranges overlap, 1 or more, and the layer of each range."""
    layer = [0] * len(ranges)
    busy: list[tuple[int, int]] = []
    layers = 0
    for i in sorted(range(len(ranges)), key=lambda i: ranges[i][0]):
        start, end = ranges[i]
        if busy and busy[0][0] <= start:
            layer[i] = heappop(busy)[1]
        else:
            layer[i], layers = layers, layers + 1
        heappush(busy, (end, layer[i]))
    return layers, layer


@builder
def from_xformers(bias: Any, q_len: int, kv_len: int) -> Mask:
    """The mask of an `AttentionBias` of xformers, by its `materialize`: finite values must be 0.

    Args:
        bias: anything with `materialize((q_len, kv_len))`.
        q_len, kv_len: lengths in tokens.

    Raises:
        ValueError: it adds something else than 0 and minus infinity. TypeError: it has no `materialize`.
    """
    shape = check_natural("q_len", q_len), check_natural("kv_len", kv_len)
    if not callable(getattr(bias, "materialize", None)):
        raise TypeError(f"bias is a {type(bias).__name__}; allowed is an AttentionBias of xformers")
    return from_dense(_attends(type(bias).__name__, bias.materialize(shape)))


@builder
def from_additive(tensor: Tensor) -> Mask:
    """The mask that a float tensor of 0 and minus infinity is, as SDPA and Hugging Face add it to scores.

    A query that sees nothing gives 0 here, where the smallest number in place of minus infinity gives it the mean of v.

    Args:
        tensor: float, broadcastable to `[batch, q_heads, q_len, kv_len]`, 2 to 4 dimensions: 0 = attend, and -inf or
            the smallest number of its dtype, `torch.finfo(dtype).min`, elsewhere. Read at once, so that the host waits.

    Raises:
        ValueError: it holds another value, which is a bias and no mask. TypeError: no tensor.
    """
    return from_dense(_attends("tensor", tensor))


def _attends(name: str, additive: Tensor) -> Tensor:
    """bool: where 0 is added, once it is known that elsewhere it is the least there is."""
    if not check_dense(name, additive, "a float tensor").is_floating_point() or not 2 <= additive.dim() <= 4:
        raise ValueError(
            f"{name} is {additive.dtype} of shape {tuple(additive.shape)}; allowed are floats in 2 to 4 dimensions"
        )
    additive = shared_once(additive[(None,) * (4 - additive.dim())])
    seen = additive == 0
    other = ~seen & ~(additive <= torch.finfo(additive.dtype).min)
    if other.any():
        raise ValueError(
            f"{name} adds values other than 0 and -inf, such as {float(additive[other][0])}; allowed are masks, not "
            "biases"
        )
    return seen


@builder
def from_causal_bias(bias: Any) -> Mask:
    """The mask of a `CausalBias` of `torch.nn.attention.bias`: `causal()` or `causal_lower_right()`, for its lengths.

    Raises:
        TypeError: it is none. Packing it for other lengths raises ValueError.
    """
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(bias, CausalBias):
        raise TypeError(f"bias is a {type(bias).__name__}; allowed is a CausalBias of torch.nn.attention.bias")
    seen = causal() if bias.variant == CausalVariant.UPPER_LEFT else causal_lower_right()
    return for_lengths("bias", bias.seq_len_q, bias.seq_len_kv, torch.device("cpu")) & seen


def _check_packed(block_mask: BlockMask) -> BlockMask:
    """`block_mask`, once it is known to be one."""
    if not isinstance(block_mask, BlockMask):
        kind = type(block_mask)
        raise TypeError(
            f"block_mask is a {kind.__module__}.{kind.__name__}; allowed is a BlockMask, as anymask.pack returns"
        )
    return block_mask
