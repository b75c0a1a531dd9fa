"""Random compositions of masks over random shapes, against the oracle: 500 examples, of which most are composed."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from anymask import Mask, pack
from anymask.mask.program import mask_from_program, program_of
from anymask.testing import BUILDERS, MASKS, Case, assert_same_block_mask, check, make_mask
from anymask.testing.expressions import names_of
from anymask.testing.properties import check_packing
from anymask.testing.strategies import cases, expressions

WITHOUT = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
# fp64 leaves no room for a wrong pair
EXACT = cases(dtypes=(torch.float64,), longest=260)
SIXTEEN = cases(dtypes=(torch.float16, torch.bfloat16), longest=200)


@given(cases(longest=300))
@settings(max_examples=180, **WITHOUT)
def test_packing_keeps_every_pair(case: Case) -> None:
    check_packing(case, "cpu")
    mask, _ = make_mask(case.mask, case.batch, case.q_heads, case.q_len, case.kv_len, case.seed)
    if not isinstance(mask, Mask) or "from_function" in case.mask:
        return
    # what an operator of a compiled graph is told of a mask
    program = program_of(mask)
    assert program is not None
    again = mask_from_program(*program)
    lens = {"q_len": case.q_len, "kv_len": case.kv_len}
    packed = pack(mask, **lens)
    assert_same_block_mask(pack(again, **lens), packed)
    assert packed.density() == pytest.approx(packed.to_dense().double().mean().item(), abs=1e-12)


@given(EXACT)
@settings(max_examples=120, **WITHOUT)
def test_composed_masks(case: Case) -> None:
    check(case, "cpu")


@given(SIXTEEN)
@settings(max_examples=120, **WITHOUT)
def test_sixteen_bits(case: Case) -> None:
    check(case, "cpu")


@given(cases(masks=expressions([*BUILDERS], max_parts=1), longest=200))
@settings(max_examples=80, **WITHOUT)
def test_every_builder(case: Case) -> None:
    check(case, "reference")


def test_names_of_an_expression() -> None:
    assert names_of("~(causal & drawn_tree) | row") == ["row", "causal", "drawn_tree"]
    assert not set(MASKS) & set(BUILDERS)
