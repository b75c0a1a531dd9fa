"""Pictures say what the mask says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anymask import causal, from_dense, pack, viz

pytestmark = pytest.mark.filterwarnings("error")


def random_mask(batch: int, heads: int, q_len: int, kv_len: int) -> torch.Tensor:
    """Tiles of all three kinds."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(batch, heads, q_len, kv_len, generator=generator) < 0.3
    mask[..., :128, :128] = True
    mask[..., 128:256, 256:] = False
    return mask


def test_text_of_causal_is_a_triangle() -> None:
    assert viz.to_text(pack(causal(), q_len=512, kv_len=512)).splitlines() == [
        "░ · · ·",
        "█ ░ · ·",
        "█ █ ░ ·",
        "█ █ █ ░",
    ]


def test_text_of_a_large_mask_is_limited_and_says_full_only_if_all_is() -> None:
    packed = pack(causal(), q_len=1024, kv_len=1024)
    assert viz.scale(packed, width=4) == 2
    assert viz.to_text(packed, width=4).splitlines() == ["░ · · ·", "█ ░ · ·", "█ █ ░ ·", "█ █ █ ░"]
    assert viz.to_text(packed, width=1) == "░"


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (300, 300), (129, 640), (640, 100)])
def test_kinds_and_tokens_equal_the_dense_mask(q_len: int, kv_len: int) -> None:
    dense = random_mask(2, 3, q_len, kv_len)
    packed = pack(dense)
    for plane in ((0, 0), (1, 2), (0, 1)):
        kinds = packed.tile_kinds(plane)
        for i in range(kinds.shape[0]):
            for j in range(kinds.shape[1]):
                tile = dense[plane][i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
                # a short last column is never full: its bits beyond the keys are off
                full = bool(tile.all()) and tile.shape[1] == 128
                assert kinds[i, j] == (2 if full else 1 if tile.any() else 0), (plane, i, j)
        shares, density = viz.token_shares(packed, plane)
        assert torch.equal(shares, dense[plane].float())
        assert density == pytest.approx(dense[plane].double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("limit", [64, 8, 2])
def test_shares_of_a_large_mask_are_means_of_cells(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viz, "MAX_PIXELS", limit)
    dense = random_mask(1, 1, 700, 500)
    shares, density = viz.token_shares(pack(dense))
    assert max(shares.shape) <= limit
    cell = 1
    while limit * cell < 700:
        cell *= 2
    for i in range(shares.shape[0]):
        for j in range(shares.shape[1]):
            block = dense[0, 0, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
            assert shares[i, j].item() == pytest.approx(block.float().mean().item(), abs=1e-6)
    assert density == pytest.approx(dense.double().mean().item(), abs=1e-9)


def test_a_long_mask_is_drawn_without_its_dense_form() -> None:
    packed = pack(causal(), q_len=100_000, kv_len=100_000)
    shares, density = viz.token_shares(packed)
    assert max(shares.shape) <= viz.MAX_PIXELS
    assert density == pytest.approx(100_001 / 200_000, abs=1e-9)


def test_plot_counts_tiles_in_a_legend_outside_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    figure = viz.plot(pack(random_mask(1, 1, 300, 384)), path, title="a mask")
    assert path.read_bytes().startswith(b"\x89PNG")
    tokens, tiles = figure.axes
    assert tokens.get_legend() is None
    assert tiles.get_legend() is None
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    key = ["tokens: attends", "tokens: does not"]
    assert labels == [*key, "full: 1 tiles", "partial: 7 tiles", "empty: 1 tiles"]
    assert [list(axes.xaxis.get_minorticklocs()) for axes in (tokens, tiles)] == [[0, 128, 256]] * 2
    assert torch.equal(torch.tensor(tiles.images[0].get_array().data), pack(random_mask(1, 1, 300, 384)).tile_kinds())


def test_plot_leaves_no_global_state() -> None:
    code = "import anymask, sys; from anymask import viz; viz.plot(anymask.pack(anymask.causal(), q_len=9, kv_len=9))"
    code += "; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    packed = pack(causal(), q_len=9, kv_len=9)
    assert viz.to_text(packed) == "░"
    with pytest.raises(ImportError, match="pip install matplotlib"):
        viz.plot(packed)


def test_bad_input_is_named() -> None:
    packed = pack(from_dense(torch.ones(2, 1, 4, 4, dtype=torch.bool)), q_len=4, kv_len=4)
    for plane in ((2, 0), (0, 1), (-1, 0)):
        with pytest.raises(ValueError, match=r"plane is .* 2 x 1 planes"):
            viz.to_text(packed, plane)
    with pytest.raises(ValueError, match="width is 0"):
        viz.to_text(packed, width=0)
    nothing = pack(causal(), q_len=0, kv_len=4)
    assert viz.to_text(nothing) == ""
    with pytest.raises(ValueError, match="q_len=0"):
        viz.plot(nothing)


def test_wrong_types_are_named(tmp_path: Path) -> None:
    packed = pack(causal(), q_len=9, kv_len=9)
    for call in (viz.to_text, viz.scale, viz.plot, viz.token_shares):
        with pytest.raises(TypeError, match="block_mask is a Tensor; allowed is a BlockMask, which pack makes"):
            call(torch.ones(3, 3))
    for width in (None, 1.5, True):
        with pytest.raises(TypeError, match=r"width is .* allowed is an int"):
            viz.to_text(packed, width=width)
    with pytest.raises(TypeError, match="plane is 3; allowed are two ints"):
        viz.plot(packed, plane=3)
    with pytest.raises(TypeError, match="title is a int; allowed are None and a str"):
        viz.plot(packed, title=3)
    with pytest.raises(TypeError, match="path is a int; allowed are a str and a Path"):
        viz.plot(packed, 3)
    with pytest.raises(ValueError, match=r"mask\.docx has the suffix \.docx; allowed are none and \..*, \.png"):
        viz.plot(packed, tmp_path / "mask.docx")
    with pytest.raises(OSError, match="which is a folder"):
        viz.plot(packed, tmp_path)
    with pytest.raises(OSError, match="there is no folder"):
        viz.plot(packed, tmp_path / "nowhere" / "mask.png")
    assert not list(tmp_path.iterdir())


def test_a_path_is_the_file_that_is_written(tmp_path: Path) -> None:
    packed = pack(causal(), q_len=9, kv_len=9)
    for name, start in (("mask", b"\x89PNG"), ("mask.PNG", b"\x89PNG"), ("mask.svg", b"<?xml")):
        viz.plot(packed, tmp_path / name, title="costs $_{$")
        assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 3
