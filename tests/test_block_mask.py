"""A `BlockMask` on disk, in numbers and in the terminal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

import anymask
from anymask import BlockMask, causal, pack, viz
from anymask.testing import MASKS, assert_same_block_mask, make_qkv
from tests.helpers import grid


@pytest.mark.parametrize("name", MASKS)
def test_a_file_holds_the_mask(name: str, tmp_path: Path) -> None:
    packed = grid.packed(name)
    packed.save(tmp_path / "mask.safetensors")
    assert_same_block_mask(BlockMask.load(tmp_path / "mask.safetensors"), packed)
    assert [p.name for p in tmp_path.iterdir()] == ["mask.safetensors"]


def test_empty_lengths_on_disk(tmp_path: Path) -> None:
    for q_len, kv_len in ((0, 0), (0, 200), (200, 0)):
        packed = pack(causal(), q_len=q_len, kv_len=kv_len)
        packed.save(tmp_path / "mask")
        assert_same_block_mask(BlockMask.load(tmp_path / "mask"), packed)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mask.safetensors"
    grid.packed("causal").save(path)
    before = path.read_bytes()

    def full_disk(tensors: Any, part: Path, header: Any) -> None:
        part.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        grid.packed("random").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file(share: float, tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    grid.packed("documents").save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"mask\.safetensors is no whole safetensors file"):
        BlockMask.load(path)


def test_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"layer.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"holds tensors layer\.weight; allowed is anymask\.BlockMask"):
        BlockMask.load(path)
    save_file({"x": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="holds pt; allowed is anymask"):
        BlockMask.load(path)
    with pytest.raises(FileNotFoundError):
        BlockMask.load(tmp_path / "nothing")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    packed = pack(causal(), q_len=9, kv_len=9)
    with pytest.raises(IsADirectoryError, match=r"path is .* which is a folder; allowed is the name of a file"):
        packed.save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"path is .*mask, but there is no folder .*nowhere; make it first"):
        packed.save(tmp_path / "nowhere" / "mask")
    for path in (None, 3, b"mask"):
        with pytest.raises(TypeError, match=f"path is a {type(path).__name__}; allowed are a str and a Path"):
            packed.save(path)
        with pytest.raises(TypeError, match=f"path is a {type(path).__name__}; allowed"):
            BlockMask.load(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_folder_that_takes_no_file() -> None:
    with pytest.raises(
        OSError, match=r"path is /proc/mask, where this process may not write|/proc/mask cannot be written"
    ):
        pack(causal(), q_len=9, kv_len=9).save("/proc/mask")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is no regular file; allowed is a safetensors file"):
        BlockMask.load(tmp_path)
    torch.save(torch.ones(3), tmp_path / "mask.pt")
    with pytest.raises(ValueError, match=r"mask\.pt is no whole safetensors file"):
        BlockMask.load(tmp_path / "mask.pt")


@pytest.mark.parametrize("header", [{}, {"q_len": "300"}, {"q_len": "300", "kv_len": "many"}], ids=str)
def test_a_file_without_lengths(header: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    grid.packed("documents").save(path)
    save_file(load_file(path), path, {"format": "anymask.BlockMask 1", **header})
    with pytest.raises(ValueError, match=r"mask\.safetensors has q_len '\d*' and kv_len '\w*'; allowed are 0 and more"):
        BlockMask.load(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows.full_offsets", lambda t: t[:-1]),
        ("rows.full_offsets", lambda t: t + 1),
        ("cols.partial_offsets", lambda t: t.flip(0)),
        ("rows.partial_tiles", lambda t: t + 3),
        # one tile for two places; the tiles of a line the wrong way; another tile than by rows
        ("rows.full_tiles", lambda t: t.clamp(max=0)),
        ("cols.full_tiles", lambda t: t.flip(0)),
        ("cols.full_tiles", lambda t: t - (torch.arange(6) == 0).int()),
        ("cols.words", lambda t: t[:-1]),
        ("rows.words", lambda t: t.long()),
        ("rows.order", lambda t: t.clamp(max=1)),
        ("rows.order", lambda t: t[0]),
        ("cols.order", lambda t: t.repeat(2, 1, 1)),
        ("rows.has_pair", lambda t: torch.zeros(7, dtype=torch.uint8)),
    ],
)
def test_a_damaged_file(name: str, change: Any, tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    packed = pack(causal(), q_len=400, kv_len=400)
    packed.save(path)
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    header = {"format": "anymask.BlockMask 1", "q_len": str(packed.q_len), "kv_len": str(packed.kv_len)}
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + " contradicts the other tensors"):
        BlockMask.load(path)


def test_a_tile_is_full_or_partial() -> None:
    packed = pack(causal(), q_len=400, kv_len=400)
    assert packed.contradiction() is None
    # tile (1, 0) is full already
    rows = replace(packed.rows, partial_tiles=torch.tensor([0, 0, 2, 3]).int())
    cols = replace(packed.cols, partial_offsets=torch.tensor([0, 2, 2, 3, 4]).int())
    assert BlockMask.of_views(400, 400, rows, cols).contradiction() == "rows.partial_tiles"


def test_tensors_are_those_of_one_that_is_there() -> None:
    mask = pack((torch.rand(300, 300) < 0.5) & (torch.arange(300) < 290))
    lists, words, q_has_pair, kv_has_pair = mask.tensors()
    assert BlockMask.from_tensors([lists, words, q_has_pair.clone(), kv_has_pair], 300, 300) is mask
    for tensors, lengths in (
        ((lists, words.clone(), q_has_pair, kv_has_pair), (300, 300)),
        ((lists.clone(), words, q_has_pair, kv_has_pair), (300, 300)),
        ((lists, words, q_has_pair, kv_has_pair.clone()), (300, 300)),
        ((lists, words, q_has_pair, kv_has_pair), (300, 299)),
    ):
        other = BlockMask.from_tensors(list(tensors), *lengths)
        assert other is not mask
        assert all(a is b for a, b in zip(other.tensors(), tensors, strict=True))
    # which does not hide the first one
    del other
    assert BlockMask.from_tensors(mask.tensors(), 300, 300) is mask


def test_operators_take_few_tensors() -> None:
    dense = torch.rand(2, 1, 300, 300) < 0.5
    keys, queries = torch.arange(300) < 290, torch.arange(300)[:, None] < 290
    masks = {
        2: [pack(causal(), q_len=300, kv_len=300), pack(dense[0, 0]), BlockMask.full(300, 130)],
        3: [pack(dense), pack(dense.mT), pack(dense[0, 0] & queries), pack(dense & queries)],
        4: [pack(dense & keys), pack(dense & keys & queries), pack(dense[0, 0] & keys)],
    }
    for n, found in masks.items():
        for mask in found:
            first = mask.first_tensors()
            assert len(first) == n
            assert BlockMask.from_tensors(first, mask.q_len, mask.kv_len) is mask
            # of a mask that is gone
            new = BlockMask.from_tensors([t.clone() for t in first], mask.q_len, mask.kv_len)
            assert new is not mask
            assert_same_block_mask(new, mask)
            if n > 2:
                # which do not say all
                assert BlockMask.from_tensors(first[:2], mask.q_len, mask.kv_len) is not mask


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 300), (0, 128), (128, 256), (128, 300), (5, 6), (299, 300), (100, 290), (37, 165), (7, 7)]
)
@pytest.mark.parametrize("name", MASKS)
def test_queries_are_those_of_the_dense_mask(name: str, start: int, stop: int) -> None:
    packed = grid.packed(name)
    some = anymask.slice_queries(packed, start, stop)
    assert_same_block_mask(some, pack(packed.to_dense()[:, :, start:stop], q_len=stop - start, kv_len=260))


def test_decoding_step_by_step() -> None:
    q, k, v = make_qkv(1, 2, 2, 300, 300, 16)
    packed = pack(causal() & anymask.document(torch.arange(300) // 130), q_len=300, kv_len=300)
    whole = anymask.attention(q, k, v, packed)
    for start, stop in ((0, 200), (200, 299), (299, 300)):
        o = anymask.attention(q[:, :, start:stop], k, v, anymask.slice_queries(packed, start, stop))
        assert torch.allclose(o, whole[:, :, start:stop], atol=1e-6)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 301)])
def test_queries_beyond_the_mask(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"queries {start} to {stop} of a mask with q_len=300; allowed"):
        anymask.slice_queries(grid.packed("causal"), start, stop)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (1, 1), (127, 130), (128, 256), (200, 100), (300, 260)], ids=str)
@pytest.mark.parametrize("name", [n for n in MASKS if n not in ("none", "causal_lower_right", "composed_deep")])
def test_a_grown_mask_is_the_packed_one(name: str, q_len: int, kv_len: int) -> None:
    mask, dense = MASKS[name](2, 3, 300, 260)
    lazy = mask if isinstance(mask, anymask.Mask) else anymask.from_dense(dense)
    whole = pack(lazy, q_len=300, kv_len=260)
    small = pack(whole.to_dense()[:, :, :q_len, :kv_len])
    assert_same_block_mask(anymask.extend(small, lazy, 300, 260), whole)


def test_growth_evaluates_new_tiles_only() -> None:
    seen = []

    def fn(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        seen.append(torch.broadcast_tensors(q_idx // 128, kv_idx // 128))
        return (q_idx + kv_idx) % 3 == 0

    mask = anymask.from_function(fn, vectorised=True)
    small = pack(mask, q_len=384, kv_len=300)
    seen.clear()
    big = anymask.extend(small, mask, 384, 520)
    tiles = {(int(q), int(k)) for qs, ks in seen for q, k in zip(qs[:, 0, 0], ks[:, 0, 0], strict=True)}
    # the third column was cut at 300
    assert tiles == {(q, k) for q in range(3) for k in (2, 3, 4)}
    assert_same_block_mask(big, pack(mask, q_len=384, kv_len=520))


def test_what_cannot_grow() -> None:
    packed = pack(causal(), q_len=300, kv_len=300)
    with pytest.raises(ValueError, match="kv_len is 200 but the mask has 300 already; allowed are 300 and more"):
        anymask.extend(packed, causal(), 300, 200)
    with pytest.raises(ValueError, match=r"mask has \(2, 1\) planes but the packed one has \(1, 1\)"):
        anymask.extend(packed, anymask.key_padding(torch.tensor([3, 4])), 300, 400)
    with pytest.raises(ValueError, match="counts from the last query and key, which move; pack it again"):
        anymask.extend(packed, ~(causal() & anymask.causal_lower_right()), 300, 400)


def test_stats() -> None:
    stats = pack(causal(), q_len=512, kv_len=512).stats(head_dim=64)
    assert (stats.empty, stats.partial, stats.full) == (6, 4, 6)
    assert stats.density == (512 * 513 / 2) / 512**2
    assert stats.words_bytes == 2 * 4 * 2048
    assert stats.dense_bytes == 512 * 512
    assert stats.pair_flops == 4 * 64 * 512 * 513 // 2
    assert stats.tile_flops == 4 * 64 * 10 * 128 * 128
    assert stats.imbalance == 4 / 2.5
    assert stats.speedup == 1.6
    nothing = pack(causal() & ~causal(), q_len=200, kv_len=200).stats()
    assert (nothing.density, nothing.imbalance, nothing.speedup) == (0.0, 1.0, float("inf"))


def test_print_draws_the_tiles() -> None:
    lines = str(pack(causal(), q_len=384, kv_len=384)).split("\n")
    assert lines[0].startswith("BlockMask(q_len=384")
    assert lines[2:] == ["░ · ·", "█ ░ ·", "█ █ ░"]
    wide = str(pack(anymask.sliding_window(100), q_len=100_000, kv_len=100_000)).split("\n")
    assert "13 x 13 tiles to a character" in wide[1]
    assert max(map(len, wide)) <= 128
    assert len(wide) <= 66


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    viz.plot(pack(causal(), q_len=300, kv_len=200), tmp_path / "mask.png", title="causal")
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
