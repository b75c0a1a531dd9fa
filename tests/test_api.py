"""The public calls: bad input, torch's signature, the earlier package's call, the cache, autocast, explain."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import anymask
from anymask import attention, causal, explain, flash_attention_custom_mask, pack, scaled_dot_product_attention
from anymask.backends import NAMES, load
from anymask.testing import LAYOUTS, MASKS, Case, make_inputs, make_qkv, reference
from tests.helpers.bad_calls import BAD, BAD_EAGER, TRUE, K, Q, V, qkv

MASK_DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32]


@pytest.mark.parametrize("what", [*BAD, *BAD_EAGER])
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
def test_bad_input(what: str) -> None:
    call, error, message = (BAD | BAD_EAGER)[what]
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("what", "fullgraph"), [(w, False) for w in BAD] + [(w, True) for w in list(BAD)[::3]])
def test_bad_input_under_compile(what: str, fullgraph: bool) -> None:
    torch.compiler.reset()
    call, error, message = BAD[what]
    # with fullgraph, Dynamo may wrap an exception of the traced code in its own, with the message inside
    allowed = (error, torch._dynamo.exc.TorchDynamoException) if fullgraph else error
    with pytest.raises(allowed, match=re.escape(message)):
        torch.compile(call, fullgraph=fullgraph, backend="eager")()


def test_good_input_that_looks_odd() -> None:
    expected = attention(Q, K, V, TRUE)
    for mask in (TRUE[:1], TRUE[:, :1], TRUE[:1, :1], TRUE[None], TRUE[None, None], TRUE.expand(2, 4, 10, 20)):
        assert torch.equal(attention(Q, K, V, mask), expected)
    assert torch.equal(attention(Q, K, V, TRUE.repeat(2, 4, 1, 1)), expected)
    assert attention(Q, K, V, scale=2).shape == (2, 4, 10, 6)
    assert attention(Q, K, V, scale=-1.5).isfinite().all()
    for flag in (None, True, False):
        assert torch.equal(attention(Q, K, V, TRUE, deterministic=flag), expected)
    o, lse = attention(Q, K, V, TRUE, return_lse=True)
    assert torch.equal(o, expected)
    assert lse.shape == (2, 4, 10)


def test_a_named_backend_never_falls_back() -> None:
    if anymask.backends.load("triton").why_not(Q, K, V, None) is None:
        pytest.skip("Triton interprets here")
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call: "):
        attention(Q, K, V, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("mask", [None, "causal", "random", "row"])
def test_sdpa_is_torchs(dims: int, mask: str | None, dtype: torch.dtype) -> None:
    q, k, v = (t[(0,) * (4 - dims)] for t in qkv(kv_heads=4, dtype=dtype))
    kwargs: dict[str, Any] = {"scale": 0.4}
    if mask == "causal":
        kwargs["is_causal"] = True
    elif mask:
        kwargs["attn_mask"] = MASKS[mask](2, 4, 10, 20)[0]
    ours, theirs = scaled_dot_product_attention(q, k, v, **kwargs), F.scaled_dot_product_attention(q, k, v, **kwargs)
    torch.testing.assert_close(ours, theirs)


def test_sdpa_with_grouped_heads_and_gradients() -> None:
    mask = torch.rand(2, 4, 10, 20) < 0.6
    mask[..., 0] = True
    results = []
    for call in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        q, k, v = qkv(requires_grad=True)
        o = call(q, k, v, mask, 0.0, False, scale=None, enable_gqa=True)
        results.append((o, *torch.autograd.grad(o.sin().sum(), [q, k, v])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((Q, K, V), {"enable_gqa": True, "dropout_p": 1.0}, "dropout_p is 1.0; allowed are numbers from 0 to below 1"),
        ((Q, K, V), {}, "query has 4 heads and key has 2; allowed are equal counts, or enable_gqa=True"),
        (
            (Q, K, V),
            {"enable_gqa": True, "attn_mask": TRUE.float()[1:]},
            "bias has shape (9, 20), 9 along q_len; allowed are 1 and 10",
        ),
        ((Q, K, V), {"enable_gqa": True, "attn_mask": TRUE, "is_causal": True}, "is_causal is True and mask is given"),
        (
            (Q, K, V),
            {"enable_gqa": True, "attn_mask": TRUE.float(), "is_causal": True},
            "is_causal is True and attn_mask is given",
        ),
        ((Q[None], K[None], V[None]), {}, "query has shape (1, 2, 4, 10, 8); allowed are 2 to 4 dimensions"),
        ((Q, K[0], V), {}, "key has shape (2, 20, 8); allowed are 2 to 4 dimensions, as many as query"),
        ((Q[0, 0, 0], K, V), {}, "query has shape (8,); allowed are 2 to 4"),
    ],
)
def test_sdpa_raises_on_what_it_does_not_do(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        scaled_dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_custom_mask_of_any_dtype(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    from fa2_custom_mask import flash_attention_custom_mask as imported

    q, k, v = make_qkv(2, 2, 2, 50, 70, 16, dtype=dtype, requires_grad=True)
    values = torch.randint(-1, 2, (2, 2, 50, 70))
    mask = values.abs().to(mask_dtype) if mask_dtype in (torch.bool, torch.uint8) else values.to(mask_dtype)
    do = torch.randn_like(q)
    ours = imported(q, k, v, mask, 1.3)
    expected = attention(q, k, v, values != 0, scale=1.3)
    assert torch.equal(ours, expected)
    for a, b in zip(
        torch.autograd.grad(ours, [q, k, v], do), torch.autograd.grad(expected, [q, k, v], do), strict=True
    ):
        assert torch.equal(a, b)


def test_custom_mask_defaults() -> None:
    q, k, v = make_qkv(1, 2, 2, 50, 70, 16, requires_grad=True)
    o = flash_attention_custom_mask(q, k, v)
    assert torch.equal(o, attention(q, k, v, scale=0.25))
    o.backward(torch.ones_like(o))
    assert q.grad is not None
    assert torch.equal(
        flash_attention_custom_mask(q, k, v, mask=torch.ones(1, 1, 50, 70)), attention(q, k, v, scale=0.25)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_a_cast_of_the_inputs(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 2, 2, 50, 70, 16, requires_grad=True)
    mask = torch.rand(50, 70) < 0.5
    with torch.autocast("cpu", dtype):
        o = attention(q, k, v, mask)
        mixed = attention(q.to(dtype), k, v, mask)
        custom = flash_attention_custom_mask(q, k, v, mask)
    assert torch.equal(o, attention(q.to(dtype), k.to(dtype), v.to(dtype), mask))
    assert torch.equal(mixed, o)
    assert torch.equal(custom, o)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_dtypes(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 2, 2, 50, 70, 16, requires_grad=True)
    mask = torch.rand(50, 70) < 0.5
    with torch.autocast("cpu", dtype):
        o = attention(q, k, v, mask)
        assert attention(q.to(dtype), k, v, mask).dtype == dtype
        assert flash_attention_custom_mask(q, k, v, mask).dtype == dtype
    assert o.dtype == dtype
    grads = torch.autograd.grad(o.float().sum(), [q, k, v])
    assert all(g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", dtype):
        assert attention(q.double(), k.double(), v.double(), mask).dtype == torch.float64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dout_of_a_sum_has_stride_0(layout: str) -> None:
    i = make_inputs(Case("random", 70, 50, 16, layout=layout))
    grads = torch.autograd.grad(attention(i.q, i.k, i.v, i.mask).sum(), [i.q, i.k, i.v])
    expected = reference(i.q, i.k, i.v, i.dense, None, torch.ones_like(i.do))
    for a, b in zip(grads, expected[2:], strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_explain() -> None:
    e = explain(Q, K, V, is_causal=True)
    assert e.backend == "cpu"
    assert set(e.not_chosen) == set(NAMES) - {"cpu"}
    assert e.not_chosen["reference"] == "cpu was preferred"
    assert e.mask == pack(causal(), q_len=10, kv_len=20).stats(8)
    assert (e.mask.empty, e.mask.partial, e.mask.full) == (0, 1, 0)
    assert e.mask.density == 55 / 200
    assert e.mask.dense_bytes == 200
    assert e.pair_flops == 2 * 4 * 55 * 2 * (8 + 6)
    assert e.tile_flops == 2 * 4 * 128 * 128 * 2 * (8 + 6)
    for part in ("backend: cpu", "not reference: cpu was preferred", "0 empty (skipped), 1 partial, 0 full", "27.5%"):
        assert part in str(e)


def test_explain_without_a_mask_and_with_a_backend() -> None:
    e = explain(Q, K, V, backend="reference")
    assert e.backend == "reference"
    assert e.not_chosen["cpu"] == "reference was preferred"
    assert e.mask is None
    assert e.pair_flops == e.tile_flops == 2 * 4 * 200 * 2 * (8 + 6)
    assert "mask: none" in str(e)
    with pytest.raises(ValueError, match="mask has dtype"):
        explain(Q, K, V, TRUE.float())


def test_public_names() -> None:
    assert set(anymask.__all__) == {n for n in anymask.__all__ if hasattr(anymask, n)}
    assert {"attention", "pack", "explain", "Mask", "BlockMask", "causal", "sliding_window"} <= set(anymask.__all__)


def test_why_the_kernels_cannot_run() -> None:
    def why_not(batch: int, dim: int, dtype: torch.dtype) -> str | None:
        q = torch.empty(batch, 1, 1, dim, dtype=dtype, device="meta")
        return load("triton").why_not(q, q, q, None)

    assert "the kernels take up to 65535 of each" in str(why_not(65536, 16, torch.float16))
    assert "head_dim is 257" in str(why_not(1, 257, torch.float16))
    assert "dtype is torch.float64" in str(why_not(1, 16, torch.float64))
    assert "the kernels run on a GPU" in str(why_not(65535, 256, torch.bfloat16))


class TestMasksOfTorch:
    """Mask objects of torch are taken as they are."""

    def test_of_flex_attention(self) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        flex = create_block_mask(lambda b, h, q, k: (q >= k) & (k % 3 != b), 2, None, 10, 20, device="cpu")
        b, q, k = torch.meshgrid(torch.arange(2), torch.arange(10), torch.arange(20), indexing="ij")
        expected = attention(Q, K, V, ((q >= k) & (k % 3 != b))[:, None])
        assert torch.equal(attention(Q, K, V, flex), expected)
        assert torch.equal(scaled_dot_product_attention(Q, K, V, flex, enable_gqa=True), expected)

    @pytest.mark.parametrize("corner", ["upper_left", "lower_right"])
    def test_causal_biases(self, corner: str) -> None:
        from torch.nn.attention import bias

        diagonal = 0 if corner == "upper_left" else 10
        expected = attention(Q, K, V, torch.ones(10, 20).tril(diagonal).bool())
        assert torch.equal(attention(Q, K, V, getattr(bias, f"causal_{corner}")(10, 20)), expected)
        with pytest.raises(ValueError, match="mask is a CausalBias of 9 queries and 20 keys but q and k"):
            attention(Q, K, V, getattr(bias, f"causal_{corner}")(9, 20))

    def test_of_xformers_by_a_sentence(self) -> None:
        bias = type("BlockDiagonalMask", (), {"__module__": "xformers.ops.fmha.attn_bias"})()
        with pytest.raises(TypeError, match=r"mask is a BlockDiagonalMask of xformers; pass anymask\.formats\.from_xf"):
            attention(Q, K, V, bias)


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_float_mask_of_ordinary_values_is_non_zero_attends(mask_dtype: torch.dtype) -> None:
    mask = torch.randn(10, 20).clamp(-2, 2).to(mask_dtype)
    mask[3], mask[4, 5], mask[5, 6] = 0, torch.inf, -9000.0
    assert torch.equal(flash_attention_custom_mask(Q, K, V, mask), attention(Q, K, V, mask != 0))


class TestMeta:
    """Shapes without values: outputs and gradients have the right ones, and no mask is read."""

    MASKS = {  # noqa: RUF012
        "none": lambda: None,
        "causal": causal,
        "tensor": lambda: torch.empty(10, 20, dtype=torch.bool, device="meta"),
        "packed": lambda: pack(TRUE).to("meta"),
    }

    @pytest.mark.parametrize("mask", MASKS)
    def test_meta_tensors(self, mask: str) -> None:
        q, k, v = (t.to("meta").requires_grad_() for t in (Q, K, V))
        o, lse = attention(q, k, v, self.MASKS[mask](), return_lse=True)
        assert (o.shape, lse.shape, o.device.type) == ((2, 4, 10, 6), (2, 4, 10), "meta")
        grads = torch.autograd.grad([o.sum(), lse.sum()], [q, k, v])
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]

    @pytest.mark.parametrize("mask", MASKS)
    def test_fake_tensors(self, mask: str) -> None:
        from torch._subclasses import FakeTensorMode

        packed = pack(TRUE)
        with FakeTensorMode():
            q, k, v = (torch.empty(t.shape, requires_grad=True) for t in (Q, K, V))
            masks = {"tensor": torch.empty(10, 20, dtype=torch.bool), "packed": packed, "causal": causal()}
            o = attention(q, k, v, masks.get(mask))
            (dq,) = torch.autograd.grad(o.sum(), q)
        assert (o.shape, dq.shape) == ((2, 4, 10, 6), q.shape)

    def test_a_mask_that_does_not_fit_raises_there_too(self) -> None:
        q, k, v = (t.to("meta") for t in (Q, K, V))
        with pytest.raises(ValueError, match="its dimension -1 is 19 but kv_len is 20"):
            attention(q, k, v, torch.empty(10, 19, dtype=torch.bool, device="meta"))


def test_formats_and_viz_are_reachable() -> None:
    assert torch.equal(anymask.formats.to_bits(pack(TRUE)), torch.full((1, 1, 25), 255, dtype=torch.uint8))
    assert anymask.viz.to_text(pack(TRUE))
