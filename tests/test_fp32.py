"""fp32 of the portable kernels: which products they take, when torch's setting counts, and how exact they are.

Accuracy is judged on a GPU, and under Triton's interpreter (test_interpreted.py) with the six bf16 products written out
in torch: that shows that the split is enough for these equations, not that a tensor core adds as it should.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from anymask import attention
from anymask.backends import triton as backend
from anymask.backends.gpu import passes, target
from anymask.testing import Case, Results, assert_matches, eager, magnitudes, make_inputs, reference, run
from tests.helpers.compile_only import PASSES, assert_fits, causal_mask, compile_passes, spilled_bytes
from tests.helpers.magnitudes import VALUES

INTERPRETS = triton.knobs.runtime.interpret
compiles = [pytest.mark.compile, pytest.mark.skipif(INTERPRETS, reason="the interpreter compiles nothing")]


@pytest.fixture
def settings() -> Iterator[None]:
    """Leaves torch's settings of fp32 as a new process has them."""
    yield
    torch.set_float32_matmul_precision("highest")
    for owner in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        owner.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"


def _legacy(value: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(value)


def _set(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


SETTINGS = {
    "nothing": (lambda: None, False),
    "highest": (_legacy("highest"), False),
    "high": (_legacy("high"), True),
    "medium": (_legacy("medium"), True),
    "allow_tf32": (_set(torch.backends.cuda.matmul, "allow_tf32", True), True),
    "fp32_precision": (_set(torch.backends.cuda.matmul, "fp32_precision", "tf32"), True),
    "ieee": (_set(torch.backends.cuda.matmul, "fp32_precision", "ieee"), False),
    "of all": (_set(torch.backends, "fp32_precision", "tf32"), True),
    # of the CPU's products
    "mkldnn": (_set(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"), False),
}


@pytest.mark.filterwarnings("ignore:Please use the new API")
@pytest.mark.parametrize("name", SETTINGS)
def test_every_way_to_allow_tf32_is_seen(name: str, settings: None) -> None:
    change, allows = SETTINGS[name]
    change()
    assert backend._allow_tf32(torch.zeros(1)) is allows
    # other dtypes do not ask
    assert not backend._allow_tf32(torch.zeros(1, dtype=torch.float16))


@pytest.mark.skipif(INTERPRETS, reason="the interpreter has one way to multiply")
def test_each_pass_obeys_the_setting_at_its_own_time(settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def launch(kernel: Any, grid: Any, args: Any, constants: dict[str, Any], *rest: Any) -> None:
        launched.append(constants.get("PRECISION"))

    monkeypatch.setattr(target, "current_target", lambda: ("cuda", 90))
    for module in (backend, passes):
        monkeypatch.setattr(module, "launch_triton", launch)
    q = torch.zeros(1, 1, 128, 64)
    lse = torch.zeros(1, 1, 128)
    for precision in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(precision)
        backend.forward(q, q, q, None, 0.1)
    torch.set_float32_matmul_precision("medium")
    backend.backward(q, q, q, q, lse, q, None, None, 0.1, True)
    # the delta kernel has no products
    assert launched == ["bf16x6", "tf32", "bf16x6", None, "tf32", "tf32"]


# bytes a thread spills at most, with Triton 3.6 and 3.9
SPILLS = {("sm_90", 64): 48, ("sm_100", 64): 96, ("sm_89", 128): 288}


@pytest.mark.parametrize("target", [pytest.param(t, marks=compiles) for t in SPILLS], ids=str)
def test_fp32_runs_on_tensor_cores_in_bf16_parts(compiled: Any, target: tuple[str, int]) -> None:
    arch, dim = target
    kernels = compiled(arch)
    compile_passes(torch.float32, dim, causal_mask())
    assert_fits(kernels, arch, PASSES)
    for kernel in kernels:
        is_delta = kernel.metadata.name == "_bwd_delta_kernel"
        # of warps and warpgroups, or of Blackwell's tensor memory, which takes a descriptor of the types
        products = re.search(r"mma\S*\.f32\.bf16\.bf16|tcgen05\.mma\S*kind::f16", kernel.asm["ptx"])
        assert (products is None) is is_delta, kernel.metadata.name
        assert "tf32" not in kernel.asm["ptx"]
    spills = {k.metadata.name: spilled_bytes(k) for k in kernels}
    assert max(spills.values()) <= SPILLS[target], spills


@pytest.mark.parametrize(("arch", "dim"), [pytest.param("sm_89", 256, marks=compiles)])
def test_fp32_of_large_heads_runs_on_the_alus(compiled: Any, arch: str, dim: int) -> None:
    kernels = compiled(arch)
    compile_passes(torch.float32, dim, causal_mask())
    assert_fits(kernels, arch, PASSES)
    assert not any("mma" in kernel.asm["ptx"] for kernel in kernels)
    assert max(map(spilled_bytes, kernels)) <= 16


@pytest.mark.parametrize("dim", [pytest.param(d, marks=compiles) for d in (64, 256)])
def test_fp32_runs_on_amds_fp32_matrix_cores(compiled: Any, dim: int, settings: None) -> None:
    torch.set_float32_matmul_precision("high")
    kernels = compiled("gfx942")
    compile_passes(torch.float32, dim, causal_mask())
    assert_fits(kernels, "gfx942", PASSES)
    for kernel in kernels:
        is_delta = kernel.metadata.name == "_bwd_delta_kernel"
        text = kernel.asm["amdgcn"]
        assert ("v_mfma_f32" in text) is not is_delta
        assert "xf32" not in text
    assert max(map(spilled_bytes, kernels)) == 0


@pytest.mark.parametrize("arch", [pytest.param("sm_90", marks=compiles)])
def test_tf32_once_torch_allows_it(compiled: Any, arch: str, settings: None) -> None:
    torch.set_float32_matmul_precision("high")
    kernels = compiled(arch)
    compile_passes(torch.float32, 64, causal_mask())
    assert_fits(kernels, arch, PASSES)
    assert ["tf32" in kernel.asm["ptx"] for kernel in kernels] == [True, False, True, True]
    assert max(map(spilled_bytes, kernels)) == 0


def _split(x: Any) -> list[Tensor]:
    """The three bf16 parts of fp32 numbers, as fp32."""
    import numpy as np

    rest, parts = torch.from_numpy(np.ascontiguousarray(x)), []
    for _ in range(3):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    return parts


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where fp32 is a sum of six products of bf16 numbers: a GPU, or the interpreter told to do the same."""
    if request.param == "cuda":
        if INTERPRETS or not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    from triton.runtime import interpreter

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        assert a.dtype.scalar == b.dtype.scalar == interpreter.tl.float32
        a, b = _split(a.data), _split(b.data)
        small = sum(a[i] @ b[j] for i, j in ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1)))
        large = a[0] @ b[0]
        total = torch.where(small.isnan(), 0.0, small) + large + torch.from_numpy(d.data)
        return interpreter.TensorHandle(total.numpy(), interpreter.tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    return "cpu"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_magnitudes(name: str, dim: int, device: str) -> None:
    if device == "cpu" and dim != 16:
        pytest.skip("the interpreter takes as long for few dimensions, and shows the same")
    length, heads = (300, 2) if device == "cuda" else (100, 1)
    inputs = make_inputs(Case("random", length, length, dim, batch=1, q_heads=heads, kv_heads=heads), device)
    q, k, v, do = VALUES[name](*(t.detach() for t in (*inputs[:3], inputs.do)))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    inputs = inputs._replace(q=q, k=k, v=v, do=do, dlse=torch.zeros_like(inputs.dlse))
    args = q, k, v, inputs.dense, None, do, inputs.dlse
    oracle = reference(*args), eager(*args), magnitudes(*args)
    results = run(inputs, backend="triton")
    for what, got, expected, yardstick, magnitude in zip(Results._fields, results, *oracle, strict=True):
        assert_matches(got, expected, yardstick, torch.float32, what, length, magnitude)


def _own_key(value: float, device: str) -> Tensor:
    """o of queries that attend to one key each, whose values are all `value`: one product with p = 1."""
    q = torch.randn(1, 1, 40, 16, device=device)
    mask = torch.eye(40, dtype=torch.bool, device=device)
    return attention(q, q, torch.full_like(q, value), mask, backend="triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 1e-35, 1e-33, 3.39e38, -3.396e38])
def test_ends_of_the_range(value: float, device: str) -> None:
    """Finite, and off by no more than what lies below bf16's smallest number and one rounding."""
    error = (_own_key(value, device).double() - torch.tensor(value).double()).abs().max()
    assert float(error) <= 2.0**-134 + abs(value) * torch.finfo(torch.float32).eps


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [3.3962e38, -3.4e38, math.inf, -math.inf])
def test_beyond_bf16_is_infinite(value: float, device: str) -> None:
    o = _own_key(value, device)
    # 0 * inf of the keys that a query does not attend to is NaN, as documented; of no key is anything finite
    assert not o.isfinite().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3.4e38])
def test_an_infinite_value_reaches_its_dimension_alone(value: float, device: str) -> None:
    q, k, v = (torch.randn(1, 1, 40, 16, device=device) for _ in range(3))
    clean = attention(q, k, v, backend="triton")
    v[:, :, 7, 3] = value
    o = attention(q, k, v, backend="triton")
    rest = torch.arange(16, device=device) != 3
    assert torch.equal(o[..., rest], clean[..., rest])
    if math.isnan(value):
        assert o[..., 3].isnan().all()
    else:
        assert (o[..., 3] == math.copysign(math.inf, value)).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_score_of_minus_infinity_hides_its_key(device: str) -> None:
    q, k, v = (torch.randn(1, 1, 40, 16, device=device) for _ in range(3))
    q = q.abs()
    low = k.clone()
    low[:, :, 7, 0] = -math.inf
    mask = torch.ones(40, 40, dtype=torch.bool, device=device)
    mask[:, 7] = False
    expected = reference(q, k, v, mask, None, v).o
    o = attention(q, low, v, backend="triton")
    assert_matches(o, expected, eager(q, k, v, mask, None, v).o, torch.float32, "o")
