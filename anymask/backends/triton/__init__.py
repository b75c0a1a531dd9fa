"""Portable kernels in Triton: Ampere and later, AMD, or any machine under Triton's interpreter.

Triton is imported when a call runs, so that this module imports without it. Allocation and launches only; the kernels
are in `kernels/` here and, those that the Hopper backend runs too, in `backends/gpu/kernels/`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from anymask.backends.gpu import split, target, windows
from anymask.backends.gpu.arguments import (
    LOG2_E,
    MAX_GRID,
    TINY_SCALE,
    can_use_tma,
    has_pair,
    has_tma,
    kernel_options,
    launch_triton,
    mask_lists,
    padded_dim,
    plane_strides,
    source,
    zero_unused_rows,
)
from anymask.backends.gpu.passes import BackwardCall, launch_delta, launch_dkdv, launch_dq
from anymask.backends.gpu.scores import KernelTerms, Options, PairSums, empty_sums, gradients, why_not_scores
from anymask.backends.triton import halves, tuning
from anymask.block_mask import BlockMask
from anymask.launch import device_guard
from anymask.layout import empty_as
from anymask.plan import apply
from anymask.scores import Needs, ScoreGrads, Scores
from anymask.tiles import TILE, tiles_over

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def why_not(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, scores: Scores | None = None) -> str | None:
    """Why this backend cannot run the call, or None."""
    if not target.is_installed():
        return "Triton is not installed"
    if q.dtype not in DTYPES:
        return f"dtype is {q.dtype}, the kernels take {', '.join(map(str, DTYPES))}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head_dim is {q.shape[3]} and v_dim {v.shape[3]}, the kernels take up to {MAX_HEAD_DIM}"
    if max(q.shape[:2]) > MAX_GRID:
        return f"q has {q.shape[0]} samples and {q.shape[1]} heads, the kernels take up to {MAX_GRID} of each"
    if reason := why_not_scores(scores):
        return reason
    if not q.is_cuda:
        return None if target.interprets() else f"the tensors are on {q.device}, the kernels run on a GPU"
    return _too_old(q.device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float, scores: Scores | None = None
) -> tuple[Tensor, Tensor]:
    """`(o, lse)`."""
    if scores is None and windows.fits(q, k, v):
        return windows.forward(q, k, v, block_mask, sm_scale)
    splits = split.count(q, k, block_mask) if scores is None else 1
    if splits > 1:
        return split.forward(q, k, v, block_mask, sm_scale, splits, _allow_tf32(q))
    from anymask.backends.triton.kernels.forward import _fwd_kernel

    batch, q_heads, q_len, head_dim = q.shape
    o = empty_as(q, v.shape[3])
    lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    kv_has_pair = _used(q, block_mask, "cols")
    terms, qk_scale = None, (abs(sm_scale) or TINY_SCALE) * LOG2_E
    with device_guard(q.device):
        current = target.current_target()
        use_tma = can_use_tma(current, (q, k, v))
        if scores is not None:
            terms = KernelTerms(scores, sm_scale, q_len, k.shape[2], has_tma(current))
            qk_scale = terms.qk_scale
        redo = None
        if scores is None and halves.fits(q, v, block_mask, current, _allow_tf32(q)):
            redo = halves.forward(q, k, v, o, lse, block_mask, qk_scale, sm_scale < 0, current)
        tables = None if terms is None else terms.n_tables
        what = head_dim, v.shape[3], q.element_size(), use_tma, current, _allow_tf32(q), tables
        constants, options = _options("fwd", *what)
        block_m, block_n = constants["BLOCK_M"], constants["BLOCK_N"]
        launch_triton(
            _fwd_kernel,
            (tiles_over(q_len) * TILE // block_m, q_heads, batch),
            (
                source(q, use_tma, block_m, constants["BLOCK_D"]),
                source(k, use_tma, block_n, constants["BLOCK_D"]),
                source(v, use_tma, block_n, constants["BLOCK_DV"]),
                o,
                lse,
                *(t.stride()[:3] for t in (q, k, v, o)),
                *mask_lists(block_mask, "rows"),
                kv_has_pair,
                plane_strides(block_mask),
                q_heads,
                q_heads // k.shape[1],
                q_len,
                k.shape[2],
                qk_scale,
                *((None, None) if terms is None else terms(block_m, block_n)),
                redo,
            ),
            {
                **constants,
                "IS_NEGATIVE": terms is None and sm_scale < 0,
                "USE_ASM": current[0] == "cuda" and not target.interprets(),
            },
            q.device,
            options,
        )
    return o, lse


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
    """`(dq, dk, dv)`, bit-equal from run to run."""
    if windows.fits(q, k, v):
        return windows.backward(q, k, v, o, lse, do, dlse, block_mask, sm_scale)
    used = _used(q, block_mask, "rows"), _used(q, block_mask, "cols")
    with device_guard(q.device):
        call = BackwardCall(q, k, v, do, *launch_delta(o, do, lse, dlse), *used, block_mask, sm_scale)
        return _gradients(call)


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
    *,
    pair_sums: Callable[[BackwardCall, Scores, Options], PairSums] | None = None,
) -> ScoreGrads:
    """Gradients of q, k, v and of what `needs` names, bit-equal from run to run.

    `pair_sums` makes the sums over pairs, if they are not to be those of the portable kernel.
    """
    used = _used(q, block_mask, "rows"), _used(q, block_mask, "cols")
    if scores.sinks is not None:
        # lse of a query without a key is that of its sink, so it does not say that do is unused
        do = zero_unused_rows(do, block_mask, "rows")
    with device_guard(q.device):
        lse2, delta = launch_delta(o, do, lse, dlse)
        terms = KernelTerms(scores, sm_scale, q.shape[2], k.shape[2], has_tma(target.current_target()))
        call = BackwardCall(q, k, v, do, lse2, delta, *used, block_mask, sm_scale, terms, terms.qk_scale)
        sums = empty_sums(scores, needs, lse, k.shape[2])
        dq_dk_dv = _gradients(call, *sums)
        options = _options("bias", *_what(call))
        pairs = PairSums(call, options) if pair_sums is None else pair_sums(call, scores, options)
        return gradients(call, scores, needs, lse, dlse, dq_dk_dv, sums, pairs)


def _gradients(
    call: BackwardCall, q_sums: Tensor | None = None, k_sums: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)`; `q_sums` and `k_sums` are those of the kernels."""
    q, k, v = call.q, call.k, call.v
    dq, dk, dv = empty_as(q), empty_as(k), empty_as(v)
    what = _what(call)
    of_queries = of_keys = call
    if call.terms is None and halves.fits(q, v, call.block_mask, target.current_target(), _allow_tf32(q)):
        made = halves.backward_parts(call)
        of_queries = call._replace(redo=halves.gradient(call, made, "rows", (dq,)))
        of_keys = call._replace(redo=halves.gradient(call, made, "cols", (dk, dv)))
    launch_dq(of_queries, dq, *_options("dq", *what), q_sums)
    launch_dkdv(of_keys, dk, dv, *_options("dkdv", *what), k_sums)
    return dq, dk, dv


def _what(call: BackwardCall) -> tuple[Any, ...]:
    """What the options of a backward pass depend on."""
    current = target.current_target()
    use_tma = can_use_tma(current, (call.q, call.k, call.v, call.do))
    dims, tables = (call.q.shape[3], call.v.shape[3]), None if call.terms is None else call.terms.n_tables
    return *dims, call.q.element_size(), use_tma, current, _allow_tf32(call.q), tables


def _used(q: Tensor, block_mask: BlockMask | None, view: str) -> Tensor | None:
    """`has_pair`, which for fp32 is a map even if all positions have a pair.

    Kernels with and without a map may add the parts of fp32 products in another order, and a sample would depend on
    whether others of its batch have unused rows.
    """
    used = has_pair(block_mask, view)
    if used is None and block_mask is not None and q.dtype == torch.float32:
        length = block_mask.q_len if view == "rows" else block_mask.kv_len
        n = block_mask.batch * block_mask.heads * length
        used = apply(lambda q: torch.ones(n, dtype=torch.uint8, device=q.device), q)
    return used


@cache
def _options(
    which: str,
    head_dim: int,
    v_dim: int,
    itemsize: int,
    use_tma: bool,
    current: tuple[str, int | str],
    allow_tf32: bool,
    tables: int | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constants that every launch of pass `which` shares, and its options."""
    block_d, block_dv = padded_dim(head_dim), padded_dim(v_dim)
    config = tuning.choose(*current, use_tma, itemsize, block_d, block_dv, which, allow_tf32, tables)
    return kernel_options(config, head_dim, v_dim, use_tma)


def _allow_tf32(q: Tensor) -> bool:
    """Whether torch's own fp32 products of CUDA tensors may be TF32 now.

    That is so after `torch.set_float32_matmul_precision("high")` or "medium", and read where those products read it:
    `torch.get_float32_matmul_precision()` raises once `fp32_precision` of a backend was set. Forward and backward each
    ask when they run.
    """
    return q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


@cache
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None
