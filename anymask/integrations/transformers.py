"""Hugging Face transformers, version 5: `register()`, then `attn_implementation="anymask"`.

A model asks for a mask once per kind (causal, sliding, ...) and forward pass, with a function of indices made of a few
closures. `mask` reads those closures and packs the mask that they mean, by tiles; a function that it does not know is
evaluated, and inside `torch.compile` all are, but causal ones and padding. Every layer of the kind then runs
`attention_forward` with the `BlockMask`.

`sliding_window=512` in a configuration keeps 512 keys, the query's own among them: `anymask.sliding_window(511)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anymask.api import attention
from anymask.block_mask import BlockMask
from anymask.drop_in import mask_and_bias
from anymask.mask import Mask, causal, document, from_dense, from_function, key_padding
from anymask.mask.leaves import Band, Between
from anymask.packing import cache, pack
from anymask.scores.bias import Bias, as_bias

# farther than any position
FAR = 2**40
EVERYTHING = Band(None, None)
# one object, so that no layer makes it
CAUSAL = causal()


def register(name: str = "anymask") -> None:
    """Make `name` an attention implementation of transformers, with its masks.

    Args:
        name: what `attn_implementation=` will say.

    Raises:
        ImportError: transformers is missing, or too old to have mask functions (before version 5).
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("this needs transformers, version 5 or newer: pip install 'transformers>=5'") from error
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What a model of transformers calls in each layer.

    Args:
        module: the layer, asked for `is_causal`.
        query: `[batch, q_heads, q_len, head_dim]`.
        key, value: `[batch or 1, kv_heads, kv_len, dim]`.
        attention_mask: what `mask` returned; or the user's own, bool or floats that are added to the scores,
            broadcastable to `[batch, q_heads, q_len, kv_len]`.
        dropout: probability that a weight becomes 0, as in `attention`.
        scaling: factor of the scores.
        is_causal: for a mask of None and more than one query: causal, upper-left; default what the layer says.
        softcap: c of `c tanh(s / c)`, which scores become (Gemma 2).
        s_aux: float `[q_heads]`, a logit for each head that takes part in the softmax and has no value (GPT-OSS).
        position_bias: float, broadcastable to `[batch, q_heads, q_len, kv_len]`, added to the scores (T5).

    Returns:
        `o [batch, q_len, q_heads, v_dim]`, contiguous, and None for the weights, which no kernel has.

    Raises:
        ValueError: the weights are asked for, or a soft cap beside a bias, which transformers adds to what is capped
            already; or what `attention` raises.
    """
    if output_attentions or _is_recorded(module):
        raise ValueError(f"{type(module).__name__} asks for output_attentions; anymask has no weights: use eager")
    found: Tensor | Mask | BlockMask | None = attention_mask
    bias: Tensor | Bias | None = position_bias
    if isinstance(attention_mask, Tensor) and attention_mask.is_floating_point():
        found, added = mask_and_bias(attention_mask)
        if added is not None:
            bias = added if bias is None else as_bias(bias) + added
    elif (
        attention_mask is None
        and query.shape[2] > 1
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    ):
        found = CAUSAL
    if softcap is not None and bias is not None:
        raise ValueError(
            f"{type(module).__name__} has a softcap and a bias; allowed is one of them: transformers adds the bias to "
            "capped scores, and attention caps the sum"
        )
    if key.shape[0] != query.shape[0]:
        # learned queries, or keys, of one sample
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
    o = attention(query, key, value, found, bias=bias, scale=scaling, softcap=softcap, sinks=s_aux, dropout_p=dropout)
    return o.transpose(1, 2).contiguous(), None


def _is_recorded(module: torch.nn.Module) -> bool:
    """Whether a model that tells its layers nothing records the weights that this one returns."""
    # versions without it ask the layers
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None or not module._forward_hooks:
        return False
    # what its hook on this layer does too, so that a compiler finds nothing new in it
    collected = capturing._active_collector.get()
    if not collected:
        return False
    if torch.compiler.is_compiling():
        return any("attentions" in key for key in collected)
    keys = [_closure(hook).get("key") for hook in module._forward_hooks.values()]
    return any(key in collected and "attentions" in key for key in keys if isinstance(key, str))


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | BlockMask | None = None,
    *,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> BlockMask | None:
    """What a model of transformers calls for each kind of mask in a forward pass.

    Args:
        batch_size, q_length, kv_length: sizes of the scores.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: `fn(b, h, q, k)` of positions; default causal.
        attention_mask: bool `[batch, keys]`, False for padding; or a `BlockMask`, which is returned as it is.
        allow_is_bidirectional_skip: whether None may stand for all pairs. It never stands for causal: not every layer
            that asks for a causal mask says that it is one (the decoder of UMT5 in transformers 5.17 does not).
        use_vmap: whether `mask_function` must be called with scalars.
        device: where q, k and v are.
    """
    if isinstance(attention_mask, BlockMask):
        return attention_mask
    plane = _Plane(batch_size, q_length, kv_length, q_offset, kv_offset, use_vmap, torch.device(device))
    meant = plane.causal() if mask_function is None else plane.read(mask_function)
    if attention_mask is None:
        if allow_is_bidirectional_skip and meant is EVERYTHING:
            return None
        if meant == CAUSAL and not torch.compiler.is_compiling():
            # of sizes alone: one for all forward passes
            return cache.masks.pack(CAUSAL, q_length, kv_length, plane.device)
    else:
        meant = plane.both(meant, plane.padding(attention_mask))
    return pack(meant, q_len=q_length, kv_len=kv_length, device=device)


class _Plane:
    """The queries and keys of a mask, and the masks over them that functions of transformers mean."""

    def __init__(
        self,
        batch: int,
        q_len: int,
        kv_len: int,
        q_offset: int | Tensor,
        kv_offset: int,
        use_vmap: bool,
        device: torch.device,
    ) -> None:
        self.batch, self.q_len, self.kv_len = batch, q_len, kv_len
        self.q_offset, self.kv_offset, self.use_vmap, self.device = q_offset, kv_offset, use_vmap, device

    def read(self, fn: Callable[..., Any]) -> Mask:
        """The mask that a function of positions means."""
        if torch.compiler.is_compiling():
            return self.traced(fn)
        inner = _closure(fn)
        kind = f"{fn.__module__}.{fn.__qualname__}".removeprefix("transformers.masking_utils.")
        known = _KNOWN.get(kind)
        found = None if known is None else known(self, inner)
        return self.evaluated(fn) if found is None else found

    def traced(self, fn: Callable[..., Any]) -> Mask:
        """`read` inside a compiled function, where no closure can be read: bools of all pairs for all but the plain.

        The graph makes them as it does for sdpa.
        """
        # of the submodule: dynamo of torch 2.11 takes no lazy module, as transformers itself is
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

        if fn is causal_mask_function:
            return self.causal()
        if fn is bidirectional_mask_function:
            return EVERYTHING
        pairs = sdpa_mask(
            batch_size=self.batch,
            q_length=self.q_len,
            kv_length=self.kv_len,
            q_offset=self.q_offset,
            kv_offset=self.kv_offset,
            mask_function=fn,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=self.use_vmap,
            device=self.device,
        )
        return from_dense(pairs)

    def both(self, left: Mask, right: Mask) -> Mask:
        """`left & right`, where all pairs are no part."""
        return right if left is EVERYTHING else left if right is EVERYTHING else left & right

    def q_positions(self) -> Tensor:
        """int64 `[q_len]`."""
        return torch.arange(self.q_len, device=self.device) + self.q_offset

    def kv_positions(self) -> Tensor:
        """int64 `[kv_len]`."""
        return torch.arange(self.kv_len, device=self.device) + self.kv_offset

    def band(self, low: int | None, high: int | None) -> Mask:
        """Keys from `low` to `high` positions after the query's; None is open."""
        if isinstance(self.q_offset, Tensor):
            # known to the device alone
            at = (self.q_positions() - self.kv_offset)[None, None]
            first = at - FAR if low is None else at + low
            end = at + (FAR if high is None else high + 1)
            return Between(None, first, end, of_query=False, name="q_offset")
        shift = self.q_offset - self.kv_offset
        return Band(None if low is None else low + shift, None if high is None else high + shift)

    def causal(self) -> Mask:
        """Keys up to the query's own position."""
        return self.band(None, 0)

    def same(self, ids: Tensor) -> Mask | None:
        """Tokens with the same number, of `ids [batch, positions]`."""
        q, k = self._of_queries(ids), self._of_keys(ids)
        if q is None or k is None:
            return None
        is_square = isinstance(self.q_offset, int) and (self.q_len, self.q_offset) == (self.kv_len, self.kv_offset)
        return document(q) if is_square else document(q, kv_ids=k)

    def padding(self, keep: Tensor) -> Mask:
        """Keys of `keep [batch, positions]`; those beyond it are padding."""
        keep = keep.to(self.device, torch.bool)
        missing = self.kv_len + self.kv_offset - keep.shape[1]
        if missing > 0:
            keep = torch.nn.functional.pad(keep, (0, missing))
        return key_padding(keep[:, self.kv_offset : self.kv_offset + self.kv_len])

    def chunks(self, size: int, left_padding: Tensor) -> Mask:
        """Tokens of the same chunk of `size`, counted in each sample from the end of its padding `[batch]`."""
        start = left_padding.to(self.device)[:, None]
        # no chunk is -1, which would be padding to `document`
        q, k = ((at - start).div(size, rounding_mode="floor") + FAR for at in (self.q_positions(), self.kv_positions()))
        return document(q, kv_ids=k)

    def remapped(self, fn: Callable[..., Any], positions: Tensor) -> Mask | None:
        """`fn` of the places `positions [batch, length]` of tokens in their documents."""
        q, k = self._of_queries(positions), self._of_keys(positions)
        kind, inner = fn.__qualname__, _closure(fn)
        if q is None or k is None:
            return None
        if kind == "causal_mask_function":
            return _between_positions(q, k, None, 0)
        if kind == "sliding_window_overlay.<locals>.inner_mask" and "sliding_window" in inner:
            return _between_positions(q, k, 1 - inner["sliding_window"], None)
        if kind == "and_masks.<locals>.and_mask" and "mask_functions" in inner:
            parts = [self.remapped(part, positions) for part in inner["mask_functions"]]
            return None if any(p is None for p in parts) else self._fold(parts, self.both)
        return None

    def part(self, fns: Any, join: Callable[[Mask, Mask], Mask]) -> Mask:
        """Masks of functions, joined."""
        return self._fold([self.read(fn) for fn in fns], join)

    def evaluated(self, fn: Callable[..., Any]) -> Mask:
        """A function that is called, on the positions of tiles that others leave open."""

        def of_indices(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            found: Tensor = fn(b, h, q + self.q_offset, k + self.kv_offset)
            return found

        return from_function(of_indices, batch=self.batch, vectorised=not self.use_vmap)

    def _fold(self, masks: list[Any], join: Callable[[Mask, Mask], Mask]) -> Mask:
        found: Mask = masks[0]
        for other in masks[1:]:
            found = join(found, other)
        return found

    def _of_queries(self, t: Tensor) -> Tensor | None:
        """The entries `[batch, q_len]` of `t [batch, positions]`; None if some query has none."""
        t = t.to(self.device)
        if isinstance(self.q_offset, Tensor):
            return t.index_select(1, self.q_positions())
        end = self.q_offset + self.q_len
        return t[:, self.q_offset : end] if end <= t.shape[1] else None

    def _of_keys(self, t: Tensor) -> Tensor | None:
        end = self.kv_offset + self.kv_len
        return t.to(self.device)[:, self.kv_offset : end] if end <= t.shape[1] else None


def _between_positions(q: Tensor, k: Tensor, low: int | None, high: int | None) -> Mask:
    """Keys whose place is from `low` to `high` after the query's, of places `[batch, length]`."""
    q, k = q.long()[:, None], k.long()[:, None]
    first = q - FAR if low is None else q + low
    return Between(k, first, q + (FAR if high is None else high + 1), of_query=False, name="position_ids")


def _or(left: Mask, right: Mask) -> Mask:
    return EVERYTHING if EVERYTHING in (left, right) else left | right


def _blocks(plane: _Plane, ids: Tensor) -> Mask | None:
    """Tokens of the same block; those of block -1 attend to none by this."""
    same, inside = plane.same(ids), plane._of_keys(ids)
    return None if same is None or inside is None else same & key_padding(inside >= 0)


# what a function is called in transformers.masking_utils -> the mask that it means, of a plane and of its closure
_KNOWN: dict[str, Callable[[_Plane, dict[str, Any]], Mask | None]] = {
    "causal_mask_function": lambda p, c: p.causal(),
    "bidirectional_mask_function": lambda p, c: EVERYTHING,
    "and_masks.<locals>.and_mask": lambda p, c: p.part(c["mask_functions"], p.both),
    "or_masks.<locals>.or_mask": lambda p, c: p.part(c["mask_functions"], _or),
    "sliding_window_overlay.<locals>.inner_mask": lambda p, c: p.band(1 - c["sliding_window"], None),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": lambda p, c: p.band(
        -c["sliding_window"], c["sliding_window"]
    ),
    "chunked_overlay.<locals>.inner_mask": lambda p, c: p.chunks(c["chunk_size"], c["left_padding"]),
    "blockwise_overlay.<locals>.inner_mask": lambda p, c: _blocks(p, c["block_sequence_ids"]),
    "padding_mask_function.<locals>.inner_mask": lambda p, c: p.padding(c["padding_mask"]),
    "packed_sequence_mask_function.<locals>.inner_mask": lambda p, c: p.same(c["packed_sequence_mask"]),
    "remap_positions_for_packed_sequence.<locals>.inner_mask": lambda p, c: p.remapped(
        c["mask_function"], c["position_ids"]
    ),
}


def _closure(fn: Callable[..., Any]) -> dict[str, Any]:
    """What a function has captured, by name."""
    code = getattr(fn, "__code__", None)
    cells = getattr(fn, "__closure__", None) or ()
    return {} if code is None else dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
