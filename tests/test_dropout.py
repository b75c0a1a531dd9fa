"""The generator of dropout in torch: what it may depend on, and how its bits are spread."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from anymask.scores.dropout import STEPS, keep, keep_scale, threshold


def axes(*shape: int) -> list[Tensor]:
    """Indices of samples, heads, queries and keys that broadcast to `shape`."""
    return [torch.arange(n).view([-1 if d == i else 1 for i in range(4)]) for d, n in enumerate(shape)]


def plane(seed: int = 1, offset: int = 0, p: float = 0.5, shape: tuple[int, ...] = (1, 1, 256, 256)) -> Tensor:
    return keep(torch.tensor([seed, offset]), *axes(*shape), p)


def philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Philox-4x32 in Python's own integers."""
    for _ in range(rounds):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            second >> 32 ^ counter[1] ^ key[0], second & 0xFFFFFFFF,
            first >> 32 ^ counter[3] ^ key[1], first & 0xFFFFFFFF,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_python_integers_give_the_published_answers() -> None:
    # known answers of Random123, of Philox-4x32 with 7 and 10 rounds
    assert philox([0] * 4, [0] * 2, 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert philox([0] * 4, [0] * 2, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 2**40 + 7, -1])
def test_bits_are_those_of_philox(seed: int) -> None:
    offset, p = 3 * 2**32 + 12, 0.37
    kept = keep(torch.tensor([seed, offset]), *axes(2, 3, 40, 70), p)
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for b, h, q, k in np.random.default_rng(0).integers([2, 3, 40, 70], size=(100, 4)).tolist():
        words = philox([q // 16 * 8 + q % 8, k // 16 * 4 + k % 8 // 2, b << 16 ^ h, 12], [low, high ^ 3], 7)
        bits = words[q // 8 % 2 * 2 + k // 8 % 2] >> 16 * (k % 2) & 0x7FFF
        assert bool(kept[b, h, q, k]) == (bits >= round(0.37 * 32768))


def test_a_pair_does_not_depend_on_what_is_computed_with_it() -> None:
    seed, (sample, head, query, key) = torch.tensor([5, 8]), axes(3, 5, 70, 90)
    whole = keep(seed, sample, head, query, key, 0.3)
    part = keep(seed, sample[1:], head[:, 2:4], query[:, :, 13:40], key[..., 31:33], 0.3)
    assert torch.equal(part, whole[1:, 2:4, 13:40, 31:33])


def test_each_number_matters() -> None:
    first = plane()
    others = [plane(seed=2), plane(offset=4), plane(seed=1 + 2**32), plane(offset=2**33)]
    both = keep(torch.tensor([1, 0]), *axes(2, 2, 256, 256), 0.5)
    others += [both[0, 1][None, None], both[1, 0][None, None], both[1, 1][None, None]]
    assert torch.equal(both[0, 0], first[0, 0])
    for a, b in [(x, y) for i, x in enumerate([first, *others]) for y in others[i:]]:
        # equal in half of the pairs, within 6 sigma
        assert abs(float((a == b).double().mean()) - 0.5) < 6 * 0.5 / 256


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_kept_pairs(p: float) -> None:
    kept = plane(p=p, shape=(4, 4, 256, 256)).double()
    wanted = 1 - threshold(p) / STEPS
    assert abs(wanted - (1 - p)) <= 0.5 / STEPS
    assert keep_scale(p) * wanted == pytest.approx(1, abs=1e-15)
    assert abs(float(kept.mean()) - wanted) < 6 * (p * (1 - p)) ** 0.5 / 1024
    # rows, columns and neighbours are independent
    x = kept.flatten(0, 1) - kept.mean()
    for d, step in ((1, 1), (2, 1), (1, 8), (2, 2), (2, 8), (2, 9), (2, 16)):
        product = (x.narrow(d, 0, 256 - step) * x.narrow(d, step, 256 - step)).mean()
        assert abs(float(product)) < 6 * p * (1 - p) / 1000


def test_edges_of_the_probability() -> None:
    assert threshold(0.0) == 0
    assert plane(p=1e-6).all()
    assert threshold(1 - 1e-9) == STEPS - 1
    assert keep_scale(1 - 1e-9) == STEPS
