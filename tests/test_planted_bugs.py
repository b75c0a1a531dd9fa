"""What planted bugs showed to be missing, where it fits no other file: see `python -m tests.mutate`."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anymask import (
    attention,
    backends,
    causal,
    causal_lower_right,
    document,
    extend,
    flash_attention_custom_mask,
    key_padding,
    pack,
    spans,
    tree,
)
from anymask.integrations import transformers
from anymask.mask.leaves import Positions
from anymask.packing import cache
from anymask.testing import assert_same_block_mask


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("asked", [None, False, True])
def test_deterministic_reaches_the_backward_pass(
    asked: bool | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = backends.load("cpu"), []

    def backward(*args: Any) -> Any:
        seen.append(args[-1])
        return real.backward(*args)

    stub = SimpleNamespace(__name__=real.__name__, why_not=real.why_not, forward=real.forward, backward=backward)
    monkeypatch.setattr(backends, "choose", lambda *args: stub)
    q = torch.randn(1, 1, 5, 8, requires_grad=True)

    def call(q: torch.Tensor) -> torch.Tensor:
        return attention(q, q, q, deterministic=asked)

    if compiled:
        call = torch.compile(call, backend="eager", fullgraph=True)
    call(q).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        attention(q, q, q, deterministic=asked).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [bool(asked), True]


def test_the_custom_mask_call_casts_mixed_dtypes_under_autocast() -> None:
    q, k, v = (torch.randn(1, 2, 20, 16, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    mask = torch.rand(20, 20) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        o = flash_attention_custom_mask(q, k, v, mask)
    assert o.dtype == torch.bfloat16
    expected = attention(*(t.bfloat16() for t in (q, k, v)), mask)
    assert torch.equal(o, expected)


def test_causal_is_not_shifted_by_a_tile() -> None:
    # a tile that ends where the plane does
    for length in (127, 128, 129, 256):
        q = torch.randn(1, 1, length, 8)
        seen = attention(q * 0, q, torch.eye(length)[None, None], causal())
        assert torch.equal(seen[0, 0] > 0, torch.ones(length, length, dtype=torch.bool).tril())


@pytest.mark.parametrize("of_query", [False, True])
@pytest.mark.parametrize("edge", [1, 127, 128, 129, 255, 256])
def test_positions_whose_edge_meets_a_tile(edge: int, of_query: bool) -> None:
    position = torch.arange(384)
    for low, high in ((0, edge), (edge, 384)):
        packed = pack(Positions(low, high, of_query), q_len=384, kv_len=384)
        inside = (position >= low) & (position < high)
        expected = inside[:, None] if of_query else inside[None]
        assert torch.equal(packed.to_dense()[0, 0], expected.expand(384, 384))


@pytest.mark.parametrize("edge", [1, 127, 128, 129, 255, 256])
def test_lengths_that_meet_a_tile(edge: int) -> None:
    seen = torch.arange(384) < edge
    assert torch.equal(
        pack(key_padding(torch.tensor([edge])), q_len=9, kv_len=384).to_dense()[0, 0], seen.expand(9, 384)
    )
    # the same number for each query, in whose range the keys are
    end = torch.full((200,), edge)
    packed = pack(spans(end - edge, end), q_len=200, kv_len=384)
    assert torch.equal(packed.to_dense()[0, 0], seen.expand(200, 384))


def test_what_cannot_grow_in_a_part() -> None:
    mask = causal() & causal_lower_right()
    with pytest.raises(ValueError, match="counts from the last query and key"):
        extend(pack(mask, q_len=10, kv_len=10), mask, 20, 20)


def test_a_mask_keeps_what_it_was_given() -> None:
    ids, start = torch.arange(300) // 100, torch.arange(300)
    end = start + 7
    masks = [document(ids), spans(start, end), key_padding(end[:1]), tree(start - 1)]
    expected = [pack(mask, q_len=300, kv_len=300) for mask in masks]
    for t in (ids, start, end):
        t.zero_()
    for mask, before in zip(masks, expected, strict=True):
        assert_same_block_mask(pack(mask, q_len=300, kv_len=300), before)


def test_each_part_of_a_key_tells_masks_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_pack", lambda mask, q_len, kv_len, *rest: pack(mask, q_len=q_len, kv_len=kv_len))
    memory, cpu = cache.MaskCache(), torch.device("cpu")
    calls: list[tuple[Any, int, int, torch.device]] = [
        (causal(), 5, 7, cpu),
        (causal(1), 5, 7, cpu),
        (~causal(), 5, 7, cpu),
        (causal(), 6, 7, cpu),
        (causal(), 5, 8, cpu),
        # a device that is never reached
        (causal(), 5, 7, torch.device("meta")),
    ]
    assert len({id(memory.pack(*call)) for call in calls}) == len(memory) == len(calls)


@pytest.mark.parametrize(("planes", "message"), [((1, 2), "2 along q_heads"), ((3, 1), "3 along batch")], ids=str)
def test_planes_that_divide_those_of_q_do_not_fit(planes: tuple[int, int], message: str) -> None:
    q = torch.randn(6, 4, 5, 8)
    for mask in (torch.ones(*planes, 5, 5, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool).expand(*planes, 5, 5)):
        with pytest.raises(ValueError, match=f"mask has {message}"):
            attention(q, q, q, mask)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tiles_that_alternate_between_full_and_partial(backend: str) -> None:
    # full 0 and 2, then partial 1 and 3: as many as a range from the first to the last would be
    mask = torch.ones(40, 512, dtype=torch.bool)
    mask[:, 128:256], mask[:, 384:] = torch.rand(2, 40, 128).lt(0.5).unbind()
    q, k = torch.randn(1, 1, 40, 8, dtype=torch.float64), torch.randn(1, 1, 512, 8, dtype=torch.float64)
    s = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attention(q, k, k, mask, backend=backend), torch.softmax(s, -1) @ k)


def sliding_window_overlay(sliding_window: int) -> Any:
    """Known to `anymask.integrations.transformers` by its name, as the function of that library is."""

    def inner_mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k > q - sliding_window

    inner_mask.__module__ = "transformers.masking_utils"
    return inner_mask


@pytest.mark.parametrize("window", [None, 1, 3])
def test_functions_of_models_count_positions_from_their_offsets(window: int | None) -> None:
    fn = None if window is None else sliding_window_overlay(window)
    packed = transformers.mask(1, 3, 9, q_offset=7, kv_offset=2, mask_function=fn)
    assert packed is not None
    q, k = torch.arange(7, 10)[:, None], torch.arange(2, 11)
    assert torch.equal(packed.to_dense()[0, 0], k <= q if window is None else k > q - window)


def test_sinks_take_part_in_the_softmax() -> None:
    q, k, sinks = torch.randn(2, 4, 5, 8).double(), torch.randn(2, 4, 7, 8).double(), torch.randn(4).double()
    mask = torch.rand(5, 7) < 0.7
    o, _ = transformers.attention_forward(torch.nn.Identity(), q, k, k, mask, s_aux=sinks)
    s = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    p = torch.softmax(torch.cat([s, sinks[:, None, None].expand(2, 4, 5, 1)], -1), -1)[..., :-1]
    torch.testing.assert_close(o, (p @ k).transpose(1, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scores_that_fall_from_step_to_step(backend: str) -> None:
    q, k, v = (torch.randn(1, 1, length, 8) for length in (20, 2100, 2100))
    # by more than fp32 has powers of 2, so that a maximum must not follow them
    q[..., 0], k[..., :1024, 0], k[..., 1024:, 0] = 30, 30, -30
    o, lse = attention(q, k, v, return_lse=True, backend=backend)
    s = q.double() @ k.double().mT / 8**0.5
    torch.testing.assert_close(o.double(), torch.softmax(s, -1) @ v.double(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), torch.logsumexp(s, -1), rtol=1e-5, atol=1e-3)
