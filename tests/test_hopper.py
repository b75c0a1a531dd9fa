"""Parts of the Hopper backend: which calls it takes, the order of work tiles, and on a GPU the two row maxima."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from anymask import causal, document, pack
from anymask.backends import hopper
from anymask.backends.hopper import order
from anymask.backends.hopper.kernels import scheduler
from anymask.backends.hopper.kernels.records import Worker, WorkTile
from anymask.testing import Case, check
from anymask.testing.cases import make_inputs

NUM_WORKERS = 132


@pytest.fixture
def python_numbers(monkeypatch):
    """The functions of the kernels on Python's integers."""
    monkeypatch.setattr(scheduler.gl, "minimum", min)
    monkeypatch.setattr(scheduler.gl, "where", lambda condition, a, b: a if condition else b)


def taken(tiles: int, heads: int, samples: int, swizzle_heads: int) -> list[list[WorkTile]]:
    """The work tiles of each worker, by rank, in the order in which it takes them."""
    n = tiles * heads * samples
    iterations = range(n // NUM_WORKERS + 1)
    indices = [[scheduler.work_index.fn(i, Worker(w, NUM_WORKERS)) for i in iterations] for w in range(NUM_WORKERS)]
    return [[scheduler.decode_work_tile.fn(i, tiles, heads, n, swizzle_heads) for i in own if i < n] for own in indices]


@pytest.mark.usefixtures("python_numbers")
@pytest.mark.parametrize("swizzle_heads", [1, 3, 8, 1000])
@pytest.mark.parametrize(("tiles", "heads", "samples"), [(1, 1, 1), (7, 3, 5), (64, 4, 2), (5, 40, 1)])
def test_every_work_tile_once(swizzle_heads, tiles, heads, samples):
    found = [tile for own in taken(tiles, heads, samples, swizzle_heads) for tile in own]
    assert sorted(found) == [(r, h, s) for r in range(tiles) for h in range(heads) for s in range(samples)]


@pytest.mark.usefixtures("python_numbers")
def test_samples_of_a_head_follow_each_other_if_they_share_a_bias():
    tiles, heads, samples = 5, 3, 4
    n = tiles * heads * samples
    decoded = [scheduler.decode_work_tile.fn(i, tiles, heads, n, samples) for i in range(n)]
    order = [scheduler.samples_together.fn(tile, heads, samples) for tile in decoded]
    assert len(set(order)) == tiles * heads * samples
    for first in range(0, len(order), samples):
        together = order[first : first + samples]
        assert len({(t.tile, t.head) for t in together}) == 1
        assert {t.sample for t in together} == set(range(samples))


WORK = {
    "causal": lambda rank, tiles: tiles - rank,
    "prefix-LM": lambda rank, tiles: max(tiles - rank, tiles // 4),
    "documents": lambda rank, tiles: 1 + (tiles - 1 - rank) // 8,
}


@pytest.mark.usefixtures("python_numbers")
@pytest.mark.parametrize("kind", WORK)
@pytest.mark.parametrize(
    ("tiles", "heads"), [(64, 32), (64, 16), (64, 8), (64, 40), (128, 16), (128, 32), (256, 4), (256, 16), (1024, 2)]
)
def test_work_is_even(kind, tiles, heads):
    swizzle_heads = order.swizzle_heads(tiles, tiles, heads, NUM_WORKERS)
    loads = [sum(WORK[kind](tile.tile, tiles) for tile in own) for own in taken(tiles, heads, 1, swizzle_heads)]
    assert max(loads) <= 1.06 * sum(loads) / NUM_WORKERS


SHORT_WORK = {"causal": lambda rank, tiles: tiles - rank, "window": lambda rank, tiles: min(5, tiles - rank)}


@pytest.mark.usefixtures("python_numbers")
@pytest.mark.parametrize("kind", SHORT_WORK)
@pytest.mark.parametrize(
    ("tiles", "heads"), [(2, 512), (4, 768), (8, 128), (8, 512), (11, 96), (12, 128), (16, 64), (16, 256), (17, 128)]
)
def test_short_lists_are_even_in_two_waves(kind, tiles, heads):
    work = [SHORT_WORK[kind](rank, tiles) for rank in range(tiles)]
    swizzle_heads = order.swizzle_heads(-(-sum(work) // tiles), tiles, heads, NUM_WORKERS)
    assert swizzle_heads * tiles <= 2 * NUM_WORKERS
    # a work tile takes as long as two tiles more
    loads = [sum(work[tile.tile] + 2 for tile in own) for own in taken(tiles, heads, 1, swizzle_heads)]
    # what one tile more than the others is to a worker
    most = -(-tiles * heads // NUM_WORKERS) * NUM_WORKERS / (tiles * heads)
    assert max(loads) <= (most + 0.08) * sum(loads) / NUM_WORKERS


@pytest.mark.parametrize(("tiles", "heads"), [(1, 1), (1, 7), (3, 1), (300, 2), (1000, 1)])
def test_few_or_long_heads_are_swizzled_too(tiles, heads):
    assert 1 <= order.swizzle_heads(3, tiles, heads, min(NUM_WORKERS, tiles * heads)) <= heads


@pytest.mark.parametrize(
    ("mask", "length", "short"),
    [
        (None, 128, False),
        (causal(), 128, True),
        # 6 tiles in 3 columns, 10 in 4
        (causal(), 384, True),
        (causal(), 385, False),
        (causal() & document(torch.arange(4096) // 384), 4096, True),
        (causal() & document(torch.arange(4096) // 512), 4096, False),
    ],
)
def test_which_columns_are_short(mask, length, short):
    block_mask = None if mask is None else pack(mask, q_len=length, kv_len=length)
    assert hopper._has_short_columns(block_mask, 2) is short
    assert not hopper._has_short_columns(block_mask, 0)


def test_without_a_mask_heads_follow_each_other():
    assert order.swizzle_heads(None, 64, 32, NUM_WORKERS) == 1


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
        ({"q": (2, 8, 64, 192)}, None),
        ({"q": (2, 8, 64, 256), "v_dim": 256}, None),
        ({"q": (2, 8, 64, 264), "v_dim": 256}, "head_dim is 264"),
        ({"q": (2, 8, 64, 32), "v_dim": 32}, "a larger one of 33 to 256"),
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


@pytest.mark.parametrize(
    ("dims", "padded"),
    [
        ((40, 64), (64, 64)),
        ((72, 8), (96, 128)),
        ((80, 80), (96, 128)),
        ((96, 128), (96, 128)),
        ((104, 72), (128, 128)),
        ((128, 128), (128, 128)),
        ((136, 128), (192, 128)),
        ((192, 128), (192, 128)),
        ((64, 136), (192, 192)),
        ((192, 192), (192, 192)),
        ((200, 64), (256, 256)),
    ],
)
def test_what_dims_are_padded_to(dims, padded):
    assert hopper._padded_dims(*dims) == padded
    if padded == (96, 128):
        # which has no row for scores beside the mask
        assert hopper._padded_dims(*dims, hopper.tuning.FORWARD_TERMS) == (128, 128)


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("scale", [None, -0.3, 3.0])
@pytest.mark.parametrize("mask", ["none", "random", "causal", "empty_rows", "causal_lower_right"])
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_both_row_maxima_give_the_same_bits(device, monkeypatch, dim, mask, scale):
    """The PTX of `update_row_max` and its plain twin: each right against fp64, and o and lse bit-equal."""
    config, results = hopper.tuning.FORWARD[dim], []
    case = Case(mask, 300, 900, dim, torch.float16, q_heads=4, scale=scale)
    q, k, v, given, *_ = make_inputs(case, device)
    # scores that grow from tile to tile, so that row maxima move again and again
    k = k * torch.linspace(0.1, 4, 900, device=device, dtype=k.dtype)[:, None]
    block_mask = None if given is None else pack(given, q_len=300, kv_len=900, device=device)
    for plain in (False, True):
        monkeypatch.setitem(hopper.tuning.FORWARD, dim, replace(config, PLAIN_SOFTMAX=plain))
        check(case, "hopper", device)
        results.append(hopper.forward(q, k, v, block_mask, dim**-0.5 if scale is None else scale))
    (o, lse), (plain_o, plain_lse) = results
    assert torch.equal(o, plain_o)
    assert torch.equal(lse, plain_lse)
    assert lse[lse > -float("inf")].isfinite().all()
