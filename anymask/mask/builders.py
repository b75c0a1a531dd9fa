"""Masks by name. Each returns a lazy `Mask`; True = attend, query i and key j count from 0, lengths are in tokens.

An argument that does not fit raises ValueError, one of another type TypeError; both name it and what is allowed.
Lengths of tensors are compared when the mask is packed.
"""

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from anymask.mask.arguments import (
    abbreviate,
    builder,
    check_dense,
    check_flag,
    check_int,
    check_integers,
    check_natural,
    check_one_device,
    check_positive,
    check_sizes,
    per_token,
    shared_once,
    values,
)
from anymask.mask.expr import Mask, brief
from anymask.mask.leaves import Band, Between, Blocks, Function, Positions, Stride
from anymask.mask.parts import (
    PADDING,
    block_edges,
    blocks_of_sizes,
    bools,
    equal_ids,
    first_keys,
    flagged,
    neighbourhood,
    of_own_part,
    union,
)
from anymask.mask.parts import dense as dense
from anymask.mask.single import one_pair_at_a_time
from anymask.mask.traced import documents, preorder


@builder
def causal(offset: int = 0) -> Mask:
    """Query i attends to keys `j <= i + offset`: upper-left aligned, whatever the lengths.

    Args:
        offset: tokens by which the diagonal moves right; negative moves it left.

    >>> from anymask import pack
    >>> pack(causal(), q_len=3, kv_len=3).to_dense().int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    """
    return Band(None, check_int("offset", offset))


@builder
def causal_lower_right() -> Mask:
    """The last query attends to the last key, query i to keys `j <= i + kv_len - q_len`: decoding with a cache."""
    return Band(None, 0, lower_right=True)


@builder
def sliding_window(left: int | None, right: int | None = 0, offset: int = 0) -> Mask:
    """Query i attends to keys `i + offset - left <= j <= i + offset + right`.

    Args:
        left: tokens before the query, 0 or more; None for all of them.
        right: tokens after it, 0 or more; 0 makes the window causal, None is for all of them.
        offset: tokens by which the window moves right; with `kv_len - q_len` it counts from the last query and key.
    """
    offset = check_int("offset", offset)
    low = None if left is None else offset - check_natural("left", left)
    return Band(low, None if right is None else offset + check_natural("right", right))


@builder
def dilated(step: int, window: int) -> Mask:
    """Query i attends to keys `i, i - step, ..., i - window * step`: Longformer's dilated sliding window, causal.

    Args:
        step: tokens from one key to the next, 1 or more.
        window: keys before the query's own, 0 or more.
    """
    return sliding_window(check_positive("step", step) * check_natural("window", window)) & Stride(step)


@builder
def strided(step: int) -> Mask:
    """Query i attends to the `step` latest keys and to every key a multiple of `step` before it.

    The strided pattern of the Sparse Transformer (Child et al., 2019).

    Args:
        step: tokens, 1 or more.
    """
    return causal() & (sliding_window(check_positive("step", step) - 1) | Stride(step))


@builder
def chunked(size: int) -> Mask:
    """Queries attend to the keys of their own chunk, before and after them.

    Local attention of Llama 4 is `causal() & chunked(8192)`.

    Args:
        size: tokens of a chunk, 1 or more.
    """
    return Band(0, 0, block=check_positive("size", size))


@builder
def block_diffusion(block: int, length: int | None = None) -> Mask:
    """Tokens attend to their own block and to the blocks before it.

    Args:
        block: tokens of a block.
        length: None for one stream of tokens, as in sampling. For training, the tokens of a sequence, a multiple of
            `block`; q, k and v then hold `2 * length`: noisy tokens, then the same ones clean. A noisy block sees
            itself and the clean blocks before it, a clean one itself and the clean blocks before it (BD3-LM, Arriola
            et al., 2025).
    """
    check_positive("block", block)
    if length is None:
        return Band(None, 0, block=block)
    if check_natural("length", length) % block:
        raise ValueError(f"block_diffusion: length is {length}; allowed are multiples of block, which is {block}")
    noisy_query, noisy_key = Positions(0, length, of_query=True), Positions(0, length, of_query=False)
    before = Band(None, length // block - 1, block=block)
    own_noisy = noisy_query & noisy_key & Band(0, 0, block=block)
    return own_noisy | (~noisy_key & ((noisy_query & before) | (~noisy_query & Band(None, 0, block=block))))


@builder
def document(
    ids: Tensor | None = None,
    *,
    kv_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kv_cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Mask:
    """Queries attend to keys of their own document; `causal() & document(ids)` is a packed batch of a language model.

    Exactly one of ids, cu_seqlens and position_ids is given.

    Args:
        ids: int `[length]`, `[batch, length]` or `[batch, q_heads, length]`, the document of each token, in any order.
            -1 is padding: it sees nothing and nothing sees it.
        kv_ids: beside ids, the same for keys that are not the tokens of the queries; default ids.
        cu_seqlens: int `[documents + 1]`, where each document begins, and the end of the last. Read by the host.
        kv_cu_seqlens: beside cu_seqlens, the same for keys; default cu_seqlens.
        position_ids: int as `ids`, places of tokens in their documents; one begins where they do not grow by 1, and -1
            is padding.
    """
    given = [x is not None for x in (ids, cu_seqlens, position_ids)]
    if sum(given) != 1:
        raise ValueError(f"document takes one of ids, cu_seqlens and position_ids, {sum(given)} were given")
    name = ("ids", "cu_seqlens", "position_ids")[given.index(True)]
    for beside, kv_name, kv in (("ids", "kv_ids", kv_ids), ("cu_seqlens", "kv_cu_seqlens", kv_cu_seqlens)):
        if kv is not None and name != beside:
            raise ValueError(f"document takes {kv_name} beside {beside}, {name} was given")
    if position_ids is not None:
        positions = per_token(name, position_ids)
        here, before = positions[..., 1:], positions[..., :-1]
        # the first comparison is for steps that overflow
        starts = (here <= before) | (here - 1 != before)
        numbers = torch.nn.functional.pad(starts.cumsum(-1), (1, 0))[..., : positions.shape[2]]
        return equal_ids(f"document: {name}", torch.where(positions == PADDING, PADDING, numbers))
    if cu_seqlens is None:
        return equal_ids("document: ids", ids, "document: kv_ids", kv_ids)
    numbers, *of_keys = documents(cu_seqlens, kv_cu_seqlens)
    return equal_ids("document: cu_seqlens", numbers, "document: kv_cu_seqlens", of_keys[0] if of_keys else None)


@builder
def document_window(
    cu_seqlens: Tensor, left: int | None = None, right: int | None = 0, *, kv_cu_seqlens: Tensor | None = None
) -> Mask:
    """Causal documents, or a window in each, that count from their last query and key: flash-attn's varlen calls.

    Query p of a document with n queries and m keys attends to its keys `p + m - n - left <= j <= p + m - n + right`.

    Args:
        cu_seqlens: int `[documents + 1]`, where each document begins, and the end of the last. Read by the host.
        left: tokens before the query, 0 or more; None for all of them.
        right: tokens after it, 0 or more; 0 makes the window causal, None is for all of them.
        kv_cu_seqlens: the same as cu_seqlens for keys, of as many documents; default cu_seqlens.
    """
    number, *of_keys = documents(cu_seqlens, kv_cu_seqlens)
    kv_number = of_keys[0] if of_keys else number
    bounds, kv_bounds = (
        t.to(torch.int64) for t in (cu_seqlens, cu_seqlens if kv_cu_seqlens is None else kv_cu_seqlens)
    )
    sizes, kv_sizes = bounds.diff()[number], kv_bounds.diff()[number]
    # each query's place in the keys of its document
    place = torch.arange(len(number), device=number.device) - bounds[number] + kv_sizes - sizes
    first = 0 * place if left is None else (place - check_natural("left", left)).clamp(min=0)
    end = kv_sizes if right is None else (place + check_natural("right", right) + 1).clamp(min=0).minimum(kv_sizes)
    name = "document_window: cu_seqlens" + (" and kv_cu_seqlens" if kv_cu_seqlens is not None else "")
    keys = torch.arange(kv_number.shape[0], device=number.device)
    start = kv_bounds[number]
    low, high = ((start + x)[None, None] for x in (first, end))
    return Between(keys[None, None], low, high, of_query=False, name=name)


@builder
def key_padding(keep: Tensor) -> Mask:
    """All queries attend to the keys that are no padding.

    Args:
        keep: bool `[kv_len]`, `[batch, kv_len]` or `[batch, q_heads, kv_len]`, True for a key that is none; or int
            `[batch]`, the lengths without padding on the right.
    """
    allowed = (
        "bool [kv_len], [batch, kv_len] or [batch, q_heads, kv_len], and int [batch]; a mask of 0 and 1 as keep != 0"
    )
    if check_dense("keep", keep, "a bool or int tensor").dtype != torch.bool:
        return first_keys(check_integers("keep", keep, (1,), allowed), "key_padding: keep")
    if not 1 <= keep.dim() <= 3:
        raise ValueError(f"keep is {keep.dtype} of shape {tuple(keep.shape)}; allowed are {allowed}")
    return flagged("key_padding: keep", keep, of_query=False)


@builder
def prefix_lm(prefix_len: int | Tensor) -> Mask:
    """Causal, but all queries attend to the first `prefix_len` keys.

    Args:
        prefix_len: tokens, an int or int `[batch]`.
    """
    if isinstance(prefix_len, Tensor):
        return causal() | first_keys(check_integers("prefix_len", prefix_len, (1,)), "prefix_lm: prefix_len")
    return causal() | Positions(0, check_natural("prefix_len", prefix_len), of_query=False)


@builder
def spans(start: Tensor, end: Tensor) -> Mask:
    """Query i attends to keys `start[i] <= j < end[i]`.

    `causal() | spans(start, end)` has images, or other spans, attend both ways inside causal text: the tokens of a span
    all have its first position and its end, others have an empty range.

    Args:
        start, end: int `[q_len]`, `[batch, q_len]` or `[batch, q_heads, q_len]`.
    """
    low, high = per_token("start", start), per_token("end", end)
    check_one_device(start=start, end=end)
    return Between(None, low, high, of_query=False, name="spans: start and end")


@builder
def global_tokens(tokens: int | Tensor) -> Mask:
    """Global tokens attend to all keys, and all queries to them: Longformer's, to be combined by `|`.

    Args:
        tokens: how many of the first tokens are global; or their positions, int `[n]`, each once, read by the host; or
            bool `[length]` or `[batch, length]`, True for a global one.
    """
    if isinstance(tokens, Tensor) and tokens.dtype == torch.bool:
        name = "global_tokens: tokens"
        return flagged(name, tokens, of_query=True) | flagged(name, tokens, of_query=False)
    if isinstance(tokens, Tensor):
        listed = values("tokens", check_integers("tokens", tokens, (1,)))
        known = set(listed)
        check_natural("tokens", min(known, default=0))
        check_natural("tokens", max(known, default=0))
        if len(known) < len(listed):
            raise ValueError(f"tokens {abbreviate(listed)} has a position twice; allowed are each once, or bool flags")
        starts = sorted(t for t in known if t - 1 not in known)
        ends = sorted(t + 1 for t in known if t + 1 not in known)
    else:
        starts, ends = [0], [check_natural("tokens", tokens)]
    runs = [Positions(*run, side) for run in zip(starts, ends, strict=True) for side in (True, False)]
    return union(runs) if runs else Positions(0, 0, of_query=True)


@builder
def shared_prefix(ids: Tensor) -> Mask:
    """Queries attend to keys of their own part and to the prefix that all parts share; combine it with `causal()`.

    A question and several answers in one sequence, as in preference training and in sampling.

    Args:
        ids: int `[length]` or `[batch, length]`: 0 for the prefix, another number for each part that follows it, -1 for
            padding, which sees nothing and which nothing sees.
    """
    return of_own_part("shared_prefix: ids", ids)


@builder
def shared_question(questions: Tensor, answers: Tensor) -> Mask:
    """Queries attend to keys of their own answer and of its question, many of which lie in one sequence.

    FlashMask's mask of this name (Wang et al., 2024), for preference training; combine it with `causal()`.

    Args:
        questions: int `[length]` or `[batch, length]`, the number of each token's question, -1 for padding, which sees
            nothing and which nothing sees.
        answers: int as questions: 0 for the question itself, another number for each of its answers.
    """
    own = equal_ids("shared_question: questions", questions)
    check_one_device(questions=questions, answers=answers)
    return own & of_own_part("shared_question: answers", answers)


@builder
def tree(parents: Tensor) -> Mask:
    """Tokens attend to themselves and to their ancestors: trees of drafts, and of samples that share beginnings.

    Args:
        parents: int `[length]` or `[batch, length]`, the position of each token's parent, -1 for a root; several roots
            and any order are allowed. Read by the host.

    Raises:
        ValueError: a parent out of range, or parents that form a cycle.
    """
    first, end = preorder(per_token("parents", parents))
    return Between(first, first, end, of_query=True, name="tree: parents")


@builder
def neighbourhood_2d(shape: tuple[int, int], kernel: int | tuple[int, int]) -> Mask:
    """Pixels attend to the `kernel` pixels around them, moved inside at the borders: NATTEN (Hassani et al., 2023).

    Args:
        shape: rows and columns of the image, whose product is the length; tokens are in row order.
        kernel: pixels along rows and columns, odd, at most the shape.
    """
    return neighbourhood(2, shape, kernel)


@builder
def neighbourhood_3d(shape: tuple[int, int, int], kernel: int | tuple[int, int, int]) -> Mask:
    """`neighbourhood_2d` for a video.

    Args:
        shape: frames, rows and columns, whose product is the length.
        kernel: along each of them, odd, at most the shape.
    """
    return neighbourhood(3, shape, kernel)


@builder
def block_sparse(layout: Tensor, block: int | tuple[int | Tensor, int | Tensor]) -> Mask:
    """Query i attends to key j where `layout[..., i // block, j // block]`. Blocks may have sizes of their own.

    Args:
        layout: bool `[q blocks, kv blocks]`, `[q_heads, ...]` or `[batch, q_heads, ...]`.
        block: tokens of a block; 128 and its multiples cost no bits. Or a pair, for queries and for keys: two ints, for
            lengths that are multiples of them; or the sizes of all blocks, int `[q blocks]` or `[kv blocks]`, whose
            sums are the lengths. Sizes, and the layout with them, are read by the host, and packing takes the longer
            the more runs of True a line of the layout has.
    """
    if check_dense("layout", layout, "a bool tensor").dtype != torch.bool or not 2 <= layout.dim() <= 4:
        raise ValueError(
            f"layout is {layout.dtype} {tuple(layout.shape)}; allowed is a bool tensor of 2 to 4 dimensions"
        )
    layout = shared_once(layout[(None,) * (4 - layout.dim())])
    if not isinstance(block, (tuple, list)):
        return Blocks(layout.clone(), check_positive("block", block))
    if len(block) != 2:
        raise ValueError(f"block is {brief(block)}; allowed are an int and a pair")
    if any(isinstance(size, Tensor) for size in block):
        edges = [block_edges(layout, dim, block[dim - 2]) for dim in (2, 3)]
        return blocks_of_sizes(layout, *edges)
    sizes = check_sizes("block", block, 2)
    size = gcd(*sizes)
    wide = layout.repeat_interleave(sizes[0] // size, 2).repeat_interleave(sizes[1] // size, 3)
    return Blocks(wide, size)


@builder
def random_blocks(
    q_len: int, kv_len: int, share: float, *, block: int = 128, generator: torch.Generator | None = None
) -> Mask:
    """`block_sparse` with each block there with probability `share`.

    Args:
        q_len, kv_len: lengths that the mask is for.
        share: 0 to 1.
        block: tokens of a block.
        generator: of random numbers; blocks are drawn on its device, by default the CPU.
    """
    blocks = [
        -(-check_natural(n, x) // check_positive("block", block)) for n, x in (("q_len", q_len), ("kv_len", kv_len))
    ]
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"share is a {type(share).__name__}; allowed is a float")
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; allowed are 0 to 1")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; allowed are None and a torch.Generator")
    device = "cpu" if generator is None else generator.device
    return block_sparse(torch.rand(blocks, generator=generator, device=device) < share, block)


@builder
def from_function(
    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], *, batch: int = 1, heads: int = 1, vectorised: bool = False
) -> Mask:
    """A mask from a function of indices, such as a `mask_mod` of FlexAttention.

    Args:
        fn: `fn(b, h, q_idx, kv_idx)` of single indices, int64 tensors of no dimensions; returns one bool. It may read
            tensors that it has captured, on the device where the mask is packed, also by `table[b][q_idx]`. It is
            called under `torch.vmap`, for the pairs of up to 1024 tiles at a time, 2048 on a GPU.
        batch, heads: samples and query heads that it tells apart; 1 if it reads no `b`, or no `h`.
        vectorised: call fn without `torch.vmap`, with index tensors of several dimensions that broadcast, for a bool
            tensor that broadcasts to their shape: for what vmap cannot run.
    """
    if not callable(fn):
        raise TypeError(f"fn is a {type(fn).__name__}; allowed is a function of b, h, q_idx, kv_idx")
    many = fn if check_flag("vectorised", vectorised) else one_pair_at_a_time(fn)
    return Function(many, check_positive("batch", batch), check_positive("heads", heads))


@builder
def from_dense(tensor: Tensor) -> Mask:
    """A mask read from a tensor, which it keeps and does not copy: what counts is what `pack` finds in it.

    Args:
        tensor: bool, broadcastable to `[batch, q_heads, q_len, kv_len]`; 2 to 4 dimensions, missing ones are shared.
            A stride-0 (expanded) batch or head dimension is read, and stored, once.

    Raises:
        TypeError: not a tensor. ValueError: not bool, or not 2 to 4 dimensions.
    """
    return bools(check_dense("tensor", tensor, "a bool tensor"), "tensor")
