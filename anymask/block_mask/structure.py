"""What a call's plan depends on of a mask: sizes and alignments, and nothing that is in its tensors."""

from __future__ import annotations

from typing import NamedTuple

from anymask.block_mask.tile_lists import TileLists


class Structure(NamedTuple):
    """Of two masks that have the same, a kernel is launched alike for both."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    # tiles of the mean row of tiles and of the mean column
    row_tiles: int
    col_tiles: int
    # elements of the maps of positions that have a pair: 0 if all have
    q_has_pair: int
    kv_has_pair: int
    # addresses of the tensors of both views, modulo 16
    residues: tuple[int, ...]


def structure_of(rows: TileLists, cols: TileLists, q_len: int, kv_len: int) -> Structure:
    """Of the mask of two views. Reads sizes only, and waits for nothing."""
    return Structure(
        rows.order.shape[0],
        rows.order.shape[1],
        q_len,
        kv_len,
        rows.mean_tiles,
        cols.mean_tiles,
        rows.has_pair.numel(),
        cols.has_pair.numel(),
        tuple(t.data_ptr() % 16 for t in (*rows.tensors(), *cols.tensors())),
    )
