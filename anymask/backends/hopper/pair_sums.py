"""Launches of the kernel that sums ds over what shares a bias of pairs, for head_dim up to 128."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.backends.gpu.arguments import plane_strides
from anymask.backends.gpu.passes import BackwardCall
from anymask.backends.gpu.scores import MAX_PAIRS, MAX_PARTS, tile_map
from anymask.backends.gpu.target import multiprocessors
from anymask.backends.hopper import tuning
from anymask.backends.hopper.descriptors import WARPGROUP_ROWS, block_of, tile_descriptor
from anymask.backends.hopper.scores import bias_descriptor, kernel_terms, pairs_of
from anymask.launch import args_key, int_key
from anymask.plan import launch
from anymask.scores import Scores
from anymask.tiles import TILE, tiles_over

# programs a multiprocessor for which sums are cut into parts, and strips for which rows of blocks are
PARTS_EACH, STRIPS_EACH = 2, 8


class Stages(NamedTuple):
    """Stages of q and do, of chunks of k and v, and of blocks of the bias; whether q and do of a strip stay."""

    q: int
    kv: int
    bias: int
    resident: bool


def choose_stages(head_dim: int, v_dim: int, bias_size: int, sharers: int, chunk: int) -> Stages:
    """What fits the shared memory of a program, for padded dims, and so many bytes of an element of the bias."""
    row, block = 2 * (head_dim + v_dim), TILE * TILE * bias_size
    best = None
    for n_q in (min(sharers, tuning.MOST_Q_STAGES), 2, 1):
        for n_bias in (2, 1):
            n_kv = min((tuning.SUMS_SHARED - n_q * TILE * row - n_bias * block) // (chunk * row), tuning.MOST_KV_STAGES)
            if n_kv >= 2 * TILE // chunk or (n_kv >= TILE // chunk and n_bias == 1):
                return Stages(n_q, n_kv, n_bias, sharers <= n_q)
    raise AssertionError(f"no stages for {head_dim}, {v_dim}, {bias_size}: {best}")


def sum_pairs(call: BackwardCall, scores: Scores, dtype: torch.dtype) -> Tensor:
    """The gradient of the bias of pairs, in its shape; in `dtype` or, summed in parts, in fp32."""
    from anymask.backends.hopper.kernels.pair_sums import _pair_sums_kernel

    q, k, v, bias, block_mask = call.q, call.k, call.v, pairs_of(scores), call.block_mask
    assert bias is not None
    batch, q_heads, q_len, head_dim = q.shape
    kv_len, v_dim = k.shape[2], v.shape[3]
    out_samples, out_heads = bias.shape[:2]
    samples, heads = batch // out_samples, q_heads // out_heads
    q_tiles, kv_tiles = tiles_over(q_len), tiles_over(kv_len)
    rows, programs = q_tiles * out_samples * out_heads, multiprocessors(q.device)
    size = math.prod(bias.shape)
    parts = min(MAX_PARTS, samples * heads, max(1, PARTS_EACH * programs // (rows * kv_tiles)), max(1, MAX_PAIRS // size))
    strips = min(kv_tiles, max(1, STRIPS_EACH * programs // (rows * parts)))
    n_work_tiles = rows * parts * strips
    d, dv = padded(head_dim), padded(v_dim)
    chunk = tuning.SUMS_CHUNK
    stages = choose_stages(d, dv, bias.element_size(), -(-samples * heads // parts), chunk)
    terms, qk_scale = kernel_terms(scores, call.sm_scale, q_len, kv_len)
    out = torch.empty(parts, *bias.shape, dtype=dtype if parts == 1 else torch.float32, device=q.device)
    found = None if block_mask is None else tile_map(block_mask)
    words = None if block_mask is None else block_mask.rows.words
    launch(
        _pair_sums_kernel,
        (min(programs, n_work_tiles), 1, 1),
        (
            *_descriptors(call, d, dv, chunk),
            bias_descriptor(bias, WARPGROUP_ROWS, chunk),
            call.lse2,
            call.delta,
            out,
            found,
            words,
            *plane_strides(block_mask),
            q_heads,
            q_heads // k.shape[1],
            q_len,
            kv_len,
            samples,
            heads,
            out_samples,
            out_heads,
            parts,
            strips,
            n_work_tiles,
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
        (q.device, q.dtype, bias.dtype, out.dtype, int_key(kv_len), block_mask is None, *args_key((terms,))),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out.sum(0) if parts > 1 else out[0]


def _descriptors(call: BackwardCall, d: int, dv: int, chunk: int) -> tuple[Any, ...]:
    """Those of q, k, v and do."""
    q, k, v, do = call.q, call.k, call.v, call.do
    return tuple(
        tile_descriptor(t, tuple(t.shape), block_of((1, 1, rows, columns), q.dtype))
        for t, rows, columns in ((q, TILE, d), (k, chunk, d), (v, chunk, dv), (do, TILE, dv))
    )


def padded(dim: int) -> int:
    """What head_dim or v_dim is padded to."""
    return next(n for n in (16, 32, 64, 128) if dim <= n)
