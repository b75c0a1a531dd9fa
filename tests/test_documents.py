"""Documents: padding, keys of their own, windows that count from each document's end, ids near the ends of int64."""

import pytest
import torch
from torch import Tensor

from anymask import causal, document, document_window, pack, shared_prefix, shared_question, sliding_window

# documents of 0 to 200 tokens, with as many keys, more and fewer
CU = torch.tensor([0, 3, 3, 133, 150, 350, 351])
KV_CU = torch.tensor([0, 5, 9, 100, 100, 350, 500])
ENDS = torch.tensor([2**63 - 1, 2**63 - 2, -(2**63), -(2**63) + 1, 0, 1, -1, -2, -1, 2**63 - 1, -(2**63)])


def _dense(mask: object, q_len: int, kv_len: int) -> Tensor:
    return pack(mask, q_len=q_len, kv_len=kv_len).to_dense()  # type: ignore[arg-type]


def _square(mask: object, length: int) -> Tensor:
    return _dense(mask, length, length)[0, 0]


def _windows(cu: Tensor, kv_cu: Tensor, left: int | None, right: int | None) -> Tensor:
    """Pair by pair, as flash-attn says it."""
    dense = torch.zeros(int(cu[-1]), int(kv_cu[-1]), dtype=torch.bool)
    cu_list, kv_list = cu.tolist(), kv_cu.tolist()
    for q0, q1, k0, k1 in zip(cu_list, cu_list[1:], kv_list, kv_list[1:], strict=False):
        for p in range(q1 - q0):
            at = p + (k1 - k0) - (q1 - q0)
            for j in range(k1 - k0):
                dense[q0 + p, k0 + j] = (left is None or j >= at - left) and (right is None or j <= at + right)
    return dense


@pytest.mark.parametrize(
    "ids", [torch.arange(300) // 70, torch.randint(-2, 4, (3, 300)), ENDS], ids=["few", "many", "ends"]
)
def test_padding_sees_nothing_and_nothing_sees_it(ids: Tensor) -> None:
    ids = ids.clone()
    ids[..., -1] = -1
    of_query, of_key = ids.view(-1, 1, ids.shape[-1], 1), ids.view(-1, 1, 1, ids.shape[-1])
    expected = (of_query == of_key) & (of_query != -1)
    length = ids.shape[-1]
    assert torch.equal(_dense(document(ids), length, length), expected)
    assert torch.equal(_dense(~document(ids), length, length), ~expected)


def test_padding_of_keys_alone() -> None:
    ids, kv_ids = torch.randint(-1, 3, (2, 150)), torch.randint(-1, 3, (2, 260))
    expected = (ids[:, None, :, None] == kv_ids[:, None, None, :]) & (ids >= 0)[:, None, :, None]
    assert torch.equal(_dense(document(ids, kv_ids=kv_ids), 150, 260), expected)


def test_padding_by_positions() -> None:
    positions = torch.tensor([-1, -1, 0, 1, 2, 0, 1, 5, -1, 0])
    number = torch.tensor([-1, -1, 0, 0, 0, 1, 1, 2, -1, 3])
    expected = (number[:, None] == number) & (number >= 0)
    assert torch.equal(_square(document(position_ids=positions), 10), expected)


def test_positions_that_overflow_begin_a_document() -> None:
    positions = torch.tensor([2**63 - 2, 2**63 - 1, -(2**63), -(2**63) + 1])
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)) > 0
    assert torch.equal(_square(document(position_ids=positions), 4), expected)


@pytest.mark.parametrize("ids", [torch.randint(-3, 4, (300,)), ENDS], ids=["many", "ends"])
def test_padding_of_shared_prefixes_and_questions(ids: Tensor) -> None:
    i, j, kept = ids[:, None], ids[None, :], (ids != -1)[:, None] & (ids != -1)
    part = ((i == j) | (j == 0)) & kept
    assert torch.equal(_square(shared_prefix(ids), len(ids)), part)
    questions = torch.arange(len(ids)) // 100 - 1
    same = (questions[:, None] == questions) & (questions >= 0)
    assert torch.equal(_square(shared_question(questions, ids), len(ids)), part & same)


def test_documents_of_queries_and_of_keys() -> None:
    number, kv_number = (torch.bucketize(torch.arange(int(x[-1])), x[1:], right=True) for x in (CU, KV_CU))
    mask = document(cu_seqlens=CU.int(), kv_cu_seqlens=KV_CU)
    assert torch.equal(_dense(mask, 351, 500)[0, 0], number[:, None] == kv_number)


@pytest.mark.parametrize("right", [None, 0, 30])
@pytest.mark.parametrize("left", [None, 0, 17])
def test_window_of_each_document(left: int | None, right: int | None) -> None:
    mask = document_window(CU, left, right, kv_cu_seqlens=KV_CU.int())
    assert torch.equal(_dense(mask, 351, 500)[0, 0], _windows(CU, KV_CU, left, right))


def test_window_of_documents_whose_keys_are_the_queries() -> None:
    assert torch.equal(_square(document_window(CU), 351), _square(causal() & document(cu_seqlens=CU), 351))
    both = sliding_window(5, 9) & document(cu_seqlens=CU)
    assert torch.equal(_square(document_window(CU, 5, 9), 351), _square(both, 351))


def test_no_documents() -> None:
    nothing = torch.tensor([0])
    assert document_window(nothing) is not None
    assert _dense(document_window(nothing), 0, 0).shape == (1, 1, 0, 0)
    assert _dense(document(cu_seqlens=nothing), 0, 0).shape == (1, 1, 0, 0)
