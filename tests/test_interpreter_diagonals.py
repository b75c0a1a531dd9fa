"""The last sum of a table's gradient on Hopper, on CPU tensors, through Triton's interpreter.

Skipped unless TRITON_INTERPRET=1 is set before Triton is imported: test_interpreted.py runs this file so.
"""

from __future__ import annotations

import pytest
import torch

from anymask.backends.hopper import diagonals
from tests.helpers.diagonals import KV_LEN, Q_LEN, masks, runs_of
from tests.helpers.interpreter import MARKS
from tests.helpers.interpreter import interpreter as interpreter

pytestmark = MARKS


@pytest.mark.parametrize("name", masks())
def test_tiles_are_numbered_in_the_order_of_columns(name: str) -> None:
    mask = masks()[name]
    found, number, cols = diagonals.tile_numbers(mask), 0, mask.cols
    want = torch.full_like(found, -1)
    for column in range(want.shape[0]):
        for offsets, tiles in ((cols.partial_offsets, cols.partial_tiles), (cols.full_offsets, cols.full_tiles)):
            for tile in tiles[offsets[column] : offsets[column + 1]].tolist():
                want[column, tile] = number
                number += 1
    assert torch.equal(found, want)


@pytest.mark.parametrize("name", [None, *masks()])
def test_runs_add_up_to_a_table(name: str | None) -> None:
    mask = None if name is None else masks()[name]
    shown = torch.ones(1, 1, Q_LEN, KV_LEN, dtype=torch.bool) if mask is None else mask.to_dense()
    ds = torch.randint(-8, 9, (2, 3, Q_LEN, KV_LEN)).float() * shown
    got = diagonals.sum_runs(runs_of(ds, mask), ds[..., 0], KV_LEN, mask)
    entry = torch.arange(Q_LEN)[:, None] - torch.arange(KV_LEN) + KV_LEN - 1
    want = torch.zeros(3, Q_LEN + KV_LEN - 1)
    want.index_add_(1, entry.flatten(), ds.sum(0).flatten(1))
    assert torch.equal(got, want)
