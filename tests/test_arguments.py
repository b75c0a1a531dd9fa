"""The matrix of arguments: 2,400 combinations, each of which is right or raises an error that names an argument."""

import pytest
import torch

from anymask import attention
from anymask.check import arguments
from anymask.check.arguments import AXES, check_combination, combination, is_right

COUNT, CHUNK = 2400, 100


@pytest.mark.parametrize("first", range(0, COUNT, CHUNK))
def test_combinations(first: int) -> None:
    for number in range(first, first + CHUNK):
        check_combination(number)


def test_the_matrix_holds_every_choice_and_many_combinations() -> None:
    drawn = [combination(number) for number in range(COUNT)]
    assert len({tuple(chosen.items()) for chosen in drawn}) >= 2000
    for axis, choices in AXES.items():
        assert {chosen[axis] for chosen in drawn} == set(choices), axis
    # many give a result, many have one wrong argument, and each wrong choice is wrong by itself somewhere
    assert sum(map(is_right, drawn)) > 800
    alone = set()
    for chosen in drawn:
        wrong = [(axis, name) for axis, name in chosen.items() if AXES[axis][name][1]]
        if len(wrong) == 1:
            alone.add(wrong[0])
    assert alone == {(axis, name) for axis, choices in AXES.items() for name, (_, names) in choices.items() if names}


def _first(**wanted: str) -> int:
    """The first combination with these choices that would be right but for them."""
    for number in range(10**6):
        chosen = combination(number)
        if all(chosen[axis] == name for axis, name in wanted.items()):
            wrong = [axis for axis, name in chosen.items() if AXES[axis][name][1] and axis not in wanted]
            if not wrong and not (chosen["is_causal"] == "True" and chosen["mask"] != "None"):
                return number
    raise AssertionError(wanted)


def test_a_dropped_mask_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    number = _first(mask="[q, k]", tensors="as they are", backend="None")
    check_combination(number)
    monkeypatch.setattr(arguments, "attention", lambda q, k, v, mask, **options: attention(q, k, v, **options))
    with pytest.raises(AssertionError, match="is wrong by"):
        check_combination(number)


def test_silence_and_nameless_errors_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    number = _first(mask="float", tensors="as they are")

    def silent(q: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        return q

    def nameless(*args: object, **options: object) -> None:
        raise ValueError("something does not fit")

    monkeypatch.setattr(arguments, "attention", silent)
    with pytest.raises(AssertionError, match=r"raises nothing; it should, and name one of \['mask'"):
        check_combination(number)
    monkeypatch.setattr(arguments, "attention", nameless)
    with pytest.raises(AssertionError, match="it raises: something does not fit"):
        check_combination(number)


def test_wrong_gradients_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    number = _first(mode="of q", tensors="as they are", backend="None", dtype="fp32")
    check_combination(number)

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            return grad / 2

    def halved(q: torch.Tensor, *rest: object, **options: object) -> object:
        return attention(Halved.apply(q), *rest, **options)

    monkeypatch.setattr(arguments, "attention", halved)
    with pytest.raises(AssertionError, match="dq is wrong by"):
        check_combination(number)
