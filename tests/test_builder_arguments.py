"""What builders are given: values that are copied, names in `repr` and errors, and arguments that do not fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask

import anymask
from anymask import Mask, causal, formats, pack

IDS = torch.tensor([3, 3, 3, 0, 0, 7, 7, 7, 7, 3])
ONES = torch.ones(10, dtype=torch.int64)

# name: (tensors, the mask of them); all tensors are int64 or bool, which a conversion alone would not copy
KEPT: dict[str, tuple[list[Tensor], Callable[..., Mask]]] = {
    "document": ([IDS], anymask.document),
    "document kv_ids": ([IDS, IDS % 4], lambda ids, kv_ids: anymask.document(ids, kv_ids=kv_ids)),
    "cu_seqlens": ([torch.tensor([0, 3, 10])], lambda x: anymask.document(cu_seqlens=x)),
    "position_ids": ([torch.arange(10) % 4], lambda x: anymask.document(position_ids=x)),
    "document_window": ([torch.tensor([0, 3, 10])], lambda x: anymask.document_window(x, 1)),
    "lengths": ([torch.tensor([7])], anymask.key_padding),
    "keep": ([IDS > 2], anymask.key_padding),
    "prefix_lm": ([torch.tensor([7])], anymask.prefix_lm),
    "spans": ([IDS - 2, IDS + 2], anymask.spans),
    "global positions": ([torch.tensor([3, 8])], anymask.global_tokens),
    "global flags": ([IDS == 0], anymask.global_tokens),
    "shared_prefix": ([IDS], anymask.shared_prefix),
    "shared_question": ([IDS // 4, IDS % 3], anymask.shared_question),
    "tree": ([torch.arange(10) - 1], anymask.tree),
    "block_sparse": ([torch.eye(5) > 0], lambda x: anymask.block_sparse(x, 2)),
    "block_sparse by pairs": ([torch.eye(5) > 0], lambda x: anymask.block_sparse(x, (2, 2))),
    "block_sparse by sizes": (
        [torch.eye(3) > 0, torch.tensor([2, 5, 3]), torch.tensor([1, 1, 8])],
        lambda layout, q, kv: anymask.block_sparse(layout, (q, kv)),
    ),
    "startend": ([torch.arange(2, 12).view(1, 1, 10, 1)], lambda x: formats.from_startend_row_indices(x, True)),
    "ranges": ([torch.tensor([[0, 5], [5, 10]]), torch.tensor([[0, 3], [4, 10]])], formats.from_ranges),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_mask_is_a_value(name: str) -> None:
    tensors, build = KEPT[name]
    tensors = [t.clone() for t in tensors]
    mask = build(*tensors)
    before = _packed(mask).to_dense()
    assert before.any()
    assert not before.all()
    for t in tensors:
        t.zero_()
    assert torch.equal(_packed(mask).to_dense(), before)


def test_a_tensor_is_read_when_it_is_packed() -> None:
    tensor = torch.zeros(10, 10, dtype=torch.bool)
    mask = anymask.from_dense(tensor)
    tensor[0] = True
    assert pack(mask).to_dense().sum() == 10


def test_expanded_samples_and_heads_are_kept_once() -> None:
    assert anymask.document(IDS.expand(64, 8, 10)).planes == (1, 1)
    assert anymask.block_sparse((IDS > 2).expand(3, 2, 5, 10), 4).planes == (1, 1)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (causal(), "causal()"),
        (causal(3), "causal(offset=3)"),
        (anymask.sliding_window(4, offset=-1), "sliding_window(left=4, offset=-1)"),
        (anymask.document(IDS, kv_ids=IDS.int()), "document(ids=int64[10], kv_ids=int32[10])"),
        (anymask.dilated(2, 3), "dilated(step=2, window=3)"),
        (anymask.shared_question(IDS, IDS), "shared_question(questions=int64[10], answers=int64[10])"),
        (anymask.block_sparse(torch.eye(2) > 0, (8, ONES[:2])), "block_sparse(layout=bool[2, 2], block=(8, int64[2]))"),
        (anymask.from_function(len), "from_function(fn=len)"),  # type: ignore[arg-type]
        (formats.from_ranges([(0, 1)] * 10, [(0, 1)] * 10), "from_ranges(q_ranges=list of 10, k_ranges=list of 10)"),
        (
            causal() & ~(anymask.document(IDS) | anymask.chunked(64)),
            "(causal() & ~(document(ids=int64[10]) | chunked(size=64)))",
        ),
        (anymask.document(IDS).to("meta"), "document(ids=int64[10])"),
    ],
    ids=str,
)
def test_masks_print_the_calls_that_made_them(mask: Mask, text: str) -> None:
    assert repr(mask) == text


def test_masks_of_no_builder_print_their_fields() -> None:
    from anymask.mask.leaves import Band

    assert repr(~Band(0, 0, block=64)) == "~Band(low=0, high=0, block=64)"


def test_names_say_nothing_about_equality() -> None:
    assert causal() == causal(0) == anymask.sliding_window(None)
    assert hash(causal()) == hash(anymask.sliding_window(None))
    assert causal() != causal(1)


def test_builders_keep_their_names_and_descriptions() -> None:
    assert anymask.causal.__name__ == "causal"
    assert "upper-left" in (anymask.causal.__doc__ or "")


def _packed(mask: Mask) -> Any:
    return pack(mask, q_len=10, kv_len=10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: anymask.dilated(0, 3), ValueError, "dilated: step is 0; allowed are 1 and more"),
        (lambda: anymask.dilated(2, -1), ValueError, "window is -1; allowed are 0 and more"),
        (lambda: anymask.strided(1.5), TypeError, "step is 1.5 of type float"),
        (lambda: anymask.chunked(-4), ValueError, "size is -4; allowed are 1 and more"),
        (lambda: anymask.block_diffusion(0), ValueError, "block is 0"),
        (
            lambda: anymask.block_diffusion(16, 40),
            ValueError,
            "length is 40; allowed are multiples of block, which is 16",
        ),
        (
            lambda: anymask.document(),
            ValueError,
            "^document takes one of ids, cu_seqlens and position_ids, 0 were given",
        ),
        (lambda: anymask.document(IDS, position_ids=IDS), ValueError, "2 were given"),
        (lambda: anymask.document(cu_seqlens=IDS, kv_ids=IDS), ValueError, "kv_ids beside ids, cu_seqlens was given"),
        (lambda: anymask.document([1, 2]), TypeError, "ids is a list; allowed is an int tensor"),
        (lambda: anymask.document(IDS.float()), ValueError, r"ids is torch.float32 of shape \(10,\)"),
        (lambda: anymask.document(IDS > 2), ValueError, "ids is torch.bool"),
        (
            lambda: _packed(anymask.document(IDS[:9])),
            ValueError,
            "document: ids has length 9 but q_len is 10; allowed are equal",
        ),
        (
            lambda: anymask.document(cu_seqlens=torch.tensor([0, 6, 4])),
            ValueError,
            r"cu_seqlens is \[0, 6, 4\]; allowed",
        ),
        (lambda: anymask.document(cu_seqlens=torch.tensor([1, 6])), ValueError, r"cu_seqlens is \[1, 6\]; allowed"),
        (
            lambda: _packed(anymask.document(cu_seqlens=torch.tensor([0, 4]))),
            ValueError,
            "cu_seqlens has length 4 but q_len",
        ),
        (lambda: anymask.key_padding(torch.rand(3)), ValueError, "keep is torch.float32"),
        (
            lambda: _packed(anymask.key_padding(IDS[None] > 2) & anymask.spans(IDS[:4], IDS[:4])),
            ValueError,
            "spans: start and end has length 4 but q_len is 10",
        ),
        (lambda: anymask.prefix_lm(-1), ValueError, "prefix_len is -1; allowed are 0 and more"),
        (lambda: anymask.prefix_lm(IDS[None]), ValueError, r"prefix_len is torch.int64 of shape \(1, 10\)"),
        (lambda: anymask.global_tokens(torch.tensor([0, 1, 1, 0])), ValueError, r"\[0, 1, 1, 0\] has a position twice"),
        (lambda: anymask.global_tokens(torch.tensor([4, -1])), ValueError, "tokens is -1; allowed are 0 and more"),
        (lambda: anymask.global_tokens(torch.ones(4)), ValueError, r"tokens is torch.float32 of shape \(4,\)"),
        (lambda: anymask.tree(torch.tensor([-1, 2, 1])), ValueError, "parents form a cycle through token 1"),
        (lambda: anymask.tree(torch.tensor([-1, 3])), ValueError, r"parents\[1\] is 3; allowed are -1 to 1"),
        (lambda: anymask.tree(torch.tensor([0])), ValueError, "parents form a cycle through token 0"),
        (lambda: anymask.neighbourhood_2d((4, 4), 2), ValueError, "_2d: kernel is 2; allowed are odd sizes"),
        (
            lambda: anymask.neighbourhood_2d((4, 4), 5),
            ValueError,
            r"kernel is 5; allowed are odd sizes of at most the shape, which is \(4, 4\)",
        ),
        (
            lambda: anymask.neighbourhood_3d((4, 4), 3),
            ValueError,
            r"neighbourhood_3d: shape is \(4, 4\); allowed are 3 sizes",
        ),
        (
            lambda: _packed(anymask.neighbourhood_2d((3, 3), 3)),
            ValueError,
            "neighbourhood_2d: the product of shape has length 9 but",
        ),
        (
            lambda: anymask.block_sparse(IDS, 128),
            ValueError,
            r"layout is torch.int64 \(10,\); allowed is a bool tensor",
        ),
        (
            lambda: _packed(anymask.block_sparse(IDS[None] > 1, 1)),
            ValueError,
            "layout has 1 blocks of 1 along q_len but",
        ),
        (lambda: anymask.random_blocks(10, 10, 1.2), ValueError, "share is 1.2; allowed are 0 to 1"),
        (lambda: anymask.from_function(3), TypeError, "fn is a int; allowed is a function"),
        (lambda: _packed(anymask.from_function(lambda b, h, q, k: q - k)), ValueError, "result of dtype torch.int64"),
        (lambda: _packed(anymask.from_function(lambda b, h, q, k: True)), ValueError, "result of type bool"),
        (
            lambda: _packed(anymask.from_function(lambda b, h, q, k: torch.ones(3, 3) > 0)),
            ValueError,
            r"fn returned shape \(3, 3\) for single indices; allowed is a single bool",
        ),
        (
            lambda: _packed(anymask.from_function(lambda b, h, q, k: torch.ones(3, 3) > 0, vectorised=True)),
            ValueError,
            r"fn returned shape \(3, 3\) for index tensors that broadcast to",
        ),
        (lambda: anymask.from_function(len, vectorised=1), TypeError, "vectorised is 1 of type int; allowed is a bool"),
        (lambda: causal("1"), TypeError, "causal: offset is '1' of type str; allowed is an int"),
        (lambda: causal(torch.tensor([1])), TypeError, r"offset is int64\[1\] of type Tensor; allowed is an int"),
        (lambda: anymask.sliding_window(-1), ValueError, "sliding_window: left is -1; allowed are 0 and more"),
        (lambda: anymask.sliding_window(1, 2.0), TypeError, "sliding_window: right is 2.0 of type float"),
        (lambda: anymask.sliding_window(1, offset=None), TypeError, "offset is None of type NoneType"),
        (lambda: anymask.sliding_window(), TypeError, r"^sliding_window\(\) missing 1 required positional argument"),
        (
            lambda: anymask.key_padding(ONES[None]),
            ValueError,
            r"key_padding: keep is torch.int64 of shape \(1, 10\); allowed are bool .*\[batch, kv_len\].* keep != 0",
        ),
        (
            lambda: anymask.key_padding(torch.ones(2, 1, 1, 10) > 0),
            ValueError,
            r"key_padding: keep is torch.bool of shape \(2, 1, 1, 10\); allowed are bool \[kv_len\], \[batch, kv_len\]",
        ),
        (
            lambda: anymask.key_padding([True]),
            TypeError,
            "key_padding: keep is a list; allowed is a bool or int tensor",
        ),
        (
            lambda: anymask.document(IDS.to_sparse()),
            ValueError,
            "ids is a tensor that is sparse_coo; allowed is an int",
        ),
        (lambda: anymask.document(ONES.to(torch.uint64)), ValueError, "ids is torch.uint64 of shape"),
        (
            lambda: _packed(anymask.document(IDS, kv_ids=torch.zeros(20).long())),
            ValueError,
            "document: ids and kv_ids has length 20 but kv_len is 10",
        ),
        (lambda: anymask.document(IDS, kv_ids=[1]), TypeError, "document: kv_ids is a list; allowed is an int tensor"),
        (
            lambda: anymask.document(IDS, kv_ids=IDS.to("meta")),
            ValueError,
            "document: kv_ids is on meta but ids is on cpu; allowed is one device",
        ),
        (
            lambda: anymask.document(IDS, kv_cu_seqlens=IDS),
            ValueError,
            "document takes kv_cu_seqlens beside cu_seqlens, ids was given",
        ),
        (
            lambda: anymask.document(cu_seqlens=torch.tensor([0, 4]), kv_cu_seqlens=torch.tensor([0, 4, 5])),
            ValueError,
            "document: kv_cu_seqlens has 2 documents but cu_seqlens has 1; allowed are as many",
        ),
        (
            lambda: anymask.document(cu_seqlens=IDS.to("meta")),
            ValueError,
            "document: cu_seqlens is on meta, where tensors have no values",
        ),
        (
            lambda: anymask.document_window(IDS),
            ValueError,
            r"document_window: cu_seqlens is \[3, 3, 3, 0, 0, 7, 7, 7, ...\]",
        ),
        (lambda: anymask.document_window(IDS[3:6], left=-1), ValueError, "document_window: left is -1"),
        (lambda: anymask.document_window(IDS[3:6], right=1.5), TypeError, "document_window: right is 1.5"),
        (
            lambda: _packed(anymask.document_window(IDS[4:6])),
            ValueError,
            "document_window: cu_seqlens has length 7 but",
        ),
        (
            lambda: _packed(anymask.document_window(torch.tensor([0, 10]), kv_cu_seqlens=IDS[4:6])),
            ValueError,
            "cu_seqlens and kv_cu_seqlens has length 7 but kv_len is 10",
        ),
        (lambda: anymask.spans(IDS, IDS.to("meta")), ValueError, "spans: end is on meta but start is on cpu"),
        (lambda: anymask.spans(IDS, None), TypeError, "spans: end is a NoneType; allowed is an int tensor"),
        (
            lambda: anymask.shared_question(IDS, IDS.to("meta")),
            ValueError,
            "answers is on meta but questions is on cpu",
        ),
        (lambda: anymask.shared_prefix(IDS[:, None, None, None]), ValueError, "integers of up to int64 in 1 or 2 or 3"),
        (lambda: anymask.tree(3), TypeError, "tree: parents is a int; allowed is an int tensor"),
        (lambda: anymask.tree(IDS.to("meta")), ValueError, "tree: parents is on meta"),
        (lambda: anymask.global_tokens(1.5), TypeError, "global_tokens: tokens is 1.5 of type float"),
        (lambda: anymask.neighbourhood_2d(5, 3), TypeError, "shape is 5 of type int; allowed is a tuple of 2 ints"),
        (lambda: anymask.neighbourhood_2d((4, 4), "33"), TypeError, "kernel is '33' of type str; allowed is a tuple"),
        (
            lambda: anymask.neighbourhood_2d((0, 4), 1),
            ValueError,
            "neighbourhood_2d: shape is 0; allowed are 1 and more",
        ),
        (
            lambda: anymask.block_sparse([[True]], 1),
            TypeError,
            "block_sparse: layout is a list; allowed is a bool tensor",
        ),
        (lambda: anymask.block_sparse(torch.eye(2) > 0, 0), ValueError, "block_sparse: block is 0; allowed are 1"),
        (lambda: anymask.block_sparse(torch.eye(2) > 0, None), TypeError, "block is None of type NoneType"),
        (
            lambda: anymask.block_sparse(torch.eye(2) > 0, (1, 2, 3)),
            ValueError,
            r"block is \(1, 2, 3\); allowed are an int",
        ),
        (lambda: anymask.block_sparse(torch.eye(2) > 0, (4, 0.5)), TypeError, "block is 0.5 of type float"),
        (
            lambda: anymask.block_sparse(torch.eye(2) > 0, (ONES[:3], 4)),
            ValueError,
            r"block has sizes \[1, 1, 1\] along q_len; allowed are 2, as layout has, of 0 and more",
        ),
        (lambda: anymask.block_sparse(torch.eye(2) > 0, (4, -ONES[:2])), ValueError, r"sizes \[-1, -1\] along kv_len"),
        (
            lambda: anymask.block_sparse(torch.eye(2) > 0, (4, ONES[:2].to("meta"))),
            ValueError,
            "block_sparse: block is on meta",
        ),
        (
            lambda: _packed(anymask.block_sparse(torch.eye(2) > 0, (ONES[:2] * 5, ONES[:2] * 4))),
            ValueError,
            "block_sparse: layout in blocks of these sizes has length 8 but kv_len is 10",
        ),
        (lambda: anymask.random_blocks(10, 10, "0.3"), TypeError, "random_blocks: share is a str; allowed is a float"),
        (lambda: anymask.random_blocks(10, -1, 0.3), ValueError, "random_blocks: kv_len is -1; allowed are 0 and more"),
        (
            lambda: anymask.random_blocks(10, 10, 0.3, generator=3),
            TypeError,
            "generator is a int; allowed are None and",
        ),
        (lambda: anymask.from_dense([1]), TypeError, "from_dense: tensor is a list; allowed is a bool tensor"),
        (lambda: anymask.from_dense(ONES[:, None]), ValueError, "from_dense: tensor has dtype torch.int64; allowed is"),
        (lambda: anymask.from_dense(IDS > 2), ValueError, r"from_dense: tensor has shape \(10,\), 1 dimensions"),
        (lambda: anymask.from_dense((IDS[None] > 2).to_sparse()), ValueError, "tensor is a tensor that is sparse_coo"),
        (
            lambda: anymask.from_dense(causal_lower_right(4, 4)),
            TypeError,
            "tensor is a CausalBias; convert it by anymask.formats.from_causal_bias",
        ),
        (lambda: pack(causal()), ValueError, r"^causal\(\) has no length, pass q_len=..."),
        (
            lambda: pack(causal() & anymask.document(IDS), q_len=10),
            ValueError,
            r"^\(causal\(\) & document\(ids=int64\[10\]\)\) has no length, pass kv_len=...",
        ),
        (lambda: pack(causal(), q_len=8.0, kv_len=8), TypeError, "q_len is 8.0 of type float; allowed is an int"),
        (lambda: pack(causal(), q_len=8, kv_len=-8), ValueError, "kv_len is -8; allowed are 0 and more"),
        (lambda: pack(pack(IDS[None] > 1)), TypeError, "mask is a BlockMask; allowed are a bool tensor and a Mask"),
        (lambda: pack(None), TypeError, "mask is a NoneType; allowed are a bool tensor and a Mask"),
        (
            lambda: pack(create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu")),
            TypeError,
            "mask is a BlockMask of torch.nn.attention.flex_attention; convert it by anymask.formats.from_flex",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
