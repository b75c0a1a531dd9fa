"""Masks by name. Each returns a lazy `Mask`; True = attend, query i and key j count from 0, lengths are in tokens.

An argument that does not fit raises ValueError, one of another type TypeError; both name it and what is allowed.
Lengths of tensors are compared when the mask is packed.
"""

from collections.abc import Callable
from functools import reduce
from itertools import pairwise, zip_longest
from operator import and_

import torch
from torch import Tensor

from anymask.mask.expr import Mask
from anymask.mask.leaves import Band, Between, Blocks, Dense, Equal, Function, Positions, Stride


def causal(offset: int = 0) -> Mask:
    """Query i attends to keys `j <= i + offset`: upper-left aligned, whatever the lengths.

    Args:
        offset: tokens by which the diagonal moves right; negative moves it left.

    >>> from anymask import pack
    >>> pack(causal(), q_len=3, kv_len=3).to_dense().int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    """
    return Band(None, _integer("offset", offset))


def causal_lower_right() -> Mask:
    """The last query attends to the last key, query i to keys `j <= i + kv_len - q_len`: decoding with a cache."""
    return Band(None, 0, lower_right=True)


def sliding_window(left: int, right: int = 0) -> Mask:
    """Query i attends to keys `i - left <= j <= i + right`.

    Args:
        left: tokens before the query, 0 or more.
        right: tokens after it, 0 or more; 0 makes the window causal.
    """
    return Band(-_natural("left", left), _natural("right", right))


def dilated(step: int, window: int) -> Mask:
    """Query i attends to keys `i, i - step, ..., i - window * step`: Longformer's dilated sliding window, causal.

    Args:
        step: tokens from one key to the next, 1 or more.
        window: keys before the query's own, 0 or more.
    """
    return sliding_window(_positive("step", step) * _natural("window", window)) & Stride(step)


def strided(step: int) -> Mask:
    """Query i attends to the `step` latest keys and to every key a multiple of `step` before it.

    The strided pattern of the Sparse Transformer (Child et al., 2019).

    Args:
        step: tokens, 1 or more.
    """
    return causal() & (sliding_window(_positive("step", step) - 1) | Stride(step))


def chunked(size: int) -> Mask:
    """Queries attend to the keys of their own chunk, before and after them.

    Local attention of Llama 4 is `causal() & chunked(8192)`.

    Args:
        size: tokens of a chunk, 1 or more.
    """
    return Band(0, 0, block=_positive("size", size))


def block_diffusion(block: int, length: int | None = None) -> Mask:
    """Tokens attend to their own block and to the blocks before it.

    Args:
        block: tokens of a block.
        length: None for one stream of tokens, as in sampling. For training, the tokens of a sequence, a multiple of
            `block`; q, k and v then hold `2 * length`: noisy tokens, then the same ones clean. A noisy block sees
            itself and the clean blocks before it, a clean one itself and the clean blocks before it (BD3-LM, Arriola
            et al., 2025).
    """
    _positive("block", block)
    if length is None:
        return Band(None, 0, block=block)
    if _natural("length", length) % block:
        raise ValueError(f"block_diffusion: length is {length}; allowed are multiples of block, which is {block}")
    noisy_query, noisy_key = Positions(0, length, of_query=True), Positions(0, length, of_query=False)
    before = Band(None, length // block - 1, block=block)
    own_noisy = noisy_query & noisy_key & Band(0, 0, block=block)
    return own_noisy | (~noisy_key & ((noisy_query & before) | (~noisy_query & Band(None, 0, block=block))))


def document(
    ids: Tensor | None = None,
    *,
    kv_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Mask:
    """Queries attend to keys of their own document; `causal() & document(ids)` is a packed batch of a language model.

    Exactly one of ids, cu_seqlens and position_ids is given.

    Args:
        ids: int `[length]`, `[batch, length]` or `[batch, q_heads, length]`, the document of each token, in any order.
        kv_ids: beside ids, the same for keys that are not the tokens of the queries; default ids.
        cu_seqlens: int `[documents + 1]`, where each document begins, and the end of the last. Read by the host.
        position_ids: int as `ids`, places of tokens in their documents; one begins where they do not grow by 1.
    """
    given = [x is not None for x in (ids, cu_seqlens, position_ids)]
    if sum(given) != 1:
        raise ValueError(f"document takes one of ids, cu_seqlens and position_ids, {sum(given)} were given")
    name = ("ids", "cu_seqlens", "position_ids")[given.index(True)]
    if kv_ids is not None and ids is None:
        raise ValueError(f"document takes kv_ids beside ids, {name} was given")
    if position_ids is not None:
        positions = _per_token(name, position_ids)
        starts = positions.diff(dim=-1, prepend=positions[..., :1] - 1) != 1
        labels = starts.cumsum(-1)
    elif cu_seqlens is not None:
        labels = _labels(cu_seqlens)
    else:
        labels = _per_token(name, ids)
    return _same(name, labels, kv_ids)


def key_padding(keep: Tensor) -> Mask:
    """All queries attend to the keys that are no padding.

    Args:
        keep: bool `[batch, kv_len]`, True for a key that is none; or int `[batch]`, the lengths without padding on the
            right.
    """
    if isinstance(keep, Tensor) and keep.dtype == torch.bool:
        return _flagged("keep", keep, of_query=False)
    return _first(whole_numbers("keep", keep, (1,)), "keep")


def prefix_lm(prefix_len: int | Tensor) -> Mask:
    """Causal, but all queries attend to the first `prefix_len` keys.

    Args:
        prefix_len: tokens, an int or int `[batch]`.
    """
    if isinstance(prefix_len, Tensor):
        return causal() | _first(whole_numbers("prefix_len", prefix_len, (1,)), "prefix_len")
    return causal() | Positions(0, _natural("prefix_len", prefix_len), of_query=False)


def spans(start: Tensor, end: Tensor) -> Mask:
    """Query i attends to keys `start[i] <= j < end[i]`.

    `causal() | spans(start, end)` has images, or other spans, attend both ways inside causal text: the tokens of a span
    all have its first position and its end, others have an empty range.

    Args:
        start, end: int `[q_len]`, `[batch, q_len]` or `[batch, q_heads, q_len]`.
    """
    return Between(None, _per_token("start", start), _per_token("end", end), of_query=False, name="start and end")


def global_tokens(tokens: int | Tensor) -> Mask:
    """Global tokens attend to all keys, and all queries to them: Longformer's, to be combined by `|`.

    Args:
        tokens: how many of the first tokens are global; or their positions, int `[n]`, each once, read by the host; or
            bool `[length]` or `[batch, length]`, True for a global one.
    """
    if isinstance(tokens, Tensor) and tokens.dtype == torch.bool:
        return _flagged("tokens", tokens, of_query=True) | _flagged("tokens", tokens, of_query=False)
    if isinstance(tokens, Tensor):
        known = set(whole_numbers("tokens", tokens, (1,)).tolist())
        _natural("tokens", min(known, default=0))
        if len(known) < len(tokens):
            raise ValueError(
                f"tokens {_few(tokens.tolist())} has a position twice; allowed are each once, or bool flags"
            )
        starts = sorted(t for t in known if t - 1 not in known)
        ends = sorted(t + 1 for t in known if t + 1 not in known)
    else:
        starts, ends = [0], [_natural("tokens", tokens)]
    masks: list[Mask] = [Positions(*run, side) for run in zip(starts, ends, strict=True) for side in (True, False)]
    # by halves: a chain of hundreds is too deep for Python
    while len(masks) > 1:
        masks = [a if b is None else a | b for a, b in zip_longest(masks[::2], masks[1::2])]
    return masks[0] if masks else Positions(0, 0, of_query=True)


def shared_prefix(ids: Tensor) -> Mask:
    """Queries attend to keys of their own part and to the prefix that all parts share; combine it with `causal()`.

    A question and several answers in one sequence, as in preference training and in sampling.

    Args:
        ids: int `[length]` or `[batch, length]`: 0 for the prefix, another number for each part that follows it.
    """
    return _of_own_part("ids", ids)


def shared_question(questions: Tensor, answers: Tensor) -> Mask:
    """Queries attend to keys of their own answer and of its question, many of which lie in one sequence.

    FlashMask's mask of this name (Wang et al., 2024), for preference training; combine it with `causal()`.

    Args:
        questions: int `[length]` or `[batch, length]`, the number of each token's question.
        answers: int as questions: 0 for the question itself, another number for each of its answers.
    """
    return _same("questions", questions) & _of_own_part("answers", answers)


def tree(parents: Tensor) -> Mask:
    """Tokens attend to themselves and to their ancestors: trees of drafts, and of samples that share beginnings.

    Args:
        parents: int `[length]` or `[batch, length]`, the position of each token's parent, -1 for a root; several roots
            and any order are allowed. Read by the host.

    Raises:
        ValueError: a parent out of range, or parents that form a cycle.
    """
    labels = _per_token("parents", parents)
    numbered = [_preorder(row) for row in labels.flatten(0, 1).tolist()]
    first, end = torch.tensor(numbered, dtype=torch.long, device=parents.device).view(-1, 2, labels.shape[2]).unbind(1)
    shape = labels.shape
    return Between(first.reshape(shape), first.reshape(shape), end.reshape(shape), of_query=True, name="parents")


def neighbourhood_2d(shape: tuple[int, int], kernel: int | tuple[int, int]) -> Mask:
    """Pixels attend to the `kernel` pixels around them, moved inside at the borders: NATTEN (Hassani et al., 2023).

    Args:
        shape: rows and columns of the image, whose product is the length; tokens are in row order.
        kernel: pixels along rows and columns, odd, at most the shape.
    """
    return _neighbourhood(2, shape, kernel)


def neighbourhood_3d(shape: tuple[int, int, int], kernel: int | tuple[int, int, int]) -> Mask:
    """`neighbourhood_2d` for a video.

    Args:
        shape: frames, rows and columns, whose product is the length.
        kernel: along each of them, odd, at most the shape.
    """
    return _neighbourhood(3, shape, kernel)


def block_sparse(layout: Tensor, block: int) -> Mask:
    """Query i attends to key j where `layout[..., i // block, j // block]`.

    Args:
        layout: bool `[q blocks, kv blocks]`, `[q_heads, ...]` or `[batch, q_heads, ...]`.
        block: tokens of a block; 128 and its multiples cost no bits.
    """
    if not isinstance(layout, Tensor) or layout.dtype != torch.bool or not 2 <= layout.dim() <= 4:
        what = f"{layout.dtype} {tuple(layout.shape)}" if isinstance(layout, Tensor) else type(layout).__name__
        raise ValueError(f"layout is {what}; allowed is a bool tensor of 2 to 4 dimensions")
    return Blocks(layout[(None,) * (4 - layout.dim())], _positive("block", block))


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
    blocks = [-(-_natural(n, x) // _positive("block", block)) for n, x in (("q_len", q_len), ("kv_len", kv_len))]
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; allowed are 0 to 1")
    device = None if generator is None else generator.device
    return block_sparse(torch.rand(blocks, generator=generator, device=device) < share, block)


def from_function(fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], *, batch: int = 1, heads: int = 1) -> Mask:
    """A mask from a function of indices, such as a `mask_mod` of FlexAttention.

    Args:
        fn: `fn(b, h, q_idx, kv_idx)` of int64 tensors that broadcast, returns bool; it may read tensors that it has
            captured, on the device where the mask is packed. It is called on the pairs of up to 1024 tiles at a time,
            2048 on a GPU.
        batch, heads: samples and query heads that it tells apart; 1 if it reads no `b`, or no `h`.
    """
    if not callable(fn):
        raise TypeError(f"fn is a {type(fn).__name__}; allowed is a function of b, h, q_idx, kv_idx")
    return Function(fn, _positive("batch", batch), _positive("heads", heads))


def from_dense(tensor: Tensor) -> Mask:
    """A mask read from a tensor.

    Args:
        tensor: bool, broadcastable to `[batch, q_heads, q_len, kv_len]`; 2 to 4 dimensions, missing ones are shared.
            A stride-0 (expanded) batch or head dimension is read, and stored, once.

    Raises:
        TypeError: not a tensor. ValueError: not bool, or not 2 to 4 dimensions.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"mask is a {type(tensor).__name__}; allowed are None, a bool tensor, a Mask, a BlockMask")
    if tensor.dtype != torch.bool:
        raise ValueError(
            f"mask has dtype {tensor.dtype}; allowed is torch.bool (True = attend). "
            "A float mask would be an additive bias, which attention does not take; "
            "for a mask of 0 and 1 pass mask != 0"
        )
    return dense(tensor)


def dense(tensor: Tensor) -> Dense:
    """`from_dense` for a tensor of any dtype, non-zero = attend."""
    if not 2 <= tensor.dim() <= 4:
        raise ValueError(
            f"mask has shape {tuple(tensor.shape)}, {tensor.dim()} dimensions; allowed are 2 to 4, "
            "broadcastable to [batch, q_heads, q_len, kv_len]"
        )
    tensor = tensor[(None,) * (4 - tensor.dim())]
    for dim in (0, 1):
        if tensor.shape[dim] > 1 and tensor.stride(dim) == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return Dense(tensor)


def _neighbourhood(dims: int, shape: tuple[int, ...], kernel: int | tuple[int, ...]) -> Mask:
    kernels = (kernel,) * dims if isinstance(kernel, int) else tuple(kernel)
    if len(shape) != dims or len(kernels) != dims:
        raise ValueError(f"shape is {shape} and kernel {kernel}; allowed are {dims} sizes each")
    for n, size in zip(shape, kernels, strict=True):
        if not 1 <= _positive("kernel", size) <= _positive("shape", n) or size % 2 == 0:
            raise ValueError(f"kernel is {kernel}; allowed are odd sizes of at most the shape, which is {shape}")
    masks: list[Mask] = []
    places = torch.cartesian_prod(*map(torch.arange, shape))[None, None].unbind(-1)
    for place, n, size in zip(places, shape, kernels, strict=True):
        first = (place - size // 2).clamp(0, n - size)
        masks.append(Between(place, first, first + size, of_query=False, name="the product of shape"))
    return reduce(and_, masks)


def _labels(cu_seqlens: Tensor) -> Tensor:
    """int64 `[1, 1, length]`: the document of each token."""
    bounds = whole_numbers("cu_seqlens", cu_seqlens, (1,)).tolist()
    if len(bounds) < 1 or bounds[0] != 0 or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens is {_few(bounds)}; allowed are numbers that start at 0 and do not decrease")
    sizes = cu_seqlens.long().diff()
    numbers = torch.arange(len(sizes), device=cu_seqlens.device)
    return numbers.repeat_interleave(sizes, output_size=bounds[-1])[None, None]


def _preorder(parents: list[int]) -> tuple[list[int], list[int]]:
    """Each token's place in a walk that visits children after their parent, and the place after its last descendant."""
    children: list[list[int]] = [[] for _ in parents]
    roots: list[int] = []
    for token, parent in enumerate(parents):
        if not -1 <= parent < len(parents):
            raise ValueError(f"parents[{token}] is {parent}; allowed are -1 to {len(parents) - 1}")
        (roots if parent < 0 else children[parent]).append(token)
    walk: list[int] = []
    first, end = [-1] * len(parents), [0] * len(parents)
    stack = roots[::-1]
    while stack:
        token = stack.pop()
        first[token] = len(walk)
        walk.append(token)
        stack += children[token][::-1]
    if len(walk) < len(parents):
        raise ValueError(f"parents form a cycle through token {first.index(-1)}; allowed are trees")
    for token in reversed(walk):
        end[token] = max([first[token] + 1, *(end[child] for child in children[token])])
    return first, end


def _per_token(name: str, t: Tensor | None) -> Tensor:
    """int64 `[batch or 1, heads or 1, length]`."""
    t = whole_numbers(name, t, (1, 2, 3)).long()
    return t[None, None] if t.dim() == 1 else t[:, None] if t.dim() == 2 else t


def whole_numbers(name: str, t: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    """`t`, once it is known to be an integer tensor of one of `dims` dimensions."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}; allowed is an int tensor")
    if t.dtype == torch.bool or t.is_floating_point() or t.is_complex() or t.dim() not in dims:
        allowed = " or ".join(map(str, dims))
        raise ValueError(f"{name} is {t.dtype} of shape {tuple(t.shape)}; allowed are integers in {allowed} dimensions")
    return t


def _flagged(name: str, flags: Tensor, of_query: bool) -> Mask:
    """Attends where the flag of the query, or else of the key, is set."""
    one = torch.ones((1, 1), dtype=torch.long, device=flags.device)
    return Between(_per_token(name, flags.long()), one, one + 1, of_query, name)


def _same(name: str, ids: Tensor, kv_ids: Tensor | None = None) -> Mask:
    """Attends where query and key have the same number; the keys have those of the queries, or `kv_ids`."""
    labels = _per_token(name, ids)
    kv_labels = labels if kv_ids is None else _per_token("kv_ids", kv_ids)
    return Equal(labels, kv_labels, name, name if kv_ids is None else "kv_ids")


def _of_own_part(name: str, ids: Tensor) -> Mask:
    """Attends to the own part and to part 0."""
    return _same(name, ids) | _flagged(name, ids == 0, of_query=False)


def _first(lengths: Tensor, name: str) -> Mask:
    """Attends to the first `lengths [batch]` keys."""
    end = lengths.long()[:, None]
    return Between(None, torch.zeros_like(end), end, False, name)


def _few(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"


def _positive(name: str, value: int) -> int:
    if _integer(name, value) < 1:
        raise ValueError(f"{name} is {value}; allowed are 1 and more")
    return value


def _natural(name: str, value: int) -> int:
    if _integer(name, value) < 0:
        raise ValueError(f"{name} is {value}; allowed are 0 and more")
    return value


def _integer(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; allowed is an int")
    return value
