"""Kernels in Gluon for Hopper (sm_90): fp16 and bf16 through the tensor memory accelerator and warpgroup products.

Triton is imported when a call runs, so that this module imports without it. Allocation and launches only; the kernels
are in `kernels/`.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from anymask.backends.gpu import split, target, windows
from anymask.backends.gpu.arguments import (
    MAX_GRID,
    has_pair,
    kernel_options,
    mask_lists,
    plane_strides,
    zero_unused_rows,
)
from anymask.backends.gpu.passes import BackwardCall, RowsOf, empty_rows, launch_delta, launch_dkdv, launch_dq
from anymask.backends.gpu.scores import NO_SUMS, KernelTerms, Options, PairSums, Sums, empty_sums, gradients
from anymask.backends.gpu.target import multiprocessors
from anymask.backends.hopper import diagonals, narrow, tuning, turns, wide
from anymask.backends.hopper.descriptors import WARPGROUP_ROWS, block_of, tile_descriptor
from anymask.backends.hopper.dq_sum import empty_sum, launch_cast
from anymask.backends.hopper.order import swizzle_heads
from anymask.backends.hopper.pair_sums import HopperPairSums, why_not_sums
from anymask.backends.hopper.scores import backward_terms, forward_scores, has_terms, pairs_of, why_not_scores
from anymask.backends.hopper.scores import why_not_gradients as why_not_gradients
from anymask.backends.hopper.tuning import NARROW
from anymask.block_mask import BlockMask
from anymask.launch import device_guard
from anymask.layout import empty_as
from anymask.plan import is_same_memory, launch
from anymask.scores import Needs, ScoreGrads, Scores
from anymask.tiles import TILE, tiles_over

DTYPES = (torch.float16, torch.bfloat16)
# below, the Triton kernels pad less
MIN_HEAD_DIM, MAX_HEAD_DIM = 33, 256


def why_not(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, scores: Scores | None = None) -> str | None:
    """Why this backend cannot run the call, or None."""
    if scores is not None and (reason := why_not_scores(scores, max(q.shape[3], v.shape[3]) > NARROW)):
        return reason
    if not q.is_cuda:
        return f"the tensors are on {q.device}, the kernels run on a Hopper GPU"
    layout = tuple((t.stride(), t.data_ptr() % 16) for t in (q, k, v))
    reason = _why_not(q.device, q.dtype, q.shape, v.shape[3], layout)
    if reason is not None:
        return reason
    has_own_planes = block_mask is not None and block_mask.heads > 1 and q.shape[1] > k.shape[1]
    takes_windows = scores is None and windows.fits(q, k, v)
    if has_own_planes and has_pair(block_mask, "cols") is not None and not takes_windows:
        return "the query heads of a group have different masks, some with keys that no query attends to"
    return None


@lru_cache(maxsize=1024)
def _why_not(
    device: torch.device, dtype: torch.dtype, q_shape: torch.Size, v_dim: int, layout: tuple[_Layout, ...]
) -> str | None:
    """`why_not` but for the mask; asked at every call, for few different layouts."""
    reason = _unusable(device)
    if reason is not None:
        return reason
    if dtype not in DTYPES:
        return f"dtype is {dtype}, the kernels take {', '.join(map(str, DTYPES))}"
    batch, q_heads, _, head_dim = q_shape
    if head_dim % 8 or v_dim % 8:
        return f"head_dim is {head_dim} and v_dim {v_dim}, the copy engine takes rows of multiples of 16 bytes"
    if not MIN_HEAD_DIM <= max(head_dim, v_dim) <= MAX_HEAD_DIM:
        return (
            f"head_dim is {head_dim} and v_dim {v_dim}, the kernels take a larger one of "
            f"{MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
        )
    if max(batch, q_heads) > MAX_GRID:
        return f"q has {batch} samples and {q_heads} heads, the kernels take up to {MAX_GRID} of each"
    for name, (strides, address) in zip("qkv", layout, strict=True):
        if not _loadable(strides, address):
            return (
                f"{name} has strides {strides} at an address {address} beyond a multiple of 16, the copy engine takes "
                "multiples of 16 bytes"
            )
    return None


class _Forward(NamedTuple):
    """A forward call as the kernel sees it: q and o with packed heads, if it packs them."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    # query heads of a kv head, and queries of a head of the mask
    group: int
    mask_rows: int
    pack_gqa: bool
    block_mask: BlockMask | None
    sm_scale: float
    scores: Scores | None


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float, scores: Scores | None = None
) -> tuple[Tensor, Tensor]:
    """`(o, lse)`."""
    if scores is None and windows.fits(q, k, v):
        return windows.forward(q, k, v, block_mask, sm_scale)
    splits = split.count(q, k, block_mask) if scores is None else 1
    if splits > 1:
        return split.forward(q, k, v, block_mask, sm_scale, splits)
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, v_dim = k.shape[1], v.shape[3]
    o = empty_as(q, v_dim)
    lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    if max(head_dim, v_dim) > NARROW:
        v = zero_unused_rows(v, block_mask, "cols")
    group = q_heads // kv_heads
    # the heads of a group have the same keys, values and mask: their queries are rows of one tile, the PackGQA of
    # FlashAttention-3 (Shah et al., 2024); what else happens to their scores differs
    is_same = (block_mask is None or block_mask.heads == 1) and not has_terms(scores)
    if group > 1 and group * q_len <= TILE and is_same:
        packed = batch, kv_heads, group * q_len
        # a view, unless there are several queries whose heads follow each other; those few rows are copied
        o_rows = o.reshape(*packed, v_dim)
        call = _Forward(q.reshape(*packed, head_dim), k, v, o_rows, lse, 1, q_len, True, block_mask, sm_scale, scores)
    else:
        call = _Forward(q, k, v, o, lse, group, q_len, False, block_mask, sm_scale, scores)
    with device_guard(q.device):
        _launch_forward(call)
        if not is_same_memory(call.o, o):
            o.copy_(call.o.view(o.shape))
    return o, lse


def _launch_forward(call: _Forward) -> None:
    from anymask.backends.hopper.kernels.forward import _fwd_kernel

    q, k, v, o, block_mask = call.q, call.k, call.v, call.o, call.block_mask
    # Triton unpacks them for each descriptor: of a tuple in half the time of a `torch.Size`
    q_shape, k_shape, v_shape, o_shape = tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(o.shape)
    batch, q_heads, q_len, head_dim = q_shape
    scores = forward_scores(call.scores, call.sm_scale, q, k_shape[2])
    dims = _padded_dims(head_dim, v_shape[3], scores.configs)
    config = scores.configs[_row(dims)]
    d_width, v_width = config.widths or dims
    # the producer zeroes rows of v up to these dims; wider ones come with zeros
    kv_has_pair = has_pair(block_mask, "cols") if max(dims) <= NARROW else None
    q_tiles = tiles_over(q_len)
    n_work_tiles = q_tiles * q_heads * batch
    programs = -(-n_work_tiles // config.CONSUMER_PAIRS)
    if config.is_persistent[block_mask is not None]:
        programs = min(programs, multiprocessors(q.device))
    workers = programs * config.CONSUMER_PAIRS
    swizzle = swizzle_heads(_mean_tiles(block_mask, "rows"), q_tiles, batch * q_heads, workers)
    launch(
        _fwd_kernel,
        (programs, 1, 1),
        (
            tile_descriptor(q, q_shape, block_of((1, 1, WARPGROUP_ROWS, d_width), q.dtype)),
            tile_descriptor(k, k_shape, block_of((1, 1, config.BLOCK_N, d_width), q.dtype)),
            tile_descriptor(v, v_shape, block_of((1, 1, config.BLOCK_N, v_width), q.dtype)),
            tile_descriptor(o, o_shape, block_of((1, 1, WARPGROUP_ROWS, v_width), q.dtype)),
            call.lse,
            *mask_lists(block_mask, "rows"),
            kv_has_pair,
            *plane_strides(block_mask),
            q_tiles,
            q_heads,
            call.group,
            q_len,
            k_shape[2],
            call.mask_rows,
            n_work_tiles,
            scores.swizzle_heads(swizzle, q),
            *scores.arguments(WARPGROUP_ROWS, config.BLOCK_N),
        ),
        {
            "D_BLOCKS": dims[0] // d_width,
            "V_BLOCKS": dims[1] // v_width,
            "STAGES": config.STAGES,
            "Q_STAGES": config.Q_STAGES,
            "CONSUMER_PAIRS": config.CONSUMER_PAIRS,
            "O_IN_V": config.O_IN_V,
            "PACK_GQA": call.pack_gqa and block_mask is not None,
            "PLAIN_SOFTMAX": config.PLAIN_SOFTMAX,
        },
        (q.device, q.dtype, config.BLOCK_N, d_width, v_width, block_mask is None, kv_has_pair is None, *scores.key),
        num_warps=4,
        enable_fp_fusion=True,
    )


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    block_mask: BlockMask | None,
    sm_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)`. dq sums in the order in which tiles finish; if `deterministic`, in an order of its own."""
    if windows.fits(q, k, v):
        return windows.backward(q, k, v, o, lse, do, dlse, block_mask, sm_scale)
    return _gradients(q, k, v, o, lse, do, dlse, block_mask, sm_scale, deterministic)[0]


def backward_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    block_mask: BlockMask | None,
    sm_scale: float,
    deterministic: bool,
    scores: Scores,
    needs: Needs,
) -> ScoreGrads:
    """Gradients of q, k, v and of what `needs` names. Sinks are in lse, so that no other kernel knows of them."""
    if scores.sinks is not None:
        # a sink makes lse finite where a query has no key, so delta would read these rows
        do = zero_unused_rows(do, block_mask, "rows")
    sums = empty_sums(scores, needs, lse, k.shape[2])
    # a bias of pairs has the shared memory that runs go through
    runs = None if pairs_of(scores) is not None else diagonals.empty_runs(needs, lse, k.shape[2], block_mask)
    grads, call = _gradients(
        q, k, v, o, lse, do, dlse, block_mask, sm_scale, deterministic, scores=scores, sums=sums, runs=runs
    )
    options = kernel_options(tuning.BIAS, q.shape[3], v.shape[3], True)
    with device_guard(q.device):
        by_distance = None if runs is None else diagonals.sum_runs(runs, lse, k.shape[2], block_mask)
        return gradients(call, scores, needs, lse, dlse, grads, sums, _pair_sums(call, scores, options), by_distance)


def sums_over_pairs(call: BackwardCall, scores: Scores, options: Options) -> PairSums:
    """The sums over pairs after the portable kernels: on a Hopper GPU by its own kernel, if that can.

    `options` are those of the portable kernel.
    """
    return PairSums(call, options) if _unusable(call.q.device) else _pair_sums(call, scores, options)


def _pair_sums(call: BackwardCall, scores: Scores, options: Options) -> PairSums:
    if why_not_sums(call, scores) is None:
        return HopperPairSums(call, scores, multiprocessors(call.q.device), options)
    return PairSums(call, options)


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    block_mask: BlockMask | None,
    sm_scale: float,
    deterministic: bool,
    *,
    scores: Scores | None = None,
    sums: Sums = NO_SUMS,
    runs: diagonals.Runs | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], BackwardCall]:
    """`(dq, dk, dv)`, the `sums` and the `runs`, and what kernels were called with.

    Columns of few tiles leave dq to the Triton kernel, which is faster there: it computes the scores again and adds in
    order. At head_dim 64 they leave dk and dv as well. Calls that want sums over keys leave it dq, as those lie in
    other programs here.
    """
    batch, q_heads, q_len, head_dim = q.shape
    dq, dk, dv = empty_as(q), empty_as(k), empty_as(v)
    if not _loadable(do.stride(), do.data_ptr()):
        do = do.contiguous()
    v_dim = v.shape[3]
    if max(head_dim, v_dim) > NARROW:
        q, do = (zero_unused_rows(t, block_mask, "rows") for t in (q, do))
        k, v = (zero_unused_rows(t, block_mask, "cols") for t in (k, v))
        with device_guard(q.device):
            call = BackwardCall(q, k, v, do, *launch_delta(o, do, lse, dlse), None, None, block_mask, sm_scale)
            _launch_wide(call, dq, dk, dv)
        return (dq, dk, dv), call
    block_d, kv_heads = narrow.block_d(head_dim, v_dim), k.shape[1]
    n_work_tiles = tiles_over(k.shape[2]) * kv_heads * batch
    programs = min(n_work_tiles, multiprocessors(q.device))
    is_short = n_work_tiles >= tuning.MANY_COLUMNS * programs and _leaves_short_columns(block_mask, block_d)
    terms = _terms(scores, sm_scale, q_len, k.shape[2])
    in_memory = takes_turns(q, k, v, block_mask) if deterministic else not is_short
    dq_acc = empty_sum(q, lse, block_d) if in_memory and sums.queries is None else None
    with device_guard(q.device):
        is_fused = dq_acc is None and tuning.DELTA_IN_DQ[block_d] and terms is None
        rows = empty_rows(lse) if is_fused else launch_delta(o, do, lse, dlse, dq_acc)
        # the producer zeroes these
        unused = has_pair(block_mask, "rows"), has_pair(block_mask, "cols")
        qk_scale = 0.0 if terms is None else terms.qk_scale
        call = BackwardCall(q, k, v, do, *rows, *unused, block_mask, sm_scale, terms, qk_scale)
        if dq_acc is None:
            # first, as it makes delta
            config = tuning.SHORT_DQ[block_d] if is_short else tuning.DQ
            config = config if terms is None else tuning.DQ_TERMS
            rows_of = RowsOf(o, lse, dlse) if is_fused else None
            launch_dq(call, dq, *kernel_options(config, head_dim, v_dim, True), sums.queries, rows_of)
        if is_short and dq_acc is None and terms is None and block_d in tuning.SHORT_DKDV:
            launch_dkdv(call, dk, dv, *kernel_options(tuning.SHORT_DKDV[block_d], head_dim, v_dim, True))
        else:
            swizzle = swizzle_heads(_mean_tiles(block_mask, "cols"), tiles_over(k.shape[2]), batch * kv_heads, programs)
            grid = turns.Grid(batch, kv_heads, q_heads // kv_heads, programs, swizzle)
            in_turn = None
            if deterministic and dq_acc is not None:
                in_turn = turns.of_call(block_mask, grid, tiles_over(q_len), lse)
            narrow.launch_dkdv(call, dk, dv, dq_acc, grid, in_turn, backward_terms(scores, call), sums.keys, runs)
        if dq_acc is not None:
            launch_cast(dq_acc, dq, block_d, sm_scale)
    return (dq, dk, dv), call


def _terms(scores: Scores | None, sm_scale: float, q_len: int, kv_len: int) -> KernelTerms | None:
    """What the Triton kernels of a backward pass take of the scores; None without other scores than sinks."""
    if scores is None or not has_terms(scores):
        return None
    return KernelTerms(scores, sm_scale, q_len, kv_len, True)


def _launch_wide(call: BackwardCall, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """All gradients, with a head_dim or v_dim above NARROW."""
    dims = _padded_dims(call.q.shape[3], call.v.shape[3])
    wide.launch_dkdv(call, dk, dv, dims, _wide_grid(call, "cols", wide.HALVES))
    wide.launch_dq(call, dq, dims, _wide_grid(call, "rows", 1))


def _wide_grid(call: BackwardCall, view: str, parts: int) -> wide.Grid:
    """Programs for all columns of kv heads, or rows of query heads, of `parts` work tiles each."""
    t = call.k if view == "cols" else call.q
    tiles, heads = tiles_over(t.shape[2]) * parts, t.shape[0] * t.shape[1]
    programs = min(tiles * heads, multiprocessors(t.device))
    swizzle = swizzle_heads(_mean_tiles(call.block_mask, view), tiles, heads, programs)
    return wide.Grid(programs, tiles * heads, swizzle)


def takes_turns(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None) -> bool:
    """Whether a deterministic backward pass adds dq in turns, which it reads from the mask's lists."""
    is_wide = max(q.shape[3], v.shape[3]) > NARROW
    return not (is_wide or windows.fits(q, k, v) or _has_short_columns(block_mask, tuning.SHORT_COLUMN_IN_TURN))


def _mean_tiles(block_mask: BlockMask | None, view: str) -> int | None:
    """Tiles of the mean row or column, None without a mask."""
    return None if block_mask is None else getattr(block_mask, view).mean_tiles


def _leaves_short_columns(block_mask: BlockMask | None, block_d: int) -> bool:
    """Whether columns leave gradients to the Triton kernels, if there are many.

    At head_dim 64 they do where samples differ: their small programs even out what a static order does not know.
    """
    is_static = block_mask is None or (block_d == 64 and block_mask.batch == 1)
    return not is_static and _has_short_columns(block_mask, tuning.SHORT_COLUMN)


def _has_short_columns(block_mask: BlockMask | None, limit: int) -> bool:
    """Whether columns have up to `limit` tiles on average."""
    return limit > 0 and block_mask is not None and block_mask.cols.mean_tiles <= limit


def _padded_dims(head_dim: int, v_dim: int, configs: tuning.Forward = tuning.FORWARD) -> tuple[int, int]:
    """What head_dim and v_dim are padded to: the smallest of the pairs that `configs` has a row for."""
    fitting = (dims for dims in tuning.DIMS if head_dim <= dims[0] and v_dim <= dims[1])
    return next(dims for dims in fitting if _row(dims) in configs)


def _row(dims: tuple[int, int]) -> int | tuple[int, int]:
    """The row of a table for padded dims."""
    return dims if dims[0] != dims[1] else dims[0]


# strides of a tensor in elements, and its address modulo 16
_Layout = tuple[tuple[int, ...], int]


def _loadable(strides: tuple[int, ...], address: int) -> bool:
    """Whether the copy engine can read such a tensor: 16-byte aligned, and no stride of 0."""
    b, h, m, _ = strides
    return (address | 2 * b | 2 * h | 2 * m) % 16 == 0 and min(b, h, m) > 0


@cache
def _unusable(device: torch.device) -> str | None:
    if not target.is_installed():
        return "Triton is not installed"
    if target.interprets():
        return "Triton interprets its kernels, and has no interpreter for these"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return f"{torch.cuda.get_device_name(device)} is not of compute capability 9.0"
    return None
