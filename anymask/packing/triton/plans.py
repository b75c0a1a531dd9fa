"""What packing launches, worked out once for all masks of a kind (`anymask.plan`).

A kind is what launches depend on: the structure of a mask, its numbers, lengths and planes, and of its tensors all but
values and addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from anymask.block_mask.parts import sizes_of, starts_of
from anymask.launch import int_key, tensor_key
from anymask.mask.expr import TileGrid
from anymask.packing.triton.kernels.bits import LAUNCH
from anymask.packing.triton.kernels.tiles import copy_kernel, dense_kernel, tiles_kernel, words_kernel
from anymask.packing.triton.lists import Workspace, fill, scan, workspace_for
from anymask.packing.triton.program import MaskProgram, mask_program, packed_program, prepare
from anymask.plan import Plan, launch
from anymask.tiles import TILE, WORDS

# kinds of masks that are remembered, by name, dense and packed ones each
MAX_PLANS = 128
# kv tiles that a program classifies: one a thread, or its warps would repeat each other's work; those that stay
# undecided it evaluates one after the other
SPAN = 256
# rows of a tile that a program evaluates at a time: few, as a deep expression has many values at once in registers
STRIP = 32
# the same of the words of a tile, its warps, and tiles of a column that they look at together
WORDS_STRIP, WORDS_WARPS, WORDS_SPAN = 64, 8, 256

# shape (None where launches do not depend on it), strides, dtype and address modulo 16
Kind: TypeAlias = "tuple[Sequence[int] | None, tuple[int, ...], torch.dtype, int]"


class Steps(NamedTuple):
    """How masks of a kind are packed. Between the first plan and the others the host waits for the totals."""

    # of (a tensor on the device, an answer, tensors of the mask): the memory of `work`, and what `words` reads of them
    look: Plan
    # of (memory, lists, tile_rows)
    fill: Plan
    # of (memory, lists, tile_rows, words of both views, how many programs, what `look` gave beside the memory)
    words: Plan
    work: Workspace
    # where the lists of tiles begin in `lists`
    tiles_start: int


def kind_of(t: Tensor) -> Kind:
    """Of a tensor of a mask."""
    return t.shape, t.stride(), t.dtype, t.data_ptr() % 16


@lru_cache(maxsize=MAX_PLANS)
def of_expression(
    nodes: tuple[int, ...],
    numbers: tuple[int, ...],
    planes: tuple[int, int],
    q_len: int,
    kv_len: int,
    device: torch.device,
    *kinds: Kind,
) -> Steps | None:
    """Of a `Program` whose tensors kernels can read; None if only torch can evaluate it."""
    look, grid = Plan(device), TileGrid(q_len, kv_len, device)
    like, answer = _first_operands(look, planes)
    program = mask_program(nodes, numbers, [look.operand(*kind) for kind in kinds], grid)
    return None if program is None else _of_program(look, like, answer, program, planes, grid)


@lru_cache(maxsize=MAX_PLANS)
def of_packed(planes: tuple[int, int], q_len: int, kv_len: int, device: torch.device, *kinds: Kind) -> Steps:
    """Of kinds of tiles, places of partial ones and their words; see `packed_program`."""
    look, grid = Plan(device), TileGrid(q_len, kv_len, device)
    like, answer = _first_operands(look, planes)
    program = packed_program(*[look.operand(*kind) for kind in kinds])
    return _of_program(look, like, answer, program, planes, grid)


@lru_cache(maxsize=MAX_PLANS)
def of_dense(q_len: int, kv_len: int, device: torch.device, kind: Kind) -> Steps:
    """Of a tensor `[mask_batch, mask_heads, q_len, kv_len]`; `look` gives the words of all tiles, where partial."""
    shape, strides, *_ = kind
    assert shape is not None
    look, grid = Plan(device), TileGrid(q_len, kv_len, device)
    like, answer = _first_operands(look, (shape[0], shape[1]))
    tensor = look.operand(*kind)
    work = workspace_for(like, shape[0], shape[1], grid)
    prepare(work)
    tiles = work.n_rows * grid.kv_tiles
    all_words = like.new_empty(2, tiles, TILE, WORDS, dtype=torch.int32)
    if tiles:
        align = alignment(tensor, kv_len)
        launch(
            dense_kernel,
            (tiles, 1, 1),
            (tensor, work.memory, all_words, strides, *work.starts, shape[1], *_shape(grid), work.n_rows, work.n_cols),
            {"ALIGN": align},
            (work.key, tensor_key(tensor), *map(int_key, strides)),
            num_warps=1 if align > 1 else 8,
            **LAUNCH,
        )
    scan(work, answer)
    look.finish((work.memory, all_words))
    words, start = Plan(device), _tiles_start(work)
    memory, lists, tile_rows, both, programs = _operands_of_words(words)
    launch(
        copy_kernel,
        (programs, 1, 1),
        (memory, lists, tile_rows, words.operand(None, (1,), torch.int32, 0), both, start, tiles, *_shape(grid)[2:]),
        {},
        work.key,
        num_warps=1,
        **LAUNCH,
    )
    return Steps(look, _fill(work), words, work, start)


def forget() -> None:
    """Drop all plans."""
    for cached in (of_expression, of_packed, of_dense):
        cached.cache_clear()


def alignment(t: Any, kv_len: int) -> int:
    """`ALIGN` of `load_words_t`."""
    *strides, last = t.stride()
    if t.element_size() != 1 or last != 1:
        return 1
    together = t.data_ptr() | kv_len
    for stride in strides:
        together |= stride
    return 16 if together % 16 == 0 else 4 if together % 4 == 0 else 1


def _of_program(
    look: Plan, like: Any, answer: Any, program: MaskProgram, planes: tuple[int, int], grid: TileGrid
) -> Steps:
    work = workspace_for(like, *planes, grid, program.n_extremes)
    prepare(work, program)
    key, heads, n_rows, n_cols = (work.key, program.key), planes[1], work.n_rows, work.n_cols
    if n_rows * n_cols:
        launch(
            tiles_kernel,
            (n_rows * -(-grid.kv_tiles // SPAN), 1, 1),
            (*_mask(program, work.memory), work.memory, *work.starts, heads, *_shape(grid), n_rows, n_cols),
            {"nodes": program.nodes, "STRIP": STRIP, "SPAN": SPAN},
            key,
            num_warps=8,
            **LAUNCH,
        )
    scan(work, answer)
    look.finish((work.memory, *program.tensors))
    words, start = Plan(look.device), _tiles_start(work)
    memory, lists, tile_rows, both, programs = _operands_of_words(words)
    read = [t.like(words) for t in program.tensors]
    launch(
        words_kernel,
        (programs, 1, 1),
        (
            *_mask(program._replace(tensors=tuple(read)), memory),
            *(memory, lists, tile_rows, both, start, heads, *_shape(grid), n_rows, n_cols),
        ),
        {"nodes": program.nodes, "STRIP": WORDS_STRIP, "SPAN": WORDS_SPAN},
        key,
        num_warps=WORDS_WARPS,
        **LAUNCH,
    )
    return Steps(look, _fill(work), words, work, start)


def _mask(program: MaskProgram, memory: Any) -> tuple[Any, ...]:
    """`MaskArgs`; no launch sees an empty tuple."""
    return program.numbers, program.tensors or (memory,), program.layouts


def _fill(work: Workspace) -> Plan:
    plan = Plan(work.grid.device)
    memory, lists, tile_rows = (plan.operand(None, (1,), torch.int32, 0) for _ in range(3))
    fill(work._replace(memory=memory), lists, tile_rows)
    return plan


def _first_operands(plan: Plan, planes: tuple[int, int]) -> tuple[Any, Any]:
    """A tensor on the device, of which others are made, and the answer."""
    return plan.operand((*planes, 0), (1, 1, 1), torch.uint8, 0), plan.operand((4,), (1,), torch.int32, 0)


def _operands_of_words(plan: Plan) -> tuple[Any, ...]:
    """The memory of the workspace, lists, tile_rows, words, and how many programs."""
    return *(plan.operand(None, (1,), torch.int32, 0) for _ in range(4)), plan.count()


def _tiles_start(work: Workspace) -> int:
    return starts_of(sizes_of(work.n_rows, work.n_cols, 0, 0))[6]


def _shape(grid: TileGrid) -> tuple[int, int, int, int]:
    return grid.q_len, grid.kv_len, grid.q_tiles, grid.kv_tiles
