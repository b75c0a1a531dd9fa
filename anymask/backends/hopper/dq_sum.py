"""The fp32 sum of dq in global memory: what it takes, and dq of it."""

from torch import Tensor

from anymask.plan import launch
from anymask.tiles import TILE, tiles_over


def empty_sum(q: Tensor, lse: Tensor, block_d: int) -> Tensor:
    """Memory for the sum of `q [batch, q_heads, q_len, head_dim]`: rows of 32 floats, in the order of the kernel."""
    batch, q_heads, q_len, _ = q.shape
    return lse.new_empty(batch * q_heads * tiles_over(q_len) * TILE * block_d // 32, 32)


def launch_cast(dq_acc: Tensor, dq: Tensor, block_d: int, sm_scale: float) -> None:
    """Write dq of the sum."""
    from anymask.backends.hopper.kernels.dq_sum import _dq_kernel

    _, q_heads, q_len, head_dim = dq.shape
    steps = [stride // 8 for stride in dq.stride()[:3]]
    launch(
        _dq_kernel,
        (dq_acc.numel() // (block_d * 64), 1, 1),
        (dq_acc, dq, *steps, q_heads, q_len, sm_scale),
        {"DIM": head_dim, "HEAD_DIM": block_d, "TILE": TILE},
        (dq.device, dq.dtype, *[step < 2**31 for step in steps]),
        num_warps=4,
        enable_fp_fusion=True,
    )
