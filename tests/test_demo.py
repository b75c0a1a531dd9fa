"""The demonstration can fail: its checks notice a dropped mask, one wrong pair, a wrong gradient."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anymask import BlockMask, causal, demo, from_dense, pack

SIZES = demo.Sizes.choose(torch.device("cpu"), quick=True)


def make_batch(seed: int = 0) -> demo.Batch:
    texts = demo.documents(longest=200)
    return demo.pack_rows(texts, SIZES.rows, SIZES.row_len, torch.Generator().manual_seed(seed))


def packed_mask(batch: demo.Batch) -> BlockMask:
    return pack(batch.mask(), q_len=SIZES.row_len, kv_len=SIZES.row_len)


@pytest.fixture
def model() -> demo.Model:
    torch.manual_seed(0)
    return demo.Model(width=32, heads=4)


def test_documents_are_english_text_of_many_lengths() -> None:
    texts = demo.documents(longest=600)
    lengths = {len(text) for text in texts}
    assert len(texts) >= 50
    assert len(lengths) >= 30
    assert max(lengths) <= 600
    assert sum(b" the " in bytes(text.tolist()) for text in texts) > len(texts) / 2


def test_rows_hold_whole_documents_and_targets_stay_inside() -> None:
    batch = make_batch()
    known = {tuple(text.tolist()) for text in demo.documents(longest=200)}
    for row in range(SIZES.rows):
        ids = batch.ids[row]
        assert int(ids.max()) >= 2
        for number in range(int(ids.max()) + 1):
            where = ids == number
            assert tuple(batch.tokens[row, where].tolist()) in known
            assert batch.positions[row, where].tolist() == list(range(int(where.sum())))
    targets = batch.targets[:, :-1]
    inside = (batch.ids[:, :-1] == batch.ids[:, 1:]) & (batch.ids[:, :-1] >= 0)
    assert torch.equal(targets, torch.where(inside, batch.tokens[:, 1:], -100))
    assert bool((batch.targets[:, -1] == -100).all())


def test_mask_is_causal_within_a_document_and_nothing_else() -> None:
    batch = make_batch()
    at = torch.arange(SIZES.row_len)
    for row, ids in enumerate(batch.ids):
        expected = (at[:, None] >= at) & (ids[:, None] == ids) & (ids >= 0)
        assert torch.equal(packed_mask(batch).to_dense()[row, 0], expected)
    assert bool((batch.ids == -1).any()), "no padding: fully masked rows are not exercised"


def test_alone_is_every_document_once() -> None:
    batch = make_batch()
    alone = list(batch.alone())
    assert len(alone) == sum(int(ids.max()) + 1 for ids in batch.ids)
    assert sum(part.tokens.numel() for part in alone) == int((batch.ids >= 0).sum())
    assert sum(int((part.targets >= 0).sum()) for part in alone) == int((batch.targets >= 0).sum())


def test_training_learns(model: demo.Model) -> None:
    losses = list(demo.train(model, (make_batch(seed) for seed in range(6))))
    assert losses[-1] < losses[0] - 0.5


def test_packed_equals_alone_and_plain_causal_does_not(model: demo.Model) -> None:
    batch = make_batch()
    found = demo.compare(model, batch, packed_mask(batch))
    assert found.equal
    assert found.leaks
    assert found.grad_packed < 1e-5
    assert found.grad_leaky > 1e-2
    assert found.loss_packed == pytest.approx(found.loss_alone, rel=1e-6)


def test_the_comparison_fails_when_the_mask_is_dropped(model: demo.Model) -> None:
    batch = make_batch()
    found = demo.compare(model, batch, pack(causal(), q_len=SIZES.row_len, kv_len=SIZES.row_len))
    assert not found.equal
    assert found.grad_packed == pytest.approx(found.grad_leaky, rel=1e-3)


def test_the_comparison_fails_when_one_pair_is_missing(model: demo.Model) -> None:
    batch = make_batch()
    dense = packed_mask(batch).to_dense()
    dense[0, 0, 40, 12] = False
    assert not demo.compare(model, batch, pack(dense)).equal


def test_the_comparison_fails_when_it_cannot_tell(model: demo.Model) -> None:
    batch = next(make_batch().alone())
    length = batch.tokens.shape[1]
    found = demo.compare(model, batch, pack(causal(), q_len=length, kv_len=length))
    assert found.equal
    assert not found.leaks


def test_a_nan_is_no_small_difference() -> None:
    truth = torch.ones(3)
    assert demo._relative(torch.tensor([1.0, float("nan"), 1.0]), truth) == float("inf")
    assert demo._relative(torch.zeros(3), torch.zeros(3)) == 0.0
    assert demo._relative(truth * 1.5, truth) == 0.5


def test_table_masks_pack_to_their_dense_form_and_are_exact() -> None:
    rows = [demo.measure(*mask, SIZES, 0) for mask in demo.table_masks(make_batch(), SIZES.heads, 0)]
    assert len(rows) == 7
    assert all(row.ok for row in rows)
    for row in rows:
        planes = SIZES.heads if row.mask == "random per head" else 1
        assert row.dense_bytes == planes * SIZES.row_len**2
        assert sum(row.tiles) == planes * 16
        assert set(row.errors) == {"o", "dq", "dk", "dv"}
        assert min(row.forward_ratio, row.both_ratio, row.pack_ms) > 0


def test_measure_refuses_a_mask_that_is_not_the_dense_one() -> None:
    dense = torch.rand(SIZES.row_len, SIZES.row_len) < 0.5
    other = dense.clone()
    other[7, 9] ^= True
    with pytest.raises(AssertionError, match="differs from its dense form"):
        demo.measure("random", other, dense, SIZES, 0)


@pytest.mark.parametrize("letter", ["o", "dq", "dk", "dv"])
def test_measure_notices_a_wrong_output_or_gradient(letter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Tensor] = demo.attention

    def wrong(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, backend: str | None = None) -> Tensor:
        if backend == "reference":
            return right(q, k, v, mask, backend=backend)
        for t, name in ((q, "dq"), (k, "dk"), (v, "dv")):
            if name == letter and t.requires_grad:
                t.register_hook(lambda grad: grad * 1.001)
        return right(q, k, v, mask) * (1.001 if letter == "o" else 1)

    monkeypatch.setattr(demo, "attention", wrong)
    dense = torch.rand(SIZES.row_len, SIZES.row_len) < 0.5
    row = demo.measure("random", from_dense(dense), dense, SIZES, 0)
    assert not row.ok
    assert row.errors[letter] == pytest.approx(1e-3, rel=0.1)


def test_sizes_leave_lengths_off_the_tile() -> None:
    for device in ("cpu", "cuda"):
        sizes = demo.Sizes.choose(torch.device(device))
        assert sizes.row_len % 128
        assert sizes.dtype in demo.TABLE_TOLERANCE
        assert replace(sizes, steps=7) == demo.Sizes.choose(torch.device(device), steps=7)


@pytest.mark.parametrize(("others", "busy"), [(0.0, False), (1.0, False), (2.2, False), (2.6, True), (9.0, True)])
def test_a_machine_is_busy_when_others_take_cores_of_ours(
    others: float, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert demo.is_busy(wall=1.0, others=others) is busy
    # shorter than the ticks that the system counts in
    assert not demo.is_busy(wall=0.001, others=0.04)


@pytest.mark.parametrize("each_s", [0.0, 1000.0])
def test_rows_say_what_other_programs_did(each_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, each_s])
    monkeypatch.setattr(demo, "_others_s", lambda: next(seconds))
    dense = torch.ones(130, 130, dtype=torch.bool)
    row = demo.measure("full", dense, dense, SIZES, 0)
    assert row.busy is (each_s > 0)
    assert (row.others > 0) is row.busy
