"""Masks of other libraries: what they mean there, and round trips."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from anymask import attention, causal, document, formats, pack, sliding_window
from anymask.testing import MASKS, assert_same_block_mask, make_qkv

pytestmark = pytest.mark.filterwarnings("ignore")
# in any shape, and in a square only
COLUMN_WISE = ["causal", "key_padding", "all_empty", "all_full"]
COLUMN_WISE_SQUARE = [*COLUMN_WISE, "window", "documents", "one_pair"]


def _packed(name: str, q_len: int, kv_len: int) -> Any:
    mask, dense = MASKS[name](2, 3, q_len, kv_len)
    return pack(dense if mask is None else mask, q_len=q_len, kv_len=kv_len)


@pytest.mark.parametrize("name", MASKS)
def test_flex_and_back(name: str) -> None:
    packed = _packed(name, 300, 260)
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
    with pytest.raises(TypeError, match=r"is a anymask\.mask\.block_mask\.BlockMask; allowed is a BlockMask of torch"):
        formats.from_flex(_packed("causal", 300, 260))
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
    packed = _packed(name, q_len, kv_len)
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
        formats.to_startend_row_indices(_packed("random", 100, 100), False)
    with pytest.raises(ValueError, match="shows a key to a query before it"):
        formats.to_startend_row_indices(_packed("all_full", 100, 100), True)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (5, 3), (130, 257)], ids=str)
@pytest.mark.parametrize("name", ["random", "per_batch_head", "causal", "all_empty"])
def test_bits_and_back(name: str, q_len: int, kv_len: int) -> None:
    np = pytest.importorskip("numpy")
    packed = _packed(name, q_len, kv_len)
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
    mask = formats.from_ranges(*map(list, zip(*rectangles, strict=True)))
    assert torch.equal(pack(mask, q_len=160, kv_len=160).to_dense()[0, 0], dense)
    assert pack(formats.from_ranges([(0, 9)], [(0, 9)]), q_len=9, kv_len=9).to_dense().all()
    for arguments, message in (
        (([(0, 3)], [], None), "1 q_ranges, 0 k_ranges, 1 types"),
        (([(3, 1)], [(0, 3)], [0]), r"q \(3, 1\), k \(0, 3\) of type 0; allowed"),
        (([(0, 1)], [(0, 3)], [4]), "of type 4; allowed are 0 <= start <= end and types 0 to 3"),
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


def test_a_sliced_flex_mask_says_so() -> None:
    flex = create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, device="cpu")
    with pytest.raises(RuntimeError, match="sliced"):
        pack(formats.from_flex(flex[:, :, :1]), q_len=128, kv_len=256)


def test_a_window_through_every_format() -> None:
    packed = pack(sliding_window(30), q_len=200, kv_len=200)
    for mask in (
        formats.from_flex(formats.to_flex(packed)),
        formats.from_startend_row_indices(formats.to_startend_row_indices(packed, True), True),
        formats.from_startend_row_indices(formats.to_startend_row_indices(packed, False), False),
        formats.from_bits(formats.to_bits(packed), 200, 200),
    ):
        assert_same_block_mask(pack(mask, q_len=200, kv_len=200), packed)
