"""The gallery has an example of every builder, and its page is up to date."""

from pathlib import Path

import pytest
import torch

import anymask
from anymask import Mask, gallery, scores
from anymask.mask import builders

DOCS = Path(anymask.__file__).parent.parent / "docs"
PAGE = DOCS / "masks.md"


def test_every_builder_has_an_example() -> None:
    public = {name for name in anymask.__all__ if getattr(builders, name, None) is getattr(anymask, name)}
    assert set(gallery.EXAMPLES) == public - {"Mask"}


@pytest.mark.parametrize("name", gallery.EXAMPLES)
def test_examples_show_something(name: str) -> None:
    assert name in gallery.EXAMPLES[name]
    assert isinstance(gallery.example(name), Mask)
    packed = gallery.packed(name)
    empty, partial, full = packed.tile_counts
    assert partial + full
    assert empty + partial or name in ("from_dense",)
    assert 0 < packed.density() < 1
    assert torch.equal(packed.to_dense(), gallery.packed(name).to_dense())


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == gallery.page(), "run python -m anymask.gallery"


def test_every_bias_has_an_example() -> None:
    public = {name for name in anymask.__all__ if getattr(scores, name, None) is getattr(anymask, name)}
    assert set(gallery.BIASES) == public


@pytest.mark.parametrize("name", gallery.BIASES)
def test_examples_of_biases_differ_by_pair(name: str) -> None:
    bias, block_mask = gallery.bias_example(name)
    added = bias.to_dense(gallery.BIAS_LENGTH, gallery.BIAS_LENGTH, q_heads=gallery.BIAS_HEADS)
    assert added[0, 0].isfinite().all()
    assert added[0, 0].std(0).amin() > 0
    assert 0 < block_mask.density() < 1
    assert (DOCS / f"pictures/bias_{name.lower()}.png").stat().st_size > 1000


def test_the_page_of_scores_is_up_to_date() -> None:
    text = (DOCS / "scores.md").read_text()
    assert gallery.MARK in text
    assert text == gallery.scores_page(text)


def test_pictures_of_biases(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    gallery.draw_biases(tmp_path)
    assert len(list(tmp_path.glob("bias_*.png"))) == len(gallery.BIASES)
    _, block_mask = gallery.bias_example("alibi")
    with pytest.raises(ValueError, match=r"added is \(3, 64\); allowed is a tensor of the mask's lengths, \(64, 64\)"):
        anymask.viz.plot_bias(torch.zeros(3, 64), block_mask)
