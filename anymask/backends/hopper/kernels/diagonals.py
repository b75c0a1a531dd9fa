"""Sums of ds by distance, the gradient of a table, on the way of the backward kernel; docs/kernels.md, section 5.

A block of 64 keys and 64 queries has 127 diagonals. A consumer warpgroup writes their sums as a run of 128 floats, the
one of `key - query = i - 64` at i, and `_table_kernel` adds the runs of all blocks.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.backends.hopper.kernels import ptx
from anymask.backends.hopper.kernels.compat import reinterpret
from anymask.backends.hopper.kernels.pipeline import TILE
from anymask.backends.hopper.kernels.scheduler import list_index

# sums of a run, and keys or queries of its block
RUN, BLOCK = gl.constexpr(128), gl.constexpr(64)


@gluon.jit
def first_runs(term_sums, column, schedule, G: gl.constexpr):
    """Where consumer warpgroup G writes the first run of a column: a pointer for each of its sums, as it holds them.

    Those of a tile are 2 x 2 runs, by the halves of queries, then of keys.
    """
    sizes, strides = schedule.sizes, schedule.plane_strides
    lists_before = column.full_begin + column.partial_begin
    # without a mask there are no lists, and all tiles
    first = lists_before if schedule.lists.words is not None else column.tile * sizes.q_tiles
    # which of those that share a plane of the mask this head is
    copies = gl.where(strides.head == 0, sizes.kv_heads * sizes.group, 1)
    copy = column.sample * (strides.sample == 0) * copies + column.head * (strides.head == 0)
    at = gl.arange(0, RUN, layout=gl.SliceLayout(0, gl.SliceLayout(1, _sums_layout(2))))
    # a thread of row r, and of place c in its quad, has a diagonal of 8 that is r - 2 c modulo 8
    at = (at & ~7) + ((at - (at // 8 & 3) * 2) & 7)
    return term_sums.runs + (copy.to(gl.int64) * term_sums.n_tiles + first) * (4 * RUN) + (G * RUN + at)


@gluon.constexpr_function
def _sums_layout(blocks):
    """The layout `[blocks, warps, RUN]` in which a thread adds up what warps have."""
    return gl.BlockedLayout([blocks, 4, 1], [1, 1, 32], [1, 1, 4], [2, 1, 0])


@gluon.jit
def store_runs(first, ds, buf, column, step, start_q, cfg: gl.constexpr):
    """Write the runs of `ds [64, BLOCK_M]`, 64 keys of a consumer warpgroup and the queries of a step of a column.

    `first`: of `first_runs`; `start_q`: the step's first query. `buf` holds the runs between warps.
    """
    BLOCKS: gl.constexpr = cfg.BLOCK_M // BLOCK
    N: gl.constexpr = ptx.DIAGONAL_ELEMENTS
    keys = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, ds.type.layout)).expand_dims(1)
    found = gl.inline_asm_elementwise(
        ptx.diagonal_sums_asm(), ptx.diagonal_sums_operands(), [ds, keys], dtype=gl.int32, is_pure=True, pack=N
    )
    # [warp, row of a thread, row, block, 8 columns, thread of a quad, column]: of the 8 columns one has what is not 0,
    # and no addition is left
    found = gl.sum(found.reshape([4, 2, 8, BLOCKS, 8, 4, 2]), 4)
    found = found.permute((3, 0, 1, 5, 4, 2)).reshape([BLOCKS, 4, RUN]).to(gl.float32, bitcast=True)
    of_warps = reinterpret(buf, gl.float32, [BLOCKS, 4, RUN], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    of_warps.store(found)
    sums = gl.sum(of_warps.load(_sums_layout(BLOCKS)), 1)
    LAYOUT: gl.constexpr = sums.type.layout
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, LAYOUT)) + _block(column, step, start_q, cfg)
    first = gl.convert_layout(first, gl.SliceLayout(0, LAYOUT), assert_trivial=True)
    gl.store(first.expand_dims(0) + block.expand_dims(1) * (2 * RUN), sums)


@gluon.jit
def _block(column, step, start_q, cfg: gl.constexpr):
    """Which block of queries of a column is a step's first: of its tiles, partial ones first, or of all queries."""
    block = step * (cfg.BLOCK_M // BLOCK)
    if cfg.IN_TURN:
        if cfg.HAS_MASK:
            j, n_partial = step // (TILE // cfg.BLOCK_M), column.n_partial
            if j < n_partial:
                tile = list_index(j, n_partial, column.tile, True)
            else:
                tile = n_partial + list_index(j - n_partial, column.n_full, column.tile, True)
            block += (tile - j) * (TILE // BLOCK)
        else:
            block = start_q // BLOCK
    return block


@triton.jit(
    do_not_specialize=["q_tiles"],
    do_not_specialize_on_alignment=["full_offsets", "full_tiles", "partial_offsets", "partial_tiles"],
)
def _number_kernel(full_offsets, full_tiles, partial_offsets, partial_tiles, out, q_tiles, SIZE: tl.constexpr):
    """Writes one column of int32 `out [planes * kv tiles, q tiles]`: which of all tiles one is, -1 of an empty one.

    Columns follow each other, and partial tiles come first in each. Grid: (columns of all planes).
    """
    column = tl.program_id(0)
    out += column.to(tl.int64) * q_tiles
    partial, full = tl.load(partial_offsets + column), tl.load(full_offsets + column)
    partial_end, full_end = tl.load(partial_offsets + column + 1), tl.load(full_offsets + column + 1)
    at = tl.arange(0, SIZE)
    for start in range(0, q_tiles, SIZE):
        tl.store(out + start + at, -1, mask=start + at < q_tiles)
    # other threads write the same places
    tl.debug_barrier()
    for start in range(partial, partial_end, SIZE):
        tile = tl.load(partial_tiles + start + at, mask=start + at < partial_end)
        tl.store(out + tile, full + start + at, mask=start + at < partial_end)
    for start in range(full, full_end, SIZE):
        tile = tl.load(full_tiles + start + at, mask=start + at < full_end)
        tl.store(out + tile, partial_end + start + at, mask=start + at < full_end)


@triton.jit(do_not_specialize=["n_tiles", "sample_planes", "head_planes", "q_heads", "batch", "q_len", "kv_len"])
def _table_kernel(
    sums,
    numbers,
    out,
    n_tiles,
    sample_planes,
    head_planes,
    q_heads,
    batch,
    q_len,
    kv_len,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes 64 entries of `out [q_heads, q_len + kv_len - 1]`: the sum of all runs, samples one after the other.

    Grid: (blocks of 64 queries and keys, q_heads). `numbers`, None without a mask: as `_number_kernel`
    writes them.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    q_tiles, kv_tiles = (q_len + TILE - 1) // TILE, (kv_len + TILE - 1) // TILE
    PARTS: tl.constexpr = TILE // BLOCK
    q_blocks, kv_blocks = q_tiles * PARTS, kv_tiles * PARTS
    at = tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for half in tl.static_range(2):
        # of all blocks of keys and of queries that are so far apart, the first or the second half of their runs
        apart = block - q_blocks + 1 - half
        first, last = tl.maximum(0, -apart), tl.minimum(q_blocks, kv_blocks - apart)
        for sample in range(batch):
            # which of those that share a plane of the mask this head is
            copy = sample * (sample_planes == 0) * tl.where(head_planes == 0, q_heads, 1) + head * (head_planes == 0)
            plane = sample * sample_planes + head * head_planes
            for start in range(first, last, ROWS):
                q_block = start + tl.arange(0, ROWS)
                kv_block, exists = q_block + apart, q_block < last
                number = kv_block // PARTS * q_tiles + q_block // PARTS
                if numbers is not None:
                    place = plane.to(tl.int64) * (kv_tiles * q_tiles) + number
                    number = tl.load(numbers + place, mask=exists, other=-1)
                run = ((copy.to(tl.int64) * n_tiles + number) * PARTS + q_block % PARTS) * PARTS + kv_block % PARTS
                offs = run[:, None] * (2 * BLOCK) + (half * BLOCK + at)[None, :]
                acc += tl.load(sums + offs, mask=(exists & (number >= 0))[:, None], other=0.0)
    # entry 0 of a table is of the first query and the last key
    place = q_tiles * TILE + kv_len - 1 - block * BLOCK - at
    n = q_len + kv_len - 1
    tl.store(out + head * n + place, tl.sum(acc, 0), mask=(place >= 0) & (place < n))
