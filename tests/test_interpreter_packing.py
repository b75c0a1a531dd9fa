"""The packing kernels through Triton's interpreter, compared with torch, exactly; as test_interpreter.py."""

import functools
import operator
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import anymask
from anymask import BlockMask, attention, causal, causal_lower_right, gallery, pack
from anymask.mask.expr import Mask, TileGrid
from anymask.mask.leaves import Dense, Positions, Stride
from anymask.mask.program import program_of
from anymask.packing.definition import tile_words, words_of_tiles
from anymask.testing import MASKS, assert_same_block_mask
from anymask.tiles import TILE, WORDS
from tests.helpers.builder_cases import CASES
from tests.helpers.interpreter import MARKS, MASK_NAMES, plans_anew
from tests.helpers.interpreter import interpreter as interpreter

pytestmark = MARKS
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "q_len", "kv_len"),
    [(m, 130, 257) for m in MASKS if m != "none"]
    + [(m, *n) for m in (*MASK_NAMES[1:], "composed_deep", "row") for n in ((1, 1), (128, 256))]
    + [(m, 300, 200) for m in ("causal", "per_batch_head", "composed_deep")],
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


@pytest.mark.parametrize("length", [1, 140])
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
    monkeypatch.setattr("anymask.packing.triton.plans.SPAN", 16)
    monkeypatch.setattr("anymask.packing.triton.plans.WORDS_SPAN", 2)
    monkeypatch.setattr("anymask.packing.triton.lists.CHUNK", 16)
    monkeypatch.setattr("anymask.packing.triton.lists.ROWS", 1)
    with plans_anew():
        _check_expression(mask, q_len, kv_len)


def test_used_positions_beyond_int32(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    tl = triton.language

    from anymask.packing.triton.kernels.lists import _count_used

    @triton.jit
    def kernel(has_pair, counts, found, n_lines, length, COUNT: tl.constexpr, ROWS: tl.constexpr):
        chunk = tl.program_id(0) + n_lines // ROWS - 1
        tl.store(found, COUNT(has_pair, counts, chunk, n_lines, length, ROWS))

    # the last chunk of 2049 planes, all of whose tiles are full; files of zeros, of which the pages read exist alone
    planes, length = 2049, 2**20
    n_lines = planes * length // TILE
    has_pair, counts = (
        torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)
        for name, size, dtype in (("has_pair", planes * length, torch.uint8), ("counts", n_lines, torch.int32))
    )
    counts[-8:] = 1
    found = torch.zeros(1, dtype=torch.int32)
    kernel[(1,)](has_pair, counts, found, n_lines, length, COUNT=_count_used, ROWS=8)
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
    assert triton_pack.plans.alignment(tensor, kv_len) == align
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
    from anymask.packing import triton as triton_pack
    from anymask.packing.triton.program import is_too_large

    deep = Positions(0, 1, of_query=True) | Positions(0, 1, of_query=False)
    while deep.held < 8:
        deep = deep | deep
    assert triton_pack.pack_expression(deep, TileGrid(9, 9, CPU)) is None
    small = program_of(causal())
    assert small is not None
    assert not is_too_large(small, TileGrid(1, 2**28, CPU))
    assert triton_pack.pack_expression(causal(), TileGrid(1, 2**28 + 1, CPU)) is None
    many = [anymask.document(torch.arange(9) + i) for i in range(17)]
    assert triton_pack.pack_expression(functools.reduce(operator.or_, many), TileGrid(9, 9, CPU)) is None
    fits = program_of(functools.reduce(operator.or_, many[:16]))
    assert fits is not None
    kinds = map(triton_pack.plans.kind_of, fits.tensors)
    assert triton_pack.plans.of_expression(fits.nodes, fits.numbers, (1, 1), 9, 9, CPU, *kinds) is not None


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
