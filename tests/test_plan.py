"""Plans launch what passes do without them, at every call of their kind and at no other."""

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from anymask import BlockMask, attention, calls, causal, direct, launch, pack, plan
from anymask.backends import hopper
from anymask.backends import triton as triton_backend
from benchmarks import host
from tests.helpers.driver import STREAM, Driver, launches

# what a launch is: kernel, grid, and its parameters, each tensor by who made it
Launched = tuple[str, tuple[int, ...], tuple[Any, ...]]


@pytest.fixture
def driver() -> Iterator[Driver]:
    with launches() as found:
        yield found


def _shifted(t: Tensor, by: int) -> Tensor:
    """A copy, `by` elements beyond aligned memory."""
    return t.new_zeros(t.numel() + by)[by:].view(t.shape).copy_(t)


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": lambda *shape, dtype: torch.zeros(shape, dtype=dtype),
    "by token": lambda b, h, m, d, dtype: torch.zeros(b, m, h, d, dtype=dtype).transpose(1, 2),
    "wide rows": lambda b, h, m, d, dtype: torch.zeros(b, h, m, d + 8, dtype=dtype)[..., :d],
    "odd rows": lambda b, h, m, d, dtype: torch.zeros(b, h, m, d + 3, dtype=dtype)[..., :d],
    "odd address": lambda *shape, dtype: _shifted(torch.zeros(shape, dtype=dtype), 1),
    "by column": lambda b, h, m, d, dtype: torch.zeros(b, h, d, m, dtype=dtype).mT,
}


@cache
def _mask(kind: str, q_len: int, kv_len: int) -> BlockMask | None:
    if kind == "none":
        return None
    causal_mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril()
    dense = {
        "unused keys": causal_mask & (torch.arange(kv_len) < kv_len - 5),
        "unused queries": causal_mask & (torch.arange(q_len) >= 5)[:, None],
        "narrow": causal_mask & ~causal_mask.tril(-9),
        "of samples": causal_mask.expand(2, 1, q_len, kv_len),
        "of heads": causal_mask.expand(1, 4, q_len, kv_len),
    }.get(kind, causal_mask)
    mask = pack(dense.clone())
    if kind != "moved":
        return mask
    return BlockMask.from_tensors([_shifted(t, i % 3) for i, t in enumerate(mask.tensors())], q_len, kv_len)


@dataclass(frozen=True)
class Call:
    backend: str = "hopper"
    dtype: torch.dtype = torch.float16
    dims: tuple[int, int] = (64, 64)
    lengths: tuple[int, int] = (300, 300)
    heads: tuple[int, int] = (4, 4)
    batch: int = 2
    layouts: tuple[str, str, str, str] = ("by token", "by token", "by token", "by token")
    mask: str = "causal"
    dlse: str = "none"
    scale: float = 0.125
    deterministic: bool = False
    precision: str = "ieee"


def _neighbours(call: Call) -> Iterator[Call]:
    """Calls that differ from `call` in one thing, of each that a launch depends on."""
    others: dict[str, list[Any]] = {
        "backend": ["hopper", "triton"],
        "dtype": [torch.float16, torch.bfloat16, torch.float32],
        "dims": [(64, 64), (128, 128), (64, 128), (192, 128), (48, 64)],
        "lengths": [(300, 300), (300, 301), (301, 300), (16, 300), (64, 64), (600, 600)],
        "heads": [(4, 4), (4, 2)],
        "batch": [2, 1],
        "mask": ["none", "causal", "narrow", "unused keys", "unused queries", "of samples", "of heads", "moved"],
        "dlse": ["none", "contiguous", "strided"],
        "scale": [0.125, 0.25, -0.125],
        "deterministic": [False, True],
        "precision": ["ieee", "tf32"],
    }
    for name, values in others.items():
        for value in values:
            yield replace(call, **{name: value})
    for at, layout in ((at, layout) for at in range(4) for layout in LAYOUTS):
        yield replace(call, layouts=(*call.layouts[:at], layout, *call.layouts[at + 1 :]))


def _is_possible(call: Call) -> bool:
    if call.backend == "triton":
        return True
    loadable = all(layout in ("contiguous", "by token", "wide rows", "by column") for layout in call.layouts[:3])
    own = call.mask == "of heads" and call.heads[0] > call.heads[1]
    return loadable and call.dtype != torch.float32 and not own


def _named(launched: list[Any], known: dict[int, str]) -> list[Any]:
    """Launches with names in place of addresses: those of `known`, and others by turns."""
    names = dict(known)

    def name(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        return (value[0], names.setdefault(value[1], f"new {len(names)}"), *value[2:])

    return [(kernel, grid, [name(value) for value in values]) for kernel, grid, values in launched]


def _check(call: Call, driver: Driver) -> None:
    """The launches of a planned call, by Triton at first and then through the driver, are those of the backend."""
    (dim, v_dim), (q_heads, kv_heads), (q_len, kv_len) = call.dims, call.heads, call.lengths
    torch.backends.cuda.matmul.fp32_precision = call.precision
    shapes = (q_heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, v_dim), (q_heads, q_len, v_dim)
    q, k, v, do = (
        LAYOUTS[layout](call.batch, *shape, dtype=call.dtype)
        for layout, shape in zip(call.layouts, shapes, strict=True)
    )
    mask, backend = _mask(call.mask, q_len, kv_len), {"hopper": hopper, "triton": triton_backend}[call.backend]
    dense = [calls.unit_last_stride(t) for t in (q, k, v, do)]
    lse = torch.zeros(call.batch, q_heads, q_len)
    o = torch.zeros_like(q[..., :1].expand(*q.shape[:3], v_dim))
    strided = torch.zeros(*lse.shape, 5)[..., 0]
    dlse = {"none": None, "contiguous": torch.zeros_like(lse), "strided": strided}[call.dlse]
    parts = () if mask is None else mask.parts
    known = {t.data_ptr(): f"part {i}" for i, t in enumerate(parts)}
    given = {"q": q, "k": k, "v": v, "do": do, "o": o, "lse": lse} | ({} if dlse is None else {"dlse": dlse})
    known |= {t.data_ptr(): name for name, t in given.items()}
    rest = mask, call.scale
    ways = [
        (
            lambda: backend.forward(*dense[:3], *rest),
            lambda: calls.forward(q, k, v, *rest, call.backend),
        ),
        (
            lambda: backend.backward(*dense[:3], o, lse, dense[3], dlse, *rest, call.deterministic),
            lambda: calls.backward(q, k, v, o, lse, do, dlse, *rest, call.backend, call.deterministic),
        ),
    ]
    in_turns = backend is hopper and call.deterministic and hopper.takes_turns(*dense[:3], mask)
    for (plain, planned), has_plan in zip(ways, (True, not in_turns), strict=True):
        found = []
        for run in (plain, planned, planned, planned):
            driver.forget()
            outputs = run()
            launched = _named(driver.by_triton + driver.direct, known)
            found.append((launched, [(t.shape, t.stride(), t.dtype) for t in outputs]))
        assert len(driver.direct) == len(launched) * has_plan
        assert launched
        assert all(one == found[0] for one in found), call


BASES = [
    Call(),
    Call(backend="triton", dtype=torch.float32, lengths=(160, 300)),
    Call(dims=(128, 128), heads=(4, 2), mask="none", dlse="contiguous"),
    Call(lengths=(64, 64)),
    Call(heads=(4, 2), lengths=(9, 300)),
]


@pytest.mark.parametrize("base", BASES, ids=lambda c: f"{c.backend} {c.dims} {c.lengths}")
def test_plans_launch_what_backends_do(base: Call, driver: Driver) -> None:
    """Nothing is forgotten between calls, each of which is like others but for one thing."""
    near = [call for call in [base, *_neighbours(base), base] if _is_possible(call)]
    random.Random(0).shuffle(near)
    for call in near:
        _check(call, driver)


def _launches(driver: Driver, q: Tensor) -> list[Any]:
    driver.forget()
    calls.forward(q, q, q, None, 0.125, "hopper")
    return [*driver.by_triton, *driver.direct]


@pytest.fixture
def warm(driver: Driver) -> Tensor:
    """q of a call whose plan launches through the driver."""
    q = torch.zeros(1, 2, 300, 64, dtype=torch.float16)
    for _ in range(3):
        _launches(driver, q)
    assert driver.direct
    return q


def test_a_launch_takes_the_current_stream(driver: Driver, warm: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver as of_triton

    streams, step = [], next(s for s in _plan_of(warm)._steps if isinstance(s, plan._Launch))
    assert step._direct is not None
    monkeypatch.setattr(
        step._direct, "_launch", lambda config, *rest: streams.append(direct._Config.from_address(config).stream)
    )
    for stream in (5, 6):
        monkeypatch.setattr(step._direct, "_stream", lambda device, stream=stream: stream)
        _launches(driver, warm)
    assert streams == [5, 6]
    assert of_triton.active.get_current_stream(0) == STREAM


def _plan_of(q: Tensor) -> plan.Plan:
    _, found = calls._forward("hopper", None, 0.125, q.device, None, *[calls._kind(q)] * 3)
    assert found is not None
    return found


@pytest.mark.parametrize("which", ["_launch", "_replace"])
def test_what_the_driver_refuses_triton_launches(
    driver: Driver, warm: Tensor, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And raises what it is to raise."""
    steps = _plan_of(warm)._steps
    step = next(s for s in steps if isinstance(s, plan._Launch))
    assert step._direct is not None
    other = torch.zeros_like(warm)
    tensors = [other] * 3
    with monkeypatch.context() as patch:
        patch.setattr(step._direct, which, lambda *args: 201)
        assert _launches(driver, other) == driver.by_triton
        assert len(driver.by_triton) == 1
        for s in steps:
            s(tensors)
        assert not step._direct(tensors)
    # what was written of the call that was refused is not taken for whole
    driver.direct.clear()
    assert step._direct(tensors)
    assert _inputs(driver) == [(other.data_ptr(),) * 3]


def _inputs(driver: Driver) -> list[Any]:
    """Addresses of q, k and v of each launch through the driver."""
    return [tuple(v[1] for v in values[:24] if isinstance(v, tuple))[:3] for _, _, values in driver.direct]


def test_a_launch_has_the_addresses_of_its_call(driver: Driver, warm: Tensor) -> None:
    """Those of the call before are still in memory."""
    other = torch.zeros_like(warm)
    for n in (0, 0, 1, 3, 2, 7, 7, 0, 4):
        q, k, v = (other if n >> i & 1 else warm for i in range(3))
        driver.direct.clear()
        calls.forward(q, k, v, None, 0.125, "hopper")
        assert _inputs(driver) == [(q.data_ptr(), k.data_ptr(), v.data_ptr())]


def test_who_watches_launches_sees_those_of_plans(
    driver: Driver, warm: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "is_watched", lambda: True)
    assert _launches(driver, warm) == driver.by_triton
    assert len(driver.by_triton) == 1


@pytest.mark.parametrize(
    "change",
    [{"global_scratch_size": 8}, {"profile_scratch_size": 8}, {"num_ctas": 2}, {"launch_cooperative_grid": True}],
)
def test_what_only_triton_provides(driver: Driver, change: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made = host._compiled

    def compiled(*args: Any) -> Any:
        found = made(*args)
        vars(found.metadata).update(change)
        return found

    monkeypatch.setattr(host, "_compiled", compiled)
    for _ in range(4):
        assert len(_launches(driver, torch.zeros(1, 2, 300, 64, dtype=torch.float16))) == 1
        assert not driver.direct


def test_two_threads_do_not_share_a_launch(driver: Driver, warm: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their parameters lie in the same memory."""
    switched = threading.Event()
    step = next(s for s in _plan_of(warm)._steps if isinstance(s, plan._Launch))
    assert step._direct is not None
    real = step._direct._replace

    def slow(place: int, address: int) -> int:
        # another thread could run here
        switched.wait(0.02)
        return real(place, address)

    monkeypatch.setattr(step._direct, "_replace", slow)
    inputs = [torch.zeros_like(warm) for _ in range(3)]
    driver.direct.clear()
    threads = [threading.Thread(target=calls.forward, args=(q, q, q, None, 0.125, "hopper")) for q in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(_inputs(driver)) == {(q.data_ptr(),) * 3 for q in inputs}


@pytest.mark.parametrize("there", [True, False])
def test_memory_on_cuda(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a method of a tensor of the call."""
    twin = torch._C._dynamo.guards._empty_strided_cpu
    monkeypatch.setattr(plan, "empty_on_cuda", twin if there else None)
    made = plan.Plan(torch.device("cuda", 0))
    wanted = made.allocate([2, 3, 5], [1, 2, 6], torch.float16)
    for q in (torch.zeros(1), torch.zeros(1, dtype=torch.float16)):
        tensors = [q]
        made._steps[0](tensors)
        t = tensors[1]
        assert (t.shape, t.stride(), t.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert t.device == q.device
        assert not t.requires_grad


def test_plans_are_few_and_hold_no_tensor(driver: Driver) -> None:
    q = torch.zeros(1, 2, 300, 64, dtype=torch.float16, requires_grad=True)
    mask = pack(causal(), q_len=300, kv_len=300)
    for _ in range(3):
        attention(q, q, q, mask, backend="hopper").sum().backward()
    assert calls._forward.cache_info().maxsize == calls._backward.cache_info().maxsize == calls.MAX_PLANS
    held = weakref.ref(q.untyped_storage()), weakref.ref(mask.words.untyped_storage()), weakref.ref(mask)
    assert calls._forward.cache_info().currsize == 1
    del q, mask
    driver.forget()
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


def test_no_plan_of_what_is_traced() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.zeros(1, 2, 300, 64, requires_grad=True)
        attention(q, q, q).sum().backward()
    attend = torch.compile(lambda q: attention(q, q, q), backend="aot_eager", fullgraph=True)
    torch._dynamo.mark_dynamic(traced := torch.zeros(1, 2, 300, 64), 2)
    assert calls._forward.cache_info().currsize == 0
    attend(traced)
    # of the values that the compiled function ran with
    assert calls._forward.cache_info().currsize == 1


def test_a_plan_knows_no_number_of_tiles() -> None:
    """Two masks of one structure have different ones."""
    found = plan.Plan(torch.device("cpu"))
    mask = calls._mask(found, pack(causal(), q_len=300, kv_len=300).structure)
    with pytest.raises(TypeError):
        mask.rows.full_tiles.numel()
    with pytest.raises(TypeError):
        mask.cols.words.new_empty(3).numel() + mask.cols.partial_tiles.numel()
    for name in ("lists", "device", "stats"):
        with pytest.raises(plan.Unplanned, match=name):
            getattr(mask, name)
    assert not hasattr(mask, "no_attribute_of_masks")
