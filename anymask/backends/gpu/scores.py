"""What scores need around the kernels: their terms as kernels take them, and the gradients of these terms.

The gradient of a bias is the sum of ds over what shares the bias. Four ways, none of which depends on an order:

- a bias of the keys alone: the dk, dv kernel sums its ds over queries on the way;
- a bias of the queries alone, or of neither: rows of ds sum to 0 but for what dlse and the sinks add, which is known;
  a soft cap breaks this, and the dq kernel sums its ds over keys;
- a bias of pairs: a kernel makes ds again, block by block, and sums each over samples and heads that share it;
- a table: the same kernel sums diagonals, unless the dk, dv kernel has (hopper/diagonals.py), or, where codes are not
  positions, chunks of pairs that torch then sums.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymask.backends.gpu.arguments import LOG2_E, launch_triton, plane_strides, source
from anymask.backends.gpu.passes import BackwardCall
from anymask.backends.gpu.sinks import sink_gradient, sink_weights
from anymask.block_mask import BlockMask
from anymask.scores import Lookup, Needs, ScoreGrads, Scores, dropout
from anymask.tiles import TILE, tiles_over

# of a table's codes, pairs whose gradients exist at a time: 64 MiB
CHUNK = 2**24
# programs that fill a GPU, below which sums are made in parts
PROGRAMS = 264
# most parts of a sum, and the pairs that all of them may hold
MAX_PARTS, MAX_PAIRS = 64, 2**24

# most numbers of the tiles of a table's diagonals: 1 GiB
MAX_STRIPS = 2**28

# constants of a kernel, and options of its launch
Options: TypeAlias = tuple[dict[str, Any], dict[str, Any]]

DENSE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not_scores(scores: Scores | None) -> str | None:
    """Why the kernels cannot take the scores, or None."""
    for term in () if scores is None else scores.dense:
        if term.dtype not in DENSE_DTYPES:
            return f"a bias is {term.dtype}, the kernels take {', '.join(map(str, DENSE_DTYPES))}"
    return None


class _Parts(NamedTuple):
    """Terms by how kernels read them; `tiled`: what the copy engine reads, and its query tiles if it is of strips."""

    dense: list[Tensor]
    tables: list[Lookup]
    tiled: tuple[Tensor, tuple[int, ...]] | None


class KernelTerms:
    """The scores of a call as kernels take them, for any block of queries and keys."""

    def __init__(self, scores: Scores, sm_scale: float, q_len: int, kv_len: int, use_tma: bool) -> None:
        """`use_tma`: whether the target has a copy engine."""
        self._factor = 2 * LOG2_E / scores.softcap if scores.softcap else LOG2_E
        self._scores, self.qk_scale = scores, sm_scale * self._factor
        self._lengths, self._use_tma = (q_len, kv_len), use_tma

    @cached_property
    def _parts(self) -> _Parts:
        """One term is tiled, since a kernel takes no descriptor inside a tuple: a dense one, or else one of diagonals.

        Made when a kernel first wants it, as not all callers launch one.
        """
        dense, tables = list(self._scores.dense), list(self._scores.lookups)
        for i, t in enumerate(dense):
            if self._use_tma and min(t.shape[2:]) > 1 and is_loadable(t):
                return _Parts(dense[:i] + dense[i + 1 :], tables, (t, ()))
        q_len, kv_len = self._lengths
        tiles = tiles_over(q_len), tiles_over(kv_len)
        for i, x in enumerate(tables):
            fits = x.is_diagonal and x.table.shape[0] * sum(tiles) * TILE * TILE <= MAX_STRIPS
            if self._use_tma and fits:
                return _Parts(dense, tables[:i] + tables[i + 1 :], (_strips(x.table, q_len, kv_len), tiles[:1]))
        return _Parts(dense, tables, None)

    @property
    def n_tables(self) -> int:
        """Tables of which kernels read an entry for each pair."""
        return len(self._parts.tables)

    def __call__(self, rows: int, keys: int) -> tuple[Any, Any]:
        """`Terms` and descriptor of a kernel whose steps have so many queries and keys."""
        from anymask.backends.gpu.kernels.scores import Bias, Dropout, Table, Terms, Tiled

        scores, p, parts = self._scores, self._scores.dropout_p, self._parts
        dense = []
        for t in parts.dense:
            b, h, q, k = (() if size == 1 else (step,) for size, step in zip(t.shape, t.stride(), strict=True))
            dense.append(Bias(t, sum(b), sum(h), q, k + k))
        tables = [
            Table(x.table, x.table.shape[1] * (x.table.shape[0] > 1), () if x.is_diagonal else (x.q_code, x.k_code))
            for x in parts.tables
        ]
        tiled: tuple[Any, ...] = ()
        blocks = None
        if parts.tiled is not None:
            t, strips = parts.tiled
            tiled, blocks = (Tiled(int(t.shape[0] > 1), int(t.shape[1] > 1), strips),), _descriptor(t, rows, keys)
        cap = (scores.softcap * LOG2_E,) if scores.softcap else ()
        sinks = () if scores.sinks is None else (scores.sinks,)
        drop = () if scores.seed is None else Dropout(scores.seed, float(dropout.threshold(p)), dropout.keep_scale(p))
        return Terms(tuple(dense), tuple(tables), tiled, self._factor, cap, sinks, drop), blocks


def is_loadable(t: Tensor) -> bool:
    """Whether the copy engine can read `t [batch, heads, rows, columns]`: rows of aligned, neighbouring elements."""
    size = t.element_size()
    steps = [step * size for n, step in zip(t.shape[:3], t.stride()[:3], strict=True) if n > 1]
    aligned = t.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return t.stride(3) == 1 and aligned


def _descriptor(t: Tensor, rows: int, keys: int) -> Any:
    # the stride of a dimension of 1 is never taken, but has to be a multiple of 16 bytes
    steps = [step if n > 1 else t.stride(2) for n, step in zip(t.shape[:2], t.stride()[:2], strict=True)]
    return source(t.as_strided(t.shape, (*steps, t.stride(2), 1)), True, rows, keys)


def _strips(table: Tensor, q_len: int, kv_len: int) -> Tensor:
    """`[1, heads, diagonals * 128, 128]`: the tiles of a table of diagonals, of which all on one diagonal are equal.

    Diagonal `kv tile - q tile + q_tiles - 1`. In the reversed table a row of a tile is a run of entries, and the row
    above it is the run that starts one entry later.
    """
    before, after = -q_len % TILE, -kv_len % TILE
    runs = pad(table.flip(1), (before, after)).unfold(1, TILE, 1)
    strips: Tensor = runs.unflatten(1, (-1, TILE)).flip(2).flatten(1, 2)[None]
    return strips


class Sums(NamedTuple):
    """fp32 sums of ds that kernels make on their way: over keys `[batch, q_heads, q_len]`, over queries `[.., kv_len]`.

    None where no bias that is asked for needs them.
    """

    queries: Tensor | None
    keys: Tensor | None


NO_SUMS = Sums(None, None)


def empty_sums(scores: Scores, needs: Needs, lse: Tensor, kv_len: int) -> Sums:
    """Memory for the sums that a call needs; `lse` is `[batch, q_heads, q_len]`."""
    shapes = [t.shape for t, needed in zip(scores.dense, needs.dense, strict=True) if needed]
    of_queries = torch.empty_like(lse) if scores.softcap and any(shape[3] == 1 for shape in shapes) else None
    of_keys = any(shape[2] == 1 < shape[3] for shape in shapes)
    return Sums(of_queries, lse.new_empty(*lse.shape[:2], kv_len) if of_keys else None)


def gradients(
    call: BackwardCall,
    scores: Scores,
    needs: Needs,
    lse: Tensor,
    dlse: Tensor | None,
    dq_dk_dv: tuple[Tensor, Tensor, Tensor],
    sums: Sums,
    pairs: PairSums,
    by_distance: Tensor | None = None,
) -> ScoreGrads:
    """All gradients of a call, after the kernels have made those of q, k and v and the `sums`.

    `by_distance`: sums of ds as `PairSums.of_diagonals` has them, of all heads, if kernels have made them.
    """
    # whole tiles, of which the last may be longer than the queries
    delta = call.delta.view(*lse.shape[:2], -1)[:, :, : lse.shape[2]]
    q_sums, k_sums = sums
    wants_rows = any(needed and t.shape[3] == 1 for t, needed in zip(scores.dense, needs.dense, strict=True))
    if q_sums is None and wants_rows:
        q_sums = row_gradient(scores, lse, delta, dlse)

    def of_dense(t: Tensor) -> Tensor:
        if t.shape[3] == 1:
            assert q_sums is not None
            return sum_to(q_sums[..., None], t.shape).contiguous()
        if t.shape[2] == 1:
            assert k_sums is not None
            return sum_to(k_sums[:, :, None], t.shape).contiguous()
        return pairs.of_bias(t)

    def of_table(x: Lookup) -> Tensor:
        if not x.is_diagonal:
            return pairs.of_codes(x)
        heads = x.table.shape[0]
        if by_distance is None:
            return pairs.of_diagonals(heads)
        return by_distance if heads == by_distance.shape[0] else by_distance.sum(0, keepdim=True)

    return ScoreGrads(
        *dq_dk_dv,
        tuple(of_dense(t) if needed else None for t, needed in zip(scores.dense, needs.dense, strict=True)),
        tuple(of_table(x) if needed else None for x, needed in zip(scores.lookups, needs.tables, strict=True)),
        sink_gradient(scores.sinks, lse, delta) if scores.sinks is not None and needs.sinks else None,
    )


def row_gradient(scores: Scores, lse: Tensor, delta: Tensor, dlse: Tensor | None) -> Tensor:
    """Sums of ds over keys without a soft cap: exactly dlse, and what the sinks leave; `[batch, q_heads, q_len]`."""
    rows = torch.zeros_like(lse) if dlse is None else dlse.masked_fill(lse == -math.inf, 0.0)
    if scores.sinks is not None:
        rows = rows + sink_weights(scores.sinks, lse) * delta
    return rows


def sum_to(t: Tensor, shape: torch.Size) -> Tensor:
    """The sum over dimensions that are 1 in `shape`."""
    shared = [d for d in range(4) if shape[d] == 1 and t.shape[d] > 1]
    return t.sum(shared, keepdim=True) if shared else t


class PairSums:
    """Launches of the kernel that sums ds over what shares a bias of pairs, for one backward pass."""

    def __init__(self, call: BackwardCall, options: Options) -> None:
        """`options` as `kernel_options` gives them; blocks are square."""
        self._call = call
        self._constants, self._options = options
        self._block: int = self._constants["BLOCK_M"]
        self._batch, self._heads, self._q_len = call.q.shape[:3]
        self._kv_len = call.k.shape[2]

    @cached_property
    def _map(self) -> Tensor | None:
        return None if self._call.block_mask is None else tile_map(self._call.block_mask)

    def of_bias(self, bias: Tensor) -> Tensor:
        """The gradient of a bias of pairs, in its shape: fp32, or in its dtype where nothing else is to be added."""
        return self.of_pairs(*bias.shape[:2])

    def of_pairs(self, batch: int, heads: int, first: int = 0, rows: int | None = None) -> Tensor:
        """fp32 `[batch, heads, rows, kv_len]`, `batch` and `heads` 1 or all; `rows` from query `first` on."""
        rows = self._q_len if rows is None else rows
        places = -(-rows // self._block) * -(-self._kv_len // self._block)
        shape = batch, heads, rows, self._kv_len
        return self._sum(places, shape, (batch, heads), first, False)

    def of_diagonals(self, heads: int) -> Tensor:
        """fp32 `[heads, q_len + kv_len - 1]`: entry `i - j + kv_len - 1`."""
        q_blocks, kv_blocks = (-(-length // self._block) for length in (self._q_len, self._kv_len))
        diagonals = q_blocks + kv_blocks - 1
        sums = self._sum(diagonals, (heads, diagonals, 2, self._block), (1, heads), 0, True).flip(1)
        # the second half of a diagonal of blocks has the entries of the first half of the next
        found = sums.new_zeros(heads, diagonals + 1, self._block)
        found[:, :-1] = sums[:, :, 0]
        found[:, 1:] += sums[:, :, 1]
        # flipped, the first diagonal starts at keys of the last block: entries of keys beyond the end come first
        start = kv_blocks * self._block - self._kv_len
        return found.flatten(1)[:, start : start + self._q_len + self._kv_len - 1]

    def of_codes(self, lookup: Lookup) -> Tensor:
        """fp32 of the table's shape, by chunks of queries."""
        heads, entries = lookup.table.shape
        found = lookup.table.new_zeros(entries, heads)
        rows = max(1, CHUNK // (heads * self._kv_len) // self._block) * self._block
        for first in range(0, self._q_len, rows):
            count = min(rows, self._q_len - first)
            sums = self.of_pairs(1, heads, first, count).view(heads, -1).mT
            entry = lookup.q_code[first : first + count, None] - lookup.k_code
            # sorts the entries, so that the order of a sum does not vary
            found.index_put_((entry.flatten().long(),), sums.contiguous(), accumulate=True)
        return found.mT.contiguous()

    def _sum(self, places: int, shape: tuple[int, ...], outputs: tuple[int, int], first: int, diagonal: bool) -> Tensor:
        from anymask.backends.gpu.kernels.bias import _bwd_bias_kernel

        call, constants, size = self._call, self._constants, math.prod(shape)
        assert call.terms is not None
        batch, heads = outputs
        samples, each = self._batch // batch, self._heads // heads
        parts = min(MAX_PARTS, samples * each, max(1, PROGRAMS // (places * batch * heads)), max(1, MAX_PAIRS // size))
        out = call.lse2.new_empty((parts, *shape))
        q, k, v, do = call.q, call.k, call.v, call.do
        use_tma, rows, keys = constants["USE_TMA"], constants["BLOCK_M"], constants["BLOCK_N"]
        launch_triton(
            _bwd_bias_kernel,
            (places, batch * heads, parts),
            (
                source(q, use_tma, rows, constants["BLOCK_D"]),
                source(k, use_tma, keys, constants["BLOCK_D"]),
                source(v, use_tma, keys, constants["BLOCK_DV"]),
                source(do, use_tma, rows, constants["BLOCK_DV"]),
                call.lse2,
                call.delta,
                out,
                *(t.stride()[:3] for t in (q, k, v, do)),
                self._map,
                None if call.block_mask is None else call.block_mask.rows.words,
                plane_strides(call.block_mask),
                self._heads,
                self._heads // k.shape[1],
                self._q_len,
                self._kv_len,
                samples,
                each,
                heads,
                first // self._block,
                0 if diagonal else shape[2],
                call.qk_scale,
                *call.terms(rows, keys),
            ),
            {**constants, "IS_DIAGONAL": diagonal},
            q.device,
            self._options,
        )
        return out.sum(0) if parts > 1 else out[0]


def tile_map(block_mask: BlockMask) -> Tensor:
    """int32 `[planes * q tiles, kv tiles]`: -1 for an empty tile, 2**31 - 1 for a full one, a partial one's number."""
    rows, kv_tiles = block_mask.rows, tiles_over(block_mask.kv_len)
    found = torch.full((rows.full_offsets.numel() - 1, kv_tiles), -1, dtype=torch.int32, device=block_mask.device)
    numbers = torch.arange(found.shape[0], device=found.device)

    def places(offsets: Tensor, tiles: Tensor) -> Tensor:
        # told the size, torch need not wait for the GPU
        return numbers.repeat_interleave(offsets.diff().long(), output_size=tiles.numel()) * kv_tiles + tiles

    flat, partial = found.view(-1), torch.arange(rows.partial_tiles.numel(), dtype=torch.int32, device=found.device)
    flat.index_fill_(0, places(rows.full_offsets, rows.full_tiles), 2**31 - 1)
    flat.index_copy_(0, places(rows.partial_offsets, rows.partial_tiles), partial)
    return found
