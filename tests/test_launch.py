"""Direct launches: the same arguments as the first launch had, and only for what was compiled alike."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anymask import launch as module
from anymask.launch import int_key, launch, tensor_key

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
    launch(other, (1, 1, 1), (), {"BLOCK": 64}, ("key",))
    assert [call[0] for call in kernel.calls + other.calls] == ["jit"] * 4


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
