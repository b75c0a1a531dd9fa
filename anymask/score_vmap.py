"""The operators of `score_ops` under `torch.vmap`: one call for all slices, or one for each where none fits.

What slices share stays shared: a bias without a dimension of samples has none in the one call. One that all slices
share and that gets a gradient for each is a view of n. A backend's tables and sinks have heads and no samples, so
mapped ones want the slices among the heads. Where parts of a call want different places, those of least cost are
repeated, up to the size of q; beyond that slices run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.vmap import HAS_PAIR, Fold, MappedMask, first

# tensors of a lookup
PARTS = 3


class _Term(NamedTuple):
    """A part of the scores, `[batch or 1, heads or 1, ...]` of a slice, with n first if it is mapped."""

    tensor: Tensor
    is_mapped: bool
    # whether a gradient is wanted, which is one of each slice
    needed: bool
    # whether backends have it without samples
    is_table: bool = False
    # whether they want all heads
    is_sinks: bool = False

    @property
    def of(self) -> torch.Size:
        """Shape of a slice."""
        return self.tensor.shape[1:] if self.is_mapped else self.tensor.shape

    def cost(self, fold: Fold, for_gradients: bool) -> int | None:
        """Elements that the one call repeats; None if it cannot have the term so."""
        batch, heads, *rest = self.of
        is_mapped = self.is_mapped or (self.needed and for_gradients)
        planes = fold.planes((batch, heads), is_mapped)
        if self.is_table and planes[0] != 1:
            return None
        return fold.repeats((batch, heads), is_mapped) * math.prod(rest)

    def folded(self, fold: Fold) -> Tensor:
        """The term of the one call."""
        spread = self.needed and not self.is_mapped
        t = self.tensor.expand(fold.n, *self.tensor.shape) if spread else self.tensor
        folded = fold.fold_planes(t, self.is_mapped or spread)
        if not self.is_table:
            return folded
        heads = fold.heads * {"batch": 1, "heads": fold.n, "samples": fold.batch}[fold.into]
        return (folded[0].expand(heads) if self.is_sinks else folded[0]).contiguous()

    def of_slices(self, fold: Fold, gradient: Tensor) -> Tensor:
        """The gradient of each slice, `[n, ...]`, of that of `folded`."""
        if not self.is_table:
            return fold.unfold_planes(gradient, self.of)
        return fold.unfold_planes(gradient[None], self.of)[:, 0]


class _Call(NamedTuple):
    """The arguments of an operator as its rule finds them, tensors with the mapped dimension first."""

    n: int
    # q, k, v and so on, `[n, batch, heads, ...]`
    tensors: list[Tensor | None]
    mask: MappedMask
    dense: list[_Term]
    tables: list[_Term]
    # q_code and k_code of each table
    codes: list[tuple[Tensor, Tensor]]
    sinks: _Term | None
    seed: Tensor | None
    seed_is_mapped: bool
    diagonal: int
    # from sm_scale on
    numbers: tuple[Any, ...]

    @property
    def terms(self) -> list[_Term]:
        """All parts of the scores, in the order of their gradients."""
        return [*self.dense, *self.tables, *([] if self.sinks is None else [self.sinks])]

    def choose(self) -> Fold | None:
        """Where the slices go; None if they run one by one.

        The pairs that dropout keeps depend on it, so both passes choose alike: by nothing that one of them only knows.
        """
        if self.seed is not None and not self.seed_is_mapped:
            # the same pairs in all slices
            return None
        q = self.tensors[0]
        assert q is not None
        found: list[tuple[int, int, Fold]] = []
        for rank, fold in enumerate(Fold.all(self.n, q)):
            costs = [term.cost(fold, self.seed is None) for term in self.terms]
            if self.seed is not None and fold.into != "heads" and any(t.is_table for t in self.terms):
                # a gradient of a table may be asked for later
                continue
            if self.mask.fits(fold) and None not in costs:
                found.append((sum(c for c in costs if c is not None), rank, fold))
        cost, _, best = min(found, default=(0, 0, None))
        return best if cost <= q.numel() else None

    def together(self, op: Any, fold: Fold) -> list[Tensor]:
        """The outputs of the one call."""
        tensors = [None if t is None else fold.fold(t) for t in self.tensors]
        tables = [term.folded(fold) for term in self.tables]
        lookups = [t for table, codes in zip(tables, self.codes, strict=True) for t in (table, *codes)]
        sinks = None if self.sinks is None else self.sinks.folded(fold)
        seed = None if self.seed is None else self.seed[0]
        dense = [term.folded(fold) for term in self.dense]
        mask = self.mask.folded(fold)
        return list(op(*tensors, mask, dense, lookups, self.diagonal, sinks, seed, *self.numbers))

    def one(self, op: Any, i: int) -> list[Tensor]:
        """The outputs of slice i."""

        def of(term: _Term) -> Tensor:
            t = term.tensor[i] if term.is_mapped else term.tensor
            return t[0] if term.is_table else t

        lookups = [t for term, codes in zip(self.tables, self.codes, strict=True) for t in (of(term), *codes)]
        sinks = None if self.sinks is None else of(self.sinks)
        seed = self.seed[i] if self.seed is not None and self.seed_is_mapped else self.seed
        tensors = [None if t is None else t[i] for t in self.tensors]
        dense = [of(term) for term in self.dense]
        mask = self._mask_of_slice(i)
        return list(op(*tensors, mask, dense, lookups, self.diagonal, sinks, seed, *self.numbers))

    def _mask_of_slice(self, i: int) -> list[Tensor]:
        if not self.mask.is_mapped:
            return self.mask.tensors
        q, k = self.tensors[:2]
        assert q is not None
        assert k is not None
        batch, heads = self.mask.planes
        # its lists are those of samples, as they were packed
        whole = [*self.mask.tensors[:HAS_PAIR], *(t.flatten(0, 1) for t in self.mask.has_pair())]
        bounds = i * batch, (i + 1) * batch, 0, heads
        found: list[Tensor] = torch.ops.anymask.slice_planes(whole, q.shape[3], k.shape[3], *bounds)
        return found


def _read(n: int, in_dims: Sequence[Any], args: Sequence[Any], n_tensors: int, needs: Sequence[bool]) -> _Call:
    tensors = [first(t, d, n) for t, d in zip(args[:n_tensors], in_dims, strict=False)]
    mask, dense, lookups, diagonal, sinks, seed, *numbers = args[n_tensors:]
    mask_dims, dense_dims, lookup_dims, _, sinks_dim, seed_dim = in_dims[n_tensors : n_tensors + 6]
    flags = iter(needs)

    def moved(t: Tensor, dim: int | None) -> Tensor:
        return t if dim is None else t.movedim(dim, 0)

    def table(t: Tensor, dim: int | None, is_sinks: bool = False) -> _Term:
        t = moved(t, dim)
        return _Term(t[None] if dim is None else t[:, None], dim is not None, next(flags), True, is_sinks)

    if any(d is not None for place, d in enumerate(lookup_dims) if place % PARTS):
        raise NotImplementedError("codes of a table are mapped by torch.vmap; allowed are those of all slices")
    terms = [_Term(moved(t, d), d is not None, next(flags)) for t, d in zip(dense, dense_dims, strict=True)]
    tables = [table(t, d) for t, d in zip(lookups[::PARTS], lookup_dims[::PARTS], strict=True)]
    return _Call(
        n,
        tensors,
        MappedMask.of(mask, mask_dims),
        terms,
        tables,
        list(zip(lookups[1::PARTS], lookups[2::PARTS], strict=True)),
        None if sinks is None else table(sinks, sinks_dim, True),
        None if seed is None else moved(seed, seed_dim),
        seed_dim is not None,
        diagonal,
        tuple(numbers),
    )


def forward_rule_of(op: Any) -> Callable[..., Any]:
    """The rule of `anymask::scored_forward`."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        n_terms = len(args[4]) + len(args[5]) // PARTS + 1
        call = _read(info.batch_size, in_dims, args, 3, [False] * n_terms)
        fold = call.choose()
        if fold is None:
            slices = [call.one(op, i) for i in range(call.n)]
            return tuple(torch.stack(parts) for parts in zip(*slices, strict=True)), (0, 0)
        return tuple(fold.unfold(t) for t in call.together(op, fold)), (0, 0)

    return rule


def backward_rule_of(op: Any) -> Callable[..., Any]:
    """The rule of `anymask::scored_backward`, whose last argument says which gradients of the scores are wanted."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        call = _read(info.batch_size, in_dims, args, 7, args[-1])
        fold = call.choose()
        if fold is None:
            slices = [call.one(op, i) for i in range(call.n)]
            found = [torch.stack(parts) for parts in zip(*slices, strict=True)]
        else:
            gradients = call.together(op, fold)
            needed = [term for term in call.terms if term.needed]
            found = [fold.unfold(t) for t in gradients[:3]]
            found += [term.of_slices(fold, t) for term, t in zip(needed, gradients[3:], strict=True)]
        return found, [0] * len(found)

    return rule
