"""Scores in the Triton kernels on CPU tensors, through Triton's interpreter, against fp64.

Skipped unless TRITON_INTERPRET=1 is set before Triton is imported: test_interpreted.py runs this file so.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from anymask.backends import triton as backend
from anymask.scores import dropout
from tests.helpers import scored
from tests.helpers.grid import BF16, F16, F32
from tests.helpers.interpreter import MARKS
from tests.helpers.interpreter import interpreter as interpreter

pytestmark = MARKS
SHAPE = 2, 2, 1, 20, 140
EVERYTHING: dict[str, Any] = {
    "dense": ("by_sample", "keys_by_head"), "tables": ("relative_shared",), "softcap": 3.0, "sinks": True,
    "dropout_p": 0.2, "hidden": 0.2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "full": {"dense": ("full",)},
    "by_head": {"dense": ("by_head",), "hidden": 0.5},
    "shared": {"dense": ("shared",)},
    "keys": {"dense": ("keys",)},
    "rows": {"dense": ("queries", "heads", "one")},
    "rows under a cap": {"dense": ("queries", "heads", "one"), "softcap": 1.0},
    "rows beside sinks": {"dense": ("queries",), "sinks": True},
    "relative": {"tables": ("relative",)},
    "window": {"tables": ("window_shared",)},
    "softcap": {"softcap": 1.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3},
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    scored.check(backend, scored.make_call(shape=SHAPE, **KINDS[kind]))


@pytest.mark.parametrize("mask", ["causal", "empty_rows", "per_batch_head"])
@pytest.mark.parametrize("kind", ["by_head", "relative", "everything"])
def test_masks(kind: str, mask: str) -> None:
    scored.check(backend, scored.make_call(mask, shape=SHAPE, **KINDS[kind]))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    scored.check(backend, scored.make_call("causal", shape=(1, 1, 1, 20, 70), dtype=dtype, **EVERYTHING))
