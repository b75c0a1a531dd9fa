"""Split-KV on CPU tensors, through Triton's interpreter, which raises on int32 overflow here.

Skipped unless TRITON_INTERPRET=1 is set before Triton is imported: test_interpreted.py runs this file so.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from anymask import attention, pack
from anymask.backends.gpu import split, windows
from anymask.testing import LAYOUTS, Case, check
from tests.helpers import grid
from tests.helpers.grid import BF16, F16, F32, cases
from tests.helpers.interpreter import MARKS, MASK_NAMES
from tests.helpers.interpreter import interpreter as interpreter

pytestmark = MARKS
BACKENDS = ("triton",)
# more than some lines have steps, so that some splits have none
SPLITS = 5


@pytest.fixture(autouse=True)
def splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call is split, and a test fails that splits none."""
    seen = []

    def forward(*args: Any) -> Any:
        seen.append(args[5])
        return original(*args)

    original = split.forward
    monkeypatch.setattr(split, "count", lambda q, k, block_mask: SPLITS)
    monkeypatch.setattr(split, "forward", forward)
    monkeypatch.setattr(windows, "fits", lambda q, k, v: False)
    yield
    assert seen


def forwards(*many: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", many, ids=str)


@forwards(
    *(Case(m, 17, 300, 16, F16, batch=1, q_heads=2, kv_heads=1) for m in MASK_NAMES[1:]),
    *(Case(m, 2, 300, 16, F16, batch=2) for m in ("empty_sample", "tree", "random_1", "all_full", "all_empty")),
)
def test_masks(case: Case) -> None:
    grid.check_forward(case, "triton")


@forwards(
    *(
        Case(m, q, kv, 16, F16, batch=1, q_heads=h, kv_heads=g)
        for q, kv, h, g in ((1, 513, 4, 2), (3, 129, 7, 1), (64, 257, 2, 1), (130, 140, 1, 1))
        for m in ("none", "random", "empty_rows", "causal_lower_right")
    ),
    Case("per_head", 3, 200, 16, F16, batch=1, q_heads=4),
    Case("none", 1, 1, 16, F16, batch=1),
)
def test_lengths_and_heads(case: Case) -> None:
    grid.check_forward(case, "triton")


@forwards(
    *(Case("random", 3, 260, d, F16, dv, batch=1) for d, dv in ((1, 1), (31, 40), (192, 128), (256, 256))),
    *(Case(m, 3, 260, 16, t, batch=1, q_heads=4) for t in (BF16, F32) for m in ("none", "per_batch")),
    Case("causal_lower_right", 3, 260, 128, F32, batch=1),
)
def test_head_dims_and_dtypes(case: Case) -> None:
    grid.check_forward(case, "triton")


@forwards(
    *(Case("documents", 5, 140, 16, F16, 32, q_heads=4, layout=layout) for layout in LAYOUTS),
    *(Case(m, 5, 260, 16, F32, scale=s) for s in (-0.3, 0.0, 3.0) for m in ("none", "causal_behind")),
)
def test_layouts_and_scales(case: Case) -> None:
    grid.check_forward(case, "triton")


@cases(BACKENDS, [Case("empty_columns", 5, 260, 16, F16, q_heads=4), Case("none", 17, 260, 16, F32, batch=1)])
def test_gradients(backend: str, case: Case) -> None:
    check(case, backend)


@cases(BACKENDS, [Case("random", 3, 400, 16, t, batch=1) for t in (F32, BF16)])
def test_far_from_zero_scores(backend: str, case: Case) -> None:
    grid.check_far_from_zero(case, backend, "cpu", -10000.0)


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES[:2], ids=str)
@cases(BACKENDS, [Case(m, 9, 300, 16, F16, batch=1) for m in ("empty_columns", "tiles")])
def test_unused_keys_reach_nothing(backend: str, case: Case, value: float) -> None:
    grid.check_unused_keys_reach_nothing(case, backend, "cpu", value)


@cases(BACKENDS, [Case("random", 9, 140, 16, F16, batch=1, q_heads=4)])
def test_unused_rows_that_differ_by_head(backend: str, case: Case) -> None:
    grid.check_unused_rows_that_differ_by_head(case, backend, "cpu", float("nan"))


# a plan keeps the number of its first call, so each has a test of its own
@pytest.mark.parametrize("splits", [2, 5, 64])
def test_every_key_is_met_once_by_any_number_of_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # v counts: with equal scores the output is the mean of what is met
    length = 700
    q, k = torch.zeros(1, 2, 2, 16), torch.zeros(1, 1, length, 16)
    v = torch.randn(1, 1, length, 16)
    bits = torch.rand(2, length) < 0.5
    bits[:, 128:384] = True
    expected = bits.double() @ v[0, 0].double() / bits.sum(-1, keepdim=True)
    monkeypatch.setattr(split, "count", lambda q, k, block_mask: splits)
    o, lse = attention(q, k, v, pack(bits), return_lse=True, backend="triton")
    torch.testing.assert_close(o.double(), expected.expand_as(o), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[0, 0].double(), bits.sum(-1).double().log(), rtol=1e-6, atol=1e-6)
    none = attention(q, k, v, backend="triton")
    torch.testing.assert_close(none.double(), v.double().mean(2, keepdim=True).expand_as(o), rtol=1e-5, atol=1e-6)
