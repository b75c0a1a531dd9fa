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
from anymask.layout import empty_as
from anymask.plan import Plan, Unplanned
from anymask.scores import Lookup, Needs, ScoreGrads, Scores
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

    def __getattr__(self, name: str) -> Any:
        if hasattr(BlockMask, name) or name in BlockMask.__dataclass_fields__:
            raise Unplanned(f"{name} of a mask")
        raise AttributeError(name)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, sm_scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """`(o, lse)` by the named backend, or by the first that can; without a backend where there is nothing to sum."""
    if backend == "reference":
        # it runs under transforms of torch.func too, whose tensors have no address
        if is_empty(q, k, v):
            return _forward_of_nothing(q, v)
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
    """`(dq, dk, dv)`, as `forward` gives `(o, lse)`."""
    rest = block_mask, sm_scale, deterministic
    if backend == "reference":
        if is_empty(q, k, v):
            return _backward_of_nothing(q, k, v)
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


def is_empty(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether no backend is asked, as a query has no key, or there is no output."""
    return q.numel() == 0 or k.numel() == 0 or v.numel() == 0


def _forward_of_nothing(q: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`sinks` are all that there is where no query has a key."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[0], q.shape[1], q.shape[2], dtype=lse_dtype)
    lse = lse.fill_(-float("inf")) if sinks is None else lse.copy_(sinks[:, None].expand(lse.shape))
    return empty_as(q, v.shape[3]).zero_(), lse


def _backward_of_nothing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_as(q).zero_(), empty_as(k).zero_(), empty_as(v).zero_()


class Form(NamedTuple):
    """What plans of calls depend on of their scores, beside the kinds of their tensors."""

    n_dense: int
    is_diagonal: tuple[bool, ...]
    softcap: float
    has_sinks: bool
    dropout_p: float

    @staticmethod
    def of(scores: Scores) -> Form:
        """The form of the scores of a call."""
        diagonal = tuple([lookup.is_diagonal for lookup in scores.lookups])
        return Form(len(scores.dense), diagonal, scores.softcap, scores.sinks is not None, scores.dropout_p)

    def scores(self, tensors: Any) -> Scores:
        """The scores of as many tensors as `_tensors_of` gives; takes them from an iterator."""
        dense = tuple([next(tensors) for _ in range(self.n_dense)])
        lookups = tuple([Lookup(next(tensors), next(tensors), next(tensors), is_one) for is_one in self.is_diagonal])
        sinks = next(tensors) if self.has_sinks else None
        return Scores(dense, lookups, self.softcap, sinks, self.dropout_p, next(tensors) if self.dropout_p else None)


def _tensors_of(scores: Scores) -> list[Tensor]:
    tensors = list(scores.dense)
    for lookup in scores.lookups:
        tensors += [lookup.table, lookup.q_code, lookup.k_code]
    tensors += [] if scores.sinks is None else [scores.sinks]
    return tensors if scores.seed is None else [*tensors, scores.seed]


def forward_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None,
    sm_scale: float,
    backend: str | None,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """`forward` of a call with scores."""
    structure, parts = (None, ()) if block_mask is None else (block_mask.structure, block_mask.parts)
    given = (q, k, v, *_tensors_of(scores))
    kinds = [_kind(t) for t in given]
    chosen, plan = _forward_scores(backend, structure, sm_scale, Form.of(scores), q.device, _tf32(q), *kinds)
    with no_autocast(q):
        if plan is not None:
            o, lse = plan(*given, *parts)
        else:
            q, k, v = (unit_last_stride(t) for t in (q, k, v))
            o, lse = chosen.forward(q, k, v, block_mask, sm_scale, scores)
    return o, lse


class Inputs(NamedTuple):
    """Tensors of every backward pass."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    do: Tensor


def backward_scores(
    inputs: Inputs,
    dlse: Tensor | None,
    block_mask: BlockMask | None,
    sm_scale: float,
    backend: str | None,
    deterministic: bool,
    scores: Scores,
    needs: Needs,
) -> ScoreGrads:
    """`backward` of a call with scores."""
    q, k, v, o, lse, do = inputs
    structure, parts = (None, ()) if block_mask is None else (block_mask.structure, block_mask.parts)
    given = (*inputs, *(() if dlse is None else (dlse,)), *_tensors_of(scores))
    kinds = [_kind(t) for t in given]
    form, has_dlse = Form.of(scores), dlse is not None
    key = backend, structure, sm_scale, deterministic, form, needs, has_dlse, q.device, _tf32(q)
    chosen, plan = _backward_scores(*key, *kinds)
    with no_autocast(q):
        if plan is not None:
            return _grads_of(iter(plan(*given, *parts)), needs)
        q, k, v, do = (unit_last_stride(t) for t in (q, k, v, do))
        found: ScoreGrads = chosen.backward_scores(
            q, k, v, o, lse, do, dlse, block_mask, sm_scale, deterministic, scores, needs,
            **backends.pair_sums(chosen, backend),
        )  # fmt: skip
        return found


def _grads_of(outputs: Any, needs: Needs) -> ScoreGrads:
    """The gradients that a plan has made, in their order without those that nobody needs."""
    dq, dk, dv = next(outputs), next(outputs), next(outputs)
    dense = tuple([next(outputs) if needed else None for needed in needs.dense])
    tables = tuple([next(outputs) if needed else None for needed in needs.tables])
    return ScoreGrads(dq, dk, dv, dense, tables, next(outputs) if needs.sinks else None)


def forget() -> None:
    """Drop all plans."""
    for remembered in (_forward, _backward, _forward_scores, _backward_scores):
        remembered.cache_clear()


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
    if is_empty(*operands):
        plan.finish(_forward_of_nothing(operands[0], operands[2]))
        return backends.load("reference"), plan
    q, k, v = (unit_last_stride(t) for t in operands)
    chosen = backends.choose(q, k, v, block_mask, backend)
    if not _is_planned(chosen):
        return chosen, None
    try:
        plan.finish(chosen.forward(q, k, v, block_mask, sm_scale))
    except Unplanned:
        return chosen, None
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
    if is_empty(q, k, v):
        plan.finish(_backward_of_nothing(q, k, v))
        return backends.load("reference"), plan
    q, k, v, do = (unit_last_stride(t) for t in (q, k, v, do))
    chosen = backends.choose(q, k, v, block_mask, backend)
    if not _is_planned(chosen) or (deterministic and _reads_lists(chosen, q, k, v, block_mask)):
        return chosen, None
    of_lse = dlse[0] if dlse else None
    try:
        plan.finish(chosen.backward(q, k, v, o, lse, do, of_lse, block_mask, sm_scale, deterministic))
    except Unplanned:
        return chosen, None
    return chosen, plan


@lru_cache(maxsize=MAX_PLANS)
def _forward_scores(
    backend: str | None,
    structure: Structure | None,
    sm_scale: float,
    form: Form,
    device: torch.device,
    tf32: str | None,
    *kinds: _Kind,
) -> tuple[ModuleType, Plan | None]:
    plan = Plan(device)
    operands, block_mask = [plan.operand(*kind) for kind in kinds], _mask(plan, structure)
    q, k, v = operands[:3]
    scores = form.scores(iter(operands[3:]))
    if is_empty(q, k, v):
        plan.finish(_forward_of_nothing(q, v, scores.sinks if k.shape[2] == 0 else None))
        return backends.load("reference"), plan
    q, k, v = (unit_last_stride(t) for t in (q, k, v))
    chosen = backends.choose(q, k, v, block_mask, backend, scores)
    if not _is_planned(chosen):
        return chosen, None
    try:
        plan.finish(chosen.forward(q, k, v, block_mask, sm_scale, scores))
    except Unplanned:
        return chosen, None
    return chosen, plan


@lru_cache(maxsize=MAX_PLANS)
def _backward_scores(
    backend: str | None,
    structure: Structure | None,
    sm_scale: float,
    deterministic: bool,
    form: Form,
    needs: Needs,
    has_dlse: bool,
    device: torch.device,
    tf32: str | None,
    *kinds: _Kind,
) -> tuple[ModuleType, Plan | None]:
    plan = Plan(device)
    operands, block_mask = [plan.operand(*kind) for kind in kinds], _mask(plan, structure)
    q, k, v, o, lse, do, *rest = operands
    q, k, v, do = (unit_last_stride(t) for t in (q, k, v, do))
    dlse = rest.pop(0) if has_dlse else None
    scores = form.scores(iter(rest))
    chosen = backends.for_gradients(backends.choose(q, k, v, block_mask, backend, scores), scores)
    if not _is_planned(chosen) or (deterministic and _reads_lists(chosen, q, k, v, block_mask)):
        return chosen, None
    try:
        grads = chosen.backward_scores(
            q, k, v, o, lse, do, dlse, block_mask, sm_scale, deterministic, scores, needs,
            **backends.pair_sums(chosen, backend),
        )  # fmt: skip
        plan.finish((*grads[:3], *[t for t in (*grads.dense, *grads.tables, grads.sinks) if t is not None]))
    except Unplanned:
        return chosen, None
    return chosen, plan


def _reads_lists(chosen: ModuleType, q: Any, k: Any, v: Any, block_mask: Any) -> bool:
    """Whether a backward pass that is `deterministic` asks how long the mask's lists are, which no plan knows."""
    return bool(_name(chosen) == "hopper" and chosen.takes_turns(q, k, v, block_mask))


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
