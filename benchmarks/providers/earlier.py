"""flashattention2-custom-mask, the package that this one began as."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.cases import Problem
from benchmarks.providers import Prepared, Unsupported


def attention(problem: Problem, base: str, variant: str) -> Prepared:
    """Its attention, from the folder given with `--earlier`."""
    if problem.earlier is None:
        raise Unsupported("not asked for; --earlier names its folder")
    s, mask = problem.case.shape, problem.mask
    fits = s.dtype == torch.float16 and s.q_len == s.kv_len and not s.q_len % 128 and s.head_dim == s.v_dim
    if not fits or problem.grouped or s.head_dim not in (32, 64, 128, 256):
        raise Unsupported("fp16, lengths of whole blocks, head_dim 32 to 256 in powers of two and equal heads only")
    module = _load_earlier(Path(problem.earlier))
    planes = None if mask is None else mask.expand(s.batch, s.heads, s.q_len, s.kv_len)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module.flash_attention_custom_mask(q, k, v, planes, s.head_dim**-0.5)
        return out

    return Prepared(attend, "bool mask" if mask is not None else "no mask")


@functools.cache
def _load_earlier(folder: Path) -> ModuleType:
    """The package in `folder`, beside our module of the same name: its files import each other by that name."""
    name, file = "fa2_custom_mask", folder / "fa2_custom_mask" / "__init__.py"
    if not file.is_file():
        raise Unsupported(f"there is no {name}/__init__.py in the folder of --earlier")
    mine = {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] == name}
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for n in [n for n in sys.modules if n.partition(".")[0] == name]:
            del sys.modules[n]
        sys.modules.update(mine)
    return module
