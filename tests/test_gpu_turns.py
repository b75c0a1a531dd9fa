"""Deterministic gradients on Hopper: dq as exact as fp64 asks, with the bits of the run before, whatever else runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from anymask import attention, causal, pack
from anymask.backends import hopper
from anymask.testing import Case, check, make_inputs, run
from tests.helpers import grid
from tests.helpers.grid import BF16, F16, cases

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]


@pytest.fixture(autouse=True)
def _in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    # short columns too
    monkeypatch.setattr("anymask.backends.hopper.tuning.SHORT_COLUMN_IN_TURN", 0)


@contextmanager
def busy() -> Iterator[None]:
    """Products of another stream, which come and go beside what is called."""
    stream, x = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=F16)
    with torch.cuda.stream(stream):
        for _ in range(300):
            x @ x
    yield
    torch.cuda.synchronize()


@cases(
    ("hopper",),
    [
        Case(m, 1500, 1600, d, t, q_heads=h, kv_heads=g)
        for m in ("random", "causal", "documents", "none")
        for d, t in ((64, BF16), (128, F16))
        for h, g in ((4, 4), (6, 2))
    ]
    + [Case(m, 1500, 1600, 128, BF16, q_heads=4) for m in ("per_head", "per_batch", "per_batch_head", "tiles")]
    + [Case(m, q, kv, 96, F16) for m in ("none", "causal", "key_padding") for q, kv in ((200, 1500), (1500, 200))],
)
def test_turns_are_exact_and_repeat(backend: str, case: Case, device: str) -> None:
    expected = check(case, backend, device, deterministic=True)
    inputs = make_inputs(case, device)
    with busy():
        for _ in range(20):
            grid.same(expected, run(inputs, case.scale, backend, True), backend, True)


@pytest.mark.parametrize("programs", [3, 7, 9])
@pytest.mark.parametrize("mask", ["documents", "random", "none"])
def test_few_programs_take_turns(mask: str, programs: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anymask.backends.hopper.multiprocessors", lambda device: programs)
    for dim in (64, 128):
        check(Case(mask, 700, 900, dim, F16, q_heads=4, kv_heads=2), "hopper", device, deterministic=True)


def test_two_calls_at_once_take_turns(device: str) -> None:
    """Programs of both want the whole GPU, and wait for others of their own."""
    case = Case("random", 2000, 2000, 64, F16, q_heads=8)
    inputs = [make_inputs(case, device), make_inputs(case, device)]
    first = [run(x, None, "hopper", True) for x in inputs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
    torch.cuda.synchronize()
    for _ in range(30):
        found = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(x, None, "hopper", True))
        torch.cuda.synchronize()
        for x, y in zip(first, found, strict=True):
            grid.same(x, y, "hopper", True)


def test_turns_of_a_long_line(device: str) -> None:
    length, mask = 32768, pack(causal(), q_len=32768, kv_len=32768, device=device)
    q, do = (grid.randn(1, 4, length, 128, dtype=BF16, seed=s) for s in (0, 1))
    k, v = (grid.randn(1, 1, length, 128, dtype=BF16, seed=s) for s in (2, 3))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def gradients(deterministic: bool) -> tuple[torch.Tensor, ...]:
        o = attention(*leaves, mask, backend="hopper", deterministic=deterministic)
        return torch.autograd.grad(o, leaves, do)

    expected, first = gradients(False), gradients(True)
    # another order of the same fp32 sums, rounded once to bf16
    for found, wanted in zip(first, expected, strict=True):
        assert (found.float() - wanted.float()).abs().max() <= 0.01 * wanted.float().abs().max()
    with busy():
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(gradients(True), first, strict=True))


def test_turns_within_a_graph(device: str) -> None:
    """The turns of a mask are made anew within it, and those remembered serve other calls."""
    case = Case("random", 1000, 1000, 128, F16)
    q, k, v, mask, _, do, _ = make_inputs(case, device)
    block_mask = pack(mask, q_len=1000, kv_len=1000, device=device)
    o, lse = hopper.forward(q.detach(), k.detach(), v.detach(), block_mask, 0.1)

    def backward() -> tuple[torch.Tensor, ...]:
        return hopper.backward(q.detach(), k.detach(), v.detach(), o, lse, do, None, block_mask, 0.1, True)

    with torch.cuda.stream(torch.cuda.Stream()):
        backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward()
    expected = backward()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        for x, y in zip(captured, expected, strict=True):
            assert torch.equal(x, y)


def test_turns_where_torch_allows_no_other_algorithm(device: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        case = Case("documents", 1000, 1000, 128, F16, q_heads=4, kv_heads=2)
        expected = check(case, "hopper", device)
        grid.same(expected, run(make_inputs(case, device), None, "hopper", True), "hopper", True)
    finally:
        torch.use_deterministic_algorithms(False)
