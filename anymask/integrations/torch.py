"""`replace_sdpa()`: modules of torch, and models that call its attention, run anymask's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from anymask.drop_in import scaled_dot_product_attention


@contextmanager
def replace_sdpa() -> Iterator[None]:
    """Within it `torch.nn.functional.scaled_dot_product_attention` is anymask's, for all threads.

    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` call it, with their masks as floats of 0 and -inf. Their
    fast path, which has an attention of its own, is off meanwhile. Code that took the function by name before keeps
    torch's.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True)
    >>> with replace_sdpa():
    ...     layer(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """
    functional, mha = torch.nn.functional, torch.backends.mha
    before, fast = functional.scaled_dot_product_attention, mha.get_fastpath_enabled()
    setattr(functional, "scaled_dot_product_attention", scaled_dot_product_attention)  # noqa: B010
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before
        mha.set_fastpath_enabled(fast)
