"""The operators under `torch.vmap`: what is mapped becomes a part of the batch, or of the heads, of one call.

A mask of mapped tensors is packed once, as the planes of all slices. Its lists and words are then no slice's, and stay
unmapped; `q_has_pair` and `kv_has_pair` are mapped, so that a slice knows its planes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

# where the operators' list of tensors has `lists` and `q_has_pair [mask_batch, mask_heads, ...]`
LISTS, HAS_PAIR = 0, 2
# tensors of a mask of one plane where every query and every key has a pair, and of any mask
ONE_PLANE, ALL = 2, 4
# that the vmap of `is_grads_batched` can have inside each other
LEVELS = 64


@dataclass(frozen=True)
class Fold:
    """Where the mapped dimension of `[n, batch, heads, ...]` goes.

    "batch": `[n * batch, heads]`; "heads": `[batch, n * heads]`; "samples": those are heads, `[n, batch * heads]`.
    """

    n: int
    batch: int
    heads: int
    into: str

    @staticmethod
    def all(n: int, q: Tensor) -> list[Fold]:
        """Those of a q of n slices, the preferred one first."""
        return [Fold(n, q.shape[1], q.shape[2], into) for into in ("batch", "samples", "heads")]

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

    def planes(self, of: tuple[int, int], is_mapped: bool) -> tuple[int, int]:
        """Planes in the one call of what has `of`, 1 or all along batch and heads, in a slice."""
        batch, heads = of
        if self.into == "batch":
            return (self.n * self.batch if is_mapped or batch != 1 else 1), heads
        if self.into == "heads":
            return batch, (self.n * self.heads if is_mapped or heads != 1 else 1)
        return (self.n if is_mapped else 1), (1 if batch == heads == 1 else self.batch * self.heads)

    def repeats(self, of: tuple[int, int], is_mapped: bool) -> int:
        """How many planes the one call has more than there are."""
        batch, heads = self.planes(of, is_mapped)
        return batch * heads - (self.n if is_mapped else 1) * of[0] * of[1]

    def fold_planes(self, t: Tensor, is_mapped: bool) -> Tensor:
        """`[batch or 1, heads or 1, ...]` of a slice, n first if mapped, with `planes`; a copy where that repeats."""
        batch, heads = t.shape[1:3] if is_mapped else t.shape[:2]
        if not is_mapped:
            if self.planes((batch, heads), False) == (batch, heads):
                return t
            t = t[None]
        rest = t.shape[3:]
        if self.into == "samples":
            return (t if batch == heads == 1 else t.expand(-1, self.batch, self.heads, *rest)).flatten(1, 2)
        sizes = (self.batch, heads) if self.into == "batch" else (batch, self.heads)
        return self.fold(t.expand(self.n, *sizes, *rest))

    def unfold_planes(self, t: Tensor, of: torch.Size) -> Tensor:
        """The gradient of `fold_planes` of mapped slices `of [batch or 1, heads or 1, ...]`: `[n, *of]`."""
        is_shared = self.into == "samples" and of[0] == of[1] == 1
        return (t[:, None] if is_shared else self.unfold(t)).sum_to_size(self.n, *of)


@dataclass(frozen=True)
class MappedMask:
    """The tensors of a mask as a rule of vmap finds them."""

    tensors: list[Tensor]
    # along batch and heads, of a slice
    planes: tuple[int, int]
    # the mapped dimension of `q_has_pair` and `kv_has_pair`, or None
    dims: tuple[int | None, ...]

    @staticmethod
    def of(tensors: list[Tensor], dims: Any) -> MappedMask:
        """Raises NotImplementedError for a `BlockMask` each of whose tensors is mapped."""
        if not tensors:
            return MappedMask(tensors, (1, 1), (None, None))
        tensors, dims = completed(tensors), (*dims, None, None)[:4]
        if dims[LISTS] is not None:
            raise NotImplementedError(
                "mask is a BlockMask that torch.vmap maps; allowed are one BlockMask for all, and a bool tensor, or a "
                "Mask of tensors, that is mapped"
            )
        batch, heads = [size for dim, size in enumerate(tensors[HAS_PAIR].shape) if dim != dims[HAS_PAIR]][:2]
        return MappedMask(tensors, (batch, heads), tuple(dims[HAS_PAIR:]))

    @property
    def is_mapped(self) -> bool:
        """Whether slices have planes of their own."""
        return self.dims[0] is not None

    def fits(self, fold: Fold) -> bool:
        """Whether the lists are those of the one call: they hold each plane once, those of a slice in a row."""
        is_in_order = not self.is_mapped or fold.into != "heads" or self.planes[0] == 1
        return is_in_order and fold.repeats(self.planes, self.is_mapped) == 0

    def has_pair(self) -> list[Tensor]:
        """`q_has_pair` and `kv_has_pair`, with the mapped dimension first."""
        return [t if d is None else t.movedim(d, 0) for t, d in zip(self.tensors[HAS_PAIR:], self.dims, strict=True)]

    def folded(self, fold: Fold) -> list[Tensor]:
        """The mask of the one call, whose lists are those that there are."""
        if not self.tensors or (not self.is_mapped and fold.planes(self.planes, False) == self.planes):
            return self.tensors
        has_pair = [fold.fold_planes(t, self.is_mapped) for t in self.has_pair()]
        # masks are known by their lists, and a slice's mask has other planes: a tensor of its own
        return [self.tensors[LISTS].detach(), *self.tensors[LISTS + 1 : HAS_PAIR], *has_pair]


def completed(tensors: list[Tensor]) -> list[Tensor]:
    """All tensors of a mask of the first of them, which operators take: each costs time wherever it goes.

    Without a `kv_has_pair` every key has a query; without both every query has a key too, and there is one plane.
    """
    if len(tensors) == ONE_PLANE:
        tensors = [*tensors, tensors[LISTS].new_empty(1, 1, 0, dtype=torch.uint8)]
    if len(tensors) < ALL:
        tensors = [*tensors, tensors[HAS_PAIR].new_empty(*tensors[HAS_PAIR].shape[:2], 0)]
    return tensors


def rule_of(op: Any, n_tensors: int) -> Callable[..., Any]:
    """The rule of an operator that takes `n_tensors` of `[batch, heads, ...]`, q first, and then a mask."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        n, rest = info.batch_size, args[n_tensors + 1 :]
        tensors = [first(t, d, n) for t, d in zip(args[:n_tensors], in_dims, strict=False)]
        mask = MappedMask.of(args[n_tensors], in_dims[n_tensors])
        # of 1, all samples, all heads or both there is always one
        fold = next(fold for fold in Fold.all(n, tensors[0]) if mask.fits(fold))
        outputs = op(*[None if t is None else fold.fold(t) for t in tensors], mask.folded(fold), *rest)
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
            t = t if is_shared else first(t, d, n)
            folded.append(t if is_shared else t.expand(n, batch, *t.shape[2:]).flatten(0, 1))
        lists, words, *has_pair = op(nodes, numbers, folded, *rest)
        return (lists, words, *(t.unflatten(0, (n, batch)) for t in has_pair)), (None, None, 0, 0)

    return rule


def refuse_slices(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """The rule of the operator that cuts a mask by samples: those of a slice of two levels lie in no row."""
    raise NotImplementedError(
        "mask is mapped by torch.vmap inside torch.vmap, in a call whose slices run one by one: under dropout with "
        "randomness='same', or with parts that fit no one call; allowed is a mask that one of them maps"
    )


def over_gradients(call: Callable[..., Sequence[Tensor]], *grads: Tensor | None) -> Sequence[Tensor]:
    """`call(*grads)`, also where `is_grads_batched` has batched them, which no operator can see.

    Raises:
        NotImplementedError: batched twice.
    """
    is_batched = [t is not None and _functorch.is_legacy_batchedtensor(t) for t in grads]
    if not any(is_batched):
        return call(*grads)
    batched = [t for t, is_so in zip(grads, is_batched, strict=True) if is_so and t is not None]
    for level in range(1, LEVELS + 1):
        plain: list[Any] = [torch._remove_batch_dim(t, level, 1, 0) for t in batched]
        # what has no batch of this level still has its own
        if not any(map(_functorch.is_legacy_batchedtensor, plain)):
            break
    else:
        raise NotImplementedError(
            "gradients of attention are batched twice by is_grads_batched (or vectorize=True); allowed is once"
        )
    parts = iter(plain)
    arguments = [next(parts) if is_so else t for t, is_so in zip(grads, is_batched, strict=True)]
    mapped: Any = torch.vmap(call, tuple(0 if is_so else None for is_so in is_batched))
    return [torch._add_batch_dim(t, 0, level) for t in mapped(*arguments)]


def is_mapped_tensor(t: Tensor) -> bool:
    """Whether `torch.vmap` maps it, at whatever level."""
    return bool(levels_of(t))


def levels_of(t: Tensor) -> list[int]:
    """The levels of `torch.func` at which `torch.vmap` maps a tensor."""
    levels = []
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            levels.append(_functorch.maybe_get_level(t))
        t = _functorch.get_unwrapped(t)
    return levels


def first(t: Any, dim: int | None, n: int) -> Any:
    """The tensor with the mapped dimension first; of one that is not mapped a view of n."""
    if t is None:
        return None
    return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
