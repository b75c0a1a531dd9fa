"""The transforms of torch.func and forward_ad through the operators."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from anymask import (
    BlockMask,
    attention,
    causal,
    document,
    from_dense,
    from_function,
    key_padding,
    pack,
    scaled_dot_product_attention,
    spans,
)
from anymask.backends import cpu
from anymask.packing import definition
from anymask.testing import make_qkv

# torch.compile imports parts of torch that warn on their own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _random(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.5


class TestTransforms:
    """torch.func: reverse mode and vmap are those of a loop; what has no rule raises, and is never 0."""

    MASKS = {  # noqa: RUF012
        "none": lambda: None,
        "causal": causal,
        "tensor": lambda: _random(20, 20),
        "per sample": lambda: _random(2, 1, 20, 20),
        "with tensors": lambda: causal() & from_dense(_random(20, 20)),
        "packed": lambda: pack(_random(2, 4, 20, 20)),
    }

    @staticmethod
    def _loss(mask: Any) -> Any:
        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o, lse = attention(q, k, v, mask, return_lse=True)
            return o.sin().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()

        return loss

    @pytest.mark.parametrize("mask", MASKS)
    def test_grad(self, mask: str) -> None:
        qkv = make_qkv(2, 4, 2, 20, 20, 8, 6, requires_grad=True)
        loss = self._loss(self.MASKS[mask]())
        expected = torch.autograd.grad(loss(*qkv), qkv)
        for a, b in zip(torch.func.grad(loss, (0, 1, 2))(*(t.detach() for t in qkv)), expected, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("shared", [False, True], ids=["all mapped", "k shared"])
    @pytest.mark.parametrize("mask", MASKS)
    def test_vmap(self, mask: str, shared: bool) -> None:
        samples = [make_qkv(2, 4, 2, 20, 20, 8, 6) for _ in range(3)]
        if shared:
            samples = [(q, samples[0][1], v) for q, _, v in samples]
        dims = (1, None if shared else 2, 0)
        stacked = [
            parts[0] if d is None else torch.stack(parts, d)
            for parts, d in zip(zip(*samples, strict=True), dims, strict=True)
        ]
        loss = self._loss(self.MASKS[mask]())
        for call in (loss, torch.func.grad(loss, (0, 1, 2))):
            expected = [call(*sample) for sample in samples]
            got = torch.vmap(call, dims)(*stacked)
            if call is loss:
                expected, got = [(x,) for x in expected], (got,)
            for a, b in zip(got, zip(*expected, strict=True), strict=True):
                torch.testing.assert_close(a, torch.stack(b))

    def test_vjp_under_vmap_is_the_jacobian(self) -> None:
        q, k, v = make_qkv(1, 1, 1, 3, 4, 2, dtype=torch.float64)
        expected = torch.autograd.functional.jacobian(lambda q: attention(q, k, v, causal()), q)
        torch.testing.assert_close(torch.func.jacrev(lambda q: attention(q, k, v, causal()))(q), expected)

    def test_a_mask_that_is_made_inside(self) -> None:
        q = torch.randn(1, 2, 20, 8)

        def loss(x: Tensor, rule: Any) -> Tensor:
            return attention(x, x, x, rule(q.detach().mean((0, 1, 3))[:, None] > x.detach().mean((0, 1, 3)))).sum()

        for rule in (lambda m: m, lambda m: causal() & from_dense(m)):
            expected = torch.autograd.grad(loss(x := q.clone().requires_grad_(), rule), x)[0]
            assert torch.equal(torch.func.grad(loss)(q, rule), expected)

    @pytest.mark.parametrize("mask", ["none", "tensor"])
    def test_forward_mode_raises(self, mask: str) -> None:
        q, m = torch.randn(1, 2, 20, 16), self.MASKS[mask]()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, q)
            # the plain inputs of a level are no derivative
            assert attention(q, q, q, m).isfinite().all()
            for args in ((dual, q, q), (q, dual, q), (q, q, dual)):
                with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                    attention(*args, m)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(lambda x: attention(x, x, x, m), (q,), (q,))

    @pytest.mark.compile
    def test_forward_mode_raises_in_a_compiled_function(self) -> None:
        q = torch.randn(1, 2, 20, 16)
        torch.compiler.reset()
        compiled = torch.compile(lambda x: attention(x, x, x), backend="aot_eager", fullgraph=True)
        # torch 2.14 refuses such an input itself
        refusals = (NotImplementedError, torch._dynamo.exc.TorchDynamoException)
        with forward_ad.dual_level(), pytest.raises(refusals, match="forward-mode"):
            compiled(forward_ad.make_dual(q, q))
        inside = torch.compile(lambda x: torch.func.jvp(lambda x: attention(x, x, x), (x,), (x,)), backend="aot_eager")
        with pytest.raises(refusals, match="forward-mode"):
            inside(q)

    @pytest.mark.compile
    def test_grad_inside_a_compiled_function(self) -> None:
        torch.compiler.reset()
        q, mask = torch.randn(1, 2, 20, 16), pack(_random(20, 20))
        grad = torch.func.grad(lambda x: attention(x, x, x, mask).sin().sum())
        assert torch.equal(torch.compile(grad, backend="aot_eager", fullgraph=True)(q), grad(q))

    @pytest.mark.parametrize("outer", [torch.func.grad, torch.func.jacrev])
    def test_second_derivatives_raise(self, outer: Any) -> None:
        q = torch.randn(1, 2, 4, 8)
        inner = torch.func.grad(lambda x: attention(x, x, x, causal()).sin().sum())
        with pytest.raises(NotImplementedError, match="differentiated twice"):
            outer(lambda x: inner(x).sum())(q)

    def test_what_a_vmap_cannot_map(self) -> None:
        q, masks, ids = torch.randn(3, 1, 2, 20, 8), _random(3, 20, 20), torch.arange(60).view(3, 20) // 7
        packed = pack(masks[0])
        spread = BlockMask(20, 20, *(t.expand(3, *t.shape) for t in packed.tensors()))
        cases: list[tuple[Any, Any, type[Exception], str]] = [
            (lambda m: m, spread, NotImplementedError, "mask is a BlockMask that torch.vmap maps; allowed are"),
            (
                lambda m: pack(m).to_dense(),
                masks,
                NotImplementedError,
                "packed inside torch.vmap has the tiles of all slices",
            ),
            (lambda m: from_function(lambda b, h, i, j: m[i] == m[j]), ids, NotImplementedError, "function reads"),
            (
                lambda m: pack(from_function(lambda b, h, i, j: m[i] == m[j]), q_len=20, kv_len=20),
                ids,
                NotImplementedError,
                "function reads",
            ),
            (lambda m: document(cu_seqlens=m), ids, ValueError, "cu_seqlens is mapped by torch.vmap"),
        ]
        for rule, mapped, error, text in cases:
            with pytest.raises(error, match=text):
                torch.vmap(lambda x, m, rule=rule: attention(x, x, x, rule(m)))(q, mapped)
        # one that reads nothing mapped
        rule = from_function(lambda b, h, i, j: ids[0][i] == ids[0][j])
        assert torch.vmap(lambda x: attention(x, x, x, rule))(q).isfinite().all()

    @pytest.mark.parametrize("mask", MASKS)
    def test_batched_gradients(self, mask: str) -> None:
        qkv = make_qkv(2, 4, 2, 20, 20, 8, 6, dtype=torch.float64, requires_grad=True)
        outputs = attention(*qkv, self.MASKS[mask](), return_lse=True)
        into = [torch.randn(3, *t.shape, dtype=t.dtype) for t in outputs]
        for at in (slice(0, 1), slice(1, 2), slice(0, 2)):
            rest = {"retain_graph": True, "materialize_grads": True}
            got = torch.autograd.grad(outputs[at], qkv, into[at], is_grads_batched=True, **rest)
            for i in range(3):
                want = torch.autograd.grad(outputs[at], qkv, [t[i] for t in into[at]], **rest)
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a[i], b)

    def test_gradients_that_are_batched_twice_raise(self) -> None:
        q = torch.randn(1, 1, 4, 8, requires_grad=True)
        o = attention(q, q, q)

        def grad(do: Tensor) -> Tensor:
            return torch.autograd.grad(o, q, do, is_grads_batched=True, retain_graph=True)[0]

        with pytest.raises(NotImplementedError, match="batched twice"):
            torch._vmap_internals._vmap(grad)(torch.randn(2, 3, *o.shape))

    @pytest.mark.parametrize("vectorize", [False, True])
    def test_functional_jacobians(self, vectorize: bool) -> None:
        qkv = make_qkv(1, 2, 1, 3, 4, 2, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian
        got = jacobian(lambda *x: attention(*x, causal(1)), qkv, vectorize=vectorize)
        want = jacobian(lambda *x: attention(*x, causal(1), backend="reference"), qkv)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lowest", [-torch.inf, -2.0], ids=["mask", "bias"])
def test_floats_of_sdpa(lowest: float) -> None:
    """Under a transform they are added, whatever they hold: values that are mapped, or that get a gradient."""
    q, floats = torch.randn(3, 2, 20, 8), torch.zeros(3, 1, 20, 20).masked_fill(~_random(3, 1, 20, 20), lowest)
    floats[..., 0] = 0

    def call(x: Tensor, m: Tensor, sdpa: Any = scaled_dot_product_attention) -> Tensor:
        return sdpa(x[None], x[None], x[None], attn_mask=m)

    torch.testing.assert_close(
        torch.vmap(call)(q, floats), torch.stack([call(x, m) for x, m in zip(q, floats, strict=True)])
    )
    theirs = torch.nn.functional.scaled_dot_product_attention

    def of_first(m: Tensor) -> Tensor:
        return call(q[0], m)

    def of_all(m: Tensor) -> Tensor:
        return torch.vmap(lambda x: call(x, m))(q)

    for function, rows in ((of_first, q[:1]), (of_all, q)):
        got = torch.func.grad(lambda m, f=function: f(m).sin().sum())(floats[0])
        leaf = floats[0].clone().requires_grad_()
        want = torch.autograd.grad([call(x, leaf, theirs).sin().sum() for x in rows], leaf)[0]
        torch.testing.assert_close(got.masked_fill(floats[0] == -torch.inf, 0), want.nan_to_num())


class TestMappedMasks:
    """A mask that `torch.vmap` maps: values and gradients of a loop over slices, in one call of a backend."""

    # planes of a slice: of none, each sample, each head, each of both
    PLANES = {"one": (), "of samples": (2, 1), "of heads": (1, 4), "of both": (2, 4)}  # noqa: RUF012

    @staticmethod
    def _qkv(*leading: int) -> list[Tensor]:
        return [torch.randn(*leading, 2, heads, 20, dim) for heads, dim in ((4, 8), (2, 8), (2, 6))]

    @staticmethod
    def _of_loop(call: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, ...]:
        found = [call(*[t if d is None else t[i] for t, d in zip(args, dims, strict=True)]) for i in range(3)]
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    @pytest.mark.parametrize("dims", [(0, 0, 0, 0), (0, None, 0, 0), (None, None, None, 0)], ids=str)
    @pytest.mark.parametrize("planes", PLANES)
    def test_values_and_gradients(self, planes: str, dims: tuple[Any, ...]) -> None:
        def call(*args: Tensor) -> tuple[Tensor, ...]:
            o, lse = attention(*args, return_lse=True)
            return o, lse

        def grads(*args: Tensor) -> tuple[Tensor, ...]:
            def loss(*qkv: Tensor) -> Tensor:
                o, lse = call(*qkv, args[3])
                return o.sin().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()

            return torch.func.grad(loss, (0, 1, 2))(*args[:3])

        masks = _random(3, *self.PLANES[planes], 20, 20)
        # a query without keys and a key without queries, with what may not leak
        masks[0, ..., 3, :], masks[1, ..., 5] = False, False
        qkv = [torch.randn(t.shape) if d == 0 else t for t, d in zip(self._qkv(3), dims[:3], strict=True)]
        qkv = [t if d == 0 else t[0] for t, d in zip(qkv, dims[:3], strict=True)]
        if dims[1] == 0:
            qkv[1][1, ..., 5, :] = torch.nan
        for function in (call, grads):
            got = torch.vmap(function, dims)(*qkv, masks)
            for a, b in zip(got, self._of_loop(function, dims, *qkv, masks), strict=True):
                torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("planes", PLANES)
    def test_nested(self, planes: str) -> None:
        qkv, masks, every = self._qkv(3), _random(3, 3, *self.PLANES[planes], 20, 20), (0, 0, 0, 0)
        alone = (None, None, None, 0)
        for outer, inner in ((every, alone), (every, every), ((0, 0, 0, None), alone), (alone, (0, 0, 0, None))):
            # of a mapped level, and of q where both levels map it
            args = [*qkv, masks if outer[3] == inner[3] == 0 else masks[0]]
            if inner == every:
                args = [*(torch.stack([t, t.flip(0), t]) for t in qkv), masks]
            got = torch.vmap(torch.vmap(attention, inner), outer)(*args)
            expected = self._of_loop(
                lambda *a, d=inner: self._of_loop(lambda *x: (attention(*x),), d, *a), outer, *args
            )
            torch.testing.assert_close(got, expected[0])

    def test_gradients_of_what_is_outside(self) -> None:
        qkv, masks = self._qkv(), _random(3, 1, 4, 20, 20)

        def loss(*qkv: Tensor) -> Tensor:
            return torch.vmap(lambda m: attention(*qkv, m).sin())(masks).sum()

        leaves = [t.requires_grad_() for t in qkv]
        expected = torch.autograd.grad(sum(attention(*leaves, m).sin().sum() for m in masks), leaves)
        for found in (torch.func.grad(loss, (0, 1, 2))(*qkv), torch.autograd.grad(loss(*leaves), leaves)):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)

    def test_jacobians(self) -> None:
        q, masks = torch.randn(3, 1, 1, 4, 2, dtype=torch.float64), _random(3, 4, 4)

        def jacobian(x: Tensor, m: Tensor) -> Tensor:
            return torch.func.jacrev(lambda x: attention(x, x, x, m))(x)

        expected = torch.stack([jacobian(x, m) for x, m in zip(q, masks, strict=True)])
        torch.testing.assert_close(torch.vmap(jacobian)(q, masks), expected)

    @pytest.mark.parametrize("n", [1, 3])
    def test_masks_that_are_made_inside(self, n: int) -> None:
        q, lengths = torch.randn(n, 2, 2, 300, 8), torch.tensor([[100, 300], [0, 7], [299, 128]])[:n]
        ids = torch.arange(300).expand(n, 2, 300) // torch.tensor([50, 99, 200])[:n, None, None]
        one = _random(2, 1, 300, 300)
        for rule, mapped in (
            (key_padding, lengths),
            (lambda m: ~key_padding(m) | causal(), lengths),
            (lambda m: causal() & document(m), ids),
            (lambda m: causal() | spans(m, m + 70), ids),
            (lambda m: from_dense(one) & document(m[0]), ids),
        ):
            got = torch.vmap(lambda x, m, rule=rule: attention(x, x, x, rule(m)))(q, mapped)
            for i in range(n):
                torch.testing.assert_close(got[i], attention(q[i], q[i], q[i], rule(mapped[i])))

    @pytest.mark.parametrize("planes", PLANES)
    def test_packed_inside(self, planes: str, monkeypatch: pytest.MonkeyPatch) -> None:
        packed: list[Any] = []
        honest = definition.pack_mask
        monkeypatch.setattr(definition, "pack_mask", lambda *a: packed.append(a) or honest(*a))
        q, masks = self._qkv(3)[0], _random(3, *self.PLANES[planes], 20, 20)

        def loss(x: Tensor, m: Tensor) -> Tensor:
            mask = pack(causal() & from_dense(m), q_len=20, kv_len=20)
            # a level that maps no mask
            again = torch.vmap(lambda y: attention(y, y, y, mask, softcap=2.0))(torch.stack([x, 2 * x]))
            assert "torch.vmap" in str(mask)
            return attention(x, x, x, mask).sin().sum() + again.sum()

        got = torch.vmap(torch.func.grad(loss))(q, masks)
        assert len(packed) == 1
        for x, mask, grad in zip(q, masks, got, strict=True):
            leaf, inside = x.clone().requires_grad_(), mask & torch.ones(20, 20).tril().bool()
            o = attention(leaf, leaf, leaf, inside).sin().sum()
            o = o + sum(attention(y, y, y, inside, softcap=2.0).sum() for y in (leaf, 2 * leaf))
            torch.testing.assert_close(grad, torch.autograd.grad(o, leaf)[0])
        with pytest.raises(ValueError, match=r"torch\.vmap returns no BlockMask"):
            torch.vmap(pack)(masks)

    @pytest.mark.parametrize("planes", PLANES)
    def test_one_call(self, planes: str, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        for name in ("forward", "backward"):
            honest = getattr(cpu, name)
            monkeypatch.setattr(cpu, name, lambda *a, n=name, f=honest: calls.append(n) or f(*a))
        q, masks = self._qkv(3)[0], _random(3, *self.PLANES[planes], 20, 20)
        torch.vmap(torch.func.grad(lambda x, m: attention(x, x, x, m).sum()))(q, masks)
        assert calls == ["forward", "backward"]
