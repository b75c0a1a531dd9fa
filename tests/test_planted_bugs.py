"""What planted bugs showed to be missing, where it fits no other file: see `python -m tests.mutate`."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anymask import attention, backends, causal, flash_attention_custom_mask


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
