"""`Scores`: what happens to the scores of a call beside its mask, as backends take it. It needs torch alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Lookup:
    """A bias that is read from a table: entry `table[h, q_code[i] - k_code[j]]` for query i and key j.

    Attributes:
        table: `[1 or q_heads, n]`, fp32, or fp64 for fp64 inputs; contiguous.
        q_code: int32 `[q_len]`; `q_code[i] - k_code[j]` is in `[0, n)` for every pair.
        k_code: int32 `[kv_len]`.
        is_diagonal: the codes are `arange(q_len) + kv_len - 1` and `arange(kv_len)`, so that n is `q_len + kv_len - 1`
            and the gradient of an entry is the sum of a diagonal.
    """

    table: Tensor
    q_code: Tensor
    k_code: Tensor
    is_diagonal: bool


@dataclass(frozen=True)
class Scores:
    """`softmax(where(mask, softcap(s + dense + lookups), -inf) with sinks)`, then dropout; validated, never expanded.

    Attributes:
        dense: terms of the bias, each `[batch or 1, q_heads or 1, q_len or 1, kv_len or 1]`, fp16, bf16, fp32 or fp64,
            of any strides. A size of 1 is broadcast.
        lookups: terms that are read from tables.
        softcap: c of `c tanh(s / c)`; 0.0 is none.
        sinks: `[q_heads]`, fp32, or fp64 for fp64 inputs: logits that the denominator has beside the keys'; or None.
        dropout_p: probability that a weight becomes 0; 0.0 is none.
        seed: int64 `[2]` on the device of q, (seed, offset) of the generator; None without dropout.
    """

    dense: tuple[Tensor, ...] = ()
    lookups: tuple[Lookup, ...] = ()
    softcap: float = 0.0
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def in_words(self) -> str:
        """One line: terms of the bias with shape and dtype, and what else happens."""
        parts = [f"bias {list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in self.dense]
        for lookup in self.lookups:
            kind = "by distance" if lookup.is_diagonal else "by place"
            parts.append(f"table {list(lookup.table.shape)} {kind}")
        if self.softcap:
            parts.append(f"softcap {self.softcap:g}")
        if self.sinks is not None:
            parts.append("sinks")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p:g}")
        return ", ".join(parts)


class Needs(NamedTuple):
    """Which gradients beside those of q, k and v anybody wants."""

    dense: tuple[bool, ...]
    tables: tuple[bool, ...]
    sinks: bool


class ScoreGrads(NamedTuple):
    """What `backward_scores` of a backend returns.

    Attributes:
        dq, dk, dv: as of `backward`.
        dense: fp32, fp64, or the dtype of its term, each in the shape of its term; None where it is not needed.
        tables: fp32, or fp64, `[1 or q_heads, n]`; None where it is not needed.
        sinks: `[q_heads]`; None where it is not needed.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dense: tuple[Tensor | None, ...]
    tables: tuple[Tensor | None, ...]
    sinks: Tensor | None
