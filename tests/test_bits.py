"""The bit order, against NumPy's packbits after the column permutation that defines it."""

import numpy as np
import pytest
import torch

from anymask.block_mask.bits import pack_bits, transpose_bits, unpack_bits
from anymask.tiles import TILE, WORDS, tiles_over

# column of each (word, bit), straight from the sentence in bits.py
COLUMN = [8 * (b // 2) + 2 * c + (b % 2) for c in range(WORDS) for b in range(32)]


def _tiles(*lead: int, density: float = 0.5) -> torch.Tensor:
    return torch.rand(*lead, TILE, TILE) < density


def _numpy_words(tiles: torch.Tensor) -> torch.Tensor:
    octets = np.packbits(tiles.numpy()[..., COLUMN], axis=-1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(octets).view("<i4"))


def test_columns_are_a_permutation() -> None:
    assert sorted(COLUMN) == list(range(TILE))


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_pack_is_numpy_packbits(lead: tuple[int, ...], density: float) -> None:
    tiles = _tiles(*lead, density=density)
    words = pack_bits(tiles)
    assert words.dtype == torch.int32
    assert words.shape == (*lead, TILE, WORDS)
    assert torch.equal(words, _numpy_words(tiles))
    assert torch.equal(unpack_bits(words), tiles)


@pytest.mark.parametrize("column", range(TILE))
def test_one_column(column: int) -> None:
    tiles = torch.zeros(TILE, TILE, dtype=torch.bool)
    tiles[5, column] = True
    words = pack_bits(tiles)
    word, bit = divmod(COLUMN.index(column), 32)
    assert words.count_nonzero() == 1
    assert (int(words[5, word]) >> bit) & 1 == 1


def test_non_contiguous_tiles() -> None:
    wide = torch.rand(TILE, 3 * TILE) < 0.5
    tiles = wide.view(TILE, 3, TILE).transpose(0, 1)
    assert torch.equal(pack_bits(tiles), _numpy_words(tiles.contiguous()))
    assert torch.equal(pack_bits(tiles.mT), _numpy_words(tiles.mT.contiguous()))


def test_unpack_reads_any_strides() -> None:
    words = pack_bits(_tiles(4))
    assert torch.equal(unpack_bits(words[::2]), unpack_bits(words)[::2])
    assert torch.equal(unpack_bits(words[:, :7]), unpack_bits(words)[:, :7])
    assert torch.equal(unpack_bits(words.transpose(0, 1)), unpack_bits(words).transpose(0, 1))


def test_transpose() -> None:
    tiles = _tiles(3)
    assert torch.equal(transpose_bits(pack_bits(tiles)), _numpy_words(tiles.mT.contiguous()))
    assert torch.equal(transpose_bits(transpose_bits(pack_bits(tiles))), pack_bits(tiles))
    assert transpose_bits(pack_bits(tiles[:0])).shape == (0, TILE, WORDS)


def test_fragment_layout_of_a_quad() -> None:
    # thread t of a quad holds columns 8*n + 2*t and the next one, n = 0..15: those, in order, are the bits of word t
    for t in range(WORDS):
        held = [8 * n + 2 * t + i for n in range(16) for i in range(2)]
        assert COLUMN[32 * t : 32 * (t + 1)] == held


@pytest.mark.parametrize(("length", "tiles"), [(0, 0), (1, 1), (127, 1), (128, 1), (129, 2), (256, 2), (257, 3)])
def test_tiles_over(length: int, tiles: int) -> None:
    assert tiles_over(length) == tiles
