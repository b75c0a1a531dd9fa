"""The gallery has an example of every builder, and its page is up to date."""

from pathlib import Path

import pytest
import torch

import anymask
from anymask import Mask, gallery
from anymask.mask import builders

PAGE = Path(anymask.__file__).parent.parent / "docs" / "masks.md"


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
