"""Pipelines in shared memory: stages, each with a full and an empty barrier, that work passes through in a ring.

A barrier is an mbarrier where the copy engine arrives. Where only warps do it may be one of the 16 of the hardware,
for which a warpgroup need not meet before it arrives.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from anymask import tiles
from anymask.backends.hopper.kernels import ptx

# queries and keys of a tile
TILE = gl.constexpr(tiles.TILE)


@gluon.jit
def allocate_barriers(stages: gl.constexpr, arrivals: gl.constexpr):
    """A barrier for each stage, complete after `arrivals` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(stages):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def stage_and_phase(step, STAGES: gl.constexpr):
    """The stage that the `step`-th use of a pipeline takes, and the parity of its barriers then."""
    step = step.to(gl.uint32)
    return (step % STAGES).to(gl.int32), (step // STAGES & 1).to(gl.int32)


@gluon.jit
def sync(barrier, WARPS: gl.constexpr):
    """Arrive at a hardware barrier and wait until `WARPS` warps, of several partitions, have arrived."""
    gl.inline_asm_elementwise(ptx.barrier("sync", WARPS), "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrive(barrier, WARPS: gl.constexpr):
    """Arrive at a hardware barrier of `WARPS` warps, and go on."""
    gl.inline_asm_elementwise(ptx.barrier("arrive", WARPS), "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def opaque(i):
    """`i`, an index that LLVM does not know to be the same elsewhere (docs/kernels.md, finding 13)."""
    return gl.inline_asm_elementwise(ptx.MOVE, "=r,r", [i], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def opaque_zero(step):
    """0, which the compiler does not know (docs/kernels.md, finding 2)."""
    return step >> 30
