"""Scores in the Triton kernels on CPU tensors, through Triton's interpreter, against fp64.

Skipped unless TRITON_INTERPRET=1 is set before Triton is imported: test_interpreted.py runs this file so.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from anymask.backends import triton as backend
from anymask.backends.gpu import scores as kernel_terms
from anymask.backends.gpu.kernels.dropout import keep_pairs
from anymask.backends.hopper.columns import COLUMNS, PARTS, key_columns
from anymask.scores import dropout
from tests.helpers import scored
from tests.helpers.grid import BF16, F32
from tests.helpers.interpreter import MARKS
from tests.helpers.interpreter import interpreter as interpreter

pytestmark = MARKS
SHAPE = 2, 2, 1, 20, 140
EVERYTHING: dict[str, Any] = {
    "dense": ("by_sample", "keys_by_head"), "tables": ("relative_shared",), "softcap": 3.0, "sinks": True,
    "dropout_p": 0.2, "hidden": 0.2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "full": {"dense": ("full",)},
    "by_head": {"dense": ("by_head",), "hidden": 0.5},
    "shared": {"dense": ("shared",)},
    "keys": {"dense": ("keys",)},
    "rows": {"dense": ("queries", "heads", "one")},
    "rows under a cap": {"dense": ("queries", "heads", "one"), "softcap": 1.0},
    "rows beside sinks": {"dense": ("queries",), "sinks": True},
    "relative": {"tables": ("relative",)},
    "window": {"tables": ("window_shared",)},
    "softcap": {"softcap": 1.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3},
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    scored.check(backend, scored.make_call(shape=SHAPE, **KINDS[kind]))


@pytest.mark.parametrize("mask", ["causal", "empty_rows", "per_batch_head"])
@pytest.mark.parametrize("kind", ["by_head", "relative", "everything"])
def test_masks(kind: str, mask: str) -> None:
    scored.check(backend, scored.make_call(mask, shape=SHAPE, **KINDS[kind]))


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize(
    "kind",
    [{"dense": ("full",)}, {"dense": ("shared", "by_head"), "hidden": 0.3}, {"tables": ("relative",), "softcap": 2.0}],
    ids=["full", "shared and by_head", "relative"],
)
def test_terms_that_the_copy_engine_reads(kind: dict[str, Any], mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # q, k and v come through pointers as ever here
    monkeypatch.setattr("anymask.backends.triton.has_tma", lambda target: True)
    read = []
    descriptor = kernel_terms._descriptor
    monkeypatch.setattr(kernel_terms, "_descriptor", lambda t, *block: read.append(t.shape) or descriptor(t, *block))
    call = scored.make_call(mask, shape=(2, 2, 1, 150, 144), **kind)
    scored.check(backend, call)
    # forward, dq, dk and dv, and the gradient of each term
    assert len(read) == 3 + len(call.scores.dense) + len(call.scores.lookups)


def test_a_term_that_the_copy_engine_cannot_read_goes_through_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anymask.backends.triton.has_tma", lambda target: True)
    monkeypatch.setattr(kernel_terms, "_descriptor", lambda *_: pytest.fail("it has rows of 286 bytes"))
    scored.check(backend, scored.make_call(shape=(1, 2, 1, 40, 143), dense=("full",)))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    scored.check(backend, scored.make_call("causal", shape=(1, 1, 1, 20, 70), dtype=dtype, **EVERYTHING))


@triton.jit
def _keep_kernel(seed, below, out, stride, Q: tl.constexpr, K: tl.constexpr, BY_KEY: tl.constexpr):
    q, k = tl.program_id(0) * Q, tl.program_id(1) * K
    sample, head = tl.program_id(2), 2 * tl.program_id(2)
    kept = keep_pairs(seed, below, sample, head, q, k, Q, K, BY_KEY).to(tl.int8)
    rows, columns = q + tl.arange(0, Q), k + tl.arange(0, K)
    offsets = (tl.program_id(2) * stride + rows[:, None]) * stride + columns[None, :]
    if BY_KEY:
        offsets = (tl.program_id(2) * stride + rows[None, :]) * stride + columns[:, None]
    tl.store(out + offsets, kept)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("block", [(16, 16), (16, 64), (64, 32), (128, 128)], ids=str)
def test_kernels_drop_the_pairs_that_torch_drops(block: tuple[int, int], by_key: bool) -> None:
    length, p, plane = 128, 0.3, torch.arange(2)[:, None, None]
    for seed in ([7, 0], [-(2**60) + 3, 2**33 + 4]):
        numbers, index = torch.tensor(seed), torch.arange(length)
        wanted = dropout.keep(numbers, plane, 2 * plane, index[:, None], index, p)
        out = torch.full((2, length, length), 2, dtype=torch.int8)
        grid = length // block[0], length // block[1], 2
        _keep_kernel[grid](numbers, float(dropout.threshold(p)), out, length, *block, by_key)
        assert torch.equal(out, wanted.to(torch.int8))


def test_nan_of_a_hidden_pair_reaches_nothing() -> None:
    for softcap in (0.0, 2.0):
        call = scored.make_call("empty_rows", ("by_head", "shared"), shape=SHAPE, softcap=softcap)
        assert call.dense_mask is not None
        first = call.scores.dense[0].masked_fill(~call.dense_mask.any(0, keepdim=True), math.nan)
        second = call.scores.dense[1].clone()
        first[..., 5, 9], second[..., 5, 9] = math.nan, -math.inf
        scored.check(backend, scored.without(call, dense=(first, second)))


def test_a_soft_cap_is_exact_in_fp32() -> None:
    call = scored.make_call(shape=(1, 1, 1, 20, 70), dtype=F32, softcap=50.0)
    scored.check(backend, call)


@pytest.mark.parametrize("dtype", [torch.float16, BF16, F32], ids=str)
def test_columns_of_a_bias_of_keys(dtype: torch.dtype) -> None:
    """Each row adds up to the bias over the scale, bit for bit; a larger one is the largest, or hides a pair."""
    bias = torch.randn(2, 3, 300).to(dtype)
    bias[..., 7], bias[..., 8], bias[1, 2, 9] = -math.inf, math.nan, -1e4
    strided = torch.full((3, 2, 700), math.nan, dtype=dtype)[..., :600:2].transpose(0, 1).copy_(bias)
    for given in (bias, strided, bias[:1, :, :1]):
        columns = key_columns(given, 300, 0.125)
        assert columns.shape == (*given.shape[:2], 300, COLUMNS)
        want = given.float().expand(-1, -1, 300) * 8
        assert torch.equal(columns.float().sum(3).nan_to_num(9.0, neginf=-9.0), want.nan_to_num(9.0, neginf=-9.0))
        assert not columns[..., PARTS:].any()
        # of -inf one part is -inf and none is NaN
        assert torch.equal(columns.isnan().any(3), want.isnan())
    large = torch.tensor([[[-1e38, 1e38, torch.finfo(F32).min, 2.0**26]]])
    most = 2.0**29
    assert key_columns(large, 4, 0.125).float().sum(3).tolist() == [[[-most, most, -math.inf, most]]]
