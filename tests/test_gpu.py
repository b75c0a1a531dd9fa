"""The GPU backends: the grid of the CPU tests at larger sizes, and what only a GPU can show.

Head dimensions and mask forms are few on purpose: each combination compiles its own kernels.
"""

from typing import Any

import pytest
import torch

from anymask import (
    attention,
    causal,
    explain,
    flash_attention_custom_mask,
    ops,
    pack,
)
from anymask.testing import LAYOUTS, MASKS, Case, check, make_inputs, make_qkv, run
from tests.helpers import grid
from tests.helpers.grid import BF16, F16, F32, cases

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
BACKENDS = ("hopper", "triton")
NAMES = ["triton", pytest.param("hopper", marks=pytest.mark.hopper)]
DIMS = [(16, 16), (31, 31), (64, 32), (72, 72), (96, 96), (128, 128), (192, 128), (256, 256)]
SIZES = [(1000, 1000), (513, 1025)]


@cases(
    BACKENDS,
    [Case(m, q, kv, 64, t, q_heads=4) for m in MASKS for q, kv in SIZES for t in (F16, BF16, F32)],
)
def test_masks(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("shape", [(4, 4, 300, 500), (4, 2, 300, 500), (8, 2, 9, 500), (8, 1, 1, 500)], ids=str)
@pytest.mark.parametrize("order", grid.ORDERS)
def test_outputs_lie_as_inputs_do(order: tuple[int, ...], shape: Any, backend: str, device: str) -> None:
    for dims in ((64, 40), (128, 128)):
        grid.check_layouts(order, shape, backend, device, F16, dims)


@cases(
    ("hopper",),
    [
        Case(m, 1000, 700, d, F16, q_heads=4, kv_heads=4)
        for m in ("tiles", "empty_columns", "empty_head")
        for d in (64, 128)
    ],
)
def test_keys_without_a_query(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@cases(BACKENDS, [Case(m, q, kv, 64, t) for q, kv in grid.LENGTHS for m in grid.LENGTH_MASKS for t in (F16, F32)])
def test_lengths(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@cases(
    BACKENDS,
    [
        Case(m, q, kv, 64, BF16, 32, q_heads=4)
        for m in MASKS
        for q, kv in ((64, 64), (49, 49), (5, 33), (128, 100), (100, 128))
    ],
)
def test_windows(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@cases(
    ("hopper",),
    [Case(m, q, kv, d, F16) for q, kv in grid.LENGTHS for m in grid.LENGTH_MASKS[1:] for d in (64, 128)]
    + [Case(m, 300, 300, d, BF16, q_heads=4) for m in ("per_batch", "per_batch_head") for d in (40, 64, 96)]
    + [Case(m, 300, 300, d, BF16) for m in ("per_batch", "empty_columns") for d in (40, 64, 96)],
)
def test_short_lines_without_a_sum_of_dq(
    backend: str, case: Case, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anymask.backends.hopper.tuning.MANY_COLUMNS", 1)
    check(case, backend, device)


@cases(
    BACKENDS,
    [Case("random", 700, 900, d, F16, dv) for d, dv in DIMS]
    + [Case("none", 700, 900, d, F16, dv) for d, dv in DIMS if d in (96, 128)]
    + [Case(m, 700, 900, d, BF16) for d in (40, 80, 128) for m in ("random", "none", "causal")]
    + [Case("empty_columns", 700, 900, d, BF16) for d in (128, 256)]
    + [Case("random", 300, 500, d, F32) for d in (72, 128, 256)],
)
def test_head_dims(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@cases(
    BACKENDS,
    [Case(m, 300, 500, 64, F16, q_heads=h, kv_heads=g) for h, g in grid.HEADS for m in grid.HEAD_MASKS]
    + [Case("documents", 1024, 1024, 128, t, q_heads=28, kv_heads=4, batch=1) for t in (F16, BF16)],
)
def test_heads(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@cases(
    BACKENDS,
    [
        Case(m, n, 500, 64, t, q_heads=4, layout=layout)
        for layout in LAYOUTS
        for n in (300, 500)
        for m in ("none", "documents")
        for t in (F16, F32)
    ],
)
def test_layouts(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@cases(BACKENDS, [Case(m, 300, 500, 64, F16, scale=s) for s in (-0.3, 0.0, 1e-3, 1.0) for m in ("none", "random")])
def test_scales(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@cases(
    BACKENDS,
    [Case(m, 2048, 2048, 64, t, batch=1) for m in ("documents", "random", "block_diffusion") for t in (F16, BF16)],
)
def test_long(backend: str, case: Case, device: str) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(
    BACKENDS,
    [Case(m, 300, 600, 64, t) for m in grid.UNUSED_MASKS for t in (F16, F32)]
    + [
        Case(m, q, kv, d, F16) for q, kv, d in ((300, 600, 128), (60, 40, 64)) for m in ("empty_columns", "key_padding")
    ],
)
def test_unused_keys_reach_nothing(backend: str, case: Case, value: float, device: str) -> None:
    grid.check_unused_keys_reach_nothing(case, backend, device, value)
    if backend == "hopper":
        grid.check_unused_keys_reach_nothing(case, backend, device, value, deterministic=True)


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(
    BACKENDS,
    [Case(m, 600, 300, 64, F16) for m in ("empty_rows", "column", "all_empty", "one_pair", "causal_behind")]
    + [Case(m, *size, F16) for size in ((300, 600, 128), (60, 40, 64)) for m in ("empty_rows", "column")],
)
def test_unused_queries_reach_nothing(backend: str, case: Case, value: float, device: str) -> None:
    grid.check_unused_queries_reach_nothing(case, backend, device, value)
    if backend == "hopper":
        grid.check_unused_queries_reach_nothing(case, backend, device, value, deterministic=True)


@cases(BACKENDS, [Case("random", 500, 700, 64, t) for t in (F16, BF16, F32)])
def test_emptied_rows_leave_the_others(backend: str, case: Case, device: str) -> None:
    grid.check_emptied_rows_leave_the_others(case, backend, device)


@cases(BACKENDS, [Case("causal", 700, 500, d, F16) for d in (64, 128)])
def test_forms_of_a_mask_agree(backend: str, case: Case, device: str) -> None:
    grid.check_forms_of_a_mask_agree(case, backend, device)


@cases(
    BACKENDS, [Case(m, 700, 900, 64, t, q_heads=4) for m in ("per_head", "none", "documents") for t in (F16, BF16, F32)]
)
def test_runs_repeat(backend: str, case: Case, device: str) -> None:
    grid.check_repeats(case, backend, device, 20)


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(
    ("triton",),
    [Case("random", 300, 500, d, t, q_heads=h, kv_heads=2) for h in (2, 4) for d in (64, 128) for t in (F16, F32)],
)
def test_unused_rows_that_differ_by_head(backend: str, case: Case, value: float, device: str) -> None:
    grid.check_unused_rows_that_differ_by_head(case, backend, device, value)


@cases(BACKENDS, [Case("random", 700, 900, 64, F16), Case("documents", 1000, 1000, 128, BF16, q_heads=4, kv_heads=2)])
def test_deterministic_gradients(backend: str, case: Case, device: str) -> None:
    grid.check_repeats(case, backend, device, 100, deterministic=True)


@cases(("hopper",), [Case(m, 1000, 1100, d, t) for m, d, t in (("random", 128, F16), ("none", 64, BF16))])
def test_a_thousand_forwards(backend: str, case: Case, device: str) -> None:
    inputs = make_inputs(case, device)
    args = inputs.q.detach(), inputs.k.detach(), inputs.v.detach(), inputs.mask
    first = attention(*args, backend=backend)
    differ = [(attention(*args, backend=backend) != first).any() for _ in range(1000)]
    assert not torch.stack(differ).any()


@pytest.mark.hopper
@pytest.mark.parametrize("kv_len", [1, 100, 128, 300])
@pytest.mark.parametrize("q_len", [1, 5, 127, 4000])
def test_many_items_a_program(q_len: int, kv_len: int, device: str) -> None:
    """More query tiles than multiprocessors, so that programs take several; and fewer."""
    for dim in (64, 128):
        check(Case("random", q_len, kv_len, dim, F16, q_heads=16, kv_heads=4, batch=3), "hopper", device)


@pytest.mark.hopper
@pytest.mark.parametrize("programs", [3, 7, 9])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", ["documents", "random", "none"])
def test_few_programs(mask: str, dim: int, programs: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program takes many work tiles, with all its stages and barriers going round."""
    monkeypatch.setattr("anymask.backends.hopper.multiprocessors", lambda device: programs)
    check(Case(mask, 700, 900, dim, F16, q_heads=4, kv_heads=2), "hopper", device)


@cases(BACKENDS, [Case(m, 300, 700, d, F16) for m in ("causal_lower_right", "random", "none") for d in (64, 128)])
def test_growing_scores(backend: str, case: Case, device: str) -> None:
    grid.check_growing_scores(case, backend, device)


@cases(BACKENDS, [Case(m, 300, 700, d, t) for m in ("random", "none") for d in (64, 128) for t in (F16, F32)])
def test_a_first_tile_of_zero_scores(backend: str, case: Case, device: str) -> None:
    grid.check_a_first_tile_of_zero_scores(case, backend, device)


@cases(
    BACKENDS,
    [Case(m, 300, 700, d, t) for m in ("causal_lower_right", "random", "none") for d in (64, 128) for t in (F16, BF16)],
)
def test_high_hidden_scores(backend: str, case: Case, device: str) -> None:
    grid.check_high_hidden_scores(case, backend, device)


@pytest.mark.hopper
class TestHopperSaysNo:
    def why(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None, instead: str = "triton") -> str:
        with pytest.raises(ValueError, match="backend 'hopper' cannot run this call: ") as error:
            attention(q, k, v, mask, backend="hopper")
        assert explain(q, k, v, mask).backend == instead
        return str(error.value)

    def test_to_strides(self, device: str) -> None:
        q, k, v = make_qkv(2, 4, 4, 200, 200, 64, dtype=F16, device=device)
        odd = torch.randn(2, 4, 200, 65, dtype=F16, device=device)[..., :64]
        assert "k has strides" in self.why(q, odd, v)
        assert "v has strides (0," in self.why(q, k, v[:1].expand_as(v))
        assert "an address 2 beyond" in self.why(
            torch.randn(q.numel() + 1, dtype=F16, device=device)[1:].view_as(q), k, v
        )

    def test_to_dims_and_dtypes(self, device: str) -> None:
        assert "head_dim is 32" in self.why(*make_qkv(1, 1, 1, 9, 9, 32, dtype=F16, device=device))
        assert "head_dim is 264" in self.why(
            *make_qkv(1, 1, 1, 9, 9, 264, dtype=F16, device=device), instead="reference"
        )
        assert "dtype is torch.float32" in self.why(*make_qkv(1, 1, 1, 9, 9, 64, device=device))

    def test_to_keys_unused_in_one_head_of_a_group(self, device: str) -> None:
        q, k, v = make_qkv(1, 4, 2, 200, 200, 64, dtype=F16, device=device)
        mask = torch.ones(1, 4, 200, 200, dtype=torch.bool, device=device)
        mask[:, 1, :, :50] = False
        assert "the query heads of a group have different masks" in self.why(q, k, v, mask)


@pytest.mark.parametrize("shift", [-50.0, -89.0, -1000.0, -10000.0, 1000.0])
@cases(
    BACKENDS,
    [Case("random", 200, kv, 64, t) for kv in (1, 64, 192, 257) for t in (F32, BF16)]
    + [Case("none", 200, kv, d, BF16) for kv in (64, 192, 200) for d in (64, 128)],
)
def test_far_from_zero_scores(backend: str, case: Case, shift: float, device: str) -> None:
    grid.check_far_from_zero(case, backend, device, shift)


def test_a_mask_does_not_outlive_its_call(device: str) -> None:
    grid.check_a_mask_does_not_outlive_its_call("triton", device, F16)


def test_a_sample_alone_is_a_sample_in_a_batch(device: str) -> None:
    inputs = make_inputs(Case("per_batch", 500, 700, 64, F16, batch=3, q_heads=4), device)
    together = run(inputs, backend="triton")
    for b in range(3):
        one = [t[b : b + 1].detach() for t in (*inputs[:3], inputs.mask, inputs.dense, inputs.do, inputs.dlse)]
        alone = run(type(inputs)(*(t.requires_grad_() for t in one[:3]), *one[3:]), backend="triton")
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[b : b + 1], y)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("q_len", "group"), [(1, 8), (7, 4), (16, 8), (20, 6), (32, 4), (33, 4)])
def test_short_queries_of_grouped_heads(
    device: str, q_len: int, group: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the packed rows of the Hopper kernel, which has calls of more samples than these
    monkeypatch.setattr("anymask.backends.gpu.split.count", lambda q, k, block_mask: 1)
    q, k, v = make_qkv(2, 2 * group, 2, q_len, 1000, dim, dtype=F16, device=device)
    generator = torch.Generator(device).manual_seed(1)
    bits = torch.rand(2, 1, q_len, 1000, device=device, generator=generator) < 0.5
    bits[0, 0, 0, 128:] = False
    # with a mask for each head they do not share; that needs a query for every key
    each_head = torch.rand(2, 2 * group, q_len, 1000, device=device, generator=generator) < 0.5
    each_head[:, :, -1] = True
    for mask in (None, bits, bits[:1], each_head, each_head[:1]):
        for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
            o, lse = attention(x, k, v, mask, return_lse=True, backend="hopper")
            expected = attention(*(t.double() for t in (q, k, v)), mask, return_lse=True, backend="reference")
            torch.testing.assert_close(o.double(), expected[0], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(lse.double(), expected[1].double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dim", [36, 100])
def test_rows_that_the_copy_engine_cannot_write(device: str, dim: int) -> None:
    padded = (torch.randn(1, 2, 200, 128, dtype=F16, device=device)[..., :dim] for _ in range(3))
    q, k, v = (t.requires_grad_() for t in padded)
    assert explain(q, k, v).backend != "hopper"
    attention(q, k, v).sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_synchronisation_with_a_packed_mask(device: str) -> None:
    inputs = make_inputs(Case("documents", 500, 700, 64, F16, q_heads=4), device)
    inputs = inputs._replace(mask=pack(inputs.mask, q_len=inputs.q.shape[2], kv_len=inputs.k.shape[2], device=device))
    expected = run(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, unmasked = run(inputs), run(inputs._replace(mask=None))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    grid.same(expected, again, explain(*inputs[:4]).backend)
    assert unmasked.o.isfinite().all()


def test_forward_allocates_its_outputs_only(device: str) -> None:
    q, k, v = make_qkv(2, 8, 8, 4096, 4096, 64, dtype=F16, device=device)
    mask = pack(torch.rand(4096, 4096, device=device) < 0.5)
    attention(q, k, v, mask)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, lse = attention(q, k, v, mask, return_lse=True)
    assert torch.cuda.max_memory_allocated() - before <= o.nbytes + lse.nbytes + 4096


def test_training_does_not_leak(device: str) -> None:
    inputs = make_inputs(Case("documents", 500, 500, 64, F16), device)
    masks = [torch.rand(500, 500, device=device) < 0.5 for _ in range(3)]
    used = []
    for step in range(30):
        run(inputs._replace(mask=masks[step % 3]))
        used.append(torch.cuda.memory_allocated())
    # autograd's thread may let go of a step's gradients a moment later
    assert min(used[20:]) == min(used[3:20])


def test_a_mask_is_read_on_the_stream_it_was_made_on(device: str) -> None:
    q, k, v = make_qkv(1, 2, 2, 1000, 1000, 64, dtype=F16, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        mask = torch.rand(1000, 1000, device=device) < 0.5
        o = attention(q, k, v, mask)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(o, attention(q, k, v, mask.clone()))


def test_cuda_graph(device: str) -> None:
    inputs = make_inputs(Case("documents", 500, 500, 64, F16), device)
    inputs = inputs._replace(mask=pack(inputs.mask, q_len=inputs.q.shape[2], kv_len=inputs.k.shape[2], device=device))
    for _ in range(2):
        run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs)
    with torch.no_grad():
        inputs.q.add_(0.5)
    graph.replay()
    grid.same(captured, run(inputs), explain(*inputs[:4]).backend)


def test_the_choice_and_its_reasons(device: str) -> None:
    q, k, v = make_qkv(1, 2, 2, 200, 200, 64, dtype=F16, device=device)
    e = explain(q, k, v, causal())
    assert e.backend == ("hopper" if torch.cuda.get_device_capability() == (9, 0) else "triton")
    assert "this backend runs on the CPU" in e.not_chosen["cpu"]
    wide = make_qkv(1, 1, 1, 20, 20, 300, dtype=F16, device=device)
    assert explain(*wide).backend == "reference"
    assert "256" in explain(*wide).not_chosen["triton"]
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call: head_dim is 300"):
        attention(*wide, backend="triton")
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: the tensors are on cuda"):
        attention(q, k, v, backend="cpu")
    with pytest.raises(ValueError, match="mask is on cpu but q is on cuda"):
        attention(q, k, v, torch.ones(200, 200, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["none", "tensor", "block mask", "mask"])
def test_opcheck_and_compile(kind: str, device: str) -> None:
    torch.compiler.reset()
    q, k, v = make_qkv(2, 4, 2, 200, 300, 64, dtype=F16, device=device, requires_grad=True)
    dense = torch.rand(200, 300, device=device) < 0.5
    mask: Any = {"none": None, "tensor": dense, "block mask": pack(dense), "mask": causal()}[kind]
    packed = mask if kind in ("none", "block mask") else pack(mask, q_len=200, kv_len=300, device=device)
    tensors = [] if packed is None else packed.tensors()
    torch.library.opcheck(ops.forward_op, (q, k, v, tensors, 0.125, "triton", False))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        return attention(q, k, v, mask, deterministic=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    do = torch.randn_like(q)
    outputs = [f(q, k, v, mask) for f in (call, compiled)]
    results = [[o, *torch.autograd.grad(o, [q, k, v], do)] for o in outputs]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    q, k, v = make_qkv(1, 2, 2, 200, 200, 64, device=device, requires_grad=True)
    with torch.autocast("cuda", dtype):
        o = attention(q, k, v, causal())
    assert torch.equal(o, attention(q.to(dtype), k.to(dtype), v.to(dtype), causal()))
    assert torch.autograd.grad(o.float().sum(), q)[0].dtype == F32


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int64, F16, F32], ids=str)
def test_custom_mask(mask_dtype: torch.dtype, device: str) -> None:
    q, k, v = make_qkv(2, 2, 2, 300, 300, 64, dtype=F16, device=device)
    mask = torch.randint(0, 2, (2, 2, 300, 300), device=device).to(mask_dtype)
    assert torch.equal(flash_attention_custom_mask(q, k, v, mask), attention(q, k, v, mask != 0))
