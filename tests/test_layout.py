"""Where outputs lie in memory: strides by definition, and the same in fakes, graphs and transforms."""

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import attention, ops
from anymask.layout import dense_strides, empty_as, laid_out_as
from anymask.testing import LAYOUTS, make_qkv

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _by_token(*shape: int) -> Tensor:
    """`[batch, heads, length, dim]` of such a shape, a view of `[batch, length, heads, dim]`."""
    b, h, m, d = shape
    return torch.randn(b, m, h, d).transpose(1, 2)


@pytest.mark.parametrize("order", [*permutations(range(3))])
def test_permutations_of_dense_memory_are_kept(order: tuple[int, ...]) -> None:
    t = torch.empty(2, 3, 5, 8).permute(*order, 3)
    assert dense_strides(t.shape, t.stride()) == t.stride() == empty_as(t).stride()
    for dim in (1, 4, 20):
        wide = torch.empty(2, 3, 5, dim).permute(*order, 3)
        assert dense_strides(t.shape, t.stride(), dim) == wide.stride() == empty_as(t, dim).stride()


def test_slices_and_padded_rows_keep_their_order() -> None:
    qkv = torch.empty(2, 7, 3, 4, 8)
    q = qkv[:, :, 0].transpose(1, 2)
    assert dense_strides(q.shape, q.stride()) == _by_token(*q.shape).stride() == torch.empty_like(q).stride()
    cache = torch.empty(2, 4, 100, 9)[:, :, :7, :8]
    assert empty_as(cache).is_contiguous()


@pytest.mark.parametrize("shape", [(1, 4, 7, 8), (2, 1, 7, 8), (2, 4, 1, 8), (1, 1, 1, 1), (0, 4, 7, 8), (2, 4, 0, 8)])
def test_sizes_of_one_and_of_none(shape: tuple[int, ...]) -> None:
    by_head, by_token = torch.empty(shape), _by_token(*shape)
    assert empty_as(by_head).is_contiguous()
    assert empty_as(by_token).transpose(1, 2).is_contiguous()
    # such a dimension may have any stride, 0 too, and repeats nothing
    for stride in (0, 1, 1000):
        steps = [stride if n == 1 else step for n, step in zip(shape, by_token.stride(), strict=True)]
        odd = by_token.as_strided(shape, steps)
        assert empty_as(odd).untyped_storage().nbytes() == by_token.untyped_storage().nbytes()
        assert empty_as(odd).squeeze().stride() == by_token.squeeze().stride()


def test_what_has_no_order_becomes_contiguous() -> None:
    shape = 2, 4, 7, 8
    expanded = torch.empty(2, 1, 7, 8).expand(shape), torch.empty(1, 7, 4, 8).transpose(1, 2).expand(shape)
    for t in (*expanded, torch.empty(2, 4, 8, 7).mT, torch.empty(2, 4, 7, 1).expand(shape)):
        assert dense_strides(t.shape, t.stride(), 6) == torch.empty(2, 4, 7, 6).stride()


def test_laid_out_as_copies_values() -> None:
    q, result = _by_token(2, 4, 7, 8).half(), torch.randn(2, 4, 7, 6)
    got = laid_out_as(result, q)
    assert torch.equal(got, result.half())
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eager_fake_and_compiled_strides_agree(layout: str) -> None:
    q, k, v = make_qkv(2, 4, 2, 70, 70, 8, 6, layout=layout)
    o, lse = attention(q, k, v, return_lse=True)
    grads = ops.backward_op(q, k, v, o, lse, o, None, [], 0.5, None, False)
    fakes = torch.ops.anymask.forward(*(t.to("meta") for t in (q, k, v)), [], 0.5, None, False)
    assert [t.stride() for t in fakes] == [o.stride(), lse.stride()]
    meta = [t.to("meta") for t in (q, k, v, o, lse, o)]
    of_meta = torch.ops.anymask.backward(*meta, None, [], 0.5, None, False)
    assert [t.stride() for t in of_meta] == [t.stride() for t in grads]
    assert lse.is_contiguous()


def _projected(x: Tensor) -> Tensor:
    q, k, v = x.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    o = attention(q, k, v)
    merged = o.transpose(1, 2).flatten(2)
    assert merged.data_ptr() == o.data_ptr()
    return merged


def test_a_fused_projection_copies_nothing() -> None:
    x = torch.randn(2, 140, 48, requires_grad=True)
    _projected(x).sum().backward()
    q, k, v = (t.detach().requires_grad_() for t in (_by_token(2, 2, 140, 8) for _ in range(3)))
    attention(q, k, v).sin().sum().backward()
    for t in (q, k, v):
        assert t.grad is not None
        assert t.grad.stride() == t.stride()


def test_no_keys_lie_alike() -> None:
    q, k = _by_token(2, 2, 5, 8), _by_token(2, 2, 0, 8)
    assert attention(q, k, k).stride() == q.stride()


def test_mapped_calls_have_the_values_of_a_loop() -> None:
    q = torch.randn(3, 2, 20, 4, 8).permute(0, 1, 3, 2, 4)
    got = torch.vmap(lambda x: attention(x, x, x))(q)
    assert torch.equal(got, torch.stack([attention(x, x, x) for x in q]))
    assert got.transpose(2, 3).is_contiguous()


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_models_copy_nothing(backend: str) -> None:
    torch.compiler.reset()

    def model(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return attention(q, k, v).transpose(1, 2)

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for length in (20, 140, 300):
        leaves = [torch.randn(2, length, 48).requires_grad_() for _ in range(1)]
        leaves.append(leaves[0].detach().clone().requires_grad_())
        outputs: list[Any] = [compiled(leaves[0]), model(leaves[1])]
        for o in outputs:
            o.square().sum().backward()
            assert o.is_contiguous()
        torch.testing.assert_close(outputs[0], outputs[1])
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
