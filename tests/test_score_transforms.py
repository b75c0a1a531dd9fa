"""Calls with scores under the transforms of torch.func: those of a loop over slices, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from anymask import alibi, attention, causal, from_score_mod, low_rank, pack, relative, relative_buckets
from anymask.backends import cpu
from tests.helpers.score_cases import F64, assert_same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# slices, batch, q_heads, kv_heads, q_len, kv_len
N, B, H, G, L, M = 3, 2, 4, 2, 5, 7


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def _qkv(*lead: int) -> list[Tensor]:
    return [_random(*lead, B, heads, n, dim) for heads, n, dim in ((H, L, 4), (G, M, 4), (G, M, 3))]


# shape of what a bias is made of, and how
BIASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Any]]] = {
    "one plane": ((L, M), lambda t: t),
    "full": ((B, H, L, M), lambda t: t),
    "of heads": ((H, L, M), lambda t: t),
    "of samples": ((B, 1, L, M), lambda t: t),
    "keys": ((B, 1, 1, M), lambda t: t),
    "queries": ((1, H, L, 1), lambda t: t),
    "number": ((), lambda t: t),
    "alibi": ((H,), alibi),
    "relative": ((1, L + M - 1), relative),
    "buckets": ((8, H), relative_buckets),
    "low rank": ((H, L, 2), lambda t: low_rank(t, torch.ones(M, 2, dtype=F64))),
    "sum": ((H, L, M), lambda t: t + alibi(t[:, 0, 0]) + t[0, 0] + t[:, :1].mean(2, keepdim=True)),
}
MASKS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "causal": lambda: causal(2),
    "of heads": lambda: torch.rand(1, H, L, M) < 0.6,
    "of both": lambda: torch.rand(B, H, L, M) < 0.6,
}


def _loss(*qkv: Tensor, mask: Any = None, **scores: Any) -> Tensor:
    o, lse = attention(*qkv, mask, return_lse=True, **scores)
    return o.sin().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()


def _of_loop(call: Callable[..., Any], dims: tuple[int | None, ...], *args: Tensor) -> list[Tensor]:
    found = [call(*[t if d is None else t.select(d, i) for t, d in zip(args, dims, strict=True)]) for i in range(N)]
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("kind", BIASES)
class TestBias:
    def test_grad(self, kind: str) -> None:
        shape, make = BIASES[kind]
        args = [*_qkv(), _random(*shape)]

        def loss(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
            return _loss(q, k, v, mask=causal(2), bias=make(t), softcap=3.0)

        leaves = [t.clone().requires_grad_() for t in args]
        want = torch.autograd.grad(loss(*leaves), leaves)
        assert_same(torch.func.grad(loss, (0, 1, 2, 3))(*args), want, kind)

    @pytest.mark.parametrize("dims", [(0, 0, 0, None), (0, None, 1, 0), (None, None, None, 0)], ids=str)
    def test_vmap(self, kind: str, dims: tuple[int | None, ...]) -> None:
        shape, make = BIASES[kind]
        q, k, v = (
            _random(N, *t.shape).movedim(0, d) if d is not None else t for t, d in zip(_qkv(), dims, strict=False)
        )
        t = _random(N, *shape) if dims[3] == 0 else _random(*shape)
        for mask in MASKS.values():
            given = mask()

            def loss(q: Tensor, k: Tensor, v: Tensor, t: Tensor, given: Any = given) -> Tensor:
                return _loss(q, k, v, mask=given, bias=make(t))

            # of a bias that all slices share one gradient for each
            for call in (lambda *a, f=loss: [f(*a)], torch.func.grad(loss, (0, 3)), torch.func.grad(loss, (1, 2))):
                got = torch.vmap(call, dims)(q, k, v, t)
                assert_same(got, _of_loop(call, dims, q, k, v, t), kind)


class TestCalls:
    @staticmethod
    def _count(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []
        for name, at in (("forward", 5), ("backward_scores", 10)):
            honest = getattr(cpu, name)

            def counted(*a: Any, name: str = name, at: int = at, honest: Any = honest) -> Any:
                calls.append((name, [tuple(t.shape) for t in a[at].dense]))
                return honest(*a)

            monkeypatch.setattr(cpu, name, counted)
        return calls

    @pytest.mark.parametrize(
        ("shape", "dim", "expected"),
        [
            ((H, L, M), None, (1, H, L, M)),
            ((B, H, L, M), None, (1, B * H, L, M)),
            ((B, 1, L, M), None, (B, 1, L, M)),
            ((L, M), 0, (N, 1, L, M)),
            ((H, L, M), 0, (1, N * H, L, M)),
            ((B, 1, L, M), 0, (N * B, 1, L, M)),
        ],
    )
    def test_one_call_and_nothing_is_repeated(
        self, shape: Any, dim: int | None, expected: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = self._count(monkeypatch)
        q, k, v = _qkv(N)
        bias = _random(*shape) if dim is None else _random(N, *shape)
        torch.vmap(torch.func.grad(lambda q, k, v, t: _loss(q, k, v, bias=t)), (0, 0, 0, dim))(q, k, v, bias)
        assert calls == [("forward", [expected]), ("backward_scores", [expected])]

    def test_gradients_of_what_is_outside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self._count(monkeypatch)
        q, k, v = _qkv(N)
        bias, sinks = _random(H, L, M), _random(H)

        def loss(t: Tensor, sinks: Tensor) -> Tensor:
            return torch.vmap(lambda *qkv: _loss(*qkv, bias=t, sinks=sinks))(q, k, v).sum()

        got = torch.func.grad(loss, (0, 1))(bias, sinks)
        assert [len(shapes) for _, shapes in calls] == [1, 1]
        assert {shape for _, shapes in calls for shape in shapes} == {(1, H, L, M)}
        leaves = [t.clone().requires_grad_() for t in (bias, sinks)]
        want = torch.autograd.grad(
            sum(_loss(*(t[i] for t in (q, k, v)), bias=leaves[0], sinks=leaves[1]) for i in range(N)), leaves
        )
        assert_same(got, want, "outside")

    def test_slices_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bias of all samples and a table of each slice want different places, and the bias is too large a copy."""
        calls = self._count(monkeypatch)
        q, k, v = _qkv(N)
        bias, table, masks = _random(B, H, L, M), _random(N, H, L + M - 1), torch.rand(N, B, 1, L, M) < 0.7

        def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            return torch.func.grad(lambda q, t, u: _loss(q, k, v, mask=mask, bias=relative(t) + u), (0, 1, 2))(
                q, table, bias
            )

        got = torch.vmap(call)(q, k, v, table, masks)
        assert [name for name, _ in calls] == ["forward"] * N + ["backward_scores"] * N
        assert_same(got, _of_loop(call, (0,) * 5, q, k, v, table, masks), "one by one")


class TestOthers:
    @pytest.mark.parametrize("dim", [None, 0])
    def test_sinks(self, dim: int | None) -> None:
        q, k, v = _qkv(N)
        sinks = _random(H, 2) if dim is None else _random(N, H, 2)
        for mask in [make() for make in MASKS.values()]:
            grad = torch.func.grad(lambda q, s, k, v, m=mask: _loss(q, k, v, mask=m, sinks=s), (0, 1))
            dims = (0, dim, 0, 0)
            assert_same(torch.vmap(grad, dims)(q, sinks, k, v), _of_loop(grad, dims, q, sinks, k, v), "sinks")

    @pytest.mark.parametrize("planes", [(), (B, 1), (1, H), (B, H)], ids=str)
    def test_masks_that_are_mapped(self, planes: tuple[int, ...]) -> None:
        q, k, v = _qkv(N)
        masks, bias = torch.rand(N, *planes, L, M) < 0.6, _random(N, H, 1, M)
        masks[0, ..., 3, :] = False
        grad = torch.func.grad(lambda q, t, k, v, m: _loss(q, k, v, mask=m, bias=t, softcap=2.0), (0, 1))
        args = q, bias, k, v, masks
        assert_same(torch.vmap(grad)(*args), _of_loop(grad, (0,) * 5, *args), planes)

    def test_nested(self) -> None:
        q, k, v = _qkv(N, N)
        bias, table = _random(N, H, L, M), _random(N, H)

        def call(q: Tensor, k: Tensor, v: Tensor, t: Tensor, slopes: Tensor) -> list[Tensor]:
            return [*torch.func.grad(lambda t, s: _loss(q, k, v, bias=alibi(s) + t), (0, 1))(t, slopes)]

        outer, inner = (0, 0, 0, 0, None), (0, 0, 0, None, 0)
        got = torch.vmap(torch.vmap(call, inner), outer)(q, k, v, bias, table)
        want = _of_loop(lambda *a: _of_loop(call, inner, *a), outer, q, k, v, bias, table)
        assert_same(got, want, "nested")

    def test_jacobians(self) -> None:
        q, k, v = (t[:1, :1, :3] for t in _qkv())
        args = q, _random(1, 3, 3), _random(1)

        def call(q: Tensor, t: Tensor, sinks: Tensor) -> Tensor:
            return attention(q, k, v, causal(), bias=t, softcap=2.0, sinks=sinks)

        want = torch.autograd.functional.jacobian(call, args)
        assert_same(torch.func.jacrev(call, (0, 1, 2))(*args), want, "jacrev")
        assert_same(torch.autograd.functional.jacobian(call, args, vectorize=True), want, "vectorize")
        o, pull = torch.func.vjp(call, *args)
        leaves = [t.clone().requires_grad_() for t in args]
        assert_same(pull(o), torch.autograd.grad(call(*leaves), leaves, o), "vjp")

    def test_gradients_in_a_batch(self) -> None:
        q, k, v = (t.requires_grad_() for t in _qkv())
        t, slopes = _random(H, L, M).requires_grad_(), _random(H).requires_grad_()
        o, lse = attention(q, k, v, causal(2), bias=alibi(slopes) + t, dropout_p=0.3, return_lse=True)
        leaves, into = [q, k, v, t, slopes], [_random(N, *o.shape), _random(N, *lse.shape)]
        got = torch.autograd.grad([o, lse], leaves, into, is_grads_batched=True, retain_graph=True)
        want = [torch.autograd.grad([o, lse], leaves, [g[i] for g in into], retain_graph=True) for i in range(N)]
        assert_same(got, [torch.stack(parts) for parts in zip(*want, strict=True)], "batched")

    @pytest.mark.compile
    def test_inside_a_compiled_function(self) -> None:
        q, k, v = _qkv(N)
        t, slopes, mask = _random(H, L, M), _random(H), pack(causal(2), q_len=L, kv_len=M)

        def call(t: Tensor, slopes: Tensor) -> Any:
            grad = torch.func.grad(lambda t, s, *qkv: _loss(*qkv, mask=mask, bias=alibi(s) + t, sinks=s), (0, 1))
            return torch.vmap(grad, (None, None, 0, 0, 0))(t, slopes, q, k, v)

        torch.compiler.reset()
        assert_same(torch.compile(call, backend="aot_eager", fullgraph=True)(t, slopes), call(t, slopes), "compiled")
        with pytest.raises((NotImplementedError, torch._dynamo.exc.TorchDynamoException), match="forward-mode"):
            torch.compile(lambda t: torch.func.jvp(lambda t: attention(q[0], k[0], v[0], bias=t), (t,), (t,)))(t)

    def test_a_score_mod(self) -> None:
        q, k, v = _qkv(N)
        table = _random(H, L, M)
        fn = lambda t: from_score_mod(lambda s, b, h, i, j: s + t[h, i, j])  # noqa: E731
        got = torch.vmap(torch.func.grad(lambda t, *qkv: _loss(*qkv, bias=fn(t))), (None, 0, 0, 0))(table, q, k, v)
        want = torch.vmap(torch.func.grad(lambda t, *qkv: _loss(*qkv, bias=t)), (None, 0, 0, 0))(table, q, k, v)
        assert_same([got], [want], "score_mod")
        with pytest.raises(NotImplementedError, match=r"fn reads a tensor that torch.vmap maps"):
            torch.vmap(lambda t: _loss(q[0], k[0], v[0], bias=fn(t)))(table.expand(N, -1, -1, -1))

    def test_forward_mode_and_second_derivatives_raise(self) -> None:
        q, k, v = _qkv()
        t, slopes = _random(H, L, M), _random(H)
        calls: dict[str, Callable[..., Any]] = {
            "q": lambda x: attention(x, k, v, bias=t),
            "bias": lambda x: attention(q, k, v, bias=x),
            "slopes": lambda x: attention(q, k, v, bias=alibi(x)),
            "sinks": lambda x: attention(q, k, v, sinks=x),
        }
        for (name, call), x in zip(calls.items(), (q, t, slopes, slopes), strict=True):
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                torch.func.jvp(call, (x,), (x,))
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                call(forward_ad.make_dual(x, x))
            inner = torch.func.grad(lambda x, f=call: f(x).sin().sum())
            with pytest.raises(NotImplementedError, match="differentiated twice"):
                torch.func.grad(lambda x, f=inner: f(x).sum())(x)
            leaf = x.clone().requires_grad_()
            (once,) = torch.autograd.grad(call(leaf).sin().sum(), leaf, create_graph=True)
            with pytest.raises(NotImplementedError, match="differentiated twice"):
                torch.autograd.grad(once.sum(), leaf)
            assert name


class TestDropout:
    P = 0.4

    def _call(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        return attention(q, k, v, dropout_p=self.P, **given)

    def test_error_names_what_is_allowed(self) -> None:
        q, k, v = _qkv(N)
        with pytest.raises(ValueError, match=r"dropout_p is 0.4 inside torch.vmap.*allowed are 'different'"):
            torch.vmap(self._call)(q, k, v)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_gradients_are_of_the_pairs_that_were_kept(self, randomness: str, mask: str) -> None:
        """v one-hot shows the weights, and so the pairs; gradients are those of these weights."""
        q, k, _ = _qkv(N)
        v = torch.eye(M, dtype=F64).expand(N, B, G, M, M)
        given, bias, table = MASKS[mask](), _random(H, L, M), _random(1, L + M - 1)

        def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor]:
            def loss(q: Tensor, bias: Tensor, table: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                o = self._call(q, k, v, mask=given, bias=relative(table) + bias)
                return o.sin().sum(), o

            return torch.func.grad(loss, (0, 1, 2, 3, 4), has_aux=True)(q, bias, table, k, v)

        grads, weights = torch.vmap(both, randomness=randomness)(q, k, v)
        kept = (weights != 0).flatten(1)
        assert 0.3 < float(kept.double().mean()) < 0.75 or mask != "none"
        assert torch.equal(kept[0], kept[1]) == torch.equal(kept[1], kept[2]) == (randomness == "same")
        for i in range(N):
            leaves = [t.clone().requires_grad_() for t in (q[i], bias, table, k[i], v[i])]
            keep = kept[i].view(B, H, L, M).double() / (1 - 13107 / 32768)
            d = torch.arange(L)[:, None] - torch.arange(M) + M - 1
            s = leaves[0] @ leaves[3].repeat_interleave(H // G, 1).mT / 2 + leaves[1] + leaves[2][:, d]
            if given is not None:
                shown = given if isinstance(given, Tensor) else pack(given, q_len=L, kv_len=M).to_dense()
                s = s.masked_fill(~shown, -torch.inf)
            p = s.softmax(-1).nan_to_num()
            want = torch.autograd.grad(((p * keep) @ leaves[4].repeat_interleave(H // G, 1)).sin().sum(), leaves)
            assert_same([g[i] for g in grads], want, (randomness, mask, i))

    def test_same_under_a_mapped_mask(self) -> None:
        q, k, v = _qkv(N)
        masks = torch.rand(N, B, 1, L, M) < 0.7
        torch.manual_seed(3)
        got = torch.vmap(lambda *a: self._call(*a[:3], mask=a[3]), randomness="same")(q, k, v, masks)
        for i in range(N):
            torch.manual_seed(3)
            assert_same([got[i]], [self._call(q[i], k[i], v[i], mask=masks[i])], i)

    def test_a_mask_of_two_levels_raises(self) -> None:
        q, k, v = _qkv(N)
        masks = torch.rand(2, N, B, 1, L, M) < 0.7

        def inner(m: Tensor) -> Tensor:
            return torch.vmap(lambda *a: self._call(*a[:3], mask=a[3]), randomness="same")(q, k, v, m)

        with pytest.raises(NotImplementedError, match=r"mask is mapped by torch\.vmap inside"):
            torch.vmap(inner, randomness="different")(masks)
