"""Passes of the backward kernels that both GPU backends launch: delta, and gradients summed over tile lists."""

from typing import Any, NamedTuple

from torch import Tensor

from anymask.backends.gpu.arguments import LOG2_E, launch_triton, mask_lists, padded_dim, plane_strides, source
from anymask.block_mask import BlockMask
from anymask.tiles import TILE, tiles_over

DELTA_ROWS = 64


class BackwardCall(NamedTuple):
    """Inputs of a gradient: `lse2` and `delta` as `launch_delta` gives them, and which rows have a pair (None: all).

    `terms`: from queries and keys of a step to the kernels' `Terms` and descriptor of the scores, None without any;
    `qk_scale`: what q k is scaled by for them. `redo`: marks of the rows to write, None for all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    lse2: Tensor
    delta: Tensor
    q_has_pair: Tensor | None
    kv_has_pair: Tensor | None
    block_mask: BlockMask | None
    sm_scale: float
    # `KernelTerms` of gpu/scores.py, with scores
    terms: Any = None
    qk_scale: float = 0.0
    redo: Tensor | None = None


class RowsOf(NamedTuple):
    """What `lse2` and `delta` are made of: o, lse and its gradient."""

    o: Tensor
    lse: Tensor
    dlse: Tensor | None


def empty_rows(lse: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for `lse2` and delta, both flat: batch x q_heads x whole tiles."""
    batch, q_heads, q_len = lse.shape
    n = batch * q_heads * tiles_over(q_len) * TILE
    return lse.new_empty(n), lse.new_empty(n)


def launch_delta(
    o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None, dq_acc: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`lse` in base 2 and delta, both flat: batch x q_heads x whole tiles; `dq_acc`, as many rows, becomes 0."""
    from anymask.backends.gpu.kernels.delta import _bwd_delta_kernel

    batch, q_heads, q_len, v_dim = o.shape
    rows = tiles_over(q_len) * TILE
    lse2, delta = empty_rows(lse)
    acc_dim = 0 if dq_acc is None else dq_acc.numel() // lse2.numel()
    launch_triton(
        _bwd_delta_kernel,
        (rows // DELTA_ROWS, q_heads, batch),
        (
            o,
            do,
            lse.contiguous(),
            dlse,
            lse2,
            delta,
            dq_acc,
            o.stride()[:3],
            do.stride()[:3],
            (0, 0, 0) if dlse is None else dlse.stride(),
            q_heads,
            q_len,
        ),
        {"V_DIM": v_dim, "BLOCK_DV": padded_dim(v_dim), "BLOCK_M": DELTA_ROWS, "ACC_DIM": acc_dim},
        o.device,
        {"enable_fp_fusion": True},
    )
    return lse2, delta


def launch_dq(
    call: BackwardCall,
    dq: Tensor,
    constants: dict[str, Any],
    options: dict[str, Any],
    sums: Tensor | None = None,
    rows_of: RowsOf | None = None,
) -> None:
    """Write dq, summed by rows of tiles; `constants` and `options` as `kernel_options` gives them.

    `sums`: fp32 `[batch, q_heads, q_len]` for the sums of ds over keys, with a soft cap. With `rows_of` it also writes
    `call.lse2` and `call.delta`, without which it reads them.
    """
    from anymask.backends.gpu.kernels.dq import _bwd_dq_kernel

    grid = tiles_over(dq.shape[2]) * TILE // constants["BLOCK_M"], dq.shape[1], dq.shape[0]
    none = (0, 0, 0)
    last: tuple[Any, ...] = None, None, None, none, none
    if rows_of is not None:
        o, lse, dlse = rows_of
        last = o, lse.contiguous(), dlse, o.stride()[:3], none if dlse is None else dlse.stride()
    launch_gradient(_bwd_dq_kernel, grid, call, "rows", (dq,), constants, options, sums, last)


def launch_dkdv(
    call: BackwardCall,
    dk: Tensor,
    dv: Tensor,
    constants: dict[str, Any],
    options: dict[str, Any],
    sums: Tensor | None = None,
) -> None:
    """Write dk and dv, summed by columns of tiles.

    `sums`: fp32 `[batch, q_heads, kv_len]` for the sums of ds over queries.
    """
    from anymask.backends.gpu.kernels.dkdv import _bwd_dkdv_kernel

    grid = tiles_over(dk.shape[2]) * TILE // constants["BLOCK_N"], dk.shape[1], dk.shape[0]
    launch_gradient(_bwd_dkdv_kernel, grid, call, "cols", (dk, dv), constants, options, sums)


def launch_gradient(
    kernel: Any,
    grid: tuple[int, int, int],
    call: BackwardCall,
    view: str,
    gradients: tuple[Tensor, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
    sums: Tensor | None = None,
    last: tuple[Any, ...] = (),
) -> None:
    """Launch a kernel that walks the lists of `view`, "rows" or "cols", and writes `gradients`; `last`: arguments."""
    q, k, v, do = call.q, call.k, call.v, call.do
    use_tma, rows, keys = constants["USE_TMA"], constants["BLOCK_M"], constants["BLOCK_N"]
    launch_triton(
        kernel,
        grid,
        (
            source(q, use_tma, rows, constants["BLOCK_D"]),
            source(k, use_tma, keys, constants["BLOCK_D"]),
            source(v, use_tma, keys, constants["BLOCK_DV"]),
            source(do, use_tma, rows, constants["BLOCK_DV"]),
            call.lse2,
            call.delta,
            *gradients,
            *(t.stride()[:3] for t in (q, k, v, do, *gradients)),
            *mask_lists(call.block_mask, view),
            call.q_has_pair,
            call.kv_has_pair,
            plane_strides(call.block_mask),
            q.shape[1],
            q.shape[1] // k.shape[1],
            q.shape[2],
            k.shape[2],
            call.sm_scale,
            call.sm_scale * LOG2_E if call.terms is None else call.qk_scale,
            *((None, None) if call.terms is None else call.terms(rows, keys)),
            sums,
            *last,
            call.redo,
        ),
        constants,
        q.device,
        options,
    )
