"""Every builder equals its dense definition, written here with comparisons of positions only."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import anymask
from anymask import attention, causal, pack
from anymask.mask.expr import TileGrid
from anymask.mask.program import mask_from_program, program_of
from anymask.testing import assert_same_block_mask, make_qkv
from anymask.tiles import EMPTY, FULL, TILE
from tests.helpers.builder_cases import CASES, diffusion, document_ids, random_flags

CPU = torch.device("cpu")
LENGTHS = [1, 5, 128, 300, 512]


def _dense(name: str, length: int) -> Tensor:
    return CASES[name][1](torch.arange(length)[:, None], torch.arange(length)[None, :], length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_is_its_definition(name: str, length: int) -> None:
    mask, dense = CASES[name][0](length), _dense(name, length)
    assert torch.equal(pack(mask, q_len=length, kv_len=length).to_dense()[0, 0], dense)
    assert torch.equal(pack(~mask, q_len=length, kv_len=length).to_dense()[0, 0], ~dense)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_classification_never_contradicts_the_definition(name: str, length: int) -> None:
    mask, grid = CASES[name][0](length), TileGrid(length, length, CPU)
    mask.check(length, length)
    kinds = mask.classify(grid, grid.rows).expand(1, 1, grid.q_tiles, grid.kv_tiles)[0, 0]
    for i, rows in enumerate(_dense(name, length).split(TILE)):
        for j, tile in enumerate(rows.split(TILE, 1)):
            assert kinds[i, j] != EMPTY or not tile.any()
            assert kinds[i, j] != FULL or tile.all()


@pytest.mark.parametrize(
    "name",
    ["chunked", "blocks", "cu_seqlens", "lengths", "prefix_lm", "block_sparse", "global_tokens", "causal chunks"],
)
def test_no_tile_is_left_unknown_for_nothing(name: str) -> None:
    # runs of positions say all there is to know about a tile
    length = 512
    mask, grid = CASES[name][0](length), TileGrid(length, length, CPU)
    tiles = _dense(name, length).unflatten(1, (4, TILE)).unflatten(0, (4, TILE)).transpose(1, 2).flatten(2)
    exact = tiles.any(-1).to(torch.int8) + tiles.all(-1)
    assert torch.equal(mask.classify(grid, grid.rows).expand(1, 1, 4, 4)[0, 0], exact)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("function")])
def test_program_reads_back(name: str) -> None:
    mask = CASES[name][0](300)
    program = program_of(mask)
    assert program is not None
    again = mask_from_program(*program)
    assert again.planes == mask.planes
    assert_same_block_mask(pack(again, q_len=300, kv_len=300), pack(mask, q_len=300, kv_len=300))
    # symbolic masks are remembered by attention, which needs equality
    assert program.tensors or again == mask == CASES[name][0](300)


@pytest.mark.parametrize("block", [16, 128])
def test_block_diffusion_of_two_streams(block: int) -> None:
    length = 3 * block
    packed = pack(anymask.block_diffusion(block, length), q_len=2 * length, kv_len=2 * length)
    assert torch.equal(packed.to_dense()[0, 0], diffusion(length, block))


@pytest.mark.parametrize(("shape", "kernel"), [((9, 14), 3), ((9, 14), (9, 5)), ((1, 20), (1, 7))], ids=str)
def test_neighbourhood_2d(shape: tuple[int, int], kernel: Any) -> None:
    length = shape[0] * shape[1]
    dense = pack(anymask.neighbourhood_2d(shape, kernel), q_len=length, kv_len=length).to_dense()[0, 0]
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    for query in range(length):
        rows, columns = (
            [x for x in range(n) if 0 <= x - max(0, min(at - k // 2, n - k)) < k]
            for at, n, k in zip(divmod(query, shape[1]), shape, kernel, strict=True)
        )
        assert dense[query].nonzero().flatten().tolist() == [r * shape[1] + c for r in rows for c in columns]


def test_neighbourhood_3d() -> None:
    dense = pack(anymask.neighbourhood_3d((4, 5, 6), 3), q_len=120, kv_len=120).to_dense()[0, 0]
    assert (dense.sum(-1) == 27).all()
    at = torch.cartesian_prod(*map(torch.arange, (4, 5, 6)))
    middle = ((at > 0) & (at < torch.tensor([3, 4, 5]))).all(-1)
    near = ((at[:, None] - at[None]).abs() <= 1).all(-1)
    assert torch.equal(dense[middle], near[middle])


def test_planes_of_batch_and_heads() -> None:
    ids, heads = torch.randint(0, 3, (2, 200)), torch.randint(0, 3, (1, 4, 200))
    assert anymask.document(ids).planes == (2, 1)
    mask = anymask.document(ids) & anymask.document(heads) & anymask.key_padding(torch.tensor([150, 80]))
    assert mask.planes == (2, 4)
    dense = (ids[:, None, :, None] == ids[:, None, None, :]) & (heads[..., None] == heads[..., None, :])
    dense = dense & (torch.arange(200) < torch.tensor([150, 80])[:, None, None, None])
    assert torch.equal(pack(mask, q_len=200, kv_len=200).to_dense(), dense)
    layout = random_flags(2, 3, 2, 2)
    assert anymask.block_sparse(layout, 100).planes == (2, 3)
    wide = layout.repeat_interleave(100, 2).repeat_interleave(100, 3)
    assert torch.equal(pack(anymask.block_sparse(layout, 100), q_len=200, kv_len=200).to_dense(), wide)
    of_head = anymask.from_function(lambda b, h, q, k: (q - k) % (h + 1 + b) == 0, batch=2, heads=3)
    expected = (torch.arange(200)[:, None] - torch.arange(200)) % (
        torch.arange(3)[:, None, None] + 1 + torch.arange(2)[:, None, None, None]
    ) == 0
    assert torch.equal(pack(of_head, q_len=200, kv_len=200).to_dense(), expected)


def test_queries_and_keys_of_different_lengths() -> None:
    ids, kv_ids = torch.randint(0, 3, (150,)), torch.randint(0, 3, (260,))
    packed = pack(anymask.document(ids, kv_ids=kv_ids), q_len=150, kv_len=260)
    assert torch.equal(packed.to_dense()[0, 0], ids[:, None] == kv_ids)


def test_random_blocks_repeat_with_their_generator() -> None:
    masks = [anymask.random_blocks(400, 300, 0.4, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    packed = [pack(m, q_len=400, kv_len=300) for m in masks]
    assert_same_block_mask(*packed)
    assert packed[0].tile_counts[2] > 0
    full = pack(anymask.random_blocks(400, 300, 1.0), q_len=400, kv_len=300)
    assert full.to_dense().all()


def test_a_function_is_called_again_for_new_contents() -> None:
    q, k, v = make_qkv(1, 1, 1, 40, 40, 16)
    keep = torch.ones(40, dtype=torch.bool)
    mask = anymask.from_function(lambda b, h, q_idx, kv_idx: keep[kv_idx])
    first = attention(q, k, v, mask)
    assert torch.equal(first, attention(q, k, v))
    keep[20:] = False
    assert torch.allclose(attention(q, k, v, mask), attention(q, k[:, :, :20], v[:, :, :20]), atol=1e-6)


def test_inside_a_compiled_function() -> None:
    torch.compiler.reset()
    q, k, v = make_qkv(2, 2, 2, 60, 60, 16)
    ids = torch.randint(0, 3, (2, 60))

    def call(ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal() & anymask.document(ids) | anymask.global_tokens(2))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, q, k, v), call(ids, q, k, v))

    def with_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, anymask.from_function(lambda b, h, i, j: i >= j))

    with pytest.raises(Exception, match=r"from_function mask inside torch\.compile"):
        torch.compile(with_function, fullgraph=True, backend="aot_eager")(q, k, v)


def test_tensors_follow_the_mask_to_a_device() -> None:
    mask = anymask.document(document_ids(9)) & ~(causal() | anymask.key_padding(torch.tensor([3])))
    program = program_of(mask.to("meta"))
    assert program is not None
    assert len(program.tensors) == 4
    assert {t.device.type for t in program.tensors} == {"meta"}
    assert causal().to("meta") == causal()
    assert mask.to("cpu") is mask


@pytest.mark.parametrize("name", CASES)
def test_strips_classify_like_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = CASES[name][0](512)
    whole = pack(mask, q_len=512, kv_len=512)
    # by its module: the package's `pack` is the function
    monkeypatch.setattr(sys.modules["anymask.packing.definition"], "STRIP_TILES", 4)
    assert_same_block_mask(pack(mask, q_len=512, kv_len=512), whole)
    grid = TileGrid(512, 512, CPU)
    kinds = mask.classify(grid, grid.rows).expand(1, 1, 4, 4)
    strip = mask.classify(grid, range(1, 3)).expand(1, 1, 2, 4)
    assert torch.equal(strip, kinds[:, :, 1:3])


@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 4), (30, None), (30, 4)])
@pytest.mark.parametrize("offset", [-100, 0, 150])
def test_windows_with_open_sides(left: int | None, right: int | None, offset: int) -> None:
    distance = torch.arange(270) - torch.arange(140)[:, None] - offset
    low, high = (-1000 if left is None else -left), (1000 if right is None else right)
    packed = pack(anymask.sliding_window(left, right, offset), q_len=140, kv_len=270)
    assert torch.equal(packed.to_dense()[0, 0], (low <= distance) & (distance <= high))


@pytest.mark.parametrize("sizes", [(64, 100), (128, 48), (1, 300)])
def test_blocks_of_two_sizes(sizes: tuple[int, int]) -> None:
    layout = random_flags(2, 3, 300 // sizes[0], 300 // sizes[1])
    dense = layout.repeat_interleave(sizes[0], 2).repeat_interleave(sizes[1], 3)
    packed = pack(anymask.block_sparse(layout, sizes), q_len=dense.shape[2], kv_len=dense.shape[3])
    assert torch.equal(packed.to_dense(), dense)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 5, 9), (9, 5), (3, 1, 7), (1, 1)], ids=str)
def test_blocks_of_sizes_of_their_own(shape: tuple[int, ...], share: float) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    layout = torch.rand(shape, generator=generator) < share
    sizes = [torch.randint(0, 90, (n,), generator=generator) for n in shape[-2:]]
    dense = layout.repeat_interleave(sizes[0], -2).repeat_interleave(sizes[1], -1)
    packed = pack(anymask.block_sparse(layout, tuple(sizes)), q_len=dense.shape[-2], kv_len=dense.shape[-1])
    assert torch.equal(packed.to_dense(), dense.view(packed.batch, packed.heads, *dense.shape[-2:]))
    # an int beside sizes
    dense = layout.repeat_interleave(40, -2).repeat_interleave(sizes[1], -1)
    packed = pack(anymask.block_sparse(layout, (40, sizes[1])), q_len=dense.shape[-2], kv_len=dense.shape[-1])
    assert torch.equal(packed.to_dense(), dense.view(packed.batch, packed.heads, *dense.shape[-2:]))


def test_lines_or_columns_whichever_have_fewer_runs() -> None:
    # every second key block: many runs in a line, one in a column
    layout = (torch.arange(40) % 2 == 0).expand(3, 40)
    mask = anymask.block_sparse(layout, (torch.tensor([3, 4, 5]), torch.full((40,), 2)))
    program = program_of(mask)
    assert program is not None
    assert len(program.tensors) == 3
    assert torch.equal(
        pack(mask, q_len=12, kv_len=80).to_dense()[0, 0], layout[:1].repeat_interleave(2, 1).expand(12, 80)
    )


# each is fine for single indices, and wrong or an error for tensors of many
TABLE, INTERVALS = (
    torch.rand(2, 150, generator=torch.Generator().manual_seed(1)),
    torch.tensor([[0, 9], [30, 70], [5, 5]]),
)
ONE_PAIR: dict[str, Any] = {
    "rows of a table": lambda b, h, q, k: TABLE[b][q] > TABLE[b][k],
    "table and a number": lambda b, h, q, k: (TABLE[0, q] > TABLE[b, k]) | (TABLE[-1][3] > TABLE[b][q]),
    "an interval": lambda b, h, q, k: (q >= INTERVALS[k % 3][0]) & (q < INTERVALS[k % 3][1]) & (b >= 0),
    "any of a vector": lambda b, h, q, k: (INTERVALS[b % 3, :] == q - k).any(),
    "no index at all": lambda b, h, q, k: torch.tensor(True),
    "slices": lambda b, h, q, k: TABLE[1:][0][q] + TABLE[..., 0][b] > TABLE[0, 1:3].sum(),
}


@pytest.mark.parametrize("name", ONE_PAIR)
def test_a_function_of_one_pair(name: str) -> None:
    fn = ONE_PAIR[name]
    packed = pack(anymask.from_function(fn, batch=2), q_len=12, kv_len=140)
    places = [torch.tensor(n) for n in range(140)]
    expected = [[[bool(fn(b, places[0], q, k)) for k in places] for q in places[:12]] for b in places[:2]]
    assert torch.equal(packed.to_dense()[:, 0], torch.tensor(expected))


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["rows of a table", "table and a number", "an interval"])
def test_a_function_of_one_pair_reads_no_value_of_an_index(name: str) -> None:
    mask = anymask.from_function(ONE_PAIR[name])
    at = torch.zeros(1, 1, 1, dtype=torch.int64)
    with _Operations() as operations:
        mask.evaluate(TileGrid(1, 1, CPU), at, at, at, at)
    assert "index.Tensor" in operations.names
    assert "_local_scalar_dense.default" not in operations.names


def test_a_function_that_vmap_cannot_run() -> None:
    def fn(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # NumPy needs values
        return torch.from_numpy(((q * k) % 3).numpy() == 1)

    pytest.importorskip("numpy")
    # torch says so in words that change
    with pytest.raises(RuntimeError):
        pack(anymask.from_function(fn), q_len=9, kv_len=9)
    packed = pack(anymask.from_function(fn, vectorised=True), q_len=9, kv_len=9)
    at = torch.arange(9)
    assert torch.equal(packed.to_dense()[0, 0], at[:, None] * at % 3 == 1)


def test_errors_of_a_function_reach_its_user() -> None:
    def fn(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    for vectorised in (False, True):
        with pytest.raises(ZeroDivisionError, match="mine"):
            pack(anymask.from_function(fn, vectorised=vectorised), q_len=9, kv_len=9)


def test_trees_without_tokens() -> None:
    for shape in ((0,), (2, 0), (0, 3)):
        length = shape[-1]
        packed = pack(anymask.tree(torch.zeros(shape, dtype=torch.int64)), q_len=length, kv_len=length)
        assert packed.to_dense().numel() == 0
