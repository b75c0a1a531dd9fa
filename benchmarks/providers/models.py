"""Models of Hugging Face transformers by each attention implementation, ready to train."""

from __future__ import annotations

from benchmarks import models
from benchmarks.models import Batch, Training
from benchmarks.providers import Prepared, Unsupported

IMPLEMENTATIONS = {"anymask": "anymask", "sdpa": "sdpa", "flex": "flex_attention"}


def train(batch: Batch, base: str, variant: str) -> Prepared:
    """A model with new weights, and its optimizer."""
    if not models.is_there():
        raise Unsupported("transformers is not installed")
    name = IMPLEMENTATIONS[base]
    return Prepared(None, f'attn_implementation="{name}"', training=Training(batch, name, batch.case.shape.dtype))
