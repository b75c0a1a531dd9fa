"""Direct launches: the same arguments as the first launch had, and only for what was compiled alike."""

import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import BlockMask, causal, pack
from anymask import launch as module
from anymask.backends import hopper
from anymask.backends import triton as triton_backend
from anymask.launch import args_key, int_key, launch, tensor_key
from tests.helpers import scored

pytest.importorskip("triton")


class Kernel:
    """A jit function that writes down how it is launched."""

    def __init__(self, backend: str = "cuda") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.backend = backend

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*args: Any, **named: Any) -> Any:
            self.calls.append(("jit", grid, args, named))
            target = SimpleNamespace(target=SimpleNamespace(backend=self.backend))
            return Compiled(self, target)

        return first


class Compiled:
    def __init__(self, kernel: Kernel, metadata: Any) -> None:
        self.kernel, self.metadata, self.function, self.packed_metadata = kernel, metadata, "function", "packed"

    def run(self, *args: Any) -> None:
        self.kernel.calls.append(("direct", args))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.calls.append(("watched", grid, args))


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    chains = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[]))
    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: ("stream of", device))
    monkeypatch.setattr(module, "_hooks", lambda: chains)
    monkeypatch.setattr(module, "_driver", lambda: SimpleNamespace(active=active))
    monkeypatch.setattr(module, "_kernels", {})
    return chains


def test_the_second_launch_is_direct_and_has_all_arguments(hooks: SimpleNamespace) -> None:
    kernel = Kernel()
    for n in (1, 2):
        launch(kernel, (n, 1, 1), ("x", n), {"BLOCK": 64}, ("key",), num_warps=4)
    assert kernel.calls == [
        ("jit", (1, 1, 1), ("x", 1), {"BLOCK": 64, "num_warps": 4}),
        ("direct", (2, 1, 1, ("stream of", 3), "function", "packed", None, None, None, "x", 2, 64)),
    ]


def test_other_keys_constants_and_kernels_are_compiled_anew(hooks: SimpleNamespace) -> None:
    kernel, other = Kernel(), Kernel()
    launch(kernel, (1, 1, 1), (), {"BLOCK": 64}, ("key",))
    launch(kernel, (1, 1, 1), (), {"BLOCK": 128}, ("key",))
    launch(kernel, (1, 1, 1), (), {"BLOCK": 64}, ("another",))
    launch(kernel, (1, 1, 1), (), {"BLOCK": 64}, ("key",), num_warps=8)
    launch(other, (1, 1, 1), (), {"BLOCK": 64}, ("key",))
    assert [call[0] for call in kernel.calls + other.calls] == ["jit"] * 5


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_who_watches_launches_sees_them(hooks: SimpleNamespace, which: str) -> None:
    kernel = Kernel()
    launch(kernel, (1, 1, 1), ("x",), {"BLOCK": 64}, ())
    getattr(hooks, which).calls.append(print)
    launch(kernel, (2, 1, 1), ("x",), {"BLOCK": 64}, ())
    assert kernel.calls[1] == ("watched", (2, 1, 1), ("x", 64))


def test_other_chips_and_the_interpreter_take_the_long_way(hooks: SimpleNamespace) -> None:
    kernel = Kernel("hip")
    for _ in range(2):
        launch(kernel, (1, 1, 1), (), {}, ())
    assert [call[0] for call in kernel.calls] == ["jit", "jit"]


def test_what_triton_has_is_what_is_used_here() -> None:
    from triton import knobs
    from triton.runtime import driver

    assert module._hooks() is knobs.runtime
    assert knobs.runtime.launch_enter_hook.calls == knobs.runtime.launch_exit_hook.calls == []
    assert module._driver() is driver


def test_keys_tell_apart_what_triton_does() -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    assert tensor_key(memory) == tensor_key(memory[4:])
    assert len({tensor_key(memory), tensor_key(memory[1:]), tensor_key(memory.view(torch.float32))}) == 3
    # 1, multiples of 16, others, and what does not fit 32 bits
    assert len({int_key(n) for n in (1, 16, 32, 17, 3, 2**31, 2**31 + 1)}) == 5
    assert int_key(17) == int_key(2**31 - 1) == int_key(-1)


def test_keys_of_all_arguments() -> None:
    memory = torch.zeros(64)
    descriptor = SimpleNamespace(base=memory, block_shape=[1, 1, 64, 64])
    other = SimpleNamespace(base=memory, block_shape=[1, 1, 128, 64])
    differing: list[tuple[Any, ...]] = [
        *((memory,), (memory[1:],), (memory.int(),), (None,), (descriptor,), (other,)),
        *((1,), (16,), (17,), (2**31,), (1.0,), ((1, 16),), ((16, 1),), ((16, 17),), ((16, 2**31),)),
    ]
    assert len({args_key(args) for args in differing}) == len(differing)
    assert args_key((memory, 17, 0.5, (32, 3))) == args_key((memory[4:], 19, 2.0, (16, 5)))


class Keys(dict[Any, Any]):
    """Of `launch`: finds no kernel, and knows that equal keys mean the same kernel."""

    def get(self, key: Any, default: Any = None) -> Any:
        return default

    def __setitem__(self, key: Any, kernel: Any) -> None:
        assert self.setdefault(key, kernel.compiled_for) == kernel.compiled_for


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[Keys]:
    """The keys of launches that end where Triton knows what it would compile, on CPU tensors."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    target, found, ran = GPUTarget("cuda", 90, 32), Keys(), []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        if self not in ran:
            # it remembers the first target it ever ran for
            self.device_caches.clear()
            ran.append(self)
        binder = self.device_caches[0][-1]
        _, specialization, options = binder(*args, **named)
        return SimpleNamespace(
            metadata=SimpleNamespace(target=target), compiled_for=(repr(specialization), repr(options))
        )

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(module, "_kernels", found)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    triton_backend._options.cache_clear()
    yield found
    triton_backend._options.cache_clear()
    for function in ran:
        function.device_caches.clear()


def _shifted(t: Tensor, by: int) -> Tensor:
    """A copy, `by` elements beyond aligned memory."""
    return t.new_zeros(t.numel() + by)[by:].view(t.shape).copy_(t)


# the same tensor `[batch, heads, length, dim]` in memory of other strides and alignments
LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": lambda *shape, dtype: torch.zeros(shape, dtype=dtype),
    "by token": lambda b, h, m, d, dtype: torch.zeros(b, m, h, d, dtype=dtype).transpose(1, 2),
    "wide rows": lambda b, h, m, d, dtype: torch.zeros(b, h, m, d + 3, dtype=dtype)[..., :d],
    "one head of all": lambda b, h, m, d, dtype: torch.zeros(b, 1, m, d, dtype=dtype).expand(b, h, m, d),
    "odd address": lambda *shape, dtype: _shifted(torch.zeros(shape, dtype=dtype), 1),
}


@cache
def _mask(kind: str, length: int) -> BlockMask | None:
    if kind == "none":
        return None
    if kind == "padded":
        return pack(torch.arange(length).expand(length, length) < max(1, length - 5))
    mask = pack(causal(), q_len=length, kv_len=length)
    if kind == "causal":
        return mask
    tensors = [_shifted(t, i % 3) for i, t in enumerate(mask.tensors())]
    return BlockMask.from_tensors(tensors, length, length)


def _run(
    backend: Any, dtype: torch.dtype, dims: tuple[int, int], length: int, heads: tuple[int, int], layouts: list[str],
    kind: str, dlse: str, scale: float, deterministic: bool = False,
) -> None:  # fmt: skip
    (dim, v_dim), (q_heads, kv_heads) = dims, heads
    shapes = [(2, q_heads, length, dim), (2, kv_heads, length, dim), (2, kv_heads, length, v_dim)]
    make = [LAYOUTS[name] for name in layouts]
    q, k, v = (made(*shape, dtype=dtype) for made, shape in zip(make, shapes, strict=False))
    do = make[3](2, q_heads, length, v_dim, dtype=dtype)
    mask = _mask(kind, length)
    o, lse = backend.forward(q, k, v, mask, scale)
    of_lse = {"none": None, "contiguous": torch.zeros_like(lse), "strided": torch.zeros(*lse.shape, 5)[..., 0]}[dlse]
    backend.backward(q, k, v, o, lse, do, of_lse, mask, scale, deterministic)


MASKS = ["none", "causal", "padded", "moved"]
SHAPES = list(product([1, 16, 129, 300], [(1, 1), (4, 4), (4, 2), (16, 1)]))


def test_keys_of_the_triton_kernels_are_complete(keys: Keys) -> None:
    draw = random.Random(0)
    for _ in range(400):
        length, heads = draw.choice(SHAPES)
        _run(
            triton_backend,
            draw.choice([torch.float16, torch.bfloat16, torch.float32]),
            draw.choice([(16, 16), (64, 64), (128, 128), (1, 40), (72, 128)]),
            length,
            heads,
            draw.choices(list(LAYOUTS), [4, 2, 1, 1, 1], k=4),
            draw.choice(MASKS),
            draw.choice(["none", "contiguous", "strided"]),
            draw.choice([0.1, -0.1]),
        )
    assert len(keys) > 500


def test_keys_of_scores_are_complete(keys: Keys) -> None:
    draw = random.Random(0)
    for _ in range(150):
        dtype = draw.choice([torch.float16, torch.bfloat16, torch.float32])
        call = scored.make_call(
            draw.choice(["none", "causal", "empty_columns"]),
            tuple(draw.sample(list(scored.DENSE), draw.choice([0, 1, 1, 2]))),
            tuple(draw.sample(["relative", "relative_shared", "window", "window_shared"], draw.choice([0, 0, 1, 2]))),
            shape=(draw.choice([1, 2]), 4, draw.choice([2, 4]), draw.choice([1, 129]), draw.choice([16, 43, 144])),
            dims=draw.choice([(64, 64), (40, 128)]),
            dtype=dtype,
            bias_dtype=draw.choice([dtype, torch.float32]),
            softcap=draw.choice([0.0, 0.0, 2.0]),
            sinks=draw.choice([False, True]),
            dropout_p=draw.choice([0.0, 0.0, 0.1]),
        )
        moved = tuple(_shifted(t, draw.choice([0, 0, 1])) for t in call.scores.dense)
        call = scored.without(call, dense=moved)
        arguments = call.q, call.k, call.v
        o, lse = triton_backend.forward(*arguments, call.mask, call.scale, call.scores)
        rest = call.mask, call.scale, True, call.scores, call.needs
        triton_backend.backward_scores(*arguments, o, lse, call.do, call.dlse, *rest)
    assert len(keys) > 300


def test_keys_of_scores_of_the_hopper_kernels_are_complete(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    for _ in range(100):
        call = scored.make_call(
            draw.choice(["none", "causal", "empty_rows"]),
            tuple(draw.sample(["keys", "keys_by_head", "queries", "heads", "one"], draw.choice([0, 1, 1, 2]))),
            tuple(draw.sample(["relative", "relative_shared"], draw.choice([0, 0, 1]))),
            shape=(draw.choice([1, 2]), 4, draw.choice([2, 4]), draw.choice([1, 129]), draw.choice([16, 43, 144])),
            dims=draw.choice([(64, 64), (40, 128)]),
            dtype=draw.choice([torch.float16, torch.bfloat16]),
            softcap=draw.choice([0.0, 0.0, 2.0]),
            sinks=draw.choice([False, True]),
            dropout_p=draw.choice([0.0, 0.0, 0.1]),
        )
        monkeypatch.setattr(hopper.tuning, "SHORT_COLUMN_IN_TURN", draw.choice([0, 12]))
        arguments = call.q, call.k, call.v
        o, lse = hopper.forward(*arguments, call.mask, call.scale, call.scores)
        some = [tuple(draw.choice([True, False]) for _ in needed) for needed in call.needs[:2]]
        rest = call.mask, call.scale, draw.choice([True, False]), call.scores, call.needs._replace(
            dense=some[0], tables=some[1]
        )  # fmt: skip
        hopper.backward_scores(*arguments, o, lse, call.do, call.dlse, *rest)
    assert len(keys) > 200


HOPPER_DIMS = [(64, 64), (128, 128), (40, 64), (128, 72), (192, 128), (136, 192), (256, 256)]


def test_keys_of_the_hopper_kernels_are_complete(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.tune import hopper_candidates

    draw = random.Random(0)
    for _ in range(300):
        (length, heads), dims = draw.choice(SHAPES), draw.choice(HOPPER_DIMS)
        block_d = hopper.narrow.block_d(*dims)
        options = draw.choice(list(hopper_candidates("fwd", block_d)))
        if max(dims) <= 128:
            monkeypatch.setitem(hopper.tuning.FORWARD, block_d, hopper.tuning.ForwardConfig(*options))
        monkeypatch.setattr(hopper.tuning, "MANY_COLUMNS", draw.choice([1, 1000]))
        _run(
            hopper,
            draw.choice([torch.float16, torch.bfloat16]),
            dims,
            length,
            heads,
            [*draw.choices(["contiguous", "by token"], k=3), draw.choice(list(LAYOUTS))],
            draw.choice(MASKS),
            draw.choice(["none", "contiguous", "strided"]),
            draw.choice([0.1, -0.1]),
            draw.choice([False, True]),
        )
    assert len(keys) > 100


@pytest.mark.parametrize("backend", [triton_backend, hopper], ids=["triton", "hopper"])
def test_new_lengths_and_masks_have_no_new_keys(keys: Keys, backend: Any) -> None:
    found = []
    # longer than a window
    for length in range(136, 536, 8):
        for kind in ("causal", "padded"):
            # those that the copy engine reads through other kernels
            if backend is hopper or kind == "causal":
                _run(backend, torch.float16, (64, 64), length, (4, 4), ["by token"] * 4, kind, "none", 0.1)
        found.append(len(keys))
    # o and the gradients may have strides that 16 divides, or none
    assert found[-1] == found[3] <= 8


def test_windows_have_keys_by_powers_of_two(keys: Keys) -> None:
    found = []
    for length in (17, 32, 33, 64, 65, 128, 18, 48, 90, 112, 127):
        _run(hopper, torch.float16, (64, 64), length, (4, 4), ["by token"] * 4, "causal", "none", 0.1)
        found.append(len(keys))
    # forward and backward, in blocks of 32, 64 and 128, of lengths that 16 divides or does not
    assert found[5:] == [12] * 6


@pytest.mark.parametrize("q_len", [1, 9])
@pytest.mark.parametrize("layout", ["contiguous", "by token"])
def test_packed_heads_are_written_where_o_lies(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, layout: str, q_len: int
) -> None:
    """Rows of one tile are the queries of a group: a copy where heads follow each other, and their values reach o."""
    expected = torch.randn(2, 8, q_len, 64).half()

    def written(call: Any) -> None:
        assert call.pack_gqa
        call.o.copy_(expected.view(call.o.shape))

    monkeypatch.setattr(hopper, "_launch_forward", written)
    q = LAYOUTS[layout](2, 8, q_len, 64, dtype=torch.float16)
    k = torch.zeros(2, 2, 150, 64, dtype=torch.float16)
    o, _ = hopper.forward(q, k, k, None, 0.1)
    assert torch.equal(o, expected)
    assert o.stride() == q.stride()
