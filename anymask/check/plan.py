"""What `anymask check` runs: units of jobs, the same for the same options and seed.

A unit keeps to one head_dim, v_dim and dtype, so that a process compiles few kernels for it. Expressions of fuzzed
masks come from a pool, as a GPU compiles a packing kernel for each structure.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from anymask.backends import Backend
from anymask.check.jobs import Job, Runner
from anymask.testing import BUILDERS, MASKS, Case
from anymask.testing.expressions import combine, is_square

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Shape(NamedTuple):
    """What kernels are compiled for, and how often it is drawn."""

    head_dim: int
    v_dim: int
    dtype: torch.dtype
    weight: int = 1
    # scales of 0 and below, odd layouts: each compiles more
    wide: bool = False


# on a GPU; the first four run all of hopper's kernels
GPU_SHAPES = (
    Shape(64, 64, F16, 6, True), Shape(128, 128, BF16, 6, True), Shape(64, 64, BF16, 4), Shape(128, 128, F16, 4),
    Shape(96, 96, BF16, 2), Shape(80, 48, F16, 2), Shape(40, 40, BF16, 2), Shape(64, 128, F16, 2),
    Shape(64, 64, F32, 4, True), Shape(128, 128, F32), Shape(16, 32, F32, 2), Shape(32, 32, F16, 3),
    Shape(16, 16, BF16, 2), Shape(256, 256, F16), Shape(192, 128, BF16), Shape(8, 24, F16), Shape(31, 31, BF16),
    Shape(1, 1, F32), Shape(48, 48, F64),
)  # fmt: skip
CPU_SHAPES = (
    Shape(32, 32, F32, 4, True), Shape(64, 64, F16, 2), Shape(16, 32, BF16, 3, True), Shape(24, 8, F64, 2, True),
    Shape(1, 1, F32), Shape(31, 31, F16), Shape(128, 128, BF16), Shape(7, 3, F64),
)  # fmt: skip
EDGES = 1, 2, 5, 17, 63, 64, 65, 100, 127, 128, 129, 130, 191, 200, 239, 255, 256, 257, 300, 383, 384, 385
# most have 900 rows or more, from which on the RMSE is held to its usual limit
LONG = 239, 255, 256, 257, 300, 383, 384, 385
# (batch, q_heads, kv_heads); the last are for full checks
HEADS = (2, 2, 2), (2, 4, 2), (1, 7, 1), (3, 4, 1), (1, 1, 1), (2, 6, 6), (4, 2, 1), (1, 28, 4)
SCALES = None, None, None, 0.3, 1.0, 0.02
WIDE_SCALES = *SCALES, -0.7, 0.0
LAYOUTS = "contiguous", "contiguous", "contiguous", "blhd", "packed"
WIDE_LAYOUTS = *LAYOUTS, "transposed", "expanded"
KINDS = *MASKS, *BUILDERS
# masks that leave some key, or some query, without a partner, whatever is drawn; `empty_columns` only where each query
# head has a kv head of its own
UNUSED_KEYS = "drawn_key_padding", "one_pair", "empty_sample", "all_empty", "empty_columns"
UNUSED_QUERIES = "empty_rows", "one_pair", "empty_sample", "all_empty", "causal_behind", "column", "empty_head"
SPECIAL = float("nan"), float("inf"), float("-inf")
SHIFTS = -50.0, -200.0, -1e3, -1e4
# jobs of a unit
UNIT = 40


@dataclass(frozen=True)
class Amount:
    """How much of everything; see `plan`."""

    grid: int
    fuzzed: int
    pool: int
    packing: int
    # cases of each property, shape and backend
    properties: int
    # of 128 remainders of the length
    remainders: int
    repeats: int
    arguments: int
    # tokens at most of a grid's case, and of a fuzzed one; of the shorter sequence of the memory check
    grid_longest: int
    fuzzed_longest: int
    memory: int
    heads: Sequence[tuple[int, int, int]]


QUICK = Amount(
    grid=240, fuzzed=260, pool=40, packing=120, properties=4, remainders=16, repeats=3, arguments=2000,
    grid_longest=257, fuzzed_longest=160, memory=2048, heads=HEADS[:-2],
)  # fmt: skip
FULL = Amount(
    grid=8000, fuzzed=20800, pool=160, packing=4000, properties=60, remainders=128, repeats=10, arguments=4000,
    grid_longest=385, fuzzed_longest=400, memory=16384, heads=HEADS,
)  # fmt: skip


def runners(device: str, only: Sequence[str] = ()) -> tuple[Runner, ...]:
    """The backends to hold against the oracle on a device, those of `only` if it names some.

    Raises:
        ValueError: a backend that does not run there.
    """
    on_gpu = torch.device(device).type == "cuda"
    names: tuple[Backend, ...] = ("hopper", "triton", "reference") if on_gpu else ("cpu", "reference")
    others = [name for name in only if name not in names]
    if others:
        raise ValueError(f"--backend is {others[0]}, which does not run on {device}; allowed are {', '.join(names)}")
    chosen = [Runner(name) for name in names if not only or name in only]
    return *chosen, *(Runner(r.backend, True) for r in chosen if r.backend == "hopper")


def plan(amount: Amount, device: str, seed: int, only: Sequence[str] = ()) -> list[list[Job]]:
    """Units of jobs: of each shape some first, so that processes compile different kernels, then all by turns."""
    rng = random.Random(seed)
    by = runners(device, only)
    shapes = GPU_SHAPES if torch.device(device).type == "cuda" else CPU_SHAPES
    pool = [_expression(rng) for _ in range(amount.pool)]
    queues = [_of_shape(shape, shapes, amount, by, pool, random.Random(rng.random())) for shape in shapes]
    queues.append(_others(amount, by, shapes, pool, random.Random(rng.random())))
    units: list[list[Job]] = []
    # so that every part of the list has some of everything, a queue gives in proportion to what it has
    lists = [list(_chunks(queue, UNIT)) for queue in queues]
    places = [((i + 0.5) / len(x) if i else -1.0, n, i) for n, x in enumerate(lists) for i in range(len(x))]
    for _, n, i in sorted(places):
        units.append(lists[n][i])
    return units


def _chunks(items: Iterator[Job], size: int) -> Iterator[list[Job]]:
    chunk: list[Job] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _expression(rng: random.Random) -> str:
    return combine([rng.choice(KINDS) for _ in range(rng.choice((2, 2, 3, 3, 4, 5)))], rng)


def _share(total: int, shape: Shape, shapes: Sequence[Shape]) -> int:
    return -(-total * shape.weight // sum(s.weight for s in shapes))


def _case(mask: str, shape: Shape, amount: Amount, rng: random.Random, lengths: Callable[[], int]) -> Case:
    q_len, kv_len = lengths(), lengths()
    batch, q_heads, kv_heads = rng.choice(amount.heads)
    return Case(
        mask,
        q_len,
        q_len if is_square(mask) else kv_len,
        shape.head_dim,
        shape.dtype,
        shape.v_dim,
        batch,
        q_heads,
        kv_heads,
        rng.choice(WIDE_LAYOUTS if shape.wide else LAYOUTS),
        rng.choice(WIDE_SCALES if shape.wide else SCALES),
        rng.randrange(2**31),
    )


def _of_shape(
    shape: Shape,
    shapes: Sequence[Shape],
    amount: Amount,
    by: tuple[Runner, ...],
    pool: list[str],
    rng: random.Random,
) -> Iterator[Job]:
    """The oracle's grid of every mask, fuzzed masks, and the properties."""
    grid, fuzzed = (_share(n, shape, shapes) for n in (amount.grid, amount.fuzzed))
    kinds = rng.sample(KINDS, len(KINDS))
    lengths = [[n for n in some if n <= amount.grid_longest] for some in (LONG, EDGES)]
    jobs: list[Job] = []
    for n in range(grid):
        case = _case(kinds[n % len(kinds)], shape, amount, rng, lambda: rng.choice(rng.choice(lengths)))
        jobs.append(Job("oracle", case, by))
    for _ in range(fuzzed):
        case = _case(rng.choice(pool), shape, amount, rng, lambda: rng.randint(1, amount.fuzzed_longest))
        jobs.append(Job("oracle", case, by, fuzzed=True))
    if shape.weight > 1:
        jobs += _properties(shape, amount, by, rng)
    yield from rng.sample(jobs, len(jobs))


def _properties(shape: Shape, amount: Amount, by: tuple[Runner, ...], rng: random.Random) -> Iterator[Job]:
    def case(*masks: str) -> Case:
        found = _case(rng.choice(masks), shape, amount, rng, lambda: rng.choice(EDGES[4:16]))
        found = replace(found, scale=None, layout=rng.choice(LAYOUTS))
        return replace(found, kv_heads=found.q_heads) if found.mask == "empty_columns" else found

    # the dense reference leaves the order of its sums to matrix products of torch
    own = tuple(r for r in by if r.backend != "reference")
    for n in range(amount.properties):
        yield Job("unused_keys_reach_nothing", case(*UNUSED_KEYS), by, (SPECIAL[n % 3],))
        yield Job("unused_queries_reach_nothing", case(*UNUSED_QUERIES), by, (SPECIAL[n % 3],))
        yield Job("emptied_rows_leave_the_others", case("random"), by)
        yield Job("forms_of_a_mask_agree", case("causal"), by)
        yield Job("repeats", case(*KINDS), own, (amount.repeats,))
        yield Job("a_sample_alone", case(*KINDS), own)
        if n % 4 == 0 and shape.head_dim >= 16:
            yield Job("growing_scores", case("causal_lower_right", "random", "none", "documents"), by)
            yield Job("high_hidden_scores", case("random", "none", "documents"), by)


def _others(
    amount: Amount, by: tuple[Runner, ...], shapes: Sequence[Shape], pool: list[str], rng: random.Random
) -> Iterator[Job]:
    """What depends on no head_dim, or on one: packing, far scores, memory, arguments."""
    own = tuple(r for r in by if r.backend != "reference")
    jobs: list[Job] = []
    for n in range(amount.packing):
        mask = KINDS[n % len(KINDS)] if n % 2 else rng.choice(pool)
        case = _case(mask, shapes[0], amount, rng, lambda: rng.choice((*EDGES, *rng.choices(range(1, 700), k=20))))
        jobs.append(Job("packing", case))
    for remainder in rng.sample(range(128), amount.remainders):
        for shift in SHIFTS:
            shape = rng.choice(shapes[:2])
            mask = rng.choice(("none", "causal", "random", "documents"))
            sizes = 128 + remainder, 128 + remainder, shape.head_dim, shape.dtype, shape.v_dim
            jobs.append(Job("far_from_zero", Case(mask, *sizes, seed=remainder), own, (shift,)))
    for shape in shapes[:2]:
        case = Case("row", amount.memory, amount.memory, shape.head_dim, shape.dtype, shape.v_dim, 1)
        jobs.append(Job("memory", case, tuple(r for r in own if not r.deterministic)))
    step = 100
    jobs += [
        Job("arguments", Case("none", 1, 1), args=(first, min(first + step, amount.arguments)))
        for first in range(0, amount.arguments, step)
    ]
    yield from rng.sample(jobs, len(jobs))
