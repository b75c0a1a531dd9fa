"""Plans of calls with scores, and what they write down of torch."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

pytest.importorskip("triton")

from anymask import BlockMask, alibi, attention, calls, causal, pack, plan
from anymask.backends import hopper
from anymask.backends import triton as triton_backend
from anymask.scores import Lookup, Needs, ScoreGrads, Scores
from tests.helpers.driver import Driver, launches
from tests.test_plan import _named, _shifted

HEADS, DIM = 4, 64
BACKENDS = {"hopper": hopper, "triton": triton_backend}
CPU = torch.device("cpu")


@pytest.fixture
def driver() -> Iterator[Driver]:
    with launches() as found:
        yield found


def _bias(kind: str, batch: int, q_len: int, kv_len: int) -> Tensor:
    shapes = {
        "keys": (batch, HEADS, 1, kv_len), "keys of samples": (batch, 1, 1, kv_len),
        "keys of heads": (HEADS, 1, kv_len), "queries": (batch, HEADS, q_len, 1), "number": (1, 1, 1, 1),
    }  # fmt: skip
    t = torch.zeros(shapes[kind])
    return t[None] if t.dim() == 3 else t


BIAS_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "odd address": lambda t: _shifted(t, 1),
    "wide": lambda t: torch.zeros(*t.shape[:3], t.shape[3] + 3)[..., : t.shape[3]],
    "fp16": lambda t: t.half(),
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


@dataclass(frozen=True)
class Call:
    backend: str = "hopper"
    lengths: tuple[int, int] = (300, 300)
    batch: int = 2
    mask: bool = True
    biases: tuple[str, ...] = ("keys",)
    layout: str = "plain"
    # heads of a table by distance, 0 for none
    table: int = 0
    softcap: float = 0.0
    sinks: bool = False
    dropout_p: float = 0.0
    scale: float = 0.125
    needed: tuple[bool, bool] = (False, False)
    dlse: bool = False
    deterministic: bool = False

    def scores(self) -> Scores:
        q_len, kv_len = self.lengths
        dense = [BIAS_LAYOUTS[self.layout](_bias(kind, self.batch, q_len, kv_len)) for kind in self.biases]
        codes = torch.arange(q_len, dtype=torch.int32) + kv_len - 1, torch.arange(kv_len, dtype=torch.int32)
        tables = [Lookup(torch.zeros(self.table, q_len + kv_len - 1), *codes, True)] if self.table else []
        seed = torch.zeros(2, dtype=torch.int64) if self.dropout_p else None
        sinks = torch.zeros(HEADS) if self.sinks else None
        return Scores(tuple(dense), tuple(tables), self.softcap, sinks, self.dropout_p, seed)


def _neighbours(call: Call) -> Iterator[Call]:
    """Calls that differ from `call` in one thing, of each that a launch depends on."""
    others: dict[str, list[Any]] = {
        "backend": list(BACKENDS),
        "lengths": [(300, 300), (300, 256), (256, 300)],
        "batch": [2, 1],
        "mask": [True, False],
        "biases": [(), *((kind,) for kind in ("keys", "keys of samples", "keys of heads", "queries", "number")),
                   ("keys", "queries")],
        "layout": list(BIAS_LAYOUTS),
        "table": [0, 1, HEADS],
        "softcap": [0.0, 20.0, 30.0],
        "sinks": [False, True],
        "dropout_p": [0.0, 0.1, 0.25],
        "scale": [0.125, 0.25],
        "needed": [(False, False), (True, False), (False, True), (True, True)],
        "dlse": [False, True],
        "deterministic": [False, True],
    }  # fmt: skip
    for name, values in others.items():
        for value in values:
            yield replace(call, **{name: value})


def _addresses(scores: Scores) -> dict[int, str]:
    return {t.data_ptr(): f"scores {i}" for i, t in enumerate(calls._tensors_of(scores))}


def _shapes(outputs: Any) -> list[Any]:
    flat = (
        [*outputs[:3], *outputs.dense, *outputs.tables, outputs.sinks] if isinstance(outputs, ScoreGrads) else outputs
    )
    return [None if t is None else (t.shape, t.stride(), t.dtype) for t in flat]


def _check(call: Call, driver: Driver, mask: BlockMask) -> None:
    """The launches of a planned call, by Triton at first and then through the driver, are those of the backend."""
    (q_len, kv_len), scores, backend = call.lengths, call.scores(), BACKENDS[call.backend]
    q, o, do = (torch.zeros(call.batch, HEADS, q_len, DIM, dtype=torch.float16) for _ in range(3))
    k, v = (torch.zeros(call.batch, HEADS, kv_len, DIM, dtype=torch.float16) for _ in range(2))
    lse = torch.zeros(call.batch, HEADS, q_len)
    dlse, block_mask = torch.zeros_like(lse) if call.dlse else None, mask if call.mask else None
    parts = () if block_mask is None else block_mask.parts
    given = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "do": do} | ({} if dlse is None else {"dlse": dlse})
    known = {t.data_ptr(): name for name, t in given.items()} | {t.data_ptr(): f"part {i}" for i, t in enumerate(parts)}
    known |= _addresses(scores)
    needs = Needs((call.needed[0],) * len(scores.dense), (False,) * len(scores.lookups), call.needed[1] and call.sinks)
    inputs, rest = calls.Inputs(q, k, v, o, lse, do), (block_mask, call.scale)
    ways = [
        (
            lambda: backend.forward(q, k, v, *rest, scores),
            lambda: calls.forward_scores(q, k, v, *rest, call.backend, scores),
        ),
        (
            lambda: backend.backward_scores(*inputs, dlse, *rest, call.deterministic, scores, needs),
            lambda: calls.backward_scores(inputs, dlse, *rest, call.backend, call.deterministic, scores, needs),
        ),
    ]
    in_turns = backend is hopper and call.deterministic and hopper.takes_turns(q, k, v, block_mask)
    for (plain, planned), has_plan in zip(ways, (True, not in_turns), strict=True):
        found = []
        for run in (plain, planned, planned, planned):
            driver.forget()
            outputs = run()
            launched = _named(driver.by_triton + driver.direct, known)
            found.append((launched, _shapes(outputs)))
        assert launched
        assert len(driver.direct) == len(launched) * has_plan, call
        assert all(one == found[0] for one in found), call


BASES = [Call(), Call(biases=("queries",), sinks=True, softcap=20.0), Call("triton", table=1, dropout_p=0.1)]


@pytest.mark.parametrize("base", BASES, ids=lambda c: f"{c.backend} {c.biases}")
def test_plans_launch_what_backends_do(base: Call, driver: Driver) -> None:
    """Nothing is forgotten between calls, each of which is like others but for one thing."""
    near = [base, *_neighbours(base), base]
    random.Random(0).shuffle(near)
    masks = {n: pack(causal(), q_len=n[0], kv_len=n[1]) for n in {call.lengths for call in near}}
    for call in near:
        _check(call, driver, masks[call.lengths])


def test_gradients_that_read_the_lists_have_no_plan(driver: Driver) -> None:
    """A bias of pairs, and a table, whose sums ask how many tiles there are; not without a mask."""
    q = torch.zeros(1, HEADS, 300, DIM, dtype=torch.float16, requires_grad=True)
    mask = pack(causal(), q_len=300, kv_len=300)
    pairs, slopes = torch.zeros(HEADS, 300, 300, requires_grad=True), torch.ones(HEADS, requires_grad=True)
    for bias in (pairs, alibi(slopes)):
        for block_mask, has_plan in ((mask, False), (None, True)):
            calls.forget()
            for _ in range(3):
                driver.forget()
                attention(q, q, q, block_mask, bias=bias, backend="triton").sum().backward()
            assert bool(driver.by_triton) is not has_plan


def test_plans_are_those_of_the_usual_calls(driver: Driver) -> None:
    """By the public call, with gradients: from the third on all launches are the driver's."""
    q = torch.zeros(1, HEADS, 300, DIM, dtype=torch.float16, requires_grad=True)
    mask = pack(causal(), q_len=300, kv_len=300)
    asked: list[dict[str, Any]] = [
        {"bias": torch.zeros(HEADS, 1, 300, requires_grad=True)},
        {"bias": alibi(torch.ones(HEADS))},
        {"softcap": 20.0},
        {"sinks": torch.zeros(HEADS, requires_grad=True)},
        {"dropout_p": 0.1},
    ]
    for keywords in asked:
        for _ in range(3):
            driver.forget()
            attention(q, q, q, mask, backend="hopper", **keywords).sum().backward()
        assert driver.direct
        assert not driver.by_triton


@pytest.mark.parametrize("kind", ["pairs", "alibi"])
def test_gradients_without_a_mask_have_plans(kind: str, driver: Driver) -> None:
    """Those that ask a mask for its tiles, and what is allocated for them."""
    q = torch.zeros(1, HEADS, 304, DIM, dtype=torch.float16, requires_grad=True)
    pairs, slopes = torch.zeros(HEADS, 304, 304, dtype=torch.float16), torch.ones(HEADS)
    leaf = (pairs if kind == "pairs" else slopes).requires_grad_()
    for _ in range(3):
        driver.forget()
        bias = pairs if kind == "pairs" else alibi(slopes)
        o = attention(q, q, q, bias=bias, backend="hopper")
        # a sum has a gradient with strides of 0
        grads = torch.autograd.grad(o, [q, leaf], torch.zeros_like(o))
        assert [g.shape for g in grads] == [q.shape, leaf.shape]
    assert driver.direct
    assert not driver.by_triton


def test_tensors_of_one_call_are_refused() -> None:
    """Other calls of the plan would read or write them."""
    own, made = torch.zeros(3), plan.Plan(CPU)
    x = made.operand((3,), (1,), torch.float32, 0)
    for args in ((x, own), (x, (own,)), (x, SimpleNamespace(base=own))):
        with pytest.raises(plan.Unplanned, match="no operand"):
            plan.launch(None, (1, 1, 1), args, {}, ())
    with pytest.raises(plan.Unplanned, match="no operand"):
        made.finish((x, own))


PASSES: dict[str, Callable[[Any], Any]] = {
    "a view": lambda t: t[None],
    "a view of a view": lambda t: t.mT[None].squeeze(0),
    "a view that begins elsewhere": lambda t: t[1:, 2:],
    "what is there already": lambda t: t.float().contiguous(),
    "a product of a view": lambda t: t.T[1:] * 2.0,
    "a sum": lambda t: t + t[:, :1].expand(3, 5),
    "functions": lambda t: torch.exp(pad(t, (1, 2)).masked_fill(torch.zeros_like(pad(t, (1, 2))) == 0, -1.0)),
    "of several": lambda t: torch.cat([t, t[:1]]).sum((0,), keepdim=True),
    "a write": lambda t: t.new_zeros(2, 5).copy_(t[1:]),
    "a write to a view": lambda t: _written(t),
    "other operators": lambda t: (-t - 1.0) / 2.0 + (1.0 - t) * ~((t == 0.0) | (t > 1.0)),
    "numbers": lambda t: t.new_full((t.numel(), t.dim()), float(t.shape[0] + t.element_size())),
}


def _written(t: Any) -> Any:
    found = torch.empty_like(t)
    found[:] = 1.0
    found[1:] += t[1:]
    found[0].zero_()
    return found


@pytest.mark.parametrize("name", PASSES)
def test_functions_of_torch_are_written_down(name: str) -> None:
    """And run on the tensors of each call, also by kernels that do as if nothing were recorded."""
    function = PASSES[name]
    made = plan.Plan(CPU)
    made.finish((function(made.operand((3, 5), (5, 1), torch.float32, 0)),))
    for _ in range(3):
        t = torch.randn(3, 5)
        (found,) = made(t)
        assert torch.equal(found, function(t))
        assert found.stride() == function(t).stride()
    below = plan.Plan(CPU)
    with torch._C._AutoDispatchBelowAutograd(), torch.inference_mode():
        below.finish((function(below.operand((3, 5), (5, 1), torch.float32, 0)),))
    assert len(below._steps) == len(made._steps)


def test_what_torch_made_goes_after_its_last_step() -> None:
    made = plan.Plan(CPU)
    t = made.operand((3, 5), (5, 1), torch.float32, 0)
    own, total = t.new_empty(3, 5), t * 2.0
    part = (total[1:] + 1.0)[None]
    made.finish((own.copy_(total), torch.cat([part, part])))
    before, held = torch.ones(3, 5), []
    made._steps.append(held.extend)
    found = made(before)
    assert [float(x.max()) for x in found] == [2.0, 3.0]
    # the tensor of the call, `own`, and in the places of `total` and `part` nothing, but for views that were made
    assert [x is None for x in held[:3]] == [False, False, True]
    assert sum(x is None for x in held) == 3
    assert held[0] is before


def test_views_take_no_step() -> None:
    made = plan.Plan(CPU)
    t = made.operand((3, 5), (5, 1), torch.float32, 8)
    assert t.float().contiguous()[None].mT.expand(2, 5, 3).data_ptr() == 8
    assert made._steps == []
    part = t[:, 3:]
    assert (part.data_ptr(), part.shape, part.stride()) == (4, (3, 2), (5, 1))
    assert len(made._steps) == 1


@pytest.mark.parametrize(
    "ask",
    [
        bool,
        float,
        lambda t: t.item(),
        lambda t: t.tolist(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: 1 if (t > 0).any() else 2,
        lambda t: t + torch.zeros(5),
        lambda t: t.unbind(),
        lambda t: torch.add(t, t, out=t),
    ],
)
def test_what_is_not_known_has_no_plan(ask: Callable[[Any], Any]) -> None:
    t = plan.Plan(CPU).operand((3, 5), (5, 1), torch.float32, 0)
    with pytest.raises(plan.Unplanned):
        ask(t)
    assert not hasattr(t, "no_attribute_of_tensors")


def test_a_step_that_makes_another_tensor_is_seen() -> None:
    made = plan.Plan(CPU)
    t = made.operand((3, 5), (5, 1), torch.float32, 0)
    made.finish((t * 2.0,))
    with pytest.raises(AssertionError):
        made(torch.zeros(3, 5, dtype=torch.float64))


def test_scores_have_the_form_of_their_call() -> None:
    scores = Call(biases=("keys", "queries"), table=1, softcap=20.0, sinks=True, dropout_p=0.1).scores()
    tensors = iter(calls._tensors_of(scores))
    again = calls.Form.of(scores).scores(tensors)
    assert next(tensors, None) is None
    assert all(a is b for a, b in zip(calls._tensors_of(again), calls._tensors_of(scores), strict=True))
    assert (again.softcap, again.dropout_p) == (scores.softcap, scores.dropout_p)
    assert math.isclose(again.dropout_p, 0.1)
