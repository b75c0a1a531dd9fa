"""Packing, exactly: every field against lists built pair by pair, and the memory it takes."""

import dataclasses
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from anymask import BlockMask, Mask, causal, causal_lower_right, from_dense, pack, sliding_window
from anymask.block_mask import TileLists
from anymask.block_mask.bits import unpack_bits
from anymask.mask.leaves import Band
from anymask.testing import MASKS, assert_same_block_mask
from anymask.tiles import TILE
from tests.helpers.memory import AllocationMode

# the function of the same name hides the module
pack_module = sys.modules["anymask.packing.definition"]

LENGTHS = [(1, 1), (63, 200), (128, 128), (129, 256), (300, 257), (256, 384)]
COLUMN = [8 * (b // 2) + 2 * c + (b % 2) for c in range(4) for b in range(32)]


def _by_hand(dense: Tensor) -> BlockMask:
    """The `BlockMask` of bool `[batch, heads, q_len, kv_len]`, by the words of block_mask.py and nothing else."""
    q_len, kv_len = dense.shape[2:]
    whole = torch.nn.functional.pad(dense, (0, -kv_len % TILE, 0, -q_len % TILE))
    tiles = whole.unflatten(3, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(3, 4)
    kinds = torch.zeros(tiles.shape[:4], dtype=torch.int64)
    for at in np.ndindex(*tiles.shape[:4]):
        tile = tiles[at][: q_len - at[2] * TILE]
        kinds[at] = 2 if tile.all() else int(tile.any())

    def lists(kinds: Tensor, tiles: Tensor, has_pair: Tensor) -> TileLists:
        found: dict[int, list[int]] = {1: [], 2: []}
        offsets: dict[int, list[int]] = {1: [0], 2: [0]}
        words = []
        for line in np.ndindex(*kinds.shape[:3]):
            for tile, kind in enumerate(kinds[line].tolist()):
                if kind:
                    found[kind].append(tile)
                if kind == 1:
                    bits = tiles[(*line, tile)].numpy()[:, COLUMN]
                    words.append(np.ascontiguousarray(np.packbits(bits, axis=-1, bitorder="little")).view("<i4"))
            for kind in (1, 2):
                offsets[kind].append(len(found[kind]))
        work = (kinds != 0).sum(-1)
        order = [sorted(range(len(w)), key=lambda x, w=w: (-w[x], x)) for w in work.flatten(0, 1).tolist()]

        def ints(values: Any, *shape: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).view(shape or -1)

        return TileLists(
            ints(offsets[2]),
            ints(found[2]),
            ints(offsets[1]),
            ints(found[1]),
            torch.from_numpy(np.stack(words)) if words else ints([], 0, TILE, 4),
            ints(order, *kinds.shape[:3]),
            torch.zeros(0, dtype=torch.uint8) if has_pair.all() else has_pair.flatten().to(torch.uint8),
        )

    rows = lists(kinds, tiles, dense.any(-1))
    cols = lists(kinds.transpose(2, 3), tiles.transpose(2, 3).transpose(4, 5), dense.any(-2))
    return BlockMask.of_views(q_len, kv_len, rows, cols)


def _packed(name: str, q_len: int, kv_len: int, batch: int = 2, heads: int = 2) -> tuple[BlockMask, Tensor]:
    mask, dense = MASKS[name](batch, heads, q_len, kv_len)
    return pack(mask if mask is not None else Band(None, None), q_len=q_len, kv_len=kv_len), dense


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_field(name: str, q_len: int, kv_len: int) -> None:
    packed, dense = _packed(name, q_len, kv_len)
    planes = packed.batch, packed.heads
    assert all(n in (1, 2) for n in planes)
    wide = dense.expand(2, 2, q_len, kv_len)
    assert torch.equal(packed.to_dense().expand_as(wide), wide)
    assert packed.to_dense().shape == (*planes, q_len, kv_len)
    # size-1 planes must be the same for everybody, so any of them will do
    assert_same_block_mask(packed, _by_hand(wide[: planes[0], : planes[1]]))


def test_worked_example_of_the_docstring() -> None:
    mask = pack(causal(), q_len=512, kv_len=512)
    assert mask.rows.full_offsets.tolist() == [0, 0, 1, 3, 6]
    assert mask.rows.full_tiles.tolist() == [0, 0, 1, 0, 1, 2]
    assert mask.rows.partial_offsets.tolist() == [0, 1, 2, 3, 4]
    assert mask.rows.partial_tiles.tolist() == [0, 1, 2, 3]
    assert mask.rows.order.tolist() == [[[3, 2, 1, 0]]]
    assert mask.cols.full_tiles.tolist() == [1, 2, 3, 2, 3, 3]
    assert mask.cols.order.tolist() == [[[0, 1, 2, 3]]]
    assert mask.tile_counts == (6, 4, 6)
    assert mask.rows.has_pair.numel() == mask.cols.has_pair.numel() == 0


def test_planes_are_stored_once() -> None:
    counts = {
        "causal_dense": (1, 1), "per_batch": (3, 1), "per_head": (1, 4), "per_batch_head": (3, 4),
        "expanded_heads": (3, 1), "expanded_batch": (1, 4), "row": (1, 1), "key_padding": (3, 1),
        "composed_or": (3, 1), "composed_deep": (1, 4), "causal_key_padding": (3, 1),
    }  # fmt: skip
    for name, planes in counts.items():
        packed, _ = _packed(name, 140, 150, 3, 4)
        assert (packed.batch, packed.heads) == planes, name


def test_stride_0_heads_are_not_copied() -> None:
    base = torch.rand(1, 1, 512, 512) < 0.5
    with AllocationMode() as one:
        pack(base)
    with AllocationMode() as many:
        packed = pack(base.expand(2, 64, 512, 512))
    assert (packed.batch, packed.heads) == (1, 1)
    assert many.total == one.total


def test_non_contiguous_and_broadcast_tensors() -> None:
    wide = torch.rand(400, 700) < 0.5
    for view in (wide[::2, ::3], wide.mT, wide[50:, 7:], wide[:1], wide[:, :1], wide.mT[3:200, ::2]):
        assert_same_block_mask(pack(view), pack(view.clone(memory_format=torch.contiguous_format)))
    row = pack(wide[:1], q_len=300, kv_len=700)
    assert torch.equal(row.to_dense()[0, 0], wide[:1].expand(300, 700))
    column = pack(wide[:300, :1], q_len=300, kv_len=200)
    assert torch.equal(column.to_dense()[0, 0], wide[:300, :1].expand(300, 200))
    scalar = pack(wide[:1, :1], q_len=130, kv_len=140)
    assert torch.equal(scalar.to_dense()[0, 0], wide[:1, :1].expand(130, 140))


@pytest.mark.parametrize("name", ["random", "composed_deep", "causal_key_padding", "causal"])
def test_chunks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = _packed(name, 900, 700)
    for chunk, group, strip in ((1, 3, 9), (5, 11, 13), (7, 7, 100)):
        monkeypatch.setattr(pack_module, "CHUNK_TILES", chunk)
        monkeypatch.setattr(pack_module, "GROUP_TILES", group)
        monkeypatch.setattr(pack_module, "STRIP_TILES", strip)
        assert_same_block_mask(_packed(name, 900, 700)[0], whole)


def test_a_dense_mask_and_its_lazy_twin_pack_the_same() -> None:
    for name in ("causal", "window", "window_both", "causal_lower_right", "composed_and", "composed_not"):
        packed, dense = _packed(name, 300, 520)
        assert_same_block_mask(packed, pack(dense, q_len=300, kv_len=520))
        # through the general path too, which evaluates tile by tile
        assert_same_block_mask(packed, pack(from_dense(dense) & Band(None, None), q_len=300, kv_len=520))


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (0, 5), (5, 0), (0, 300), (300, 0)])
@pytest.mark.parametrize("symbolic", [True, False])
def test_zero_lengths(q_len: int, kv_len: int, symbolic: bool) -> None:
    mask = causal() if symbolic else torch.ones(q_len, kv_len, dtype=torch.bool)
    packed = pack(mask, q_len=q_len, kv_len=kv_len)
    assert packed.tile_counts == (0, 0, 0)
    assert packed.to_dense().shape == (1, 1, q_len, kv_len)
    assert packed.density() == 0.0
    assert_same_block_mask(packed, _by_hand(torch.zeros(1, 1, q_len, kv_len, dtype=torch.bool)))
    assert "q_len=" in repr(packed)


def test_zero_planes() -> None:
    packed = pack(torch.ones(0, 3, 5, 6, dtype=torch.bool))
    assert (packed.batch, packed.heads) == (0, 3)
    assert packed.density() == 0.0


@pytest.mark.parametrize("name", MASKS)
def test_density_and_counts(name: str) -> None:
    for q_len, kv_len in ((300, 257), (256, 256)):
        packed, dense = _packed(name, q_len, kv_len)
        planes = dense.expand(2, 2, q_len, kv_len)[: packed.batch, : packed.heads]
        assert packed.density() == planes.double().mean().item()
        assert sum(packed.tile_counts) == packed.batch * packed.heads * -(-q_len // 128) * -(-kv_len // 128)


def test_nbytes_is_the_documented_sum() -> None:
    packed, _ = _packed("causal_key_padding", 300, 520)
    _, partial, full = packed.tile_counts
    planes, q_tiles, kv_tiles = 2, 3, 5
    words = 2 * partial * 128 * 4 * 4
    lists = 2 * 4 * (partial + full) + 4 * 2 * (planes * q_tiles + 1 + planes * kv_tiles + 1)
    order = 4 * planes * (q_tiles + kv_tiles)
    # left padding leaves queries without a key, and keys that no query sees
    has_pair = planes * (300 + 520)
    assert packed.nbytes == sum(t.nbytes for t in packed.tensors())
    assert packed.rows.nbytes + packed.cols.nbytes == words + lists + order + has_pair
    # nine parts of the lists end at multiples of 16 bytes
    assert 0 <= packed.nbytes - (words + lists + order + has_pair) <= 9 * 12
    dense = pack(torch.rand(1024, 1024) < 0.5)
    assert dense.nbytes <= 1024 * 1024 / 4 * 1.01


def test_repr() -> None:
    packed = pack(causal(), q_len=300, kv_len=200)
    assert repr(packed) == (
        "BlockMask(q_len=300, kv_len=200, planes=1x1, tiles: 1 empty, 3 partial, 2 full, 0.01 MiB, cpu)"
    )


def test_to() -> None:
    packed, _ = _packed("empty_rows", 300, 200)
    assert packed.to("cpu") is packed
    assert packed.to(torch.device("cpu")) is packed
    moved = packed.to("meta")
    assert moved.device.type == "meta"
    assert [t.shape for t in moved.tensors()] == [t.shape for t in packed.tensors()]
    assert (moved.q_len, moved.kv_len) == (300, 200)


def test_pytree_round_trip() -> None:
    packed, _ = _packed("empty_rows", 300, 200)
    leaves, spec = pytree.tree_flatten(packed)
    assert len(leaves) == 4
    assert all(isinstance(t, Tensor) for t in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, BlockMask)
    assert_same_block_mask(packed, again)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    doubled = pytree.tree_map(lambda t: t + t if t.dim() == 4 else t, packed)
    assert torch.equal(doubled.cols.words, packed.cols.words * 2)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(packed)[0]]
    assert paths == [".lists", ".words", ".q_has_pair", ".kv_has_pair"]


def test_tensors_round_trip_and_frozen() -> None:
    packed, _ = _packed("documents", 300, 300)
    assert_same_block_mask(packed, BlockMask.from_tensors(packed.tensors(), 300, 300))
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.q_len = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.rows.words = packed.cols.words  # type: ignore[misc]


@pytest.mark.parametrize(
    "mask", [causal(), sliding_window(1024), ~sliding_window(200, 200), causal_lower_right()], ids=str
)
def test_symbolic_masks_never_exist_densely(mask: Mask) -> None:
    totals = []
    for length in (16384, 65536):
        with AllocationMode() as memory:
            packed = pack(mask, q_len=length, kv_len=length)
        # the int64 distances of a chunk of tiles, whatever the length; one bit a pair would be length ** 2 / 8
        assert memory.largest <= pack_module.CHUNK_TILES * TILE * TILE * 8
        totals.append(memory.total)
        assert packed.nbytes < length**2 / 64
    # tiles grow 16 times, pairs near the edge of a band 4 times
    assert totals[1] / totals[0] < 8


def test_a_dense_tensor_is_read_in_bounded_chunks() -> None:
    tensor = torch.rand(4096, 4096) < 0.5
    with AllocationMode() as memory:
        pack(tensor)
    # a strip of CHUNK_TILES tiles as bytes, eight at a time as int64, is the largest temporary
    assert memory.largest <= pack_module.CHUNK_TILES * TILE * TILE


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "causal() has no length, pass q_len=..."),
        ({"q_len": 4}, "causal() has no length, pass kv_len=..."),
        ({"q_len": -1, "kv_len": 4}, "q_len is -1; allowed are 0 and more"),
        ({"q_len": 4, "kv_len": -3}, "kv_len is -3; allowed are 0 and more"),
        ({"q_len": 4, "kv_len": 2**31}, "kv_len is 2147483648; allowed are 0 and more tokens, up to 2147483520"),
    ],
)
def test_bad_lengths(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pack(causal(), **kwargs)


def test_lengths_that_a_tensor_cannot_have() -> None:
    tensor = torch.ones(10, 15, dtype=torch.bool)
    with pytest.raises(ValueError, match="dimension -1 is 15 but kv_len is 20; allowed are 1 and 20"):
        pack(tensor, kv_len=20)
    with pytest.raises(ValueError, match="dimension -2 is 10 but q_len is 9"):
        pack(tensor, q_len=9)
    with pytest.raises(TypeError, match="mask is a str"):
        pack("causal")  # type: ignore[arg-type]


def test_tile_row_numbers() -> None:
    packed, _ = _packed("per_batch_head", 300, 257)
    rows = packed.rows
    assert rows.tile_row_numbers(1).dtype == torch.int64
    for kind, tiles in ((1, rows.partial_tiles), (2, rows.full_tiles)):
        assert rows.tile_row_numbers(kind).shape == tiles.shape
    attended = torch.zeros(4 * 3, 3 * 128, dtype=torch.int64)
    dense = torch.nn.functional.pad(packed.to_dense(), (0, 127, 0, 84)).view(12, 128, 384).any(1)
    for line, tile, bits in zip(rows.tile_row_numbers(1), rows.partial_tiles, unpack_bits(rows.words), strict=True):
        attended[line, tile * 128 : (tile + 1) * 128] = bits.any(0).long()
    assert torch.equal(attended.bool(), dense)
