"""What of the Hopper backend needs no GPU: which calls it takes, and the order in which its programs take items."""

import pytest
import torch

pytest.importorskip("triton")

from anymask import causal, document, pack
from anymask.backends import hopper
from anymask.backends.hopper import items

PLACES = 132


@pytest.fixture
def python_numbers(monkeypatch):
    """The functions of the kernels on Python's integers."""
    monkeypatch.setattr(items.gl, "minimum", min)
    monkeypatch.setattr(items.gl, "where", lambda condition, a, b: a if condition else b)


def taken(lines: int, heads: int, samples: int, section: int) -> list[list[tuple[int, int, int]]]:
    """(rank, head, sample) of the items of each program."""
    n_items = lines * heads * samples
    numbers = [[items.item_of.fn(r, (p, PLACES)) for r in range(n_items // PLACES + 1)] for p in range(PLACES)]
    return [[items.place_of.fn(i, lines, heads, n_items, section) for i in own if i < n_items] for own in numbers]


@pytest.mark.usefixtures("python_numbers")
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


@pytest.mark.usefixtures("python_numbers")
@pytest.mark.parametrize("kind", WORK)
@pytest.mark.parametrize(
    ("lines", "heads"), [(64, 32), (64, 16), (64, 8), (64, 40), (128, 16), (128, 32), (256, 4), (256, 16), (1024, 2)]
)
def test_work_is_even(kind, lines, heads):
    section = hopper._section(True, lines, heads, PLACES)
    loads = [sum(WORK[kind](rank, lines) for rank, _, _ in own) for own in taken(lines, heads, 1, section)]
    assert max(loads) <= 1.06 * sum(loads) / PLACES


@pytest.mark.parametrize(
    ("mask", "length", "short"),
    [
        (None, 128, False),
        (causal(), 128, True),
        # 6 tiles in 3 lines, 10 in 4
        (causal(), 384, True),
        (causal(), 385, False),
        (causal() & document(torch.arange(4096) // 384), 4096, True),
        (causal() & document(torch.arange(4096) // 512), 4096, False),
    ],
)
def test_which_lines_are_short(mask, length, short):
    block_mask = None if mask is None else pack(mask, q_len=length, kv_len=length)
    assert hopper._has_short_lines(block_mask) is short


def test_without_a_mask_heads_follow_each_other():
    assert hopper._section(False, 64, 32, PLACES) == 1


CONTIGUOUS = (2**16, 2**13, 128, 1)
FITS = {"dtype": torch.float16, "q": (2, 8, 64, 128), "v_dim": 128, "k_strides": CONTIGUOUS, "k_address": 0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.bfloat16, "q": (2, 8, 64, 40), "v_dim": 64}, None),
        ({"dtype": torch.float32}, "dtype is torch.float32"),
        ({"q": (2, 8, 64, 100)}, "head_dim is 100 and v_dim 128, the copy engine"),
        ({"v_dim": 36}, "head_dim is 128 and v_dim 36, the copy engine"),
        ({"q": (2, 8, 64, 256), "v_dim": 256}, "head_dim is 256"),
        ({"q": (2, 8, 64, 32), "v_dim": 32}, "a larger one of 33 to 128"),
        ({"q": (70000, 8, 64, 128)}, "70000 samples"),
        ({"k_strides": (2**16, 2**13, 130, 1)}, "k has strides"),
        ({"k_strides": (0, 2**13, 128, 1)}, "k has strides"),
        ({"k_address": 2}, "at an address 2 beyond"),
    ],
)
def test_takes_what_the_copy_engine_can_move(monkeypatch, change, reason):
    monkeypatch.setattr(hopper, "_unusable", lambda device: None)
    hopper._why_not.cache_clear()
    call = FITS | change
    layout = (CONTIGUOUS, 0), (call["k_strides"], call["k_address"]), (CONTIGUOUS, 0)
    found = hopper._why_not(torch.device("cuda", 0), call["dtype"], torch.Size(call["q"]), call["v_dim"], layout)
    assert found is None if reason is None else reason in found
    hopper._why_not.cache_clear()
