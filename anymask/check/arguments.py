"""The matrix of arguments: any combination of them equals the fp64 reference, or raises an error that names one.

A combination is drawn from its number. Half of them have no wrong argument, most others one, some two.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anymask import BlockMask, attention, causal, document, from_function, pack, sliding_window
from anymask.testing import LAYOUTS, Results, make_qkv, reference

BATCH, Q_HEADS, KV_HEADS, Q_LEN, KV_LEN, DIM, V_DIM = 2, 4, 2, 10, 14, 40, 48
# of the larger of 1 and the largest value
TOLERANCE = {torch.float16: 8e-3, torch.bfloat16: 6e-2, torch.float32: 1e-5, torch.float64: 1e-10}
NAMES = "q", "k", "v", "mask", "scale", "is_causal", "return_lse", "deterministic", "backend"

BF16 = torch.bfloat16
Qkv = tuple[Any, Any, Any]


def _random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.6


def _swap(at: int, change: Callable[[Any], Any]) -> Callable[[Qkv], Qkv]:
    def changed(qkv: Qkv) -> Qkv:
        parts = list(qkv)
        parts[at] = change(parts[at])
        return parts[0], parts[1], parts[2]

    return changed


def _both(change: Callable[[Tensor], Tensor]) -> Callable[[Qkv], Qkv]:
    return lambda qkv: (qkv[0], change(qkv[1]), change(qkv[2]))


def _nested(parts: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # that they are new
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(parts))


# axis -> name of a choice -> (choice, arguments of which an error may name one; none if it is right)
Choices = dict[str, tuple[Any, tuple[str, ...]]]

DTYPES: Choices = {
    "fp16": (torch.float16, ()),
    "bf16": (BF16, ()),
    "fp32": (torch.float32, ()),
    "fp64": (torch.float64, ()),
    "int32": (torch.int32, ("q",)),
    "bool": (torch.bool, ("q",)),
    "complex64": (torch.complex64, ("q",)),
    "float8": (torch.float8_e4m3fn, ("q",)),
}
TENSORS: Choices = {
    "as they are": (lambda qkv: qkv, ()),
    "no query": (_swap(0, lambda t: t[:, :, :0]), ()),
    "no key": (_both(lambda t: t[:, :, :0]), ()),
    "no sample": (lambda qkv: tuple(t[:0] for t in qkv), ()),
    "one query": (_swap(0, lambda t: t[:, :, :1]), ()),
    "one kv head": (_both(lambda t: t[:, :1]), ()),
    "v_dim 1": (_swap(2, lambda t: t[..., :1]), ()),
    "q is a list": (_swap(0, lambda t: [1.0]), ("q",)),
    "k is None": (_swap(1, lambda t: None), ("k",)),
    "v is a number": (_swap(2, lambda t: 2.0), ("v",)),
    "q of 3 dimensions": (_swap(0, lambda t: t[0]), ("q",)),
    "v of 5 dimensions": (_swap(2, lambda t: t[None]), ("v",)),
    "k of another dtype": (_swap(1, lambda t: t.double() if t.dtype != torch.float64 else t.float()), ("k",)),
    "v of another device": (_swap(2, lambda t: t.detach().to("meta")), ("v",)),
    "k of another batch": (_swap(1, lambda t: t[:1]), ("k",)),
    "v shorter than k": (_swap(2, lambda t: t[:, :, 1:]), ("v", "k")),
    "k of another head_dim": (_swap(1, lambda t: t[..., :8]), ("k", "q")),
    "v of other heads": (_swap(2, lambda t: t[:, :1]), ("v", "k")),
    "3 q heads": (_swap(0, lambda t: t[:, :3]), ("q", "k")),
    # which have shapes and no values, and so do results
    "all on meta": (lambda qkv: tuple(t.detach().to("meta") for t in qkv), ()),
    "q sparse": (_swap(0, lambda t: torch.ones(t.shape, device=t.device).to_sparse()), ("q",)),
    "v nested": (_swap(2, lambda t: _nested(torch.ones(t.shape, device=t.device))), ("v",)),
    "head_dim 0": (lambda qkv: (qkv[0][..., :0], qkv[1][..., :0], qkv[2]), ("q", "k")),
}
LAYOUT: Choices = {name: (name, ()) for name in (*LAYOUTS, "unaligned")}
# each of (batch, q_heads, q_len, kv_len)
MASK: Choices = {
    "None": (lambda b, h, m, n: None, ()),
    "[q, k]": (lambda b, h, m, n: _random(m, n), ()),
    "[h, q, k]": (lambda b, h, m, n: _random(h, m, n), ()),
    "[b, h, q, k]": (lambda b, h, m, n: _random(b, h, m, n), ()),
    "[b, 1, q, k]": (lambda b, h, m, n: _random(b, 1, m, n), ()),
    "[1, h, 1, k]": (lambda b, h, m, n: _random(1, h, 1, n), ()),
    "[b, 1, 1, k]": (lambda b, h, m, n: _random(b, 1, 1, n), ()),
    "[q, 1]": (lambda b, h, m, n: _random(m, 1), ()),
    "stretched": (lambda b, h, m, n: _random(1, 1, m, n).expand(b, h, m, n), ()),
    "transposed": (lambda b, h, m, n: _random(b, 1, n, m).mT, ()),
    "strided": (lambda b, h, m, n: _random(2 * m, 3 * n)[::2, ::3], ()),
    "nothing attends": (lambda b, h, m, n: torch.zeros(m, n, dtype=torch.bool), ()),
    "Mask": (lambda b, h, m, n: causal(2) & ~sliding_window(3), ()),
    "Mask with tensors": (
        lambda b, h, m, n: document(torch.arange(m) // 4, kv_ids=torch.arange(n) // 4) | causal(),
        (),
    ),
    "Mask of a function": (lambda b, h, m, n: from_function(lambda b, h, i, j: (i + j) % 3 > 0), ()),
    "BlockMask": (lambda b, h, m, n: pack(_random(b, h, m, n)), ()),
    "BlockMask of heads": (lambda b, h, m, n: pack(_random(1, h, m, n)), ()),
    "float": (lambda b, h, m, n: torch.zeros(m, n), ("mask",)),
    "uint8": (lambda b, h, m, n: _random(m, n).to(torch.uint8), ("mask",)),
    "int64": (lambda b, h, m, n: _random(m, n).long(), ("mask",)),
    "1 dimension": (lambda b, h, m, n: _random(n), ("mask",)),
    "5 dimensions": (lambda b, h, m, n: _random(1, b, h, m, n), ("mask",)),
    "too many keys": (lambda b, h, m, n: _random(m, n + 2), ("mask",)),
    "too many queries": (lambda b, h, m, n: _random(m + 2, n), ("mask",)),
    "3 more samples": (lambda b, h, m, n: _random(b + 3, 1, m, n), ("mask",)),
    "3 more heads": (lambda b, h, m, n: _random(1, h + 3, m, n), ("mask",)),
    "BlockMask of other lengths": (lambda b, h, m, n: pack(_random(m + 1, n + 1)), ("mask",)),
    "BlockMask of 3 more samples": (lambda b, h, m, n: pack(_random(b + 3, 1, m, n)), ("mask",)),
    "on meta": (lambda b, h, m, n: torch.ones(m, n, dtype=torch.bool, device="meta"), ("mask",)),
    "BlockMask on meta": (lambda b, h, m, n: pack(_random(m, n)).to("meta"), ("mask",)),
    "sparse": (lambda b, h, m, n: _random(m, n).to_sparse(), ("mask",)),
    "nested": (lambda b, h, m, n: _nested(torch.ones(2, m, n) > 0), ("mask",)),
    "a list": (lambda b, h, m, n: [[True]], ("mask",)),
    "a string": (lambda b, h, m, n: "causal", ("mask",)),
    "True": (lambda b, h, m, n: True, ("mask",)),
}
IS_CAUSAL: Choices = {
    "False": (False, ()),
    "True": (True, ()),
    "1": (1, ("is_causal",)),
    "'yes'": ("yes", ("is_causal",)),
    "None": (None, ("is_causal",)),
}
RETURN_LSE: Choices = {"False": (False, ()), "True": (True, ()), "None": (None, ("return_lse",))}
DETERMINISTIC: Choices = {
    "None": (None, ()),
    "False": (False, ()),
    "True": (True, ()),
    "1": (1, ("deterministic",)),
    "'warn'": ("warn", ("deterministic",)),
}
SCALE: Choices = {
    "None": (None, ()),
    "0.3": (0.3, ()),
    "1": (1, ()),
    "0.0": (0.0, ()),
    "-0.2": (-0.2, ()),
    "nan": (float("nan"), ("scale",)),
    "inf": (float("inf"), ("scale",)),
    "True": (True, ("scale",)),
    "'0.3'": ("0.3", ("scale",)),
    "complex": (0.3j, ("scale",)),
    "10**400": (10**400, ("scale",)),
    "a tensor of 2": (torch.ones(2), ("scale",)),
}
BACKEND: Choices = {
    "None": (None, ()),
    "'cpu'": ("cpu", ()),
    "'triton'": ("triton", ()),
    "'hopper'": ("hopper", ()),
    "'reference'": ("reference", ()),
    "'flash'": ("flash", ("backend",)),
    "''": ("", ("backend",)),
    "3": (3, ("backend",)),
}
# names of the inputs that require gradients; a context
MODE: Choices = {
    "gradients": (("qkv", nullcontext), ()),
    "of q": (("q", nullcontext), ()),
    "of k and v": (("kv", nullcontext), ()),
    "of v": (("v", nullcontext), ()),
    "of nothing": (("", nullcontext), ()),
    "no_grad": (("qkv", torch.no_grad), ()),
    "inference_mode": (("qkv", torch.inference_mode), ()),
    "autocast": (("qkv", partial(torch.autocast, dtype=BF16)), ()),
}
AXES = {
    "dtype": DTYPES, "tensors": TENSORS, "layout": LAYOUT, "mask": MASK, "is_causal": IS_CAUSAL,
    "return_lse": RETURN_LSE, "deterministic": DETERMINISTIC, "scale": SCALE, "backend": BACKEND, "mode": MODE,
}  # fmt: skip


def combination(number: int) -> dict[str, str]:
    """One choice of every axis, by its name."""
    rng = random.Random(number)
    can_be_wrong = [axis for axis, choices in AXES.items() if any(names for _, names in choices.values())]
    wrong = set(rng.sample(can_be_wrong, rng.choice((0, 0, 0, 0, 1, 1, 1, 2))))
    chosen = {
        axis: rng.choice([name for name, (_, names) in choices.items() if bool(names) == (axis in wrong)])
        for axis, choices in AXES.items()
    }
    # which casts it to a dtype that is right
    if chosen["dtype"] == "float8" and chosen["mode"] == "autocast":
        chosen["mode"] = "gradients"
    # with a mask it is an error, which half of the combinations need not have
    if not wrong and chosen["is_causal"] == "True" and rng.random() < 0.5:
        chosen["mask"] = "None"
    return chosen


def is_right(chosen: dict[str, str]) -> bool:
    """Whether a combination must give a result, if its backend takes it."""
    causal_and_mask = chosen["is_causal"] == "True" and chosen["mask"] != "None"
    return not causal_and_mask and not any(AXES[axis][name][1] for axis, name in chosen.items())


def check_combination(number: int, device: str = "cpu") -> None:
    """Assert that a combination equals the reference, or raises an error that names what is wrong.

    Raises:
        AssertionError: with the combination. Whatever else `attention` raises for it comes through.
    """
    chosen = combination(number)
    value = {axis: AXES[axis][name][0] for axis, name in chosen.items()}
    wrong = {name for axis, choice in chosen.items() for name in AXES[axis][choice][1]}
    required, context = value["mode"]
    if chosen["mode"] == "autocast":
        context = partial(context, torch.device(device).type)
    q, k, v = value["tensors"](_qkv(value["dtype"], value["layout"], device))
    for name, t in (("q", q), ("k", k), ("v", v)):
        if isinstance(t, Tensor) and t.is_floating_point() and t.is_leaf:
            t.requires_grad_(name in required)
    shape = tuple(q.shape[:3]) if isinstance(q, Tensor) and q.dim() == 4 else (BATCH, Q_HEADS, Q_LEN)
    kv_len = k.shape[2] if isinstance(k, Tensor) else KV_LEN
    mask = value["mask"](*shape, kv_len)
    on_meta = "on meta" in chosen["mask"]
    given = mask.to(device) if hasattr(mask, "to") and not on_meta else mask
    if value["is_causal"] is True and mask is not None:
        wrong |= {"is_causal", "mask"}
    options = {name: value[name] for name in NAMES[4:]}
    all_meta = chosen["tensors"] == "all on meta"
    if all_meta and on_meta:
        wrong.discard("mask")
    # its tensors may be on a device where those are not
    named_too = {"mask"} if all_meta and mask is not None else set()
    # a backend that was asked for by name may not take the call
    named = wrong | named_too | ({"backend"} if value["backend"] is not None else set())
    message, found = None, None
    try:
        with context():
            found = attention(q, k, v, given, **options)
    except (ValueError, TypeError, NotImplementedError) as error:
        message = str(error)
    if message is None:
        assert not wrong, f"{_told(chosen)} raises nothing; it should, and name one of {sorted(wrong)}"
        if all_meta:
            outputs = found if isinstance(found, tuple) else (found,)
            assert all(o.is_meta for o in outputs), _told(chosen)
            assert outputs[0].shape == (*q.shape[:3], v.shape[3]), _told(chosen)
            return
        _compare(chosen, value, (q, k, v), mask, found)
    elif not any(re.search(rf"\b{name}\b", message) for name in named):
        should = f"name one of {sorted(named)}" if named else "give a result"
        raise AssertionError(f"{_told(chosen)} should {should}; it raises: {message}")


def _qkv(dtype: torch.dtype, layout: str, device: str) -> Qkv:
    sizes = BATCH, Q_HEADS, KV_HEADS, Q_LEN, KV_LEN, DIM, V_DIM
    if layout != "unaligned":
        return make_qkv(*sizes, dtype=dtype, device=device, layout=layout)
    # each begins one element after where its memory does
    flat = [(t.shape, t.flatten()) for t in make_qkv(*sizes, device=device)]
    q, k, v = (torch.cat([t[:1], t]).to(dtype)[1:].view(shape) for shape, t in flat)
    return q, k, v


def _told(chosen: dict[str, str]) -> str:
    return ", ".join(f"{axis} {name}" for axis, name in chosen.items())


def _compare(chosen: dict[str, str], value: dict[str, Any], qkv: tuple[Tensor, ...], mask: Any, found: Any) -> None:
    """Assert that what was found is the reference, in the right dtype, with gradients of what requires them."""
    told, (q, k, _) = _told(chosen), qkv
    wide = value["return_lse"]
    assert isinstance(found, tuple) == wide, f"{told} gives a {type(found).__name__}"
    outputs = list(found) if wide else [found]
    dtype = BF16 if chosen["mode"] == "autocast" and q.dtype != torch.float64 else q.dtype
    assert outputs[0].dtype == dtype, f"{told} gives {outputs[0].dtype}"
    generator = torch.Generator().manual_seed(1)
    grads_out = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    lazy = causal() if value["is_causal"] else mask
    if lazy is not None and not isinstance(lazy, BlockMask):
        lazy = pack(lazy, q_len=q.shape[2], kv_len=k.shape[2])
    if q.numel() and k.numel():
        q_cast, k_cast, v_cast = (t.detach().to(dtype) for t in qkv)
        dense = None if lazy is None else lazy.to(q.device)
        expected = reference(q_cast, k_cast, v_cast, dense, value["scale"], *grads_out)
    else:
        zeros = [torch.zeros_like(t, dtype=torch.float64) for t in (outputs[0], *qkv)]
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64, device=q.device)
        expected = Results(zeros[0], lse, *zeros[1:])
    for name, got, want in zip(("o", "lse"), outputs, expected, strict=False):
        _assert_close(f"{told}: {name}", got, want, dtype)
    required = [name for name in "qkv" if name in value["mode"][0]]
    recorded = bool(required) and chosen["mode"] not in ("no_grad", "inference_mode")
    assert outputs[0].requires_grad == recorded, f"{told}: o.requires_grad is {outputs[0].requires_grad}"
    if recorded:
        leaves = [qkv["qkv".index(name)] for name in required]
        for name, leaf, got in zip(required, leaves, torch.autograd.grad(outputs, leaves, grads_out), strict=True):
            assert got.dtype == leaf.dtype, f"{told}: d{name} has {got.dtype}"
            _assert_close(f"{told}: d{name}", got, getattr(expected, f"d{name}"), dtype)


def _assert_close(what: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape, f"{what} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not got.numel():
        return
    got = got.detach().double()
    same = got == want
    error = (got - want).masked_fill(same, 0.0).abs().max()
    size = max(1.0, float(want.masked_fill(want == -torch.inf, 0.0).abs().max()))
    assert error <= TOLERANCE[dtype] * size, f"{what} is wrong by {float(error):.3e}, the largest is {size:.3e}"
