"""Plans of packing launch what a mask packed for the first time does; and how the host gets the totals."""

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from anymask import block_sparse, causal, document, from_dense, key_padding, sliding_window
from anymask.mask.expr import Mask, TileGrid
from anymask.mask.leaves import Dense
from anymask.mask.program import program_of
from anymask.packing import triton as triton_pack
from anymask.packing.triton import answer, plans
from anymask.packing.triton.answer import Answer, Totals
from tests.helpers.driver import Driver, in_place_of_triton

CPU = torch.device("cpu")


@pytest.fixture
def driver() -> Iterator[Driver]:
    """Packing launches nothing."""
    with in_place_of_triton() as (found, _):
        plans.forget()
        yield found
    plans.forget()


def _shifted(t: Tensor, by: int) -> Tensor:
    """A copy, `by` elements beyond aligned memory."""
    return t.new_zeros(t.numel() + by)[by:].view(t.shape).copy_(t)


def _ids(n: int, batch: int = 1, heads: int = 1) -> Tensor:
    return (torch.arange(n) // 70).expand(batch, heads, n).contiguous()


# for lengths and one more number
MASKS: dict[str, Callable[[int, int, int], Mask]] = {
    "window": lambda m, n, x: sliding_window(100 + x, x),
    "documents": lambda m, n, x: sliding_window(100 + x, x) & document(_ids(m), kv_ids=_ids(n)),
    "documents or": lambda m, n, x: sliding_window(100 + x, x) | document(_ids(m), kv_ids=_ids(n)),
    "of samples": lambda m, n, x: document(_ids(m, 2), kv_ids=_ids(n, 2)),
    "of heads": lambda m, n, x: document(_ids(m, 1, 2), kv_ids=_ids(n, 1, 2)),
    "of keys": lambda m, n, x: document(_ids(m), kv_ids=_ids(n, 2)),
    "padding": lambda m, n, x: key_padding(torch.tensor([n - x, n])),
    "flags": lambda m, n, x: key_padding(torch.arange(n) < 50),
    "blocks": lambda m, n, x: block_sparse(torch.ones(1, 1, -(-m // 128), -(-n // 128)).bool(), 128) & causal(x),
    "small blocks": lambda m, n, x: block_sparse(torch.ones(1, 1, -(-m // 64), -(-n // 64)).bool(), 64) & causal(x),
    "tensor": lambda m, n, x: causal(x) & from_dense(torch.ones(m, n).bool()),
    "tensor by column": lambda m, n, x: causal(x) & from_dense(torch.ones(n, m).bool().mT),
    "moved tensor": lambda m, n, x: causal(x) & from_dense(_shifted(torch.ones(m, n).bool(), 1)),
    "tensor of samples": lambda m, n, x: causal(x) & from_dense(torch.ones(2, 1, m, n).bool()),
    "floats": lambda m, n, x: causal(x) & Dense(torch.ones(1, 1, m, n)),
    "dense": lambda m, n, x: Dense(torch.ones(1, 1, m, n).bool()),
    "dense by column": lambda m, n, x: Dense(torch.ones(1, 1, n, m).bool().mT),
    "dense by two": lambda m, n, x: Dense(torch.ones(1, 1, m, 2 * n).bool()[..., ::2]),
    "dense, moved": lambda m, n, x: Dense(_shifted(torch.ones(1, 1, m, n).bool(), 1)),
    "dense, moved by 4": lambda m, n, x: Dense(_shifted(torch.ones(1, 1, m, n).bool(), 4)),
    "dense of samples": lambda m, n, x: Dense(torch.ones(2, 1, m, n).bool()),
    "dense of heads": lambda m, n, x: Dense(torch.ones(1, 2, m, n).bool()),
    "dense of one row": lambda m, n, x: Dense(torch.ones(1, 1, 1, n).bool()),
    "dense floats": lambda m, n, x: Dense(torch.ones(1, 1, m, n)),
    "dense bytes": lambda m, n, x: Dense(torch.ones(1, 1, m, n, dtype=torch.int8)),
    "dense complex": lambda m, n, x: Dense(torch.ones(1, 1, m, n, dtype=torch.complex64)),
}


@dataclass(frozen=True)
class Call:
    mask: str = "documents"
    lengths: tuple[int, int] = (304, 304)
    number: int = 0
    # full tiles, and partial ones
    tiles: tuple[int, int] = (2, 3)


def _neighbours(call: Call) -> Iterator[Call]:
    """Calls that differ from `call` in one thing, of each that a launch depends on."""
    others: dict[str, list[Any]] = {
        "mask": list(MASKS),
        "lengths": [(304, 304), (300, 304), (304, 300), (301, 301), (1, 304), (600, 600), (0, 304), (304, 0)],
        "number": [0, 1, 7, 16],
        "tiles": [(2, 3), (0, 3), (2, 0), (5, 4), (1, 9)],
    }
    for name, values in others.items():
        for value in values:
            yield replace(call, **{name: value})


def _named(launched: list[Any], known: dict[int, str]) -> list[Any]:
    """Launches with names in place of addresses: those of `known`, and others by turns."""
    names = dict(known)
    turns = iter(range(1000))

    def name(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        if value[1] not in names:
            names[value[1]] = f"new {next(turns)}"
        return value[0], names[value[1]]

    return [(kernel, grid, [name(value) for value in values]) for kernel, grid, values in launched]


def _check(call: Call, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches of a planned call, by Triton at first and then through the driver, are those of a plan made anew."""
    mask, grid = MASKS[call.mask](*call.lengths, call.number), TileGrid(*call.lengths, CPU)
    (full, partial), planes = call.tiles, mask.planes[0] * mask.planes[1]
    if not all(call.lengths):
        full = partial = 0
    totals = Totals(full, partial, planes * grid.q_len, planes * grid.kv_len)
    monkeypatch.setattr(Answer, "wait", lambda *_: totals)
    program = program_of(mask)
    assert program is not None
    known = {t.data_ptr(): f"tensor {i}" for i, t in enumerate(program.tensors)}
    found = []
    for is_anew in (True, False, False, False):
        driver.by_triton.clear()
        driver.direct.clear()
        with monkeypatch.context() as patch:
            for name in ("of_dense", "of_expression") if is_anew else ():
                patch.setattr(plans, name, getattr(plans, name).__wrapped__)
            packed = triton_pack.pack_mask(mask, grid)
        launched = _named(driver.by_triton + driver.direct, known)
        found.append((launched, [(t.shape, t.stride(), t.dtype) for t in packed.tensors()]))
        assert packed.tile_counts[1:] == (partial, full)
    assert launched
    assert len(driver.direct) == len(launched)
    assert all(one == found[0] for one in found), call


@pytest.mark.parametrize("base", [Call(), Call("dense"), Call("blocks", (600, 300))], ids=lambda call: call.mask)
def test_plans_launch_what_new_ones_do(base: Call, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is forgotten between calls, each of which is like others but for one thing."""
    near = [base, *_neighbours(base), base]
    random.Random(0).shuffle(near)
    for call in near:
        _check(call, driver, monkeypatch)


@pytest.mark.parametrize(("words", "kinds"), [((0, 0), (1, 1)), ((1, 0), (1, 1)), ((0, 1), (2, 1)), ((0, 0), (1, 2))])
def test_plans_of_tiles_launch_what_new_ones_do(
    words: tuple[int, int], kinds: tuple[int, int], driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift, partial, found = words[0], 3 + words[1], list[Any]()
    monkeypatch.setattr(Answer, "wait", lambda *_: Totals(0, partial, 300, 300))
    for is_anew in (True, False, False, False):
        driver.by_triton.clear()
        driver.direct.clear()
        of_tiles = _shifted(torch.zeros(partial, 128, 4, dtype=torch.int32), shift)
        grid = TileGrid(300, 300, CPU)
        with monkeypatch.context() as patch:
            if is_anew:
                patch.setattr(plans, "of_packed", plans.of_packed.__wrapped__)
            triton_pack.lists_from_tiles(torch.zeros(*kinds, 3, 3, dtype=torch.int8), of_tiles, grid)
        found.append(_named(driver.by_triton + driver.direct, {of_tiles.data_ptr(): "words"}))
    assert len(driver.direct) == len(found[0]) == 5
    # words of the columns alone
    assert found[0][-1][1] == (partial, 1, 1)
    assert all(one == found[0] for one in found)


def test_without_partial_tiles_no_words_are_launched(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    for partial in (0, 1, 0, 1, 0, 1):
        monkeypatch.setattr(Answer, "wait", lambda *_, n=partial: Totals(3, n, 300, 300))
        driver.by_triton.clear()
        driver.direct.clear()
        triton_pack.pack_mask(sliding_window(2), TileGrid(300, 300, CPU))
        launched = driver.by_triton + driver.direct
        assert len(launched) == 4 + partial
        assert [grid[0] for name, grid, _ in launched if name.startswith("words_kernel")] == [1] * partial


def test_plans_are_few_and_hold_no_tensor(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answer, "wait", lambda *_: Totals(0, 3, 300, 300))
    mask = causal() & document(_ids(300))
    program = program_of(mask)
    assert program is not None
    for _ in range(3):
        packed = triton_pack.pack_mask(mask, TileGrid(300, 300, CPU))
    held = [weakref.ref(t.untyped_storage()) for t in (*program.tensors, *packed.tensors()[:2])]
    assert plans.of_expression.cache_info().currsize == 1
    assert plans.of_expression.cache_info().maxsize == plans.MAX_PLANS
    del mask, program, packed
    driver.forget()
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


@pytest.fixture
def no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "_free", [])


def _answer(place: Answer, totals: tuple[int, ...]) -> None:
    """As a kernel does, one number after the other."""
    for at in (2, 0, 3, 1):
        place.tensor[at] = totals[at]
        time.sleep(0.002)


@pytest.mark.usefixtures("no_places")
def test_the_host_waits_for_all_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "LOOKS", 10**9)
    for totals in ((5, 0, 300, 7), (0, 9, 0, 0)):
        place = answer.take(CPU)
        kernel = threading.Thread(target=_answer, args=(place, totals))
        kernel.start()
        assert place.wait(CPU) == totals
        kernel.join()


@pytest.mark.usefixtures("no_places")
def test_what_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "LOOKS", 3)
    place = answer.take(CPU)
    place.tensor[:3] = 1
    with pytest.raises(AssertionError, match="no kernel has told"):
        place.wait(CPU)
    # a kernel may write to it yet
    assert place not in answer._free


@pytest.mark.usefixtures("no_places")
def test_what_a_graph_captures_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "LOOKS", 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    place = answer.take(CPU)
    with pytest.raises(RuntimeError, match="graph is being captured"):
        place.wait(torch.device("cuda", 0))
    # a replay would write to it
    assert place not in answer._free


@pytest.mark.usefixtures("no_places")
def test_each_call_has_a_place_of_its_own() -> None:
    taken = [answer.take(CPU) for _ in range(answer.PLACES + 3)]
    assert len({place.tensor.data_ptr() for place in taken}) == len(taken)
    taken[7].tensor[:] = 4
    assert taken[7].wait(CPU) == (4, 4, 4, 4)
    assert answer._free[-1] is taken[7]
    assert answer.take(CPU) is taken[7]
    # nothing is left of the call before
    assert taken[7].tensor.tolist() == [answer.NOT_YET] * 4
