"""The transforms of torch.func and forward_ad through the operators."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from anymask import attention, causal, from_dense, pack
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

    def test_what_a_vmap_maps(self) -> None:
        q, masks = torch.randn(3, 1, 2, 20, 8), _random(3, 20, 20)
        for rule in (lambda m: m, from_dense):
            with pytest.raises(NotImplementedError, match=r"mask is mapped by torch\.vmap"):
                torch.vmap(lambda x, m, rule=rule: attention(x, x, x, rule(m)))(q, masks)

    def test_batched_gradients(self) -> None:
        q = torch.randn(1, 2, 20, 8, requires_grad=True)
        for lse in (False, True):
            o = attention(q, q, q, return_lse=True)[lse]
            with pytest.raises(NotImplementedError, match=r"no batched gradients \(is_grads_batched=True"):
                torch.autograd.grad(o, q, torch.randn(3, *o.shape), is_grads_batched=True)
