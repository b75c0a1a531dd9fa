"""Kernels in Gluon for Hopper (sm_90): fp16 and bf16 through the tensor memory accelerator and warpgroup products.

Triton is imported when a call runs, so that this module imports without it. Allocation and launches only; the kernels
are in forward_kernel.py and backward_kernel.py.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from anymask.backends import triton as portable
from anymask.backends.hopper import tuning
from anymask.block_mask import BlockMask
from anymask.launch import launch, on
from anymask.tiles import TILE, tiles_over

DTYPES = (torch.float16, torch.bfloat16)
# below, the portable kernels pad less; above, the accumulators do not fit the registers
MIN_HEAD_DIM, MAX_HEAD_DIM = 33, 128

# queries of a warpgroup in the forward kernel
GROUP_ROWS = 64


def why_not(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None) -> str | None:
    """Why this backend cannot run the call, or None."""
    if not q.is_cuda:
        return f"the tensors are on {q.device}, the kernels run on a Hopper GPU"
    layout = tuple((t.stride(), t.data_ptr() % 16) for t in (q, k, v))
    reason = _why_not(q.device, q.dtype, q.shape, v.shape[3], layout)
    if reason is not None:
        return reason
    if block_mask is not None and block_mask.cols.live.numel() and block_mask.heads > 1 and q.shape[1] > k.shape[1]:
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
    if max(batch, q_heads) > portable.MAX_GRID:
        return f"q has {batch} samples and {q_heads} heads, the kernels take up to {portable.MAX_GRID} of each"
    for name, (strides, address) in zip("qkv", layout, strict=True):
        if not _loadable(strides, address):
            return (
                f"{name} has strides {strides} at an address {address} beyond a multiple of 16, the copy engine takes "
                "multiples of 16 bytes"
            )
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float) -> tuple[Tensor, Tensor]:
    """`(o, lse)`, contiguous."""
    from anymask.backends.hopper.forward_kernel import _fwd_kernel

    # Triton unpacks them for each descriptor: of a tuple in half the time of a `torch.Size`
    q_shape, k_shape, v_shape = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    batch, q_heads, q_len, head_dim = q_shape
    kv_heads, kv_len, v_dim = k_shape[1], k_shape[2], v_shape[3]
    o_shape = batch, q_heads, q_len, v_dim
    o = q.new_empty(*o_shape)
    lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    v = _without_dead(v, block_mask, "cols")
    group, mask_rows = q_heads // kv_heads, q_len
    # the heads of a group have the same keys, values and mask: their queries are rows of one tile, the PackGQA of
    # FlashAttention-3 (Shah et al., 2024)
    pack_gqa = group > 1 and group * q_len <= TILE and (block_mask is None or block_mask.heads == 1)
    if pack_gqa:
        q_heads, q_len, group = kv_heads, group * q_len, 1
        q_shape, o_shape = (batch, q_heads, q_len, head_dim), (batch, q_heads, q_len, v_dim)
        q, o = q.reshape(q_shape), o.view(o_shape)
    block_d = _block_d(head_dim, v_dim)
    config = tuning.FORWARD[block_d]
    q_tiles = tiles_over(q_len)
    block_q = _block((1, 1, GROUP_ROWS, block_d), q.dtype)
    block_kv = _block((1, 1, config.BLOCK_N, block_d), q.dtype)
    n_items = q_tiles * q_heads * batch
    programs = -(-n_items // config.PAIRS)
    if config.is_persistent[block_mask is not None]:
        programs = min(programs, _multiprocessors(q.device))
    with on(q.device):
        launch(
            _fwd_kernel,
            (programs, 1, 1),
            (
                _tiles(q, q_shape, block_q),
                _tiles(k, k_shape, block_kv),
                _tiles(v, v_shape, block_kv),
                _tiles(o, o_shape, block_q),
                lse,
                *portable._lists(block_mask, "rows"),
                *portable._plane_strides(block_mask),
                q_tiles,
                q_heads,
                group,
                q_len,
                kv_len,
                mask_rows,
                n_items,
                _section(block_mask is not None, q_tiles, batch * q_heads, programs * config.PAIRS),
                sm_scale * portable.LOG2_E,
            ),
            {
                "HEAD_DIM": block_d,
                "STAGES": config.STAGES,
                "Q_STAGES": config.Q_STAGES,
                "PAIRS": config.PAIRS,
                "PACK_GQA": pack_gqa and block_mask is not None,
            },
            (q.device, q.dtype, config.BLOCK_N, block_mask is None),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return (o.view(*lse.shape, v_dim) if pack_gqa else o), lse


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
    """`(dq, dk, dv)`, contiguous. dq sums in the order in which tiles finish, unless `deterministic`.

    The deterministic variant leaves dq to the portable kernel, which computes the scores again and adds in order. It is
    also the faster one for many short lines.
    """
    from anymask.backends.hopper.backward_kernel import _bwd_kernel, _dq_kernel

    q_shape, k_shape, v_shape = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    batch, q_heads, q_len, head_dim = q_shape
    kv_heads, kv_len, v_dim = k_shape[1], k_shape[2], v_shape[3]
    o_shape = batch, q_heads, q_len, v_dim
    dq, dk, dv = q.new_empty(*q_shape), k.new_empty(*k_shape), v.new_empty(*v_shape)
    if not _loadable(do.stride(), do.data_ptr()):
        do = do.contiguous()
    q, do = (_without_dead(t, block_mask, "rows") for t in (q, do))
    k, v = (_without_dead(t, block_mask, "cols") for t in (k, v))
    block_d = _block_d(head_dim, v_dim)
    block_m = tuning.BLOCK_M[block_d]
    block_q = _block((1, 1, block_m, block_d), q.dtype)
    block_kv = _block((1, 1, TILE, block_d), q.dtype)
    block_rows = _block((block_m,), lse.dtype)
    padded = batch * q_heads * tiles_over(q_len) * TILE
    n_items = tiles_over(kv_len) * kv_heads * batch
    programs = min(n_items, _multiprocessors(q.device))
    dq_acc = dq_tiles = None
    adds_dq = not (deterministic or (_has_short_lines(block_mask) and n_items >= tuning.MANY_LINES * programs))
    if adds_dq:
        # rows of 32 floats, in the order of the kernel
        dq_shape = padded * block_d // 32, 32
        dq_acc = lse.new_empty(*dq_shape)
        dq_tiles = _descriptor(dq_acc, dq_shape, (32, 1), _block((block_m * block_d // 32, 32), lse.dtype))
    has_tail = block_mask is None and kv_len % TILE != 0
    with on(q.device):
        lse2, delta = portable._launch_delta(o, do, lse, dlse, dq_acc)
        launch(
            _bwd_kernel,
            (programs, 1, 1),
            (
                _tiles(q, q_shape, block_q),
                _tiles(k, k_shape, block_kv),
                _tiles(v, v_shape, block_kv),
                _tiles(do, o_shape, block_q),
                _descriptor(lse2, (padded,), (1,), block_rows),
                _descriptor(delta, (padded,), (1,), block_rows),
                dq_tiles,
                _tiles(dk, k_shape, block_kv),
                _tiles(dv, v_shape, block_kv),
                *portable._lists(block_mask, "cols"),
                *portable._plane_strides(block_mask),
                tiles_over(q_len),
                kv_heads,
                q_heads // kv_heads,
                kv_len,
                n_items,
                _section(block_mask is not None, tiles_over(kv_len), batch * kv_heads, programs),
                sm_scale,
                sm_scale * portable.LOG2_E,
            ),
            {
                "HEAD_DIM": block_d,
                "BLOCK_M": block_m,
                "STAGES": 2,
                "MASKED": block_mask is not None,
                "HAS_TAIL": has_tail,
            },
            (q.device, q.dtype, do.dtype, q_heads // kv_heads, adds_dq),
            num_warps=8,
            enable_fp_fusion=True,
        )
        if dq_acc is None:
            pairs = q, k, v, do, lse2, delta
            portable._launch_sum("dq", pairs, (dq,), block_mask, (None, None), sm_scale)
        else:
            launch(
                _dq_kernel,
                (padded // 64, 1, 1),
                (dq_acc, dq, q_len, sm_scale),
                {"DIM": head_dim, "HEAD_DIM": block_d, "TILE": TILE},
                (q.device, q.dtype),
                num_warps=4,
                enable_fp_fusion=True,
            )
    return dq, dk, dv


def _has_short_lines(block_mask: BlockMask | None) -> bool:
    if block_mask is None:
        return False
    cols = block_mask.cols
    return cols.full_tiles.numel() + cols.partial_tiles.numel() <= tuning.SHORT_LINE * cols.order.numel()


def _section(masked: bool, lines: int, heads: int, seats: int) -> int:
    """How many heads share a section of the items, of `lines` each; see `place_of`.

    Without a mask one: all lines are equal. Else sections of about four rounds, and an odd number of them: an even one
    adds up what each leaves uneven.
    """
    if not masked:
        return 1
    sections = max(1, lines * heads // (4 * seats))
    return -(-heads // (sections - (sections % 2 == 0)))


def _block_d(head_dim: int, v_dim: int) -> int:
    return 64 if max(head_dim, v_dim) <= 64 else 128


# strides of a tensor in elements, and its address modulo 16
_Layout = tuple[tuple[int, ...], int]


def _loadable(strides: tuple[int, ...], address: int) -> bool:
    """Whether the copy engine can read such a tensor: 16-byte aligned, and no stride of 0."""
    b, h, m, _ = strides
    return (address | 2 * b | 2 * h | 2 * m) % 16 == 0 and min(b, h, m) > 0


def _without_dead(t: Tensor, block_mask: BlockMask | None, view: str) -> Tensor:
    """`t` with zeros at positions that no pair of its plane needs: 0 times a NaN there would reach a sum."""
    live = portable._live(block_mask, view)
    if live is None or block_mask is None:
        return t
    return t.masked_fill(live.view(block_mask.batch, block_mask.heads, -1, 1) == 0, 0.0)


def _tiles(t: Tensor, shape: tuple[int, ...], block: _Block) -> Any:
    """A descriptor of tiles `[1, 1, rows, columns]` of `t [batch, heads, length, dim]`."""
    b, h, m, _ = t.stride()
    return _descriptor(t, shape, (b, h, m, 1), block)


def _descriptor(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: _Block) -> Any:
    # `_loadable` has checked what the constructor checks again for every call
    descriptor: Any = object.__new__(block[0])
    descriptor.base, descriptor.shape, descriptor.strides = t, shape, strides
    _, descriptor.block_shape, descriptor.layout = block
    return descriptor


# Gluon's descriptor class, the shape of a block and its layout in shared memory
_Block = tuple[type, list[int], Any]


@cache
def _block(shape: tuple[int, ...], dtype: torch.dtype) -> _Block:
    """What all descriptors of such blocks have in common."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}[dtype]
    return TensorDescriptor, list(shape), gl.NVMMASharedLayout.get_default_for(list(shape), element)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _unusable(device: torch.device) -> str | None:
    if not portable._installed():
        return "Triton is not installed"
    if portable._interprets():
        return "Triton interprets its kernels, and has no interpreter for these"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return f"{torch.cuda.get_device_name(device)} is not of compute capability 9.0"
    return None
