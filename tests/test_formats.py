"""Masks of other libraries: what they mean there, and round trips."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from anymask import attention, causal, document, formats, pack, sliding_window
from anymask.mask.program import program_of
from anymask.testing import MASKS, assert_same_block_mask, make_qkv
from tests.helpers import grid

pytestmark = pytest.mark.filterwarnings("ignore")
# in any shape, and in a square only
COLUMN_WISE = ["causal", "key_padding", "all_empty", "all_full"]
COLUMN_WISE_SQUARE = [*COLUMN_WISE, "window", "documents", "one_pair"]


@pytest.mark.parametrize("name", MASKS)
def test_flex_and_back(name: str) -> None:
    packed = grid.packed(name, 300, 260)
    flex = formats.to_flex(packed)
    dense = create_mask(flex.mask_mod, packed.batch, packed.heads, 300, 260, device="cpu")
    assert torch.equal(dense, packed.to_dense())
    assert_same_block_mask(pack(formats.from_flex(flex), q_len=300, kv_len=260), packed)


@pytest.mark.parametrize("size", [128, 64, (64, 128), (256, 128)], ids=str)
@pytest.mark.parametrize("length", [256, 300])
def test_from_flex(size: Any, length: int) -> None:
    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (q_idx // 90 == kv_idx // 90) | (kv_idx < 3 + h + b)

    flex = create_block_mask(mask_mod, 2, 3, length, length, device="cpu", BLOCK_SIZE=size)
    expected = create_mask(mask_mod, 2, 3, length, length, device="cpu")
    assert torch.equal(pack(formats.from_flex(flex), q_len=length, kv_len=length).to_dense(), expected)


def test_from_flex_takes_nothing_else() -> None:
    with pytest.raises(
        TypeError, match=r"is a anymask\.block_mask\.block_mask\.BlockMask; allowed is a BlockMask of torch"
    ):
        formats.from_flex(grid.packed("causal", 300, 260))
    with pytest.raises(TypeError, match=r"block_mask is a torch\.Tensor; allowed"):
        formats.from_flex(torch.ones(4, 4, dtype=torch.bool))


def test_flex_attention_computes_the_same() -> None:
    q, k, v = make_qkv(1, 2, 2, 256, 256, 16)
    packed = pack(causal() & document(torch.arange(256) // 100), q_len=256, kv_len=256)
    assert torch.allclose(
        flex_attention(q, k, v, block_mask=formats.to_flex(packed)), attention(q, k, v, packed), atol=1e-5
    )


@pytest.mark.parametrize("causal_", [True, False])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_startend_row_indices_mean_hidden_rows(n: int, causal_: bool) -> None:
    q_len, kv_len = 150, 170
    indices = torch.randint(0, q_len + 1, (2, 3, kv_len, n), dtype=torch.int32)
    if n == (4 if causal_ else 1):
        with pytest.raises(ValueError, match=f"with causal={causal_}"):
            formats.from_startend_row_indices(indices, causal_)
        return
    packed = pack(formats.from_startend_row_indices(indices, causal_), q_len=q_len, kv_len=kv_len)
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    first, *rest = (x[:, :, None, :] for x in indices.unbind(-1))
    if n == 1:
        hidden = i >= first
    elif n == 2:
        hidden = (i >= first) & (i < rest[0]) if causal_ else (i >= first) | (i < rest[0])
    else:
        hidden = ((i >= first) & (i < rest[0])) | ((i >= rest[1]) & (i < rest[2]))
    assert torch.equal(packed.to_dense(), ~hidden & (i + kv_len - q_len >= j) if causal_ else ~hidden)


@pytest.mark.parametrize("causal_", [True, False])
@pytest.mark.parametrize(
    ("name", "q_len", "kv_len"), [(n, 200, 200) for n in COLUMN_WISE_SQUARE] + [(n, 130, 260) for n in COLUMN_WISE]
)
def test_startend_row_indices_and_back(name: str, q_len: int, kv_len: int, causal_: bool) -> None:
    packed = grid.packed(name, q_len, kv_len)
    if causal_:
        packed = pack(formats.causal_lower_right() & formats.from_dense(packed.to_dense()), q_len=q_len, kv_len=kv_len)
    indices = formats.to_startend_row_indices(packed, causal_)
    assert indices.dtype == torch.int32
    assert indices.shape == (packed.batch, packed.heads, kv_len, 2 if causal_ else 4)
    again = pack(formats.from_startend_row_indices(indices, causal_), q_len=q_len, kv_len=kv_len)
    assert torch.equal(again.to_dense(), packed.to_dense())


def test_startend_row_indices_of_grouped_heads() -> None:
    indices = torch.randint(0, 100, (1, 2, 90, 1))
    mask = formats.from_startend_row_indices(indices, True, q_heads=6)
    assert mask.planes == (1, 6)
    dense = pack(mask, q_len=90, kv_len=90).to_dense()
    alone = pack(formats.from_startend_row_indices(indices, True), q_len=90, kv_len=90).to_dense()
    assert torch.equal(dense, alone.repeat_interleave(3, 1))
    with pytest.raises(ValueError, match="q_heads is 5; allowed are multiples of the 2 planes"):
        formats.from_startend_row_indices(indices, True, q_heads=5)


def test_what_startend_row_indices_cannot_say() -> None:
    with pytest.raises(ValueError, match=r"hidden from \d+ ranges of queries; allowed with causal=False are 2"):
        formats.to_startend_row_indices(grid.packed("random", 100, 100), False)
    with pytest.raises(ValueError, match="shows a key to a query before it"):
        formats.to_startend_row_indices(grid.packed("all_full", 100, 100), True)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (5, 3), (130, 257)], ids=str)
@pytest.mark.parametrize("name", ["random", "per_batch_head", "causal", "all_empty"])
def test_bits_and_back(name: str, q_len: int, kv_len: int) -> None:
    np = pytest.importorskip("numpy")
    packed = grid.packed(name, q_len, kv_len)
    bits = formats.to_bits(packed)
    expected = np.packbits(packed.to_dense().flatten(2).numpy(), axis=-1, bitorder="little")
    assert torch.equal(bits, torch.from_numpy(expected))
    assert_same_block_mask(pack(formats.from_bits(bits, q_len, kv_len)), packed)


def test_bits_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"bits is torch.uint8 of shape \(7,\); allowed is torch.uint8 \[\.\.\., 8\]"):
        formats.from_bits(torch.zeros(7, dtype=torch.uint8), 8, 8)


def test_ranges() -> None:
    rectangles = [
        ((0, 50), (0, 70), 0),
        ((50, 90), (20, 60), 1),
        ((90, 130), (100, 150), 2),
        ((130, 150), (90, 120), 3),
    ]
    dense = torch.zeros(160, 160, dtype=torch.bool)
    for (a, b), (c, d), kind in rectangles:
        for i in range(a, b):
            for j in range(c, d):
                dense[i, j] = (not kind & 1 or j - d <= i - b) and (not kind & 2 or j - c >= i - a)
    ranges = list(map(list, zip(*rectangles, strict=True)))
    mask = formats.from_ranges(*ranges, q_len=160)
    assert torch.equal(pack(mask, q_len=160, kv_len=160).to_dense()[0, 0], dense)
    # the same as tensors, and for the queries of ranges alone
    again = formats.from_ranges(*map(torch.tensor, ranges))
    assert torch.equal(pack(again, q_len=150, kv_len=160).to_dense()[0, 0], dense[:150])
    assert pack(formats.from_ranges([(0, 9)], [(0, 9)]), q_len=9, kv_len=9).to_dense().all()
    for arguments, message in (
        (([(0, 3)], [], None), "1 q_ranges, 0 k_ranges, 1 types"),
        (([(3, 1)], [(0, 3)], [0]), r"q \(3, 1\), k \(0, 3\) of type 0; allowed"),
        (([(0, 1)], [(0, 3)], [4]), r"of type 4; allowed are 0 <= start <= end < 2\*\*31 and types 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            formats.from_ranges(*arguments)


class _Bias:
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def materialize(self, shape: tuple[int, int]) -> Tensor:
        return self.values.expand(shape)


def test_xformers() -> None:
    seen = torch.rand(40, 50) < 0.5
    bias = torch.zeros(40, 50).masked_fill(~seen, -float("inf"))
    assert torch.equal(pack(formats.from_xformers(_Bias(bias), 40, 50)).to_dense()[0, 0], seen)
    with pytest.raises(ValueError, match="_Bias adds values other than 0 and -inf"):
        formats.from_xformers(_Bias(bias + 1), 40, 50)


def _causal_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def _flex(q_len: int, kv_len: int, mod: Any = _causal_mod, **options: Any) -> FlexBlockMask:
    return create_block_mask(
        mod, options.pop("batch", None), options.pop("heads", None), q_len, kv_len, "cpu", **options
    )


def test_a_sliced_flex_mask_says_so() -> None:
    flex = _flex(256, 256)
    with pytest.raises(ValueError, match="from_flex: block_mask was sliced, which takes its mask_mod away"):
        formats.from_flex(flex[:, :, :1])
    # nothing is lost where no block is partial
    full = _flex(256, 384, lambda b, h, i, j: j < 128, batch=2, heads=1)
    part = pack(formats.from_flex(full[1:, :, :1]), q_len=128, kv_len=384)
    assert torch.equal(part.to_dense(), (torch.arange(384) < 128).expand(1, 1, 128, 384))
    # nor where it is given again
    lower = flex[:, :, 1:]
    lower.mask_mod = lambda b, h, i, j: i + 128 >= j
    packed = pack(formats.from_flex(lower), q_len=128, kv_len=256)
    assert torch.equal(packed.to_dense()[0, 0], torch.arange(256) <= torch.arange(128, 256)[:, None])


@pytest.mark.parametrize(("q_len", "kv_len"), [(512, 300), (300, 512), (100, 100), (500, 640), (512, 100)], ids=str)
def test_flex_lists_that_were_adjusted(q_len: int, kv_len: int) -> None:
    packed = pack(formats.from_flex(_flex(512, 512)._adjust(q_len, kv_len)), q_len=q_len, kv_len=kv_len)
    expected = create_mask(_causal_mod, None, None, min(q_len, 512), min(kv_len, 512), device="cpu")[0, 0]
    # flex has no blocks beyond those it knew
    dense = torch.zeros(q_len, kv_len, dtype=torch.bool)
    dense[: expected.shape[0], : expected.shape[1]] = expected
    assert torch.equal(packed.to_dense()[0, 0], dense)


@pytest.mark.parametrize("beyond", [-1, 99, 1 - 2**31])
def test_flex_entries_beyond_their_counts_mean_nothing(beyond: int) -> None:
    flex = _flex(256, 256, batch=2, heads=3)
    at, full_at = flex.kv_indices.clone(), flex.full_kv_indices.clone()
    for indices, counts in ((at, flex.kv_num_blocks), (full_at, flex.full_kv_num_blocks)):
        indices[torch.arange(2) >= counts[..., None]] = beyond
    paged = FlexBlockMask.from_kv_blocks(
        flex.kv_num_blocks, at, flex.full_kv_num_blocks, full_at,
        BLOCK_SIZE=128, mask_mod=flex.mask_mod, compute_q_blocks=False,
    )  # fmt: skip
    packed = pack(formats.from_flex(paged), q_len=256, kv_len=256)
    assert torch.equal(packed.to_dense(), create_mask(_causal_mod, 2, 3, 256, 256, device="cpu"))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_flex_lists_of_any_width(width: int) -> None:
    def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (q_idx // 128 - kv_idx // 128 < 1)

    flex = _flex(512, 512, window)
    at = torch.nn.functional.pad(flex.kv_indices, (0, 1), value=77)[..., :width]
    compact = FlexBlockMask.from_kv_blocks(
        flex.kv_num_blocks, at, BLOCK_SIZE=128, mask_mod=window, seq_lengths=(512, 512), compute_q_blocks=False
    )
    packed = pack(formats.from_flex(compact), q_len=512, kv_len=512)
    assert torch.equal(packed.to_dense(), create_mask(window, None, None, 512, 512, device="cpu"))


def test_flex_blocks_that_are_none() -> None:
    flex = FlexBlockMask.from_kv_blocks(
        torch.ones(1, 1, 2, dtype=torch.int32), torch.full((1, 1, 2, 2), -1), compute_q_blocks=False
    )
    with pytest.raises(ValueError, match="from_flex: kv_indices names block -1; allowed are 0 and more"):
        formats.from_flex(flex)
    # beyond the last key there is nothing to see
    counts, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.tensor([5, 1]).view(1, 1, 2, 1)
    beyond = FlexBlockMask.from_kv_blocks(counts, indices, seq_lengths=(256, 256), compute_q_blocks=False)
    dense = pack(formats.from_flex(beyond), q_len=256, kv_len=256).to_dense()[0, 0]
    assert torch.equal(dense.nonzero().amin(0), torch.tensor([128, 128]))
    assert dense.sum() == 128 * 128


@pytest.mark.parametrize(
    ("q_len", "kv_len", "message"),
    [
        (120, 100, "block_mask has length 100 but q_len is 120"),
        (100, 128, "block_mask has length 100 but kv_len is 128"),
    ],
)
def test_flex_masks_keep_their_lengths(q_len: int, kv_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(formats.from_flex(_flex(100, 100)), q_len=q_len, kv_len=kv_len)
    with pytest.raises(ValueError, match="block_mask has length 100"):
        attention(*make_qkv(1, 1, 1, q_len, kv_len, 16), formats.from_flex(_flex(100, 100)))


def test_a_mask_mod_that_indexes_with_single_indices() -> None:
    bounds, rows = (
        torch.tensor([[0, 3], [2, 9], [0, 0]]),
        torch.rand(2, 140, generator=torch.Generator().manual_seed(0)),
    )

    def mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        bound = bounds[kv_idx % 3]
        return (q_idx % 10 >= bound[0]) & (q_idx % 10 < bound[1]) | (rows[b][q_idx] > 0.9)

    packed = pack(formats.from_flex(_flex(140, 130, mod, batch=2)), q_len=140, kv_len=130)
    assert torch.equal(packed.to_dense(), create_mask(mod, 2, 1, 140, 130, device="cpu"))


def test_a_window_through_every_format() -> None:
    packed = pack(sliding_window(30), q_len=200, kv_len=200)
    for mask in (
        formats.from_flex(formats.to_flex(packed)),
        formats.from_startend_row_indices(formats.to_startend_row_indices(packed, True), True),
        formats.from_startend_row_indices(formats.to_startend_row_indices(packed, False), False),
        formats.from_bits(formats.to_bits(packed), 200, 200),
    ):
        assert_same_block_mask(pack(mask, q_len=200, kv_len=200), packed)


def test_ranges_that_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    q_ranges, k_ranges = (torch.randint(0, 200, (40, 2), generator=generator).sort(1).values for _ in range(2))
    types = torch.randint(0, 4, (40,), generator=generator)
    i, j = torch.arange(210)[:, None], torch.arange(200)
    dense = torch.zeros(210, 200, dtype=torch.bool)
    for (a, b), (c, d), kind in zip(q_ranges.tolist(), k_ranges.tolist(), types.tolist(), strict=True):
        inside = (a <= i) & (i < b) & (c <= j) & (j < d)
        dense |= inside & ((j - d <= i - b) | (not kind & 1)) & ((j - c >= i - a) | (not kind & 2))
    mask = formats.from_ranges(q_ranges, k_ranges, types, q_len=210)
    assert torch.equal(pack(mask, q_len=210, kv_len=200).to_dense()[0, 0], dense)


def test_ranges_that_share_one_query() -> None:
    dense = pack(formats.from_ranges([(0, 5), (4, 9)], [(0, 2), (5, 7)]), q_len=9, kv_len=9).to_dense()[0, 0]
    assert dense[4].nonzero().flatten().tolist() == [0, 1, 5, 6]
    assert dense.sum() == 20


def test_ten_thousand_ranges() -> None:
    rows = list(range(10_000))
    program = program_of(formats.from_ranges([(i, i + 1) for i in rows], [(0, i + 1) for i in rows]))
    assert program is not None
    leaves = program.tensors
    # one range of keys for each query
    assert [t.shape for t in leaves] == [(1, 1, 10_000)] * 2
    assert torch.equal(leaves[0].flatten(), torch.zeros(10_000))
    assert torch.equal(leaves[1].flatten(), torch.arange(1, 10_001))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_additive(dtype: torch.dtype) -> None:
    seen = torch.rand(2, 1, 40, 50) < 0.5
    for least in (-float("inf"), torch.finfo(dtype).min):
        added = torch.zeros(2, 1, 40, 50, dtype=dtype).masked_fill(~seen, least)
        assert torch.equal(pack(formats.from_additive(added)).to_dense(), seen)
    assert formats.from_additive(added[:1].expand(6, 3, 40, 50)).planes == (1, 1)
    assert torch.equal(pack(formats.from_additive(added[0, 0])).to_dense()[0, 0], seen[0, 0])


@pytest.mark.parametrize("value", [1.0, -1e9, float("nan"), float("inf"), -1e-30])
def test_what_no_additive_mask_has(value: float) -> None:
    added = torch.zeros(4, 4)
    added[1, 2] = value
    with pytest.raises(ValueError, match=r"from_additive: tensor adds values other than 0 and -inf, such as "):
        formats.from_additive(added)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 9), (9, 5), (7, 7)], ids=str)
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_bias(make: Any, q_len: int, kv_len: int) -> None:
    bias = make(q_len, kv_len)
    mask = formats.from_causal_bias(bias)
    assert torch.equal(pack(mask, q_len=q_len, kv_len=kv_len).to_dense()[0, 0], bias._materialize())
    with pytest.raises(ValueError, match=f"bias has length {kv_len} but kv_len is {kv_len + 1}"):
        pack(mask, q_len=q_len, kv_len=kv_len + 1)


TRUE = torch.ones(4, 4, dtype=torch.bool)
PACKED = pack(TRUE)
INDICES = torch.zeros(1, 2, 4, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: formats.to_flex(TRUE),
            TypeError,
            r"block_mask is a torch\.Tensor; allowed is a BlockMask, as anymask.pack",
        ),
        (lambda: formats.to_bits(None), TypeError, r"block_mask is a builtins\.NoneType; allowed is a BlockMask"),
        (lambda: formats.to_startend_row_indices(causal(), True), TypeError, r"leaves\.Band; allowed is a BlockMask"),
        (lambda: formats.to_startend_row_indices(PACKED, 1), TypeError, "causal is 1 of type int; allowed is a bool"),
        (
            lambda: formats.from_startend_row_indices([1], True),
            TypeError,
            "from_startend_row_indices: indices is a list; allowed is an int tensor",
        ),
        (lambda: formats.from_startend_row_indices(INDICES.float(), True), ValueError, "indices is torch.float32"),
        (lambda: formats.from_startend_row_indices(INDICES, None), TypeError, "causal is None of type NoneType"),
        (
            lambda: formats.from_startend_row_indices(INDICES, True, q_heads=0),
            ValueError,
            "q_heads is 0; allowed are 1",
        ),
        (
            lambda: formats.from_startend_row_indices(INDICES, True, q_heads=2.0),
            TypeError,
            "q_heads is 2.0 of type float",
        ),
        (
            lambda: pack(formats.from_startend_row_indices(INDICES, True), q_len=4, kv_len=5),
            ValueError,
            "from_startend_row_indices: indices has length 4 but kv_len is 5",
        ),
        (lambda: formats.from_bits([1, 2], 4, 4), TypeError, "from_bits: bits is a list; allowed is a uint8 tensor"),
        (lambda: formats.from_bits(INDICES, 4, 4), ValueError, r"bits is torch.int64 .* for q_len=4, kv_len=4"),
        (
            lambda: formats.from_bits(INDICES, 4.0, 4),
            TypeError,
            "from_bits: q_len is 4.0 of type float; allowed is an int",
        ),
        (lambda: formats.from_bits(INDICES, 4, -4), ValueError, "from_bits: kv_len is -4; allowed are 0 and more"),
        (
            lambda: formats.from_xformers(None, 4, 4),
            TypeError,
            "bias is a NoneType; allowed is an AttentionBias of xformers",
        ),
        (lambda: formats.from_xformers(_Bias(TRUE), -1, 4), ValueError, "from_xformers: q_len is -1; allowed are 0"),
        (lambda: formats.from_xformers(_Bias(TRUE), 4, 4), ValueError, "_Bias is torch.bool of shape"),
        (
            lambda: formats.from_ranges(3, [(0, 1)]),
            TypeError,
            "from_ranges: q_ranges is a int; allowed are pairs of ints",
        ),
        (lambda: formats.from_ranges([3], [(0, 1)]), TypeError, "an entry of q_ranges is 3; allowed are pairs of ints"),
        (
            lambda: formats.from_ranges([(0, 1)], [(0, 1, 2)]),
            TypeError,
            r"an entry of k_ranges is \(0, 1, 2\); allowed",
        ),
        (lambda: formats.from_ranges([(0, 1)], [(0, 1.5)]), TypeError, "a bound in k_ranges is 1.5 of type float"),
        (
            lambda: formats.from_ranges([(0, 1)], [(0, 10**20)]),
            ValueError,
            "a bound in k_ranges is 100000000000000000000",
        ),
        (lambda: formats.from_ranges([(0, 1)], [(0, 1)], "0"), TypeError, "types is a str; allowed are ints"),
        (lambda: formats.from_ranges([(0, 1)], [(0, 1)], [0.0]), TypeError, "an entry of types is 0.0 of type float"),
        (
            lambda: formats.from_ranges(INDICES[0, 0], [(0, 1)]),
            ValueError,
            "q_ranges has 1 numbers in a range; allowed are 2",
        ),
        (lambda: formats.from_ranges(INDICES[0, 0].float(), []), ValueError, "q_ranges is torch.float32 of shape"),
        (
            lambda: formats.from_ranges([(0, 5)], [(0, 5)], q_len=4),
            ValueError,
            "q_len is 4 but a range of q_ranges ends at 5",
        ),
        (lambda: formats.from_ranges([(0, 5)], [(0, 5)], q_len="5"), TypeError, "q_len is '5' of type str"),
        (
            lambda: pack(formats.from_ranges([(0, 5)], [(0, 5)]), q_len=6, kv_len=6),
            ValueError,
            "from_ranges: q_len has length 5 but q_len is 6; allowed are equal lengths",
        ),
        (lambda: formats.from_additive([0.0]), TypeError, "from_additive: tensor is a list; allowed is a float tensor"),
        (lambda: formats.from_additive(TRUE), ValueError, "tensor is torch.bool of shape"),
        (lambda: formats.from_additive(torch.zeros(4)), ValueError, "allowed are floats in 2 to 4 dimensions"),
        (lambda: formats.from_causal_bias(TRUE), TypeError, "bias is a Tensor; allowed is a CausalBias of torch"),
    ],
)
def test_what_does_not_fit(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
