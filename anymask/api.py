"""`attention` and `explain`: validate, pack, call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from anymask import backends, mask_ops, ops, score_ops, validate
from anymask.block_mask import BlockMask, Stats
from anymask.mask import Mask, causal
from anymask.scores import Bias, resolve
from anymask.shapes import LSE, K, O, Q, V
from anymask.tiles import TILE
from anymask.traced import attend, is_simple


@overload
def attention(
    q: Q,
    k: K,
    v: V,
    mask: Tensor | Mask | BlockMask | None = None,
    *,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_lse: Literal[False] = False,
    deterministic: bool | None = None,
    backend: backends.Backend | None = None,
) -> O: ...
@overload
def attention(
    q: Q,
    k: K,
    v: V,
    mask: Tensor | Mask | BlockMask | None = None,
    *,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_lse: Literal[True],
    deterministic: bool | None = None,
    backend: backends.Backend | None = None,
) -> tuple[O, LSE]: ...
@overload
def attention(
    q: Q,
    k: K,
    v: V,
    mask: Tensor | Mask | BlockMask | None = None,
    *,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_lse: bool,
    deterministic: bool | None = None,
    backend: backends.Backend | None = None,
) -> O | tuple[O, LSE]: ...
def attention(
    q: Q,
    k: K,
    v: V,
    mask: Tensor | Mask | BlockMask | None = None,
    *,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: backends.Backend | None = None,
    **unknown: Any,
) -> O | tuple[O, LSE]:
    """`softmax(scale * q @ k^T where mask, -inf elsewhere) @ v`, differentiable in q, k, v, exact under any mask.

    What happens to a score, in this order: `scale`, `+ bias`, `softcap`, the mask, softmax with `sinks`, dropout.

    A query with no key gives 0 and receives and gives no gradient. A NaN or Inf in a key or value that no query of a
    plane may attend to reaches no output; one that some queries may attend to can reach the others too.

    Args:
        q: `[batch, q_heads, q_len, head_dim]`, fp16, bf16, fp32 (no TF32 by default) or fp64; any strides, but a
            last dimension that is not dense costs one copy of that tensor.
        k: `[batch, kv_heads, kv_len, head_dim]`; `kv_heads` divides `q_heads` (GQA, MQA).
        v: `[batch, kv_heads, kv_len, v_dim]`.
        mask: None; a bool tensor broadcastable to `[batch, q_heads, q_len, kv_len]`, True = attend; a `Mask`; a
            `BlockMask` from `pack`, with which the call never synchronises with the host; or a `BlockMask` of
            FlexAttention, or a bias of `torch.nn.attention.bias`. A tensor and a `Mask` are packed on first use and
            remembered by what their tensors are, version included (`anymask.packing.cache.MaskCache` has the rules):
            make a `Mask` once and pass it to all layers. A write that no version counts, such as through `.data`,
            NumPy, or a collective of `torch.distributed`, is not seen: call `anymask.forget` after it. Tensors made in
            inference mode have no version, and what a function reads may change: such masks are packed at each call.
        bias: what is added to the scaled scores: a float tensor broadcastable to `[batch, q_heads, q_len, kv_len]`, of
            any strides, or a `Bias` such as `alibi(slopes)`, or a sum of both. -inf hides a pair. Its gradient has its
            own shape, is summed in fp32 and bit-equal from run to run.
        scale: factor of the scores, finite; default `1 / sqrt(head_dim)`.
        softcap: c of `c tanh(s / c)`, which scores with their bias become; above 0.
        sinks: float `[q_heads]` or `[q_heads, n]`, differentiable: logits of keys that every query sees and that have
            no value. They are in lse.
        dropout_p: probability that the weight of a pair becomes 0, in [0, 1) and as a multiple of 1 / 32768; others
            are divided by what is left. The generator of torch decides, and lse is that of all pairs.
        is_causal: the same as `mask=causal()`, upper-left aligned; excludes `mask`.
        return_lse: also return the log-sum-exp of the scores, differentiable.
        deterministic: whether gradients must be bit-equal from run to run; None asks
            `torch.are_deterministic_algorithms_enabled()` when they are computed. Only `hopper` needs to be asked:
            its backward pass then takes up to a fifth longer.
        backend: a name of `anymask.backends.NAMES`, which raises if it cannot run the call; None takes the first that
            can. `explain` says which.

    Returns:
        `o [batch, q_heads, q_len, v_dim]` in the dtype of q, in memory in the order of q's dimensions: views of
        `[batch, length, heads, dim]` come back as such, and gradients too; with `return_lse` also `lse [batch,
        q_heads, q_len]`, natural log, fp32, -inf where a query has no key.

    Raises:
        ValueError: shape, dtype, device, number, mask or backend that does not fit, naming it and what is allowed.
        TypeError: an argument of the wrong type, or a keyword of another library, naming what to write.
        NotImplementedError: a second or a forward-mode derivative, which `backend="reference"` has without scores.
            The transforms `grad`, `vjp`, `jacrev` and `vmap` of `torch.func` and batched gradients work.
        RuntimeError: while a CUDA graph is captured, a mask that would have to be packed.

    FlashAttention-2 (Dao, 2023) over the non-empty 128 x 128 tiles of the mask; equations in docs/kernels.md.

    >>> import torch
    >>> q = k = v = torch.randn(1, 2, 5, 16)
    >>> attention(q, k, v, torch.rand(5, 5) < 0.5).shape
    torch.Size([1, 2, 5, 16])
    """
    if unknown:
        validate.refuse_keywords(unknown)
    if is_compiling() and scale is None and backend is None and is_causal is False:
        scored = bias is not None or softcap is not None or sinks is not None or dropout_p != 0.0
        if not scored and is_simple(q, k, v, mask, return_lse, deterministic):
            return attend(q, k, v, mask, return_lse, deterministic)
    q, k, v = validate.autocast(q, k, v)
    scale = validate.check_call(q, k, v, scale, is_causal, mask, return_lse, deterministic)
    backends.check_name(backend)
    block_mask = mask_ops.mask_of_call(q, k, _CAUSAL if is_causal else mask)
    scores = None
    if bias is not None or softcap is not None or sinks is not None or dropout_p != 0.0:
        q, k, scores = resolve(q, k, scale, bias, softcap, sinks, dropout_p)
    if scores is None:
        o, lse = ops.dispatch(q, k, v, block_mask, scale, backend, bool(deterministic))
    else:
        o, lse = score_ops.dispatch(q, k, v, block_mask, scale, backend, bool(deterministic), scores)
    return (o, lse) if return_lse else o


_CAUSAL = causal()


@dataclass(frozen=True)
class Explanation:
    """What `attention` would do with a call, and why. `print` it."""

    # name of the backend that runs
    backend: str
    # every backend that cannot run, with its reason
    not_chosen: dict[str, str]
    # tiles, density and bytes of the mask, over the planes that it stores; None without a mask
    mask: Stats | None
    # what happens to scores beside the mask, in words; None where nothing does
    scores: str | None
    # multiply-adds count 2: forward of the whole call, over attended pairs and over the tiles that are visited
    pair_flops: int
    tile_flops: int
    # programs that share the keys of a row in the forward pass, as when a model decodes; 1 if none do
    splits: int
    # name of the backend that the gradients come from: another one where its backward kernels do not have the scores
    gradients: str

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.not_chosen.items()]
        if self.mask is None:
            lines.append("mask: none, every pair attends")
        else:
            m = self.mask
            lines.append(f"tiles of 128 x 128: {m.empty} empty (skipped), {m.partial} partial, {m.full} full")
            lines.append(f"mask: {m.density:.1%} of pairs, {m.nbytes:,} bytes packed, {m.dense_bytes:,} dense")
        if self.scores is not None:
            lines.append(f"scores: {self.scores}")
        if self.gradients != self.backend:
            lines.append(f"gradients: {self.gradients}")
        lines.append(
            f"forward: {self.pair_flops:.3e} FLOP over attended pairs, {self.tile_flops:.3e} over visited tiles"
        )
        if self.splits > 1:
            lines.append(f"splits: {self.splits} programs share the keys of a row")
        return "\n".join(lines)


def explain(
    q: Q,
    k: K,
    v: V,
    mask: Tensor | Mask | BlockMask | None = None,
    *,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    backend: backends.Backend | None = None,
    **unknown: Any,
) -> Explanation:
    """Which backend `attention` would run with these arguments, why not the others, and what the mask costs.

    Packs the mask and reads it back, so it synchronises with the host. Raises what `attention` raises.
    """
    if unknown:
        validate.refuse_keywords(unknown)
    q, k, v = validate.autocast(q, k, v)
    scale = validate.check_call(q, k, v, scale, is_causal, mask, False, None)
    block_mask = mask_ops.mask_of_call(q, k, _CAUSAL if is_causal else mask)
    # a seed of dropout that no call takes
    with torch.random.fork_rng([q.device] if q.is_cuda else []):
        q, k, scores = resolve(q, k, scale, bias, softcap, sinks, dropout_p)
    chosen = backends.choose(q, k, v, block_mask, backend, scores)
    name = _name(chosen)
    gradients = name if scores is None else _name(backends.for_gradients(chosen, scores))
    reasons = backends.reasons(q, k, v, block_mask, scores)
    in_words = None if scores is None else scores.in_words()
    not_chosen = {n: r or f"{name} was preferred" for n, r in reasons.items() if n != name}
    per_pair = 2 * (q.shape[3] + v.shape[3])
    pairs = math.prod(q.shape[:3]) * k.shape[2]
    splits = backends.splits(name, q, k, block_mask) if scores is None else 1
    if block_mask is None:
        return Explanation(name, not_chosen, None, in_words, pairs * per_pair, pairs * per_pair, splits, gradients)
    stats = block_mask.stats(q.shape[3])
    planes = block_mask.batch * block_mask.heads
    repeats = q.shape[0] * q.shape[1] // planes if planes else 0
    visited = (stats.partial + stats.full) * TILE * TILE * repeats
    pair_flops = round(pairs * stats.density) * per_pair
    return Explanation(name, not_chosen, stats, in_words, pair_flops, visited * per_pair, splits, gradients)


def _name(backend: ModuleType) -> str:
    return backend.__name__.rpartition(".")[2]
