"""Masks inside functions that torch traces: operators that pack and check them, with fakes.

Outside of such a function a mask is packed as it is, and remembered.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import _C, Tensor
from torch._ops import _get_dispatch_mode_pre_dispatch

from anymask import validate, vmap
from anymask.block_mask import BlockMask
from anymask.mask import Mask
from anymask.mask.program import is_mapped, mask_from_program, program_of
from anymask.mask.traced import unknown_size
from anymask.packing import cache, pack, slice_queries
from anymask.tiles import TILE, WORDS

_LIBRARY = torch.library.Library("anymask", "FRAGMENT")
_LIBRARY.define(
    "pack(int[] nodes, SymInt[] numbers, Tensor[] tensors, SymInt q_len, SymInt kv_len, Device device) -> Tensor[]"
)
_LIBRARY.define("slice_queries(Tensor[] mask, SymInt q_len, SymInt kv_len, SymInt start, SymInt stop) -> Tensor[]")
_LIBRARY.define(
    "slice_planes(Tensor[] mask, SymInt q_len, SymInt kv_len, SymInt batch_start, SymInt batch_stop, "
    "SymInt heads_start, SymInt heads_stop) -> Tensor[]"
)
_LIBRARY.define("attended(Tensor mask) -> Tensor")

# tensors of `pack(mask_from_program(nodes, numbers, tensors), ...)`: packing inside a compiled function
pack_op = torch.ops.anymask.pack.default
# `mask != 0` of a mask that is not an additive one: `check_not_additive` inside a compiled function
attended_op = torch.ops.anymask.attended.default

_PLAIN = (Tensor, torch.nn.Parameter)


def pack_for(q: Tensor, mask: Mask | BlockMask | None, kv_len: int, check: Any = None) -> BlockMask | None:
    """The mask as `ops.dispatch` takes it for these queries, packed now or by an earlier call.

    `check` is called before a mask is packed that was not remembered, and may raise.
    """
    if mask is None:
        return None
    if is_traced():
        if isinstance(mask, BlockMask):
            return mask
        program, q_len = program_of(mask), q.shape[2]
        if program is None:
            raise ValueError("mask is a from_function mask inside a traced function; allowed is its BlockMask")
        return BlockMask(q_len, kv_len, *pack_op(*program, q_len, kv_len, q.device))
    if has_no_values(q):
        # nothing to mask, and sizes do not depend on it
        return None
    if isinstance(mask, BlockMask):
        return mask
    if is_mapped(mask):
        # the operator has a rule for vmap; what it packs is not remembered
        return BlockMask(q.shape[2], kv_len, *pack_op(*cast(Any, program_of(mask)), q.shape[2], kv_len, q.device))
    return cache.masks.pack(mask, q.shape[2], kv_len, q.device, check)


def mask_of_call(q: Tensor, k: Tensor, mask: Any) -> BlockMask | None:
    """What `attention` takes as a mask, for `ops.dispatch`: checked and packed, now or by an earlier call.

    Raises:
        ValueError: it does not fit. TypeError: it is no mask.
    """
    if isinstance(mask, BlockMask) and type(q) in _PLAIN and not q.is_meta:
        validate.check_packed(q, k, mask)
        return mask
    call: cache.CallKey | None = None
    # the cache knows tensors that are dense in memory, for calls that have values
    plain = type(mask) is Tensor and type(q) in _PLAIN and mask.layout is torch.strided and not mask.is_nested
    if plain and not is_traced():
        call, found = cache.masks.recall(mask, q, k.shape[2])
        if found is not None:
            return found
    lazy = validate.fitting_mask(q, k, mask)
    block_mask = pack_for(q, lazy, k.shape[2])
    if call is not None and isinstance(lazy, Mask) and block_mask is not None:
        cache.masks.learn(call, lazy)
    return block_mask


def is_traced() -> bool:
    """Whether operations are written down to be run again, with other values.

    Not where dynamo asks a function that it does not look into, such as that of `nn.MultiheadAttention`, for sizes.
    """
    if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return True
    if not _C._len_torch_dispatch_stack():
        return False
    keys = _C._TorchDispatchModeKey.PROXY, _C._TorchDispatchModeKey.FUNCTIONAL
    return any(_C._get_dispatch_mode(key) or _get_dispatch_mode_pre_dispatch(key) for key in keys)


def has_no_values(t: Tensor) -> bool:
    """Whether a tensor is of the device meta, or a fake of another."""
    if t.is_meta or type(t) in _PLAIN:
        return t.is_meta
    from torch._subclasses.fake_tensor import is_fake

    return bool(is_fake(t))


@torch.library.impl("anymask::pack", "CompositeExplicitAutograd")
def _pack(
    nodes: list[int], numbers: list[int], tensors: list[Tensor], q_len: int, kv_len: int, device: torch.device
) -> list[Tensor]:
    return _outputs(pack(mask_from_program(nodes, numbers, tensors), q_len=q_len, kv_len=kv_len, device=device))


def _outputs(packed: BlockMask) -> list[Tensor]:
    """The tensors of a new mask: what an operator returns may not share memory, as those without elements may."""
    return [t if t.numel() else t.clone() for t in packed.tensors()]


@torch.library.register_fake("anymask::pack")
def _pack_fake(
    nodes: list[int], numbers: list[int], tensors: list[Tensor], q_len: int, kv_len: int, device: torch.device
) -> list[Tensor]:
    return _unknown_mask(*mask_from_program(nodes, numbers, tensors).planes, device)


def _unknown_mask(batch: int, heads: int, device: torch.device) -> list[Tensor]:
    """Fakes of the tensors of a mask of so many planes, which only a run packs."""

    def empty(*shape: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    has_pair = [empty(batch, heads, unknown_size(), dtype=torch.uint8) for _ in range(2)]
    return [empty(unknown_size()), empty(2, unknown_size(), TILE, WORDS), *has_pair]


@torch.library.impl("anymask::slice_queries", "CompositeExplicitAutograd")
def _slice_queries(mask: list[Tensor], q_len: int, kv_len: int, start: int, stop: int) -> list[Tensor]:
    return _outputs(slice_queries(BlockMask.from_tensors(mask, q_len, kv_len), start, stop))


@torch.library.register_fake("anymask::slice_queries")
def _slice_queries_fake(mask: list[Tensor], q_len: int, kv_len: int, start: int, stop: int) -> list[Tensor]:
    has_pair = mask[2]
    return _unknown_mask(has_pair.shape[0], has_pair.shape[1], has_pair.device)


@torch.library.impl("anymask::slice_planes", "CompositeExplicitAutograd")
def _slice_planes(mask: list[Tensor], q_len: int, kv_len: int, *bounds: int) -> list[Tensor]:
    batch, heads = slice(*bounds[:2]), slice(*bounds[2:])
    # the words of samples are a view
    return [t.clone() for t in BlockMask.from_tensors(mask, q_len, kv_len)[batch, heads].tensors()]


@torch.library.register_fake("anymask::slice_planes")
def _slice_planes_fake(mask: list[Tensor], q_len: int, kv_len: int, *bounds: int) -> list[Tensor]:
    return _unknown_mask(bounds[1] - bounds[0], bounds[3] - bounds[2], mask[0].device)


def _attended_kernel(mask: Tensor) -> Tensor:
    validate.check_not_additive(mask)
    return mask != 0


torch.library.register_fake("anymask::attended", lambda mask: mask.new_empty(mask.shape, dtype=torch.bool))


_LIBRARY.impl("attended", _attended_kernel, "CompositeExplicitAutograd")
torch.library.register_vmap("anymask::pack", vmap.pack_rule_of(pack_op))
torch.library.register_vmap("anymask::slice_planes", vmap.refuse_slices)
