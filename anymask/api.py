"""`attention` and its stand-ins: validate, fill defaults, call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from anymask import backends, ops
from anymask.block_mask import BlockMask
from anymask.mask import Mask, causal
from anymask.mask.builders import dense, from_dense
from anymask.mask.program import program_of
from anymask.packing import pack
from anymask.shapes import LSE, K, O, Q, V
from anymask.tiles import TILE

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# dense mask tensor -> {(version, q_len, kv_len): BlockMask}; an entry dies with its tensor
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@overload
def attention(
    q: Q,
    k: K,
    v: V,
    mask: Tensor | Mask | BlockMask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: Literal[False] = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> O: ...
@overload
def attention(
    q: Q,
    k: K,
    v: V,
    mask: Tensor | Mask | BlockMask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: Literal[True],
    deterministic: bool | None = None,
    backend: str | None = None,
) -> tuple[O, LSE]: ...
def attention(
    q: Q,
    k: K,
    v: V,
    mask: Tensor | Mask | BlockMask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> O | tuple[O, LSE]:
    """`softmax(scale * q @ k^T where mask, -inf elsewhere) @ v`, differentiable in q, k, v, exact under any mask.

    A query with no key gives 0 and receives and gives no gradient. A NaN or Inf in a key or value that no query of a
    plane may attend to reaches no output; one that some queries may attend to can reach the others too.

    Args:
        q: `[batch, q_heads, q_len, head_dim]`, fp16, bf16, fp32 (IEEE products, no TF32) or fp64; any strides, but a
            last dimension that is not dense costs one copy of that tensor.
        k: `[batch, kv_heads, kv_len, head_dim]`; `kv_heads` divides `q_heads` (GQA, MQA).
        v: `[batch, kv_heads, kv_len, v_dim]`.
        mask: None; a bool tensor broadcastable to `[batch, q_heads, q_len, kv_len]`, True = attend, packed on first use
            and cached by identity and version (writes that bypass the version counter, such as through `.data` or
            NumPy, are not seen; tensors made in inference mode have no version and are packed each time); a `Mask`,
            remembered if it holds no tensor, as `causal()`, else packed each time; or a `BlockMask` from `pack`, with
            which the call never synchronises with the host.
        scale: factor of the scores, finite; default `1 / sqrt(head_dim)`.
        is_causal: the same as `mask=causal()`, upper-left aligned; excludes `mask`.
        return_lse: also return the log-sum-exp of the scaled scores, differentiable.
        deterministic: whether gradients must be bit-equal from run to run; None asks
            `torch.are_deterministic_algorithms_enabled()` when they are computed. Only `hopper` needs to be asked:
            its backward pass then takes up to a third longer.
        backend: a name of `anymask.backends.NAMES`, which raises if it cannot run the call; None takes the first that
            can. `explain` says which.

    Returns:
        `o [batch, q_heads, q_len, v_dim]` in the dtype of q; with `return_lse` also `lse [batch, q_heads, q_len]`,
        natural log, fp32, -inf where a query has no key.

    Raises:
        ValueError: shape, dtype, device, scale, mask or backend that does not fit, naming it and what is allowed.
        TypeError: an argument of the wrong type.

    FlashAttention-2 (Dao, 2023) over the non-empty 128 x 128 tiles of the mask; equations in docs/kernels.md.

    >>> import torch
    >>> q = k = v = torch.randn(1, 2, 5, 16)
    >>> attention(q, k, v, torch.rand(5, 5) < 0.5).shape
    torch.Size([1, 2, 5, 16])
    """
    q, k, v = _autocast(q, k, v)
    scale = _check_call(q, k, v, scale, is_causal, mask, return_lse, deterministic)
    backends.check_name(backend)
    block_mask = _block_mask(q, k, causal() if is_causal else mask)
    rest = scale, backend, bool(deterministic)
    if torch.compiler.is_compiling():
        o, lse = ops.forward(q, k, v, ops.mask_tensors(block_mask), *rest)
    else:
        o, lse = ops.attend(q, k, v, block_mask, *rest)
    return (o, lse) if return_lse else o


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` under the same signature, by `attention`.

    Args:
        query, key, value: 2 to 4 dimensions, `[..., length, dim]`.
        attn_mask: None or a bool tensor, True = attend, broadcastable to the scores.
        dropout_p: 0.0.
        is_causal: upper-left aligned; excludes `attn_mask`.
        scale: default `1 / sqrt(head_dim)`.
        enable_gqa: allow fewer key and value heads than query heads.

    Raises:
        ValueError: what `attention` raises, and for what it does not do: dropout, a float mask, 5 or more dimensions,
            head counts that differ without `enable_gqa`.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, t)
        if t.dim() != query.dim() or not 2 <= t.dim() <= 4:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; allowed are 2 to 4 dimensions, as many as query, which has "
                f"shape {tuple(query.shape)}"
            )
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p is {dropout_p}; allowed is 0.0")
    if not enable_gqa and query.dim() > 2 and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"query has {query.shape[-3]} heads and key has {key.shape[-3]}; allowed are equal counts, "
            "or enable_gqa=True"
        )
    lead = (None,) * (4 - query.dim())
    o = attention(query[lead], key[lead], value[lead], attn_mask, is_causal=is_causal, scale=scale)
    return o.view(*query.shape[:-1], value.shape[-1])


def flash_attention_custom_mask(q: Q, k: K, v: V, mask: Tensor | None = None, sm_scale: float | None = None) -> O:
    """Attention under a tensor mask, with the call of the package `flashattention2-custom-mask`.

    Args:
        q, k, v: as in `attention`.
        mask: any dtype, non-zero = attend, broadcastable to `[batch, heads, q_len, kv_len]`, on the device of q.
        sm_scale: factor of the scores; None means `1 / sqrt(head_dim)`.

    Returns:
        `o [batch, heads, q_len, v_dim]` in the dtype of q. Rows with no key are 0.

    Raises:
        ValueError, TypeError: as `attention`.
    """
    q, k, v = _autocast(q, k, v)
    sm_scale = _check_call(q, k, v, sm_scale, False, None, False, None, scale_name="sm_scale")
    if mask is not None:
        _check_tensor("mask", mask)
    return attention(q, k, v, _block_mask(q, k, mask, any_dtype=True), scale=sm_scale)


@dataclass(frozen=True)
class Explanation:
    """What `attention` would do with a call, and why. `print` it."""

    # name of the backend that runs
    backend: str
    # every backend that cannot run, with its reason
    not_chosen: dict[str, str]
    # all tiles of the planes stored: empty, partial, full; None without a mask
    tiles: tuple[int, int, int] | None
    # share of attended pairs
    density: float
    # bytes of the packed mask, and of the same planes as one byte a pair
    mask_bytes: int
    dense_bytes: int
    # multiply-adds count 2: forward over attended pairs, forward over the tiles that are visited
    pair_flops: int
    tile_flops: int

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.not_chosen.items()]
        if self.tiles is None:
            lines.append("mask: none, every pair attends")
        else:
            empty, partial, full = self.tiles
            lines.append(f"tiles of 128 x 128: {empty} empty (skipped), {partial} partial, {full} full")
            lines.append(
                f"mask: {self.density:.1%} of pairs, {self.mask_bytes:,} bytes packed, {self.dense_bytes:,} dense"
            )
        lines.append(
            f"forward: {self.pair_flops:.3e} FLOP over attended pairs, {self.tile_flops:.3e} over visited tiles"
        )
        return "\n".join(lines)


def explain(
    q: Q,
    k: K,
    v: V,
    mask: Tensor | Mask | BlockMask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which backend `attention` would run with these arguments, why not the others, and what the mask costs.

    Packs the mask and reads it back, so it synchronises with the host. Raises what `attention` raises.
    """
    q, k, v = _autocast(q, k, v)
    _check_call(q, k, v, scale, is_causal, mask, False, None)
    block_mask = _block_mask(q, k, causal() if is_causal else mask)
    name = backends.choose(q, k, v, block_mask, backend).__name__.rpartition(".")[2]
    reasons = backends.reasons(q, k, v, block_mask)
    not_chosen = {n: r or f"{name} was preferred" for n, r in reasons.items() if n != name}
    per_pair = 2 * (q.shape[3] + v.shape[3])
    pairs = math.prod(q.shape[:3]) * k.shape[2]
    if block_mask is None:
        return Explanation(name, not_chosen, None, 1.0, 0, 0, pairs * per_pair, pairs * per_pair)
    density = block_mask.density()
    planes = block_mask.batch * block_mask.heads
    _, partial, full = block_mask.tile_counts
    repeats = q.shape[0] * q.shape[1] // planes if planes else 0
    return Explanation(
        name,
        not_chosen,
        block_mask.tile_counts,
        density,
        block_mask.nbytes,
        planes * q.shape[2] * k.shape[2],
        round(pairs * density) * per_pair,
        (partial + full) * TILE * TILE * repeats * per_pair,
    )


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the dtype of an enclosing `torch.autocast`, as torch's own attention has it; fp64 is left alone."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, t)
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v))
    return q, k, v


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed is a torch.Tensor")


def _check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    is_causal: bool,
    mask: Any,
    return_lse: bool,
    deterministic: bool | None,
    scale_name: str = "scale",
) -> float:
    """The scale to use, once every argument but the mask's shape is known to fit."""
    _check_qkv(q, k, v)
    for name, flag in (("is_causal", is_causal), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {flag!r} of type {type(flag).__name__}; allowed is a bool")
    if deterministic is not None and not isinstance(deterministic, bool):
        raise TypeError(f"deterministic is {deterministic!r}; allowed are None and a bool")
    if is_causal and mask is not None:
        raise ValueError("is_causal is True and mask is given; allowed is one of them: pass mask=causal() & ...")
    if scale is None:
        return 1 / math.sqrt(q.shape[3])
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{scale_name} is a {type(scale).__name__}; allowed are None and a float")
    if not math.isfinite(scale):
        raise ValueError(f"{scale_name} is {scale}; allowed are finite numbers")
    return float(scale)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError for the first property of q, k, v that does not fit."""
    # each attribute is made anew whenever it is read, at a cost that small calls notice
    q_shape, k_shape, v_shape, dtype, device = q.shape, k.shape, v.shape, q.dtype, q.device
    for name, t, shape in (("q", q, q_shape), ("k", k, k_shape), ("v", v, v_shape)):
        if len(shape) != 4:
            raise ValueError(
                f"{name} has shape {tuple(shape)}, {len(shape)} dimensions; allowed are 4, [batch, heads, length, dim]"
            )
        if t.dtype not in FLOATS:
            raise ValueError(f"{name} has dtype {t.dtype}; allowed are {', '.join(map(str, FLOATS))}")
    batch, q_heads, _, head_dim = q_shape
    kv_batch, kv_heads, kv_len, k_dim = k_shape
    for name, t, size in (("k", k, kv_batch), ("v", v, v_shape[0])):
        if t.dtype != dtype:
            raise ValueError(f"{name} has dtype {t.dtype} but q has {dtype}; allowed is one dtype for q, k and v")
        if t.device != device:
            raise ValueError(f"{name} is on {t.device} but q is on {device}; allowed is one device for q, k and v")
        if size != batch:
            raise ValueError(f"{name}.batch is {size} but q.batch is {batch}; allowed are equal sizes")
    for name, size, expected in (("heads", v_shape[1], kv_heads), ("length", v_shape[2], kv_len)):
        if size != expected:
            raise ValueError(f"v.{name} is {size} but k.{name} is {expected}; allowed are equal sizes")
    if k_dim != head_dim or head_dim == 0:
        raise ValueError(f"k.head_dim is {k_dim} but q.head_dim is {head_dim}; allowed are equal sizes from 1")
    if q_heads and (kv_heads == 0 or q_heads % kv_heads):
        raise ValueError(
            f"q has {q_heads} heads and k has {kv_heads}; allowed is a number of q heads that is a multiple of "
            "the number of k heads"
        )


def _block_mask(q: Tensor, k: Tensor, mask: Any, any_dtype: bool = False) -> BlockMask | None:
    """The mask packed for q and k, or None; a tensor's result is remembered."""
    if mask is None:
        return None
    q_len, kv_len = q.shape[2], k.shape[2]
    if isinstance(mask, BlockMask):
        if (mask.q_len, mask.kv_len) != (q_len, kv_len):
            raise ValueError(
                f"mask was packed for q_len={mask.q_len}, kv_len={mask.kv_len} but q and k have {q_len} and {kv_len}"
            )
        _check_planes((mask.batch, mask.heads), q)
        _check_device(mask.device, q)
        return mask
    lazy = mask if isinstance(mask, Mask) else dense(mask) if any_dtype else from_dense(mask)
    lazy.check(q_len, kv_len)
    _check_planes(lazy.planes, q)
    if isinstance(mask, Tensor):
        _check_device(mask.device, q)
    program = program_of(lazy)
    if program is not None and torch.compiler.is_compiling():
        return BlockMask.from_tensors(ops.pack_op(*program, q_len, kv_len, q.device), q_len, kv_len)
    # what a function has captured may change
    if program is not None and not program.tensors:
        return _pack_symbolic(lazy, q_len, kv_len, q.device)
    if not isinstance(mask, Tensor) or mask.is_inference():
        return pack(lazy, q_len=q_len, kv_len=kv_len, device=q.device)
    key = (mask._version, q_len, kv_len)
    known = _packed.get(mask)
    if known is None or key not in known:
        # older versions of the tensor can never be asked for again
        known = {k: m for k, m in (known or {}).items() if k[0] == mask._version}
        _packed[mask] = known | {key: _pack_to_keep(lazy, q_len, kv_len, q.device)}
    found: BlockMask = _packed[mask][key]
    return found


@lru_cache(maxsize=16)
def _pack_symbolic(mask: Mask, q_len: int, kv_len: int, device: torch.device) -> BlockMask:
    """A mask without tensors, such as `causal()`, is the same whenever it is asked for."""
    return _pack_to_keep(mask, q_len, kv_len, device)


def _pack_to_keep(mask: Mask, q_len: int, kv_len: int, device: torch.device) -> BlockMask:
    """`pack` for later calls, which may record gradients or run on another stream than this one."""
    with torch.inference_mode(False):
        packed = pack(mask, q_len=q_len, kv_len=kv_len, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return packed


def _check_planes(planes: tuple[int, int], q: Tensor) -> None:
    for dim, name in ((0, "batch"), (1, "q_heads")):
        if planes[dim] not in (1, q.shape[dim]):
            raise ValueError(
                f"mask has {planes[dim]} along {name} but q has {q.shape[dim]}; allowed are 1 and {q.shape[dim]}"
            )


def _check_device(device: torch.device, q: Tensor) -> None:
    if device != q.device:
        raise ValueError(f"mask is on {device} but q is on {q.device}; allowed is the device of q")
