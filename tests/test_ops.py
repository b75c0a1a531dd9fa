"""The operators as torch sees them: opcheck, gradcheck, transforms of torch.func, counters of work."""

from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import BlockMask, attention, causal, document, from_dense, mask_ops, ops, pack, sliding_window
from anymask.mask.program import program_of
from anymask.testing import MASKS, Case, make_inputs, make_qkv

# torch.compile imports parts of torch that warn on their own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
BACKENDS = ["cpu", "reference"]
GRADCHECK_MASKS = ["none", "random", "per_batch_head", "empty_rows", "empty_columns", "one_pair", "all_empty"]


def _random(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.5


def _tensors(mask: Any, q_len: int, kv_len: int) -> list[Tensor]:
    return [] if mask is None else pack(mask, q_len=q_len, kv_len=kv_len).tensors()


MASK_KINDS = {
    "none": None,
    "random": _random(5, 7),
    "per head": _random(1, 2, 5, 7),
    "per batch": _random(2, 1, 5, 7),
    "empty": torch.zeros(5, 7, dtype=torch.bool),
    "causal": causal(),
}


class TestOpcheck:
    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [(kind, torch.float32) for kind in MASK_KINDS] + [("per head", torch.float64), ("per head", torch.bfloat16)],
    )
    def test_forward(self, kind: str, dtype: torch.dtype) -> None:
        qkv = make_qkv(2, 2, 1, 5, 7, 4, 6, dtype=dtype, requires_grad=dtype != torch.bfloat16)
        torch.library.opcheck(ops.forward_op, (*qkv, _tensors(MASK_KINDS[kind], 5, 7), 0.5, "cpu", False))

    @pytest.mark.parametrize("mask", [causal(), _random(2, 1, 140, 140)])
    def test_few_tensors_of_a_mask(self, mask: Any) -> None:
        q, k, v = make_qkv(2, 2, 1, 140, 140, 4, 6, requires_grad=True)
        packed = pack(mask, q_len=140, kv_len=140)
        assert len(packed.first_tensors()) < len(packed.tensors())
        torch.library.opcheck(ops.forward_op, (q, k, v, packed.first_tensors(), 0.5, None, False))
        o, _ = ops.forward_op(q, k, v, packed.first_tensors(), 0.5, None, False)
        assert torch.equal(o, attention(q, k, v, packed, scale=0.5))

    @pytest.mark.parametrize("layout", ["blhd", "transposed", "expanded"])
    def test_forward_of_strided_inputs(self, layout: str) -> None:
        qkv = make_qkv(2, 2, 2, 5, 7, 4, layout=layout, requires_grad=True)
        torch.library.opcheck(ops.forward_op, (*qkv, _tensors(MASK_KINDS["random"], 5, 7), 0.5, None, False))

    @pytest.mark.parametrize("with_dlse", [False, True])
    @pytest.mark.parametrize("kind", ["none", "per head"])
    def test_backward(self, kind: str, with_dlse: bool) -> None:
        q, k, v = make_qkv(2, 2, 1, 5, 7, 4, 6)
        mask = _tensors(MASK_KINDS[kind], 5, 7)
        o, lse = ops.forward_op(q, k, v, mask, 0.5, None, False)
        dlse = torch.randn_like(lse) if with_dlse else None
        torch.library.opcheck(ops.backward_op, (q, k, v, o, lse, torch.randn_like(o), dlse, mask, 0.5, None, False))

    def test_scale_as_a_tensor(self) -> None:
        q, k, v = make_qkv(2, 2, 1, 5, 7, 4, 6, requires_grad=True)
        rest = 1.0, None, False, torch.tensor(0.3, dtype=torch.float64)
        torch.library.opcheck(ops.forward_op, (q, k, v, [], *rest))
        o, lse = ops.forward_op(q, k, v, [], *rest)
        assert torch.equal(o, attention(q, k, v, scale=0.3))
        q, k, v, o, lse = (t.detach() for t in (q, k, v, o, lse))
        torch.library.opcheck(ops.backward_op, (q, k, v, o, lse, o, None, [], *rest))

    @pytest.mark.parametrize("kind", ["random", "per head", "empty", "causal"])
    def test_pack(self, kind: str) -> None:
        mask = MASK_KINDS[kind]
        lazy = from_dense(mask) if isinstance(mask, Tensor) else mask
        program = program_of(lazy & sliding_window(3, 3))
        assert program is not None
        torch.library.opcheck(mask_ops.pack_op, (*program, 5, 7, torch.device("cpu")))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GRADCHECK_MASKS)
def test_gradcheck(name: str, backend: str) -> None:
    i = make_inputs(Case(name, 3, 4, 2, torch.float64, 3, 2 if name == "per_batch_head" else 1, q_heads=2, kv_heads=1))
    lives = i.dense.any(-1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = attention(q, k, v, i.mask, scale=0.7, return_lse=True, backend=backend)
        # minus infinity has no finite difference
        return o, lse.masked_fill(~lives, 0.0)

    assert torch.autograd.gradcheck(call, (i.q, i.k, i.v))


def test_second_derivatives_raise() -> None:
    q, k, v = make_qkv(1, 1, 1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    o = attention(q, k, v, causal(), backend="cpu")
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice; allowed is one derivative, or backend='ref"):
        torch.autograd.grad(dq.sum(), q)


class TestFlops:
    def test_are_those_of_attended_pairs(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        q, k, v = make_qkv(2, 4, 2, 150, 140, 16, 8, requires_grad=True)
        mask = torch.rand(2, 1, 150, 140) < 0.3
        for m, pairs in ((None, 2 * 4 * 150 * 140), (mask, 4 * int(mask.sum())), (pack(mask), 4 * int(mask.sum()))):
            with FlopCounterMode(display=False) as counter:
                o = attention(q, k, v, m)
            assert counter.get_total_flops() == 2 * pairs * (16 + 8)
            with FlopCounterMode(display=False) as counter:
                o.sum().backward()
            assert counter.get_total_flops() == 2 * pairs * (3 * 16 + 2 * 8)

    def test_of_shapes_alone(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        q = torch.empty(1, 2, 30, 16, device="meta")
        with FlopCounterMode(display=False) as counter:
            attention(q, q, q, causal())
        assert counter.get_total_flops() == 2 * 2 * 30 * 30 * 32


def test_unrecorded_calls_agree_with_recorded_ones() -> None:
    q, k, v = make_qkv(1, 2, 2, 50, 60, 16, requires_grad=True)
    mask = torch.rand(50, 60) < 0.5
    expected = attention(q, k, v, mask, return_lse=True)
    with torch.no_grad():
        unrecorded = attention(q, k, v, mask, return_lse=True)
    for a, b, c in zip(
        expected, unrecorded, attention(*(t.detach() for t in (q, k, v)), mask, return_lse=True), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert a.requires_grad
        assert not b.requires_grad


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_graph_reads_its_mask(mode: str) -> None:
    """Nothing is remembered there: the values of the tensor that was traced are not those of later calls."""
    from torch.fx.experimental.proxy_tensor import make_fx

    q, mask = torch.randn(1, 2, 140, 8), _random(140, 140)
    attention(q, q, q, mask)
    graph = make_fx(lambda q, m: attention(q, q, q, m), tracing_mode=mode)(q, mask)
    assert torch.equal(graph(q, ~mask), attention(q, q, q, ~mask))


def test_the_mask_reaches_backward_by_itself() -> None:
    q, k, v = make_qkv(1, 1, 1, 140, 140, 8, requires_grad=True)
    mask = pack(MASKS["random"](1, 1, 140, 140)[0])
    o = attention(q, k, v, mask)
    expected = torch.autograd.grad(attention(q, k, v, mask).sum(), [q, k, v])
    # the caller's mask and the cache are gone by the time of backward
    tensors = mask.tensors()
    del mask
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(o.sum(), [q, k, v]), expected, strict=True))
    o = attention(q, k, v, BlockMask.from_tensors(tensors, 140, 140))
    tensors[1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize(("q_len", "kv_len", "batch"), [(0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 5, 0)])
def test_fakes_agree_on_nothing(q_len: int, kv_len: int, batch: int) -> None:
    q, k, v = make_qkv(batch, 2, 1, q_len, kv_len, 4, 6, requires_grad=True)
    torch.library.opcheck(ops.forward_op, (q, k, v, [], 0.5, None, False))


def test_packing_inside_a_compiled_function_shares_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def sharing(*args: Any, **kwargs: Any) -> BlockMask:
        """As on a GPU: what says that all positions have a pair is one tensor."""
        packed = pack(*args, **kwargs)
        lists, words, has_pair, other = packed.tensors()
        assert has_pair.numel() == other.numel() == 0
        return BlockMask(packed.q_len, packed.kv_len, lists, words, has_pair, has_pair)

    monkeypatch.setattr(mask_ops, "pack", sharing)
    program = program_of(causal() & document(torch.arange(300) // 90))
    assert program is not None
    torch.library.opcheck(mask_ops.pack_op, (*program, 300, 300, torch.device("cpu")))
