"""Pipelines in shared memory: stages, each with a full and an empty barrier, that work passes through in a ring."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from anymask import tiles

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
