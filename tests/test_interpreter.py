"""The Triton kernels on CPU tensors, through Triton's interpreter, which raises on int32 overflow here.

Skipped unless TRITON_INTERPRET=1 is set before Triton is imported: test_interpreted.py runs this file so.
"""

import functools
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import anymask
from anymask import BlockMask, attention, causal, causal_lower_right, gallery, pack
from anymask.mask.expr import Mask, TileGrid
from anymask.mask.leaves import Dense, Positions, Stride
from anymask.packing.definition import tile_words, words_of_tiles
from anymask.testing import LAYOUTS, MASKS, Case, assert_same_block_mask, check, reference
from anymask.tiles import TILE, WORDS
from tests.helpers import grid
from tests.helpers.builder_cases import CASES
from tests.helpers.grid import BF16, F16, F32, cases

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    # NumPy under the interpreter warns where a GPU gives inf or nan, such as log2(0) of a row with no key
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BACKENDS = ("triton",)
# a kernel's paths: no mask, only full tiles, bits, unused keys, unused queries, planes by batch, by head and by both
MASK_NAMES = ["none", "causal", "tiles", "empty_rows", "empty_columns", "per_batch", "per_head", "per_batch_head"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    import numpy as np
    from triton.runtime import interpreter

    builder, tl = interpreter.interpreter_builder, interpreter.tl
    create_dot, cast_impl = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        # the interpreter cuts the low half of an fp32 off; a GPU rounds to nearest even
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    def widened(handle: Any) -> Any:
        # the interpreter holds bf16 as uint16, which its own dot multiplies as integers
        return cast_impl(builder, handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        # what a GPU refuses and NumPy promotes in silence
        assert a.dtype.scalar == b.dtype.scalar, f"dot of {a.dtype} and {b.dtype}"
        return create_dot(self, widened(a), widened(b), *rest)

    debug = builder.options.debug
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
        # int32 arithmetic is checked for overflow
        object.__setattr__(builder.options, "debug", True)
        # the interpreter takes as long for few rows
        patch.setattr("anymask.packing.triton.STRIP", 64)
        yield
        object.__setattr__(builder.options, "debug", debug)


# fp32 has small steps, so many, and the interpreter takes as long for a small one
@cases(
    BACKENDS,
    [Case(m, 140, 150, 16, t) for m in MASK_NAMES for t in (F16, BF16)]
    + [Case(m, 70, 140, 16, F32, batch=1) for m in ("none", "tiles", "empty_columns", "per_head")],
)
def test_masks_and_dtypes(backend: str, case: Case) -> None:
    check(case, backend)


@cases(BACKENDS, [Case(m, 100, 140, 16, F16) for m in MASKS if m not in MASK_NAMES])
def test_every_other_mask(backend: str, case: Case) -> None:
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
    BACKENDS, [Case(m, 40, 140, 16, F32, scale=s) for s in (-0.3, 0.0, 1e-3, 3.0) for m in ("none", "causal_behind")]
)
def test_scales(backend: str, case: Case) -> None:
    check(case, backend)


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(BACKENDS, [Case(m, 140, 300, 16, F16, batch=1) for m in ("empty_columns", "empty_head", "tiles", "all_empty")])
def test_unused_keys_reach_nothing(backend: str, case: Case, value: float) -> None:
    grid.check_unused_keys_reach_nothing(case, backend, "cpu", value)


@pytest.mark.parametrize("value", grid.SPECIAL_VALUES, ids=str)
@cases(BACKENDS, [Case(m, 140, 40, 16, F16, batch=1) for m in ("empty_rows", "column", "all_empty")])
def test_unused_queries_reach_nothing(backend: str, case: Case, value: float) -> None:
    grid.check_unused_queries_reach_nothing(case, backend, "cpu", value)


@cases(BACKENDS, [Case("random", 40, 140, 16, F16, batch=1, q_heads=4)])
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
    """The one plain kernel of the Hopper backend: its input has the order that `_store_dq` writes."""
    from anymask.backends.hopper.kernels.backward import _dq_kernel

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


@pytest.mark.parametrize("order", grid.ORDERS[1:3])
def test_outputs_lie_as_inputs_do(order: tuple[int, ...]) -> None:
    grid.check_layouts(order, (4, 2, 70, 150), "triton")


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


@pytest.mark.parametrize(
    ("name", "q_len", "kv_len"),
    [(m, 130, 257) for m in MASKS if m != "none"]
    + [(m, *n) for m in (*MASK_NAMES[1:], "composed_deep", "row") for n in ((1, 1), (128, 256), (300, 200))],
)
def test_packing_is_the_same_on_the_device(name: str, q_len: int, kv_len: int) -> None:
    from anymask.packing import triton as triton_pack

    mask, dense = MASKS[name](2, 2, q_len, kv_len)
    space = TileGrid(q_len, kv_len, CPU)
    if isinstance(mask, Mask):
        expected = pack(mask, q_len=q_len, kv_len=kv_len)
        assert_same_block_mask(triton_pack.lists_from_tiles(*tile_words(mask, space), space), expected)
        assert_same_block_mask(_pack_expression(mask, q_len, kv_len), expected)
    # planes of size 1 stay 1, expanded ones are read in place
    tensor = dense[(None,) * (4 - dense.dim())]
    assert_same_block_mask(
        triton_pack.pack_dense(tensor, q_len, kv_len), pack(Dense(tensor), q_len=q_len, kv_len=kv_len)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32])
def test_packing_any_dtype_is_the_same_on_the_device(dtype: torch.dtype) -> None:
    from anymask.packing import triton as triton_pack

    values = torch.randint(-2, 3, (1, 2, 140, 150)).to(dtype)
    if dtype in (torch.float16, torch.float32):
        # as an integer, which is what the interpreter takes bf16 for, -0.0 is not 0
        values[..., ::7] = -0.0
    assert_same_block_mask(triton_pack.pack_dense(values, 140, 150), pack(values != 0))


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (0, 200), (200, 0)], ids=str)
def test_packing_nothing_is_the_same_on_the_device(q_len: int, kv_len: int) -> None:
    from anymask.packing import triton as triton_pack

    tensor = torch.ones(2, 1, q_len, kv_len, dtype=torch.bool)
    assert_same_block_mask(triton_pack.pack_dense(tensor, q_len, kv_len), pack(tensor))


def _pack_expression(mask: Mask, q_len: int, kv_len: int) -> BlockMask:
    from anymask.packing import triton as triton_pack

    packed = triton_pack.pack_expression(mask, TileGrid(q_len, kv_len, CPU))
    assert packed is not None
    return packed


def _check_expression(mask: Mask, q_len: int, kv_len: int) -> None:
    assert_same_block_mask(_pack_expression(mask, q_len, kv_len), pack(mask, q_len=q_len, kv_len=kv_len))


@pytest.mark.parametrize("length", [1, 300])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("function")])
def test_every_builder_packs_the_same_on_the_device(name: str, length: int) -> None:
    mask = CASES[name][0](length)
    _check_expression(mask, length, length)
    _check_expression(~mask & ~causal(-30), length, length)


@pytest.mark.parametrize("name", [name for name in gallery.EXAMPLES if name != "from_function"])
def test_the_gallery_packs_the_same_on_the_device(name: str) -> None:
    assert_same_block_mask(
        _pack_expression(gallery.example(name), gallery.LENGTH, gallery.LENGTH), gallery.packed(name)
    )


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (130, 260), (257, 100)], ids=str)
def test_expressions_with_planes_pack_the_same_on_the_device(q_len: int, kv_len: int) -> None:
    ids, kv_ids = torch.randint(-3, 3, (2, 1, q_len)) << 40, torch.randint(-3, 3, (1, 3, kv_len)) << 40
    documents = anymask.document(ids.sort().values, kv_ids=kv_ids.sort().values)
    lengths = anymask.key_padding(torch.tensor([kv_len // 2, kv_len - 1]))
    _check_expression(causal_lower_right() & documents, q_len, kv_len)
    _check_expression(~(documents & lengths) | anymask.sliding_window(9, 5), q_len, kv_len)
    dense = anymask.from_dense(torch.rand(3, q_len, kv_len) < 0.5)
    layout = torch.rand(2, 1, -(-q_len // 70), -(-kv_len // 70)) < 0.5
    _check_expression(causal(5) & dense & ~anymask.block_sparse(layout, 70) | lengths, q_len, kv_len)
    # a tensor of floats, broadcast along one dimension
    rows = Dense((torch.rand(2, 1, q_len, 1) - 0.5).clamp(min=0))
    _check_expression(rows & Stride(3) | Positions(5, 10**12, of_query=False), q_len, kv_len)


@pytest.mark.parametrize(("q_len", "kv_len"), [(4300, 140), (140, 4300)], ids=str)
def test_many_tiles_pack_the_same_on_the_device(q_len: int, kv_len: int) -> None:
    ids, kv_ids = torch.arange(q_len) // 640, torch.arange(kv_len) // 640
    _check_expression(causal(900) & anymask.document(ids, kv_ids=kv_ids), q_len, kv_len)


@pytest.mark.parametrize(
    ("mask", "q_len", "kv_len"),
    [
        (causal(2100) & ~anymask.sliding_window(100, 300), 140, 2200),
        (causal(900) & ~anymask.strided(700), 2200, 140),
    ],
    ids=["wide", "high"],
)
def test_narrow_spans_and_chunks_do_not_show(
    mask: Mask, q_len: int, kv_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anymask.packing.triton.SPAN", 16)
    monkeypatch.setattr("anymask.packing.triton.lists.CHUNK", 16)
    monkeypatch.setattr("anymask.packing.triton.lists.POSITION_CHUNK", 128)
    _check_expression(mask, q_len, kv_len)


def test_used_positions_beyond_int32(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    tl = triton.language

    from anymask.packing.triton.kernels.lists import _count_used

    @triton.jit
    def kernel(has_pair, counts, found, positions, length, COUNT: tl.constexpr, POSITION_CHUNK: tl.constexpr):
        chunk = tl.program_id(0) + (positions // POSITION_CHUNK).to(tl.int32) - 1
        tl.store(found, COUNT(has_pair, counts, chunk, positions, length, POSITION_CHUNK))

    # the last chunk of 2049 planes, all of whose tiles are full; files of zeros, of which the pages read exist alone
    planes, length = 2049, 2**20
    has_pair, counts = (
        torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)
        for name, size, dtype in (
            ("has_pair", planes * length, torch.uint8),
            ("counts", planes * length // TILE, torch.int32),
        )
    )
    counts[-8:] = 1
    found = torch.zeros(1, dtype=torch.int32)
    kernel[(1,)](has_pair, counts, found, planes * length, length, COUNT=_count_used, POSITION_CHUNK=1024)
    assert int(found) == 1024
    assert has_pair[-1024:].all()
    assert not has_pair[-2048:-1024].any()


@pytest.mark.parametrize("block", [1, 60, 128, 256])
def test_block_masks_pack_the_same_on_the_device(block: int) -> None:
    layout = torch.rand(-(-500 // block), -(-400 // block)) < 0.6
    _check_expression(anymask.block_sparse(layout, block), 500, 400)


def test_a_triangle_of_blocks_packs_the_same_on_the_device() -> None:
    # a block on the edge is alone in its tile
    _check_expression(anymask.block_sparse(torch.ones(5, 5, dtype=torch.bool).tril(), 60), 300, 300)


def test_full_tiles_that_bounds_do_not_know_pack_the_same_on_the_device() -> None:
    _check_expression(causal(200) & anymask.from_dense(torch.ones(130, 140, dtype=torch.bool)), 130, 140)


@pytest.mark.parametrize("limit", [2**28, 2**40, 2**62])
def test_far_limits_pack_the_same_on_the_device(limit: int) -> None:
    _check_expression(anymask.sliding_window(limit, 3) & causal(-limit) | Stride(limit), 200, 300)
    _check_expression(causal(limit) & ~anymask.chunked(limit) | Positions(-limit, 7, of_query=True), 200, 300)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (0, 200), (200, 0)], ids=str)
def test_expressions_of_nothing_pack_the_same_on_the_device(q_len: int, kv_len: int) -> None:
    _check_expression(causal() & anymask.key_padding(torch.tensor([3, 4])), q_len, kv_len)


def test_functions_are_left_to_torch() -> None:
    from anymask.packing import triton as triton_pack

    for mask in (
        anymask.from_function(lambda b, h, q, k: q > k),
        causal() & anymask.from_function(lambda b, h, q, k: q > k),
    ):
        assert triton_pack.pack_expression(mask, TileGrid(300, 300, CPU)) is None


@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 257), (128, 384)], ids=str)
def test_words_of_tiles_are_the_same_on_the_device(q_len: int, kv_len: int) -> None:
    from anymask.packing import triton as triton_pack

    space = TileGrid(q_len, kv_len, CPU)
    # as nonzero() leaves them on a GPU
    places = torch.cartesian_prod(*map(torch.arange, (1, 2, space.q_tiles, space.kv_tiles))).T.contiguous().T
    n = len(places)
    for tiles in (
        torch.rand(n, TILE, TILE) < torch.tensor([0, 0.5, 1.1]).repeat(n)[:n, None, None],
        (torch.rand(n, TILE, 1) < 0.5).expand(n, TILE, TILE),
        (torch.rand(TILE, TILE) < 0.5).T.expand(n, TILE, TILE),
    ):
        results = [(torch.empty(n, TILE, WORDS, dtype=torch.int32), torch.empty(n, dtype=torch.int8)) for _ in range(2)]
        triton_pack.words_of_tiles(tiles, places, space, *results[0])
        words_of_tiles(tiles, places, space, *results[1])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def _forms() -> dict[str, tuple[torch.Tensor, int]]:
    """Tensors `[2, 3, 140, 144 or less]` by how they lie in memory, and at how many bytes a time they may be read."""
    rows = torch.rand(2, 3, 150, 176) < 0.5
    # filled in places, so that all kinds of tiles are there
    rows[0, 1, :130, :130] = True
    rows[1, 0] = False
    return {
        "aligned": (rows[:, :, 5:145, 16:160], 16),
        "broadcast": (rows[:1, 1:2, :1, 16:160].expand(2, 3, 140, 144), 16),
        "half of the columns": (rows[:, :, :140, :72], 4),
        "base of 4": (rows[:, :, 5:145, 4:148], 4),
        "rows of 4": (rows.flatten()[: 2 * 3 * 140 * 148].view(2, 3, 140, 148)[..., :144], 4),
        "odd base": (rows[:, :, :140, 1:145], 1),
        "odd length": (rows[:, :, :140, :143], 1),
        "odd rows": (rows.flatten()[: 2 * 3 * 140 * 145].view(2, 3, 140, 145)[..., :144], 1),
        "transposed": (rows.mT[:, :, 16:156, :144], 1),
        "every other": (rows[:, :, :140, ::2], 1),
        "bytes": ((rows * torch.randint(-128, 128, rows.shape))[:, :, :140, :144].to(torch.int8), 16),
        "unsigned bytes": ((rows << torch.arange(176) % 9)[:, :, :140, 4:144].to(torch.uint8), 4),
    }


@pytest.mark.parametrize("form", _forms())
def test_packing_any_form_is_the_same_on_the_device(form: str) -> None:
    from anymask.packing import triton as triton_pack

    tensor, align = _forms()[form]
    q_len, kv_len = tensor.shape[2:]
    assert triton_pack._alignment(tensor, kv_len) == align
    assert_same_block_mask(triton_pack.pack_dense(tensor, q_len, kv_len), pack(tensor != 0))
    n, places = tensor.shape[0] * tensor.shape[1], torch.tensor([[0, 0, 1, 0]])
    if form in ("aligned", "base of 4", "odd base", "transposed"):
        # the last rows of the plane, and columns that all exist
        tiles = tensor.flatten(0, 1)[:, 4:132, :128]
        space = TileGrid(140, 144, CPU)
        found = [(torch.empty(n, TILE, WORDS, dtype=torch.int32), torch.empty(n, dtype=torch.int8)) for _ in range(2)]
        triton_pack.words_of_tiles(tiles, places.expand(n, 4), space, *found[0])
        words_of_tiles(tiles, places.expand(n, 4), space, *found[1])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("form", ["aligned", "base of 4", "odd base"])
def test_any_byte_of_a_bool_that_is_not_0_is_true_on_the_device(form: str) -> None:
    from anymask.packing import triton as triton_pack

    tensor = _forms()[form][0][:1, :2]
    # as it lies in memory, so that it may be read as many bytes at a time
    octets = torch.empty(0, dtype=torch.uint8).set_(
        torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.uint8).untyped_storage(),
        tensor.storage_offset(), tensor.shape, tensor.stride(),
    )  # fmt: skip
    octets.copy_(tensor * torch.tensor([1, 2, 3, 128, 254, 255], dtype=torch.uint8)[torch.randint(6, tensor.shape)])
    # one plane of plain bytes
    octets[0, 0] = tensor[0, 0]
    odd = octets.view(torch.bool)
    assert_same_block_mask(triton_pack.pack_dense(odd, *odd.shape[2:]), pack(tensor))


def test_the_largest_ids_and_numbers_pack_the_same_on_the_device() -> None:
    ids = torch.tensor([2**63 - 1, -(2**63), 0, -1, 2**63 - 2])[torch.arange(140) // 30]
    _check_expression(anymask.document(ids) & causal(10**20) | Stride(2**63), 140, 140)
    _check_expression(~anymask.document(ids, kv_ids=ids[:60]) | Positions(-(10**20), 7, of_query=True), 140, 60)


def test_tile_minima_of_each_head_are_its_own() -> None:
    # ids that are the same in a whole tile, and other ones for each sample and head: bounds alone decide
    ids = torch.randint(0, 2, (2, 3, 3)).repeat_interleave(TILE, 2)[..., :300]
    _check_expression(anymask.document(ids), 300, 300)


def test_what_is_too_large_for_kernels_is_left_to_torch() -> None:
    from anymask.packing.triton import program as device_program

    deep = Positions(0, 1, of_query=True) | Positions(0, 1, of_query=False)
    while deep.held < 8:
        deep = deep | deep
    assert device_program.mask_program(deep, TileGrid(9, 9, CPU)) is None
    assert device_program.mask_program(causal(), TileGrid(1, 2**28, CPU)) is not None
    assert device_program.mask_program(causal(), TileGrid(1, 2**28 + 1, CPU)) is None
    many = [anymask.document(torch.arange(9) + i) for i in range(33)]
    assert device_program.mask_program(functools.reduce(operator.or_, many), TileGrid(9, 9, CPU)) is None
    assert device_program.mask_program(functools.reduce(operator.or_, many[:32]), TileGrid(9, 9, CPU)) is not None


def test_packing_on_the_device_shares_memory_that_nobody_sees(tmp_path: Path) -> None:
    ids = torch.arange(1000) // 300
    packed = _pack_expression(causal() & anymask.document(ids) & ~anymask.sliding_window(3), 1000, 1000)
    tensors = packed.tensors()
    starts = [t.data_ptr() for t in tensors if t.numel()]
    assert len(set(starts)) == len(starts)
    assert all(start % 16 == 0 for start in starts)
    assert all(t.is_contiguous() for t in tensors)
    # nothing but the result is kept
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) <= packed.nbytes + 16 * len(tensors)
    packed.save(tmp_path / "mask.safetensors")
    assert_same_block_mask(BlockMask.load(tmp_path / "mask.safetensors"), packed)
    assert_same_block_mask(pytree.tree_map(torch.clone, packed), packed)
    q = torch.randn(1, 1, 1000, 16, requires_grad=True)
    torch.library.opcheck(anymask.ops.forward_op, (q, q, q, tensors, 0.25, "cpu", False))
    call = torch.compile(lambda q, mask: attention(q, q, q, mask), fullgraph=True, backend="aot_eager")
    expected = attention(q, q, q, packed.to_dense())
    for o in (call(q, packed), expected):
        o.sum().backward()
    assert torch.equal(call(q, packed), expected)
