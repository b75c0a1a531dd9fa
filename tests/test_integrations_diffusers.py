"""The function that diffusers' dispatcher calls, beside its native backend's rules and, if it is there, inside it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anymask import attention, causal, pack
from anymask.integrations.diffusers import dispatched_attention

BATCH, Q_LEN, KV_LEN, HEADS = 2, 10, 20, 4


def qkv(kv_heads: int = HEADS) -> list[Tensor]:
    shapes = (BATCH, Q_LEN, HEADS, 8), (BATCH, KV_LEN, kv_heads, 8), (BATCH, KV_LEN, kv_heads, 6)
    return [torch.randn(s, requires_grad=True) for s in shapes]


def seen(*shape: int) -> Tensor:
    found = torch.rand(shape) < 0.6
    found[..., 0] = True
    return found


MASKS: dict[str, Any] = {
    "none": lambda: None,
    "padding": lambda: seen(BATCH, KV_LEN),
    "pairs": lambda: seen(Q_LEN, KV_LEN),
    "samples": lambda: seen(BATCH, 1, 1, KV_LEN),
    "heads": lambda: seen(BATCH, HEADS, Q_LEN, KV_LEN),
}


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_it_is_sdpa_of_its_layout(name: str, additive: bool, kv_heads: int) -> None:
    mask, (q, k, v) = MASKS[name](), qkv(kv_heads)
    given = mask
    if additive and mask is not None:
        given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    o, lse = dispatched_attention(q, k, v, given, scale=0.3, enable_gqa=kv_heads < HEADS, return_lse=True)
    wide = mask[:, None, None] if name == "padding" else mask
    q_, k_, v_ = (t.transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(q_, k_, v_, wide, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(o, expected)
    assert torch.equal(lse, attention(q_, k_, v_, wide, scale=0.3, return_lse=True)[1])
    assert o.is_contiguous()
    do = torch.randn_like(o)
    grads = [torch.autograd.grad(x, (q, k, v), do) for x in (o, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_causal_and_packed_masks() -> None:
    q, k, v = qkv()
    a = dispatched_attention(q, k, v, is_causal=True)
    for mask in (causal(), pack(causal(), q_len=Q_LEN, kv_len=KV_LEN)):
        assert torch.equal(dispatched_attention(q, k, v, mask), a)


def test_floats_are_added() -> None:
    q, k, v = qkv()
    bias = torch.randn(BATCH, KV_LEN)
    o = dispatched_attention(q, k, v, bias, scale=0.3)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*heads, bias[:, None, None], scale=0.3)
    torch.testing.assert_close(o, want.transpose(1, 2))
    torch.manual_seed(1)
    dropped = dispatched_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(dropped, dispatched_attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(dropped, dispatched_attention(q, k, v))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.randn(2, 3, 4)}, r"query has shape \(2, 3, 4\); allowed are 4 dimensions"),
        ({"dropout_p": 1.0}, r"dropout_p is 1.0; allowed are numbers from 0 to below 1"),
        (
            {"attn_mask": torch.ones(Q_LEN, KV_LEN).bool(), "is_causal": True},
            "is_causal is True and attn_mask",
        ),
        ({"_parallel_config": object()}, "_parallel_config is a object; allowed is None"),
        ({"key": torch.randn(BATCH, KV_LEN, 2, 8)}, "query has 4 heads and key has 2; allowed are equal counts"),
        ({"attn_mask": torch.ones(BATCH, KV_LEN).long()}, r"mask has dtype torch.int64"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    names = ("query", "key", "value")
    with pytest.raises(ValueError, match=message):
        dispatched_attention(**{**dict(zip(names, qkv(), strict=True)), **changes})


@pytest.fixture
def dispatch() -> Iterator[Any]:
    """The module of diffusers, with ours in the place of its native backend."""
    module = pytest.importorskip("diffusers.models.attention_dispatch")
    registry, native = module._AttentionBackendRegistry, module.AttentionBackendName.NATIVE
    tables = registry._backends, registry._constraints, registry._supported_arg_names
    before = [table[native] for table in tables]
    registry.register(native)(dispatched_attention)
    yield module
    for table, value in zip(tables, before, strict=True):
        table[native] = value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MASKS)
def test_the_dispatcher_calls_it(name: str, dispatch: Any) -> None:
    mask, (q, k, v) = MASKS[name](), qkv()
    found = dispatch.dispatch_attention_fn(q, k, v, mask, scale=0.3, backend="native")
    assert torch.equal(found, dispatched_attention(q, k, v, mask, scale=0.3))
    _, lse = dispatch.dispatch_attention_fn(q, k, v, mask, attention_kwargs={"return_lse": True}, backend="native")
    assert lse.shape == (BATCH, HEADS, Q_LEN)
