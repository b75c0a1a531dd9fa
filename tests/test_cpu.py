"""Planes of one tile on the CPU: many at once, in blocks that do not show, in bounded memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anymask import attention, pack
from anymask.backends import cpu
from anymask.backends.cpu import small
from anymask.testing import MASKS, Case, check, make_inputs, run
from tests.helpers import grid
from tests.helpers.grid import BF16, F16, F32, F64, cases
from tests.helpers.memory import AllocationMode

BACKENDS = ("cpu",)


@pytest.fixture(params=[1, 40_000, 200_000], ids="scores{}".format)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one kv head, of some, and of some samples, with masks unpacked for one and for several blocks."""
    monkeypatch.setattr(small, "SCORES", request.param)
    monkeypatch.setattr(small, "PAIRS", request.param * 2)


@pytest.mark.usefixtures("blocks")
@cases(BACKENDS, [Case(m, 70, 90, 16, F32, batch=5, q_heads=6, kv_heads=3) for m in MASKS])
def test_masks_in_blocks(backend: str, case: Case) -> None:
    check(case, backend)


HEADS = [(1, 1), (4, 4), (4, 2), (6, 1)]


@cases(
    BACKENDS,
    [
        Case(m, q, kv, 24, t, 40, batch=3, q_heads=h, kv_heads=g, scale=s)
        for m in ("none", "per_batch_head", "empty_columns", "empty_head")
        for q, kv in ((1, 1), (49, 49), (128, 128), (9, 127))
        for h, g in HEADS
        for t, s in ((F32, None), (F16, 4.0), (BF16, None), (F64, 4.0))
    ],
)
def test_lengths_heads_and_scales(backend: str, case: Case) -> None:
    check(case, backend)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(BACKENDS, [Case(m, 60, 100, 16, F32, q_heads=4) for m in ("empty_columns", "key_padding")])
def test_unused_keys_reach_nothing(backend: str, case: Case, value: float) -> None:
    grid.check_unused_keys_reach_nothing(case, backend, "cpu", value)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(BACKENDS, [Case(m, 100, 60, 16, F32, q_heads=4) for m in ("empty_rows", "one_pair", "all_empty")])
def test_unused_queries_reach_nothing(backend: str, case: Case, value: float) -> None:
    grid.check_unused_queries_reach_nothing(case, backend, "cpu", value)


@pytest.mark.parametrize("value", [1e25, 3e38])
def test_large_values_that_nothing_attends_to(value: float) -> None:
    """Finite ones, whose products are not."""
    i = make_inputs(Case("empty_columns", 60, 100, 16))
    dead = ~i.dense.any(2)[..., None]
    assert dead.any()
    expected = run(i, backend="cpu")
    k, v = (torch.where(dead, value, t.detach()).requires_grad_() for t in (i.k, i.v))
    for got, same in zip(run(i._replace(k=k, v=v), backend="cpu"), expected, strict=True):
        assert torch.equal(got, same)


@pytest.mark.parametrize("shift", [-50.0, -1000.0, -10000.0])
@cases(BACKENDS, [Case("random", 33, kv, 16, t, batch=1) for kv in (1, 64, 128) for t in (F32, BF16, F64)])
def test_far_from_zero_scores(backend: str, case: Case, shift: float) -> None:
    grid.check_far_from_zero(case, backend, "cpu", shift)


def test_it_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(cpu.Call, "of", fails)
    for q_len, kv_len in ((128, 128), (1, 1)):
        q, k = torch.randn(1, 2, q_len, 8, requires_grad=True), torch.randn(1, 2, kv_len, 8)
        attention(q, k, k, backend="cpu").sum().backward()
    for q_len, kv_len in ((129, 1), (1, 129)):
        q, k = torch.randn(1, 2, q_len, 8), torch.randn(1, 2, kv_len, 8)
        with pytest.raises(ZeroDivisionError):
            attention(q, k, k, backend="cpu")


class Operations(TorchDispatchMode):
    """How many operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_mask", [False, True])
def test_many_short_samples_are_a_few_operations(has_mask: bool) -> None:
    """Samples of two tokens, each with a mask of its own or without one; in blocks of bounded memory."""
    batch = 3_000 if has_mask else 70_000
    q, k, v = (torch.randn(batch, 1, 2, 4, requires_grad=True) for _ in range(3))
    dense: Tensor = torch.rand(batch, 1, 2, 2) < 0.7
    mask = pack(dense) if has_mask else None
    with Operations() as operations, AllocationMode() as memory:
        o = attention(q, k, v, mask, backend="cpu")
        o.sum().backward()
    assert operations.count < 600
    assert memory.largest <= max(4 * small.PAIRS * 32, q.nbytes)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, dense if has_mask else None)
    torch.testing.assert_close(o, torch.where(dense.any(-1, keepdim=True), expected, 0) if has_mask else expected)
