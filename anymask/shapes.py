"""Every tensor shape named once; jaxtyping makes them types where it is installed, and tests/test_shapes.py checks."""

from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    Q: TypeAlias = Tensor
    K: TypeAlias = Tensor
    V: TypeAlias = Tensor
    O: TypeAlias = Tensor  # noqa: E741
    LSE: TypeAlias = Tensor
    Words: TypeAlias = Tensor
    TileBits: TypeAlias = Tensor
    TileKinds: TypeAlias = Tensor
else:
    try:
        from jaxtyping import Bool, Float, Int8, Int32
    except ImportError:
        Q = K = V = O = LSE = Words = TileBits = TileKinds = Tensor  # noqa: E741
    else:
        Q = Float[Tensor, "batch q_heads q_len head_dim"]
        K = Float[Tensor, "batch kv_heads kv_len head_dim"]
        V = Float[Tensor, "batch kv_heads kv_len v_dim"]
        O = Float[Tensor, "batch q_heads q_len v_dim"]  # noqa: E741
        LSE = Float[Tensor, "batch q_heads q_len"]
        Words = Int32[Tensor, "*rows 4"]
        TileBits = Bool[Tensor, "*rows 128"]
        TileKinds = Int8[Tensor, "mask_batch mask_heads q_tiles kv_tiles"]
