"""flashattention2-custom-mask, the package that this one began as."""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.cases import Inputs
from benchmarks.providers import Prepared, Unsupported


def attention(inputs: Inputs, base: str, variant: str) -> Prepared:
    """Its attention, from the folder given with `--earlier`."""
    if inputs.earlier is None:
        raise Unsupported("not asked for; --earlier names its folder")
    s, mask = inputs.case.shape, inputs.mask
    fits = s.dtype == torch.float16 and s.q_len == s.kv_len and not s.q_len % 128 and s.head_dim == s.v_dim
    if not fits or inputs.grouped or s.head_dim not in (32, 64, 128, 256):
        raise Unsupported("fp16, lengths of whole blocks, head_dim 32 to 256 in powers of two and equal heads only")
    module = _load(Path(inputs.earlier).resolve())
    planes = None if mask is None else mask.expand(s.batch, s.heads, s.q_len, s.kv_len)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module.flash_attention_custom_mask(q, k, v, planes, s.head_dim**-0.5)
        return out

    return Prepared(attend, "bool mask" if mask is not None else "no mask")


@functools.cache
def _load(folder: Path) -> ModuleType:
    """The package in `folder`, found before the module of the same name in this checkout."""
    sys.path.insert(0, str(folder))
    try:
        module = import_module("fa2_custom_mask")
    finally:
        sys.path.remove(str(folder))
    if not Path(module.__file__ or "").is_relative_to(folder):
        raise Unsupported(f"--earlier has no fa2_custom_mask, or it was imported before: {module.__file__}")
    return module
