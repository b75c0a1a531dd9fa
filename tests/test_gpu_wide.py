"""head_dim 129 to 256 on Hopper: forms of masks, lengths, heads, layouts and scales, and the same bits in every run.

Each pair of dims and each dtype compiles its own kernels, so the grid is spread over them.
"""

import pytest
import torch

from anymask.testing import MASKS, Case, check
from tests.helpers import grid
from tests.helpers.grid import BF16, F16, cases

pytestmark = [pytest.mark.gpu]
DIMS = [(192, 128), (192, 192), (256, 256)]


@cases(("hopper",), [Case(m, 513, 1025, 256, BF16) for m in MASKS])
def test_masks(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@cases(
    ("hopper",),
    [
        Case(m, q, kv, d, F16 if d == 256 else BF16, dv)
        for q, kv in grid.LENGTHS
        for m in grid.LENGTH_MASKS
        for d, dv in DIMS
    ],
)
def test_lengths(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@cases(
    ("hopper",),
    [
        Case(m, 300, 500, d, BF16, dv, q_heads=h, kv_heads=g)
        for h, g in grid.HEADS
        for m in grid.HEAD_MASKS
        for d, dv in DIMS[::2]
    ],
)
def test_heads(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@cases(
    ("hopper",),
    [
        Case(m, 700, 900, d, BF16, dv)
        for d, dv in [(136, 136), (160, 64), (200, 256), (248, 8), (64, 160)]
        for m in ("none", "random", "causal_lower_right", "empty_columns")
    ],
)
def test_dims(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@cases(
    ("hopper",),
    [Case("random", 300, 500, 192, F16, 128, scale=s) for s in (-0.3, 0.0, 1e-3, 1.0)]
    + [Case(m, 300, 500, 192, F16, 128, layout=x) for m in ("none", "documents") for x in ("blhd", "packed")],
)
def test_scales_and_layouts(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@pytest.mark.hopper
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_the_same_bits_in_every_run(device: str, dims: tuple[int, int]) -> None:
    q, k = (grid.randn(2, heads, 700, dims[0], dtype=BF16, seed=heads) for heads in (4, 2))
    v, do = grid.randn(2, 2, 700, dims[1], dtype=BF16, seed=5), grid.randn(2, 4, 700, dims[1], dtype=BF16, seed=6)
    mask = grid.randn(700, 700, dtype=torch.float32, seed=7) > 0
    first = grid.results_of(q, k, v, mask, do, "hopper")
    for _ in range(5):
        again = grid.results_of(q, k, v, mask, do, "hopper")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.hopper
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_very_negative_scores_before_the_end(device: str, dims: tuple[int, int]) -> None:
    """Keys beyond the end have a score of 0, which must not outweigh scores of -1000 in any sum."""
    q = torch.ones(1, 2, 200, dims[0], device=device, dtype=BF16)
    k = -torch.ones(1, 2, 300, dims[0], device=device, dtype=BF16) * 60
    v, do = grid.randn(1, 2, 300, dims[1], dtype=BF16), grid.randn(1, 2, 200, dims[1], dtype=BF16)
    found = grid.results_of(q, k, v, None, do, "hopper")
    expected = grid.results_of(q.double(), k.double(), v.double(), None, do.double(), "reference")
    for a, b in zip(found, expected, strict=True):
        # dq is a sum over equal keys of 60 that cancels, of weights rounded to bf16
        assert (a.double() - b).abs().max() <= 0.02 * b.abs().max() + 0.1
