"""Every helper that asserts must fail when it should."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anymask import causal, pack
from anymask.testing import (
    LAYOUTS,
    MASKS,
    Case,
    Results,
    assert_matches,
    assert_same_block_mask,
    assert_unused_is_zero,
    check,
    eager,
    magnitudes,
    make_inputs,
    make_qkv,
    reference,
    run,
)

CASE = Case("empty_rows", 70, 50, 32, torch.bfloat16)


def _results(case: Case = CASE) -> tuple[Results, Results, Results]:
    i = make_inputs(case)
    args = i.q, i.k, i.v, i.dense, case.scale, i.do, i.dlse
    return run(i), reference(*args), eager(*args)


def _match(what: str, actual: Tensor, results: tuple[Results, Results, Results], dtype: torch.dtype) -> float:
    return assert_matches(actual, getattr(results[1], what), getattr(results[2], what), dtype, what)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("what", Results._fields)
class TestAssertMatches:
    def test_passes_and_returns_the_ratio(self, what: str, dtype: torch.dtype) -> None:
        results = _results(replace(CASE, dtype=dtype))
        assert 0 <= _match(what, getattr(results[0], what), results, dtype) <= 2

    def test_fails_on_one_wrong_element(self, what: str, dtype: torch.dtype) -> None:
        results = _results(replace(CASE, dtype=dtype))
        actual = getattr(results[0], what).clone()
        # the smallest error that matters: a few units in the last place of the largest element
        largest = actual[actual.isfinite()].abs().max()
        at = (actual.abs() == largest).nonzero()[0].tolist()
        actual[tuple(at)] *= 1 + max(0.005, 16 * torch.finfo(dtype).eps)
        with pytest.raises(AssertionError, match=f"{what}: "):
            _match(what, actual, results, dtype)

    def test_fails_on_a_small_error_everywhere(self, what: str, dtype: torch.dtype) -> None:
        results = _results(replace(CASE, dtype=dtype))
        actual = getattr(results[0], what)
        with pytest.raises(AssertionError, match=f"{what}: "):
            _match(what, (actual.double() * 1.01).to(actual.dtype), results, dtype)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_fails_on_a_non_finite_element(self, what: str, dtype: torch.dtype, value: float) -> None:
        results = _results(replace(CASE, dtype=dtype))
        actual = getattr(results[0], what).clone()
        actual.view(-1)[3] = value
        with pytest.raises(AssertionError, match=r"not finite|wrong places"):
            _match(what, actual, results, dtype)

    def test_fails_on_a_wrong_shape_or_dtype(self, what: str, dtype: torch.dtype) -> None:
        results = _results(replace(CASE, dtype=dtype))
        actual = getattr(results[0], what)
        with pytest.raises(AssertionError, match="shape"):
            _match(what, actual[:, :, 1:], results, dtype)
        with pytest.raises(AssertionError, match="shape"):
            _match(what, actual[:1], results, dtype)
        with pytest.raises(AssertionError, match="dtype"):
            _match(what, actual.to(torch.complex64), results, dtype)


def test_rmse_catches_what_the_maximum_hides() -> None:
    # every element off by the largest error of eager passes the maximum rule; the mean square does not
    results = _results(replace(CASE, q_len=300, kv_len=300))
    _, expected, yardstick = results
    largest = (yardstick.dq.double() - expected.dq).abs().max()
    with pytest.raises(AssertionError, match="dq: rmse"):
        _match("dq", (expected.dq + largest).to(torch.bfloat16), results, torch.bfloat16)


def test_an_rmse_of_few_rows_says_nothing_and_their_maximum_does() -> None:
    expected = torch.linspace(1.0, 2.0, 16, dtype=torch.float64).view(8, 2)
    eager, worse = ((expected + e).bfloat16() for e in (0.0, 0.02))
    assert_matches(worse, expected, eager, torch.bfloat16, "dk", rows=8)
    with pytest.raises(AssertionError, match="rmse"):
        assert_matches(worse, expected, eager, torch.bfloat16, "dk", rows=900)
    with pytest.raises(AssertionError, match="max"):
        assert_matches((expected + 0.2).bfloat16(), expected, eager, torch.bfloat16, "dk", rows=8)


def test_few_large_elements_are_few_rows() -> None:
    # between two floats, and rounded to the farther of both
    large = 7.0 + 0.4 * 2**-8
    for others, message in ((0.01, None), (large, "rmse")):
        expected = torch.full((400, 1), others, dtype=torch.float64)
        expected[0] = large
        eager, worse = expected.half(), (expected + (expected == large) * 2**-9).half()
        if message is None:
            assert_matches(worse, expected, eager, torch.float16, "dk")
        else:
            with pytest.raises(AssertionError, match=message):
                assert_matches(worse, expected, eager, torch.float16, "dk")


def test_lse_must_be_minus_infinity_exactly_where_expected() -> None:
    results = _results()
    for value in (-1e30, 0.0):
        with pytest.raises(AssertionError, match="wrong places"):
            _match("lse", results[0].lse.nan_to_num(neginf=value), results, torch.bfloat16)


def test_eager_is_required_and_names_are_checked() -> None:
    o = torch.ones(1, 1, 2, 2)
    with pytest.raises(AssertionError, match="eager is None"):
        assert_matches(o, o, None, torch.float32, "o")
    with pytest.raises(ValueError, match="what is 'out'"):
        assert_matches(o, o, o, torch.float32, "out")


def test_check_fails_on_another_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    check(CASE)
    i, j = 10, 20

    def one_pair_off(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        _, dense = MASKS["random"](*args, **kwargs)
        changed = dense.clone()
        changed[i, j] ^= True
        return changed, dense

    monkeypatch.setitem(MASKS, "one_pair_off", one_pair_off)
    with pytest.raises(AssertionError):
        check(replace(CASE, mask="one_pair_off"))


@pytest.mark.parametrize("what", Results._fields)
def test_unused_must_be_exactly_zero(what: str) -> None:
    case = Case("one_pair", 5, 5, 16)
    results = run(make_inputs(case))
    dense = make_inputs(case).dense
    assert_unused_is_zero(results, dense)
    tensor = getattr(results, what).clone()
    tensor[0, 0, -1] += 1e-30 if what != "lse" else 100.0
    tensor[0, 0, -1].nan_to_num_(neginf=0.0)
    with pytest.raises(AssertionError, match=what):
        assert_unused_is_zero(results._replace(**{what: tensor}), dense)


def test_same_block_mask_reads_every_field() -> None:
    mask, _ = MASKS["empty_rows"](2, 2, 300, 200)
    a = pack(mask)
    assert_same_block_mask(a, pack(mask))
    for view in ("rows", "cols"):
        lists = getattr(a, view)
        for name, t in vars(lists).items():
            for changed in (t + 1, t.to(torch.int64), torch.cat([t, t])):
                if not t.numel() and changed is not t and changed.dtype == t.dtype:
                    changed = torch.ones(1, dtype=t.dtype)
                other = copy.copy(a)
                vars(other)[f"_{view}"] = replace(lists, **{name: changed})
                with pytest.raises(AssertionError, match=rf"{view}\.{name}"):
                    assert_same_block_mask(a, other)
    with pytest.raises(AssertionError, match="lengths"):
        assert_same_block_mask(a, replace(a, q_len=301))
    flipped = a.tensors()
    flipped[1] = flipped[1].clone()
    flipped[1][0, -1, -1, -1] ^= 1 << 30
    with pytest.raises(AssertionError, match=r"rows\.words"):
        assert_same_block_mask(a, type(a).from_tensors(flipped, 300, 200))


def test_masks_are_many_distinct_and_repeatable() -> None:
    assert len(MASKS) >= 30
    seen = set()
    for name, make in MASKS.items():
        _, dense = make(2, 2, 150, 140, 3)
        _, again = make(2, 2, 150, 140, 3)
        assert torch.equal(dense, again), name
        assert dense.dtype == torch.bool
        wide = dense.expand(2, 2, 150, 140)
        seen.add(wide.contiguous().numpy().tobytes())
    # the same meaning in two forms: causal and causal_dense, none and all_full
    assert len(seen) == len(MASKS) - 2


def test_reference_is_softmax_attention_by_hand() -> None:
    q, k, v = (
        torch.tensor([[[[2.0]]]]),
        torch.tensor([[[[0.0], [1.0], [9.0]]]]),
        torch.tensor([[[[1.0], [3.0], [7.0]]]]),
    )
    mask = torch.tensor([[True, True, False]])
    r = reference(q, k, v, mask, 0.5, torch.ones(1, 1, 1, 1))
    p = math.e / (1 + math.e)
    assert r.o.item() == pytest.approx(1 + 2 * p)
    assert r.lse.item() == pytest.approx(math.log(1 + math.e))
    assert r.dv.flatten().tolist() == pytest.approx([1 - p, p, 0])
    # do/ds of the second key is p (1 - p) (3 - 1); ds/dk = scale * q
    assert r.dk.flatten().tolist() == pytest.approx([-2 * p * (1 - p), 2 * p * (1 - p), 0])
    assert r.dq.item() == pytest.approx(0.5 * 2 * p * (1 - p))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_values(layout: str) -> None:
    sizes = 2, 4, 2, 7, 7, 16, 8
    plain, other = make_qkv(*sizes), make_qkv(*sizes, layout=layout)
    assert layout == "contiguous" or not other[2].is_contiguous()
    for a, b in zip(plain, other, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b) or layout == "expanded"


def test_the_poison_poisons() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
    assert torch.ones(3).new_empty(2, dtype=torch.float16).isnan().all()
    assert (torch.empty(2, dtype=torch.int32) == 0x6B6B6B6B).all()
    assert repr(pack(causal(), q_len=2, kv_len=2)).startswith("BlockMask")


def test_the_rounding_of_lse_is_counted_where_it_cannot_be_escaped() -> None:
    # queries of one key: p is 1 for eager torch, and exp(s - lse) of a rounded lse for who keeps only that
    case = Case("diagonal", 64, 239, 32, torch.float32, scale=-0.7, layout="expanded", seed=1238581275)
    inputs = make_inputs(case)
    args = *inputs[:3], inputs.dense, case.scale, inputs.do, inputs.dlse
    results, expected, near = run(inputs, case.scale, "cpu"), reference(*args), eager(*args)
    plain, counted = magnitudes(*args), magnitudes(*args, stored_lse=True)
    assert torch.equal(plain.o, counted.o)
    assert_matches(results.dv, expected.dv, near.dv, case.dtype, "dv", magnitude=counted.dv)
    with pytest.raises(AssertionError, match="dv: max"):
        assert_matches(results.dv, expected.dv, near.dv, case.dtype, "dv", magnitude=plain.dv)
    # and no more than that
    with pytest.raises(AssertionError, match="dv: max"):
        assert_matches(results.dv * (1 + 1e-5), expected.dv, near.dv, case.dtype, "dv", magnitude=counted.dv)
