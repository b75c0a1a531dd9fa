"""From what a mask means, a `Mask`, to what kernels read, a `BlockMask`."""

import torch
from torch import Tensor

from anymask.block_mask import BlockMask
from anymask.mask import Mask
from anymask.mask.arguments import check_natural
from anymask.mask.expr import TileGrid
from anymask.mask.leaves import Dense
from anymask.mask.parts import as_mask
from anymask.mask.program import is_mapped, program_of, refuse_mapped_functions
from anymask.packing.changes import extend as extend
from anymask.packing.changes import slice_queries as slice_queries
from anymask.packing.device import implementation
from anymask.tiles import TILE

# positions, also those of a last tile that is not whole, are int32 in kernels
LONGEST = 2**31 - TILE


def pack(
    mask: Mask | Tensor,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    device: torch.device | str | None = None,
) -> BlockMask:
    """The `BlockMask` of a mask. Pack once, use it in every layer and in the backward pass.

    Args:
        mask: a `Mask`, or a bool tensor broadcastable to `[batch, q_heads, q_len, kv_len]`. A tensor is read once;
            expanded (stride-0) dimensions are neither copied nor stored more than once.
        q_len, kv_len: lengths in tokens; for a tensor they default to its last two dimensions.
        device: of the result; defaults to the tensor's device, else the CPU.

    Returns:
        A `BlockMask` of 1 bit per pair of each partial tile, twice (by rows and by columns), plus lists of tiles.
        Temporary memory: one byte per tile, and a bounded chunk on the CPU and for functions, or on a GPU two bits per
        pair of a dense tensor.
        On a GPU it synchronises with the host once, for a function more often. There the first mask of each structure,
        whatever its numbers and tensors, compiles two kernels.
        Inside `torch.vmap`, of tensors that it maps: all slices packed at once, a mask for `attention` there alone.

    Raises:
        ValueError: dtype, rank or shape of a tensor that cannot be a mask of these lengths. TypeError: no mask at all.
        NotImplementedError: a function that reads what `torch.vmap` maps.
    """
    mask = as_mask(mask, "a bool tensor and a Mask")
    if isinstance(mask, Dense):
        q_len = mask.tensor.shape[-2] if q_len is None else q_len
        kv_len = mask.tensor.shape[-1] if kv_len is None else kv_len
        device = mask.tensor.device if device is None else device
    for name, value in (("q_len", q_len), ("kv_len", kv_len)):
        if value is None:
            raise ValueError(f"{mask!r} has no length, pass {name}=...")
        if check_natural(name, value) > LONGEST:
            raise ValueError(f"{name} is {value}; allowed are 0 and more tokens, up to {LONGEST}")
    assert q_len is not None
    assert kv_len is not None
    mask.check_once(q_len, kv_len)
    place = torch.device(device or "cpu")
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    grid = TileGrid(q_len, kv_len, place)
    if torch.compiler.is_compiling() or is_mapped(mask):
        # one operator of `anymask.mask_ops`, which compilers do not look into, and which has a rule for torch.vmap
        program = program_of(mask.to(place))
        assert program is not None
        return BlockMask(q_len, kv_len, *torch.ops.anymask.pack(*program, q_len, kv_len, place))
    refuse_mapped_functions(mask, grid)
    twin = implementation(place)
    if not torch.is_inference_mode_enabled():
        return twin.pack_mask(mask, grid)
    # tensors of inference mode could not be saved for a backward pass
    with torch.inference_mode(False):
        return twin.pack_mask(mask, grid)
