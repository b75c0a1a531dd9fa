"""FlexAttention: attention, and building its block masks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.cases import Inputs
from benchmarks.masks import MaskMod
from benchmarks.providers import Attend, Prepared, Unsupported, mask_of
from benchmarks.providers.ours import COPIES

# most pairs of which it lists the blocks without being compiled for it: 10 GiB
EAGER_PAIRS = 2**30


def attention(inputs: Inputs, base: str, variant: str) -> Prepared:
    """With the closed form of the mask, or (dense) with a function that reads the tensor."""
    block_mask, note = None, "no mask"
    if inputs.case.mask is not None:
        mod = _reads(mask_of(inputs)) if variant == "dense" else _rule(inputs)
        note = "reads the dense tensor" if variant == "dense" else "closed form"
        shape = inputs.case.shape
        block_mask = _builder(inputs, compiled=shape.q_len * shape.kv_len > EAGER_PAIRS)(mod)
    call = flex_attention
    # that it is slow without a compiler is what is measured
    warnings.filterwarnings("ignore", "flex_attention called without")
    if inputs.q.device.type == "cuda":
        # the timed backward keeps its graph, which donated buffers forbid
        functorch.donated_buffer = False
        mode = {"eager": "default"}.get(inputs.case.mode, inputs.case.mode)
        # fullgraph: an error rather than a silent return to the eager, dense form
        call = torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=mode)
    if inputs.case.scores is not None:
        attend, note = _with_scores(inputs, call, block_mask), f"{note}, score_mod"
    else:
        attend = partial(call, block_mask=block_mask, enable_gqa=inputs.grouped)
    # eager FlexAttention has a backward pass on GPUs only
    return Prepared(attend, f"mask_mod: {note}", forward_only=inputs.q.device.type == "cpu")


def _with_scores(inputs: Inputs, call: Callable[..., Any], block_mask: BlockMask | None) -> Attend:
    """A call with a score_mod; sinks scale its result by what they leave of the denominator, as transformers does."""
    kind = inputs.case.scores
    assert kind is not None
    if kind.dropout_p:
        raise Unsupported("it has no dropout")
    options = {"block_mask": block_mask, "enable_gqa": inputs.grouped}
    if (sinks := inputs.leaves.get("sinks")) is None:
        return partial(call, score_mod=kind.rule(inputs.leaves), **options)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = call(q, k, v, return_lse=True, **options)
        return o * torch.sigmoid(lse - sinks[:, None])[..., None].to(o.dtype)

    return attend


def build(inputs: Inputs, base: str, variant: str) -> Prepared:
    """`create_block_mask`, which lists tiles and holds no bits."""
    build = _builder(inputs, compiled=variant != "build-eager" and inputs.q.device.type == "cuda")
    copies = [mask_of(inputs).clone() for _ in range(COPIES)] if variant == "build-dense" else []
    mods = [_reads(mask) for mask in copies] or [_rule(inputs)]
    return Prepared(None, "tiles without bits", builds=tuple(partial(build, mod) for mod in mods))


def _rule(inputs: Inputs) -> MaskMod:
    kind = inputs.case.mask
    if kind is None or kind.forms is None:
        raise Unsupported("the mask has no closed form")
    return kind.forms(inputs.case.shape, inputs.q.device.type)[0]


def _reads(mask: Tensor) -> MaskMod:
    """A `mask_mod` that looks up a bool `[batch or 1, 1, q_len, kv_len]` tensor."""
    plane = mask[0, 0]
    return (lambda b, h, i, j: mask[b, 0, i, j]) if len(mask) > 1 else lambda b, h, i, j: plane[i, j]


def _builder(inputs: Inputs, compiled: bool) -> Callable[[MaskMod], BlockMask]:
    """From a mask function to a block mask, of each sample or shared by all."""
    s, kind = inputs.case.shape, inputs.case.mask
    build = torch.compile(create_block_mask) if compiled else create_block_mask
    batch = s.batch if kind is not None and kind.per_sample else None
    return lambda mod: build(mod, batch, None, s.q_len, s.kv_len, device=inputs.q.device.type)
