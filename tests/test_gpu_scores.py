"""Scores on a GPU: every kind of bias, soft cap, sinks and dropout, by dtype and mask, against fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from anymask.backends import for_gradients, hopper
from anymask.backends import triton as backend
from anymask.backends.gpu import scores as gpu_scores
from anymask.backends.hopper import diagonals
from anymask.backends.hopper import scores as hopper_scores
from tests.helpers import scored
from tests.helpers.grid import BF16, F16, F32
from tests.helpers.scored import DENSE

pytestmark = pytest.mark.gpu
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"dense": (name,)} for name in DENSE},
    "hidden": {"dense": ("shared",), "hidden": 0.5},
    "relative": {"tables": ("relative",)},
    "relative_shared": {"tables": ("relative_shared",)},
    "window": {"tables": ("window",)},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.2},
    "everything": {
        "dense": ("by_sample", "keys_by_head", "queries"), "tables": ("relative_shared", "window"),
        "softcap": 3.0, "sinks": True, "dropout_p": 0.1, "hidden": 0.1,
    },
}  # fmt: skip
MASK_NAMES = ["none", "causal", "random", "empty_rows", "per_batch_head"]
SHAPE = 2, 4, 2, 300, 350


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("mask", MASK_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, mask: str, dtype: torch.dtype, device: str) -> None:
    call = scored.make_call(mask, shape=SHAPE, dims=(64, 64), dtype=dtype, device=device, **KINDS[kind])
    first, second = (scored.check(backend, call) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} has other bits in a second run"


@pytest.mark.parametrize("dims", [(32, 32), (72, 40), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("kind", ["by_head", "everything"])
def test_head_dims(kind: str, dims: tuple[int, int], device: str) -> None:
    scored.check(backend, scored.make_call("causal", shape=SHAPE, dims=dims, device=device, **KINDS[kind]))


# shapes of which others' threads say that they fail: batch, q_heads, kv_heads, q_len, kv_len
UNALIGNED = [
    ((133, 8, 8, 77, 77), F16, "full"),
    ((2, 4, 4, 43, 43), F16, "full"),
    ((2, 4, 4, 64, 43), F16, "by_head"),
    ((2, 4, 4, 350, 700), BF16, "full"),
    ((2, 4, 4, 350, 700), BF16, "by_sample"),
    ((1, 2, 2, 4095, 4095), BF16, "full"),
    ((1, 2, 1, 129, 4095), F16, "shared"),
    ((2, 3, 3, 257, 257), F16, "shared"),
    ((5, 3, 3, 200, 331), F16, "keys"),
    ((2, 4, 4, 200, 331), BF16, "heads"),
    ((2, 4, 4, 1, 331), F16, "full"),
    ((2, 4, 4, 331, 1), F16, "full"),
    ((1, 8, 8, 77, 77), F32, "full"),
    ((2, 4, 2, 43, 350), F32, "by_head"),
    ((16, 1, 1, 1024, 1024), F16, "shared"),
    ((2, 4, 4, 100, 77), F16, "one"),
    ((3, 2, 2, 350, 43), BF16, "queries"),
]


@pytest.mark.parametrize(("shape", "dtype", "kind"), UNALIGNED, ids=str)
def test_unaligned(shape: tuple[int, ...], dtype: torch.dtype, kind: str, device: str) -> None:
    scored.check(backend, scored.make_call("none", (kind,), shape=shape, dims=(80, 80), dtype=dtype, device=device))


def test_learnable_bias_of_many_heads(device: str) -> None:
    call = scored.make_call(
        "none", ("by_head",), shape=(1, 16, 16, 4096, 4096), dims=(80, 80), dtype=BF16, device=device
    )
    _, _, grads = scored.run(backend, call)
    # fp64 of all heads at once would not fit
    for head in (0, 15):
        one = slice(head, head + 1)
        part = scored.Call(
            *(t[:, one] for t in (call.q, call.k, call.v, call.do)), call.dlse[:, one], None, None, call.scale,
            scored.Scores((call.scores.dense[0][:, one],)),
        )  # fmt: skip
        want = scored.expected(part)[2].dense[0]
        got = grads.dense[0][:, one]
        assert float((got - want).norm()) <= 1.5e-2 * float(want.norm())


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 2, 1, 0), (2, 0, 3, 1)], ids=str)
@pytest.mark.parametrize("bias_dtype", [F16, BF16, F32], ids=str)
def test_strides_and_dtypes_of_a_bias(order: tuple[int, ...], bias_dtype: torch.dtype, device: str) -> None:
    call = scored.make_call("causal", ("full",), shape=SHAPE, dims=(64, 64), bias_dtype=bias_dtype, device=device)
    bias = call.scores.dense[0]
    laid = bias.permute(order).contiguous().permute([order.index(d) for d in range(4)])
    scored.check(backend, scored.without(call, dense=(laid,)))


def test_a_sliced_bias_that_lies_unaligned(device: str) -> None:
    call = scored.make_call("none", ("by_head",), shape=SHAPE, dims=(64, 64), device=device)
    bias = call.scores.dense[0]
    wide = torch.full((1, 4, 303, 355), math.nan, device=device, dtype=F16)
    wide[:, :, 2:302, 1:351] = bias
    scored.check(backend, scored.without(call, dense=(wide[:, :, 2:302, 1:351],)))


def test_nan_of_a_hidden_pair_reaches_nothing(device: str) -> None:
    for softcap in (0.0, 2.0):
        call = scored.make_call(
            "random", ("by_head", "shared"), shape=SHAPE, dims=(64, 64), device=device, softcap=softcap
        )
        assert call.dense_mask is not None
        unused = ~call.dense_mask.any(0, keepdim=True)
        first = call.scores.dense[0].masked_fill(unused, math.nan)
        second = call.scores.dense[1].clone()
        first[..., 5, 9], second[..., 5, 9] = math.nan, -math.inf
        scored.check(backend, scored.without(call, dense=(first, second)))


# as if all had been compared, which is what these tests do
ALL = frozenset({"bias of keys", "bias of queries", "bias of pairs", "table", "softcap", "dropout"})


def hopper_for(call: scored.Call) -> Any:
    """The Hopper kernels, with gradients from wherever `attention` takes them."""
    gradients = for_gradients(hopper, call.scores).backward_scores

    def why_not(*arguments: Any) -> str | None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper_scores, "COMPARED", ALL)
            return hopper.why_not(*arguments)

    return SimpleNamespace(why_not=why_not, forward=hopper.forward, backward_scores=gradients)


# of what the Hopper kernels take: rows of a bias of pairs are aligned, and there is one
HOPPER_KINDS: dict[str, dict[str, Any]] = {
    name: kind for name, kind in KINDS.items() if name not in ("window", "everything")
} | {
    "everything": {
        "dense": ("by_sample", "keys_by_head", "queries", "one"), "tables": ("relative_shared", "relative"),
        "softcap": 3.0, "sinks": True, "dropout_p": 0.1, "hidden": 0.1,
    },
    "uncapped": {"dense": ("full", "keys"), "tables": ("relative",), "dropout_p": 0.1, "hidden": 0.1},
    # most scores are beyond where a polynomial is tanh
    "low_cap": {"softcap": 0.1},
}  # fmt: skip


@pytest.mark.hopper
@pytest.mark.parametrize("mask", [*MASK_NAMES, "empty_head"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("kind", HOPPER_KINDS)
def test_kinds_of_the_hopper_kernels(kind: str, dims: tuple[int, int], mask: str, device: str) -> None:
    dtype = BF16 if mask == "random" else F16
    # a group's heads with keys that one of them alone attends to go to the portable kernels
    heads = (4, 4) if mask in ("per_batch_head", "empty_head") else (4, 2)
    call = scored.make_call(
        mask, shape=(2, *heads, 300, 352), dims=dims, dtype=dtype, device=device, **HOPPER_KINDS[kind]
    )
    first, second = (scored.check(hopper_for(call), call) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} has other bits in a second run"


# of what the backward kernel takes
GRADIENT_KINDS: dict[str, dict[str, Any]] = {
    name: kind for name, kind in HOPPER_KINDS.items() if name not in ("sinks", "dropout", "uncapped", "everything")
} | {
    "dropout": {"dropout_p": 0.2},
    "much_dropout": {"dropout_p": 0.9},
    "hidden_keys": {"dense": ("keys_by_head",), "hidden": 0.3},
    "hidden_queries": {"dense": ("queries",), "hidden": 0.3, "dropout_p": 0.1},
    "keys_and_queries": {"dense": ("keys", "queries"), "hidden": 0.1, "sinks": True},
    "capped_keys": {"dense": ("keys", "one"), "hidden": 0.1, "softcap": 2.0},
    "capped_queries": {"dense": ("queries", "heads"), "hidden": 0.1, "softcap": 2.0},
    "capped_dropout": {"softcap": 2.0, "dropout_p": 0.1},
    "capped_pairs": {"dense": ("by_head",), "hidden": 0.1, "softcap": 2.0},
    "pairs_and_keys": {"dense": ("by_sample", "keys"), "hidden": 0.1, "sinks": True},
    "dropped_pairs": {"dense": ("full",), "dropout_p": 0.1},
    "uncapped": {"dense": ("keys",), "tables": ("relative",), "dropout_p": 0.1, "hidden": 0.1, "sinks": True},
    "everything": {
        "dense": ("by_head", "keys_by_head", "queries", "one"), "tables": ("relative_shared", "relative"),
        "softcap": 3.0, "sinks": True, "dropout_p": 0.1, "hidden": 0.1,
    },
}  # fmt: skip


def hopper_alone(call: scored.Call, monkeypatch: pytest.MonkeyPatch, deterministic: bool = True) -> Any:
    """The Hopper kernels, forward and backward, as if all had been compared."""
    monkeypatch.setattr(hopper_scores, "COMPARED", ALL)
    monkeypatch.setattr(hopper_scores, "COMPARED_GRADIENTS", ALL)
    assert for_gradients(hopper, call.scores) is hopper

    def backward_scores(*arguments: Any) -> Any:
        return hopper.backward_scores(*arguments[:9], deterministic, *arguments[10:])

    return SimpleNamespace(why_not=hopper.why_not, forward=hopper.forward, backward_scores=backward_scores)


@pytest.mark.hopper
@pytest.mark.parametrize("mask", [*MASK_NAMES, "empty_head"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_gradients_of_the_hopper_kernels(
    kind: str, dims: tuple[int, int], mask: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dq as a sum in memory, and, deterministic, from a kernel of its own, or in turns without a mask and if causal."""
    if mask == "causal":
        monkeypatch.setattr(hopper.tuning, "SHORT_COLUMN_IN_TURN", 0)
    # a group's heads with keys that one of them alone attends to go to the portable kernels
    heads = (4, 4) if mask in ("per_batch_head", "empty_head") else (4, 2)
    call = scored.make_call(
        mask, shape=(2, *heads, 300, 352), dims=dims, dtype=BF16 if mask == "random" else F16,
        scale=-0.1 if mask == "empty_rows" else None, device=device, **GRADIENT_KINDS[kind],
    )  # fmt: skip
    for deterministic in (False, True):
        first, second = (scored.check(hopper_alone(call, monkeypatch, deterministic), call) for _ in range(2))
        for name in first:
            if name != "dq" or deterministic:
                assert torch.equal(first[name], second[name]), f"{name} has other bits in a second run"


@pytest.mark.hopper
def test_gradients_that_nobody_needs_are_not_made(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terms: dict[str, Any] = {"dense": ("keys", "queries"), "tables": ("relative",), "softcap": 2.0, "sinks": True}
    call = scored.make_call("causal", shape=(2, 4, 2, 300, 352), dims=(64, 64), device=device, **terms)
    kernels = hopper_alone(call, monkeypatch)
    o, lse = hopper.forward(call.q, call.k, call.v, call.mask, call.scale, call.scores)
    arguments = call.q, call.k, call.v, o, lse, call.do, call.dlse, call.mask, call.scale, True, call.scores
    none = call.needs._replace(dense=(False, False), tables=(False,), sinks=False)
    monkeypatch.setattr(gpu_scores.PairSums, "_sum", lambda *_: pytest.fail("it sums pairs"))
    grads = kernels.backward_scores(*arguments, none)
    assert (grads.dense, grads.tables, grads.sinks) == ((None, None), (None,), None)
    want = scored.expected(call)[2]
    for name in ("dq", "dk", "dv"):
        got, wanted = getattr(grads, name).double(), getattr(want, name)
        assert float((got - wanted).norm()) <= 2e-3 * float(wanted.norm()), name


@pytest.mark.hopper
@pytest.mark.parametrize("mask", ["none", "documents", "all_empty"])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_tables_get_their_gradients_on_the_way(
    dim: int, mask: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, where their memory would be too much, from the portable backend's kernel, as if there were no other way."""
    call = scored.make_call(
        mask, tables=("relative", "relative_shared"), shape=(1, 4, 2, 1000, 1300), dims=(dim, dim), device=device
    )
    kernels = hopper_alone(call, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_scores.PairSums, "_sum", lambda *_: pytest.fail("it makes ds again"))
        found = scored.check(kernels, call)
    monkeypatch.setattr(diagonals, "MAX_SUMS", 0)
    others = scored.check(kernels, call)
    for name in ("dq", "dk", "dv"):
        assert torch.equal(found[name], others[name]), name


@pytest.mark.hopper
@pytest.mark.parametrize("dims", [(80, 96), (40, 64)], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 8, 2, 9, 352), (3, 8, 1, 1, 704), (2, 2, 2, 129, 8), (1, 2, 1, 1000, 3000)], ids=str
)
@pytest.mark.parametrize("kind", ["keys", "relative", "by_head", "softcap", "dropout"])
def test_shapes_of_the_hopper_gradients(
    kind: str, shape: Any, dims: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = scored.make_call("none", shape=shape, dims=dims, device=device, **GRADIENT_KINDS[kind])
    scored.check(hopper_alone(call, monkeypatch), call)


@pytest.mark.hopper
def test_nan_of_a_hidden_pair_reaches_no_hopper_gradient(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = 2, 4, 4, 300, 352
    for softcap in (0.0, 2.0):
        call = scored.make_call(
            "empty_columns", ("keys_by_head",), shape=shape, dims=(64, 64), device=device, softcap=softcap
        )
        assert call.dense_mask is not None
        unused = ~call.dense_mask.any(2, keepdim=True).any(0, keepdim=True)
        assert unused.any()
        keys = call.scores.dense[0].masked_fill(unused, math.nan)
        scored.check(hopper_alone(call, monkeypatch), scored.without(call, dense=(keys,)))


@pytest.mark.hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", ["none", "causal", "random", "per_batch_head"])
def test_a_bias_of_pairs_is_read_before_the_next_comes(mask: str, dim: int, device: str) -> None:
    # more work tiles than multiprocessors
    call = scored.make_call(mask, ("by_head",), shape=(3, 24, 24, 300, 352), dims=(dim, dim), device=device)

    arguments = call.q, call.k, call.v, call.mask, call.scale, call.scores
    o, lse = first = hopper.forward(*arguments)
    none = call.needs._replace(dense=(False,))

    def gradients() -> list[Tensor]:
        found = hopper.backward_scores(
            call.q, call.k, call.v, o, lse, call.do, call.dlse, call.mask, call.scale, False, call.scores, none
        )
        # dq sums in any order
        return [found.dk, found.dv]

    first_gradients = gradients()
    # other work on the card changes who waits for whom
    beside, other = torch.cuda.Stream(), torch.randn(4096, 4096, device=device, dtype=F16)
    for i in range(200):
        if i % 3 == 0:
            with torch.cuda.stream(beside):
                other @ other
        assert all(map(torch.equal, hopper.forward(*arguments), first))
        assert all(map(torch.equal, gradients(), first_gradients))


@pytest.mark.hopper
@pytest.mark.parametrize(
    "shape", [(1, 8, 2, 9, 352), (3, 8, 1, 1, 704), (2, 2, 2, 129, 8), (1, 2, 1, 1000, 3000)], ids=str
)
@pytest.mark.parametrize("kind", ["keys", "relative", "by_head", "dropout"])
def test_shapes_of_the_hopper_kernels(kind: str, shape: Any, device: str) -> None:
    call = scored.make_call("none", shape=shape, dims=(80, 96), device=device, **HOPPER_KINDS[kind])
    scored.check(hopper_for(call), call)


LARGE = [
    (-1e4, F16),
    (-1e4, F32),
    (-1e9, F32),
    (float(torch.finfo(BF16).min), BF16),
    (float(torch.finfo(F32).min), F32),
]


@pytest.mark.hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("value", "bias_dtype"), LARGE, ids=str)
def test_large_biases_of_keys_on_hopper(value: float, bias_dtype: torch.dtype, dim: int, device: str) -> None:
    """Paddings by large numbers; of -1e4, which leaves bits of the scores, a sample has no other keys."""
    call = scored.make_call("causal", ("keys",), shape=(2, 4, 2, 300, 352), dims=(dim, dim), device=device)
    bias = call.scores.dense[0].to(bias_dtype)
    bias[0, ..., 100:] = value
    if value == -1e4:
        bias[1] = value
    scored.check(hopper_for(call), scored.without(call, dense=(bias,)), factor=2.0)


@pytest.mark.hopper
def test_a_bias_of_keys_as_columns_and_as_terms(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways hide the same pairs, NaN comes through, and the rest is as near as fp32 sums are."""
    call = scored.make_call("random", ("keys_by_head",), shape=(2, 4, 2, 300, 352), dims=(64, 64), device=device)
    bias = call.scores.dense[0].float().repeat(2, 1, 1, 1)
    bias[0, ..., ::3], bias[0, 1], bias[1, 2, ..., 7] = -math.inf, torch.finfo(F32).min, math.nan
    arguments = call.q, call.k, call.v, call.mask, call.scale, scored.without(call, dense=(bias,)).scores
    columns = hopper.forward(*arguments)
    monkeypatch.setattr(hopper_scores, "_takes_columns", lambda *_: False)
    terms = hopper.forward(*arguments)
    for x, y in zip(columns, terms, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x == -math.inf, y == -math.inf)
        assert x.isnan().any()
        x, y = (t.float().nan_to_num(neginf=0.0) for t in (x, y))
        torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)
    assert (columns[1][0, 1] == -math.inf).all()


@pytest.mark.hopper
def test_nan_of_a_hidden_pair_reaches_nothing_on_hopper(device: str) -> None:
    for softcap in (0.0, 2.0):
        call = scored.make_call(
            "random", ("by_head", "keys"), shape=(2, 4, 2, 300, 352), dims=(64, 64), device=device, softcap=softcap
        )
        assert call.dense_mask is not None
        unused = ~call.dense_mask.any(0, keepdim=True)
        pairs, keys = call.scores.dense[0].masked_fill(unused, math.nan), call.scores.dense[1]
        pairs[..., 5, 9], keys[..., 9] = math.nan, -math.inf
        scored.check(hopper_for(call), scored.without(call, dense=(pairs, keys)))


@pytest.mark.hopper
@pytest.mark.parametrize("mask", [*MASK_NAMES, "empty_head"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 4, 300, 350), (2, 8, 2, 9, 352), (1, 8, 1, 1, 700)], ids=str)
def test_sinks_of_the_hopper_kernels(shape: Any, dims: tuple[int, int], mask: str, device: str) -> None:
    batch, q_heads, kv_heads, *lengths = shape
    # a group's heads with keys that one of them alone attends to go to the portable kernels
    kv_heads = q_heads if mask in ("per_batch_head", "empty_head") else kv_heads
    shape = (batch, q_heads, kv_heads, *lengths)
    scored.check(hopper, scored.make_call(mask, shape=shape, dims=dims, device=device, sinks=True))


@pytest.mark.hopper
@pytest.mark.parametrize("sink", [-math.inf, -300.0, 300.0])
def test_extreme_sinks_of_the_hopper_kernels(sink: float, device: str) -> None:
    call = scored.make_call("empty_rows", shape=SHAPE, dims=(64, 64), device=device, sinks=True)
    assert call.scores.sinks is not None
    sinks = call.scores.sinks.index_fill(0, torch.tensor([1], device=device), sink)
    found, wanted = (scored.run(b, scored.without(call, sinks=sinks)) for b in (hopper, backend))
    for x, y in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(x.float(), y.float(), atol=2e-3, rtol=2e-3)
