"""Tiles as blocks of columns: their loads, and the products of a warpgroup with them.

A block's width is a power of two, and a head_dim of 192 is three blocks of 64. Blocks of a tile follow each other in a
buffer: block c of stage s is the buffer's element `s * blocks + c`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from anymask.backends.hopper.kernels.compat import tma_load, tma_store
from anymask.backends.hopper.kernels.words import ROWS


@gluon.jit
def load_blocks(desc, sample, head, row, full, bufs, stage, BLOCKS: gl.constexpr):
    """Load the rows of a descriptor's block from `row` on, all BLOCKS blocks of columns of them."""
    WIDTH: gl.constexpr = desc.block_type.shape[3]
    for c in gl.static_range(BLOCKS):
        tma_load(desc, [sample, head, row, c * WIDTH], full, bufs.index(stage * BLOCKS + c))


@gluon.jit
def block_at(bufs, index):
    """One block `[rows, width]` of `bufs [blocks, 1, 1, rows, width]`."""
    return bufs.index(index).reshape([bufs.shape[3], bufs.shape[4]])


@gluon.jit
def blocks_at(bufs, stage, BLOCKS: gl.constexpr):
    """The blocks of a stage, as a tuple."""
    blocks = [block_at(bufs, stage * BLOCKS)]
    for c in gl.static_range(1, BLOCKS):
        blocks = blocks + [block_at(bufs, stage * BLOCKS + c)]
    return blocks


@gluon.jit
def issue_scores(a, b_bufs, stage):
    """Issue `a @ b.T`, `[ROWS, rows of b]`, without waiting for it: the products of all blocks add up."""
    N: gl.constexpr = b_bufs.shape[3]
    BLOCKS: gl.constexpr = len(a)
    s = gl.zeros([ROWS, N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    for c in gl.static_range(BLOCKS):
        b = block_at(b_bufs, stage * BLOCKS + c)
        s = warpgroup_mma(a[c], b.permute((1, 0)), s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def issue_sums(p, b_bufs, stage, acc):
    """Issue `acc + p @ b`, a product for each block of `acc`, without waiting for it."""
    BLOCKS: gl.constexpr = len(acc)
    flying = [warpgroup_mma(p, block_at(b_bufs, stage * BLOCKS), acc[0], is_async=True)]
    for c in gl.static_range(1, BLOCKS):
        flying = flying + [warpgroup_mma(p, block_at(b_bufs, stage * BLOCKS + c), acc[c], is_async=True)]
    return flying


@gluon.jit
def wait_sums(flying, p):
    """Wait for all products: what `issue_sums` issued, and the left operand that they shared."""
    gl.static_assert(len(flying) <= 3)
    if len(flying) == 1:
        a, p = warpgroup_mma_wait(0, deps=[flying[0], p])
        acc = [a]
    elif len(flying) == 2:
        a, b, p = warpgroup_mma_wait(0, deps=[flying[0], flying[1], p])
        acc = [a, b]
    else:
        a, b, c, p = warpgroup_mma_wait(0, deps=[flying[0], flying[1], flying[2], p])
        acc = [a, b, c]
    return acc, p


@gluon.jit
def store_rows(desc, buf, x, scale, sample, head, group, row, HEAD_DIM: gl.constexpr):
    """Store `x [ROWS, HEAD_DIM]` of a query head of a group, times `scale` unless it is None, for its kv head.

    It goes through `buf`, once what that held before is read.
    """
    tma.store_wait(0)
    if scale is not None:
        x *= scale
    buf.reshape([ROWS, HEAD_DIM]).store(x.to(desc.dtype))
    fence_async_shared()
    tma_store(desc, [sample, head // group, row, 0], buf)
