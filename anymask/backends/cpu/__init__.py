"""Attention over tile lists in torch ops: the schedule of the kernels without a kernel compiler.

`steps` is the walk over tiles, `small` does planes within one tile, `scored` what has more than a mask, and
`small_scored` planes within one tile that have a bias or dropout. Letters as in docs/kernels.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anymask.backends.cpu import scored, small
from anymask.backends.cpu.small import LOG2_E
from anymask.backends.cpu.steps import Call
from anymask.block_mask import BlockMask
from anymask.layout import empty_as
from anymask.precision import ieee_products
from anymask.scores import Needs, ScoreGrads, Scores
from anymask.shapes import LSE, K, O, Q, V


def why_not(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, scores: Scores | None = None) -> str | None:
    """Why this backend cannot run the call, or None."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device}, this backend runs on the CPU"
    return None


@ieee_products
def forward(
    q: Q, k: K, v: V, block_mask: BlockMask | None, sm_scale: float, scores: Scores | None = None
) -> tuple[O, LSE]:
    """`o` in the dtype of `q`, and `lse` (natural log, fp32, or fp64 for fp64 inputs)."""
    if scores is not None:
        return scored.forward(q, k, v, block_mask, sm_scale, scores)
    if small.fits(q, k):
        return small.forward(q, k, v, block_mask, sm_scale)
    call = Call.of(q, k, v, block_mask)
    o = empty_as(q, v.shape[3]).zero_()
    lse = q.new_full(q.shape[:3], -float("inf"), dtype=call.compute)
    for tile_row in call.tile_rows():
        q_rows = call.used_rows(q, tile_row) * (sm_scale * LOG2_E)
        steady = call.is_steady(q_rows, tile_row)
        acc = q_rows.new_zeros(*q_rows.shape[:-1], v.shape[3])
        m = q_rows.new_full(q_rows.shape[:-1], 0.0 if steady else -float("inf"))
        l = torch.zeros_like(m)  # noqa: E741
        for step in call.steps(tile_row):
            s = step.mask_out(q_rows @ call.tiles(call.k, tile_row, step).mT)
            if not steady:
                m_new = torch.maximum(m, s.amax(-1))
                # a row with no key yet has m = -inf, and -inf - -inf would be NaN
                m_safe = torch.where(m_new == -float("inf"), 0, m_new)
                s.sub_(m_safe[..., None])
                alpha = torch.exp2(m - m_safe)
                l *= alpha  # noqa: E741
                acc *= alpha[..., None]
                m = m_new
            p = s.exp2_()
            l += p.sum(-1)  # noqa: E741
            acc += p @ call.tiles(call.v, tile_row, step)
        acc /= torch.where(l == 0, 1, l)[..., None]
        call.put_rows(o, tile_row, acc)
        # in fp64, so that leaving base 2 rounds once
        call.put_rows(lse[..., None], tile_row, (m.double() + l.double().log2())[..., None] / LOG2_E)
    return o, lse


@ieee_products
def backward(
    q: Q,
    k: K,
    v: V,
    o: O,
    lse: LSE,
    do: O,
    dlse: LSE | None,
    block_mask: BlockMask | None,
    sm_scale: float,
    deterministic: bool,
) -> tuple[Q, K, V]:
    """`dq, dk, dv` in the dtypes of `q, k, v`."""
    delta = (o.to(lse.dtype) * do.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(lse.dtype)
    # queries without a key give and receive nothing, whatever q, do or dlse hold there
    has_key = lse != -float("inf")
    delta = torch.where(has_key, delta, 0)
    lse2 = torch.where(has_key, lse * LOG2_E, 0)
    if small.fits(q, k):
        return small.backward(q, k, v, lse2, delta, do, block_mask, sm_scale)
    call = Call.of(q, k, v, block_mask)
    dq = empty_as(q).zero_()
    # [batch, kv_heads, dim, kv_tiles, 128]: products that end in this form are faster
    dk_t, dv_t = (t.new_zeros(*t.shape[:2], t.shape[4], *t.shape[2:4]) for t in (call.k, call.v))
    for tile_row in call.tile_rows():
        q_rows, do_rows = (call.used_rows(t, tile_row) for t in (q, do))
        lse_rows, delta_rows = (call.rows(t[..., None], tile_row) for t in (lse2, delta))
        q_scaled = q_rows * (sm_scale * LOG2_E)
        steady = call.is_steady(q_scaled, tile_row)
        if steady:
            # p = 2^s * 2^-lse: the second factor goes to the rows of do and delta, which are far smaller than p
            do_rows, delta_rows = (t * torch.exp2(-lse_rows) for t in (do_rows, delta_rows))
        dq_rows = torch.zeros_like(q_rows)
        for step in call.steps(tile_row):
            k_step, v_step = call.tiles(call.k, tile_row, step), call.tiles(call.v, tile_row, step)
            s = step.mask_out(q_scaled @ k_step.mT)
            p = (s if steady else s.sub_(lse_rows)).exp2_()
            ds = (do_rows @ v_step.mT).sub_(delta_rows).mul_(p)
            dq_rows += ds @ k_step
            call.add_tiles(dk_t, tile_row, step, q_rows.mT @ ds)
            call.add_tiles(dv_t, tile_row, step, do_rows.mT @ p)
        call.put_rows(dq, tile_row, dq_rows * sm_scale)
    return dq, call.key_gradient(dk_t * sm_scale, k), call.key_gradient(dv_t, v)


@ieee_products
def backward_scores(
    q: Q,
    k: K,
    v: V,
    o: O,
    lse: LSE,
    do: O,
    dlse: LSE | None,
    block_mask: BlockMask | None,
    sm_scale: float,
    deterministic: bool,
    scores: Scores,
    needs: Needs,
) -> ScoreGrads:
    """`dq, dk, dv` in the dtypes of `q, k, v`, and the gradients of what is needed of the scores."""
    return scored.backward(q, k, v, o, lse, do, dlse, block_mask, sm_scale, scores, needs)
