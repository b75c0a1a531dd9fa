"""The turns at which columns add to dq on Hopper, walked by the scheduler's own functions on Python's integers."""

import random
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from anymask import causal, document, pack, sliding_window
from anymask.backends.gpu.arguments import mask_lists, plane_strides
from anymask.backends.hopper import order, turns
from anymask.backends.hopper.kernels import records, scheduler
from anymask.backends.hopper.kernels import turns as kernel
from anymask.tiles import tiles_over


class Pointer(NamedTuple):
    """A pointer to integers, which knows `+`."""

    memory: list[int]
    offset: int = 0

    def __add__(self, n: int) -> "Pointer":  # type: ignore[override]
        return Pointer(self.memory, self.offset + n)


def load(pointer: Pointer, mask: bool = True, other: int = 0) -> int:
    return pointer.memory[pointer.offset] if mask else other


@pytest.fixture
def python_numbers(monkeypatch):
    """The functions of the kernels on Python's integers."""
    for name, function in {"minimum": min, "maximum": max, "cast": lambda x, _: x, "load": load}.items():
        monkeypatch.setattr(scheduler.gl, name, function)
    monkeypatch.setattr(scheduler.gl, "where", lambda condition, a, b: a if condition else b)
    for module, names in {
        scheduler: ("num_work_tiles", "work_index", "decode_work_tile", "load_tile_range", "list_index", "column_at"),
        kernel: ("_rank", "list_index", "turn_without_mask"),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name).fn)


class Step(NamedTuple):
    """A query tile of a column: which tile of dq it adds to, and as the how-maniest."""

    sum: tuple[int, int, int]
    turn: int


def walks(block_mask: Any, lengths: tuple[int, int], batch: int, kv_heads: int, group: int, workers: int):
    """What the adding warp of each worker does, step by step."""
    q_tiles, kv_tiles = map(tiles_over, lengths)
    n, has_mask = batch * kv_heads * kv_tiles, block_mask is not None
    workers = min(workers, n)
    mean_tiles = block_mask.cols.mean_tiles if has_mask else None
    swizzle_heads = order.swizzle_heads(mean_tiles, kv_tiles, batch * kv_heads, workers)
    grid = turns.Grid(batch, kv_heads, group, workers, swizzle_heads)
    given = turns.of_call(block_mask, grid, q_tiles, torch.zeros(1))
    assert given.counters.tolist() == [0] * (batch * kv_heads * group * q_tiles)
    in_turn = records.Turns(*[view(x) for x in given])
    lists = records.MaskLists(*[view(x) for x in mask_lists(block_mask, "cols")])
    strides = records.PlaneStrides(*plane_strides(block_mask))
    sizes = records.BackwardSizes(q_tiles, kv_tiles, kv_heads, group)
    found = []
    for w in range(workers):
        schedule = records.BackwardSchedule(lists, strides, sizes, n, swizzle_heads, records.Worker(w, workers), ())
        own = []
        for index in range((n // workers + (scheduler.work_index(n // workers, schedule.worker) < n)) * group):
            column = scheduler.column_at(index, schedule, has_mask)
            first = kernel.first_entry.fn(column, schedule, has_mask)
            for j in range(column.n_full + column.n_partial):
                tile = scheduler.load_q_tile.fn(column, lists, j, has_mask, first, True)
                turn = kernel.turn_at.fn(in_turn, column, j, schedule, has_mask)
                own.append(Step((column.sample, column.head, tile), turn))
        found.append(own)
    return found


def view(x: Any) -> Any:
    """A tensor, of which a kernel gets the address, as a pointer."""
    if not isinstance(x, torch.Tensor):
        return x
    memory = x.new_empty(0).set_(x.untyped_storage())
    return Pointer(memory[x.storage_offset() :].tolist())


@cache
def masks() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(1500) // 400
    each = torch.rand(2, 6, 12, 12, generator=generator) < 0.4
    return {
        "causal": pack(causal(), q_len=1500, kv_len=1500),
        "window": pack(causal() & sliding_window(200), q_len=1500, kv_len=1500),
        "documents": pack(document(ids), q_len=1500, kv_len=1500),
        "random": pack(torch.rand(1500, 1500, generator=generator) < 0.5),
        "of samples": pack(each[:, :1].repeat_interleave(128, 2).repeat_interleave(128, 3)),
        "of heads": pack(each[:1].repeat_interleave(128, 2).repeat_interleave(128, 3)),
        "of both": pack(each.repeat_interleave(128, 2).repeat_interleave(128, 3)),
        "empty": pack(torch.zeros(1500, 1500, dtype=torch.bool)),
    }


def finish(own: list[list[Step]], seed: int) -> dict[tuple[int, int, int], int]:
    """Let workers step in a random order, each when it is its turn; how many steps each sum has had."""
    dice, done, places = random.Random(seed), {}, [0] * len(own)
    busy = [w for w, steps in enumerate(own) if steps]
    blocked = 0
    while busy:
        w = dice.choice(busy)
        step = own[w][places[w]]
        assert done.get(step.sum, 0) <= step.turn
        if done.get(step.sum, 0) < step.turn:
            blocked += 1
            # nobody can go on if none of them can
            assert blocked < 1000 or any(done.get((s := own[x][places[x]]).sum, 0) == s.turn for x in busy)
            continue
        blocked = 0
        done[step.sum] = step.turn + 1
        places[w] += 1
        if places[w] == len(own[w]):
            busy.remove(w)
    return done


@pytest.mark.usefixtures("python_numbers")
@pytest.mark.parametrize("workers", [5, 13])
@pytest.mark.parametrize("name", masks())
def test_every_tile_of_a_mask_has_its_turn(name, workers):
    block_mask = masks()[name]
    own = walks(block_mask, (1500, 1500), 2, 3, 2, workers)
    counts = block_mask.rows.full_offsets.diff() + block_mask.rows.partial_offsets.diff()
    wanted = counts.view(block_mask.batch, block_mask.heads, -1).expand(2, 6, -1)
    done = finish(own, workers)
    for sample in range(2):
        for head in range(6):
            assert [done.get((sample, head, tile), 0) for tile in range(12)] == wanted[sample, head].tolist()


@pytest.mark.usefixtures("python_numbers")
@pytest.mark.parametrize("workers", [1, 7, 40])
@pytest.mark.parametrize("lengths", [(1000, 1000), (300, 1400), (1400, 300), (1, 1), (100, 900)])
def test_every_tile_without_a_mask_has_its_turn(lengths, workers):
    own = walks(None, lengths, 2, 3, 2, workers)
    done = finish(own, workers)
    assert set(done.values()) == {tiles_over(lengths[1])}
    assert len(done) == 12 * tiles_over(lengths[0])
