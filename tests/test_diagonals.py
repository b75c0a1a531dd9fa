"""The gradient of a table by distance on Hopper, as far as no GPU is needed: its assembly, its lists, its sum."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from anymask.backends.hopper.kernels import ptx
from tests.helpers import ptx as machine


def of_warps(ds: torch.Tensor) -> torch.Tensor:
    """fp64 `[128]`: what four warps make of `ds [64 keys, 64 queries]`, added up as the kernel does."""
    lane = torch.arange(32)
    row, quad = lane // 4, lane % 4
    sums = torch.zeros(128, dtype=torch.float64)
    for warp in range(4):
        keys = [16 * warp + row + 8 * (i // 2 % 2) for i in range(32)]
        queries = [8 * (i // 4) + 2 * quad + i % 2 for i in range(32)]
        elements = [ds[k, q] for k, q in zip(keys, queries, strict=True)]
        out = machine.run(ptx.diagonal_sums_asm(), 32, [*elements, *keys])
        for i in range(4):
            sums[8 * (4 * i + quad) + (row - 2 * quad) % 8] += out[i]
        assert not any(x.any() for x in out[4:])
    return sums


def test_assembly_sums_diagonals() -> None:
    ds = torch.randint(-8, 9, (64, 64)).double()
    apart = torch.arange(64)[:, None] - torch.arange(64) + 64
    want = torch.zeros(128, dtype=torch.float64).index_add_(0, apart.flatten(), ds.flatten())
    assert torch.equal(of_warps(ds), want)
