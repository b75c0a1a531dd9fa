"""What a call of attention does, worked out once for all calls of its kind: which backend, and what that one launches.

A kind is all that a backend can read of a call but addresses and values: sizes, strides, dtypes, alignments, the
structure of the mask, the scale. Plans are made of nothing else (`anymask.plan`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from anymask import backends
from anymask.block_mask import BlockMask
from anymask.block_mask.structure import Structure
from anymask.block_mask.tile_lists import TileLists
from anymask.plan import Plan
from anymask.tiles import tiles_over

# kinds of calls that are remembered, of each pass
MAX_PLANS = 512
# the backends that only allocate and launch, in functions that take operands
PLANNED = ("hopper", "triton")

# shape, strides, dtype and address modulo 16
_Kind: TypeAlias = "tuple[torch.Size, tuple[int, ...], torch.dtype, int]"


class MaskOperand(NamedTuple):
    """A `BlockMask` of a plan, as far as backends read one."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    rows: TileLists
    cols: TileLists


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """`(o, lse)` by the named backend, or by the first that can."""
    if backend == "reference":
        # it runs under transforms of torch.func too, whose tensors have no address
        return _forward_now(backends.load(backend), q, k, v, block_mask, sm_scale)
    structure, parts = (None, ()) if block_mask is None else (block_mask.structure, block_mask.parts)
    chosen, plan = _forward(backend, structure, sm_scale, q.device, _tf32(q), _kind(q), _kind(k), _kind(v))
    if plan is None:
        return _forward_now(chosen, q, k, v, block_mask, sm_scale)
    o, lse = plan(q, k, v, *parts)
    return o, lse


def _forward_now(
    chosen: ModuleType, q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    with no_autocast(q):
        o, lse = chosen.forward(q, k, v, block_mask, sm_scale)
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
    backend: str | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)` by the named backend, or by the first that can."""
    rest = block_mask, sm_scale, deterministic
    if backend == "reference":
        return _backward_now(backends.load(backend), q, k, v, o, lse, do, dlse, *rest)
    structure, parts = (None, ()) if block_mask is None else (block_mask.structure, block_mask.parts)
    given = (q, k, v, o, lse, do) if dlse is None else (q, k, v, o, lse, do, dlse)
    kinds = [_kind(t) for t in given]
    chosen, plan = _backward(backend, structure, sm_scale, deterministic, q.device, _tf32(q), *kinds)
    if plan is None:
        return _backward_now(chosen, q, k, v, o, lse, do, dlse, *rest)
    dq, dk, dv = plan(*given, *parts)
    return dq, dk, dv


def _backward_now(
    chosen: ModuleType, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, do = (unit_last_stride(t) for t in (q, k, v, do))
    with no_autocast(q):
        dq, dk, dv = chosen.backward(q, k, v, o, lse, do, *rest)
    return dq, dk, dv


def forget() -> None:
    """Drop all plans."""
    _forward.cache_clear()
    _backward.cache_clear()


def _kind(t: Tensor) -> _Kind:
    return t.shape, t.stride(), t.dtype, t.data_ptr() % 16


def _tf32(q: Tensor) -> str | None:
    """How torch multiplies fp32 now, which kernels of fp32 follow."""
    return torch.backends.cuda.matmul.fp32_precision if q.dtype is torch.float32 else None


@lru_cache(maxsize=MAX_PLANS)
def _forward(
    backend: str | None,
    structure: Structure | None,
    sm_scale: float,
    device: torch.device,
    tf32: str | None,
    *kinds: _Kind,
) -> tuple[ModuleType, Plan | None]:
    plan = Plan(device)
    # the tensors of a call come first
    operands, block_mask = [plan.operand(*kind) for kind in kinds], _mask(plan, structure)
    q, k, v = (unit_last_stride(t) for t in operands)
    chosen = backends.choose(q, k, v, block_mask, backend)
    if not _is_planned(chosen):
        return chosen, None
    plan.finish(chosen.forward(q, k, v, block_mask, sm_scale))
    return chosen, plan


@lru_cache(maxsize=MAX_PLANS)
def _backward(
    backend: str | None,
    structure: Structure | None,
    sm_scale: float,
    deterministic: bool,
    device: torch.device,
    tf32: str | None,
    *kinds: _Kind,
) -> tuple[ModuleType, Plan | None]:
    plan = Plan(device)
    operands, block_mask = [plan.operand(*kind) for kind in kinds], _mask(plan, structure)
    q, k, v, o, lse, do, *dlse = operands
    q, k, v, do = (unit_last_stride(t) for t in (q, k, v, do))
    chosen = backends.choose(q, k, v, block_mask, backend)
    # a plan does not know how long the mask's lists are
    reads_lists = deterministic and _name(chosen) == "hopper" and chosen.takes_turns(q, k, v, block_mask)
    if reads_lists or not _is_planned(chosen):
        return chosen, None
    of_lse = dlse[0] if dlse else None
    plan.finish(chosen.backward(q, k, v, o, lse, do, of_lse, block_mask, sm_scale, deterministic))
    return chosen, plan


def _is_planned(chosen: ModuleType) -> bool:
    return _name(chosen) in PLANNED


def _name(chosen: ModuleType) -> str:
    return chosen.__name__.rpartition(".")[2]


def _mask(plan: Plan, structure: Structure | None) -> Any:
    """The mask's operands, in the order of `BlockMask.parts`."""
    if structure is None:
        return None
    residues = iter(structure.residues)
    batch, heads, q_len, kv_len = structure[:4]

    def view(length: int, mean_tiles: int, has_pair: int) -> TileLists:
        # how many tiles there are no backend may ask: two masks of one structure have different ones
        lists = [plan.operand(None, (1,), torch.int32, next(residues)) for _ in range(5)]
        lists.append(plan.operand((batch, heads, tiles_over(length)), (0, 0, 1), torch.int32, next(residues)))
        lists.append(plan.operand((has_pair,), (1,), torch.uint8, next(residues)))
        made = TileLists(*lists)
        vars(made)["mean_tiles"] = mean_tiles
        return made

    rows = view(q_len, structure.row_tiles, structure.q_has_pair)
    cols = view(kv_len, structure.col_tiles, structure.kv_has_pair)
    return MaskOperand(batch, heads, q_len, kv_len, rows, cols)


def no_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """No cast inside a backend; nothing to do, at no cost, where none is asked for."""
    kind = t.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def unit_last_stride(t: Any) -> Any:
    """`t`, or a contiguous copy of it if its last dimension is not dense in memory."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
