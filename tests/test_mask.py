"""The mask algebra: classification never contradicts evaluation, builders equal their dense definitions."""

import copy
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import anymask
from anymask import Mask, attention, causal, causal_lower_right, document, from_dense, pack, sliding_window
from anymask.mask.builders import dense as dense_any_dtype
from anymask.mask.expr import Not, TileGrid, fold
from anymask.mask.leaves import Band, Blocks, Dense, Positions, Stride
from anymask.mask.program import mask_from_program, program_of
from anymask.testing import MASKS, assert_same_block_mask
from anymask.tiles import EMPTY, FULL, PARTIAL, TILE

CPU = torch.device("cpu")
LENGTHS = [(1, 1), (5, 3), (128, 128), (129, 127), (300, 520), (520, 300)]
SYMBOLIC = {
    "causal": causal(),
    "causal offset": causal(offset=130),
    "causal negative": causal(offset=-130),
    "lower right": causal_lower_right(),
    "window": sliding_window(128),
    "window both": sliding_window(3, 200),
    "window 0": sliding_window(0),
    "everything": Band(None, None),
    "low only": Band(-7, None),
    "lower right window": Band(-40, 0, lower_right=True),
    "not causal": ~causal(),
    "ring": sliding_window(300, 300) & ~sliding_window(140, 140),
    "or": causal(offset=-100) | sliding_window(5, 5),
    "and not or": (causal() | sliding_window(0, 250)) & ~(causal(offset=-50) & causal_lower_right()),
    "nothing": causal() & ~causal(),
    "dense and causal": causal() & from_dense(torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(0)) < 0.5),
}


def _evaluated(mask: Mask, q_len: int, kv_len: int) -> Tensor:
    """The meaning of a mask, pair by pair: `[mask_batch, mask_heads, q_len, kv_len]`."""
    batch, heads = mask.planes
    index = torch.meshgrid(*(torch.arange(n) for n in (batch, heads, q_len, kv_len)), indexing="ij")
    return mask.evaluate(TileGrid(q_len, kv_len, CPU), *index)


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS, ids=str)
@pytest.mark.parametrize("name", SYMBOLIC)
def test_classification_never_contradicts_evaluation(name: str, q_len: int, kv_len: int) -> None:
    mask, grid = SYMBOLIC[name], TileGrid(q_len, kv_len, CPU)
    kinds = mask.classify(grid, grid.rows)
    assert kinds.dtype == torch.int8
    dense = _evaluated(mask, q_len, kv_len)
    kinds = kinds.expand(*mask.planes, grid.q_tiles, grid.kv_tiles)
    assert set(kinds.unique().tolist()) <= {EMPTY, PARTIAL, FULL}
    for (b, h, i, j), kind in zip(torch.cartesian_prod(*map(torch.arange, kinds.shape)), kinds.flatten(), strict=True):
        tile = dense[b, h, i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
        assert kind != EMPTY or not tile.any()
        assert kind != FULL or tile.all()


@pytest.mark.parametrize("name", ["causal", "lower right", "window", "window both", "not causal"])
def test_bands_classify_every_tile_they_can(name: str) -> None:
    # a band that leaves an empty or full tile unknown still gives the right answer, but costs its evaluation
    for q_len, kv_len in LENGTHS:
        mask, grid = SYMBOLIC[name], TileGrid(q_len, kv_len, CPU)
        kinds = mask.classify(grid, grid.rows)[0, 0]
        dense = _evaluated(mask, q_len, kv_len)[0, 0]
        for i in range(grid.q_tiles):
            for j in range(grid.kv_tiles):
                tile = dense[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
                assert kinds[i, j] == (FULL if tile.all() else PARTIAL if tile.any() else EMPTY)


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS, ids=str)
@pytest.mark.parametrize("name", [n for n in MASKS if n != "none"])
def test_a_mask_means_its_dense_definition(name: str, q_len: int, kv_len: int) -> None:
    mask, dense = MASKS[name](2, 3, q_len, kv_len)
    lazy = mask if isinstance(mask, Mask) else from_dense(mask)
    assert torch.equal(_evaluated(lazy, q_len, kv_len).expand(2, 3, -1, -1), dense.expand(2, 3, q_len, kv_len))
    assert torch.equal(
        pack(lazy, q_len=q_len, kv_len=kv_len).to_dense().expand(2, 3, -1, -1), dense.expand(2, 3, q_len, kv_len)
    )


@pytest.mark.parametrize("edge", [1, 2, 126, 127, 128, 129, 130, 255, 256, 257, 300, 512])
def test_bands_whose_edge_meets_a_tile(edge: int) -> None:
    # an edge that touches a tile in one corner pair is where a classification is off by one
    distance = torch.arange(384)[None, :] - torch.arange(384)[:, None]
    for mask, dense in (
        (causal(offset=edge), distance <= edge),
        (causal(offset=-edge), distance <= -edge),
        (sliding_window(edge), (distance <= 0) & (distance >= -edge)),
        (sliding_window(0, edge), (distance <= edge) & (distance >= 0)),
        (~sliding_window(edge, edge), distance.abs() > edge),
    ):
        tiles = dense.unflatten(1, (3, TILE)).unflatten(0, (3, TILE)).transpose(1, 2).flatten(2)
        assert torch.equal(
            mask.classify(TileGrid(384, 384, CPU), range(3))[0, 0], (tiles.any(-1).to(torch.int8) + tiles.all(-1))
        )
        assert torch.equal(pack(mask, q_len=384, kv_len=384).to_dense()[0, 0], dense)


def test_kleene_tables() -> None:
    kinds = {EMPTY: ~Band(None, None), FULL: Band(None, None), PARTIAL: from_dense(torch.ones(4, 4, dtype=torch.bool))}
    grid = TileGrid(4, 4, CPU)

    def kind(mask: Mask) -> int:
        return int(mask.classify(grid, grid.rows).flatten()[0])

    for a, left in kinds.items():
        assert kind(~left) == FULL - a
        for b, right in kinds.items():
            assert kind(left & right) == min(a, b)
            assert kind(left | right) == max(a, b)


def test_algebra() -> None:
    a, b = causal(offset=3), sliding_window(20, 20)

    def packed(mask: Mask) -> Any:
        return pack(mask, q_len=200, kv_len=150)

    assert_same_block_mask(packed(~(a & b)), packed(~a | ~b))
    assert_same_block_mask(packed(~~a), packed(a))
    assert_same_block_mask(packed(a & (a | b)), packed(a))
    assert not packed(a & ~a).to_dense().any()
    assert packed(a | ~a).tile_counts == packed(Band(None, None)).tile_counts


def test_truth_value_raises() -> None:
    for use in (lambda: bool(causal()), lambda: causal() and causal(), lambda: not causal(), lambda: causal() or None):
        with pytest.raises(TypeError, match=r"no truth value: combine masks with & \| ~"):
            use()


def test_equality_and_hash() -> None:
    assert causal() == causal()
    assert causal() != causal(offset=1)
    assert hash(causal() & sliding_window(2)) == hash(causal() & sliding_window(2))
    assert (causal() & sliding_window(2)) == (causal() & sliding_window(2))
    assert (causal() & sliding_window(2)) != (causal() | sliding_window(2))
    assert causal() != causal_lower_right()
    assert ~causal() == ~causal()
    tensor = torch.ones(2, 2, dtype=torch.bool)
    # two reads of one tensor are not known to be equal, and comparing must not compare elements
    assert (from_dense(tensor) == from_dense(tensor.clone())) is False
    assert len({causal(), causal(), sliding_window(1)}) == 2


def test_masks_are_frozen() -> None:
    with pytest.raises(AttributeError):
        causal().high = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SYMBOLIC)
def test_program_reads_back(name: str) -> None:
    program = program_of(SYMBOLIC[name])
    assert program is not None
    again = mask_from_program(*program)
    assert_same_block_mask(pack(SYMBOLIC[name], q_len=200, kv_len=130), pack(again, q_len=200, kv_len=130))
    assert again.planes == SYMBOLIC[name].planes


def test_ids_that_are_compared_with_themselves_are_kept_once() -> None:
    program = program_of(anymask.document(torch.arange(9) // 3))
    assert program is not None
    # value and low are one, high is another
    assert len(program.tensors) == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sliding_window(-1), ValueError, "left is -1; allowed are 0 and more"),
        (lambda: sliding_window(3, -2), ValueError, "right is -2; allowed are 0 and more"),
        (lambda: sliding_window(2.5), TypeError, "left is 2.5 of type float; allowed is an int"),
        (lambda: sliding_window(2, True), TypeError, "right is True of type bool; allowed is an int"),
        (lambda: causal(offset="3"), TypeError, "offset is '3' of type str; allowed is an int"),
        (lambda: causal(torch.tensor(3)), TypeError, "offset is .* of type Tensor; allowed is an int"),
        (lambda: from_dense([[True]]), TypeError, "from_dense: tensor is a list; allowed is a bool tensor"),
        (
            lambda: from_dense(torch.ones(2, 2)),
            ValueError,
            "from_dense: tensor has dtype torch.float32; allowed is torch.bool",
        ),
        (
            lambda: from_dense(torch.ones(2, 2, dtype=torch.uint8)),
            ValueError,
            "dtype torch.uint8; allowed is torch.bool",
        ),
        (lambda: from_dense(torch.ones(2, 2, dtype=torch.complex64)), ValueError, "dtype torch.complex64; allowed"),
        (lambda: from_dense(torch.ones(4) > 0), ValueError, r"shape \(4,\), 1 dimensions; allowed are 2 to 4"),
        (lambda: from_dense(torch.ones(1, 1, 1, 2, 2) > 0), ValueError, "5 dimensions; allowed are 2 to 4"),
        (lambda: causal() & torch.ones(2, 2, dtype=torch.bool), TypeError, "wrap a bool tensor in from_dense"),
        (lambda: causal() | None, TypeError, "cannot combine a Mask with NoneType"),
        (
            lambda: from_dense(torch.ones(2, 1, 4, 4) > 0) & from_dense(torch.ones(3, 1, 4, 4) > 0),
            ValueError,
            "masks to combine differ in batch: 2 and 3; allowed are equal sizes or 1",
        ),
        (
            lambda: from_dense(torch.ones(2, 4, 4) > 0) | from_dense(torch.ones(5, 4, 4) > 0),
            ValueError,
            "masks to combine differ in heads: 2 and 5",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_check_names_the_dimension_of_a_part() -> None:
    mask = causal() & ~from_dense(torch.ones(4, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match=re.escape("its dimension -1 is 7 but kv_len is 8; allowed are 1 and 8")):
        pack(mask, q_len=4, kv_len=8)
    with pytest.raises(ValueError, match=re.escape("its dimension -2 is 4 but q_len is 5; allowed are 1 and 5")):
        pack(mask, q_len=5, kv_len=7)


def test_stride_0_planes_are_one_plane() -> None:
    base = torch.rand(1, 1, 6, 6) < 0.5
    assert from_dense(base.expand(4, 8, 6, 6)).planes == (1, 1)
    assert from_dense((torch.rand(4, 1, 6, 6) < 0.5).expand(4, 8, 6, 6)).planes == (4, 1)
    assert from_dense(base[0, 0]).planes == (1, 1)
    assert from_dense(torch.ones(3, 6, 6, dtype=torch.bool)).planes == (1, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32])
def test_dense_of_any_dtype_is_non_zero(dtype: torch.dtype) -> None:
    values = torch.randint(-2, 3, (40, 30)).to(dtype)
    mask = dense_any_dtype(values)
    assert isinstance(mask, Dense)
    assert torch.equal(pack(mask).to_dense()[0, 0], values != 0)
    both = causal() & mask
    assert torch.equal(pack(both, q_len=40, kv_len=30).to_dense()[0, 0], (values != 0).tril())


LONG = 5000


def _left(n: int) -> Mask:
    mask: Mask = Positions(0, 1, True)
    for i in range(1, n):
        mask = mask | Positions(i, i + 1, True)
    return mask


def _right(n: int) -> Mask:
    mask: Mask = Positions(n - 1, n, True)
    for i in range(n - 2, -1, -1):
        mask = Positions(i, i + 1, True) | mask
    return mask


def _negated(n: int) -> Mask:
    mask = causal()
    for _ in range(n):
        mask = Not(mask)
    return mask


@pytest.mark.parametrize("make", [_left, _right, _negated])
def test_a_chain_of_thousands_is_a_mask_like_any_other(make: Callable[[int], Mask]) -> None:
    mask = make(LONG)
    assert mask == make(LONG) != make(LONG - 1)
    assert hash(mask) == hash(make(LONG))
    assert mask.planes == (1, 1)
    assert mask.is_prefix_stable
    assert mask.to("cpu") is mask
    assert len(repr(mask)) >= LONG
    program = program_of(mask)
    assert program is not None
    assert mask_from_program(*program) == mask
    assert repr(copy.deepcopy(mask)) == repr(pickle.loads(pickle.dumps(mask))) == repr(mask)
    expected = torch.ones(4, 4).tril() if make is _negated else torch.ones(4, 4)
    q = torch.randn(1, 1, 4, 8)
    assert torch.equal(attention(q, q, q, mask), attention(q, q, q, expected > 0))


@pytest.mark.parametrize("make", [_left, _right])
def test_a_walk_holds_few_results(make: Callable[[int], Mask]) -> None:
    class Result:
        pass

    alive: weakref.WeakSet[Result] = weakref.WeakSet()
    most = 0

    def result(*operands: Any) -> Result:
        nonlocal most
        new = Result()
        alive.add(new)
        most = max(most, len(alive))
        return new

    mask = make(300)
    fold(mask, result, result)
    # those of operands, and the new one
    assert most <= mask.held + 1 <= 4


def test_operands_keep_their_order() -> None:
    deep = causal() & sliding_window(3)
    mask = causal(1) | deep
    assert repr(mask) == f"({causal(1)!r} | {deep!r})"
    assert repr(copy.copy(mask)) == repr(mask)
    # the left operand holds less than the right one, as much, and more
    for mask in (causal(1) | deep, causal(1) & sliding_window(3), deep | causal(1)):
        assert fold(mask, repr, lambda node, a, b: f"({a} {'&' if node.op == 'and' else '|'} {b})") == repr(mask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: anymask.spans(torch.zeros(2, 9).long(), torch.ones(3, 9).long()), "start and end differ in batch: 2"),
        (
            lambda: document(torch.zeros(2, 9).long(), kv_ids=torch.zeros(3, 9).long()),
            "ids and kv_ids differ in batch: 2 and 3; allowed are equal sizes or 1",
        ),
        (
            lambda: document(torch.zeros(1, 4, 9).long(), kv_ids=torch.zeros(2, 3, 9).long()),
            "ids and kv_ids differ in heads: 4 and 3; allowed are equal sizes or 1",
        ),
    ],
)
def test_tensors_of_other_planes(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("mask", "q_len", "kv_len", "message"),
    [
        (anymask.tree(torch.tensor([-1])), 1, 58, "parents has length 1 but kv_len is 58; allowed are equal lengths"),
        (anymask.tree(torch.tensor([-1])), 5, 5, "parents has length 1 but q_len is 5"),
        (document(torch.tensor([7])), 1, 58, "ids has length 1 but kv_len is 58"),
        (document(torch.tensor([7]), kv_ids=torch.tensor([7])), 1, 58, "kv_ids has length 1 but kv_len is 58"),
        (anymask.spans(torch.tensor([0]), torch.tensor([3])), 2, 3, "start and end has length 1 but q_len is 2"),
        (anymask.key_padding(torch.ones(2, 1).bool()), 2, 3, "keep has length 1 but kv_len is 3"),
    ],
)
def test_a_length_of_1_is_no_broadcast(mask: Mask, q_len: int, kv_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(mask, q_len=q_len, kv_len=kv_len)


def test_a_value_that_all_tokens_share_has_no_length() -> None:
    lengths, flags = torch.tensor([2, 0]), torch.tensor([[True, False, True], [False, False, True]])
    padding = pack(anymask.key_padding(lengths), q_len=2, kv_len=3).to_dense()
    assert padding[:, 0, 0].tolist() == [[True, True, False], [False, False, False]]
    assert torch.equal(pack(anymask.key_padding(flags), q_len=2, kv_len=3).to_dense()[:, 0, 0], flags)


def test_the_largest_ids_are_documents_too() -> None:
    ids = torch.tensor([2**63 - 1, 2**63 - 1, -(2**63), -(2**63), 0, -1, 2**63 - 2])
    same = (ids[:, None] == ids) & (ids != -1)
    assert torch.equal(pack(document(ids), q_len=7, kv_len=7).to_dense()[0, 0], same)


@pytest.mark.parametrize("n", [7, 2**28, 2**31 - 1, 2**31, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, 10**20])
def test_numbers_of_any_size(n: int) -> None:
    full, empty, diagonal = torch.ones(6, 6).bool(), torch.zeros(6, 6).bool(), torch.eye(6).bool()
    for mask, dense in (
        (causal(n), full),
        (causal(-n), empty),
        (Band(-n, n, lower_right=True), full),
        (Band(n, None, lower_right=True), empty),
        (sliding_window(n, n), full),
        (anymask.chunked(n), full),
        (anymask.block_diffusion(n), full),
        (Stride(n), diagonal),
        (Positions(-n, n, of_query=True), full),
        (Positions(n, 2 * n, of_query=False), empty),
        (Blocks(torch.ones(1, 1, 1, 1).bool(), n), full),
    ):
        assert torch.equal(pack(mask, q_len=6, kv_len=6).to_dense()[0, 0], dense), mask
        program = program_of(mask)
        assert program is not None
        assert all(-(2**63) <= number < 2**63 for number in program.numbers)
        assert_same_block_mask(pack(mask_from_program(*program), q_len=6, kv_len=6), pack(mask, q_len=6, kv_len=6))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dynamic", [None, True])
def test_new_numbers_in_a_compiled_function_compile_nothing(dynamic: bool | None) -> None:
    def call(q: Tensor, n: int) -> Tensor:
        return attention(q, q, q, sliding_window(n, 2) & causal(-n) | document(torch.arange(10) // 3))

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=dynamic)
    q = torch.randn(1, 2, 10, 8)
    for n in range(12):
        assert torch.equal(compiled(q, n), call(q, n))
    # the first number is taken for a constant, unless dynamic
    assert counter.frame_count == (1 if dynamic else 2)
