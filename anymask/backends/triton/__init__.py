"""Portable kernels in Triton: Ampere and later, AMD, or any machine under Triton's interpreter.

Triton is imported when a call runs, so that this module imports without it. Allocation and launches only; the kernels
are in forward_kernel.py and backward_kernels.py.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from anymask.backends.triton import tuning
from anymask.launch import args_key, launch, on
from anymask.mask import BlockMask
from anymask.mask.bits import TILE, tiles_over
from anymask.mask.block_mask import TileLists

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
# of a launch grid's second and third axis, which are heads and samples
MAX_GRID = 65535
DELTA_ROWS = 64
# any positive scale whose products round to 0 stands for 0, since 0 * -inf would be NaN
TINY_SCALE = 1e-30
LOG2_E = 1.4426950408889634


def why_not(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None) -> str | None:
    """Why this backend cannot run the call, or None."""
    if not _installed():
        return "Triton is not installed"
    if q.dtype not in DTYPES:
        return f"dtype is {q.dtype}, the kernels take {', '.join(map(str, DTYPES))}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head_dim is {q.shape[3]} and v_dim {v.shape[3]}, the kernels take up to {MAX_HEAD_DIM}"
    if max(q.shape[:2]) > MAX_GRID:
        return f"q has {q.shape[0]} samples and {q.shape[1]} heads, the kernels take up to {MAX_GRID} of each"
    if not q.is_cuda:
        return None if _interprets() else f"the tensors are on {q.device}, the kernels run on a GPU"
    return _too_old(q.device)


def forward(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float) -> tuple[Tensor, Tensor]:
    """`(o, lse)`, contiguous."""
    from anymask.backends.triton.forward_kernel import _fwd_kernel

    batch, q_heads, q_len, head_dim = q.shape
    o = q.new_empty(batch, q_heads, q_len, v.shape[3])
    lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    live = _live(block_mask, "cols")
    with on(q.device):
        target = _target()
        use_tma = _tma(target, (q, k, v), live)
        constants, options = _options("fwd", head_dim, v.shape[3], q.element_size(), use_tma, target, _allow_tf32(q))
        block_m, block_n = constants["BLOCK_M"], constants["BLOCK_N"]
        _launch(
            _fwd_kernel,
            (tiles_over(q_len) * TILE // block_m, q_heads, batch),
            (
                _source(q, use_tma, block_m, constants["BLOCK_D"]),
                _source(k, use_tma, block_n, constants["BLOCK_D"]),
                _source(v, use_tma, block_n, constants["BLOCK_DV"]),
                o,
                lse,
                *(t.stride()[:3] for t in (q, k, v, o)),
                *_lists(block_mask, "rows"),
                live,
                _plane_strides(block_mask),
                q_heads,
                q_heads // k.shape[1],
                q_len,
                k.shape[2],
                (abs(sm_scale) or TINY_SCALE) * LOG2_E,
            ),
            {**constants, "IS_NEGATIVE": sm_scale < 0, "USE_ASM": target[0] == "cuda" and not _interprets()},
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
    """`(dq, dk, dv)`, contiguous, bit-equal from run to run."""
    live = _live(block_mask, "rows"), _live(block_mask, "cols")
    dq, dk, dv = (t.new_empty(*t.shape) for t in (q, k, v))
    with on(q.device):
        pairs = q, k, v, do, *_launch_delta(o, do, lse, dlse)
        _launch_sum("dq", pairs, (dq,), block_mask, live, sm_scale)
        _launch_sum("dkdv", pairs, (dk, dv), block_mask, live, sm_scale)
    return dq, dk, dv


def _launch_sum(
    which: str,
    pairs: tuple[Tensor, ...],
    sums: tuple[Tensor, ...],
    block_mask: BlockMask | None,
    live: tuple[Tensor | None, Tensor | None],
    sm_scale: float,
) -> None:
    """Pass "dq", or "dkdv", which writes `sums` over keys, or over queries. `pairs`: q, k, v, do, lse2, delta."""
    from anymask.backends.triton.backward_kernels import _bwd_dkdv_kernel, _bwd_dq_kernel

    q, k, v, do, *rows = pairs
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    target = _target()
    use_tma = _tma(target, (q, k, v, do), *live)
    constants, options = _options(which, head_dim, v.shape[3], q.element_size(), use_tma, target, _allow_tf32(q))
    if which == "dq":
        kernel, view, length, heads, block = _bwd_dq_kernel, "rows", q_len, q_heads, constants["BLOCK_M"]
    else:
        kernel, view, length, heads, block = _bwd_dkdv_kernel, "cols", kv_len, kv_heads, constants["BLOCK_N"]
    _launch(
        kernel,
        (tiles_over(length) * TILE // block, heads, batch),
        (
            *_sources(q, k, v, do, constants),
            *rows,
            *sums,
            *(t.stride()[:3] for t in (q, k, v, do, *sums)),
            *_lists(block_mask, view),
            *live,
            _plane_strides(block_mask),
            q_heads,
            q_heads // kv_heads,
            q_len,
            kv_len,
            sm_scale,
            sm_scale * LOG2_E,
        ),
        constants,
        q.device,
        options,
    )


def _launch_delta(
    o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None, dq_acc: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`lse` in base 2 and delta, both flat: batch x q_heads x whole tiles; `dq_acc`, as many rows, becomes 0."""
    from anymask.backends.triton.backward_kernels import _bwd_delta_kernel

    batch, q_heads, q_len, v_dim = o.shape
    rows = tiles_over(q_len) * TILE
    lse2, delta = lse.new_empty(batch * q_heads * rows), lse.new_empty(batch * q_heads * rows)
    acc_dim = 0 if dq_acc is None else dq_acc.numel() // lse2.numel()
    _launch(
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
        {"V_DIM": v_dim, "BLOCK_DV": _block_d(v_dim), "BLOCK_M": DELTA_ROWS, "ACC_DIM": acc_dim},
        o.device,
        {"enable_fp_fusion": True},
    )
    return lse2, delta


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    device: torch.device,
    options: dict[str, Any],
) -> None:
    launch(kernel, grid, args, constants, (device, *args_key(args)), **options)


def _sources(q: Tensor, k: Tensor, v: Tensor, do: Tensor, constants: dict[str, Any]) -> tuple[Any, ...]:
    use_tma, rows, keys = constants["USE_TMA"], constants["BLOCK_M"], constants["BLOCK_N"]
    return (
        _source(q, use_tma, rows, constants["BLOCK_D"]),
        _source(k, use_tma, keys, constants["BLOCK_D"]),
        _source(v, use_tma, keys, constants["BLOCK_DV"]),
        _source(do, use_tma, rows, constants["BLOCK_DV"]),
    )


def _lists(block_mask: BlockMask | None, view: str) -> tuple[Tensor | None, ...]:
    """The pointers to a view's lists, in the order of the kernels' parameters."""
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


def _live(block_mask: BlockMask | None, view: str) -> Tensor | None:
    """The view's map of live positions, None if all are."""
    if block_mask is None:
        return None
    live: Tensor = getattr(block_mask, view).live
    return live if live.numel() else None


def _plane_strides(block_mask: BlockMask | None) -> tuple[int, int]:
    """Planes to step over for the next sample and for the next query head."""
    if block_mask is None:
        return 0, 0
    batch, heads, _ = block_mask.rows.order.shape
    return heads * (batch > 1), int(heads > 1)


@cache
def _options(
    which: str,
    head_dim: int,
    v_dim: int,
    itemsize: int,
    use_tma: bool,
    target: tuple[str, int | str],
    allow_tf32: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constants that every launch of pass `which` shares, and its options."""
    block_d, block_dv = _block_d(head_dim), _block_d(v_dim)
    config = tuning.choose(*target, use_tma, itemsize, block_d, block_dv, which, allow_tf32)
    constants = {
        "HEAD_DIM": head_dim,
        "V_DIM": v_dim,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "USE_TMA": use_tma,
        # the interpreter multiplies in IEEE fp32 and knows no other word
        "PRECISION": "ieee" if _interprets() else config.PRECISION,
        "TILE": TILE,
    }
    return constants, {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def _allow_tf32(q: Tensor) -> bool:
    """Whether torch's own fp32 products of CUDA tensors may be TF32 now.

    That is so after `torch.set_float32_matmul_precision("high")` or "medium", and read where those products read it:
    `torch.get_float32_matmul_precision()` raises once `fp32_precision` of a backend was set. Forward and backward each
    ask when they run.
    """
    return q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _block_d(dim: int) -> int:
    """The power of two that a kernel pads a head_dim to."""
    return max(16, 1 << (dim - 1).bit_length())


def _tma(target: tuple[str, int | str], tensors: tuple[Tensor, ...], *live: Tensor | None) -> bool:
    """Whether the copy engine can read all tensors: Hopper on, 16-byte aligned strides, every row wanted."""
    backend, arch = target
    if backend != "cuda" or int(arch) < 90 or any(x is not None for x in live):
        return False
    for t in tensors:
        b, h, m, _ = t.stride()
        if t.element_size() != 2 or (t.data_ptr() | 2 * b | 2 * h | 2 * m) % 16 or not min(b, h, m) > 0:
            return False
    return True


def _source(t: Tensor, use_tma: bool, rows: int, columns: int) -> Any:
    """What a kernel reads `t` through: a descriptor of tiles `[1, 1, rows, columns]`, or its pointer."""
    if not use_tma:
        return t
    from triton.tools.tensor_descriptor import TensorDescriptor

    # `_tma` has checked what its constructor checks again for every call, at 10 us a tensor
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = t, list(t.shape), [*t.stride()[:3], 1]
    descriptor.block_shape, descriptor.padding = [1, 1, rows, columns], "zero"
    return descriptor


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


@cache
def _interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _target() -> tuple[str, int | str]:
    """Triton's backend and architecture for the current device; the interpreter behaves as sm_80."""
    if _interprets():
        return "cuda", 80
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return target.backend, target.arch
