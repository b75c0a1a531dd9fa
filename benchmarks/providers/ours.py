"""anymask: attention, and packing masks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import anymask
from anymask import backends
from anymask.integrations.transformers import attention_forward
from benchmarks.cases import Inputs
from benchmarks.providers import Prepared, Unsupported, compiled, mask_of
from benchmarks.scores import SEED

# copies of the mask that packing cycles through, so that none is still in the L2 cache when its turn comes
COPIES = 4


def attention(inputs: Inputs, base: str, variant: str) -> Prepared:
    """`anymask.attention` with the mask packed once, or with the tensor; other variants name a backend."""
    packed = inputs.block_mask
    backend, kind = None if variant in ("", "deterministic", "dense", "view", "plain") else variant, inputs.case.scores
    if backend is not None and (reason := backends.reasons(inputs.q, inputs.k, inputs.v, packed)[backend]):
        raise Unsupported(reason)
    options: dict[str, Any] = {"backend": backend, "deterministic": variant == "deterministic"}
    mask = mask_of(inputs) if variant in ("dense", "view") else packed
    if variant == "plain":
        return Prepared(lambda q, k, v: anymask.attention(q, k, v), "neither mask nor scores", unmasked=True)
    if kind is not None:
        options |= kind.keywords(inputs.leaves)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind is not None and kind.dropout_p:
            torch.manual_seed(SEED)
        return anymask.attention(q, k, v, mask.view(mask.shape) if variant == "view" else mask, **options)

    said = {name: value for name, value in options.items() if name != "deterministic"}
    runs = backend or anymask.explain(inputs.q, inputs.k, inputs.v, packed, **said).backend
    how = "no mask" if packed is None else "mask packed once" if mask is packed else f"{variant} tensor"
    return Prepared(compiled(inputs, attend), f"backend {runs}, {how}")


def layer(inputs: Inputs, base: str, variant: str) -> Prepared:
    """What a layer of a model of transformers calls, and a view of its result in the order of q."""
    module, mask, scale = torch.nn.Module(), inputs.block_mask, inputs.case.shape.head_dim**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, _ = attention_forward(module, q, k, v, mask, dropout=0.0, scaling=scale, position_ids=None, use_cache=False)
        return o.transpose(1, 2)

    return Prepared(compiled(inputs, attend), "mask packed once")


def pack(inputs: Inputs, base: str, variant: str) -> Prepared:
    """`anymask.pack` of the dense tensor, of the mask by name, or of a function of indices."""
    s, kind, device = inputs.case.shape, inputs.case.mask, inputs.q.device.type
    assert kind is not None
    if not variant:
        tensor = mask_of(inputs)
        sources = [tensor] + [tensor.clone() for _ in range(COPIES - 1 if device == "cuda" else 0)]
        return Prepared(None, "tiles and bits, both views", builds=tuple(partial(anymask.pack, t) for t in sources))
    assert kind.forms is not None
    rule, named = kind.forms(s, device)
    lazy = named if variant == "named" else anymask.from_function(rule)
    build = partial(anymask.pack, lazy, q_len=s.q_len, kv_len=s.kv_len, device=device)
    return Prepared(None, "tiles and bits, both views", builds=(build,))


def copy(inputs: Inputs, base: str, variant: str) -> Prepared:
    """A copy of the dense mask: one read and one write of its bytes, for scale."""
    sources = [mask_of(inputs).clone() for _ in range(COPIES)]
    target = torch.empty_like(sources[0])
    return Prepared(None, "reads and writes every byte", builds=tuple(partial(target.copy_, s) for s in sources))
