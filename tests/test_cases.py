"""Twenty calls that broke other libraries; tests/test_gpu_cases.py has those whose sizes need a GPU."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anymask import attention, causal, flash_attention_custom_mask, from_dense, pack, sliding_window
from anymask.block_mask import bits
from anymask.testing import MASKS, Case, Results, assert_matches, check, eager, make_qkv, reference, run
from anymask.testing.cases import Inputs
from tests.helpers import grid

F16, BF16, F32 = grid.F16, grid.BF16, grid.F32


def _compare(q: Tensor, k: Tensor, v: Tensor, mask: Any, dense: Tensor, do: Tensor | None = None) -> Results:
    """Run, and compare with the oracle; `dense` is broadcastable."""
    do = torch.randn(*q.shape[:3], v.shape[3]).to(q) if do is None else do
    dense = dense.expand(*q.shape[:3], k.shape[2])
    inputs = Inputs(
        *(t.detach().requires_grad_() for t in (q, k, v)), mask, dense, do, torch.randn(q.shape[:3]).to(q.device)
    )
    results = run(inputs)
    args = *inputs[:3], dense, None, do, inputs.dlse
    rows = int(dense.any(-1).sum())
    for what, got, want, near in zip(Results._fields, results, reference(*args), eager(*args), strict=True):
        assert_matches(got, want, near, q.dtype, what, rows)
    return results


@pytest.mark.parametrize("name", ["random", "window 64", "all_full", "none"])
def test_case_01_gradients_of_masks_that_are_not_causal(name: str) -> None:
    q, k, v = make_qkv(1, 1, 1, 256, 256, 64, dtype=F16)
    dense = {
        "random": torch.rand(256, 256) < 0.5,
        "window 64": torch.ones(256, 256, dtype=torch.bool).tril().triu(-64),
    }.get(name, torch.ones(256, 256, dtype=torch.bool))
    _compare(q, k, v, None if name == "none" else dense, dense)
    o = flash_attention_custom_mask(q, k, v, None if name == "none" else dense.int())
    assert torch.equal(o, attention(q, k, v, None if name == "none" else dense))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_case_02_dense_mask_per_head_small(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(4, 4, 4, 200, 200, 32, dtype=F16, requires_grad=True)
    mask = torch.ones(4, 4, 200, 200).tril().to(dtype)
    grads = torch.autograd.grad(flash_attention_custom_mask(q, k, v, mask).float().square().sum(), [q, k, v])
    expected = torch.autograd.grad(attention(q, k, v, is_causal=True).float().square().sum(), [q, k, v])
    # heads with a plane of their own go one at a time, and products of one head may sum in another order
    torch.testing.assert_close(grads, expected, atol=2e-3, rtol=2e-3)


def test_case_03_mask_expanded_over_heads_with_a_remainder() -> None:
    length = 128 + 112
    q, k, v = make_qkv(2, 40, 40, length, length, 16, dtype=F16)
    base = torch.rand(2, 1, length, length) < 0.5
    _compare(q, k, v, base.expand(-1, 40, -1, -1), base)


def test_case_04_keys_viewed_with_a_stride_per_token() -> None:
    stored = torch.randn(2, 700, 3, 16, dtype=BF16)
    k, v = (t.transpose(0, 1)[:, None] for t in stored)
    q = torch.randn(3, 2, 256, 16, dtype=BF16)
    assert k.stride(2) == 3 * 16
    _compare(q, k, v, MASKS["random"](1, 1, 256, 700)[0], MASKS["random"](1, 1, 256, 700)[1])


def test_case_05_sliding_window_and_padding_leave_rows_without_a_key() -> None:
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()[:, None, None]
    mask = causal() & sliding_window(1) & from_dense(padding)
    dense = torch.ones(4, 4, dtype=torch.bool).tril().triu(-1) & padding
    q, k, v = make_qkv(2, 2, 2, 4, 4, 16)
    results = _compare(q, k, v, mask, dense)
    assert not results.o[0, :, :2].count_nonzero()
    assert (results.lse[0, :, :2] == -torch.inf).all()
    everything = torch.ones_like(padding)
    everything[1] = False
    results = _compare(q, k, v, from_dense(everything), everything)
    assert not results.o[1].count_nonzero()
    assert not results.dv[1].count_nonzero()
    alone = _compare(q[:1], k[:1], v[:1], None, everything[:1])
    torch.testing.assert_close(results.o[:1], alone.o)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 7), (7, 1), (5, 3)])
def test_case_06_tiny(q_len: int, kv_len: int) -> None:
    q, k, v = (3 * t for t in make_qkv(1, 1, 1, q_len, kv_len, 16, dtype=F16))
    _compare(q, k, v, None, torch.ones(1, 1, dtype=torch.bool))
    _compare(q, k, v, causal(), torch.ones(q_len, kv_len, dtype=torch.bool).tril())


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("length", [1, 8, 17, 31, 32, 137])
def test_case_07_lengths_that_are_not_tiles(length: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(1, 2, 2, length, length, 64, dtype=dtype)
    results = _compare(q, k, v, causal(), torch.ones(length, length, dtype=torch.bool).tril())
    assert all(t.isfinite().all() for t in results)


def test_case_08_prefix_by_sample_and_a_smaller_last_batch() -> None:
    cut = torch.tensor([3, 150, 77, 200])[:, None, None, None]
    i = torch.arange(200)
    for size in (4, 3, 1):
        q, k, v = make_qkv(size, 2, 2, 200, 200, 16, seed=size)
        prefix = (i < cut[:size]) | (i <= i[:, None])
        _compare(q, k, v, prefix, prefix)
    with pytest.raises(ValueError, match="mask has 4 along batch but q has 1"):
        attention(q, k, v, (i < cut) | (i <= i[:, None]))
    with pytest.raises(ValueError, match="dimension -1 is 201 but kv_len is 200"):
        attention(q, k, v, torch.ones(1, 1, 200, 201, dtype=torch.bool))


def test_case_09_grouped_heads_28_over_4() -> None:
    check(Case("per_head", 130, 130, 32, F16, batch=1, q_heads=28, kv_heads=4))
    check(Case("documents", 130, 130, 32, BF16, batch=2, q_heads=28, kv_heads=4))


@pytest.mark.parametrize(("dim", "v_dim"), [(31, 31), (72, 72), (96, 96), (192, 128), (256, 256), (128, 128)])
def test_case_10_head_dims(dim: int, v_dim: int) -> None:
    check(Case("random", 140, 150, dim, F16, v_dim, batch=1))


def test_case_11_a_float_mask_raises() -> None:
    q, k, v = make_qkv(1, 1, 1, 8, 8, 8, dtype=F16)
    for dtype in (torch.float32, F16, BF16, torch.float64):
        for mask in (torch.zeros(8, 8, dtype=dtype), torch.full((8, 8), -torch.inf, dtype=dtype)):
            with pytest.raises(ValueError, match=r"mask has dtype .*; allowed is torch\.bool"):
                attention(q, k, v, mask)


def test_case_12_strides() -> None:
    packed = torch.randn(2, 150, 3, 4, 16)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    mask = torch.rand(2, 4, 150, 150).transpose(2, 3) < 0.5
    assert not mask.is_contiguous()
    _compare(q, k, v, mask, mask, torch.ones(()).expand(2, 4, 150, 16))
    _compare(q, k, v.mT.contiguous().mT, mask, mask)
    _compare(q, k, v, mask, mask, torch.randn(2, 150, 4, 16).transpose(1, 2))
    out = attention(*(t.detach().requires_grad_() for t in (q, k, v)), mask)
    out.sum().backward()


def test_case_13_wrong_shapes_and_no_memory_of_the_last_mask() -> None:
    q, k, v = make_qkv(1, 2, 2, 10, 20, 8)
    for shape, message in (
        ((10, 15), "its dimension -1 is 15 but kv_len is 20; allowed are 1 and 20"),
        ((20, 10), "its dimension -2 is 20 but q_len is 10; allowed are 1 and 10"),
        ((9, 20), "its dimension -2 is 9 but q_len is 10; allowed are 1 and 10"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            attention(q, k, v, torch.ones(shape, dtype=torch.bool))
    plain = attention(q, k, v)
    attention(q, k, v, torch.rand(10, 20) < 0.3)
    assert torch.equal(attention(q, k, v), plain)


@pytest.mark.parametrize("dim", [64, 128])
def test_case_14_causal_in_three_forms(dim: int) -> None:
    for backend in ("cpu", "reference"):
        grid.check_forms_of_a_mask_agree(Case("causal", 200, 200, dim, F16, batch=1), backend, "cpu")


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_case_15_empty(batch: int, q_len: int, kv_len: int, masked: bool, backend: str | None) -> None:
    q, k, v = make_qkv(batch, 4, 2, q_len, kv_len, 8, 6, requires_grad=True)
    mask = torch.ones(batch, 1, q_len, kv_len, dtype=torch.bool) if masked else None
    o, lse = attention(q, k, v, mask, return_lse=True, backend=backend)
    assert o.shape == (batch, 4, q_len, 6)
    assert not o.count_nonzero()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad([o, lse], [q, k, v], [torch.ones_like(o), torch.ones_like(lse)])
    for t, g in zip((q, k, v), grads, strict=True):
        assert g.shape == t.shape
        assert not g.count_nonzero()


def test_case_15_no_heads_and_no_v_dim() -> None:
    q, k, v = make_qkv(2, 2, 2, 4, 4, 8, requires_grad=True)
    assert attention(q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 4, 8)
    o = attention(q, k, v[..., :0])
    assert o.shape == (2, 2, 4, 0)
    assert all(not g.count_nonzero() for g in torch.autograd.grad(o.sum(), [q, k, v]))


def test_case_16_fp32_is_fp32() -> None:
    q, k, v = make_qkv(1, 1, 1, 128, 128, 32)
    results = _compare(q, k, v, causal(), torch.ones(128, 128, dtype=torch.bool).tril())
    args = q, k, v, torch.ones(128, 128, dtype=torch.bool).tril()[None, None], None
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    grads = torch.autograd.grad(attention(*leaves, causal()), leaves, do)
    for got, want in zip(grads, reference(*args, do)[2:], strict=True):
        assert (got.double() - want).abs().max() < 1e-4
    assert results.lse.dtype == F32


def test_case_17_runs_are_bit_equal() -> None:
    q, k, v = make_qkv(2, 4, 2, 200, 200, 32, dtype=F16, requires_grad=True)
    mask = pack(torch.rand(200, 200) < 0.5)
    do = torch.randn_like(q)

    def once() -> list[Tensor]:
        o = attention(q, k, v, mask, deterministic=True)
        return [o, *torch.autograd.grad(o, [q, k, v], do)]

    first = once()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_case_19_a_mask_object_through_checkpoints(use_reentrant: bool) -> None:
    q, k, v = make_qkv(1, 2, 2, 140, 140, 16, requires_grad=True)
    for mask in (causal() & sliding_window(9), pack(torch.rand(140, 140) < 0.5)):
        expected = torch.autograd.grad(attention(q, k, v, mask).sin().sum(), [q, k, v])
        o = checkpoint(attention, q, k, v, mask, use_reentrant=use_reentrant)
        loss = o.sin().sum()
        if use_reentrant:
            q.grad = k.grad = v.grad = None
            loss.backward()
            grads = [q.grad, k.grad, v.grad]
        else:
            grads = list(torch.autograd.grad(loss, [q, k, v]))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


class _Recompute(torch.autograd.Function):
    """A user's own checkpoint: keeps the inputs and the mask object, runs again in backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.mask = mask
        return attention(q, k, v, mask)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            o = attention(*leaves, ctx.mask)
        return *torch.autograd.grad(o, leaves, do), None


def test_case_19_a_mask_object_through_a_custom_checkpoint() -> None:
    q, k, v = make_qkv(1, 2, 2, 140, 140, 16, requires_grad=True)
    mask = pack(torch.rand(140, 140) < 0.5)
    do = torch.randn_like(q)
    expected = torch.autograd.grad(attention(q, k, v, mask), [q, k, v], do)
    grads = torch.autograd.grad(_Recompute.apply(q, k, v, mask), [q, k, v], do)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_case_20_a_block_structure_is_honoured_as_it_is() -> None:
    q, k, v = make_qkv(1, 2, 2, 1024, 1024, 32)
    chosen = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    chosen.scatter_(-1, torch.rand(1, 2, 4, 4).topk(2, dim=-1).indices, True)
    dense = chosen.repeat_interleave(256, -1).repeat_interleave(256, -2)
    block_mask = pack(dense)
    # every tile is full or empty: there is no bit to hide behind
    assert block_mask.tile_counts == (2 * 4 * 2 * 4, 0, 2 * 4 * 2 * 4)
    assert block_mask.rows.words.shape == (0, bits.TILE, bits.WORDS)
    _compare(q, k, v, block_mask, dense)
