"""What `attention` remembers, beside other streams and in graphs."""

from __future__ import annotations

import pytest
import torch

import anymask
from anymask import attention

pytestmark = pytest.mark.gpu


def test_another_stream(device: str) -> None:
    q = torch.randn(2, 4, 300, 64, device=device, dtype=torch.float16)
    mask = torch.rand(300, 300, device=device) < 0.5
    expected = attention(q, q, q, mask)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        o = attention(q, q, q, mask)
        del mask
        # memory of the entry that died must not be written while the side stream reads it
        garbage = [torch.full((1 << 16,), -1, dtype=torch.int32, device=device) for _ in range(8)]
    torch.cuda.synchronize()
    assert torch.equal(o, expected)
    assert len(garbage) == 8


def test_a_graph_takes_no_mask_that_could_change(device: str) -> None:
    q = torch.randn(2, 4, 300, 64, device=device, dtype=torch.float16)
    mask = torch.rand(300, 300, device=device) < 0.5
    expected = attention(q, q, q, is_causal=True)
    attention(q, q, q, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="mask would be packed"):
            attention(q, q, q, mask)
        o = attention(q, q, q, is_causal=True)
    # a replay reads the packed mask, which is therefore never freed
    anymask.forget()
    torch.cuda.empty_cache()
    garbage = [torch.full((1 << 16,), -1, dtype=torch.int32, device=device) for _ in range(64)]
    graph.replay()
    assert torch.equal(o, expected)
    assert len(garbage) == 64
