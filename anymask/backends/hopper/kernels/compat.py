"""The names that Gluon's copy engine and buffers go by in Triton 3.6 to 3.9; nothing else here knows a version."""

from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):  # 3.8
    tma_load, tma_store = tma.async_load, tma.async_store
else:
    tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

if hasattr(tma, "async_atomic_add"):  # 3.9
    tma_add = tma.async_atomic_add
else:
    from triton._C.libtriton import ir

    @builtin
    def tma_add(tensor_desc, coord, src, _semantic=None):
        """Add a tile of shared memory to global memory, element by element."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@builtin
def reinterpret(buf, dtype, shape, layout, _semantic=None):
    """The memory of a buffer as one of another type, shape and layout."""
    # public from 3.9 on
    method = buf.reinterpret if hasattr(buf, "reinterpret") else buf._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)
