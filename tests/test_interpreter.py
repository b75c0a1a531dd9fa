"""The Triton kernels on CPU tensors, through Triton's interpreter, which raises on int32 overflow here.

Skipped unless TRITON_INTERPRET=1 is set before Triton is imported: test_interpreted.py runs this file so.
"""

import pytest
import torch

from anymask import attention, pack
from anymask.backends import load
from anymask.backends.gpu.arguments import TileConfig, has_pair, kernel_options
from anymask.backends.gpu.passes import BackwardCall, RowsOf, empty_rows, launch_delta, launch_dq
from anymask.testing import LAYOUTS, MASKS, Case, check, reference
from tests.helpers import grid
from tests.helpers.grid import BF16, F16, F32, cases
from tests.helpers.interpreter import MARKS, MASK_NAMES
from tests.helpers.interpreter import interpreter as interpreter

pytestmark = MARKS
BACKENDS = ("triton",)
CPU = torch.device("cpu")


# fp32 has small steps, so many, and the interpreter takes as long for a small one
@cases(
    BACKENDS,
    [Case(m, 140, 150, 16, t) for m in MASK_NAMES for t in (F16, BF16)]
    + [Case(m, 70, 140, 16, F32, batch=1) for m in ("none", "tiles", "empty_columns", "per_head")],
)
def test_masks_and_dtypes(backend: str, case: Case) -> None:
    check(case, backend)


@cases(BACKENDS, [Case(m, 60, 140, 16, F16, batch=1) for m in MASKS if m not in MASK_NAMES])
def test_every_other_mask(backend: str, case: Case) -> None:
    check(case, backend)


@cases(
    BACKENDS,
    [Case(m, q, kv, 16, F16, 24, q_heads=4) for m in MASK_NAMES for q, kv in ((49, 49), (5, 33), (100, 128))],
)
def test_windows(backend: str, case: Case) -> None:
    check(case, backend)


@cases(
    BACKENDS,
    [
        Case(m, q, kv, 16, F16, batch=1)
        for q, kv in grid.LENGTHS
        if q * kv < 50000
        for m in ("none", "random", "empty_rows")
    ],
)
def test_lengths(backend: str, case: Case) -> None:
    check(case, backend)


@cases(
    BACKENDS,
    [Case("random", 130, 131, d, F16, dv, batch=1, q_heads=1, kv_heads=1) for d, dv in grid.DIMS]
    + [Case("none", 40, 131, d, BF16, dv, batch=1, q_heads=1, kv_heads=1) for d, dv in grid.DIMS]
    + [Case("causal", 40, 70, d, F32, dv, batch=1, q_heads=1, kv_heads=1) for d, dv in grid.DIMS],
)
def test_head_dims(backend: str, case: Case) -> None:
    check(case, backend)


@cases(
    BACKENDS, [Case(m, 65, 140, 16, F16, q_heads=h, kv_heads=g) for h, g in [(4, 2), (7, 1)] for m in grid.HEAD_MASKS]
)
def test_heads(backend: str, case: Case) -> None:
    check(case, backend)


@cases(BACKENDS, [Case("documents", 70, 140, 16, F16, 32, q_heads=4, layout=layout) for layout in LAYOUTS])
def test_layouts(backend: str, case: Case) -> None:
    check(case, backend)


@cases(
    BACKENDS,
    [
        Case(m, 40, 140, 16, F32, batch=1, q_heads=1, kv_heads=1, scale=s)
        for s in (-0.3, 0.0, 1e-3, 3.0)
        for m in ("none", "causal_behind")
    ],
)
def test_scales(backend: str, case: Case) -> None:
    check(case, backend)


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(
    BACKENDS,
    [Case(m, 140, 300, 16, F16, batch=1) for m in ("empty_columns", "empty_head", "tiles", "all_empty")]
    + [Case(m, 40, 60, 16, F16, batch=1) for m in ("empty_columns", "empty_head", "all_empty")],
)
def test_unused_keys_reach_nothing(backend: str, case: Case, value: float) -> None:
    grid.check_unused_keys_reach_nothing(case, backend, "cpu", value)


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(BACKENDS, [Case(m, n, 40, 16, F16, batch=1) for n in (140, 60) for m in ("empty_rows", "column", "all_empty")])
def test_unused_queries_reach_nothing(backend: str, case: Case, value: float) -> None:
    grid.check_unused_queries_reach_nothing(case, backend, "cpu", value)


@cases(BACKENDS, [Case(m, 140, 300, 16, F16, batch=1) for m in ("none", "random", "empty_columns", "empty_rows")])
def test_tiles_that_descriptors_read(backend: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of the copy engine, which the interpreter has too."""
    monkeypatch.setattr("anymask.backends.triton.can_use_tma", lambda *_: True)
    check(case, backend)
    if case.mask == "empty_columns":
        grid.check_unused_keys_reach_nothing(case, backend, "cpu", float("nan"))
    elif case.mask == "empty_rows":
        grid.check_unused_queries_reach_nothing(case, backend, "cpu", float("nan"))


@cases(BACKENDS, [Case("random", 40, kv, 16, F16, batch=1, q_heads=4) for kv in (140, 60)])
def test_unused_rows_that_differ_by_head(backend: str, case: Case) -> None:
    grid.check_unused_rows_that_differ_by_head(case, backend, "cpu", float("nan"))


@cases(BACKENDS, [Case("empty_head", 40, 140, 16, F16, batch=1, q_heads=4)])
def test_keys_that_one_head_of_a_group_has(backend: str, case: Case) -> None:
    check(case, backend)


@cases(BACKENDS, [Case("random", 140, 200, 16, F16, batch=1)])
def test_emptied_rows_leave_the_others(backend: str, case: Case) -> None:
    grid.check_emptied_rows_leave_the_others(case, backend, "cpu")


@cases(BACKENDS, [Case("causal", 200, 140, 16, F16, batch=1)])
def test_forms_of_a_mask_agree(backend: str, case: Case) -> None:
    grid.check_forms_of_a_mask_agree(case, backend, "cpu")


@cases(BACKENDS, [Case(m, 33, 300, 16, F16, batch=1) for m in ("causal_lower_right", "random", "none")])
def test_growing_scores(backend: str, case: Case) -> None:
    grid.check_growing_scores(case, backend, "cpu")


@cases(BACKENDS, [Case(m, 33, 300, 16, F16, batch=1) for m in ("random", "none")])
def test_high_hidden_scores(backend: str, case: Case) -> None:
    grid.check_high_hidden_scores(case, backend, "cpu")


@pytest.mark.parametrize("shift", [-50.0, -1000.0, -10000.0])
@cases(BACKENDS, [Case("random", 33, kv, 16, t, batch=1) for kv in (1, 64, 129) for t in (F32, BF16)])
def test_far_from_zero_scores(backend: str, case: Case, shift: float) -> None:
    grid.check_far_from_zero(case, backend, "cpu", shift)


@pytest.mark.parametrize(("dim", "padded"), [(64, 64), (40, 64), (128, 128), (96, 128)])
@pytest.mark.parametrize("q_len", [1, 64, 200, 256])
def test_dq_leaves_its_accumulator_in_order(q_len: int, dim: int, padded: int) -> None:
    """The one plain kernel of the Hopper backend: its input has the order that `store_dq` writes."""
    from anymask.backends.hopper.kernels.dq_sum import _dq_kernel

    batch, heads, rows = 2, 3, (q_len + 127) // 128 * 128
    sums = torch.randn(batch * heads, rows, padded)
    # block of 64 rows, 16 columns (8 b + 2 t + p) at a time -> (block, columns, row, t, b, p)
    acc = sums.view(batch * heads, rows // 64, 64, padded // 16, 2, 4, 2).permute(0, 1, 3, 2, 5, 4, 6).reshape(-1, 32)
    expected = (sums[:, :q_len, :dim] * 0.5).to(F16).view(batch, heads, q_len, dim)
    by_head = torch.full_like(expected, float("nan"))
    by_token = torch.full((batch, q_len, heads, dim), float("nan"), dtype=F16).transpose(1, 2)
    for dq in (by_head, by_token):
        steps = [stride // 8 for stride in dq.stride()[:3]]
        programs = batch * heads * rows // 64
        _dq_kernel[(programs,)](acc, dq, *steps, heads, q_len, 0.5, DIM=dim, HEAD_DIM=padded, TILE=128)
        assert torch.equal(dq, expected)


@pytest.mark.parametrize("has_dlse", [False, True])
@pytest.mark.parametrize("mask", ["none", "empty_rows"])
def test_dq_makes_the_delta_that_its_own_kernel_makes(mask: str, has_dlse: bool) -> None:
    """As the Hopper backend asks it to, for columns of few tiles."""
    q_len, dim, v_dim = 140, 16, 24
    q, do = torch.randn(2, 3, q_len, dim, dtype=F16), torch.randn(2, 3, q_len, v_dim, dtype=F16)
    k, v = torch.randn(2, 3, q_len, dim, dtype=F16), torch.randn(2, 3, q_len, v_dim, dtype=F16)
    block_mask = None if mask == "none" else pack(MASKS[mask](2, 3, q_len, q_len)[0])
    o, lse = load("triton").forward(q, k, v, block_mask, 0.25)
    dlse = torch.randn(lse.shape) if has_dlse else None
    q_used, kv_used = (has_pair(block_mask, view) for view in ("rows", "cols"))
    if mask == "empty_rows":
        # what no pair needs is not looked at
        assert q_used is not None
        do[(lse == -float("inf"))[..., None].expand_as(do)] = float("nan")
    found = []
    for rows_of in (None, RowsOf(o, lse, dlse)):
        rows = launch_delta(o, do, lse, dlse) if rows_of is None else empty_rows(lse)
        if rows_of is not None:
            for row in rows:
                row.fill_(float("nan"))
        call, dq = BackwardCall(q, k, v, do, *rows, q_used, kv_used, block_mask, 0.25), torch.full_like(q, float("nan"))
        launch_dq(call, dq, *kernel_options(TileConfig(64, 64, 4, 2), dim, v_dim, False), rows_of=rows_of)
        found.append((*rows, dq))
    assert all(torch.equal(apart, fused) for apart, fused in zip(*found, strict=True))
    assert found[0][2].isfinite().all()


@pytest.mark.parametrize("order", grid.ORDERS[1:3])
def test_outputs_lie_as_inputs_do(order: tuple[int, ...]) -> None:
    grid.check_layouts(order, (2, 1, 70, 150), "triton")


def test_a_mask_does_not_outlive_its_call() -> None:
    grid.check_a_mask_does_not_outlive_its_call("triton", "cpu", F16)


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("mask", [None, "empty_columns"])
def test_offsets_beyond_int32(which: str, mask: str | None) -> None:
    # rows 2**24 elements apart over a storage that they all share: row 140 lies beyond 2**31
    length, dim = 140, 16
    tensors = {name: torch.randn(1, 1, length, dim, dtype=F16) for name in "qkv"}
    row = torch.randn(dim, dtype=F16)
    far = torch.empty(0, dtype=F16).set_(
        _sparse_storage(row, length, 1 << 24), 0, (1, 1, length, dim), (0, 0, 1 << 24, 1)
    )
    tensors[which] = far
    assert (length - 1) * far.stride(2) > 2**31
    near = {name: t.clone() for name, t in tensors.items()}
    dense = None if mask is None else MASKS[mask](1, 1, length, length)[0]
    do = torch.randn(1, 1, length, dim, dtype=F16)

    def grads(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [tensors[name].detach().requires_grad_() for name in "qkv"]
        o = attention(*leaves, dense, backend="triton")
        return o.detach(), *torch.autograd.grad(o, leaves, do)

    for a, b in zip(grads(tensors), grads(near), strict=True):
        assert torch.equal(a, b)
    expected = reference(near["q"], near["k"], near["v"], dense, None, do)
    torch.testing.assert_close(grads(tensors)[0].double(), expected.o, atol=2e-3, rtol=2e-3)


def _sparse_storage(row: torch.Tensor, length: int, stride: int) -> torch.UntypedStorage:
    """A file of zeros with a row every `stride` elements; only the pages written exist."""
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        whole = torch.from_file(file.name, shared=True, size=(length - 1) * stride + row.numel(), dtype=row.dtype)
        for i in range(length):
            whole[i * stride : i * stride + row.numel()] = row * (1 + i / length)
        return whole.untyped_storage()
