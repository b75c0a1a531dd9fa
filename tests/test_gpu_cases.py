"""The cases of test_cases.py at the sizes that were reported, on a GPU."""

import pytest
import torch
from torch import Tensor

from anymask import attention, causal, flash_attention_custom_mask, pack
from anymask.testing import Results, assert_matches, eager, make_qkv, reference
from tests.helpers import grid

pytestmark = pytest.mark.gpu
F16, BF16 = torch.float16, torch.bfloat16


def _compare_plane(
    results: Results, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, do: Tensor, b: int, h: int
) -> None:
    """Compare one head of one sample (as many kv heads as query heads) with the oracle."""
    one = [t[b : b + 1, h : h + 1] for t in (q, k, v)]
    args = *one, dense, None, do[b : b + 1, h : h + 1]
    for what, got, want, near in zip(Results._fields, results, reference(*args), eager(*args), strict=True):
        assert_matches(got[b : b + 1, h : h + 1], want, near, q.dtype, what)


@pytest.mark.parametrize(
    ("dtype", "sizes", "mask_dtype"), [(F16, (64, 16, 2048, 64), torch.uint8), (BF16, (8, 28, 4096, 128), torch.bool)]
)
def test_case_02_masks_of_more_than_2_to_the_31_elements(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], mask_dtype: torch.dtype, device: str
) -> None:
    batch, heads, length, _ = sizes
    q, k, v, do = (grid.randn(*sizes, dtype=dtype, seed=i) for i in range(4))
    mask = torch.ones(batch, heads, length, length, dtype=mask_dtype, device=device).tril_()
    # the last plane lies beyond 2**31, so only it differs
    mask[-1, -1, :, ::3] = 0
    assert mask.numel() >= 2**31
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = flash_attention_custom_mask(*leaves, mask)
    got = Results(o.detach(), o.new_zeros(()), *torch.autograd.grad(o, leaves, do))
    expected = grid.results_of(q, k, v, causal(), do)
    for name in ("o", "dq", "dk", "dv"):
        x, y = (getattr(r, name).flatten(0, 1)[:-1] for r in (got, expected))
        if name == "dq":
            # which may be summed in any order
            grid.assert_nearly(x, y)
        else:
            assert torch.equal(x, y), name
    dense = mask[-1, -1] != 0
    one = [t[-1:, -1:] for t in (q, k, v)]
    args = *one, dense, None, do[-1:, -1:]
    for what, x, want, near in zip(Results._fields, got, reference(*args), eager(*args), strict=True):
        if what != "lse":
            assert_matches(x[-1:, -1:], want, near, dtype, what)


def test_case_03_mask_expanded_over_40_heads(device: str) -> None:
    batch, heads, length = 2, 40, 17776
    q, k, v, do = (grid.randn(batch, heads, length, 64, dtype=F16, seed=i) for i in range(4))
    mask = torch.randint(0, 2, (batch, 1, length, length), dtype=torch.bool, device=device)
    results = grid.results_of(q, k, v, mask.expand(-1, heads, -1, -1), do)
    _compare_plane(results, q, k, v, mask[1, 0], do, 1, heads - 1)
    o = torch.nn.functional.scaled_dot_product_attention(q[:1, :2], k[:1, :2], v[:1, :2], attn_mask=mask[:1])
    torch.testing.assert_close(results.o[:1, :2], o, atol=2e-3, rtol=2e-2)


def test_case_04_offsets_beyond_int32(device: str) -> None:
    batch, tokens, dim, length = 720, 24000, 128, 256
    stored = [grid.randn(tokens, batch, dim, dtype=BF16, seed=i) for i in range(2)]
    k, v = (t.transpose(0, 1)[:, None] for t in stored)
    assert (tokens - 1) * k.stride(2) > 2**31 - 1
    q, do = (grid.randn(batch, 1, length, dim, dtype=BF16, seed=i) for i in (2, 3))
    dense = torch.rand(length, tokens, device=device) < 0.5
    results = grid.results_of(q, k, v, dense, do)
    for b in (0, batch - 1):
        _compare_plane(results, q, k, v, dense, do, b, 0)


def test_case_09_grouped_heads_28_over_4(device: str) -> None:
    q, k, v = make_qkv(1, 28, 4, 1024, 1024, 128, dtype=BF16, device=device)
    do, dense = torch.randn_like(q), torch.rand(28, 1024, 1024, device=device) < 0.5
    args = q, k, v, dense[None], None, do
    for what, got, want, near in zip(
        Results._fields, grid.results_of(q, k, v, dense, do), reference(*args), eager(*args), strict=True
    ):
        assert_matches(got, want, near, BF16, what)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_case_16_fp32_is_exact_unless_torch_may_take_tf32(device: str) -> None:
    q, k, v = make_qkv(1, 1, 1, 128, 128, 32, device=device)
    do, dense = torch.randn_like(q), torch.ones(128, 128, dtype=torch.bool, device=device).tril()
    for setting, limit in (("highest", 1e-5), ("medium", 5e-2)):
        torch.set_float32_matmul_precision(setting)
        got = grid.results_of(q, k, v, causal(), do)
        torch.set_float32_matmul_precision("highest")
        for x, want in zip(got, reference(q, k, v, dense, None, do), strict=True):
            assert (x.double() - want).abs().max() < limit


def _compiled_kernels() -> int:
    from anymask.backends.gpu.kernels import delta, dkdv, dq
    from anymask.backends.triton.kernels import forward

    kernels = [forward._fwd_kernel, delta._bwd_delta_kernel, dq._bwd_dq_kernel, dkdv._bwd_dkdv_kernel]
    return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)


@pytest.mark.slow
def test_case_18_lengths_do_not_compile(device: str) -> None:
    before = _compiled_kernels()
    for length in range(4, 2000, 4):
        q = torch.randn(16, 8, length, 128, dtype=F16, device=device, requires_grad=True)
        attention(q, q, q, causal()).sum().backward()
    # no mask tensor contents, and at most two forms of a length
    assert _compiled_kernels() - before <= 8
    settled = _compiled_kernels()
    for seed in range(5):
        torch.manual_seed(seed)
        q = torch.randn(16, 8, 512, 128, dtype=F16, device=device, requires_grad=True)
        attention(q, q, q, torch.rand(512, 512, device=device) < 0.5).sum().backward()
    assert _compiled_kernels() == settled


def test_case_20_a_block_structure_is_honoured_as_it_is(device: str) -> None:
    q, k, v = make_qkv(1, 2, 2, 1024, 1024, 128, dtype=F16, device=device)
    chosen = torch.zeros(1, 2, 4, 4, dtype=torch.bool, device=device)
    chosen.scatter_(-1, torch.rand(1, 2, 4, 4, device=device).topk(2, dim=-1).indices, True)
    dense = chosen.repeat_interleave(256, -1).repeat_interleave(256, -2)
    mask = pack(dense)
    assert mask.tile_counts == (64, 0, 64)
    do = torch.randn_like(q)
    args = q, k, v, dense, None, do
    for what, got, want, near in zip(
        Results._fields, grid.results_of(q, k, v, mask, do), reference(*args), eager(*args), strict=True
    ):
        assert_matches(got, want, near, F16, what)
