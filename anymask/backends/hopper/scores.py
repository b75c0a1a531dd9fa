"""Scores as the Hopper kernels take them: biases padded to whole tiles, in the unit of scores, those alike summed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.backends.gpu.arguments import LOG2_E
from anymask.backends.gpu.passes import BackwardCall
from anymask.backends.gpu.scores import is_loadable
from anymask.backends.hopper import tuning
from anymask.backends.hopper.columns import LEAST_SCALE, columns_descriptor, key_columns, planes_of
from anymask.backends.hopper.descriptors import WARPGROUP_ROWS, block_of, descriptor
from anymask.launch import args_key
from anymask.scores import Scores, dropout
from anymask.tiles import TILE, tiles_over

# tanh(z / UNIT) is what the kernels compute of a score z
UNIT = 4.0
# what of scores, beside sinks, is equal to fp64 on a GPU and faster than by the portable kernels
COMPARED = frozenset({"bias of keys", "bias of queries", "bias of pairs", "table", "softcap", "dropout"})
# of these, what the backward kernel does right and faster too
COMPARED_GRADIENTS = frozenset({"bias of keys", "bias of queries", "bias of pairs", "table", "softcap", "dropout"})
# a threshold of dropout is compared as a number of fp16, and this one is infinity
MOST_DROPPED = 0x7C00
# heads that share a bias of pairs and are computed together
MOST_SHARING = 8
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not_scores(scores: Scores, wide: bool) -> str | None:
    """Why the kernels cannot take the scores, or None. `wide`: a head_dim of kernels that take sinks alone."""
    unknown = [name for name in _asked(scores) if name not in COMPARED]
    if unknown:
        return f"the call has a {unknown[0]}, which other kernels do faster"
    pairs = [t for t in scores.dense if min(t.shape[2:]) > 1]
    for term in scores.dense:
        if term.dtype not in DTYPES:
            return f"a bias is {term.dtype}, the kernels take {', '.join(map(str, DTYPES))}"
    if len(pairs) > 1 or not all(t.element_size() == 2 and is_loadable(t) for t in pairs):
        return (
            "a bias is of pairs, of which the copy engine takes one, of 16 bits and with rows of multiples of 16 bytes"
        )
    if not all(x.is_diagonal for x in scores.lookups):
        return "a table is read by place, the kernels read tables by distance"
    if dropout.threshold(scores.dropout_p) > MOST_DROPPED:
        return f"dropout_p is {scores.dropout_p:g}, the kernels take up to {MOST_DROPPED / dropout.STEPS:g}"
    if wide and has_terms(scores):
        return "the call has a bias, a softcap or dropout, which these kernels have up to head_dim 128"
    return None


def _asked(scores: Scores) -> list[str]:
    """What beside sinks happens to the scores, in words."""
    asked = {
        "bias of keys": any(t.shape[2] == 1 for t in scores.dense),
        "bias of queries": any(t.shape[2] > 1 == t.shape[3] for t in scores.dense),
        "bias of pairs": pairs_of(scores) is not None,
        "table": bool(scores.lookups),
        "softcap": bool(scores.softcap),
        "dropout": scores.seed is not None,
    }
    return [name for name, is_asked in asked.items() if is_asked]


def why_not_gradients(scores: Scores) -> str | None:
    """Why the backward kernels cannot take scores that the forward kernel takes, or None."""
    unknown = [name for name in _asked(scores) if name not in COMPARED_GRADIENTS]
    return f"the call has a {unknown[0]}, whose gradients other kernels do faster" if unknown else None


def has_terms(scores: Scores | None) -> bool:
    """Whether anything beside sinks happens to the scores."""
    return scores is not None and bool(scores.dense or scores.lookups or scores.softcap or scores.seed is not None)


def pairs_of(scores: Scores | None) -> Tensor | None:
    """The bias of pairs, if there is one."""
    return None if scores is None else next((t for t in scores.dense if min(t.shape[2:]) > 1), None)


def kernel_terms(
    scores: Scores | None, sm_scale: float, q_len: int, kv_len: int, samples: int = 1
) -> tuple[Any, float]:
    """`Terms` of kernels/terms.py, () where nothing beside sinks happens to scores, and their `qk_scale`.

    `samples`: of the call, for the order of work tiles.
    """
    if scores is None or not has_terms(scores):
        return (), sm_scale * LOG2_E
    from anymask.backends.hopper.kernels.terms import Dropout, Terms

    unit = UNIT / scores.softcap if scores.softcap else LOG2_E
    keys = _key_biases(scores)
    queries = [t.squeeze(3) for t in scores.dense if t.shape[2] > 1 == t.shape[3]]
    pairs, p, seed = pairs_of(scores), scores.dropout_p, scores.seed
    terms = Terms(
        _vector(keys, kv_len, unit),
        _vector(queries, q_len, unit),
        _diagonals([x.table for x in scores.lookups], q_len, kv_len, unit),
        () if pairs is None else (_pairs(pairs, samples, unit),),
        (scores.softcap * LOG2_E,) if scores.softcap else (),
        () if seed is None else (Dropout(seed, float(dropout.threshold(p)), dropout.keep_scale(p)),),
    )
    return terms, sm_scale * unit


class ForwardScores(NamedTuple):
    """The scores of a call as the forward kernel takes them.

    `pairs`: the bias of pairs, or None. `columns`: of `key_columns`, for a bias of keys, then not in `terms`, or None.
    """

    qk_scale: float
    sinks: Tensor | None
    terms: Any
    pairs: Tensor | None
    columns: Tensor | None

    def arguments(self, rows: int, keys: int) -> tuple[Any, ...]:
        """In the order of the kernel's parameters; so many queries and keys are a block of a bias."""
        bias = None if self.pairs is None else bias_descriptor(self.pairs, rows, keys)
        planes, columns = (), None
        if self.columns is not None:
            planes, columns = planes_of(self.columns), columns_descriptor(self.columns, keys)
        return self.qk_scale, self.sinks, self.terms, bias, columns, planes

    def swizzle_heads(self, usual: int, q: Tensor) -> int:
        """How many heads are swizzled together: of those that share a bias of pairs, as many as fit the L2 cache."""
        if self.pairs is None:
            return usual
        sharing = math.prod(n for n, own in zip(q.shape[:2], self.pairs.shape[:2], strict=True) if own == 1)
        return max(usual, min(sharing, MOST_SHARING))

    @property
    def configs(self) -> tuning.Forward:
        """The launch options that there are for such scores."""
        if self.columns is not None:
            return tuning.FORWARD_COLUMNS_TERMS if self.terms else tuning.FORWARD_COLUMNS
        if self.pairs is None:
            return tuning.FORWARD_TERMS if self.terms else tuning.FORWARD
        has_others = any(part for name, part in self.terms._asdict().items() if name != "pairs")
        return tuning.FORWARD_PAIRS_TERMS if has_others else tuning.FORWARD_PAIRS

    @property
    def key(self) -> tuple[Any, ...]:
        """What the compiled kernel depends on."""
        planes = None if self.columns is None else planes_of(self.columns)
        return self.sinks is None, None if self.pairs is None else self.pairs.dtype, planes, *args_key((self.terms,))


def forward_scores(scores: Scores | None, sm_scale: float, q: Tensor, kv_len: int) -> ForwardScores:
    """What the forward kernel takes of `scores`, of a call with so many keys."""
    columns = None
    if scores is not None and _takes_columns(scores, sm_scale):
        found = _key_biases(scores)
        columns = key_columns(found[0] if len(found) == 1 else _sum(found), kv_len, sm_scale)
        scores = replace(scores, dense=())
    terms, qk_scale = kernel_terms(scores, sm_scale, q.shape[2], kv_len, q.shape[0])
    return ForwardScores(qk_scale, None if scores is None else scores.sinks, terms, pairs_of(scores), columns)


def _key_biases(scores: Scores) -> list[Tensor]:
    """The terms that are the same for all queries: `[batch or 1, heads or 1, kv_len or 1]`."""
    return [t.squeeze(2) for t in scores.dense if t.shape[2] == 1]


def _takes_columns(scores: Scores, sm_scale: float) -> bool:
    """Whether all biases are of keys, and can be more columns of k: nothing else is added or capped after them."""
    is_alone = not (scores.lookups or scores.softcap) and all(t.shape[2] == 1 for t in scores.dense)
    return bool(scores.dense) and is_alone and sm_scale >= LEAST_SCALE


class BackwardTerms(NamedTuple):
    """The scores of a call as the backward kernel takes them; `lse2` as of `launch_delta`, less what is the same.

    `pairs`: the bias of pairs, or None.
    """

    terms: Any
    qk_scale: float
    lse2: Tensor
    pairs: Tensor | None

    def arguments(self, rows: int) -> tuple[Any, ...]:
        """In the order of the kernel's parameters; so many queries are in a block of the bias of pairs."""
        bias = None if self.pairs is None else bias_descriptor(self.pairs, rows, WARPGROUP_ROWS)
        return self.qk_scale, self.terms, bias

    @property
    def key(self) -> tuple[Any, ...]:
        """What the compiled kernel depends on."""
        return None if self.pairs is None else self.pairs.dtype, *args_key((self.terms,))


def backward_terms(scores: Scores | None, call: BackwardCall) -> BackwardTerms:
    """What the backward kernel takes of `scores`.

    A bias of queries that nothing is added to or capped with is a shift of all scores of a query: it is in lse2.
    """
    q_len, kv_len = call.q.shape[2], call.k.shape[2]
    terms, qk_scale = kernel_terms(scores, call.sm_scale, q_len, kv_len, call.q.shape[0])
    lse2 = call.lse2
    if len(terms) and terms.queries and not (terms.keys or terms.diagonals or terms.pairs or terms.cap):
        (shift,) = terms.queries
        lse2 = (lse2.view(*call.q.shape[:2], -1) - shift.source).flatten()
        terms = terms._replace(queries=()) if terms.dropout else ()
    return BackwardTerms(terms, qk_scale, lse2, pairs_of(scores))


def bias_descriptor(bias: Tensor, rows: int, keys: int) -> Any:
    """A descriptor of blocks of so many rows and keys of a bias of pairs."""
    # the stride of a dimension of 1 is never taken, but has to be a multiple of 16 bytes
    b, h, m = (
        step if n > 1 else 16 // bias.element_size() for n, step in zip(bias.shape[:3], bias.stride()[:3], strict=True)
    )
    return descriptor(bias, tuple(bias.shape), (b, h, m, 1), block_of((1, 1, rows, keys), bias.dtype))


def _pairs(bias: Tensor, samples: int, unit: float) -> Any:
    from anymask.backends.hopper.kernels.terms import Pairs

    # what samples share, the L2 cache has for all if they come together
    is_shared = bias.shape[0] < samples
    return Pairs(-(bias.shape[0] > 1), -(bias.shape[1] > 1), unit, (samples,) if is_shared else ())


def _vector(found: list[Tensor], length: int, unit: float) -> tuple[Any, ...]:
    """`(Vector,)` of the sum of biases `[batch or 1, heads or 1, length or 1]`, () of none."""
    if not found:
        return ()
    from anymask.backends.hopper.kernels.terms import Vector

    total = _sum(found) * unit
    batch, heads, _ = total.shape
    padded = _padded(total.expand(batch, heads, length), 0, tiles_over(length) * TILE)
    strides = (step * (n > 1) for n, step in zip((batch, heads), padded.stride(), strict=False))
    return (Vector(padded, *strides),)


def _diagonals(found: list[Tensor], q_len: int, kv_len: int, unit: float) -> tuple[Any, ...]:
    """`(Diagonals,)` of the sum of tables `[heads or 1, q_len + kv_len - 1]`, () of none."""
    if not found:
        return ()
    from anymask.backends.hopper.kernels.terms import Diagonals

    total = _sum(found) * unit
    heads = total.shape[0]
    rows, keys = tiles_over(q_len) * TILE, tiles_over(kv_len) * TILE
    # entry 0 is of the first query and the last key
    padded = _padded(total, keys - kv_len, rows + keys)
    return (Diagonals(padded, padded.shape[1] * (heads > 1), keys - 1),)


def _padded(t: Tensor, before: int, length: int) -> Tensor:
    """`t` with zeros `before` it and after, dense and `length` long; itself, if it is so already."""
    after = length - before - t.shape[-1]
    return torch.nn.functional.pad(t, (before, after)) if before or after else t.contiguous()


def _sum(found: list[Tensor]) -> Tensor:
    """The sum in fp32. -inf hides a pair whatever the others are, NaN too."""
    total = found[0].float()
    for term in found[1:]:
        hidden = (total == -math.inf) | (term == -math.inf)
        total = (total + term).masked_fill(hidden, -math.inf)
    return total
