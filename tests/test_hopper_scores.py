"""Scores as the Hopper backend takes them: which calls, what its kernels read, where gradients come from. No GPU."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from anymask import backends
from anymask.backends import hopper
from anymask.backends.gpu.passes import BackwardCall
from anymask.backends.hopper import scores as hopper_scores
from anymask.backends.hopper.columns import LEAST_SCALE
from anymask.backends.hopper.scores import UNIT, backward_terms, forward_scores, kernel_terms, why_not_scores
from anymask.precision import LOG2_E
from anymask.scores import Scores
from tests.helpers import scored

Q_LEN, KV_LEN = 100, 140


@pytest.fixture(autouse=True)
def all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every kind of scores had been compared on a GPU."""
    kinds = "bias of keys", "bias of queries", "bias of pairs", "table", "softcap", "dropout"
    monkeypatch.setattr(hopper_scores, "COMPARED", frozenset(kinds))


def make(**kinds: Any) -> Scores:
    return scored.make_call("none", shape=(2, 4, 2, Q_LEN, KV_LEN), **kinds).scores


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ({"dense": ("keys", "queries", "one", "keys_by_head"), "tables": ("relative", "relative_shared")}, None),
        ({"softcap": 20.0, "sinks": True, "dropout_p": 0.1}, None),
        ({"tables": ("window",)}, "a table is read by place"),
        ({"dense": ("shared", "full")}, "the copy engine takes one"),
        ({"dense": ("shared",), "bias_dtype": torch.float32}, "of 16 bits"),
        ({"dense": ("keys",), "bias_dtype": torch.float64}, "a bias is torch.float64"),
        ({"dropout_p": 31744 / 32768}, None),
        ({"dropout_p": 31745 / 32768}, "dropout_p is 0.968781, the kernels take up to 0.96875"),
    ],
)
def test_which_scores_it_takes(kinds: dict[str, Any], reason: str | None) -> None:
    found = why_not_scores(make(**kinds), wide=False)
    assert found is None if reason is None else found is not None and reason in found


def test_what_no_gpu_has_compared_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_scores, "COMPARED", frozenset({"softcap"}))
    assert why_not_scores(make(softcap=2.0, sinks=True), False) is None
    assert "the call has a dropout" in str(why_not_scores(make(softcap=2.0, dropout_p=0.1), False))


def test_a_bias_of_pairs_has_aligned_rows() -> None:
    wide = torch.randn(1, 4, Q_LEN, 168).half()
    assert why_not_scores(Scores((wide[..., :KV_LEN],)), False) is None
    for bias in (wide[..., 1 : KV_LEN + 1], wide[..., :161:2], torch.randn(1, 1, Q_LEN, 141).half()):
        assert "multiples of 16 bytes" in str(why_not_scores(Scores((bias,)), False))
    # the stride of a dimension of 1 is never taken
    assert (
        why_not_scores(Scores((wide[:, :1, :, :KV_LEN].as_strided((1, 1, Q_LEN, KV_LEN), (3, 5, 168, 1)),)), False)
        is None
    )


def test_wide_heads_take_sinks_alone() -> None:
    assert why_not_scores(make(sinks=True), wide=True) is None
    assert "up to head_dim 128" in str(why_not_scores(make(softcap=2.0), wide=True))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_kernels_read_the_whole_bias(softcap: float) -> None:
    """What they read for each pair, by their indices, is the sum of the terms; -inf hides a pair."""
    dense = ("keys", "keys_by_head", "heads", "one", "queries")
    scores = make(
        dense=dense, tables=("relative", "relative_shared"), softcap=softcap, hidden=0.1, bias_dtype=torch.float32
    )
    scores.dense[0][0, 0, 0, 5], scores.dense[1][0, :, 0, 5] = math.nan, -math.inf
    terms, qk_scale = kernel_terms(scores, 0.25, Q_LEN, KV_LEN)
    unit = UNIT / softcap if softcap else LOG2_E
    assert qk_scale == pytest.approx(0.25 * unit)
    assert terms.cap == ((softcap * LOG2_E,) if softcap else ())
    i, j = torch.arange(Q_LEN)[:, None], torch.arange(KV_LEN)
    for sample in range(2):
        for head in range(4):
            (keys,), (queries,), (by_distance,) = terms.keys, terms.queries, terms.diagonals
            got = keys.source.flatten()[sample * keys.batch + head * keys.head + j]
            got = got + queries.source.flatten()[sample * queries.batch + head * queries.head + i]
            got = got + by_distance.source.flatten()[head * by_distance.head + i - j + by_distance.origin]
            want = _bias(scores, sample, head) * unit
            hidden = want == -math.inf
            assert torch.equal(got == -math.inf, hidden)
            torch.testing.assert_close(got[~hidden], want[~hidden].float(), atol=1e-5, rtol=1e-5)


def _bias(scores: Scores, sample: int, head: int) -> Tensor:
    total, hidden = torch.zeros(Q_LEN, KV_LEN, dtype=torch.float64), torch.zeros(Q_LEN, KV_LEN, dtype=torch.bool)
    for term in scores.dense:
        one = term[min(sample, term.shape[0] - 1), min(head, term.shape[1] - 1)].double()
        total, hidden = total + one, hidden | (one == -math.inf)
    for x in scores.lookups:
        entry = (x.q_code[:, None] - x.k_code[None, :]).long()
        total = total + x.table[min(head, x.table.shape[0] - 1)][entry]
    return total.masked_fill(hidden, -math.inf)


def test_tiles_beyond_the_lengths_are_there() -> None:
    terms, _ = kernel_terms(make(dense=("keys", "queries"), tables=("relative",)), 0.25, Q_LEN, KV_LEN)
    assert terms.keys[0].source.shape == (2, 1, 256)
    assert terms.queries[0].source.shape == (2, 4, 128)
    (x,) = terms.diagonals
    # query 127 with key 0, and query 0 with key 255
    assert x.origin == 255
    assert 127 + x.origin < x.source.shape[1]
    assert all(t.isfinite().all() for t in (terms.keys[0].source, terms.queries[0].source, x.source))


def test_nothing_but_sinks_is_no_terms() -> None:
    for scores in (None, make(sinks=True)):
        assert kernel_terms(scores, 0.25, Q_LEN, KV_LEN) == ((), pytest.approx(0.25 * LOG2_E))
    assert forward_scores(make(dense=("shared",)), 0.25, torch.empty(2, 4, Q_LEN, 16), KV_LEN).pairs is not None


@pytest.mark.parametrize(
    ("kinds", "scale", "is_taken"),
    [
        ({"dense": ("keys",)}, 0.25, True),
        ({"dense": ("keys_by_head", "one"), "sinks": True, "dropout_p": 0.1}, 0.25, True),
        ({"dense": ("keys", "queries")}, 0.25, False),
        ({"dense": ("keys",), "tables": ("relative",)}, 0.25, False),
        ({"dense": ("keys",), "softcap": 2.0}, 0.25, False),
        ({"dense": ("keys",)}, -0.25, False),
        ({"dense": ("keys",)}, LEAST_SCALE / 2, False),
        ({"dropout_p": 0.1}, 0.25, False),
    ],
)
def test_which_biases_are_more_columns_of_k(
    kinds: dict[str, Any], scale: float, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    columns = torch.empty(2, 1, KV_LEN, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(hopper_scores, "key_columns", lambda bias, *_: given.append(bias) or columns)
    scores = make(**kinds, bias_dtype=torch.float32)
    found = forward_scores(scores, scale, torch.empty(2, 4, Q_LEN, 16), KV_LEN)
    assert (found.columns is columns) is is_taken is bool(given)
    # then the terms have all but that bias
    assert bool(found.terms) is (not is_taken or "dropout_p" in kinds)
    assert not is_taken or not found.terms or (found.terms.keys, len(found.terms.dropout)) == ((), 1)
    if is_taken:
        (bias,) = given
        wanted = [t.squeeze(2).expand(2, 4, KV_LEN) for t in scores.dense]
        torch.testing.assert_close(bias.expand(2, 4, KV_LEN), torch.stack(wanted).sum(0))


@pytest.mark.parametrize(
    ("kind", "together", "samples"), [("full", 1, ()), ("by_head", 3, (3,)), ("by_sample", 4, ()), ("shared", 8, (3,))]
)
def test_what_shares_a_bias_of_pairs_is_computed_together(kind: str, together: int, samples: tuple[int, ...]) -> None:
    call = scored.make_call("none", (kind,), shape=(3, 4, 2, Q_LEN, KV_LEN - 4))
    found = forward_scores(call.scores, 0.25, call.q, KV_LEN - 4)
    assert found.swizzle_heads(1, call.q) == together
    assert found.swizzle_heads(20, call.q) == 20
    assert found.terms.pairs[0].samples == samples


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        ({"sinks": True}, "FORWARD"),
        ({"dense": ("keys",), "softcap": 2.0}, "FORWARD_TERMS"),
        ({"dense": ("shared",), "sinks": True}, "FORWARD_PAIRS"),
        ({"dense": ("shared", "keys")}, "FORWARD_PAIRS_TERMS"),
        ({"dense": ("shared",), "softcap": 2.0}, "FORWARD_PAIRS_TERMS"),
        ({"dense": ("shared",), "dropout_p": 0.1}, "FORWARD_PAIRS_TERMS"),
    ],
)
def test_which_options_a_forward_pass_takes(kinds: dict[str, Any], name: str) -> None:
    """A second pair of warpgroups leaves no registers for more than a bias of pairs."""
    found = forward_scores(make(**kinds), 0.25, torch.empty(2, 4, Q_LEN, 16), KV_LEN)
    assert found.configs is getattr(hopper.tuning, name)


@pytest.mark.parametrize("kind", ["by_head", "by_sample"])
def test_the_backward_kernel_reads_a_bias_of_pairs(kind: str) -> None:
    scores = make(dense=(kind,))
    q, k = torch.empty(2, 4, Q_LEN, 16), torch.empty(2, 2, KV_LEN, 16)
    found = backward_terms(scores, BackwardCall(q, k, k, q, q, q, None, None, None, 0.25))
    assert found.pairs is scores.dense[0]
    (pairs,) = found.terms.pairs
    assert (pairs.batch, pairs.head) == {"by_head": (0, -1), "by_sample": (-1, 0)}[kind]
    # samples that share a bias come one after the other
    assert pairs.samples == {"by_head": (2,), "by_sample": ()}[kind]
    qk_scale, terms, descriptor = found.arguments(64)
    assert (qk_scale, terms) == (found.qk_scale, found.terms)
    assert (descriptor.base, descriptor.block_shape) == (scores.dense[0], [1, 1, 64, 64])


def test_where_gradients_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    names = SimpleNamespace(hopper=hopper, triton=backends.load("triton"))
    monkeypatch.setattr(hopper_scores, "COMPARED_GRADIENTS", frozenset({"softcap", "bias of keys"}))
    assert backends.for_gradients(names.hopper, make(sinks=True)) is names.hopper
    assert backends.for_gradients(names.hopper, make(softcap=2.0, dense=("keys",))) is names.hopper
    assert backends.for_gradients(names.hopper, make(softcap=2.0, dropout_p=0.1)) is names.triton
    assert "the call has a dropout" in str(hopper.why_not_gradients(make(softcap=2.0, dropout_p=0.1)))
    assert backends.for_gradients(names.triton, make(softcap=2.0)) is names.triton
    assert backends.for_gradients(names.hopper, make(dense=("keys", "by_head"))) is names.triton


@pytest.mark.parametrize(
    ("kinds", "is_shift", "has_terms"),
    [
        ({"dense": ("queries",)}, True, False),
        ({"dense": ("queries",), "dropout_p": 0.1}, True, True),
        ({"dense": ("queries", "keys")}, False, True),
        ({"dense": ("queries",), "tables": ("relative",)}, False, True),
        ({"dense": ("queries",), "softcap": 2.0}, False, True),
        # NaN of a pair whose query is hidden stays hidden
        ({"dense": ("queries", "shared")}, False, True),
        ({"sinks": True}, False, False),
    ],
)
def test_a_bias_of_queries_alone_is_in_lse(kinds: dict[str, Any], is_shift: bool, has_terms: bool) -> None:
    scores = make(**kinds, hidden=0.2)
    q, k = torch.empty(2, 4, Q_LEN, 16), torch.empty(2, 2, KV_LEN, 16)
    lse2 = torch.full((2, 4, 128), math.inf)
    lse2[..., :Q_LEN] = torch.randn(2, 4, Q_LEN)
    call = BackwardCall(q, k, k, q, lse2.flatten(), lse2.flatten(), None, None, None, 0.25)
    found = backward_terms(scores, call)
    terms = found.terms
    want = lse2.clone()
    if is_shift:
        # that of a hidden query is inf, so that its weights are 0
        want[..., :Q_LEN] -= scores.dense[0].float().squeeze(3) * LOG2_E
    torch.testing.assert_close(found.lse2.view(lse2.shape), want)
    assert bool(terms) is has_terms
    assert not has_terms or bool(terms.queries) is ("queries" in kinds["dense"] and not is_shift)
