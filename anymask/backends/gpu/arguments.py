"""What kernels are called with: pointers of a BlockMask, tensors as kernels read them, constants and options."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from anymask.backends.gpu.target import interprets
from anymask.block_mask import BlockMask
from anymask.block_mask.block_mask import TileLists
from anymask.launch import args_key
from anymask.plan import apply, launch
from anymask.precision import LOG2_E as LOG2_E
from anymask.tiles import TILE

# of a launch grid's second and third axis, which are heads and samples
MAX_GRID = 65535
# any positive scale whose products round to 0 stands for 0, since 0 * -inf would be NaN
TINY_SCALE = 1e-30


@dataclass(frozen=True)
class TileConfig:
    """Queries and keys of a kernel step (both divide the 128 of a tile), warps a program, stages of the pipeline.

    `PRECISION` says how fp32 is multiplied, in `tl.dot`'s words; 16-bit inputs have one way only.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    PRECISION: str = "ieee"


def mask_lists(block_mask: BlockMask | None, view: str) -> tuple[Tensor | None, ...]:
    """The pointers to the lists of a view, "rows" or "cols", in the order of the kernels' parameters."""
    if block_mask is None:
        return (None,) * 6
    lists: TileLists = getattr(block_mask, view)
    return (
        lists.full_offsets,
        lists.full_tiles,
        lists.partial_offsets,
        lists.partial_tiles,
        lists.words,
        lists.order,
    )


def plane_strides(block_mask: BlockMask | None) -> tuple[int, int]:
    """Planes to step over for the next sample and for the next query head."""
    if block_mask is None:
        return 0, 0
    batch, heads = block_mask.batch, block_mask.heads
    return heads * (batch > 1), int(heads > 1)


def has_pair(block_mask: BlockMask | None, view: str) -> Tensor | None:
    """The view's map of positions that have a pair, None if all do."""
    if block_mask is None:
        return None
    lists: TileLists = getattr(block_mask, view)
    return lists.has_pair if lists.has_pair.numel() else None


def zero_unused_rows(t: Tensor, block_mask: BlockMask | None, view: str) -> Tensor:
    """`t` with zeros at positions that no pair of its plane needs: 0 times a NaN there would reach a sum."""
    used = has_pair(block_mask, view)
    if used is None or block_mask is None:
        return t
    planes = block_mask.batch, block_mask.heads
    zeroed: Tensor = apply(lambda t, used: t.masked_fill(used.view(*planes, -1, 1) == 0, 0.0), t, used)
    return zeroed


def padded_dim(dim: int) -> int:
    """The power of two that a Triton kernel pads a head_dim to."""
    return max(16, 1 << (dim - 1).bit_length())


def has_tma(target: tuple[str, int | str]) -> bool:
    """Whether a target has a copy engine: Hopper on."""
    return target[0] == "cuda" and int(target[1]) >= 90


def can_use_tma(target: tuple[str, int | str], tensors: tuple[Tensor, ...]) -> bool:
    """Whether the copy engine can read all tensors: 16-byte aligned strides."""
    if not has_tma(target):
        return False
    for t in tensors:
        b, h, m, _ = t.stride()
        if t.element_size() != 2 or (t.data_ptr() | 2 * b | 2 * h | 2 * m) % 16 or not min(b, h, m) > 0:
            return False
    return True


def source(t: Tensor, use_tma: bool, rows: int, columns: int) -> Any:
    """What a Triton kernel reads `t` through: a descriptor of tiles `[1, 1, rows, columns]`, or its pointer."""
    if not use_tma:
        return t
    from triton.tools.tensor_descriptor import TensorDescriptor

    # `can_use_tma` has checked what its constructor checks again for every call, at 10 us a tensor
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = t, list(t.shape), [*t.stride()[:3], 1]
    descriptor.block_shape, descriptor.padding = [1, 1, rows, columns], "zero"
    return descriptor


@cache
def kernel_options(
    config: TileConfig, head_dim: int, v_dim: int, use_tma: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constants that the Triton kernels over tile lists share, and the options of a launch."""
    constants = {
        "HEAD_DIM": head_dim,
        "V_DIM": v_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_DV": padded_dim(v_dim),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "USE_TMA": use_tma,
        # the interpreter multiplies in IEEE fp32 and knows no other word
        "PRECISION": "ieee" if interprets() else config.PRECISION,
        "TILE": TILE,
    }
    return constants, {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def launch_triton(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    device: torch.device,
    options: dict[str, Any],
) -> None:
    """Launch a Triton kernel, which may depend on any of its arguments."""
    launch(kernel, grid, args, constants, (device, *args_key(args)), **options)
