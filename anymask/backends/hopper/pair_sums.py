"""Launches of the kernel that sums ds over what shares a bias of pairs, for head_dim up to 128."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.backends.gpu.arguments import can_use_tma, padded_dim, plane_strides
from anymask.backends.gpu.passes import BackwardCall
from anymask.backends.gpu.scores import DENSE_DTYPES, MAX_PAIRS, MAX_PARTS, Options, PairSums, is_loadable
from anymask.backends.hopper import tuning
from anymask.backends.hopper.descriptors import WARPGROUP_ROWS, block_of, descriptor, tile_descriptor
from anymask.backends.hopper.scores import bias_descriptor, kernel_terms
from anymask.launch import args_key, int_key
from anymask.plan import launch
from anymask.scores import Scores
from anymask.tiles import TILE, tiles_over

# programs a multiprocessor for which sums are cut into parts, and strips for which rows of blocks are
PARTS_EACH, STRIPS_EACH = 1, 8


class Stages(NamedTuple):
    """Stages of q and do, of chunks of k and v, and of blocks of the bias; whether q and do of a strip stay."""

    q: int
    kv: int
    bias: int
    resident: bool


class Cut(NamedTuple):
    """How sums are cut: samples and heads that share a block and those of the output, parts, strips of a row."""

    samples: int
    heads: int
    out_samples: int
    out_heads: int
    parts: int
    strips: int
    q_tiles: int

    @property
    def n_work_tiles(self) -> int:
        """Strips of all rows of the output, of all parts."""
        return self.parts * self.out_samples * self.out_heads * self.q_tiles * self.strips


def cut_sums(q: Tensor, bias: Tensor, programs: int) -> Cut:
    """Parts and strips for so many programs at a time: of few blocks with many sharers parts, of short rows none."""
    out_samples, out_heads, q_len, kv_len = bias.shape
    samples, heads = q.shape[0] // out_samples, q.shape[1] // out_heads
    q_tiles, kv_tiles = tiles_over(q_len), tiles_over(kv_len)
    rows = q_tiles * out_samples * out_heads
    most = max(1, PARTS_EACH * programs // (rows * kv_tiles)), max(1, MAX_PAIRS // bias.numel())
    parts = min(MAX_PARTS, samples * heads, *most)
    strips = min(kv_tiles, max(1, STRIPS_EACH * programs // (rows * parts)))
    return Cut(samples, heads, out_samples, out_heads, parts, strips, q_tiles)


def choose_stages(head_dim: int, v_dim: int, bias_size: int, sharers: int, chunk: int) -> Stages:
    """What fits the shared memory of a program, for padded dims, and so many bytes of an element of the bias."""
    row, block = 2 * (head_dim + v_dim), TILE * TILE * bias_size
    # with lse2 and delta
    queries = TILE * (row + 8)
    for n_q in (min(sharers, tuning.MOST_Q_STAGES), 2, 1):
        for n_bias in (2, 1):
            n_kv = min((tuning.SUMS_SHARED - n_q * queries - n_bias * block) // (chunk * row), tuning.MOST_KV_STAGES)
            if n_kv >= 2 * TILE // chunk or (n_kv >= TILE // chunk and n_bias == 1):
                return Stages(n_q, n_kv, n_bias, sharers <= n_q)
    raise AssertionError(f"head_dim {head_dim} and v_dim {v_dim} have no stages")


def why_not_sums(call: BackwardCall, scores: Scores) -> str | None:
    """Why the kernel cannot sum the pairs of a call on a Hopper GPU, or None."""
    dims, tensors = (call.q.shape[3], call.v.shape[3]), (call.q, call.k, call.v, call.do)
    if max(dims) > tuning.NARROW:
        return f"head_dim is {dims[0]} and v_dim {dims[1]}, the kernel takes up to {tuning.NARROW}"
    if not can_use_tma(("cuda", 90), tensors):
        return "q, k, v or do are not of 16 bits, or have strides that are not multiples of 16 bytes"
    pairs = [t for t in scores.dense if min(t.shape[2:]) > 1]
    if len(pairs) != 1 or pairs[0].dtype not in DENSE_DTYPES or not is_loadable(pairs[0]):
        return "the kernel takes one bias of pairs, of up to 32 bits and with rows of multiples of 16 bytes"
    return None if all(x.is_diagonal for x in scores.lookups) else "a table is read by place"


class HopperPairSums(PairSums):
    """`PairSums` of which the gradient of a bias comes from the kernel for Hopper."""

    def __init__(self, call: BackwardCall, scores: Scores, programs: int, options: Options) -> None:
        """`programs`: how many run at a time; `options` as of `PairSums`."""
        super().__init__(call, options)
        self._scores, self._programs = scores, programs

    def of_bias(self, bias: Tensor) -> Tensor:
        """The gradient of the bias of pairs, see `PairSums`."""
        return sum_pairs(self._call, self._scores, bias, self._map, self._programs)


def sum_pairs(call: BackwardCall, scores: Scores, bias: Tensor, tiles: Tensor | None, programs: int) -> Tensor:
    """The gradient of `bias`, the one of pairs, in its dtype, or in fp32 where parts were added.

    `tiles`: the map of the mask's tiles.
    """
    from anymask.backends.hopper.kernels.pair_sums import _pair_sums_kernel

    q, k, v, block_mask = call.q, call.k, call.v, call.block_mask
    (_, q_heads, q_len, head_dim), kv_len = q.shape, k.shape[2]
    cut = cut_sums(q, bias, programs)
    d, dv, chunk = padded_dim(head_dim), padded_dim(v.shape[3]), tuning.SUMS_CHUNK
    stages = choose_stages(d, dv, bias.element_size(), -(-cut.samples * cut.heads // cut.parts), chunk)
    terms, qk_scale = kernel_terms(scores, call.sm_scale, q_len, kv_len)
    out = q.new_empty(cut.parts, *bias.shape, dtype=bias.dtype if cut.parts == 1 else torch.float32)
    launch(
        _pair_sums_kernel,
        (min(programs, cut.n_work_tiles), 1, 1),
        (
            *_descriptors(call, d, dv, chunk),
            bias_descriptor(bias, WARPGROUP_ROWS, chunk),
            descriptor(call.lse2, (call.lse2.numel(),), (1,), block_of((TILE,), torch.float32)),
            descriptor(call.delta, (call.delta.numel(),), (1,), block_of((TILE,), torch.float32)),
            out,
            tiles,
            None if block_mask is None else block_mask.rows.words,
            *plane_strides(block_mask),
            q_heads,
            q_heads // k.shape[1],
            q_len,
            kv_len,
            cut.samples,
            cut.heads,
            cut.out_samples,
            cut.out_heads,
            cut.parts,
            cut.strips,
            cut.n_work_tiles,
            qk_scale,
            terms,
        ),
        {
            "HEAD_DIM": d,
            "V_DIM": dv,
            "CHUNK": chunk,
            "Q_STAGES": stages.q,
            "KV_STAGES": stages.kv,
            "BIAS_STAGES": stages.bias,
            "RESIDENT": stages.resident,
        },
        (
            q.device,
            q.dtype,
            bias.dtype,
            out.dtype,
            kv_len % 8,
            int_key(kv_len),
            block_mask is None,
            *args_key((terms,)),
        ),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out.sum(0) if cut.parts > 1 else out[0]


def _descriptors(call: BackwardCall, d: int, dv: int, chunk: int) -> tuple[Any, ...]:
    """Those of q, k, v and do."""
    q, k, v, do = call.q, call.k, call.v, call.do
    return tuple(
        tile_descriptor(t, tuple(t.shape), block_of((1, 1, rows, columns), q.dtype))
        for t, rows, columns in ((q, TILE, d), (k, chunk, d), (v, chunk, dv), (do, TILE, dv))
    )
