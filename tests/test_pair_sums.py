"""Sums of ds over what shares a bias of pairs, by the kernel for Hopper: which calls, how they are cut, and fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from anymask import attention, backends
from anymask.backends import hopper
from anymask.backends import triton as portable
from anymask.backends.gpu import scores as gpu_scores
from anymask.backends.gpu.passes import BackwardCall, launch_delta
from anymask.backends.gpu.scores import KernelTerms, PairSums
from anymask.backends.hopper import pair_sums
from anymask.backends.hopper.pair_sums import HopperPairSums, choose_stages, cut_sums, why_not_sums
from anymask.testing import MASKS
from anymask.tiles import TILE
from tests.helpers import scored
from tests.helpers.grid import BF16, F16, F32

SHAPE = 2, 4, 2, 300, 352
SHARED_MEMORY = 232_448


def without_kernels(call: scored.Call) -> BackwardCall:
    rows = torch.zeros(math.prod(call.q.shape[:2]) * 384)
    return BackwardCall(call.q, call.k, call.v, call.do, rows, rows, None, None, call.mask, call.scale)


def bias_of(call: scored.Call) -> Tensor:
    return next(t for t in call.scores.dense if min(t.shape[2:]) > 1)


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ({"dense": ("by_head", "keys", "queries"), "tables": ("relative",), "softcap": 2.0, "dropout_p": 0.1}, None),
        ({"dense": ("shared",), "bias_dtype": F32, "dtype": BF16, "dims": (128, 72)}, None),
        ({"dense": ("shared",), "dims": (136, 64)}, "up to 128"),
        ({"dense": ("shared",), "dims": (64, 20)}, "multiples of 16 bytes"),
        ({"dense": ("shared",), "dtype": F32, "bias_dtype": F16}, "not of 16 bits"),
        ({"dense": ("shared", "full")}, "one bias of pairs"),
        ({"dense": ("shared",), "shape": (2, 4, 2, 300, 350)}, "one bias of pairs"),
        ({"dense": ("shared",), "tables": ("window",)}, "a table is read by place"),
    ],
)
def test_which_calls_it_takes(kinds: dict[str, Any], reason: str | None) -> None:
    call = scored.make_call("none", **{"shape": SHAPE, **kinds})
    found = why_not_sums(without_kernels(call), call.scores)
    assert found is None if reason is None else found is not None and reason in found


def test_a_gradient_that_is_a_number_for_all_is_not_read() -> None:
    """do of `o.sum()` has strides of 0, which the copy engine does not take."""
    call = scored.make_call("none", ("shared",), shape=SHAPE)
    expanded = torch.ones((), dtype=F16).expand(call.do.shape)
    assert "multiples of 16 bytes" in str(why_not_sums(without_kernels(call)._replace(do=expanded), call.scores))


@pytest.mark.parametrize("programs", [1, 7, 132])
@pytest.mark.parametrize("kind", ["full", "by_head", "by_sample", "shared"])
@pytest.mark.parametrize("shape", [(1, 1, 2, 8), (3, 8, 130, 1000), (512, 4, 512, 512), (2, 16, 8192, 8192)], ids=str)
def test_sums_are_cut_for_all_programs(shape: tuple[int, ...], kind: str, programs: int) -> None:
    batch, heads, q_len, kv_len = shape
    own = scored.DENSE[kind]
    bias = torch.empty((), dtype=F16).expand(batch if own[0] else 1, heads if own[1] else 1, q_len, kv_len)
    q = torch.empty(()).expand(batch, heads, q_len, 32)
    cut = cut_sums(q, bias, programs)
    assert (cut.out_samples * cut.samples, cut.out_heads * cut.heads) == (batch, heads)
    kv_tiles, q_tiles = -(-kv_len // TILE), -(-q_len // TILE)
    assert 1 <= cut.parts <= cut.samples * cut.heads
    assert 1 <= cut.strips <= kv_tiles
    assert cut.n_work_tiles == cut.parts * cut.strips * q_tiles * bias.shape[0] * bias.shape[1]
    blocks = q_tiles * kv_tiles * bias.shape[0] * bias.shape[1]
    # parts are for blocks that are too few, and take memory
    assert cut.parts == 1 or (blocks * cut.parts <= programs and cut.parts * bias.numel() <= gpu_scores.MAX_PAIRS)
    assert cut.n_work_tiles >= min(programs, blocks * cut.parts)


@pytest.mark.parametrize("sharers", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("bias_size", [2, 4])
@pytest.mark.parametrize("dims", [(16, 16), (32, 32), (64, 64), (128, 128), (64, 128)], ids=str)
@pytest.mark.parametrize("chunk", [64, 128])
def test_stages_fit_the_shared_memory(chunk: int, dims: tuple[int, int], bias_size: int, sharers: int) -> None:
    stages = choose_stages(*dims, bias_size, sharers, chunk)
    row = 2 * sum(dims)
    # with lse2 and delta
    size = stages.q * TILE * (row + 8) + stages.kv * chunk * row + stages.bias * TILE * TILE * bias_size
    # beside barriers
    assert size <= SHARED_MEMORY - 512
    # a step issues the products of all its chunks before it waits for one
    assert stages.kv * chunk >= TILE
    assert stages.resident == (sharers <= stages.q)


def test_portable_kernels_asked_for_by_name_stay_portable() -> None:
    triton, hopper_module = backends.load("triton"), backends.load("hopper")
    assert backends.pair_sums(triton, "triton") == {}
    assert backends.pair_sums(hopper_module, None) == {}
    assert backends.pair_sums(backends.load("cpu"), None) == {}
    for named in (None, "hopper"):
        assert backends.pair_sums(triton, named) == {"pair_sums": hopper.sums_over_pairs}


# by what else happens to scores, in the forward pass of the portable kernels
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"dense": (name,)} for name in ("full", "by_head", "by_sample", "shared")},
    "fp32": {"dense": ("shared",), "bias_dtype": F32},
    "hidden": {"dense": ("by_head",), "hidden": 0.4},
    "keys": {"dense": ("by_head", "keys_by_head")},
    "queries": {"dense": ("queries", "shared")},
    "distances": {"dense": ("shared",), "tables": ("relative",)},
    "softcap": {"dense": ("shared",), "softcap": 2.0},
    "dropout": {"dense": ("by_head",), "dropout_p": 0.2},
    "everything": {
        "dense": ("by_sample", "keys_by_head", "queries", "one"), "tables": ("relative_shared", "relative"),
        "softcap": 3.0, "sinks": True, "dropout_p": 0.1, "hidden": 0.1,
    },
}  # fmt: skip


def sums_of(call: scored.Call) -> HopperPairSums:
    """Sums over pairs after a forward pass of the portable kernels."""
    o, lse = portable.forward(call.q, call.k, call.v, call.mask, call.scale, call.scores)
    terms = KernelTerms(call.scores, call.scale, call.q.shape[2], call.k.shape[2], True)
    rows = launch_delta(o, call.do, lse, call.dlse)
    made = BackwardCall(
        call.q, call.k, call.v, call.do, *rows, None, None, call.mask, call.scale, terms, terms.qk_scale
    )
    assert why_not_sums(made, call.scores) is None
    options = portable._options("bias", *portable._what(made))
    found = hopper.sums_over_pairs(made, call.scores, options)
    assert isinstance(found, HopperPairSums)
    return found


def check(call: scored.Call) -> Tensor:
    """Assert that sums are those of fp64, of the portable kernel, and the same in a second run; return them."""
    bias, sums = bias_of(call), sums_of(call)
    got = sums.of_bias(bias)
    assert got.shape == bias.shape
    assert got.dtype in (bias.dtype, F32)
    assert torch.equal(got, sums.of_bias(bias)), "other bits in a second run"
    n = next(n for n, t in enumerate(call.scores.dense) if t is bias)
    want = scored.expected(call)[2].dense[n]
    assert want is not None
    assert got.isfinite().all()
    limit = scored.LIMITS[call.q.dtype]
    assert float((got - want).norm()) <= limit * float(want.norm())
    by_portable = PairSums.of_bias(sums, bias)
    assert float((got - by_portable).norm()) <= limit * float(want.norm())
    return got


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("mask", ["none", "causal", "random", "per_batch_head", "empty_rows"])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, dim: int, mask: str, device: str) -> None:
    dtype = BF16 if mask == "random" else F16
    check(scored.make_call(mask, shape=SHAPE, dims=(dim, dim), dtype=dtype, device=device, **KINDS[kind]))


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dims", [(16, 16), (40, 96), (96, 72), (128, 32)], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 9, 8), (5, 3, 1, 129, 704), (40, 2, 2, 200, 136), (2, 4, 4, 1000, 1304), (1, 8, 2, 2, 352)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["by_head", "shared"])
def test_shapes(kind: str, shape: Any, dims: tuple[int, int], device: str) -> None:
    check(scored.make_call("none", (kind,), shape=shape, dims=dims, device=device))


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize(("programs", "strips"), [(1, 1), (5, 1), (5, 15)])
@pytest.mark.parametrize("mask", ["none", "random"])
def test_few_programs_go_round(
    mask: str, programs: int, strips: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strips of several blocks, several strips a program, stages that are used many times."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: programs)
    monkeypatch.setattr(pair_sums, "STRIPS_EACH", strips)
    for dims, kind in (((128, 128), "by_head"), ((64, 64), "shared"), ((128, 128), "full")):
        check(scored.make_call(mask, (kind,), shape=(3, 4, 4, 700, 904), dims=dims, device=device))


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_stages_are_read_before_the_next_comes(dim: int, device: str) -> None:
    call = scored.make_call("random", ("by_head",), shape=(2, 4, 4, 700, 904), dims=(dim, dim), device=device)
    bias, sums = bias_of(call), sums_of(call)
    first = sums.of_bias(bias)
    # other work on the card changes who waits for whom
    beside, other = torch.cuda.Stream(), torch.randn(4096, 4096, device=device, dtype=F16)
    for i in range(200):
        if i % 3 == 0:
            with torch.cuda.stream(beside):
                other @ other
        assert torch.equal(sums.of_bias(bias), first)


@pytest.mark.gpu
@pytest.mark.hopper
def test_nan_of_a_hidden_pair_reaches_nothing(device: str) -> None:
    call = scored.make_call("empty_columns", ("by_head",), shape=(2, 4, 4, 300, 352), dims=(64, 64), device=device)
    assert call.dense_mask is not None
    shown = call.dense_mask
    bias = bias_of(call).masked_fill(~shown.any(0, keepdim=True), math.nan)
    unused = ~shown.any(2)[..., None]
    assert unused.any()
    want = check(call)
    hidden = scored.without(call, dense=(bias,))
    k, v = (t.masked_fill(unused, math.nan) for t in (call.k, call.v))
    sums = sums_of(call)
    # as if o and lse came of the call without them
    sums._call, sums._scores = sums._call._replace(k=k, v=v), hidden.scores
    assert torch.equal(sums.of_bias(bias), want)


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("backend", [None, "triton"])
def test_attention_takes_it(backend: Any, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 4, 300, 32, device=device, dtype=F16) for _ in range(3))
    bias = torch.randn(4, 300, 304, device=device, dtype=dtype)[..., :300].requires_grad_()
    do, mask = torch.randn_like(q), MASKS["causal"](2, 4, 300, 300)[0]

    def gradient(asked: Any) -> Tensor:
        o = attention(q, k, v, mask, bias=bias, backend=asked)
        return torch.autograd.grad(o, bias, do)[0]

    want = gradient("triton")
    assert want.dtype == dtype
    by_portable: list[int] = []
    run = PairSums._sum
    monkeypatch.setattr(PairSums, "_sum", lambda *args: by_portable.append(1) or run(*args))
    got = gradient(backend)
    assert bool(by_portable) == (backend == "triton")
    assert got.dtype == dtype
    assert float((got.float() - want.float()).norm()) <= 2e-3 * float(want.float().norm())
