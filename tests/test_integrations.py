"""anymask in torch's own modules and under the calls of SDPA and FlexAttention, beside torch's results."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from anymask import (
    alibi,
    attention,
    causal,
    document,
    drop_in,
    forget,
    pack,
    packing,
    scaled_dot_product_attention,
)
from anymask.integrations.flex import flex_attention
from anymask.integrations.torch import replace_sdpa
from anymask.packing import cache

LOWEST = torch.finfo(torch.float32).min
# torch says so of its own experimental calls
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def both(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
    """Outputs and gradients of two functions of the same tensors are equal."""
    leaves = [torch.randn(s, requires_grad=True) for s in shapes]
    a, b = ours(*leaves), theirs(*leaves)
    torch.testing.assert_close(a, b)
    weight = torch.randn_like(a)
    grads = [torch.autograd.grad((o * weight).sum(), leaves) for o in (a, b)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


class TestSdpa:
    @pytest.mark.parametrize("lowest", [-torch.inf, LOWEST])
    @pytest.mark.parametrize("shape", [(2, 4, 10, 20), (1, 1, 10, 20), (4, 1, 20), (10, 20)])
    def test_floats_that_are_masks(self, shape: tuple[int, ...], lowest: float) -> None:
        seen = torch.rand(shape) < 0.5
        seen[..., 0] = True
        mask = torch.zeros(shape).masked_fill(~seen, lowest)

        def call(sdpa: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda q, k, v: sdpa(q, k, v, mask, scale=0.4)

        sizes = (2, 4, 10, 8), (2, 4, 20, 8), (2, 4, 20, 6)
        both(call(scaled_dot_product_attention), call(F.scaled_dot_product_attention), *sizes)

    def test_a_row_of_minus_infinity_gives_zero(self) -> None:
        q = torch.randn(1, 2, 5, 8)
        mask = torch.zeros(5, 5)
        mask[3] = -torch.inf
        for sdpa in (scaled_dot_product_attention, F.scaled_dot_product_attention):
            o = sdpa(q, q, q, mask)
            assert not o[:, :, 3].any()
            assert o[:, :, 2].any()

    @pytest.mark.parametrize("shape", [(5, 1), (5, 6), (4, 5, 6), (2, 1, 1, 6), (2, 4, 5, 6)])
    def test_other_floats_are_a_bias(self, shape: tuple[int, ...]) -> None:
        q, k, v = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (5, 6, 6))
        bias = torch.randn(shape, requires_grad=True)
        both = scaled_dot_product_attention, F.scaled_dot_product_attention
        torch.testing.assert_close(*[f(q, k, v, bias.detach()) for f in both])
        ours, theirs = (torch.autograd.grad(f(q, k, v, bias).square().sum(), (q, k, v, bias)) for f in both)
        torch.testing.assert_close(ours, theirs)

    def test_layers_read_a_float_mask_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[int] = []
        monkeypatch.setattr(cache, "pack", lambda *args, **kwargs: made.append(1) or packing.pack(*args, **kwargs))
        q, mask = torch.randn(1, 2, 5, 8), torch.zeros(5, 5)
        forget()
        first, *_ = [scaled_dot_product_attention(q, q, q, mask) for _ in range(3)]
        mask[0, 1:] = -torch.inf
        second = scaled_dot_product_attention(q, q, q, mask)
        assert made == [1, 1]
        assert not torch.equal(first, second)

    @pytest.mark.compile
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_a_float_mask_inside_a_compiled_function(self, backend: str) -> None:
        def call(q: Tensor, mask: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, q, q, mask + mask)

        q, seen = torch.randn(1, 2, 5, 8, requires_grad=True), torch.rand(5, 5) < 0.5
        compiled = torch.compile(call, backend=backend, fullgraph=True)
        mask = torch.zeros(5, 5).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(compiled(q, mask), call(q, mask))
        bias = torch.randn(5, 5)
        torch.testing.assert_close(compiled(q, bias), call(q, bias))

    @pytest.mark.parametrize(
        ("q", "k", "v", "gqa"),
        [
            ((2, 4, 5, 8), (1, 4, 6, 8), (1, 4, 6, 8), False),
            ((2, 4, 5, 8), (1, 4, 6, 8), (2, 4, 6, 8), False),
            ((1, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), False),
            ((2, 4, 5, 8), (2, 1, 6, 8), (2, 1, 6, 8), False),
            ((2, 4, 5, 8), (1, 1, 6, 8), (1, 4, 6, 8), False),
            ((2, 1, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), False),
            ((2, 4, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8), True),
            ((2, 4, 5, 8), (2, 1, 6, 8), (2, 2, 6, 8), True),
            ((4, 5, 8), (1, 6, 8), (1, 6, 8), False),
            ((1, 5, 8), (3, 6, 8), (3, 6, 8), False),
        ],
    )
    def test_ones_are_shared(self, q: Any, k: Any, v: Any, gqa: bool) -> None:
        mask = torch.rand(5, 6) < 0.6
        mask[:, 0] = True

        def call(sdpa: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda q, k, v: sdpa(q, k, v, mask, enable_gqa=gqa)

        both(call(scaled_dot_product_attention), call(F.scaled_dot_product_attention), q, k, v)

    @pytest.mark.parametrize(
        ("q", "k", "v", "gqa", "message"),
        [
            ((2, 4, 5, 8), (3, 4, 6, 8), (3, 4, 6, 8), False, "k.batch is 3 but q.batch is 2"),
            ((2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8), False, "query has 4 heads and key has 2; allowed are equal"),
            ((2, 1, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8), True, "q has 1 heads and k has 2"),
            ((2, 4, 5, 8), (2, 4, 6, 8), (2, 2, 6, 8), False, "v.heads is 2 but k.heads is 4"),
            ((0, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), False, "k.batch is 2 but q.batch is 0"),
        ],
    )
    def test_other_sizes_are_refused(self, q: Any, k: Any, v: Any, gqa: bool, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            scaled_dot_product_attention(*map(torch.randn, (q, k, v)), enable_gqa=gqa)


# attn_mask and key_padding_mask of a module, True = hidden
HIDDEN = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) < 0.4
HIDDEN.fill_diagonal_(False)
SQUARE = nn.Transformer.generate_square_subsequent_mask(9)
PADDING = torch.zeros(3, 9, dtype=torch.bool)
PADDING[1, 6:] = True
MODULE_MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": HIDDEN},
    "float": {"attn_mask": SQUARE},
    "heads": {"attn_mask": HIDDEN.expand(12, 9, 9)},
    "causal": {"attn_mask": SQUARE, "is_causal": True},
    "padding": {"key_padding_mask": PADDING},
    "both": {"attn_mask": SQUARE != 0, "key_padding_mask": PADDING},
    "causal and padding": {
        "attn_mask": SQUARE, "is_causal": True, "key_padding_mask": torch.zeros(3, 9).masked_fill(PADDING, -torch.inf),
    },
}  # fmt: skip


def module_results(module: nn.Module, call: Callable[[Tensor], Tensor], train: bool) -> list[Tensor]:
    """Output and the gradients of the input and the parameters."""
    torch.manual_seed(1)
    x = torch.randn(3, 9, 16, requires_grad=True)
    module.train(train)
    o = call(x)
    grads = torch.autograd.grad(o.square().sum(), (x, *module.parameters()), allow_unused=True)
    return [o, *(g for g in grads if g is not None)]


def assert_module_agrees(
    module: nn.Module, call: Callable[[Tensor], Tensor], train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same by anymask inside `replace_sdpa`, which must have been called, and by torch again outside."""
    calls = []
    monkeypatch.setattr(drop_in, "attention", lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs))
    expected = module_results(module, call, train)
    with torch.no_grad():
        fast = call(torch.ones(3, 9, 16))
    assert not calls
    with replace_sdpa():
        found = module_results(module, call, train)
        with torch.no_grad():
            # torch's own has a fast path here
            torch.testing.assert_close(call(torch.ones(3, 9, 16)), fast, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    call(torch.ones(3, 9, 16))
    assert len(calls) == 2


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("masks", MODULE_MASKS)
def test_multihead_attention(masks: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.MultiheadAttention(16, 4, batch_first=True, bias=True)
    kwargs = MODULE_MASKS[masks]
    assert_module_agrees(module, lambda x: module(x, x, x, need_weights=False, **kwargs)[0], train, monkeypatch)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("masks", MODULE_MASKS)
def test_transformer_encoder_layer(masks: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    names = {"attn_mask": "src_mask", "key_padding_mask": "src_key_padding_mask"}
    kwargs = {names.get(name, name): value for name, value in MODULE_MASKS[masks].items()}
    assert_module_agrees(module, lambda x: module(x, **kwargs), train, monkeypatch)


@pytest.mark.compile
@pytest.mark.parametrize("masks", ["both", "causal"])
def test_a_compiled_module(masks: str) -> None:
    module = nn.MultiheadAttention(16, 4, batch_first=True)

    def call(x: Tensor) -> Tensor:
        return module(x, x, x, need_weights=False, **MODULE_MASKS[masks])[0]

    expected = module_results(module, call, True)
    with replace_sdpa():
        found = module_results(module, torch.compile(call, backend="aot_eager", fullgraph=True), True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_function_of_torch_comes_back() -> None:
    before = F.scaled_dot_product_attention
    fast = torch.backends.mha.get_fastpath_enabled()
    inside = []

    def fail() -> None:
        with replace_sdpa():
            inside.append((F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside == [(scaled_dot_product_attention, False)]
    assert F.scaled_dot_product_attention is before
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_dropout_of_a_module_is_ours() -> None:
    module = nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True)
    x = torch.randn(2, 9, 16)
    outputs = []
    with replace_sdpa():
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outputs.append(module(x, x, x, need_weights=False)[0])
    torch.manual_seed(0)
    theirs = module(x, x, x, need_weights=False)[0]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], theirs)


def assert_flex_agrees(mask: Any, theirs: Any, sizes: Any, **options: Any) -> None:
    """Output as FlexAttention's; and gradients, which it has none of on a CPU, as SDPA's."""
    q, k, v = map(torch.randn, sizes)
    o = flex_attention(q, k, v, block_mask=mask, **options)
    torch.testing.assert_close(o, torch_flex_attention(q, k, v, block_mask=theirs, **options))
    seen = None
    if theirs is not None:
        b, h, i, j = (torch.arange(n) for n in (theirs.shape[0], theirs.shape[1], q.shape[2], k.shape[2]))
        seen = theirs.mask_mod(b[:, None, None, None], h[:, None, None], i[:, None], j)
    both(
        lambda q, k, v: flex_attention(q, k, v, block_mask=mask, **options),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen, **options),
        *sizes,
    )


class TestFlex:
    IDS = torch.arange(140) // 50

    def masks(self) -> dict[str, Any]:
        """The same mask in every form that is taken, and a name for it."""
        ids = self.IDS
        theirs = create_block_mask(lambda b, h, q, k: (q >= k) & (ids[q] == ids[k]), None, None, 140, 140, device="cpu")
        ours = causal() & document(ids)
        return {"torch": theirs, "Mask": ours, "BlockMask": pack(ours, q_len=140, kv_len=140)}

    @pytest.mark.parametrize("form", ["torch", "Mask", "BlockMask", None])
    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_it_is_torchs(self, form: str | None, kv_heads: int) -> None:
        theirs, mask = (None, None) if form is None else (self.masks()["torch"], self.masks()[form])
        sizes = (2, 4, 140, 8), (2, kv_heads, 140, 8), (2, kv_heads, 140, 8)
        options = {"scale": 0.3, "enable_gqa": kv_heads < 4}
        assert_flex_agrees(mask, theirs, sizes, **options)

    def test_lse_in_both_ways(self) -> None:
        q = torch.randn(1, 2, 140, 8)
        mask = self.masks()["torch"]
        o, lse = flex_attention(q, q, q, None, mask, None, False, True, {"BLOCK_M": 64})
        # this keyword has a successor in torch, which warns
        theirs, aux = torch_flex_attention(q, q, q, block_mask=mask, return_aux=AuxRequest(lse=True))
        torch.testing.assert_close(o, theirs)
        torch.testing.assert_close(lse, aux.lse)
        again, ours = flex_attention(q, q, q, block_mask=mask, return_aux=AuxRequest(lse=True))
        assert torch.equal(again, o)
        assert torch.equal(ours.lse, lse)
        assert type(ours) is type(aux)
        assert ours.max_scores is None
        assert flex_attention(q, q, q, block_mask=mask, return_aux=AuxRequest())[1].lse is None

    def test_planes_of_samples_and_heads(self) -> None:
        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (k % 4 >= h - b)

        mask = create_block_mask(mask_mod, 2, 4, 140, 140, device="cpu")
        assert_flex_agrees(mask, mask, [(2, 4, 140, 8)] * 3)

    def test_k_and_v_of_one_sample(self) -> None:
        mask = create_block_mask(lambda b, h, q, k: q >= k + 9 * b, 3, None, 140, 140, device="cpu")
        assert_flex_agrees(mask, mask, [(3, 2, 140, 8), (1, 2, 140, 8), (1, 2, 140, 8)])

    @pytest.mark.parametrize("form", ["function", "name"])
    def test_a_score_mod_that_adds(self, form: str) -> None:
        q, k, v = (torch.randn(2, 2, 140, 8) for _ in range(3))
        slopes, mask = torch.tensor([0.5, 0.25]), self.masks()["torch"]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slopes[h] * (i - j).abs()

        want = torch_flex_attention(q, k, v, score_mod, mask)
        o = flex_attention(q, k, v, score_mod if form == "function" else alibi(slopes), mask)
        torch.testing.assert_close(o, want)

    def test_a_score_mod_that_caps(self) -> None:
        q, k, v = (torch.randn(2, 2, 140, 8) for _ in range(3))
        mask, cap = self.masks()["torch"], torch.tensor(0.75)
        for score_mod in (
            lambda s, b, h, i, j: 0.75 * torch.tanh(s / 0.75),
            lambda s, b, h, i, j: cap * (s / cap).tanh(),
        ):
            o = flex_attention(q, k, v, score_mod, mask)
            torch.testing.assert_close(o, torch_flex_attention(q, k, v, score_mod, mask))
            assert not torch.allclose(o, flex_attention(q, k, v, None, mask), atol=1e-2)
        # of which a number would have no gradient
        cap.requires_grad_()
        with pytest.raises(ValueError, match=r"this is attention\(..., softcap=0.75\)"):
            flex_attention(q, k, v, lambda s, b, h, i, j: cap * (s / cap).tanh(), mask)

    def test_gradients_reach_what_a_score_mod_has_captured(self) -> None:
        q, bias = torch.randn(1, 2, 20, 8), torch.randn(20, 20, requires_grad=True)
        o = flex_attention(q, q, q, lambda s, b, h, i, j: s + bias[i, j])
        (grad,) = torch.autograd.grad(o.sin().sum(), bias)
        want = F.scaled_dot_product_attention(q, q, q, bias)
        torch.testing.assert_close(grad, torch.autograd.grad(want.sin().sum(), bias)[0])

    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            ({"score_mod": lambda s, b, h, q, k: s * 2}, ValueError, "allowed are functions that add a bias"),
            ({"score_mod": lambda s, b, h, q, k: 5 * ((s + q) / 5).tanh()}, ValueError, "functions that add a bias"),
            ({"query": torch.randn(2, 140, 8)}, ValueError, r"query has shape \(2, 140, 8\); allowed are 4 dimensions"),
            ({"score_mod": 3}, TypeError, "fn is a int"),
            ({"key": torch.randn(1, 1, 140, 8)}, ValueError, "query has 2 heads and key has 1; allowed are equal"),
            ({"return_aux": AuxRequest(lse=True, max_scores=True)}, ValueError, "return_aux asks for max_scores"),
            ({"block_mask": torch.ones(140, 140).bool()}, TypeError, "block_mask is a torch.Tensor; allowed is"),
            ({"block_mask": pack(causal(), q_len=9, kv_len=140)}, ValueError, "mask was packed for q_len=9"),
        ],
    )
    def test_errors(self, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
        q = torch.randn(1, 2, 140, 8)
        with pytest.raises(kind, match=message):
            flex_attention(**{"query": q, "key": q, "value": q, **changes})
