"""Calls with scores on a GPU under the transforms of torch.func, and gradients in batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anymask
from tests.helpers.grid import F16, F32

pytestmark = pytest.mark.gpu
# batch, q_heads, kv_heads, q_len, kv_len
SHAPE = 2, 4, 2, 300, 350


@pytest.mark.parametrize("planes", [None, (1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("backend_name", [None, "triton", "reference"], ids=str)
def test_transforms(backend_name: Any, planes: tuple[int, int] | None, device: str) -> None:
    """A vmap over samples, masks and biases is a loop; gradients of what is shared are one for each slice."""
    n, (batch, heads, kv_heads, q_len, kv_len) = 3, SHAPE

    def randn(*shape: int, dtype: torch.dtype = F16) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    q, k = randn(n, batch, heads, q_len, 64), randn(n, batch, kv_heads, kv_len, 64)
    keys, shared, slopes = randn(n, kv_len), randn(heads, q_len, kv_len), randn(heads, dtype=F32).abs()
    masks = None if planes is None else torch.rand(n, *planes, q_len, kv_len, device=device) < 0.5

    def loss(*args: torch.Tensor) -> torch.Tensor:
        q, k, keys, shared, slopes, *mask = args
        bias = anymask.alibi(slopes) + shared + keys
        return anymask.attention(q, k, k, *mask, bias=bias, softcap=9.0, backend=backend_name).float().sin().sum()

    given = [q, k, keys, shared, slopes, *([] if masks is None else [masks])]
    dims = (0, 0, 0, None, None, *(0 for _ in given[5:]))
    grad = torch.func.grad(loss, (0, 1, 2, 3, 4))
    got = torch.vmap(grad, dims)(*given)
    found = [grad(*[t if d is None else t[i] for t, d in zip(given, dims, strict=True)]) for i in range(n)]
    for a, b in zip(got, (torch.stack(parts) for parts in zip(*found, strict=True)), strict=True):
        assert a.shape == b.shape
        assert float((a.double() - b.double()).norm()) <= 2e-3 * float(b.double().norm())


def test_gradients_in_a_batch(device: str) -> None:
    """The engine's threads of a GPU are others than the one that asks."""
    q, bias = torch.randn(2, 4, 200, 64, device=device, dtype=F16), torch.randn(4, 200, 200, device=device, dtype=F16)
    leaves = [q.requires_grad_(), bias.requires_grad_()]
    for given in ({}, {"bias": bias, "dropout_p": 0.2}):
        o = anymask.attention(q, q, q, anymask.causal(), **given)
        into = torch.randn(3, *o.shape, device=device, dtype=F16)
        wrt = leaves if given else leaves[:1]
        got = torch.autograd.grad(o, wrt, into, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            for a, b in zip(got, torch.autograd.grad(o, wrt, into[i], retain_graph=True), strict=True):
                assert float((a[i].double() - b.double()).norm()) <= 2e-3 * float(b.double().norm())
