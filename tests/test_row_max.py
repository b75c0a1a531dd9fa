"""The row max of the Hopper forward kernel, as far as no GPU is needed: its slow path for one row of each thread."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from anymask.backends.hopper.kernels import ptx
from tests.helpers import ptx as machine

# exponents of a thread, of which those of its first row
N, OF_ROW = 8, [0, 1, 4, 5]


def fold(tiles: list[Tensor], limited: bool) -> tuple[Tensor, Tensor]:
    """Row max and log2 of the row sum, both fp32 `[32]`, of tiles of scores in base 2, `[4, 32]` each."""
    asm = "\n".join(ptx._update_row_asm(N, 0, False, limited))
    m, total = torch.zeros(32), torch.zeros(32)
    for scores in tiles:
        registers = [torch.zeros(32) for _ in range(N + 4)]
        for i, s in zip(OF_ROW, scores, strict=True):
            registers[i] = s - m
        registers[N] = m
        registers = machine.run(asm, N + 2, registers, in_place=True)
        m, alpha = registers[N], registers[N + 1]
        sums = torch.stack([registers[i] for i in OF_ROW]).exp2().sum(0)
        assert (alpha <= 1).all()
        # of the four threads of a row
        total = total * alpha + sums.view(8, 4).sum(1).repeat_interleave(4)
    return m, total.log2()


def lse2(tiles: list[Tensor]) -> Tensor:
    """log2 of the sum of powers of two of a row, fp64 `[32]`."""
    rows = torch.cat(tiles).double().view(-1, 8, 4).transpose(0, 1).reshape(8, -1)
    return (torch.logsumexp(rows * math.log(2), 1) / math.log(2)).repeat_interleave(4)


@pytest.mark.parametrize("limited", [False, True])
def test_a_row_max_follows_the_scores(limited: bool) -> None:
    torch.manual_seed(0)
    tiles = [torch.randn(4, 32) * 5 + 40 * i - 100 for i in range(5)]
    m, log_sum = fold(tiles, limited)
    torch.testing.assert_close((m + log_sum).double(), lse2(tiles), atol=1e-4, rtol=0)


@pytest.mark.parametrize("hidden", [-1e4, -1e5, -1e9, -2e38])
def test_keys_that_large_numbers_hide_leave_no_trace(hidden: float) -> None:
    torch.manual_seed(0)
    tiles = [torch.randn(4, 32) + hidden * math.log2(math.e), torch.randn(4, 32) * 5, torch.randn(4, 32) * 5]
    m, log_sum = fold(tiles, True)
    torch.testing.assert_close((m + log_sum).double(), lse2(tiles), atol=2e-3, rtol=0)
    if hidden < -1e6:
        # without a limit the exponents of the second tile are rounded as the first row max is
        m, log_sum = fold(tiles, False)
        assert not ((m + log_sum).double() - lse2(tiles)).abs().max() < 2e-3


def test_a_row_of_hidden_keys_alone_has_no_sum() -> None:
    m, log_sum = fold([torch.full((4, 32), -1e9)] * 3, True)
    assert (m < 0).all()
    assert (log_sum == -math.inf).all()
    m, log_sum = fold([torch.full((4, 32), -14427.0)] * 3, True)
    assert (m + log_sum).tolist() == pytest.approx([-14427 + math.log2(48)] * 32, abs=2e-3)
