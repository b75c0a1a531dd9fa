"""Every global state of torch that could reach a call: each gives the numbers of the plain call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import anymask
from anymask import attention, causal, document, from_dense, from_function, key_padding, pack
from anymask.testing import make_qkv

# torch warns of TF32 on other machines, and of anomaly detection's cost
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Q, K, V = make_qkv(2, 2, 1, 150, 150, 8, requires_grad=True)
DENSE = torch.rand(2, 1, 150, 150) < 0.5
IDS = torch.arange(150) // 40
LENGTHS = torch.tensor([150, 90])
BIAS = torch.randint(0, 2, (150, 150))

# what: a mask, built inside the state
MASKS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "tensor": DENSE.clone,
    "view": lambda: DENSE[:1],
    "causal": causal,
    "with tensors": lambda: causal() & from_dense(DENSE),
    "document": lambda: document(IDS) | key_padding(LENGTHS),
    "neighbourhood": lambda: anymask.neighbourhood_2d((15, 10), 3),
    "function": lambda: from_function(lambda b, h, q, k: (q + k) % 3 != torch.arange(3, device=q.device)[0]),
    "random blocks": lambda: anymask.block_sparse(torch.eye(10).bool(), 15),
    "packed": lambda: pack(DENSE),
}


class Watching(TorchDispatchMode):
    """A dispatch mode that changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    """A function mode that changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def _setting(set_: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    set_(value)
    try:
        yield
    finally:
        set_(before)


def _default_dtype(dtype: torch.dtype) -> Any:
    return _setting(torch.set_default_dtype, dtype, torch.get_default_dtype())


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@contextmanager
def _in_numpy() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy(), torch.from_numpy):
        yield


# name: a context. Those of `FORWARD` record no gradients.
STATES: dict[str, Callable[[], Any]] = {
    "default device meta": lambda: torch.device("meta"),
    "default dtype fp64": lambda: _default_dtype(torch.float64),
    "default dtype fp16": lambda: _default_dtype(torch.float16),
    "deterministic": _deterministic,
    "matmul medium": lambda: _setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "matmul high": lambda: _setting(torch.set_float32_matmul_precision, "high", "highest"),
    "no mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "flush denormal": lambda: _setting(torch.set_flush_denormal, True, False),
    "two threads": lambda: _setting(torch.set_num_threads, 2, torch.get_num_threads()),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "saved in numpy": _in_numpy,
    "dispatch mode": Watching,
    "function mode": Function,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
}
FORWARD = ("no grad", "inference")


def _run(mask: Any, recorded: bool) -> list[Tensor]:
    o, lse = attention(Q, K, V, mask, return_lse=True)
    if not recorded:
        return [o, lse]
    loss = o.sin().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()
    return [o, lse, *torch.autograd.grad(loss, [Q, K, V])]


@cache
def _plain(mask: str) -> list[Tensor]:
    return _run(MASKS[mask](), True)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("mask", MASKS)
def test_a_state_changes_no_number(mask: str, state: str) -> None:
    if (mask, state) in UNLIKE:
        pytest.skip(UNLIKE[mask, state])
    recorded = state not in FORWARD
    expected = _plain(mask)
    anymask.forget()
    with STATES[state]():
        built = MASKS[mask]()
        inside = _run(built, recorded)
    # what the state left in memory serves a plain call
    for results in (inside, _run(built, True)):
        for a, b in zip(results, expected, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


UNLIKE = {
    ("neighbourhood", "default device meta"): "it is asked to live on meta",
    ("random blocks", "default device meta"): "it is asked to live on meta",
    ("function", "default device meta"): "it reads a tensor of its own",
}


@pytest.mark.parametrize("state", STATES)
def test_the_stand_ins_too(state: str) -> None:
    q, k, v = (t.detach() for t in (Q, K, V))
    expected = attention(q, k, v, BIAS != 0)
    with STATES[state]():
        custom = anymask.flash_attention_custom_mask(q, k, v, BIAS)
        ours = anymask.scaled_dot_product_attention(q, k, v, BIAS != 0, enable_gqa=True)
    torch.testing.assert_close(custom, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


class Products(TorchFunctionMode):
    """Writes down the precision under which each product of matrices runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("matmul", "__matmul__", "__rmatmul__"):
            self.seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


class TestPrecision:
    @pytest.fixture(autouse=True)
    def _restore(self) -> Iterator[None]:
        yield
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = "none"

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_products_are_exact_and_the_setting_stays(self, precision: str, backend: str) -> None:
        torch.set_float32_matmul_precision(precision)
        before = torch.backends.mkldnn.matmul.fp32_precision
        with Products() as products:
            o = attention(Q, K, V, DENSE, backend=backend)
            torch.autograd.grad(o.sum(), [Q, K, V])
        assert products.seen == {"ieee"}
        assert torch.backends.mkldnn.matmul.fp32_precision == before
        assert torch.get_float32_matmul_precision() == precision

    def test_the_setting_comes_back_after_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.set_float32_matmul_precision("medium")

        def fails(*_: Any) -> Any:
            raise ZeroDivisionError

        monkeypatch.setattr(anymask.backends.cpu.Call, "of", fails)
        with pytest.raises(ZeroDivisionError):
            attention(Q, K, V)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"

    def test_a_setting_of_all_libraries_is_still_followed(self) -> None:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "bf16"
        attention(Q, K, V)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        torch.backends.fp32_precision = "tf32"
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"

    def test_threads_share_the_setting(self) -> None:
        torch.set_float32_matmul_precision("medium")
        inside, leave = threading.Event(), threading.Event()
        setting = anymask.precision._settings["cpu"]

        def hold() -> None:
            with setting:
                inside.set()
                leave.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait(10)
        with setting:
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        leave.set()
        thread.join()
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_default_cuda_device_without_a_gpu_is_not_asked() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    expected = attention(Q, K, V, DENSE)
    with torch.device("cuda"):
        assert torch.equal(attention(Q, K, V, DENSE), expected)
        assert torch.equal(attention(Q, K, V, pack(DENSE)), expected)
        attention(Q, K, V, causal()).sum().backward()


def test_a_mask_packed_in_inference_mode_trains() -> None:
    with torch.inference_mode():
        packed = pack(DENSE)
    grads = torch.autograd.grad(attention(Q, K, V, packed).sum(), [Q, K, V])
    for a, b in zip(grads, torch.autograd.grad(attention(Q, K, V, DENSE).sum(), [Q, K, V]), strict=True):
        assert torch.equal(a, b)
