"""What both kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# queries and keys of a tile
TILE = gl.constexpr(128)


@gluon.jit
def exp2(x):
    """2**x in one instruction; denormals are 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def barriers(depth: gl.constexpr, arrivals: gl.constexpr):
    """`depth` barriers in shared memory, each complete after `arrivals` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [depth, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(depth):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars
