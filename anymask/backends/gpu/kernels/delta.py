"""What the backward kernels read of each query beside q and do, and a kernel that makes it."""

import triton
import triton.language as tl

from anymask.backends.gpu.kernels.tiles import LOG2_E, Operand, load_tile


@triton.jit
def row_stats(o_tile, do_tile, lse_ptr, dlse_ptr, dlse_strides, offs_m, q_len):
    """`lse2` and `delta [BLOCK_M]` of the queries `offs_m` of a head, at which pointers begin; equation (5).

    Queries that have no key or do not exist get `lse2 = inf`, so that their p is 0, and `delta = 0`.
    """
    inside = offs_m < q_len
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + offs_m.to(tl.int64) * dlse_strides[2], mask=inside, other=0.0)
    lse = tl.load(lse_ptr + offs_m, mask=inside, other=-float("inf"))
    has_key = lse != -float("inf")
    # a factor in fp32 would be wrong by 2e-8 of itself, and p by that much of lse2
    lse2 = (lse.to(tl.float64) * LOG2_E).to(tl.float32)
    return tl.where(has_key, lse2, float("inf")), tl.where(has_key, delta, 0.0)


@triton.jit(do_not_specialize=["q_len", "q_heads"])
def _bwd_delta_kernel(
    o,
    do,
    lse_ptr,
    dlse_ptr,
    lse2_ptr,
    delta_ptr,
    dq_acc,
    o_strides,
    do_strides,
    dlse_strides,
    q_heads,
    q_len,
    V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC_DIM: tl.constexpr,
):
    """Writes `delta = rowsum(o * do) - dlse` and `lse2`, lse in base 2, of BLOCK_M queries, padded to whole tiles.

    If there is a `dq_acc`, padded too, it sets ACC_DIM floats of each query to 0.
    Grid: (q tiles * TILE // BLOCK_M, q_heads, batch).
    """
    start_m = tl.program_id(0) * BLOCK_M
    off_h = tl.program_id(1)
    off_b = tl.program_id(2)
    o_rows = Operand(o, o_strides, off_b, off_h, q_len, None)
    do_rows = Operand(do, do_strides, off_b, off_h, q_len, None)
    o_tile = load_tile(o_rows, start_m, V_DIM, BLOCK_M, BLOCK_DV, False, False)
    do_tile = load_tile(do_rows, start_m, V_DIM, BLOCK_M, BLOCK_DV, False, False)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row = (off_b * q_heads + off_h).to(tl.int64)
    if dlse_ptr is not None:
        dlse_ptr += off_b.to(tl.int64) * dlse_strides[0] + off_h.to(tl.int64) * dlse_strides[1]
    padded = row * (tl.num_programs(0) * BLOCK_M) + offs_m
    lse2, delta = row_stats(o_tile, do_tile, lse_ptr + row * q_len, dlse_ptr, dlse_strides, offs_m, q_len)
    tl.store(lse2_ptr + padded, lse2)
    tl.store(delta_ptr + padded, delta)
    if dq_acc is not None:
        first = (row * (tl.num_programs(0) * BLOCK_M) + start_m) * ACC_DIM
        tl.store(dq_acc + first + tl.arange(0, BLOCK_M * ACC_DIM), tl.zeros([BLOCK_M * ACC_DIM], tl.float32))
