"""Marks of rows that one kernel leaves to another, which is launched whether there are any or not: nothing waits.

int32 `[planes, padded length / REDO_ROWS]`, 1 where the rows are to be done again.
"""

import triton
import triton.language as tl

# rows that share a mark
REDO_ROWS = tl.constexpr(16)


@triton.jit
def wants_redo(redo, plane, start, length, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Whether another kernel left any of the rows `start .. start + ROWS` of a plane to this one."""
    return tl.max(tl.load(_marks(redo, plane, start, length, ROWS, TILE)), 0) != 0


@triton.jit
def store_redo(redo, plane, start, length, is_right, ROWS: tl.constexpr, TILE: tl.constexpr, ADDS: tl.constexpr):
    """Mark rows `start .. start + ROWS` of a plane unless they are right or beyond its end; ADDS: keep marks there."""
    at = _marks(redo, plane, start, length, ROWS, TILE)
    mark = tl.where(is_right | (start >= length), 0, 1) + tl.zeros([ROWS // REDO_ROWS], tl.int32)
    if ADDS:
        mark |= tl.load(at)
    tl.store(at, mark)


@triton.jit
def _marks(redo, plane, start, length, ROWS: tl.constexpr, TILE: tl.constexpr):
    first = (plane.to(tl.int64) * ((length + TILE - 1) // TILE * TILE) + start) // REDO_ROWS
    return redo + first + tl.arange(0, ROWS // REDO_ROWS)
