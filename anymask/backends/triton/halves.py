"""fp32 by three products of fp16 parts: which calls take it, and its launches.

A call makes the parts of its tensors first. A second kernel, of six bf16 products, does the rows that parts cannot hold
again: those that a program marks in `redo`. Nothing waits for the host.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.backends.gpu import target
from anymask.backends.gpu.arguments import (
    LOG2_E,
    has_pair,
    has_tma,
    kernel_options,
    launch_triton,
    mask_lists,
    padded_dim,
    plane_strides,
    source,
)
from anymask.backends.gpu.passes import BackwardCall
from anymask.backends.triton import tuning
from anymask.block_mask import BlockMask
from anymask.tiles import TILE, tiles_over

# queries and keys from which on parts are worth making
FEWEST = 1024
# of head_dim and v_dim: above, sums and the products that are added to them do not fit registers
MAX_DIM = 128


class Parts(NamedTuple):
    """A tensor in parts, fp16 `[batch, 2 heads, length, dim]`, and fp32 numbers of its tiles."""

    parts: Tensor
    numbers: Tensor


def fits(q: Tensor, v: Tensor, block_mask: BlockMask | None, current: tuple[str, int | str], allow_tf32: bool) -> bool:
    """Whether a call takes parts. Reads sizes only, the batch not among them."""
    if block_mask is not None and block_mask.heads > 1 and q.shape[1] > v.shape[1]:
        # a key that one head of a group uses and another does not would have to have two kinds of parts
        return False
    if q.dtype != torch.float32 or allow_tf32 or max(q.shape[3], v.shape[3]) > MAX_DIM:
        return False
    if min(q.shape[2], v.shape[2]) < FEWEST:
        return False
    return target.interprets() or current == ("cuda", 90)


def make_parts(
    t: Tensor,
    delta: Tensor | None = None,
    used: Tensor | None = None,
    planes: tuple[int, int] = (0, 0),
    like_rows: bool = False,
) -> Parts:
    """The parts of `t [batch, heads, length, dim]`, fp32.

    Args:
        delta: of the queries, if `t` is a gradient of o.
        used: the map of the rows that have a pair, None if all do; the others count as zeros.
        planes: `plane_strides` of the mask.
        like_rows: of q and k, whose small rows need scores of their own; sums of those of v and do are judged after.
    """
    from anymask.backends.triton.kernels.parts import NUMBERS, _parts_kernel

    batch, heads, length, dim = t.shape
    row = -(-dim // 8) * 8
    strides = 2 * heads * length * row, length * row, row, 1
    parts = t.new_empty_strided((batch, 2 * heads, length, dim), strides, dtype=torch.float16)
    numbers = t.new_empty(batch * heads * tiles_over(length) * NUMBERS.value)
    block_d = padded_dim(dim)
    launch_triton(
        _parts_kernel,
        (tiles_over(length), heads, batch),
        (t, delta, parts, numbers, used, t.stride()[:3], planes, heads, length),
        {"DIM": dim, "BLOCK_D": block_d, "ROW": row, "TILE": TILE, "LIKE_ROWS": like_rows},
        t.device,
        {"num_warps": 4 if block_d <= 32 else 8, "enable_fp_fusion": True},
    )
    return Parts(parts, numbers)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    block_mask: BlockMask | None,
    qk_scale: float,
    is_negative: bool,
    current: tuple[str, int | str],
) -> Tensor:
    """Write o and lse; returns `redo`, of rows that the other kernel is to write."""
    from anymask.backends.triton.kernels.halves_forward import _halves_fwd_kernel

    batch, q_heads, q_len, head_dim = q.shape
    constants, options = _options("fwd", head_dim, v.shape[3], has_tma(current))
    rows = constants["BLOCK_M"]
    of_queries, of_keys = has_pair(block_mask, "rows"), has_pair(block_mask, "cols")
    planes = plane_strides(block_mask)
    made = (
        make_parts(q, None, of_queries, planes, True),
        make_parts(k, None, of_keys, planes, True),
        make_parts(v, None, of_keys, planes),
    )
    redo = _new_redo(q)
    launch_triton(
        _halves_fwd_kernel,
        (tiles_over(q_len) * TILE // rows, q_heads, batch),
        (
            *_sources(made, ("BLOCK_M", "BLOCK_N", "BLOCK_N"), ("BLOCK_D", "BLOCK_D", "BLOCK_DV"), constants),
            o,
            lse,
            redo,
            *(x.parts.stride()[:3] for x in made),
            o.stride()[:3],
            *mask_lists(block_mask, "rows"),
            planes,
            q_heads,
            q_heads // k.shape[1],
            q_len,
            k.shape[2],
            qk_scale,
        ),
        {
            **constants,
            "IS_NEGATIVE": is_negative,
            "USE_ASM": current[0] == "cuda" and not target.interprets(),
        },
        q.device,
        options,
    )
    return redo


def backward_parts(call: BackwardCall) -> tuple[Parts, ...]:
    """The parts of q, k, v and do."""
    planes = plane_strides(call.block_mask)
    return (
        make_parts(call.q, None, call.q_has_pair, planes, True),
        make_parts(call.k, None, call.kv_has_pair, planes, True),
        make_parts(call.v, None, call.kv_has_pair, planes),
        make_parts(call.do, call.delta, call.q_has_pair, planes),
    )


def gradient(call: BackwardCall, made: tuple[Parts, ...], view: str, gradients: tuple[Tensor, ...]) -> Tensor:
    """Write dq by the lists of "rows", or dk and dv by those of "cols"; returns `redo` of their rows."""
    from anymask.backends.triton.kernels.halves_backward import _halves_dkdv_kernel, _halves_dq_kernel

    redo = _new_redo(gradients[0])
    if view == "rows":
        _launch(_halves_dq_kernel, "dq", "BLOCK_M", call, made, view, gradients, redo)
        return redo
    for which, with_dk, with_dv in dkdv_launches(call.q.shape[3], call.v.shape[3]):
        own = {"WITH_DK": with_dk, "WITH_DV": with_dv}
        _launch(_halves_dkdv_kernel, which, "BLOCK_N", call, made, view, gradients, redo, own)
    return redo


def dkdv_launches(head_dim: int, v_dim: int) -> list[tuple[str, bool, bool]]:
    """Passes of `tuning`, whether each writes dk, and whether it writes dv."""
    if max(padded_dim(head_dim), padded_dim(v_dim)) <= max(d for d in tuning.HALVES["dkdv"] if isinstance(d, int)):
        return [("dkdv", True, True)]
    return [("dv", False, True), ("dk", True, False)]


def _launch(
    kernel: Any,
    which: str,
    rows: str,
    call: BackwardCall,
    made: tuple[Parts, ...],
    view: str,
    gradients: tuple[Tensor, ...],
    redo: Tensor,
    own: dict[str, bool] | None = None,
) -> None:
    q, k, written = call.q, call.k, gradients[0]
    constants, options = _options(which, q.shape[3], call.v.shape[3], has_tma(target.current_target()))
    launch_triton(
        kernel,
        (tiles_over(written.shape[2]) * TILE // constants[rows], written.shape[1], written.shape[0]),
        (
            *_sources(
                made,
                ("BLOCK_M", "BLOCK_N", "BLOCK_N", "BLOCK_M"),
                ("BLOCK_D", "BLOCK_D", "BLOCK_DV", "BLOCK_DV"),
                constants,
            ),
            call.lse2,
            call.delta,
            *gradients,
            redo,
            *(x.parts.stride()[:3] for x in made),
            *(t.stride()[:3] for t in gradients),
            *mask_lists(call.block_mask, view),
            plane_strides(call.block_mask),
            q.shape[1],
            q.shape[1] // k.shape[1],
            q.shape[2],
            k.shape[2],
            call.sm_scale,
            call.sm_scale * LOG2_E,
        ),
        {**constants, **(own or {})},
        q.device,
        options,
    )


def _new_redo(t: Tensor) -> Tensor:
    """int32, one for so many rows of whole tiles of each head of `t`."""
    from anymask.backends.gpu.kernels.redo import REDO_ROWS

    batch, heads, length, _ = t.shape
    made: Tensor = t.new_empty(batch * heads * tiles_over(length) * TILE // REDO_ROWS.value, dtype=torch.int32)
    return made


def _sources(
    made: tuple[Parts, ...], rows: tuple[str, ...], columns: tuple[str, ...], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """What kernels read parts through, then the numbers."""
    read = [
        source(x.parts, constants["USE_TMA"], constants[row], constants[column])
        for x, row, column in zip(made, rows, columns, strict=True)
    ]
    return *read, *(x.numbers for x in made)


@cache
def _options(which: str, head_dim: int, v_dim: int, use_tma: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    config = tuning.choose_halves(padded_dim(head_dim), padded_dim(v_dim), which)
    return kernel_options(config, head_dim, v_dim, use_tma)
