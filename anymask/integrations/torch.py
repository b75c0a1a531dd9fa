"""`replace_sdpa()`, with which modules of torch run anymask's attention, and `sharded_attention` of DTensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anymask.api import attention
from anymask.backends import Backend
from anymask.block_mask import BlockMask
from anymask.drop_in import scaled_dot_product_attention
from anymask.mask import Mask
from anymask.packing import cache


@contextmanager
def replace_sdpa() -> Iterator[None]:
    """Within it `torch.nn.functional.scaled_dot_product_attention` is anymask's, for all threads.

    `nn.MultiheadAttention`, with `need_weights=False`, and `nn.TransformerEncoderLayer` call it, with their masks as
    floats of 0 and -inf. With weights the former computes all of it by itself. Their fast path, which has an attention
    of its own, is off meanwhile. Code that took the function by name before keeps torch's.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True)
    >>> with replace_sdpa():
    ...     layer(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """
    functional, mha = torch.nn.functional, torch.backends.mha
    before, fast = functional.scaled_dot_product_attention, mha.get_fastpath_enabled()
    setattr(functional, "scaled_dot_product_attention", scaled_dot_product_attention)  # noqa: B010
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before
        mha.set_fastpath_enabled(fast)


def sharded_attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Tensor | Mask | BlockMask | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: Backend | None = None,
) -> Any:
    """`attention` of DTensors that are sharded along the batch or the heads: each rank computes its own, with no word.

    A rule of DTensor cannot do it, as the tiles of a mask lie in lists that no dimension cuts.

    Args:
        q: `DTensor [batch, q_heads, q_len, head_dim]`; each dimension of its mesh is `Shard(0)`, `Shard(1)`, in equal
            parts, or `Replicate()`.
        k, v: `DTensor [batch, kv_heads, kv_len, dim]` with the mesh and the placements of q.
        mask: what `attention` takes, whole or the planes of this rank. A whole `BlockMask`, or `Mask` with planes, is
            cut at each call: cut it before the layers, `block_mask[i:j]` or `block_mask[:, i:j]`.
        is_causal, scale, return_lse, deterministic, backend: as in `attention`.

    Returns:
        `DTensor [batch, q_heads, q_len, v_dim]` with the placements of q; with `return_lse` also lse, sharded alike.

    Raises:
        TypeError: q, k or v is no DTensor. ValueError: meshes or placements that differ or are others, heads or samples
            that do not divide; or what `attention` raises.
    """
    from torch.distributed.tensor import DTensor

    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, DTensor):
            raise TypeError(f"{name} is a {type(t).__name__}; allowed is a DTensor")
        if (t.device_mesh, t.placements) != (q.device_mesh, q.placements):
            raise ValueError(f"{name} is placed as {t.placements} but q as {q.placements}; allowed is one placement")
        own = [_own_range(name, t, dim) for dim in (0, 1)]
        if name == "q":
            planes = own
    own_q, own_k, own_v = (t.to_local() for t in (q, k, v))
    o, lse = attention(
        own_q,
        own_k,
        own_v,
        _own_planes(mask, planes, q, k.shape[2]),
        is_causal=is_causal,
        scale=scale,
        return_lse=True,
        deterministic=deterministic,
        backend=backend,
    )
    o, lse = (DTensor.from_local(t, q.device_mesh, q.placements, run_check=False) for t in (o, lse))
    return (o, lse) if return_lse else o


def _own_range(name: str, t: Any, dim: int) -> range:
    """The samples, or the heads, of a DTensor that are on this rank."""
    from torch.distributed.tensor import Replicate, Shard

    start, size, mesh = 0, t.shape[dim], t.device_mesh
    for i, placement in enumerate(t.placements):
        if type(placement) not in (Shard, Replicate) or getattr(placement, "dim", 0) not in (0, 1):
            raise ValueError(f"{name} is placed as {t.placements}; allowed are Shard(0), Shard(1) and Replicate()")
        if placement != Shard(dim):
            continue
        if size % mesh.size(i):
            raise ValueError(f"{name} has {size} along {dim}, sharded by {mesh.size(i)}; allowed are multiples of it")
        size //= mesh.size(i)
        start += mesh.get_local_rank(i) * size
    return range(start, start + size)


def _own_planes(
    mask: Tensor | Mask | BlockMask | None, planes: list[range], q: Any, kv_len: int
) -> Tensor | Mask | BlockMask | None:
    """The part of a whole mask that belongs to planes of this rank; one that has no more than those as it is."""
    if isinstance(mask, Tensor):
        sizes = tuple(mask.shape[-4:-2])
    elif isinstance(mask, Mask):
        sizes = mask.planes
    elif isinstance(mask, BlockMask):
        sizes = mask.batch, mask.heads
    else:
        return mask
    whole = tuple(q.shape[:2])[2 - len(sizes) :]
    cuts = [
        slice(own.start, own.stop) if size == n and size > 1 else slice(None)
        for size, n, own in zip(sizes, whole, planes[2 - len(sizes) :], strict=True)
    ]
    if all(cut == slice(None) for cut in cuts):
        return mask
    if isinstance(mask, Mask):
        mask = cache.masks.pack(mask, q.shape[2], kv_len, q.device)
    cut: Tensor | BlockMask = mask[tuple(cuts)]
    return cut
