"""Cases and properties that every backend must satisfy, on every device: shared by the files that name a backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anymask import attention, pack
from anymask.testing import (
    Case,
    Inputs,
    Results,
    assert_dead_is_zero,
    assert_matches,
    eager,
    magnitudes,
    make_inputs,
    reference,
    run,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SPECIAL_VALUES = [float("nan"), float("inf"), -float("inf")]
# (q_heads, kv_heads): groups of 1, 2, 7 and all heads
HEADS = [(1, 1), (4, 2), (7, 1), (14, 2), (6, 6)]
# (head_dim, v_dim)
DIMS = [(1, 1), (8, 24), (16, 16), (31, 31), (64, 32), (72, 72), (96, 96), (128, 128), (192, 128), (256, 256)]
LENGTHS = [(1, 1), (1, 5), (5, 3), (1, 239), (239, 1), (63, 129), (127, 257), (128, 128), (129, 63), (300, 513)]
LENGTH_MASKS = ["none", "causal", "causal_lower_right", "random", "empty_rows"]
HEAD_MASKS = ["none", "per_head", "per_batch", "per_batch_head", "documents"]
DEAD_MASKS = ["empty_columns", "key_padding", "all_empty", "one_pair", "empty_head", "tiles", "causal_behind", "row"]


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
    return aligned and 33 <= dim <= 128 and case.dtype in (F16, BF16) and case.layout != "expanded"


def same(a: Results, b: Results, backend: str | None = None) -> None:
    """Assert bit-equal results, but for dq of `hopper`, whose tiles add to it in the order in which they finish."""
    for name in Results._fields:
        x, y = getattr(a, name), getattr(b, name)
        if name == "dq" and backend == "hopper":
            assert_nearly(x, y)
        else:
            assert torch.equal(x, y), f"{name} differs in {int((x != y).sum())} of {x.numel()} elements"


def assert_nearly(x: Tensor, y: Tensor) -> None:
    """Assert that two sums of the same terms, in any order, differ by roundings only; a NaN fails."""
    error, size = float((x.double() - y.double()).norm()), float(y.double().norm())
    assert error <= 1e-3 * size, f"{error} of {size}"


def _with(t: Tensor, dead: Tensor, value: float) -> Tensor:
    """`t` with the rows `dead` holding `value`; strides kept."""
    out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t.detach())
    return out.masked_fill_(dead[..., None], value).requires_grad_(t.requires_grad)


def dead_keys(inputs: Inputs) -> Tensor:
    """bool `[batch, kv_heads, kv_len]`: keys that no query of any head attends to."""
    return ~inputs.dense.any(-2).unflatten(1, (inputs.k.shape[1], -1)).any(2)


def check_dead_keys_reach_nothing(case: Case, backend: str, device: str, value: float) -> None:
    """NaN or Inf in keys and values that no query may attend to: every result bit-equal to zeros there."""
    inputs = make_inputs(case, device)
    dead = dead_keys(inputs)
    assert dead.any(), "the case has no dead key"
    clean, dirty = (
        run(inputs._replace(k=_with(inputs.k, dead, x), v=_with(inputs.v, dead, x)), case.scale, backend)
        for x in (0.0, value)
    )
    same(clean, dirty, backend)
    assert_dead_is_zero(dirty, inputs.dense)


def check_dead_queries_reach_nothing(case: Case, backend: str, device: str, value: float) -> None:
    """NaN or Inf in q, do and dlse of queries without a key: every result bit-equal to zeros there."""
    inputs = make_inputs(case, device)
    dead = ~inputs.dense.any(-1)
    assert dead.any(), "the case has no dead query"

    def filled(x: float) -> Results:
        dlse = inputs.dlse.masked_fill(dead, x)
        q, do = _with(inputs.q, dead, x), _with(inputs.do, dead, x)
        return run(inputs._replace(q=q, do=do, dlse=dlse), case.scale, backend)

    same(filled(0.0), filled(value), backend)


def check_emptied_rows_leave_the_others(case: Case, backend: str, device: str) -> None:
    """Taking all keys from some rows: those are exactly 0, every other row's o, lse, dq keep their bits."""
    inputs = make_inputs(replace(case, mask="random"), device)
    emptied = torch.arange(case.q_len, device=device) % 3 == 1
    dense = inputs.dense & ~emptied[:, None]
    before, after = run(inputs, backend=backend), run(inputs._replace(mask=dense, dense=dense), backend=backend)
    assert_dead_is_zero(after, dense)
    kept = ~emptied
    for name in ("o", "lse", "dq"):
        x, y = (getattr(r, name)[:, :, kept] for r in (before, after))
        if name == "dq" and backend == "hopper":
            assert_nearly(x, y)
        else:
            assert torch.equal(x, y), name


def check_forms_of_a_mask_agree(case: Case, backend: str, device: str) -> None:
    """A tensor, its `BlockMask`, the symbolic mask and `is_causal` give the same bits."""
    inputs = make_inputs(replace(case, mask="causal"), device)
    lens = {"q_len": case.q_len, "kv_len": case.kv_len}
    symbolic = run(inputs, backend=backend)
    for mask in (
        inputs.dense[0, 0],
        inputs.dense,
        pack(inputs.mask, **lens, device=device),
        pack(inputs.dense[:1, :1]),
    ):
        same(symbolic, run(inputs._replace(mask=mask), backend=backend), backend)
    q, k, v, _, _, do, dlse = inputs
    o, lse = attention(q, k, v, is_causal=True, return_lse=True, backend=backend)
    same(symbolic, Results(o.detach(), lse.detach(), *torch.autograd.grad([o, lse], [q, k, v], [do, dlse])), backend)


def check_repeats(case: Case, backend: str, device: str, times: int, deterministic: bool | None = None) -> None:
    """Run after run, the same bits; of dq too if `deterministic`."""
    inputs = make_inputs(case, device)
    first = run(inputs, case.scale, backend, deterministic)
    for _ in range(times - 1):
        same(first, run(inputs, case.scale, backend, deterministic), None if deterministic else backend)


def check_a_mask_does_not_outlive_its_call(backend: str, device: str, dtype: torch.dtype = F32) -> None:
    """A masked call, then an unmasked one, then a larger and a smaller mask: each has its own result."""
    sizes = [("random", 150, 150), ("none", 150, 150), ("prefix_lm", 200, 200), ("prefix_lm", 50, 50)]
    calls = [make_inputs(Case(m, q, kv, 32, dtype), device) for m, q, kv in sizes]
    limit = 1e-4 if dtype == F32 else 2e-2
    for inputs, got in zip(calls, [run(inputs, backend=backend) for inputs in calls], strict=True):
        expected = reference(*inputs[:3], inputs.dense, None, inputs.do, inputs.dlse)
        for name, x, y in zip(Results._fields, got, expected, strict=True):
            assert torch.allclose(x.double(), y, atol=limit, rtol=limit), name


def check_growing_scores(case: Case, backend: str, device: str) -> None:
    """Keys that grow with their position, so that every tile moves the maxima of its rows: as right as any."""
    inputs = make_inputs(case, device)
    ramp = torch.linspace(0.1, 20, case.kv_len, device=device)[:, None]
    inputs = inputs._replace(k=(inputs.k.detach() * ramp).to(case.dtype).requires_grad_())
    _check_inputs(inputs, case, backend)


def check_a_first_tile_of_zero_scores(case: Case, backend: str, device: str) -> None:
    """Keys of the first tile that are 0, so that its scores are, and others after them: as right as any."""
    inputs = make_inputs(case, device)
    k = inputs.k.detach().clone()
    k[:, :, :128] = 0
    k[:, :, 128:] *= 4
    _check_inputs(inputs._replace(k=k.requires_grad_()), case, backend)


def check_unused_rows_that_differ_by_head(case: Case, backend: str, device: str, value: float) -> None:
    """Queries without a key, and keys without a query, others in each head, hold NaN or Inf: bit-equal to zeros."""
    inputs = make_inputs(case, device)
    generator = torch.Generator().manual_seed(case.seed)
    used_q = (torch.rand(1, case.q_heads, case.q_len, 1, generator=generator) < 0.6).to(device)
    # the heads of a group share their keys
    group = case.q_heads // case.kv_heads
    used_k = torch.rand(1, case.kv_heads, 1, case.kv_len, generator=generator) < 0.6
    dense = used_q & used_k.repeat_interleave(group, 1).to(device)
    inputs = inputs._replace(mask=dense, dense=dense.expand_as(inputs.dense))
    unused_q, unused_k = ~inputs.dense.any(-1), dead_keys(inputs)
    assert unused_q.any()
    assert unused_k.any()

    def filled(x: float) -> Results:
        q, do = _with(inputs.q, unused_q, x), _with(inputs.do, unused_q, x)
        k, v = _with(inputs.k, unused_k, x), _with(inputs.v, unused_k, x)
        return run(inputs._replace(q=q, k=k, v=v, do=do, dlse=inputs.dlse.masked_fill(unused_q, x)), backend=backend)

    clean = filled(0.0)
    same(clean, filled(value), backend)
    assert_dead_is_zero(clean, inputs.dense)


def check_high_hidden_scores(case: Case, backend: str, device: str) -> None:
    """Hidden pairs that score e**64 times what the others do, in every tile: as right as any."""
    inputs = make_inputs(case, device)
    q, k = inputs.q.detach().clone(), inputs.k.detach().clone()
    rows, columns = (torch.arange(n, device=device) % 2 * 2 - 1 for n in (case.q_len, case.kv_len))
    # a last dimension of its own, whose product is 32 where the parity is the same, else -32
    q[..., -1], k[..., -1] = 8 * rows, 4 * case.head_dim**0.5 * columns
    visible = inputs.dense & (rows[:, None] != columns)
    _check_inputs(
        inputs._replace(q=q.requires_grad_(), k=k.requires_grad_(), mask=visible, dense=visible), case, backend
    )


def _check_inputs(inputs: Inputs, case: Case, backend: str) -> None:
    args = inputs.q, inputs.k, inputs.v, inputs.dense, None, inputs.do, inputs.dlse
    expected, yardstick, magnitude = reference(*args), eager(*args), magnitudes(*args)
    rows = min(case.q_len, case.kv_len)
    for what, *tensors, size in zip(
        Results._fields, run(inputs, backend=backend), expected, yardstick, magnitude, strict=True
    ):
        assert_matches(*tensors, case.dtype, what, rows, size)


def check_far_from_zero(case: Case, backend: str, device: str, shift: float) -> None:
    """`shift` added to every score, as in trained models: finite, and as exact as fp32 scores of that size allow."""
    inputs = make_inputs(case, device)
    q, k = inputs.q.detach().clone(), inputs.k.detach().clone()
    # a last dimension of its own, whose product is the shift exactly
    q[..., -1], k[..., -1] = shift / 4, 4 * case.head_dim**0.5
    inputs = inputs._replace(q=q.requires_grad_(), k=k.requires_grad_())
    results = run(inputs, backend=backend)
    args = inputs.q, inputs.k, inputs.v, inputs.dense, None, inputs.do, inputs.dlse
    # a score and its lse hold a few units in the last place of the shift, and p moves by as much
    slack = 8 * torch.finfo(F32).eps * abs(shift) + 4 * torch.finfo(case.dtype).eps
    for what, got, want, size in zip(Results._fields, results, reference(*args), magnitudes(*args), strict=True):
        limit = slack * (1 if what == "lse" else float(size.max()) + float(want.abs().max()))
        dead = want == -float("inf")
        assert torch.equal(dead, got == -float("inf")), what
        error = (got.double() - want).masked_fill(dead, 0.0).abs().max()
        assert error <= limit, f"{what}: {float(error):.3e} > {limit:.3e}"
