"""The operators under `torch.vmap`: what is mapped becomes a part of the batch, or of the heads, of one call.

A mask of mapped tensors is packed once, as the planes of all slices. Its lists and words are then no slice's, and stay
unmapped; `q_has_pair` and `kv_has_pair` are mapped, so that a slice knows its planes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

# where the operators' list of tensors has `lists` and `q_has_pair [mask_batch, mask_heads, ...]`
LISTS, HAS_PAIR = 0, 2


@dataclass(frozen=True)
class _Fold:
    """Where the mapped dimension of `[n, batch, heads, ...]` goes.

    "batch": `[n * batch, heads]`; "heads": `[batch, n * heads]`; "samples": those are heads, `[n, batch * heads]`.
    """

    n: int
    batch: int
    into: str

    @staticmethod
    def of(n: int, batch: int, planes: tuple[int, int], is_mapped: bool) -> _Fold | None:
        """Where the planes of a slice, (mask batch, mask heads), serve as they are; None if that is nowhere."""
        if planes[0] == (batch if is_mapped else 1):
            return _Fold(n, batch, "batch")
        if planes[1] == 1:
            return _Fold(n, batch, "samples" if is_mapped else "heads")
        return _Fold(n, batch, "heads") if is_mapped else None

    def fold(self, t: Tensor) -> Tensor:
        """One dimension less."""
        if self.into == "batch":
            return t.flatten(0, 1)
        return (t.transpose(0, 1) if self.into == "heads" else t).flatten(1, 2)

    def unfold(self, t: Tensor) -> Tensor:
        """Inverse of `fold`."""
        dim, size = {"batch": (0, self.n), "heads": (1, self.n), "samples": (1, self.batch)}[self.into]
        parts: Any = t.unflatten(dim, (size, t.shape[dim] // size))
        unfolded: Tensor = parts.transpose(0, 1) if self.into == "heads" else parts
        return unfolded


def rule_of(op: Any, n_tensors: int) -> Callable[..., Any]:
    """The rule of an operator that takes `n_tensors` of `[batch, heads, ...]`, q first, and then a mask."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        n, mask, rest = info.batch_size, args[n_tensors], args[n_tensors + 1 :]
        tensors = [_first(t, d, n) for t, d in zip(args[:n_tensors], in_dims, strict=False)]
        mask_dims, is_mapped = in_dims[n_tensors], False
        planes = (1, 1)
        if mask:
            if mask_dims[LISTS] is not None:
                raise NotImplementedError(
                    "mask is a BlockMask that torch.vmap maps; allowed are one BlockMask for all, and a bool tensor, "
                    "or a Mask of tensors, that is mapped"
                )
            is_mapped = mask_dims[HAS_PAIR] is not None
            batch, heads = [size for dim, size in enumerate(mask[HAS_PAIR].shape) if dim != mask_dims[HAS_PAIR]][:2]
            planes = batch, heads
        fold = _Fold.of(n, tensors[0].shape[1], planes, is_mapped)
        if fold is None:
            # a plane for each sample and head, which all slices share
            calls = [op(*[None if t is None else t[i] for t in tensors], mask, *rest) for i in range(n)]
            results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
            return results, (0,) * len(results)
        if is_mapped:
            has_pair = [fold.fold(_first(t, d, n)) for t, d in zip(mask[HAS_PAIR:], mask_dims[HAS_PAIR:], strict=True)]
            # masks are known by their lists, and a slice's mask has other planes: a tensor of its own
            mask = [mask[LISTS].detach(), *mask[LISTS + 1 : HAS_PAIR], *has_pair]
        outputs = op(*[None if t is None else fold.fold(t) for t in tensors], mask, *rest)
        return tuple(fold.unfold(t) for t in outputs), (0,) * len(outputs)

    return rule


def pack_rule_of(op: Any) -> Callable[..., Any]:
    """The rule of the operator that packs: one mask, with the planes of all slices."""

    def rule(info: Any, in_dims: tuple[Any, ...], nodes: Any, numbers: Any, tensors: Any, *rest: Any) -> Any:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "mask is mapped by torch.vmap inside a compiled function; allowed is one mask for all, or a batch "
                "instead of vmap"
            )
        n, parts = info.batch_size, list(zip(tensors, in_dims[2], strict=True))
        batch = max(t.select(d, 0).shape[0] if d is not None else t.shape[0] for t, d in parts)
        folded = []
        for t, d in parts:
            is_shared = d is None and t.shape[0] == 1
            t = t if is_shared else _first(t, d, n)
            folded.append(t if is_shared else t.expand(n, batch, *t.shape[2:]).flatten(0, 1))
        lists, words, *has_pair = op(nodes, numbers, folded, *rest)
        return (lists, words, *(t.unflatten(0, (n, batch)) for t in has_pair)), (None, None, 0, 0)

    return rule


def is_mapped_tensor(t: Tensor) -> bool:
    """Whether `torch.vmap` maps it, at whatever level."""
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            return True
        t = _functorch.get_unwrapped(t)
    return False


def _first(t: Any, dim: int | None, n: int) -> Any:
    """The tensor with the mapped dimension first; of one that is not mapped a view of n."""
    if t is None:
        return None
    return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
