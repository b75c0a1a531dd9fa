"""torch's `scaled_dot_product_attention`, by each of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import Problem
from benchmarks.providers import Prepared, Unsupported, compiled, mask_of

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(problem: Problem, base: str, variant: str) -> Prepared:
    """The kernel of a name, which gets the bool mask, or what the variant says; "sdpa" lets torch choose."""
    kernel, mask, note = KERNELS.get(base), problem.mask, "bool mask"
    if variant == "causal" and (problem.case.mask is None or problem.case.mask.name != "causal"):
        raise Unsupported("only the causal mask is built in")
    if not variant and mask is not None and base == "flash":
        raise Unsupported("the flash kernel takes no mask tensor")
    if variant == "bias":
        bools = mask_of(problem)
        # the tensor that SDPA would make of the mask in each call
        mask = torch.zeros_like(bools, dtype=problem.q.dtype).masked_fill_(~bools, -float("inf"))
        note = "bias made before"
    if variant in ("causal", "unmasked"):
        mask, note = None, {"causal": "is_causal=True", "unmasked": "the mask is left out"}[variant]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"is_causal": variant == "causal", "enable_gqa": problem.grouped}
        if kernel is None:
            return scaled_dot_product_attention(q, k, v, mask, **options)
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v, mask, **options)

    return Prepared(compiled(problem, attend), note if problem.mask is not None else "no mask", variant == "unmasked")
