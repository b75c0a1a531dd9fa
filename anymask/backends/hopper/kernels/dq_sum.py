"""The order of dq in its fp32 sum in global memory, and the kernel that makes dq of the sum."""

import triton
import triton.language as tl
from triton.experimental import gluon


@gluon.jit
def store_dq(buf, dq):
    """Write `dq [BLOCK_M, HEAD_DIM]` so that a thread writes 16 bytes at once and eight threads 128 in a row.

    Column `8 * (2 * a + b) + 2 * t + p` of row `r` becomes float `4 * t + 2 * b + p` of the 16 of `(a, r)`, in blocks
    of 64 rows. `_dq_kernel` reads this order.
    """
    x = dq.reshape([dq.shape[0] // 64, 64, dq.shape[1] // 16, 2, 4, 2]).permute((0, 2, 1, 4, 3, 5))
    buf.store(x.reshape([dq.shape[0] * dq.shape[1] // 32, 32]))


@triton.jit(do_not_specialize=["sample_step", "head_step", "query_step", "q_heads", "q_len"])
def _dq_kernel(
    dq_acc,
    dq_ptr,
    sample_step,
    head_step,
    query_step,
    q_heads,
    q_len,
    sm_scale,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes `dq [batch, q_heads, q_len, DIM]`, scaled, from the fp32 accumulator in the order of `store_dq`.

    Steps are strides of dq in units of 8 elements, so that stores of 16 bytes are seen to be aligned.
    Grid: (heads of all samples * query tiles * TILE // 64): 64 queries of one head a program.
    """
    parts = (q_len + TILE - 1) // TILE * (TILE // 64)
    head = (tl.program_id(0) // parts).to(tl.int64)
    base = tl.program_id(0).to(tl.int64) * (64 * HEAD_DIM)
    # (a, row, t, b, p), as it lies in memory
    dq = tl.load(dq_acc + base + tl.arange(0, 64 * HEAD_DIM)).reshape(HEAD_DIM // 16, 64, 4, 2, 2)
    dq = dq.permute(1, 0, 3, 2, 4).reshape(64, HEAD_DIM)
    rows = tl.program_id(0) % parts * 64 + tl.arange(0, 64)[:, None]
    c = tl.arange(0, HEAD_DIM)[None, :]
    plane = head // q_heads * sample_step + head % q_heads * head_step
    out = dq_ptr + (plane + rows.to(tl.int64) * query_step) * 8 + c
    tl.store(out, (dq * sm_scale).to(dq_ptr.dtype.element_ty), mask=(rows < q_len) & (c < DIM))
