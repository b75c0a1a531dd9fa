"""What `attention` and its stand-ins accept: every check of their arguments, and the sentences of their errors."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import _C, Tensor

from anymask.block_mask import BlockMask
from anymask.mask import Mask, causal, causal_lower_right
from anymask.mask.parts import as_mask, dense

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# a float mask with a smaller value is an additive one: BERT's holds -10000, others -1e9 or the least of a dtype
LEAST = -1e4

# keyword of another library -> what to do here
_ELSEWHERE = {
    **dict.fromkeys(("attn_mask", "attention_mask", "block_mask", "custom_mask"), "write mask=..., or bias=..."),
    **dict.fromkeys(("attn_bias", "position_bias"), "write bias=..., or mask=... of a bool tensor"),
    "alibi_slopes": "write bias=alibi(slopes)",
    **dict.fromkeys(("logits_soft_cap", "attn_logit_softcapping", "soft_cap"), "write softcap=..."),
    **dict.fromkeys(("s_aux", "attention_sinks", "sink"), "write sinks=..."),
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), "write scale=..."),
    "causal": "write is_causal=... or mask=causal()",
    **dict.fromkeys(("window_size", "window", "sliding_window"), "write mask=sliding_window(...)"),
    "cu_seqlens": "write mask=document(cu_seqlens=...)",
    "enable_gqa": "leave it out: k and v may have fewer heads than q",
    "dropout": "write dropout_p=...",
    "score_mod": "write bias=from_score_mod(score_mod); a mask_mod is mask=from_function(mask_mod)",
    **dict.fromkeys(("return_attn_probs", "return_softmax_lse", "return_aux"), "write return_lse=..."),
    "key_padding_mask": "write mask=key_padding(~key_padding_mask)",
    "mask_mod": "write mask=from_function(mask_mod)",
    **dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), "attention_varlen takes documents in a row"
    ),
    **dict.fromkeys(("need_weights", "output_attentions"), "leave it out: no kernel has the weights"),
    "kernel_options": "leave it out: tile sizes are chosen by shape",
}
_KEYWORDS = "mask, bias, scale, softcap, sinks, dropout_p, is_causal, return_lse, deterministic and backend"


def refuse_keywords(
    unknown: dict[str, Any], allowed: str = _KEYWORDS, others: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise TypeError for the first keyword that is not an argument; `others` are hints before those of `attention`."""
    for name in unknown:
        hint = others.get(name) or _ELSEWHERE.get(name)
        raise TypeError(f"{name} is no argument; " + (hint or f"allowed keywords are {allowed}"))


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the dtype of an enclosing `torch.autocast`, as torch's own attention has it; fp64 is left alone."""
    check_tensor("q", q)
    check_tensor("k", k)
    check_tensor("v", v)
    # torch raises for the device meta, which has no autocast
    if not _C._is_any_autocast_enabled() or q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v))
    return q, k, v


def check_tensor(name: str, value: Any) -> None:
    """Raise unless it is a tensor with sizes, strides and memory of its own."""
    if type(value) is Tensor and value.layout is torch.strided and not value.is_nested:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed is a torch.Tensor")
    if value.is_nested:
        raise ValueError(
            f"{name} is a nested tensor; allowed are dense ones: sequences in one row under mask=document(...), or "
            "padded under mask=key_padding(...)"
        )
    if value.layout is not torch.strided:
        raise ValueError(f"{name} has layout {value.layout}; allowed is torch.strided: pass {name}.to_dense()")


def check_call(
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
    watched = torch.compiler.is_compiling() or _C._len_torch_dispatch_stack()
    # of sizes that may be symbols nothing may be remembered
    check = _check_qkv if watched else _check_qkv_once
    check(q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device)
    if not (isinstance(is_causal, bool) and isinstance(return_lse, bool)):
        name, flag = ("return_lse", return_lse) if isinstance(is_causal, bool) else ("is_causal", is_causal)
        raise TypeError(f"{name} is {flag!r} of type {type(flag).__name__}; allowed is a bool")
    if deterministic is not None and not isinstance(deterministic, bool):
        raise TypeError(f"deterministic is {deterministic!r}; allowed are None and a bool")
    if is_causal and mask is not None:
        raise ValueError("is_causal is True and mask is given; allowed is one of them: pass mask=causal() & ...")
    if scale is None:
        # a number in a compiled function too: kernels are compiled for it
        return 1 / math.sqrt(operator.index(q.shape[3]))
    if type(scale) is float and not watched and -math.inf < scale < math.inf:
        return scale
    checked: float = check_scale(scale_name, scale)
    return checked


def check_scale(name: str, scale: Any) -> Any:
    """The scale as a float, or as a symbol of a compiled function, whose values the operators check."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} is a {type(scale).__name__}; allowed are None and a float")
    if torch.compiler.is_compiling() and not has_static_value(scale):
        return scale
    # the largest float, here and not in the module, of which torch.compile can make a symbol
    most = 1.7976931348623157e308
    # no comparison with a NaN is true
    if not -most <= scale <= most:
        shown = f"an int of {scale.bit_length()} bits" if isinstance(scale, int) else scale
        raise ValueError(f"{name} is {shown}; allowed are finite numbers")
    return float(scale) if isinstance(scale, int) else scale


def has_static_value(number: Any) -> bool:
    """Whether a number is a constant of the compiled function that is traced, and no symbol."""
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.has_static_value(number)


def _check_qkv(
    q_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    k_shape: torch.Size,
    k_dtype: torch.dtype,
    k_device: torch.device,
    v_shape: torch.Size,
    v_dtype: torch.dtype,
    v_device: torch.device,
) -> None:
    """Raise ValueError for the first property of q, k, v that does not fit."""
    for name, shape, found in (("q", q_shape, dtype), ("k", k_shape, k_dtype), ("v", v_shape, v_dtype)):
        if len(shape) != 4:
            raise ValueError(
                f"{name} has shape {tuple(shape)}, {len(shape)} dimensions; allowed are 4, [batch, heads, length, dim]"
            )
        if found not in FLOATS:
            raise ValueError(f"{name} has dtype {found}; allowed are {', '.join(map(str, FLOATS))}")
    batch, q_heads, _, head_dim = q_shape
    kv_batch, kv_heads, kv_len, k_dim = k_shape
    for name, found, place, size in (("k", k_dtype, k_device, kv_batch), ("v", v_dtype, v_device, v_shape[0])):
        if found != dtype:
            raise ValueError(f"{name} has dtype {found} but q has {dtype}; allowed is one dtype for q, k and v")
        if place != device:
            raise ValueError(f"{name} is on {place} but q is on {device}; allowed is one device for q, k and v")
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


# asked at every call, for few different shapes; what it raises is not remembered
_check_qkv_once = lru_cache(maxsize=1024)(_check_qkv)


def fitting_mask(q: Tensor, k: Tensor, mask: Any, any_dtype: bool = False) -> Mask | BlockMask | None:
    """The mask as an expression, or packed if it was, once it is known to fit q and k.

    Args:
        q, k: of a valid call.
        mask: what `attention` takes.
        any_dtype: a tensor may have any dtype, non-zero = attend.

    Raises:
        ValueError: it does not fit. TypeError: it is no mask.
    """
    if mask is None:
        return None
    if isinstance(mask, BlockMask):
        check_packed(q, k, mask)
        return mask
    q_len, kv_len = q.shape[2], k.shape[2]
    lazy: Mask | None = mask if isinstance(mask, Mask) else None
    if lazy is None and type(mask) is not Tensor:
        lazy = _of_elsewhere(mask, q_len, kv_len)
    if lazy is not None:
        planes: tuple[int, ...] = lazy.planes
    else:
        if isinstance(mask, Tensor):
            check_tensor("mask", mask)
        lazy = dense(mask) if any_dtype else as_mask(mask, "None, a bool tensor, a Mask, a BlockMask")
        _check_device(mask.device, q)
        # of the tensor as it came: `dense` narrows dimensions that are expanded
        planes = (1, 1, *mask.shape)[-4:-2]
    lazy.check_once(q_len, kv_len)
    _check_planes(planes, q)
    return lazy


def check_packed(q: Tensor, k: Tensor, mask: BlockMask) -> None:
    """Raise ValueError unless a packed mask fits q and k."""
    _, _, q_len, _ = q.shape
    kv_len = k.shape[2]
    if mask.q_len != q_len or mask.kv_len != kv_len:
        raise ValueError(
            f"mask was packed for q_len={mask.q_len}, kv_len={mask.kv_len} but q and k have {q_len} and {kv_len}"
        )
    _check_planes(mask.q_has_pair.shape, q)
    _check_device(mask.device, q)


def _of_elsewhere(mask: Any, q_len: int, kv_len: int) -> Mask | None:
    """The `Mask` of a mask object of another library; None if it is no such object."""
    if callable(mask):
        # a function, whose type dynamo of torch 2.11 cannot ask for its module
        return None
    where, name = type(mask).__module__, type(mask).__name__
    if where == "torch.nn.attention.flex_attention":
        from anymask import formats

        return formats.from_flex(mask)
    if where == "torch.nn.attention.bias":
        if (mask.seq_len_q, mask.seq_len_kv) != (q_len, kv_len):
            raise ValueError(
                f"mask is a {name} of {mask.seq_len_q} queries and {mask.seq_len_kv} keys but q and k have {q_len} and "
                f"{kv_len}; allowed are equal lengths"
            )
        return causal() if mask.variant.name == "UPPER_LEFT" else causal_lower_right()
    if where.startswith("xformers."):
        raise TypeError(f"mask is a {name} of xformers; pass anymask.formats.from_xformers(mask, q_len, kv_len)")
    return None


def check_not_additive(mask: Tensor) -> None:
    """Raise ValueError for a float mask whose values are added to scores: it would be read as its inverse.

    Reads the tensor, and waits for its device.
    """
    if not mask.is_floating_point():
        return
    values = mask if mask.element_size() > 1 else mask.float()
    if not bool((values > LEAST).all()):
        raise ValueError(
            f"mask is a float tensor that holds -inf, NaN or values up to {LEAST:g}, as additive masks do; allowed are "
            "masks with non-zero = attend: pass mask == 0"
        )


def _check_planes(planes: tuple[int, ...], q: Tensor) -> None:
    shape = q.shape
    if planes[0] in (1, shape[0]) and planes[1] in (1, shape[1]):
        return
    for dim, name in ((0, "batch"), (1, "q_heads")):
        if planes[dim] not in (1, shape[dim]):
            raise ValueError(
                f"mask has {planes[dim]} along {name} but q has {shape[dim]}; allowed are 1 and {shape[dim]}"
            )


def _check_device(device: torch.device, q: Tensor) -> None:
    if device != q.device:
        raise ValueError(f"mask is on {device} but q is on {q.device}; allowed is the device of q")
