"""torch's `scaled_dot_product_attention`, by each of its kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import Inputs
from benchmarks.providers import Attend, Prepared, Unsupported, compiled, mask_of

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(inputs: Inputs, base: str, variant: str) -> Prepared:
    """The kernel of a name, which gets the bool mask, or what the variant says; "sdpa" lets torch choose."""
    kernel, mask, note = KERNELS.get(base), inputs.mask, "bool mask"
    if variant == "causal" and (inputs.case.mask is None or inputs.case.mask.name != "causal"):
        raise Unsupported("only the causal mask is built in")
    if not variant and mask is not None and base == "flash":
        raise Unsupported("the flash kernel takes no mask tensor")
    if variant == "bias":
        bools = mask_of(inputs)
        # the tensor that SDPA would make of the mask in each call
        mask = torch.zeros_like(bools, dtype=inputs.q.dtype).masked_fill_(~bools, -float("inf"))
        note = "bias made before"
    if variant in ("causal", "unmasked"):
        mask, note = None, {"causal": "is_causal=True", "unmasked": "the mask is left out"}[variant]

    if inputs.case.scores is not None:
        return Prepared(_with_bias(inputs, kernel), "mask and bias in one tensor, which each call makes")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"is_causal": variant == "causal", "enable_gqa": inputs.grouped}
        if kernel is None:
            return scaled_dot_product_attention(q, k, v, mask, **options)
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v, mask, **options)

    return Prepared(compiled(inputs, attend), note if inputs.mask is not None else "no mask", variant == "unmasked")


def _with_bias(inputs: Inputs, kernel: SDPBackend | None) -> Attend:
    """A call that takes mask and bias as one tensor."""
    if "bias" not in inputs.leaves or kernel is None:
        raise Unsupported("it takes no scores but a bias")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = inputs.leaves["bias"]
        if inputs.mask is not None:
            bias = bias.masked_fill(~inputs.mask, -math.inf)
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v, bias.expand(*q.shape[:3], k.shape[2]))

    return attend
