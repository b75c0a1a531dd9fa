"""Portable kernels in Triton: Ampere and later, AMD, or any machine under Triton's interpreter.

Triton is imported when a call runs, so that this module imports without it. Allocation and launches only; the kernels
are in forward_kernel.py and backward_kernels.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from anymask.backends.triton import tuning
from anymask.mask import BlockMask
from anymask.mask.bits import TILE, tiles_over
from anymask.mask.block_mask import TileLists

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
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
    if not q.is_cuda:
        return None if _interprets() else f"the tensors are on {q.device}, the kernels run on a GPU"
    return _too_old(q.device)


def forward(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float) -> tuple[Tensor, Tensor]:
    """`(o, lse)`, contiguous."""
    from anymask.backends.triton.forward_kernel import _fwd_kernel

    batch, q_heads, q_len, _ = q.shape
    o = q.new_empty(batch, q_heads, q_len, v.shape[3])
    lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    rows, live = _lists(block_mask, "rows"), _live(block_mask, "cols")
    with _on(q.device):
        use_tma = _tma((q, k, v), live)
        options, sizes = _options("fwd", q, v, use_tma)
        block_m, block_n = options.BLOCK_M, options.BLOCK_N
        qk_scale = (abs(sm_scale) or TINY_SCALE) * LOG2_E
        _fwd_kernel[(tiles_over(q_len) * TILE // block_m, q_heads, batch)](
            _source(q, use_tma, block_m, sizes["BLOCK_D"]),
            _source(k, use_tma, block_n, sizes["BLOCK_D"]),
            _source(v, use_tma, block_n, sizes["BLOCK_DV"]),
            o,
            lse,
            *(t.stride()[:3] for t in (q, k, v, o)),
            *rows,
            live,
            _plane_strides(block_mask),
            q_heads,
            q_heads // k.shape[1],
            q_len,
            k.shape[2],
            qk_scale,
            **sizes,
            **_launch(options),
            IS_NEGATIVE=sm_scale < 0,
            USE_TMA=use_tma,
            USE_ASM=_target()[0] == "cuda" and not _interprets(),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)`, contiguous, bit-equal from run to run."""
    from anymask.backends.triton.backward_kernels import _bwd_delta_kernel, _bwd_dkdv_kernel, _bwd_dq_kernel

    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    lse2, delta = lse.new_empty(2, batch, q_heads, tiles_over(q_len) * TILE)
    live = _live(block_mask, "rows"), _live(block_mask, "cols")
    with _on(q.device):
        use_tma = _tma((q, k, v, do), *live)
        options, sizes = _options("dq", q, v, use_tma)
        _bwd_delta_kernel[(tiles_over(q_len) * TILE // DELTA_ROWS, q_heads, batch)](
            o,
            do,
            lse.contiguous(),
            dlse,
            lse2,
            delta,
            o.stride()[:3],
            do.stride()[:3],
            (0, 0, 0) if dlse is None else dlse.stride(),
            q_heads,
            q_len,
            V_DIM=sizes["V_DIM"],
            BLOCK_DV=sizes["BLOCK_DV"],
            BLOCK_M=DELTA_ROWS,
            enable_fp_fusion=True,
        )
        scales = sm_scale, sm_scale * LOG2_E
        shared = (*live, _plane_strides(block_mask), q_heads, q_heads // kv_heads, q_len, kv_len, *scales)
        _bwd_dq_kernel[(tiles_over(q_len) * TILE // options.BLOCK_M, q_heads, batch)](
            *_sources(q, k, v, do, use_tma, options, sizes),
            lse2,
            delta,
            dq,
            *(t.stride()[:3] for t in (q, k, v, do, dq)),
            *_lists(block_mask, "rows"),
            *shared,
            **sizes,
            **_launch(options),
            USE_TMA=use_tma,
        )
        options, sizes = _options("dkdv", q, v, use_tma)
        _bwd_dkdv_kernel[(tiles_over(kv_len) * TILE // options.BLOCK_N, kv_heads, batch)](
            *_sources(q, k, v, do, use_tma, options, sizes),
            lse2,
            delta,
            dk,
            dv,
            *(t.stride()[:3] for t in (q, k, v, do, dk, dv)),
            *_lists(block_mask, "cols"),
            *shared,
            **sizes,
            **_launch(options),
            USE_TMA=use_tma,
        )
    return dq, dk, dv


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
    by_head = int(block_mask.heads > 1)
    return block_mask.heads * int(block_mask.batch > 1), by_head


def _options(which: str, q: Tensor, v: Tensor, use_tma: bool) -> tuple[tuning.TileConfig, dict[str, Any]]:
    sizes: dict[str, Any] = {"HEAD_DIM": q.shape[3], "V_DIM": v.shape[3]}
    sizes["BLOCK_D"], sizes["BLOCK_DV"] = (max(16, 1 << (d - 1).bit_length()) for d in (q.shape[3], v.shape[3]))
    config = tuning.choose(*_target(), use_tma, q.element_size(), max(sizes["BLOCK_D"], sizes["BLOCK_DV"]), which)
    sizes |= {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "PRECISION": "ieee", "TILE": TILE}
    return config, sizes


def _launch(config: tuning.TileConfig) -> dict[str, Any]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def _tma(tensors: tuple[Tensor, ...], *live: Tensor | None) -> bool:
    """Whether the copy engine can read all tensors: Hopper on, 16-byte aligned strides, every row wanted."""
    backend, arch = _target()
    if backend != "cuda" or int(arch) < 90 or any(x is not None for x in live):
        return False
    return all(
        t.data_ptr() % 16 == 0 and t.element_size() == 2 and all(s % 8 == 0 and s > 0 for s in t.stride()[:3])
        for t in tensors
    )


def _sources(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, use_tma: bool, config: tuning.TileConfig, sizes: dict[str, Any]
) -> tuple[Any, ...]:
    block_d, block_dv = sizes["BLOCK_D"], sizes["BLOCK_DV"]
    return (
        _source(q, use_tma, config.BLOCK_M, block_d),
        _source(k, use_tma, config.BLOCK_N, block_d),
        _source(v, use_tma, config.BLOCK_N, block_dv),
        _source(do, use_tma, config.BLOCK_M, block_dv),
    )


def _source(t: Tensor, use_tma: bool, rows: int, columns: int) -> Any:
    """What a kernel reads `t` through: a descriptor of tiles `[1, 1, rows, columns]`, or its pointer."""
    if not use_tma:
        return t
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), [*t.stride()[:3], 1], [1, 1, rows, columns])


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


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
