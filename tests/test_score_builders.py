"""Biases by name: what they stand for, what a score_mod becomes, and every bad argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from anymask import (
    Bias,
    alibi,
    attention,
    explain,
    from_score_mod,
    low_rank,
    relative,
    relative_2d,
    relative_buckets,
)
from anymask.scores import resolve
from anymask.testing import attend
from tests.helpers.score_cases import assert_same, leaf


class TestBuilders:
    def test_buckets_are_those_of_t5(self) -> None:
        modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
        q, heads = torch.zeros(1, 3, 70, 4), 3
        for bidirectional, offset in product((True, False), (0, 60)):
            table = torch.randn(32, heads)
            ahead = torch.arange(130) - torch.arange(70)[:, None] - offset
            bucket = modeling.T5Attention._relative_position_bucket(ahead, bidirectional, 32, 128)
            made = relative_buckets(table, bidirectional=bidirectional, offset=offset)
            _, _, scores = resolve(q, torch.zeros(1, 3, 130, 4), 1.0, made, None, None, 0.0)
            (lookup,) = scores.lookups
            torch.testing.assert_close(
                lookup.table[:, lookup.q_code[:, None] - lookup.k_code], table[bucket].permute(2, 0, 1), rtol=0, atol=0
            )

    def test_windows_are_those_of_swin(self) -> None:
        height, width, heads = 3, 4, 2
        q, table = torch.randn(5, heads, 12, 8), torch.randn(5 * 7, heads, requires_grad=True)
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        between = places[:, None] - places + torch.tensor([height - 1, width - 1])
        bias = table[between[..., 0] * (2 * width - 1) + between[..., 1]].permute(2, 0, 1)
        results = [attention(q, q, q, bias=b) for b in (relative_2d(table, height, width), bias)]
        torch.testing.assert_close(*results)
        grads = [torch.autograd.grad(o.square().sum(), table)[0] for o in results]
        torch.testing.assert_close(*grads)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_low_rank_keeps_a_wider_dtype(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 2, n, 24).to(dtype) for n in (50, 60, 60))
        a, b = torch.randn(50, 2, requires_grad=True), torch.randn(60, 2, requires_grad=True)
        # large terms, whose rounding to 16 bits would be seen
        bias = 40 * (a @ b.mT)
        o, wanted = attention(q, k, v, bias=low_rank(40 * a, b)), attend(q, k, v, bias=bias)[0]
        eps = torch.finfo(dtype).eps
        # scores of hundreds, in fp32, are rounded to hundreds of eps
        assert_same([o], [wanted], dtype, 4 * eps if dtype != torch.float32 else 200 * eps)
        grads = [torch.autograd.grad(x.square().sum(), (a, b), retain_graph=True) for x in (o, wanted)]
        assert_same(*grads, dtype, 16 * eps if dtype != torch.float32 else 1e-4)

    def test_low_rank_alone_is_no_scores(self) -> None:
        q = torch.randn(1, 2, 9, 8)
        explained = explain(q, q, q, bias=low_rank(torch.randn(9, 1), torch.randn(9, 1)))
        assert explained.scores is None
        views = torch.randn(1, 9, 2, 8).transpose(1, 2)
        assert (
            attention(views, views, views, bias=low_rank(torch.randn(9, 1), torch.randn(9, 1))).stride()
            == views.stride()
        )

    def test_tables_of_distances_are_one(self) -> None:
        q = torch.randn(1, 2, 9, 8)
        bias = alibi(torch.ones(2)) + relative(torch.randn(1, 17)) + relative_buckets(torch.randn(8, 2))
        assert explain(q, q, q, bias=bias).scores == "table [2, 17] by distance"


class TestScoreMods:
    @pytest.mark.parametrize(
        ("fn", "shape"),
        [
            (lambda s, b, h, q, k: s + 1.0, [1, 1, 1, 1]),
            (lambda s, b, h, q, k: s - 0.1 * (q - k).abs(), [1, 1, 9, 7]),
            (lambda s, b, h, q, k: s + 0.5 * h, [1, 4, 1, 1]),
            (lambda s, b, h, q, k: s + b * k, [2, 1, 1, 7]),
            (lambda s, b, h, q, k: torch.where(q >= k, s, -math.inf), [1, 1, 9, 7]),
            (lambda s, b, h, q, k: s + 0 * b + torch.sin(h * q * k), [2, 4, 9, 7]),
        ],
    )
    def test_only_what_fn_reads(self, fn: Any, shape: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("anymask.scores.score_mod.PAIRS", 50)
        q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 7, 8)
        assert explain(q, k, k, bias=from_score_mod(fn)).scores == f"bias {shape} float32"
        b, h, i, j = (torch.arange(n).view([-1 if d == a else 1 for a in range(4)]) for d, n in enumerate((2, 4, 9, 7)))
        dense = fn(torch.zeros(2, 4, 9, 7), b, h, i, j)
        torch.testing.assert_close(attention(q, k, k, bias=from_score_mod(fn)), attend(q, k, k, bias=dense)[0].float())

    def test_gradients_reach_what_fn_captured(self) -> None:
        weight, at_key = leaf(4), leaf(7)
        q, k = leaf(2, 4, 9, 8), leaf(2, 2, 7, 8)
        o = attention(q, k, k, bias=from_score_mod(lambda s, b, h, i, j: s + weight[h] * at_key[j]))
        wanted = attend(q, k, k, bias=weight[:, None, None] * at_key)[0]
        assert_same(*[torch.autograd.grad(x.square().sum(), (q, weight, at_key)) for x in (o, wanted)], "score_mod")

    @pytest.mark.compile
    def test_a_compiled_function_leaves_its_graph_for_one(self) -> None:
        bias = from_score_mod(lambda s, b, h, q, k: s + k)
        q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(lambda: attention(q, k, k, bias=bias), backend="eager", fullgraph=True)()
        compiled = torch.compile(lambda: 2 * attention(q, k, k, bias=bias), backend="eager")
        torch.testing.assert_close(compiled(), 2 * attention(q, k, k, bias=bias))

    @pytest.mark.parametrize(
        ("fn", "says"),
        [
            (lambda s, b, h, q, k: 50 * torch.tanh(s / 50), r"this is attention\(\.\.\., softcap=50\)$"),
            (lambda s, b, h, q, k: 30 * torch.tanh((s + k) / 30), "functions that add a bias$"),
            (lambda s, b, h, q, k: 2 * s, "fn makes 2 of a score of 1, and 0 of 0, at b=0, h=0, q_idx=0, kv_idx=0"),
            (lambda s, b, h, q, k: torch.where(k == 6, s * s, s), "kv_idx=6"),
            (lambda s, b, h, q, k: 1.0, "fn returned 1.0"),
            (lambda s, b, h, q, k: q > k, r"fn returned torch\.bool"),
        ],
    )
    def test_others_are_refused(self, fn: Any, says: str) -> None:
        q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 7, 8)
        with pytest.raises(ValueError, match=says):
            attention(q, k, k, bias=from_score_mod(fn))


def test_bias_in_an_expression() -> None:
    t, slopes = torch.randn(5, 5), alibi(torch.ones(2))
    assert isinstance(t + slopes, Bias)
    assert isinstance(slopes + t, Bias)
    for other in (1.0, "x", None):
        with pytest.raises(TypeError, match="unsupported operand"):
            slopes + other


zeros = torch.zeros
Q = torch.randn(2, 4, 7, 8)
K = torch.randn(2, 2, 5, 8)
BAD: list[tuple[type[Exception], str, Callable[[], dict[str, Any]]]] = [
    (
        ValueError,
        r"bias has shape \(3, 4, 7, 5\), 3 along batch; allowed are 1 and 2",
        lambda: {"bias": zeros(3, 4, 7, 5)},
    ),
    (ValueError, r"bias has shape \(2, 7, 5\), 2 along q_heads; allowed are 1 and 4", lambda: {"bias": zeros(2, 7, 5)}),
    (ValueError, r"bias has dtype torch\.complex64", lambda: {"bias": zeros(7, 5, dtype=torch.complex64)}),
    (ValueError, "table has 12 distances; allowed are 11 for q_len=7", lambda: {"bias": relative(zeros(4, 12))}),
    (
        ValueError,
        "max_distance is 8; allowed are 9",
        lambda: {"bias": relative_buckets(zeros(32, 4), max_distance=8)},
    ),
    (ValueError, r"table has shape \(8, 4\); allowed is \[9, q_h", lambda: {"bias": relative_2d(zeros(8, 4), 2, 2)}),
    (ValueError, "width 2 are 4 tokens but q_len is 7", lambda: {"bias": relative_2d(zeros(9, 4), 2, 2)}),
    (ValueError, "b has 4 along heads; allowed are 1 and 2", lambda: {"bias": low_rank(zeros(7, 2), zeros(4, 5, 2))}),
    (ValueError, r"bias has shape \(5, 7\), 5 along q_len; allowed are 1 and 7", lambda: {"bias": zeros(5, 7)}),
    (ValueError, r"bias has shape \(4,\), 4 along kv_len; allowed are 1 and 5", lambda: {"bias": zeros(4)}),
    (ValueError, "bias has shape .*; allowed are up to 4 dimensions", lambda: {"bias": zeros(1, 1, 1, 7, 5)}),
    (ValueError, r"bias has dtype torch\.int32; allowed", lambda: {"bias": zeros(7, 5, dtype=torch.int32)}),
    (ValueError, "a bool tensor is a mask, pass mask=", lambda: {"bias": zeros(7, 5, dtype=torch.bool)}),
    (ValueError, "bias is on meta but q is on cpu", lambda: {"bias": zeros(7, 5, device="meta")}),
    (ValueError, "bias is a tensor that is sparse", lambda: {"bias": zeros(7, 5).to_sparse()}),
    (TypeError, "bias is a float; allowed is None, a float tensor, a Bias", lambda: {"bias": 1.0}),
    (ValueError, r"softcap is 0\.0; allowed are None and finite numbers above 0", lambda: {"softcap": 0.0}),
    (ValueError, "softcap is -3", lambda: {"softcap": -3}),
    (ValueError, "softcap is nan", lambda: {"softcap": math.nan}),
    (ValueError, "softcap is inf", lambda: {"softcap": math.inf}),
    (TypeError, "softcap is a str", lambda: {"softcap": "50"}),
    (TypeError, "softcap is a bool", lambda: {"softcap": True}),
    (ValueError, "dropout_p is 1; allowed are numbers from 0 to below 1", lambda: {"dropout_p": 1}),
    (ValueError, r"dropout_p is -0\.1", lambda: {"dropout_p": -0.1}),
    (ValueError, "dropout_p is nan", lambda: {"dropout_p": math.nan}),
    (TypeError, "dropout_p is a NoneType", lambda: {"dropout_p": None}),
    (ValueError, r"sinks has shape \(2,\); allowed are \[4\] and \[4, n\]", lambda: {"sinks": zeros(2)}),
    (ValueError, r"sinks has shape \(4, 0\)", lambda: {"sinks": zeros(4, 0)}),
    (ValueError, r"sinks has dtype torch\.int64", lambda: {"sinks": zeros(4, dtype=torch.int64)}),
    (TypeError, "sinks is a list", lambda: {"sinks": [0.0] * 4}),
    (ValueError, r"slopes has shape \(4, 1\); allowed is one dimension", lambda: {"bias": alibi(zeros(4, 1))}),
    (ValueError, "slopes has 3 heads but q has 4", lambda: {"bias": alibi(zeros(3))}),
    (TypeError, "offset is 0.5", lambda: {"bias": alibi(zeros(4), 0.5)}),
    (ValueError, r"table has shape \(11,\)", lambda: {"bias": relative(zeros(11))}),
    (ValueError, "table has 3 heads but q has 4", lambda: {"bias": relative(zeros(3, 11))}),
    (ValueError, "table has 3 buckets", lambda: {"bias": relative_buckets(zeros(3, 4))}),
    (TypeError, "table is a list", lambda: {"bias": relative_buckets([1.0])}),
    (ValueError, "width is 0", lambda: {"bias": relative_2d(zeros(9, 4), 2, 0)}),
    (ValueError, "a has rank 2 but b has 3", lambda: {"bias": low_rank(zeros(7, 2), zeros(5, 3))}),
    (ValueError, r"a has shape \(7,\)", lambda: {"bias": low_rank(zeros(7), zeros(5, 3))}),
    (ValueError, "a has 5 rows; allowed are 7", lambda: {"bias": low_rank(zeros(5, 2), zeros(5, 2))}),
    (ValueError, "scale is 0", lambda: {"bias": low_rank(zeros(7, 2), zeros(5, 2)), "scale": 0.0}),
    (TypeError, "fn is a str", lambda: {"bias": from_score_mod("x")}),
    (TypeError, "dropout is no argument; write dropout_p", lambda: {"dropout": 0.1}),
    (TypeError, "alibi_slopes is no argument; write bias=alibi", lambda: {"alibi_slopes": zeros(4)}),
    (TypeError, "score_mod is no argument; write bias=from_score_mod", lambda: {"score_mod": len}),
    (ValueError, "backend 'hopper' cannot run this call", lambda: {"softcap": 2.0, "backend": "hopper"}),
]


@pytest.mark.parametrize(("error", "says", "given"), BAD, ids=[says for _, says, _ in BAD])
@pytest.mark.parametrize("call", [attention, explain])
def test_bad_input(call: Any, error: type[Exception], says: str, given: Callable[[], dict[str, Any]]) -> None:
    with pytest.raises(error, match=says):
        call(Q, K, K, **given())
