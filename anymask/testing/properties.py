"""What holds of every backend beside the oracle's numbers: each a function of a `Case` that asserts.

`hopper` sums dq in an order that changes from run to run: it is held to equal bits in all else, and in dq too where
`deterministic` is True.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from anymask import Mask, attention, backends, causal, document, pack, sliding_window
from anymask.backends import Backend
from anymask.testing.cases import Case, Inputs, judge_of, make_inputs, run
from anymask.testing.expressions import make_mask
from anymask.testing.oracle import Results, magnitudes, reference
from anymask.testing.rules import assert_same_block_mask, assert_unused_is_zero

# of what four times the lengths may allocate: proportional to them is 4, to the pairs 16
MEMORY_GROWTH = 6


def same(a: Results, b: Results, backend: Backend | None = None, deterministic: bool | None = None) -> None:
    """Assert bit-equal results, but for dq of `hopper`, whose tiles add to it in the order in which they finish."""
    for name in Results._fields:
        x, y = getattr(a, name), getattr(b, name)
        if name == "dq" and backend == "hopper" and not deterministic:
            assert_nearly(x, y)
        else:
            assert torch.equal(x, y), f"{name} differs in {int((x != y).sum())} of {x.numel()} elements"


def assert_nearly(x: Tensor, y: Tensor) -> None:
    """Assert that two sums of the same terms, in any order, differ by roundings only; a NaN fails."""
    error, size = float((x.double() - y.double()).norm()), float(y.double().norm())
    assert error <= 1e-3 * size, f"{error} of {size}"


def _with(t: Tensor, unused: Tensor, value: float) -> Tensor:
    """`t` with the rows `unused` holding `value`; strides kept."""
    out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t.detach())
    return out.masked_fill_(unused[..., None], value).requires_grad_(t.requires_grad)


def unused_keys(inputs: Inputs) -> Tensor:
    """bool `[batch, kv_heads, kv_len]`: keys that no query of any head attends to."""
    return ~torch.unflatten(inputs.dense.any(-2), 1, (inputs.k.shape[1], -1)).any(2)


def check_unused_keys_reach_nothing(
    case: Case, backend: Backend, device: str, value: float, deterministic: bool | None = None
) -> None:
    """NaN or Inf in keys and values that no query may attend to: every result bit-equal to zeros there."""
    inputs = make_inputs(case, device)
    unused = unused_keys(inputs)
    assert unused.any(), "the case has no unused key"
    clean, dirty = (
        run(
            inputs._replace(k=_with(inputs.k, unused, x), v=_with(inputs.v, unused, x)),
            case.scale,
            backend,
            deterministic,
        )
        for x in (0.0, value)
    )
    same(clean, dirty, backend, deterministic)
    assert_unused_is_zero(dirty, inputs.dense)


def check_unused_queries_reach_nothing(
    case: Case, backend: Backend, device: str, value: float, deterministic: bool | None = None
) -> None:
    """NaN or Inf in q, do and dlse of queries without a key: every result bit-equal to zeros there."""
    inputs = make_inputs(case, device)
    unused = ~inputs.dense.any(-1)
    assert unused.any(), "the case has no unused query"

    def filled(x: float) -> Results:
        dlse = inputs.dlse.masked_fill(unused, x)
        q, do = _with(inputs.q, unused, x), _with(inputs.do, unused, x)
        return run(inputs._replace(q=q, do=do, dlse=dlse), case.scale, backend, deterministic)

    same(filled(0.0), filled(value), backend, deterministic)


def check_emptied_rows_leave_the_others(
    case: Case, backend: Backend, device: str, deterministic: bool | None = None
) -> None:
    """Taking all keys from some rows: those are exactly 0, every other row's o, lse, dq keep their bits."""
    inputs = make_inputs(replace(case, mask="random"), device)
    emptied = torch.arange(case.q_len, device=device) % 3 == 1
    # of as many planes as the emptied one: on a CPU, heads that share a plane are multiplied together
    full = inputs.dense.contiguous()
    dense = full & ~emptied[:, None]
    before, after = (run(inputs._replace(mask=mask), case.scale, backend, deterministic) for mask in (full, dense))
    assert_unused_is_zero(after, dense)
    kept = ~emptied
    for name in ("o", "lse", "dq"):
        x, y = (getattr(r, name)[:, :, kept] for r in (before, after))
        if name == "dq" and backend == "hopper" and not deterministic:
            assert_nearly(x, y)
        else:
            assert torch.equal(x, y), name


def check_forms_of_a_mask_agree(case: Case, backend: Backend, device: str, deterministic: bool | None = None) -> None:
    """A tensor, its `BlockMask`, the symbolic mask and `is_causal` give the same bits."""
    inputs = make_inputs(replace(case, mask="causal"), device)
    symbolic = run(inputs, backend=backend, deterministic=deterministic)
    by_name = pack(causal(), q_len=case.q_len, kv_len=case.kv_len, device=device)
    for mask in (inputs.dense[0, 0], inputs.dense, by_name, pack(inputs.dense[:1, :1])):
        again = run(inputs._replace(mask=mask), backend=backend, deterministic=deterministic)
        same(symbolic, again, backend, deterministic)
    q, k, v, _, _, do, dlse = inputs
    o, lse = attention(q, k, v, is_causal=True, return_lse=True, backend=backend, deterministic=deterministic)
    dlse = dlse.to(lse.dtype)
    by_flag = Results(o.detach(), lse.detach(), *torch.autograd.grad([o, lse], [q, k, v], [do, dlse]))
    same(symbolic, by_flag, backend, deterministic)


def check_repeats(case: Case, backend: Backend, device: str, times: int, deterministic: bool | None = None) -> None:
    """Run after run, the same bits; of dq too if `deterministic`."""
    inputs = make_inputs(case, device)
    first = run(inputs, case.scale, backend, deterministic)
    for _ in range(times - 1):
        same(first, run(inputs, case.scale, backend, deterministic), backend, deterministic)


def check_a_sample_alone(case: Case, backend: Backend, device: str, deterministic: bool | None = None) -> None:
    """Each sample of a batch has the bits that it has in a call of its own, forward and backward.

    Scores of the samples differ by powers of 8, so that none can lean on how large those of another are.
    """
    inputs = make_inputs(case, device)
    sizes = 8.0 ** torch.arange(case.batch, device=device)
    q = (inputs.q.detach() * sizes[:, None, None, None]).to(case.dtype).requires_grad_()
    inputs = inputs._replace(q=q, mask=inputs.dense)
    together = run(inputs, case.scale, backend, deterministic)
    for b in range(case.batch):
        q, k, v = (t.detach()[b : b + 1].requires_grad_() for t in inputs[:3])
        dense, do, dlse = (t[b : b + 1] for t in (inputs.dense, inputs.do, inputs.dlse))
        alone = run(Inputs(q, k, v, dense, dense, do, dlse), case.scale, backend, deterministic)
        same(alone, Results(*(t[b : b + 1] for t in together)), backend, deterministic)


def check_packing(case: Case, device: str) -> None:
    """A mask packs to its meaning, and to the same bits from an expression, from a tensor, and on the CPU."""
    mask, dense = make_mask(case.mask, case.batch, case.q_heads, case.q_len, case.kv_len, case.seed + 1, device)
    dense = dense.expand(case.batch, case.q_heads, case.q_len, case.kv_len)
    batch, heads = _planes_of(mask)
    planes = dense[:batch, :heads]
    mask = planes if mask is None else mask
    packed = pack(mask, q_len=case.q_len, kv_len=case.kv_len, device=device)
    wrong = packed.to_dense().expand_as(dense) != dense
    assert not wrong.any(), f"{int(wrong.sum())} pairs differ, first at {wrong.nonzero()[0].tolist()}"
    assert_same_block_mask(packed, pack(planes.contiguous()))
    if torch.device(device).type != "cpu":
        assert_same_block_mask(packed, pack(planes.cpu()))


def _planes_of(mask: Mask | Tensor | None) -> tuple[int, int]:
    """Samples and heads that are stored: of a tensor those that are not stretched with stride 0."""
    if not isinstance(mask, Tensor):
        return (1, 1) if mask is None else mask.planes
    wide = mask[(None,) * (4 - mask.dim())]
    batch, heads = (wide.shape[dim] if wide.stride(dim) else 1 for dim in (0, 1))
    return batch, heads


class Allocations(TorchDispatchMode):
    """Bytes of the largest storage that operations create."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and look at what it made."""
        out = func(*args, **(kwargs or {}))
        made = [t.untyped_storage().nbytes() for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.largest = max(self.largest, *made, 0)
        return out


def check_memory(case: Case, backend: Backend, device: str) -> None:
    """Packing, forward and backward allocate in proportion to the lengths, not to `q_len * kv_len`.

    The lengths of `case` are compared with four times those. On a GPU it is the peak of all that is allocated beside
    the inputs that counts; elsewhere the largest tensor that an operation makes.
    """
    small = _allocated(case, backend, device)
    large = _allocated(replace(case, q_len=4 * case.q_len, kv_len=4 * case.kv_len), backend, device)
    assert large <= MEMORY_GROWTH * small, (
        f"{small:,} bytes for {case.q_len} x {case.kv_len} pairs and {large:,} for four times both lengths, allowed "
        f"are {MEMORY_GROWTH} times as many"
    )


def _allocated(case: Case, backend: Backend, device: str) -> int:
    ids = torch.arange(max(case.q_len, case.kv_len), device=device) // 1000
    mask = sliding_window(300) & document(ids[: case.q_len], kv_ids=ids[: case.kv_len])
    # `row` is a broadcast: its meaning takes no memory
    inputs = make_inputs(replace(case, mask="row"), device)._replace(mask=mask)
    if torch.device(device).type != "cuda":
        return _largest(inputs, case, backend, mask)
    run(inputs, case.scale, backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(inputs, case.scale, backend)
    peak: int = torch.cuda.max_memory_allocated()
    return peak - before


def _largest(inputs: Inputs, case: Case, backend: Backend, mask: Mask) -> int:
    """Bytes of the largest tensor; no mode sees what happens inside an operator, so the backend is called itself."""
    chosen = backends.load(backend)
    q, k, v = (t.detach() for t in inputs[:3])
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
    with Allocations() as seen:
        packed = pack(mask, q_len=case.q_len, kv_len=case.kv_len, device=q.device)
        o, lse = chosen.forward(q, k, v, packed, scale)
        chosen.backward(q, k, v, o, lse, inputs.do, inputs.dlse, packed, scale, False)
    return int(seen.largest)


def check_growing_scores(case: Case, backend: Backend, device: str) -> None:
    """Keys that grow with their position, so that every tile moves the maxima of its rows: as right as any."""
    inputs = make_inputs(case, device)
    ramp = torch.linspace(0.1, 20, case.kv_len, device=device)[:, None]
    inputs = inputs._replace(k=(inputs.k.detach() * ramp).to(case.dtype).requires_grad_())
    judge_of(inputs, case, min(case.q_len, case.kv_len))(run(inputs, case.scale, backend))


def check_a_first_tile_of_zero_scores(case: Case, backend: Backend, device: str) -> None:
    """Keys of the first tile that are 0, so that its scores are, and others after them: as right as any."""
    inputs = make_inputs(case, device)
    k = inputs.k.detach().clone()
    k[:, :, :128] = 0
    k[:, :, 128:] *= 4
    inputs = inputs._replace(k=k.requires_grad_())
    judge_of(inputs, case, min(case.q_len, case.kv_len))(run(inputs, case.scale, backend))


def check_unused_rows_that_differ_by_head(case: Case, backend: Backend, device: str, value: float) -> None:
    """Queries without a key, and keys without a query, others in each head, hold NaN or Inf: bit-equal to zeros."""
    inputs = make_inputs(case, device)
    generator = torch.Generator().manual_seed(case.seed)
    used_q = (torch.rand(1, case.q_heads, case.q_len, 1, generator=generator) < 0.6).to(device)
    # the heads of a group share their keys
    group = case.q_heads // case.kv_heads
    used_k = torch.rand(1, case.kv_heads, 1, case.kv_len, generator=generator) < 0.6
    dense = used_q & used_k.repeat_interleave(group, 1).to(device)
    inputs = inputs._replace(mask=dense, dense=dense.expand_as(inputs.dense))
    unused_q, unused_k = ~inputs.dense.any(-1), unused_keys(inputs)
    assert unused_q.any()
    assert unused_k.any()

    def filled(x: float) -> Results:
        q, do = _with(inputs.q, unused_q, x), _with(inputs.do, unused_q, x)
        k, v = _with(inputs.k, unused_k, x), _with(inputs.v, unused_k, x)
        return run(inputs._replace(q=q, k=k, v=v, do=do, dlse=inputs.dlse.masked_fill(unused_q, x)), backend=backend)

    clean = filled(0.0)
    same(clean, filled(value), backend)
    assert_unused_is_zero(clean, inputs.dense)


def check_high_hidden_scores(case: Case, backend: Backend, device: str, by_size: bool = False) -> None:
    """Hidden pairs that score e**64 times what the others do, in every tile: as right as any.

    `by_size`: or as exact as fp32 scores of 32 allow. Tensor cores round sums toward 0, eager torch's fp32 does not.
    """
    inputs = make_inputs(case, device)
    q, k = inputs.q.detach().clone(), inputs.k.detach().clone()
    rows, columns = (torch.arange(n, device=device) % 2 * 2 - 1 for n in (case.q_len, case.kv_len))
    # a last dimension of its own, whose product is 32 where the parity is the same, else -32
    q[..., -1], k[..., -1] = 8 * rows, 4 * case.head_dim**0.5 * columns
    visible = inputs.dense & (rows[:, None] != columns)
    inputs = inputs._replace(q=q.requires_grad_(), k=k.requires_grad_(), mask=visible, dense=visible)
    results = run(inputs, case.scale, backend)
    if by_size:
        _check_by_size(case, inputs, results, 32.0, case.scale)
    else:
        judge_of(inputs, case, min(case.q_len, case.kv_len))(results)


def check_far_from_zero(case: Case, backend: Backend, device: str, shift: float) -> None:
    """`shift` added to every score, as in trained models: finite, and as exact as fp32 scores of that size allow."""
    inputs = make_inputs(case, device)
    q, k = inputs.q.detach().clone(), inputs.k.detach().clone()
    # a last dimension of its own, whose product is the shift exactly
    q[..., -1], k[..., -1] = shift / 4, 4 * case.head_dim**0.5
    inputs = inputs._replace(q=q.requires_grad_(), k=k.requires_grad_())
    _check_by_size(case, inputs, run(inputs, backend=backend), shift)


def _check_by_size(case: Case, inputs: Inputs, results: Results, shift: float, scale: float | None = None) -> None:
    """Finite, and as exact as fp32 scores of the size of `shift` allow."""
    args = inputs.q, inputs.k, inputs.v, inputs.dense, scale, inputs.do, inputs.dlse
    # a score and its lse hold a few units in the last place of the shift, and p moves by as much
    slack = 8 * torch.finfo(torch.float32).eps * abs(shift) + 4 * torch.finfo(case.dtype).eps
    for what, got, want, size in zip(Results._fields, results, reference(*args), magnitudes(*args), strict=True):
        limit = slack * (1 if what == "lse" else float(size.max()) + float(want.abs().max()))
        no_key = want == -float("inf")
        assert torch.equal(no_key, got == -float("inf")), what
        error = (got.double() - want).masked_fill(no_key, 0.0).abs().max()
        assert error <= limit, f"{what}: {float(error):.3e} > {limit:.3e}"
