"""The order in which programs of the Hopper kernels take items: each once, and as much work for one as for another."""

import pytest

pytest.importorskip("triton")

from anymask.backends import hopper
from anymask.backends.hopper import items

PLACES = 132


@pytest.fixture(autouse=True)
def python_numbers(monkeypatch):
    """The functions of the kernels on Python's integers."""
    monkeypatch.setattr(items.gl, "minimum", min)
    monkeypatch.setattr(items.gl, "where", lambda condition, a, b: a if condition else b)


def taken(lines: int, heads: int, samples: int, section: int) -> list[list[tuple[int, int, int]]]:
    """(rank, head, sample) of the items of each program."""
    n_items = lines * heads * samples
    numbers = [[items.item_of.fn(r, (p, PLACES)) for r in range(n_items // PLACES + 1)] for p in range(PLACES)]
    return [[items.place_of.fn(i, lines, heads, n_items, section) for i in own if i < n_items] for own in numbers]


@pytest.mark.parametrize("section", [1, 3, 8, 1000])
@pytest.mark.parametrize(("lines", "heads", "samples"), [(1, 1, 1), (7, 3, 5), (64, 4, 2), (5, 40, 1)])
def test_every_line_once(lines, heads, samples, section):
    found = [place for own in taken(lines, heads, samples, section) for place in own]
    assert sorted(found) == [(r, h, s) for r in range(lines) for h in range(heads) for s in range(samples)]


WORK = {
    "causal": lambda rank, lines: lines - rank,
    "prefix-LM": lambda rank, lines: max(lines - rank, lines // 4),
    "documents": lambda rank, lines: 1 + (lines - 1 - rank) // 8,
}


@pytest.mark.parametrize("kind", WORK)
@pytest.mark.parametrize(
    ("lines", "heads"), [(64, 32), (64, 16), (64, 8), (64, 40), (128, 16), (128, 32), (256, 4), (256, 16), (1024, 2)]
)
def test_work_is_even(kind, lines, heads):
    section = hopper._section(True, lines, heads, PLACES)
    loads = [sum(WORK[kind](rank, lines) for rank, _, _ in own) for own in taken(lines, heads, 1, section)]
    assert max(loads) <= 1.1 * sum(loads) / PLACES


def test_without_a_mask_heads_follow_each_other():
    assert hopper._section(False, 64, 32, PLACES) == 1
