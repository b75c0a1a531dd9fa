"""Every public builder with arguments drawn from a seed, beside its definition by positions alone.

Names are `drawn_` and the builder's. What is drawn are numbers and the contents of tensors, never how many parts a mask
has: a GPU compiles a packing kernel for each such structure.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import anymask
from anymask import Mask, causal, from_dense
from anymask.testing.masks import NamedMask, Sizes, register

# name -> as in `anymask.testing.MASKS`
BUILDERS: dict[str, Callable[..., NamedMask]] = {}
# those whose tokens are queries and keys, so that both have one length
SQUARE: set[str] = set()


def _drawn(make: Callable[[Sizes], NamedMask]) -> Callable[[Sizes], NamedMask]:
    register(BUILDERS, make)
    return make


def _drawn_square(make: Callable[[Sizes], NamedMask]) -> Callable[[Sizes], NamedMask]:
    def checked(m: Sizes) -> NamedMask:
        if m.q_len != m.kv_len:
            raise ValueError(f"{make.__name__.strip('_')} is for q_len == kv_len; got {m.q_len} and {m.kv_len}")
        return make(m)

    checked.__name__ = make.__name__
    SQUARE.add(make.__name__.strip("_"))
    register(BUILDERS, checked)
    return make


def _planes(t: Tensor) -> tuple[Tensor, Tensor]:
    """A value of each token, `[length]`, `[batch, length]` or `[batch, heads, length]`, by query and by key."""
    t = t[None, None] if t.dim() == 1 else t[:, None] if t.dim() == 2 else t
    return t[..., :, None], t[..., None, :]


@_drawn
def _drawn_causal(m: Sizes) -> NamedMask:
    offset = m.number(-m.longest, m.longest)
    return causal(offset), m.j <= m.i + offset


@_drawn
def _drawn_sliding_window(m: Sizes) -> NamedMask:
    left, right = m.number(0, m.longest), m.number(0, m.longest)
    return anymask.sliding_window(left, right), (m.j >= m.i - left) & (m.j <= m.i + right)


@_drawn
def _drawn_sliding_window_before(m: Sizes) -> NamedMask:
    left, offset = m.number(0, m.longest), m.number(-m.longest, m.longest)
    mask = anymask.sliding_window(left, None, offset)
    return mask, m.j >= m.i + offset - left


@_drawn
def _drawn_dilated(m: Sizes) -> NamedMask:
    step, window = m.number(1, 40), m.number(0, 20)
    return anymask.dilated(step, window), (m.j <= m.i) & ((m.i - m.j) % step == 0) & (m.i - m.j <= step * window)


@_drawn
def _drawn_strided(m: Sizes) -> NamedMask:
    step = m.number(1, 150)
    return anymask.strided(step), (m.j <= m.i) & ((m.i - m.j < step) | ((m.i - m.j) % step == 0))


@_drawn
def _drawn_chunked(m: Sizes) -> NamedMask:
    size = m.number(1, m.longest)
    return anymask.chunked(size), m.i // size == m.j // size


@_drawn
def _drawn_block_diffusion(m: Sizes) -> NamedMask:
    block = m.number(1, m.longest)
    return anymask.block_diffusion(block), m.j // block <= m.i // block


@_drawn
def _drawn_block_diffusion_training(m: Sizes) -> NamedMask:
    block = m.number(1, 40)
    length = m.longest // 2 // block * block
    i_clean, j_clean = m.i >= length, m.j >= length
    i_block, j_block = ((x - length * clean) // block for x, clean in ((m.i, i_clean), (m.j, j_clean)))
    noisy = ~i_clean & torch.where(j_clean, j_block < i_block, j_block == i_block)
    return anymask.block_diffusion(block, length), noisy | (i_clean & j_clean & (j_block <= i_block))


@_drawn_square
def _drawn_document(m: Sizes) -> NamedMask:
    # in no order, so that documents come back; -1 is padding
    ids = m.randint(m.number(1, 9), m.batch, m.q_len // 30 + 1).repeat_interleave(30, 1)[:, : m.q_len] - 4
    of_query, of_key = _planes(ids)
    return anymask.document(ids), (of_query == of_key) & (of_query != -1)


@_drawn_square
def _drawn_document_of_heads(m: Sizes) -> NamedMask:
    ids = m.labels(4, 1, m.q_heads).int()
    of_query, of_key = _planes(ids)
    return anymask.document(ids), of_query == of_key


@_drawn
def _drawn_document_kv_ids(m: Sizes) -> NamedMask:
    ids, kv_ids = m.randint(4, m.batch, m.q_len), m.labels(6, m.batch)[:, : m.kv_len]
    return anymask.document(ids, kv_ids=kv_ids), _planes(ids)[0] == _planes(kv_ids)[1]


@_drawn_square
def _drawn_document_cu_seqlens(m: Sizes) -> NamedMask:
    # empty documents too
    cuts = m.randint(m.q_len + 1, 5).sort().values
    ends = torch.tensor([0, m.q_len], device=m.device)
    mask = anymask.document(cu_seqlens=torch.cat([ends[:1], cuts, ends[1:]]).int())
    return mask, (m.i[..., None] >= cuts).sum(-1) == (m.j[..., None] >= cuts).sum(-1)


@_drawn
def _drawn_document_window(m: Sizes) -> NamedMask:
    """Five documents, some without queries or keys, with windows that count from their last query and key."""
    left, right = m.number(0, m.longest), m.number(0, 20)
    cuts = [(n, m.randint(n + 1, 4).sort().values) for n in (m.q_len, m.kv_len)]
    bounds, kv_bounds = (torch.cat([c[:1] * 0, c, c[:1] * 0 + n]) for n, c in cuts)
    mask = anymask.document_window(bounds, left, right, kv_cu_seqlens=kv_bounds)
    dense = m.zeros(m.q_len, m.kv_len)
    for q, q_end, k, k_end in zip(*(x.tolist() for x in (bounds, bounds[1:], kv_bounds, kv_bounds[1:])), strict=False):
        behind = (m.j - k_end) - (m.i - q_end)
        inside = (m.i >= q) & (m.i < q_end) & (m.j >= k) & (m.j < k_end)
        dense = dense | (inside & (behind >= -left) & (behind <= right))
    return mask, dense


@_drawn_square
def _drawn_document_position_ids(m: Sizes) -> NamedMask:
    size = m.number(1, m.q_len)
    positions = (torch.arange(m.q_len, device=m.device) % size).expand(m.batch, -1)
    # documents of one token count 0, 0, 0, ...
    return causal() & anymask.document(position_ids=positions), (m.j <= m.i) & (m.i // size == m.j // size)


@_drawn
def _drawn_key_padding(m: Sizes) -> NamedMask:
    keep = m.rand(m.batch, m.kv_len) < 0.7
    return anymask.key_padding(keep), keep[:, None, None]


@_drawn
def _drawn_key_padding_lengths(m: Sizes) -> NamedMask:
    lengths = m.randint(m.kv_len + 1, m.batch)
    return anymask.key_padding(lengths), m.j < lengths[:, None, None, None]


@_drawn
def _drawn_prefix_lm(m: Sizes) -> NamedMask:
    prefix_len = m.number(0, m.kv_len)
    return anymask.prefix_lm(prefix_len), (m.j <= m.i) | (m.j < prefix_len)


@_drawn
def _drawn_prefix_lm_of_samples(m: Sizes) -> NamedMask:
    prefix_len = m.randint(m.kv_len + 1, m.batch)
    return anymask.prefix_lm(prefix_len), (m.j <= m.i) | (m.j < prefix_len[:, None, None, None])


@_drawn
def _drawn_spans(m: Sizes) -> NamedMask:
    # any range of each query; some are empty, some end beyond the keys
    start = m.randint(m.kv_len + 1, m.batch, m.q_heads, m.q_len)
    end = start + m.randint(m.kv_len + 1, m.batch, m.q_heads, m.q_len) - 3
    return anymask.spans(start, end), (m.j >= start[..., None]) & (m.j < end[..., None])


@_drawn_square
def _drawn_spans_in_text(m: Sizes) -> NamedMask:
    labels = m.labels(7, m.batch)
    flags = labels % 2 == 1
    same = labels[:, :, None] == labels[:, None, :]
    start = torch.where(flags, same.int().argmax(-1), 0)
    end = torch.where(flags, start + same.sum(-1), 0)
    return causal() | anymask.spans(start, end), (m.j <= m.i) | (same & flags[..., None])[:, None]


@_drawn
def _drawn_global_tokens(m: Sizes) -> NamedMask:
    tokens = m.number(0, m.longest)
    return anymask.global_tokens(tokens), (m.i < tokens) | (m.j < tokens)


@_drawn_square
def _drawn_global_flags(m: Sizes) -> NamedMask:
    flags = m.rand(m.batch, m.q_len) < 0.1
    of_query, of_key = _planes(flags)
    return anymask.global_tokens(flags), of_query | of_key


@_drawn
def _drawn_global_positions(m: Sizes) -> NamedMask:
    # two runs, whatever is drawn
    first, more = m.number(0, m.longest), m.number(2, m.longest + 2)
    tokens = torch.tensor([first + more, first], device=m.device)
    return anymask.global_tokens(tokens), ((m.i[..., None] == tokens) | (m.j[..., None] == tokens)).any(-1)


@_drawn_square
def _drawn_shared_prefix(m: Sizes) -> NamedMask:
    ids = m.labels(5, m.batch)
    of_query, of_key = _planes(ids)
    return causal() & anymask.shared_prefix(ids), (m.j <= m.i) & ((of_key == 0) | (of_key == of_query))


@_drawn_square
def _drawn_shared_question(m: Sizes) -> NamedMask:
    questions, answers = m.labels(3, m.batch), m.randint(3, m.batch, m.q_len)
    q_question, k_question = _planes(questions)
    q_answer, k_answer = _planes(answers)
    own = (q_question == k_question) & ((k_answer == 0) | (k_answer == q_answer))
    return causal() & anymask.shared_question(questions, answers), own & (m.j <= m.i)


@_drawn_square
def _drawn_tree(m: Sizes) -> NamedMask:
    """A forest in no particular order, one a sample."""
    at = torch.arange(m.q_len, device=m.device)
    earlier = (m.rand(m.batch, m.q_len) * (at + 1)).long() - 1
    places = m.rand(m.batch, m.q_len).argsort(-1)
    moved = torch.where(earlier < 0, -1, places.gather(1, earlier.clamp(min=0)))
    parents = torch.empty_like(moved).scatter_(1, places, moved)
    # columns of what each token reaches by 1, 2, 4, ... steps
    step = (parents[..., None] == at).double()
    found = torch.eye(m.q_len, dtype=torch.float64, device=m.device) + step
    for _ in range(m.q_len.bit_length()):
        step = step @ step
        found = (found + step @ found).clamp(max=1)
    return anymask.tree(parents), found[:, None] > 0


@_drawn_square
def _drawn_neighbourhood_2d(m: Sizes) -> NamedMask:
    return _neighbourhood(m, 2)


@_drawn_square
def _drawn_neighbourhood_3d(m: Sizes) -> NamedMask:
    return _neighbourhood(m, 3)


def _neighbourhood(m: Sizes, dims: int) -> NamedMask:
    shape, left = [], m.q_len
    for _ in range(dims - 1):
        factors = [n for n in range(1, left + 1) if left % n == 0]
        shape.append(factors[m.number(0, len(factors) - 1)])
        left //= shape[-1]
    shape.append(left)
    kernel = [2 * m.number(0, (n - 1) // 2) + 1 for n in shape]
    dense = ~m.zeros(m.q_len, m.kv_len)
    i, j = m.i, m.j
    for n, size in zip(reversed(shape), reversed(kernel), strict=True):
        at, key = i % n, j % n
        first = (at - size // 2).clamp(0, n - size)
        dense = dense & (key >= first) & (key < first + size)
        i, j = i // n, j // n
    builder: Callable[..., Mask] = anymask.neighbourhood_2d if dims == 2 else anymask.neighbourhood_3d
    return builder(tuple(shape), tuple(kernel)), dense


@_drawn
def _drawn_block_sparse(m: Sizes) -> NamedMask:
    return _blocks(m, (16, 48, 100, 129)[m.number(0, 3)], m.q_heads)


@_drawn
def _drawn_block_sparse_of_tiles(m: Sizes) -> NamedMask:
    return _blocks(m, (128, 256)[m.number(0, 1)], 1)


@_drawn
def _drawn_block_sparse_of_sizes(m: Sizes) -> NamedMask:
    """Nine blocks of any sizes, those of a fixed pattern: how many parts such a mask has follows from it."""
    layout = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 0]], dtype=torch.bool, device=m.device)
    cuts = [m.randint(n + 1, 2).sort().values for n in (m.q_len, m.kv_len)]
    sizes = [torch.cat([c[:1], c.diff(), n - c[1:]]) for c, n in zip(cuts, (m.q_len, m.kv_len), strict=True)]
    i, j = ((x[..., None] >= c).sum(-1) for x, c in zip((m.i, m.j), cuts, strict=True))
    return anymask.block_sparse(layout, (sizes[0], sizes[1])), layout[i, j]


def _blocks(m: Sizes, block: int, heads: int) -> NamedMask:
    counts = [-(-n // block) for n in (m.q_len, m.kv_len)]
    layout = m.rand(m.batch, heads, *counts) < 0.4
    return anymask.block_sparse(layout, block), layout[:, :, (m.i // block)[:, 0]][..., (m.j // block)[0]]


@_drawn
def _drawn_random_blocks(m: Sizes) -> NamedMask:
    share, block, seed = m.number(0, 10) / 10, m.number(1, 100), m.number(0, 2**20)
    again = [torch.Generator().manual_seed(seed) for _ in range(2)]
    mask = anymask.random_blocks(m.q_len, m.kv_len, share, block=block, generator=again[0]).to(m.device)
    layout = (torch.rand(-(-m.q_len // block), -(-m.kv_len // block), generator=again[1]) < share).to(m.device)
    return mask, layout[m.i // block, m.j // block]


@_drawn
def _drawn_from_function(m: Sizes) -> NamedMask:
    step = m.number(2, 9)
    b, h = (torch.arange(n, device=m.device) for n in (m.batch, m.q_heads))
    mask = anymask.from_function(
        lambda b, h, q_idx, kv_idx: (q_idx * (b + 1) + kv_idx * (h + 1)) % step == 1, batch=m.batch, heads=m.q_heads
    )
    return mask, (m.i * (b[:, None, None, None] + 1) + m.j * (h[:, None, None] + 1)) % step == 1


@_drawn
def _drawn_from_dense(m: Sizes) -> NamedMask:
    shape = [n if m.number(0, 1) else 1 for n in (m.batch, m.q_heads, m.q_len, m.kv_len)]
    dense = m.rand(*shape) < (0.0, 0.01, 0.3, 0.5, 0.99, 1.0)[m.number(0, 5)]
    dense = dense.mT.contiguous().mT if m.number(0, 1) else dense
    return from_dense(dense), dense
