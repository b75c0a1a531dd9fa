"""Cases and properties that every backend must satisfy, on every device: shared by the files that name a backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import BlockMask, Mask, attention, pack
from anymask.backends import Backend
from anymask.testing import (
    MASKS,
    Case,
    Results,
    assert_matches,
    eager,
    magnitudes,
    make_inputs,
    make_qkv,
    reference,
    run,
)
from anymask.testing.properties import assert_nearly as assert_nearly
from anymask.testing.properties import check_a_first_tile_of_zero_scores as check_a_first_tile_of_zero_scores
from anymask.testing.properties import check_emptied_rows_leave_the_others as check_emptied_rows_leave_the_others
from anymask.testing.properties import check_far_from_zero as check_far_from_zero
from anymask.testing.properties import check_forms_of_a_mask_agree as check_forms_of_a_mask_agree
from anymask.testing.properties import check_growing_scores as check_growing_scores
from anymask.testing.properties import check_high_hidden_scores as check_high_hidden_scores
from anymask.testing.properties import check_repeats as check_repeats
from anymask.testing.properties import check_unused_keys_reach_nothing as check_unused_keys_reach_nothing
from anymask.testing.properties import check_unused_queries_reach_nothing as check_unused_queries_reach_nothing
from anymask.testing.properties import check_unused_rows_that_differ_by_head as check_unused_rows_that_differ_by_head
from anymask.testing.properties import same as same

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SPECIAL_VALUES = [float("nan"), float("inf"), -float("inf")]
# (q_heads, kv_heads): groups of 1, 2, 7 and all heads
HEADS = [(1, 1), (4, 2), (7, 1), (14, 2), (6, 6)]
# (head_dim, v_dim)
DIMS = [(1, 1), (8, 24), (16, 16), (31, 31), (64, 32), (72, 72), (96, 96), (128, 128), (192, 128), (256, 256)]
LENGTHS = [(1, 1), (1, 5), (5, 3), (1, 239), (239, 1), (63, 129), (127, 257), (128, 128), (129, 63), (300, 513)]
LENGTH_MASKS = ["none", "causal", "causal_lower_right", "random", "empty_rows"]
HEAD_MASKS = ["none", "per_head", "per_batch", "per_batch_head", "documents"]
UNUSED_MASKS = ["empty_columns", "key_padding", "all_empty", "one_pair", "empty_head", "tiles", "causal_behind", "row"]


def packed(name: str, q_len: int = 300, kv_len: int = 260) -> BlockMask:
    """The mask `name` of 2 samples and 3 heads, packed on the CPU."""
    mask, dense = MASKS[name](2, 3, q_len, kv_len)
    return pack(dense if mask is None else mask, q_len=q_len, kv_len=kv_len)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers drawn on the GPU, for inputs that would take long to draw and copy."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)


def results_of(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Mask | BlockMask | None, do: Tensor, backend: Backend | None = None
) -> Results:
    """What `attention` gives, and its gradients for `do`."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o, lse = attention(*leaves, mask, return_lse=True, backend=backend)
    return Results(o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, do))


def check_forward(case: Case, backend: Backend | None = None, device: str = "cpu") -> None:
    """Assert that o and lse match the oracle, 0 and -inf where a query has no key; nothing is differentiated."""
    inputs = make_inputs(case, device)
    o, lse = (t.detach() for t in _forward_of(case, inputs[:4], backend))
    args = *inputs[:3], inputs.dense, case.scale, inputs.do
    expected, size = reference(*args), magnitudes(*args)
    assert_matches(o, expected.o, eager(*args).o, case.dtype, "o", magnitude=size.o)
    assert_matches(lse, expected.lse, None, case.dtype, "lse")
    assert not o[~inputs.dense.any(-1)].any()


def _forward_of(case: Case, qkv_and_mask: tuple[Any, ...], backend: Backend | None) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return attention(*qkv_and_mask, scale=case.scale, return_lse=True, backend=backend)


def cases(backends: tuple[str, ...], many: list[Case]) -> pytest.MarkDecorator:
    """Parametrise `backend, case` with ids such as `triton-documents-q239-kv129-d64-bf16`."""
    marks = {"hopper": pytest.mark.hopper}
    pairs = [
        pytest.param(backend, case, marks=marks.get(backend, ()), id=f"{backend}-{case}")
        for case in many
        for backend in backends
        if backend != "hopper" or _fits_hopper(case)
    ]
    return pytest.mark.parametrize(("backend", "case"), pairs)


def _fits_hopper(case: Case) -> bool:
    """Whether the copy engine and the registers of that backend can hold the case."""
    aligned = case.head_dim % 8 == 0 and (case.v_dim or case.head_dim) % 8 == 0
    dim = max(case.head_dim, case.v_dim or 0)
    # keys without a query in one head of a group and with some in another
    if case.mask in ("tiles", "empty_columns", "empty_head") and case.q_heads != case.kv_heads:
        return False
    return aligned and 33 <= dim <= 256 and case.dtype in (F16, BF16) and case.layout != "expanded"


def check_a_mask_does_not_outlive_its_call(backend: str, device: str, dtype: torch.dtype = F32) -> None:
    """A masked call, then an unmasked one, then a larger and a smaller mask: each has its own result."""
    sizes = [("random", 150, 150), ("none", 150, 150), ("prefix_lm", 200, 200), ("prefix_lm", 50, 50)]
    calls = [make_inputs(Case(m, q, kv, 32, dtype), device) for m, q, kv in sizes]
    limit = 1e-4 if dtype == F32 else 2e-2
    for inputs, got in zip(calls, [run(inputs, backend=backend) for inputs in calls], strict=True):
        expected = reference(*inputs[:3], inputs.dense, None, inputs.do, inputs.dlse)
        for name, x, y in zip(Results._fields, got, expected, strict=True):
            assert torch.allclose(x.double(), y, atol=limit, rtol=limit), name


# dimensions [batch, heads, length, dim] in the order in which they lie in memory
ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3)]


def check_layouts(
    order: tuple[int, ...],
    shape: tuple[int, int, int, int],
    backend: str,
    device: str = "cpu",
    dtype: torch.dtype = F32,
    dims: tuple[int, int] = (64, 40),
) -> None:
    """o lies in memory as q, gradients as what they are of, and all are those of contiguous inputs.

    Args:
        order: of q's dimensions in memory; k has the reverse of its first three, v is contiguous.
        shape: q_heads, kv_heads, q_len, kv_len. dims: head_dim, v_dim.
    """
    q_heads, kv_heads, q_len, kv_len = shape
    qkv = make_qkv(2, q_heads, kv_heads, q_len, kv_len, *dims, dtype=dtype, device=device)
    do = torch.randn(2, q_heads, q_len, dims[1], device=device).to(dtype)
    mask = (torch.rand(q_len, kv_len) < 0.5).to(device)
    orders = order, (*order[2::-1], 3), (0, 1, 2, 3)
    laid = [t.permute(o).contiguous().permute(_inverse(o)) for t, o in zip(qkv, orders, strict=True)]

    def call(*inputs: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        o = attention(*leaves, mask, backend=backend, deterministic=True)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    got, expected = call(*laid), call(*qkv)
    for x, y in zip(got, expected, strict=True):
        assert y.is_contiguous()
        assert torch.equal(x, y)
    for x, o in zip(got, (order, *orders), strict=True):
        assert x.permute(o).is_contiguous()
    assert attention(*laid, mask, backend=backend).permute(order).is_contiguous()


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(d) for d in range(len(order)))
