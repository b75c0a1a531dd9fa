"""fp32 by three products of fp16 parts: what the parts are, which calls take them, and which rows are done again.

Numbers are judged under Triton's interpreter (test_interpreted.py), whose sums of fp16 products are fp32, and on a GPU.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from anymask import BlockMask, calls, pack
from anymask.backends import triton as backend
from anymask.backends.gpu import passes, target
from anymask.backends.triton import halves
from anymask.testing import Case, Inputs, Results, assert_matches, eager, magnitudes, make_inputs, properties, reference
from tests.helpers.compile_only import assert_fits, causal_mask, compile_passes, spilled_bytes
from tests.helpers.magnitudes import VALUES

INTERPRETS = triton.knobs.runtime.interpret
compiles = [pytest.mark.compile, pytest.mark.skipif(INTERPRETS, reason="the interpreter compiles nothing")]
# NumPy warns where a GPU gives inf or nan
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
PARTS = ["_parts_kernel"]
FORWARD = [*PARTS * 3, "_halves_fwd_kernel", "_fwd_kernel"]
BACKWARD = ["_bwd_delta_kernel", *PARTS * 4, "_halves_dq_kernel"]
REDO = ["_bwd_dq_kernel", "_bwd_dkdv_kernel"]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where short calls take parts too."""
    monkeypatch.setattr(halves, "FEWEST", 1)
    if request.param == "cuda":
        if INTERPRETS or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("no GPU of compute capability 9.0")
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    return "cpu"


class Run:
    """A call by parts: its results, and the marks of rows left to the other kernel."""

    def __init__(self, inputs: Inputs, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.marks: list[Tensor] = []
        q, k, v, do = (calls.unit_last_stride(t.detach()) for t in (*inputs[:3], inputs.do))
        mask = None if inputs.mask is None else pack(inputs.dense, q_len=q.shape[2], kv_len=k.shape[2])
        with monkeypatch.context() as patch:
            for name in ("forward", "gradient"):
                patch.setattr(halves, name, self._noting(getattr(halves, name)))
            o, lse = backend.forward(q, k, v, mask, scale)
            grads = backend.backward(q, k, v, o, lse, do, inputs.dlse, mask, scale, True)
        self.results = Results(o, lse, *grads)
        assert len(self.marks) == 3

    def _noting(self, function: Any) -> Any:
        def noting(*args: Any) -> Tensor:
            self.marks.append(function(*args))
            return self.marks[-1]

        return noting

    @property
    def counts(self) -> list[int]:
        """Marks of forward, dq, and dk with dv."""
        return [int((marks != 0).sum()) for marks in self.marks]


def _check(
    inputs: Inputs, scale: float, run: Run, names: tuple[str, ...] = Results._fields, rows: slice = slice(None)
) -> None:
    q, k, v = (t.detach() for t in inputs[:3])
    args = q, k, v, inputs.dense, scale, inputs.do, inputs.dlse
    oracle = reference(*args), eager(*args), magnitudes(*args, stored_lse=True)
    for what, got, expected, yardstick, magnitude in zip(Results._fields, run.results, *oracle, strict=True):
        if what in names:
            at = (slice(None), slice(None), rows)
            of = got[at], expected[at], yardstick[at]
            assert_matches(*of, torch.float32, what, q.shape[2], magnitude[at])


def _inputs(case: Case, device: str, name: str = "normal") -> Inputs:
    inputs = make_inputs(case, device)
    q, k, v, do = VALUES[name](*(t.detach() for t in (*inputs[:3], inputs.do)))
    dlse = inputs.dlse if name == "normal" else torch.zeros_like(inputs.dlse)
    return inputs._replace(q=q, k=k, v=v, do=do, dlse=dlse)


def _case(mask: str, device: str, dim: int = 16, **others: Any) -> Case:
    lengths = (300, 300) if device == "cuda" else (70, 140)
    return Case(mask, *lengths, dim, **({"batch": 1, "q_heads": 2, "kv_heads": 1} | others))


@pytest.mark.parametrize("mask", ["none", "random", "tiles", "causal", "empty_rows", "empty_columns", "per_batch"])
@pytest.mark.parametrize("dim", [16, 64, 100])
def test_masks_and_head_dims(mask: str, dim: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu" and dim != 16 and mask != "random":
        pytest.skip("the interpreter takes as long for other masks, and shows the same")
    # of masks for each head no two share keys
    kv_heads = 2 if mask in ("tiles", "empty_columns") else 1
    case = _case(mask, device, dim, v_dim=24 if dim == 16 else None, kv_heads=kv_heads)
    inputs = _inputs(case, device)
    run = Run(inputs, 0.25, monkeypatch)
    _check(inputs, 0.25, run)
    # blocks of queries without a key, of keys without a query, are at most a few
    assert sum(run.counts[:2]) == 0
    assert run.counts[2] <= run.marks[2].numel() * (mask in ("tiles", "empty_columns")) // 2


@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
@pytest.mark.parametrize("mask", ["none", "random"])
def test_scales(mask: str, scale: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(_case(mask, device, q_heads=1), device)
    _check(inputs, scale, Run(inputs, scale, monkeypatch))


# those that parts hold, as far as marks can tell, and those at the edge
HELD = ("normal", "values cancel", "scores cancel", "scores large")
MAY_BE_HELD = ("all small",)
# what the interpreter has time for
FEW = (*HELD, "v large", "do small", "each dimension its own")


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_wild_data_is_done_again(name: str, dim: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu" and (dim != 16 or name not in FEW):
        pytest.skip("the interpreter has no time for all")
    inputs = _inputs(_case("random", device, dim), device, name)
    run = Run(inputs, dim**-0.5, monkeypatch)
    _check(inputs, dim**-0.5, run)
    assert name in MAY_BE_HELD or (sum(run.counts) == 0) == (name in HELD), run.counts


def test_small_weights_of_large_values(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that takes all of the weight and has no value leaves o to weights that parts do not hold."""
    inputs = _inputs(_case("none", device), device)
    inputs.q[..., 0], inputs.k[..., 0], inputs.k[..., 0, 0] = 8.0, 0.0, 20.0
    inputs.v[..., 0, :] = 0.0
    run = Run(inputs, 0.25, monkeypatch)
    # gradients have the rounding of an lse of 40 in them, whatever the products
    _check(inputs, 0.25, run, ("o", "lse"))
    assert run.counts[0] > 0


def test_documents_whose_gradients_differ(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one tile of queries; dk and dv of the smaller ones, whose keys have blocks of their own, lose nothing."""
    inputs = _inputs(_case("none", device, kv_heads=2), device)
    later = torch.arange(inputs.q.shape[2], device=device) >= 35
    dense = (later[:, None] == (torch.arange(inputs.k.shape[2], device=device) >= 64)).expand_as(inputs.dense)
    inputs.do[:, :, 35:] *= 1e-8
    inputs = inputs._replace(mask=dense, dense=dense, dlse=torch.zeros_like(inputs.dlse))
    run = Run(inputs, 0.25, monkeypatch)
    _check(inputs, 0.25, run)
    assert run.counts[2] > 0
    _check(inputs, 0.25, run, ("dk", "dv"), slice(64, None))


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_garbage_where_nothing_attends(value: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(_case("per_head", device, kv_heads=2), device)
    dense = inputs.dense.clone()
    dense[..., 40:50] = False
    dense[..., 7, :] = False
    clean = inputs._replace(dense=dense)
    expected = Run(clean, 0.25, monkeypatch)
    q, k, v, do, dlse = (t.clone() for t in (*clean[:3], clean.do, clean.dlse))
    k[:, :, 40:50] = v[:, :, 40:50] = value
    q[:, :, 7] = do[:, :, 7] = dlse[:, :, 7] = value
    run = Run(clean._replace(q=q, k=k, v=v, do=do, dlse=dlse), 0.25, monkeypatch)
    _check(clean, 0.25, run)
    assert sum(expected.counts) == sum(run.counts) == 0
    for x, y in zip(expected.results, run.results, strict=True):
        assert torch.equal(x, y)


def test_a_sample_does_not_depend_on_its_batch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(_case("per_batch", device, batch=2), device)
    inputs.k[1, :, 5] *= 1e9
    together = Run(inputs, 0.25, monkeypatch)
    first = Inputs(*(t[:1] if isinstance(t, Tensor) else t for t in inputs))
    alone = Run(first, 0.25, monkeypatch)
    assert sum(alone.counts) == 0
    assert min(together.counts) > 0
    for x, y in zip(together.results, alone.results, strict=True):
        assert torch.equal(x[:1], y)


PROPERTIES: dict[str, Callable[[Case, Any, str], None]] = {
    "scores grow": properties.check_growing_scores,
    "hidden scores are high": lambda case, backend, device: properties.check_high_hidden_scores(
        case, backend, device, by_size=device != "cpu"
    ),
    "scores begin with 0": properties.check_a_first_tile_of_zero_scores,
    "scores are far from 0": lambda *args: properties.check_far_from_zero(*args, -1000.0),
    "unused keys reach nothing": lambda *args: properties.check_unused_keys_reach_nothing(*args, math.inf),
    "unused queries reach nothing": lambda *args: properties.check_unused_queries_reach_nothing(*args, math.nan),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(name: str, device: str) -> None:
    mask = {"keys": "empty_columns", "queries": "empty_rows"}.get(name.split()[1], "random")
    PROPERTIES[name](_case(mask, device, kv_heads=2), "triton", device)


@pytest.mark.parametrize("layout", ["blhd", "expanded"])
def test_layouts(layout: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(_case("random", device, 20, kv_heads=2, layout=layout), device)
    _check(inputs, 0.25, Run(inputs, 0.25, monkeypatch))


def _tile(device: str) -> Tensor:
    return torch.randn(1, 2, 200, 20, device=device)


def test_parts_are_exact(device: str) -> None:
    x = _tile(device) * torch.logspace(-2, 2, 20, device=device)
    x[:, :, 5] *= 1e-2
    x[:, 1, 128:] = 0.0
    parts, numbers = halves.make_parts(x)
    numbers = numbers.view(1, 2, 2, 3)
    scale = numbers[..., 0].repeat_interleave(128, -1)[..., :200, None].double()
    hi, lo = parts.double().unflatten(1, (2, 2)).unbind(2)
    error = (scale * (hi + lo) - x.double()).abs()
    assert hi.abs().max() < 2.0**15
    for tile, head in ((slice(0, 128), 0), (slice(128, 200), 0), (slice(0, 128), 1)):
        of, found = x[0, head, tile].abs().double(), error[0, head, tile]
        assert (found <= 2.0**-23 * of.amax(0)).all()
        assert (found <= 2.0**-23 * of.amax(1, keepdim=True)).all()
    norms = torch.stack([t.norm(dim=-1).amax(-1) for t in (x[..., :128, :], x[..., 128:, :])], -1)
    torch.testing.assert_close(numbers[..., 1], norms)
    assert numbers[0, 1, 1].tolist() == [0.0, 0.0, 0.0]
    assert (numbers[..., 2] == 0).all()


@pytest.mark.parametrize("at", [0, 199])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**50, "row", "column", "tile"])
def test_tiles_without_parts(value: Any, at: int, device: str) -> None:
    x = _tile(device)
    head = x[0, 1]
    if value == "row":
        head[at] *= 1e-6
    elif value == "column":
        head[at // 128 * 128 :][:128, 3] *= 1e-6
    elif value == "tile":
        head[at // 128 * 128 :][:128] *= 1e-16
    else:
        head[at, 3] = value
    numbers = halves.make_parts(x, like_rows=True).numbers.view(2, 2, 3)
    wild = torch.zeros(2, 2, dtype=torch.bool)
    wild[1, at // 128] = True
    assert torch.equal(numbers[..., 0].isnan().cpu(), wild)
    assert numbers[..., 1].isfinite().all()
    if value == "row":
        assert not halves.make_parts(x).numbers.view(2, 2, 3)[..., 0].isnan().any()


def test_the_largest_delta_of_a_tile(device: str) -> None:
    x, delta = _tile(device), torch.zeros(2 * 256, device=device)
    delta[256 + 130] = -7.0
    numbers = halves.make_parts(x, delta).numbers.view(2, 2, 3)
    assert numbers[..., 2].tolist() == [[0.0, 0.0], [0.0, 7.0]]


def _launched(
    monkeypatch: pytest.MonkeyPatch,
    current: tuple[str, Any],
    length: int,
    dims: tuple[int, int] = (64, 64),
    mask: BlockMask | None = None,
) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(target, "current_target", lambda: current)
    for module in (backend, passes, halves):
        monkeypatch.setattr(module, "launch_triton", lambda kernel, *rest: names.append(kernel.__name__))
    k, v = (torch.zeros(1, 1, length, dim) for dim in dims)
    q, o = (t.repeat(1, 2, 1, 1) for t in (k, v))
    backend.forward(q, k, v, mask, 0.1)
    backend.backward(q, k, v, o, torch.zeros(1, 2, length), o, None, mask, 0.1, True)
    return names


@pytest.mark.skipif(INTERPRETS, reason="the interpreter stands for every target")
def test_which_calls_take_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    without = ["_fwd_kernel", "_bwd_delta_kernel", *REDO]
    hopper, fewest = ("cuda", 90), halves.FEWEST
    assert _launched(monkeypatch, hopper, fewest) == [*FORWARD, *BACKWARD, "_halves_dkdv_kernel", *REDO]
    assert _launched(monkeypatch, hopper, fewest, (64, 128))[-4:] == ["_halves_dkdv_kernel"] * 2 + REDO
    assert _launched(monkeypatch, hopper, fewest - 1) == without
    # heads of a group with masks of their own
    at = torch.arange(fewest)
    assert _launched(monkeypatch, hopper, fewest, mask=pack(torch.stack([at >= 3, at >= 5])[None, :, None])) == without
    for dims in ((129, 64), (64, 256)):
        assert _launched(monkeypatch, hopper, fewest, dims) == without
    for other in (("cuda", 80), ("cuda", 100), ("hip", "gfx942")):
        assert _launched(monkeypatch, other, fewest) == without
    monkeypatch.setattr(backend, "_allow_tf32", lambda q: True)
    assert _launched(monkeypatch, hopper, fewest) == without


@pytest.mark.parametrize("dim", [pytest.param(d, marks=compiles) for d in (16, 64, 128)])
def test_parts_run_on_tensor_cores(compiled: Any, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "FEWEST", 1)
    kernels = compiled("sm_90")
    compile_passes(torch.float32, dim, causal_mask())
    of_keys = ["_halves_dkdv_kernel"] * (1 if dim <= 64 else 2)
    assert_fits(kernels, "sm_90", [*FORWARD, *BACKWARD, *of_keys, *REDO])
    for kernel in kernels:
        if "halves" in kernel.metadata.name:
            assert re.search(r"wgmma\S*\.f32\.f16\.f16", kernel.asm["ptx"])
            assert "cp.async.bulk.tensor" in kernel.asm["ptx"]
            assert spilled_bytes(kernel) <= (32 if dim == 128 else 0), kernel.metadata.name
