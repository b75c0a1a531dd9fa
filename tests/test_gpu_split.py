"""Split-KV on a GPU: against fp64 at many shapes, and what only a GPU can show."""

from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import attention, explain, pack, tree
from anymask.backends import Backend
from anymask.testing import Case, check, make_inputs, make_qkv
from tests.helpers import grid
from tests.helpers.grid import BF16, F16, F32, cases

pytestmark = pytest.mark.gpu
BACKENDS: tuple[Backend, ...] = ("hopper", "triton")
NAMES = ["triton", pytest.param("hopper", marks=pytest.mark.hopper)]
MASKS = [
    "none",
    "causal_lower_right",
    "random",
    "empty_rows",
    "empty_columns",
    "per_head",
    "per_batch",
    "key_padding",
    "strided",
]


def check_split(case: Case, backend: Backend, device: str) -> None:
    """The forward pass of a case that is split, if there is anything to walk."""
    inputs = make_inputs(case, device)
    assert explain(*inputs[:4], backend=backend).splits > 1
    grid.check_forward(case, backend, device)


@cases(
    BACKENDS,
    [
        Case(m, q, kv, 128, F16, batch=1, q_heads=h, kv_heads=g)
        for m in MASKS
        for q, kv, h, g in ((1, 5000, 8, 2), (3, 513, 4, 4), (17, 3000, 8, 1), (64, 4096, 4, 2))
        # of one query, these masks give the heads of a group unused keys of their own, which Hopper's kernels refuse
        if (m, q) not in (("empty_rows", 1), ("per_head", 1), ("strided", 1))
    ],
)
def test_masks_and_lengths(backend: Backend, case: Case, device: str) -> None:
    check_split(case, backend, device)


@cases(
    BACKENDS,
    [Case("random", 4, 3000, d, F16, dv, q_heads=4) for d, dv in ((16, 16), (31, 31), (64, 32), (72, 72), (192, 128))]
    + [Case(m, 16, 3000, d, t, q_heads=8) for d in (64, 256) for t in (F16, BF16) for m in ("none", "random")]
    + [Case(m, q, 3000, d, F32, q_heads=4) for d in (64, 128, 256) for m in ("none", "random") for q in (1, 16)],
)
def test_head_dims_and_dtypes(backend: Backend, case: Case, device: str) -> None:
    check_split(case, backend, device)


@cases(
    BACKENDS,
    [Case("none", 300, 20000, 64, F16, batch=1), Case("random", 200, 9000, 128, BF16, batch=1, q_heads=1, kv_heads=1)],
)
def test_few_heads_of_many_queries(backend: Backend, case: Case, device: str) -> None:
    check_split(case, backend, device)


@cases(BACKENDS, [Case("empty_columns", 17, 2000, 64, F16, q_heads=4), Case("none", 1, 9000, 128, BF16, q_heads=8)])
def test_gradients(backend: Backend, case: Case, device: str) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(BACKENDS, [Case(m, q, 3000, 64, F16) for m in ("empty_columns", "key_padding", "row") for q in (1, 30)])
def test_unused_keys_reach_nothing(backend: Backend, case: Case, value: float, device: str) -> None:
    grid.check_unused_keys_reach_nothing(case, backend, device, value)


@pytest.mark.parametrize("shift", [-50.0, -10000.0])
@cases(BACKENDS, [Case("random", 5, 4000, 64, t) for t in (F32, BF16)])
def test_far_from_zero_scores(backend: Backend, case: Case, shift: float, device: str) -> None:
    grid.check_far_from_zero(case, backend, device, shift)


def _call(device: str, backend: Backend, q_len: int = 1) -> tuple[Any, ...]:
    q, k, v = make_qkv(1, 32, 8, q_len, 20000, 128, dtype=BF16, device=device)
    mask = pack(torch.rand(q_len, 20000, device=device) < 0.5)
    assert explain(q, k, v, mask, backend=backend).splits > 8
    return q, k, v, mask


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("q_len", [1, 16])
def test_runs_repeat(q_len: int, backend: Backend, device: str) -> None:
    args = _call(device, backend, q_len)
    first = attention(*args, return_lse=True, backend=backend)
    for _ in range(200):
        for x, y in zip(first, attention(*args, return_lse=True, backend=backend), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("backend", NAMES)
def test_in_a_cuda_graph(backend: Backend, device: str) -> None:
    """Two calls in a graph, replayed with other numbers, beside calls on another stream."""
    q, k, v, mask = _call(device, backend)

    def twice() -> Tensor:
        return attention(attention(q, k, v, mask, backend=backend), k, v, mask, backend=backend)

    twice()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = twice()
    side = torch.cuda.Stream()
    for step in range(5):
        q.add_(0.5 + step)
        expected = twice()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            others = [twice() for _ in range(5)]
        captured.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)
        assert all(torch.equal(x, expected) for x in others)


@pytest.mark.parametrize("backend", NAMES)
def test_partial_outputs_are_64_of_the_output_at_most(backend: Backend, device: str) -> None:
    q, k, v = make_qkv(1, 4, 1, 1, 100000, 128, dtype=F32, device=device)
    q, k, v = (t.to(F16) for t in (q, k, v))
    assert explain(q, k, v, backend=backend).splits == 64
    attention(q, k, v, backend=backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    o, lse = attention(q, k, v, return_lse=True, backend=backend)
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    # numbers of fp32, with m and l beside each row's 128
    assert peak <= o.nbytes + lse.nbytes + 64 * o.numel() * 4 * 130 / 128


@pytest.mark.parametrize("backend", NAMES)
def test_a_tree_of_drafts(backend: Backend, device: str) -> None:
    """Drafts see the text before them, themselves and their ancestors, at the end of a cache."""
    text, drafts = 6000, 12
    parents = torch.tensor([-1, 0, 0, 1, 1, 2, 3, 3, 5, 5, 8, 9])
    q, k, v = make_qkv(1, 8, 2, drafts, text + drafts, 64, dtype=F16, device=device)
    bits = torch.ones(drafts, text + drafts, dtype=torch.bool, device=device)
    bits[:, text:] = pack(tree(parents), q_len=drafts, kv_len=drafts).to_dense()[0, 0].to(device)
    assert explain(q, k, v, bits, backend=backend).splits > 1
    o, lse = attention(q, k, v, bits, return_lse=True, backend=backend)
    expected = attention(*(t.double() for t in (q, k, v)), bits, return_lse=True, backend="reference")
    torch.testing.assert_close(o.double(), expected[0], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(lse.double(), expected[1].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("backend", NAMES)
def test_nothing_waits_for_the_gpu(backend: Backend, device: str) -> None:
    args = _call(device, backend)
    attention(*args, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        o = attention(*args, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert o.isfinite().all()
