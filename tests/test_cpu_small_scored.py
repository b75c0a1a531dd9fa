"""Planes of one tile with a bias or dropout on the CPU: many at once, in blocks that do not show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import attention, relative_2d
from anymask.backends.cpu import scored, small
from anymask.testing import attend
from tests.helpers.score_cases import KINDS, assert_same, kept, leaf, make_bias, seed_of

# batch, q_heads, kv_heads, q_len, kv_len
SIZES = 5, 4, 2, 20, 30
PAIRS = SIZES[3:]
# planes of the mask, and the share of pairs that attend; rows without a key and keys without a query are among them
MASKS: dict[str, Callable[[], Tensor | None]] = {
    "no mask": lambda: None,
    "shared": lambda: torch.rand(PAIRS) < 0.4,
    "by sample": lambda: torch.rand(5, 1, *PAIRS) < 0.2,
    "by head": lambda: (torch.rand(1, 4, *PAIRS) < 0.3) & (torch.rand(20, 1) < 0.8),
    "by both": lambda: torch.rand(5, 4, *PAIRS) < 0.1,
}


@pytest.fixture(params=[1, 6000], ids="scores{}".format)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one kv head, and of some of the samples."""
    monkeypatch.setattr(small, "SCORES", request.param)


def _qkv() -> list[Tensor]:
    batch, heads, kv_heads, q_len, kv_len = SIZES
    return [leaf(batch, heads, q_len, 8), leaf(batch, kv_heads, kv_len, 8), leaf(batch, kv_heads, kv_len, 5)]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bias(kind: str, mask: str) -> None:
    dense_mask = MASKS[mask]()
    bias, dense, leaves = make_bias(kind, SIZES)
    leaves = [*_qkv(), *leaves]
    outputs = attention(*leaves[:3], dense_mask, bias=bias, return_lse=True, backend="cpu")
    wanted = attend(*leaves[:3], dense_mask, bias=dense())
    assert_same(outputs, wanted, kind)
    do = [torch.randn_like(t) for t in outputs]
    do[1] = torch.where(wanted[1] == -math.inf, 0, do[1])
    assert_same(*[torch.autograd.grad(t, leaves, do) for t in (outputs, wanted)], kind)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", [None, "full", "relative"])
def test_dropout(kind: str | None, mask: str) -> None:
    dense_mask = MASKS[mask]()
    bias, dense, leaves = (None, lambda: None, []) if kind is None else make_bias(kind, SIZES)
    leaves = [*_qkv(), *leaves]
    outputs, seed = seed_of(
        lambda: attention(*leaves[:3], dense_mask, bias=bias, dropout_p=0.3, return_lse=True, backend="cpu")
    )
    keep = kept(seed, (*SIZES[:2], *PAIRS), 0.3)
    wanted = attend(*leaves[:3], dense_mask, bias=dense(), keep=keep)
    assert_same(outputs, wanted, kind)
    do = [torch.randn_like(t) for t in outputs]
    do[1] = torch.where(wanted[1] == -math.inf, 0, do[1])
    assert_same(*[torch.autograd.grad(t, leaves, do) for t in (outputs, wanted)], kind)


def test_a_table_of_windows() -> None:
    table, (q, k, v) = leaf(63, 4), (leaf(3, n, 20, 8) for n in (4, 2, 2))
    place = torch.arange(20)
    entry = (place[:, None] // 5 - place // 5 + 3) * 9 + place[:, None] % 5 - place % 5 + 4
    outputs = attention(q, k, v, bias=relative_2d(table, 4, 5)), attend(q, k, v, bias=table.T[:, entry])[0]
    assert_same(*([o] for o in outputs), "o")
    do = torch.randn_like(outputs[0])
    assert_same(*(torch.autograd.grad(o, (q, k, v, table), do) for o in outputs), "gradients")


@pytest.mark.parametrize("fills_bias", [False, True], ids=["inputs", "bias too"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("shape", [(1, 4, *PAIRS), (5, 1, *PAIRS)], ids=["shared", "of samples"])
def test_pairs_that_do_not_attend_reach_nothing(shape: tuple[int, ...], value: float, fills_bias: bool) -> None:
    """Whatever q, k, v and do hold at positions without a pair, and the bias for pairs that do not attend."""
    mask, q, k, v = torch.rand(5, 1, *PAIRS) < 0.3, *(t.detach().float() for t in _qkv())
    mask[:, :, 3], mask[..., 7] = False, False
    bias, do = torch.randn(shape), torch.randn(5, 4, 20, 5)
    found = []
    for filled in (0.0, value):
        leaves = [t.clone() for t in (q, k, v, bias)]
        if fills_bias:
            leaves[3][(~mask).all(0).expand(shape) if shape[0] == 1 else ~mask] = filled
        for t, i in ((leaves[0], 3), (leaves[1], 7), (leaves[2], 7)):
            t[:, :, i] = filled
        do[:, :, 3] = filled
        for t in leaves:
            t.requires_grad_()
        o, lse = attention(*leaves[:3], mask, bias=leaves[3], return_lse=True, backend="cpu")
        found.append([o, lse, *torch.autograd.grad(o, leaves, do)])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_it_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(scored.Call, "of", fails)
    q = torch.randn(1, 2, 128, 8, requires_grad=True)
    attention(q, q, q, bias=torch.randn(128), dropout_p=0.1, backend="cpu").sum().backward()
    for given in ({"softcap": 2.0}, {"sinks": torch.randn(2)}):
        with pytest.raises(ZeroDivisionError):
            attention(q, q, q, backend="cpu", **given)
