"""Second and forward-mode derivatives, which the reference has, beside differences and each other."""

import pytest
import torch
from torch import Tensor

from anymask import attention
from anymask.testing import make_qkv

# torch's forward mode compiles its own rules so, at first use
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

# the second query has no key, and the third key no query
MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()


def loss(*qkv: Tensor) -> Tensor:
    o, lse = attention(*qkv, MASK, return_lse=True, backend="reference")
    return o.sin().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()


def test_second_ones_are_those_of_differences() -> None:
    qkv = make_qkv(1, 2, 1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(loss, qkv)


def test_forward_ones_are_those_of_differences() -> None:
    qkv = make_qkv(1, 2, 1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, qkv, check_forward_ad=True, check_batched_forward_grad=True)


def test_a_query_without_a_key_has_derivatives_of_zero() -> None:
    q, k, v = make_qkv(1, 2, 1, 3, 4, 2)
    o, lse = torch.func.jvp(
        lambda q, k: attention(q, k, v, MASK, return_lse=True, backend="reference"), (q, k), (q, k)
    )[1]
    for tangent in (o, lse):
        assert tangent.isfinite().all()
        assert not tangent[:, :, 1].any()


def test_hessians() -> None:
    q, k, v = make_qkv(1, 2, 1, 3, 4, 2, dtype=torch.float64)
    expected = torch.autograd.functional.hessian(lambda q: loss(q, k, v), q)
    assert expected.abs().max() > 1e-3
    for hessian in (
        torch.func.hessian(loss),
        torch.func.jacrev(torch.func.jacrev(loss)),
        torch.func.jacrev(torch.func.jacfwd(loss)),
    ):
        torch.testing.assert_close(hessian(q, k, v), expected)
