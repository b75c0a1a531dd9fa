"""Calls with scores inside torch.compile, under counters, and beside calls without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anymask
from anymask import alibi, attention, causal, low_rank, relative, relative_buckets, score_ops
from anymask.scores import resolve
from tests.helpers.score_cases import assert_same, leaf

Q = torch.randn(2, 4, 7, 8)
K = torch.randn(2, 2, 5, 8)


def test_nothing_asked_for_is_the_call_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise AssertionError("scores were made")

    monkeypatch.setattr(anymask.api, "resolve", fails)
    monkeypatch.setattr(score_ops, "dispatch", fails)
    attention(Q, K, K, causal(), bias=None, softcap=None, sinks=None, dropout_p=0.0)


@pytest.mark.compile
class TestCompiled:
    @pytest.mark.parametrize("engine", ["eager", "aot_eager"])
    def test_fullgraph(self, engine: str) -> None:
        torch.manual_seed(0)
        q, k, v = leaf(2, 4, 12, 8), leaf(2, 2, 20, 8), leaf(2, 2, 20, 8)
        leaves = [q, k, v, leaf(4, 12, 20), leaf(4), leaf(1, 31), leaf(32, 4), leaf(12, 2), leaf(20, 2), leaf(4, 2)]

        def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
            t, slopes, table, buckets, a, b, sinks = rest
            bias = alibi(slopes) + t + relative(table) + relative_buckets(buckets) + low_rank(a, b)
            return attention(q, k, v, causal(9), bias=bias, softcap=3.0, sinks=sinks, return_lse=True)

        compiled = torch.compile(call, backend=engine, fullgraph=True)
        outputs, wanted = compiled(*leaves), call(*leaves)
        assert_same(outputs, wanted, engine)
        grads = [torch.autograd.grad([t.sum() for t in x], leaves) for x in (outputs, wanted)]
        assert_same(*grads, engine)

    def test_dropout(self) -> None:
        q = leaf(1, 2, 30, 8)

        def call(q: Tensor) -> Tensor:
            return attention(q, q, q, dropout_p=0.5)

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        results = []
        for run in (compiled, call):
            torch.manual_seed(1)
            o = run(q)
            results.append((o, *torch.autograd.grad(o.square().sum(), q)))
        assert_same(*results, "dropout")

    def test_operators_are_what_they_say(self) -> None:
        q, k = torch.randn(2, 2, 6, 8, requires_grad=True), torch.randn(2, 2, 7, 8, requires_grad=True)
        _, _, scores = resolve(
            q, k, 1.0, torch.randn(2, 6, 7, requires_grad=True) + alibi(torch.rand(2)), 2.0, torch.randn(2), 0.25
        )
        mask = anymask.pack(causal(), q_len=6, kv_len=7).tensors()
        tensors = score_ops.tensors_of(scores)
        tensors = [t.detach() for t in tensors[0]], [t.detach() for t in tensors[1]], *tensors[2:]
        tensors[0][0].requires_grad_()
        torch.library.opcheck(score_ops.forward_op, (q, k, k, mask, *tensors, 1.0, 2.0, 0.25, None, False))

    def test_flops_are_those_of_the_mask(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        counts = []
        for given in ({}, {"softcap": 2.0, "bias": torch.zeros(4, 7, 5)}):
            with FlopCounterMode(display=False) as counter:
                q = Q.clone().requires_grad_()
                attention(q, K, K, causal(), **given).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0
