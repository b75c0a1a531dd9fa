"""The gradient of a table by distance on Hopper, as far as no GPU is needed: assembly, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from anymask.backends.hopper import diagonals
from anymask.backends.hopper.kernels import ptx
from anymask.scores import Needs
from tests.helpers import ptx as machine
from tests.helpers.diagonals import ALL, masks, run_of


def of_warps(ds: Tensor) -> Tensor:
    """fp64 `[128]`: what four warps make of `ds [64 keys, 64 queries]`, added up as the kernel does."""
    lane = torch.arange(32)
    row, quad = lane // 4, lane % 4
    sums = torch.zeros(128, dtype=torch.float64)
    for warp in range(4):
        keys = [16 * warp + row + 8 * (i // 2 % 2) for i in range(32)]
        queries = [8 * (i // 4) + 2 * quad + i % 2 for i in range(32)]
        elements = [ds[k, q] for k, q in zip(keys, queries, strict=True)]
        out = machine.run(ptx.diagonal_sums_asm(), 32, [*elements, *keys])
        assert not any(x.any() for x in out[4:])
        for i in range(4):
            sums[8 * (4 * i + quad) + (row - 2 * quad) % 8] += out[i]
    return sums


def test_assembly_sums_diagonals() -> None:
    ds = torch.randint(-8, 9, (64, 64)).double()
    assert torch.equal(of_warps(ds), run_of(ds))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    lse = torch.zeros(2, 3, 300)
    runs = diagonals.empty_runs(ALL, lse, 400, None)
    assert runs is not None
    assert (runs.n_tiles, runs.sums.numel()) == (12, 6 * 12 * 512)
    assert diagonals.empty_runs(Needs((), (False,), False), lse, 400, None) is None
    # a plane for each head of both samples, which are as many runs as one for all
    for name in ("causal", "all"):
        mask = masks()[name]
        tiles = mask.cols.full_tiles.numel() + mask.cols.partial_tiles.numel()
        found = diagonals.empty_runs(ALL, lse, 400, mask)
        assert found is not None
        assert found.n_tiles == tiles
        assert found.sums.numel() == tiles * 512 * (1 if name == "all" else 6)
    monkeypatch.setattr(diagonals, "MAX_SUMS", 6 * 12 * 512 - 1)
    assert diagonals.empty_runs(ALL, lse, 400, None) is None
