"""Bias, softcap, sinks and dropout in `attention`, against dense attention in fp64 differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anymask import (
    alibi,
    attention,
    causal,
    explain,
    relative,
)
from anymask.backends import cpu
from anymask.scores import dropout
from anymask.testing import attend
from tests.helpers.memory import AllocationMode
from tests.helpers.score_cases import F64, KINDS, SIZES, assert_same, distances, kept, leaf, make_bias, seed_of

BACKENDS = ["cpu", "reference"]
MASKS: dict[str, Callable[[], tuple[Any, Tensor | None]]] = {
    "no mask": lambda: (None, None),
    "causal": lambda: (causal(20), distances(SIZES[3], SIZES[4]) + 20 >= 0),
    "shared": lambda: (m := torch.rand(SIZES[3], SIZES[4]) < 0.4, m),
    "by head": lambda: (m := (torch.rand(*SIZES[:2], SIZES[3], SIZES[4]) < 0.3) & (torch.rand(12, 1) < 0.8), m),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_every_combination(kind: str | None, mask: str, backend: Any) -> None:
    torch.manual_seed(0)
    batch, heads, kv_heads, q_len, kv_len = SIZES
    for softcap, n_sinks, p in product((None, 1.5), (0, 3), (0.0, 0.3)):
        ours, dense_mask = MASKS[mask]()
        q, k, v = leaf(batch, heads, q_len, 8), leaf(batch, kv_heads, kv_len, 8), leaf(batch, kv_heads, kv_len, 5)
        bias, dense, leaves = (None, None, []) if kind is None else make_bias(kind)
        sinks = leaf(heads, n_sinks) if n_sinks else None
        leaves = [q, k, v, *leaves, *([] if sinks is None else [sinks])]
        given = {"bias": bias, "softcap": softcap, "sinks": sinks, "dropout_p": p, "return_lse": True}
        outputs, seed = seed_of(lambda given=given: attention(q, k, v, ours, backend=backend, **given))  # noqa: B023
        keep = kept(seed, (batch, heads, q_len, kv_len), p) if p else None
        wanted = attend(
            q, k, v, dense_mask, bias=None if dense is None else dense(), softcap=softcap, sinks=sinks, keep=keep
        )
        at = softcap, n_sinks, p
        assert_same(outputs, wanted, at)
        do = [torch.randn_like(t) for t in outputs]
        do[1] = torch.where(wanted[1] == -math.inf, 0, do[1])
        for n in (1, 2):
            grads = [
                torch.autograd.grad(t[:n], leaves, do[:n], retain_graph=True, allow_unused=True)
                for t in (outputs, wanted)
            ]
            grads[1] = tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grads[1], leaves, strict=True))
            assert_same(*grads, (*at, n))


@pytest.mark.parametrize("kind", ["alibi", "relative", "low rank", "sum"])
def test_dense(kind: str) -> None:
    batch, heads, _, q_len, kv_len = sizes = 2, 4, 4, 5, 7
    bias, dense, _ = make_bias(kind, sizes)
    got = bias.to_dense(q_len, kv_len, batch=batch, q_heads=heads)
    torch.testing.assert_close(got.expand(batch, heads, -1, -1), dense().float().expand(batch, heads, -1, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: Any) -> None:
    torch.manual_seed(1)
    q, k, v = leaf(1, 2, 5, 3), leaf(1, 1, 6, 3), leaf(1, 1, 6, 2)
    mask = torch.rand(5, 6) < 0.7
    mask[2] = False

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slopes: Tensor, table: Tensor, sinks: Tensor) -> Any:
        torch.manual_seed(2)
        given: Any = {"bias": bias + alibi(slopes) + relative(table), "softcap": 2.0, "sinks": sinks}
        return attention(q, k, v, mask, backend=backend, dropout_p=0.4, return_lse=True, **given)

    inputs = q, k, v, leaf(2, 1, 6), leaf(2), leaf(1, 10), leaf(2, 2)
    assert torch.autograd.gradcheck(call, inputs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    """Shapes, broadcasts, strides and dtypes at random, in fp32 on the CPU."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    batch, heads = draw(st.integers(1, 3)), kv_heads * group
    q_len, kv_len = draw(st.integers(1, 140)), draw(st.integers(1, 140))
    sizes = batch, heads, q_len, kv_len
    shape = [n if draw(st.booleans()) else 1 for n in sizes]
    t = torch.randn(shape, dtype=draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])))
    layout = draw(st.sampled_from(["plain", "transposed", "slice", "expanded"]))
    if layout == "transposed":
        t = t.mT.contiguous().mT
    elif layout == "slice":
        t = torch.nn.functional.pad(t, (3, 2))[..., 3:-2]
    t = t.detach().requires_grad_()
    bias = t.expand(sizes) if layout == "expanded" else t
    cap, p = draw(st.sampled_from([None, 3.0])), draw(st.sampled_from([0.0, 0.2]))
    sinks = torch.randn(heads).requires_grad_() if draw(st.booleans()) else None
    mask = torch.rand(q_len, kv_len) < draw(st.floats(0.0, 1.0)) if draw(st.booleans()) else None
    q, k, v = (
        torch.randn(batch, h, n, 8).requires_grad_()
        for h, n in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )
    given: dict[str, Any] = {"softcap": cap, "sinks": sinks, "dropout_p": p, "return_lse": True}
    outputs, seed = seed_of(lambda: attention(q, k, v, mask, bias=bias, **given))
    keep = kept(seed, sizes, p) if p else None
    wanted = attend(q, k, v, mask, bias=t, softcap=cap, sinks=sinks, keep=keep)
    assert_same(outputs, wanted, sizes, 1e-4)
    leaves = [q, k, v, t, *([] if sinks is None else [sinks])]
    do = torch.randn_like(outputs[0])
    grads = [torch.autograd.grad(x[0], leaves, do.to(x[0].dtype), allow_unused=True) for x in (outputs, wanted)]
    for x, y, of in zip(*grads, leaves, strict=True):
        limit = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(of.dtype, 1e-3)
        assert x.dtype == of.dtype
        assert_same([x], [torch.zeros_like(of) if y is None else y], (sizes, shape), limit)


# batch, heads, q_len, kv_len, head_dim, shape of the bias, dtype: sizes that others refuse or are wrong for, with a
# batch that a CPU does in a moment
AWKWARD = [
    (3, 8, 77, 77, 64, (3, 8, 77, 77), torch.float16),
    (3, 8, 77, 77, 64, (77, 77), torch.float16),
    (2, 4, 77, 43, 32, (2, 4, 77, 43), torch.float16),
    (2, 4, 77, 43, 32, (1, 1, 77, 43), torch.bfloat16),
    (1, 2, 350, 700, 64, (1, 2, 350, 700), torch.bfloat16),
    (1, 2, 350, 700, 64, (350, 1), torch.bfloat16),
    (1, 1, 33, 4095, 16, (33, 4095), torch.bfloat16),
    (1, 1, 33, 4095, 16, (4095,), torch.float32),
    (2, 3, 129, 129, 24, (1, 1, 129, 129), torch.float32),
    (3, 2, 65, 65, 32, (3, 1, 1, 65), torch.float16),
    (2, 5, 31, 47, 40, (5, 1, 1), torch.float32),
    (1, 2, 256, 256, 80, (2, 256, 256), torch.bfloat16),
    (1, 1, 1, 513, 64, (1, 513), torch.float16),
    (2, 2, 513, 1, 64, (513, 1), torch.float16),
    (2, 2, 1, 1, 8, (2, 2, 1, 1), torch.float32),
    (2, 4, 127, 129, 72, (2, 1, 127, 129), torch.float16),
    (1, 3, 130, 257, 16, (1, 3, 1, 257), torch.bfloat16),
]


@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_awkward_sizes_and_broadcasts(case: Any) -> None:
    batch, heads, q_len, kv_len, dim, shape, dtype = case
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, n, dim).to(dtype).requires_grad_() for n in (q_len, kv_len, kv_len))
    bias = torch.randn(shape).to(dtype).requires_grad_()
    o, wanted = attention(q, k, v, bias=bias), attend(q, k, v, bias=bias)[0]
    eps = torch.finfo(dtype).eps
    assert_same([o], [wanted], case, 4 * eps)
    do = torch.randn(o.shape).to(dtype)
    grads = [torch.autograd.grad(x, (q, k, v, bias), do.to(x.dtype)) for x in (o, wanted)]
    assert grads[0][3].shape == bias.shape
    assert_same(*grads, case, 16 * eps if dtype != torch.float32 else 1e-5)


class TestGradients:
    def test_a_constant_of_a_query_has_a_gradient_of_exactly_zero(self) -> None:
        q = torch.randn(2, 2, 40, 8, requires_grad=True)
        bias = torch.randn(2, 40, 1, requires_grad=True)
        attention(q, q, q, causal(), bias=bias).square().sum().backward()
        assert bias.grad is not None
        assert not bias.grad.any()
        lse = attention(q, q, q, causal(), bias=bias, return_lse=True)[1]
        torch.testing.assert_close(torch.autograd.grad(lse.sum(), bias)[0], torch.full_like(bias, 2.0))
        for more in ({"softcap": 2.0}, {"sinks": torch.zeros(2)}):
            assert torch.autograd.grad(attention(q, q, q, bias=bias, **more).square().sum(), bias)[0].any()

    def test_only_what_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        of_cpu = cpu.backward_scores
        monkeypatch.setattr(cpu, "backward_scores", lambda *args: asked.append(args[-1]) or of_cpu(*args))
        q, table, sinks = torch.randn(1, 2, 9, 8), torch.randn(2, 17), torch.randn(2)
        for n in range(3):
            leaves = [t.clone().requires_grad_(n == i) for i, t in enumerate((torch.randn(9, 9), table, sinks))]
            o = attention(q, q, q, bias=leaves[0] + relative(leaves[1]), sinks=leaves[2])
            o.square().sum().backward()
            assert [t.grad is not None for t in leaves] == [n == 0, n == 1, n == 2]
        assert [tuple(needs) for needs in asked] == [
            ((True,), (False,), False), ((False,), (True,), False), ((False,), (False,), True),
        ]  # fmt: skip

    def test_no_tensor_of_all_pairs(self) -> None:
        q = torch.randn(2, 2, 1500, 8, requires_grad=True)
        leaves = torch.randn(2, 1, 1, 1500), torch.randn(2), torch.randn(1, 2999), torch.randn(2)
        keys, slopes, table, sinks = (t.requires_grad_() for t in leaves)
        with AllocationMode() as memory:
            o = attention(q, q, q, bias=keys + alibi(slopes) + relative(table), softcap=5.0, sinks=sinks, dropout_p=0.1)
            o.sum().backward()
        # the counters of dropout are int64
        assert memory.largest <= 8 * cpu.steps.STEP_SCORES < 4 * q.shape[0] * q.shape[1] * 1500**2

    def test_expanded_tensors_stay_narrow(self) -> None:
        t = torch.randn(1, 1, 20, 20, requires_grad=True)
        q = torch.randn(3, 2, 20, 8)
        assert "bias [1, 1, 20, 20]" in str(explain(q, q, q, bias=t.expand(3, 2, 20, 20)))
        grads = [
            torch.autograd.grad(attention(q, q, q, bias=b).square().sum(), t)[0] for b in (t, t.expand(3, 2, 20, 20))
        ]
        torch.testing.assert_close(*grads)

    def test_two_derivatives_are_refused(self) -> None:
        q = leaf(1, 1, 4, 4)
        (grad,) = torch.autograd.grad(attention(q, q, q, softcap=1.0).sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiated twice"):
            grad.sum().backward()


class TestHiddenPairs:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_nan_of_masked_pairs_reaches_nothing(self, backend: Any, softcap: float | None) -> None:
        q, mask = torch.randn(1, 2, 30, 8, requires_grad=True), torch.rand(30, 30) < 0.5
        clean = torch.randn(2, 30, 30)
        dirty = clean.masked_fill(~mask, math.nan)
        results = []
        for t in (clean, dirty):
            bias = t.clone().requires_grad_()
            o = attention(q, q, q, mask, bias=bias, softcap=softcap, backend=backend)
            results.append((o, *torch.autograd.grad(o.square().sum(), (q, bias))))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_rows_without_a_key(self, backend: Any) -> None:
        q = torch.randn(1, 2, 5, 8, requires_grad=True)
        bias = torch.zeros(5, 5)
        bias[2] = -math.inf
        o, lse = attention(q, q, q, bias=bias, backend=backend, return_lse=True)
        assert not o[:, :, 2].any()
        assert (lse[:, :, 2] == -math.inf).all()
        do = torch.randn_like(o)
        do[:, :, 2] = math.nan
        assert torch.autograd.grad(o, q, do)[0].isfinite().all()
        sinks = torch.randn(2, requires_grad=True)
        mask = torch.ones(5, 5, dtype=torch.bool)
        mask[2] = False
        o, lse = attention(q, q, q, mask, sinks=sinks, backend=backend, return_lse=True)
        assert not o[:, :, 2].any()
        torch.testing.assert_close(lse[0, :, 2], sinks.detach())
        assert all(g.isfinite().all() for g in torch.autograd.grad(o, (q, sinks), do))

    def test_no_keys_at_all(self) -> None:
        q, k, sinks = (
            torch.randn(1, 2, 3, 8, requires_grad=True),
            torch.randn(1, 2, 0, 8),
            torch.randn(2, requires_grad=True),
        )
        o, lse = attention(q, k, k, sinks=sinks, bias=torch.zeros(3, 0), return_lse=True)
        assert not o.any()
        assert torch.equal(lse, sinks[None, :, None].expand(1, 2, 3))
        (o.sum() + lse.sum()).backward()
        assert torch.equal(sinks.grad, torch.full((2,), 3.0))
        assert not q.grad.any()


class TestDropout:
    def test_expectation_and_share(self) -> None:
        torch.manual_seed(0)
        q, v = torch.zeros(64, 4, 32, 8), torch.ones(64, 4, 32, 8)
        for p in (0.1, 0.5, 0.9):
            o = attention(q, q, v, dropout_p=p)
            # a mean of 64 * 4 * 32 * 32 pairs
            assert abs(float(o.mean()) - 1) < 5 * math.sqrt(p / (1 - p)) / 512
        one_key = attention(q, q[:, :, :1], v[:, :, :1], dropout_p=0.3)[..., 0]
        torch.testing.assert_close(one_key.unique(), torch.tensor([0.0, dropout.keep_scale(0.3)]))
        assert abs(float((one_key == 0).double().mean()) - 0.3) < 0.03

    def test_heads_samples_queries_and_keys_differ(self) -> None:
        q, eye = torch.zeros(2, 2, 128, 8), torch.eye(128).expand(2, 2, 128, 128)
        o = attention(q, q, eye, dropout_p=0.5) > 0
        rows = o.flatten(0, 2)
        assert rows.unique(dim=0).shape == rows.shape
        assert o.transpose(2, 3).flatten(0, 2).unique(dim=0).shape == rows.shape

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_generator_of_torch_decides(self, backend: Any) -> None:
        q = torch.randn(1, 2, 40, 8)
        outputs = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            outputs += [attention(q, q, q, dropout_p=0.3, backend=backend) for _ in range(2)]
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[3])
        assert not torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[4])

    def test_explain_draws_nothing(self) -> None:
        q = torch.randn(1, 1, 4, 8)
        state = torch.get_rng_state()
        assert explain(q, q, q, dropout_p=0.25).scores == "dropout 0.25"
        assert torch.equal(torch.get_rng_state(), state)

    def test_backends_and_splits_of_work_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        q = torch.randn(2, 3, 300, 8, dtype=F64, requires_grad=True)
        results = []
        for backend, scores in (("reference", None), ("cpu", None), ("cpu", 128 * 128)):
            if scores:
                monkeypatch.setattr(cpu.steps, "STEP_SCORES", scores)
                monkeypatch.setattr(cpu.steps, "STEP_TILES", 1)
            torch.manual_seed(0)
            o = attention(q, q, q, causal(), dropout_p=0.4, backend=backend)
            results.append((o, *torch.autograd.grad(o.square().sum(), q)))
        assert_same(results[1], results[0], "cpu")
        assert_same(results[2], results[0], "cpu, one tile and head at a time")

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_repeats_it(self, reentrant: bool) -> None:
        def block(x: Tensor, bias: Tensor) -> Tensor:
            return attention(x, x, x, bias=bias, dropout_p=0.5)

        x = torch.randn(1, 2, 60, 16).bfloat16().requires_grad_()
        bias = torch.randn(2, 60, 60).bfloat16().requires_grad_()
        results = []
        for run in (block, lambda *args: checkpoint(block, *args, use_reentrant=reentrant, preserve_rng_state=True)):
            torch.manual_seed(3)
            o = run(x, bias)
            results.append((o, *torch.autograd.grad(o.float().square().sum(), (x, bias)))) if not reentrant else None
            if reentrant:
                x.grad = bias.grad = None
                o.float().square().sum().backward()
                results.append((o, x.grad, bias.grad))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
