"""The operators as torch sees them: opcheck, gradcheck, compile, checkpoint."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import anymask
from anymask import BlockMask, attention, causal, document, from_dense, ops, pack, sliding_window
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

    @pytest.mark.parametrize("kind", ["random", "per head", "empty", "causal"])
    def test_pack(self, kind: str) -> None:
        mask = MASK_KINDS[kind]
        lazy = from_dense(mask) if isinstance(mask, Tensor) else mask
        program = program_of(lazy & sliding_window(3, 3))
        assert program is not None
        torch.library.opcheck(ops.pack_op, (*program, 5, 7, torch.device("cpu")))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["none", "random", "per_batch_head", "empty_rows", "empty_columns", "one_pair", "all_empty"]
)
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


class TestTransforms:
    """torch.func: reverse mode and vmap are those of a loop; what has no rule raises, and is never 0."""

    MASKS = {  # noqa: RUF012
        "none": lambda: None,
        "causal": causal,
        "tensor": lambda: _random(20, 20),
        "per sample": lambda: _random(2, 1, 20, 20),
        "with tensors": lambda: causal() & from_dense(_random(20, 20)),
        "packed": lambda: pack(_random(2, 4, 20, 20)),
    }

    @staticmethod
    def _loss(mask: Any) -> Any:
        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o, lse = attention(q, k, v, mask, return_lse=True)
            return o.sin().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()

        return loss

    @pytest.mark.parametrize("mask", MASKS)
    def test_grad(self, mask: str) -> None:
        qkv = make_qkv(2, 4, 2, 20, 20, 8, 6, requires_grad=True)
        loss = self._loss(self.MASKS[mask]())
        expected = torch.autograd.grad(loss(*qkv), qkv)
        for a, b in zip(torch.func.grad(loss, (0, 1, 2))(*(t.detach() for t in qkv)), expected, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("shared", [False, True], ids=["all mapped", "k shared"])
    @pytest.mark.parametrize("mask", MASKS)
    def test_vmap(self, mask: str, shared: bool) -> None:
        samples = [make_qkv(2, 4, 2, 20, 20, 8, 6) for _ in range(3)]
        if shared:
            samples = [(q, samples[0][1], v) for q, _, v in samples]
        dims = (1, None if shared else 2, 0)
        stacked = [
            parts[0] if d is None else torch.stack(parts, d)
            for parts, d in zip(zip(*samples, strict=True), dims, strict=True)
        ]
        loss = self._loss(self.MASKS[mask]())
        for call in (loss, torch.func.grad(loss, (0, 1, 2))):
            expected = [call(*sample) for sample in samples]
            got = torch.vmap(call, dims)(*stacked)
            if call is loss:
                expected, got = [(x,) for x in expected], (got,)
            for a, b in zip(got, zip(*expected, strict=True), strict=True):
                torch.testing.assert_close(a, torch.stack(b))

    def test_vjp_under_vmap_is_the_jacobian(self) -> None:
        q, k, v = make_qkv(1, 1, 1, 3, 4, 2, dtype=torch.float64)
        expected = torch.autograd.functional.jacobian(lambda q: attention(q, k, v, causal()), q)
        torch.testing.assert_close(torch.func.jacrev(lambda q: attention(q, k, v, causal()))(q), expected)

    def test_a_mask_that_is_made_inside(self) -> None:
        q = torch.randn(1, 2, 20, 8)

        def loss(x: Tensor, rule: Any) -> Tensor:
            return attention(x, x, x, rule(q.detach().mean((0, 1, 3))[:, None] > x.detach().mean((0, 1, 3)))).sum()

        for rule in (lambda m: m, lambda m: causal() & from_dense(m)):
            expected = torch.autograd.grad(loss(x := q.clone().requires_grad_(), rule), x)[0]
            assert torch.equal(torch.func.grad(loss)(q, rule), expected)

    @pytest.mark.parametrize("mask", ["none", "tensor"])
    def test_forward_mode_raises(self, mask: str) -> None:
        q, m = torch.randn(1, 2, 20, 16), self.MASKS[mask]()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, q)
            # the plain inputs of a level are no derivative
            assert attention(q, q, q, m).isfinite().all()
            for args in ((dual, q, q), (q, dual, q), (q, q, dual)):
                with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                    attention(*args, m)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(lambda x: attention(x, x, x, m), (q,), (q,))

    @pytest.mark.compile
    def test_forward_mode_raises_in_a_compiled_function(self) -> None:
        q = torch.randn(1, 2, 20, 16)
        torch.compiler.reset()
        compiled = torch.compile(lambda x: attention(x, x, x), backend="aot_eager", fullgraph=True)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            compiled(forward_ad.make_dual(q, q))
        inside = torch.compile(lambda x: torch.func.jvp(lambda x: attention(x, x, x), (x,), (x,)), backend="aot_eager")
        with pytest.raises((NotImplementedError, torch._dynamo.exc.TorchDynamoException), match="forward-mode"):
            inside(q)

    @pytest.mark.compile
    def test_grad_inside_a_compiled_function(self) -> None:
        torch.compiler.reset()
        q, mask = torch.randn(1, 2, 20, 16), pack(_random(20, 20))
        grad = torch.func.grad(lambda x: attention(x, x, x, mask).sin().sum())
        assert torch.equal(torch.compile(grad, backend="aot_eager", fullgraph=True)(q), grad(q))

    @pytest.mark.parametrize("outer", [torch.func.grad, torch.func.jacrev])
    def test_second_derivatives_raise(self, outer: Any) -> None:
        q = torch.randn(1, 2, 4, 8)
        inner = torch.func.grad(lambda x: attention(x, x, x, causal()).sin().sum())
        with pytest.raises(NotImplementedError, match="differentiated twice"):
            outer(lambda x: inner(x).sum())(q)

    def test_what_a_vmap_maps(self) -> None:
        q, masks = torch.randn(3, 1, 2, 20, 8), _random(3, 20, 20)
        for rule in (lambda m: m, from_dense):
            with pytest.raises(NotImplementedError, match=r"mask is mapped by torch\.vmap"):
                torch.vmap(lambda x, m, rule=rule: attention(x, x, x, rule(m)))(q, masks)

    def test_batched_gradients(self) -> None:
        q = torch.randn(1, 2, 20, 8, requires_grad=True)
        for lse in (False, True):
            o = attention(q, q, q, return_lse=True)[lse]
            with pytest.raises(NotImplementedError, match=r"no batched gradients \(is_grads_batched=True"):
                torch.autograd.grad(o, q, torch.randn(3, *o.shape), is_grads_batched=True)


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


class Model(nn.Module):
    """A projection and attention under a mask: what a compiled model looks like."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.heads = heads

    def forward(self, x: Tensor, mask: Any, return_lse: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if return_lse:
            o, lse = attention(q, k, v, mask, return_lse=True)
            return o.transpose(1, 2).flatten(2).sum() + lse.sin().sum()
        return attention(q, k, v, mask).transpose(1, 2).flatten(2)


def _masks(length: int) -> dict[str, Any]:
    dense = torch.rand(2, 1, length, length) < 0.5
    return {
        "none": None,
        "tensor": dense,
        "block mask": pack(dense),
        "mask": causal() & ~sliding_window(2, 0),
        "mask of a tensor": causal() & from_dense(dense),
    }


def _grads(model: nn.Module, call: Any, *args: Any) -> list[Tensor]:
    model.zero_grad()
    out = call(*args)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.compile
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("kind", _masks(2))
def test_compile_equals_eager(kind: str, return_lse: bool) -> None:
    torch.compiler.reset()
    model, x, mask = Model(), torch.randn(2, 140, 16), _masks(140)[kind]
    if return_lse and kind == "tensor":
        # every row needs a key, for a finite sum of lse
        mask[..., 0] = True
    expected = _grads(model, model, x, mask, return_lse)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(_grads(model, compiled, x, mask, return_lse), expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["tensor", "block mask", "mask of a tensor"])
def test_new_mask_contents_do_not_recompile(kind: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, x = Model(), torch.randn(2, 300, 16)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(4):
        mask = _masks(300)[kind]
        torch.testing.assert_close(compiled(x, mask), model(x, mask))
    assert counter.frame_count == 1


@pytest.mark.compile
def test_a_block_mask_with_more_tiles_recompiles_once_at_most() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, x = Model(), torch.randn(1, 600, 16)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for window in (10, 100, 200, 300, 400, 500):
            mask = pack(causal() & sliding_window(window), q_len=600, kv_len=600)
            torch.testing.assert_close(compiled(x, mask), model(x, mask))
    # the lists' lengths become symbols the second time they differ; a list that was empty or had one entry is special
    assert counter.frame_count <= 4


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["none", "tensor", "built inside", "mask"])
def test_dynamic_lengths(kind: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Model()

    def call(x: Tensor, mask: Any) -> Tensor:
        return model(x, sliding_window(40) if kind == "built inside" else mask)

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for length in (130, 140, 150, 270, 300, 515):
        x = torch.randn(2, length, 16)
        mask = {"tensor": torch.rand(length, length) < 0.5, "mask": sliding_window(40)}.get(kind)
        torch.testing.assert_close(compiled(x, mask), call(x, mask))
    assert counter.frame_count <= 2


@pytest.mark.compile
@pytest.mark.parametrize("kind", [*_masks(2), "packed inside", "custom", "stand-in"])
def test_no_graph_breaks_in_default_mode(kind: str) -> None:
    torch.compiler.reset()
    q, mask = torch.randn(2, 2, 140, 8), _masks(140).get(kind, _random(140, 140))
    calls = {
        "packed inside": lambda q, m: attention(q, q, q, pack(causal() & from_dense(m), q_len=140, kv_len=140)),
        "custom": lambda q, m: anymask.flash_attention_custom_mask(q, q, q, m.float()),
        "stand-in": lambda q, m: anymask.scaled_dot_product_attention(q, q, q, m),
    }
    call = calls.get(kind, lambda q, m: attention(q, q, q, m))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(call, backend=counter)
    assert torch.equal(compiled(q, mask), call(q, mask))
    assert counter.frame_count == 1


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [None, True])
def test_scales_in_a_compiled_function(dynamic: bool | None) -> None:
    """Each value is a compilation, as it is for torch's own attention."""
    torch.compiler.reset()
    compiled = torch.compile(lambda q, s: attention(q, q, q, scale=s), fullgraph=True, backend="eager", dynamic=dynamic)
    q = torch.randn(1, 2, 10, 8)
    for scale in (0.5, 0.25, -0.125, 3):
        assert torch.equal(compiled(q, scale), attention(q, q, q, scale=scale))
    with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match="scale is nan"):
        compiled(q, float("nan"))


@pytest.mark.compile
def test_a_scale_of_a_dynamic_shape() -> None:
    torch.compiler.reset()
    call = torch.compile(
        lambda q: attention(q, q, q, scale=q.shape[-1] ** -0.5), fullgraph=True, backend="eager", dynamic=True
    )
    for dim in (8, 12, 16):
        q = torch.randn(1, 2, 10, dim)
        torch.testing.assert_close(call(q), attention(q, q, q))


class Net(nn.Module):
    """Attention under a mask that is given, or causal."""

    def forward(self, q: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q, q, q, mask, is_causal=mask is None)


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["causal", "tensor"])
def test_export_for_lengths_on_both_sides_of_a_tile(kind: str) -> None:
    length = torch.export.Dim("length", min=2, max=4096)

    def mask(n: int) -> Tensor | None:
        return _random(n, n) if kind == "tensor" else None

    shapes = {"q": {2: length}, "mask": {0: length, 1: length} if kind == "tensor" else None}
    program = torch.export.export(Net(), (torch.randn(1, 2, 300, 8), mask(300)), dynamic_shapes=shapes).module()
    for n in (2, 100, 128, 129, 300, 520):
        q, m = torch.randn(1, 2, n, 8), mask(n)
        assert torch.equal(program(q, m), attention(q, q, q, m, is_causal=m is None))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_graph_reads_its_mask(mode: str) -> None:
    """Nothing is remembered there: the values of the tensor that was traced are not those of later calls."""
    from torch.fx.experimental.proxy_tensor import make_fx

    q, mask = torch.randn(1, 2, 140, 8), _random(140, 140)
    attention(q, q, q, mask)
    graph = make_fx(lambda q, m: attention(q, q, q, m), tracing_mode=mode)(q, mask)
    assert torch.equal(graph(q, ~mask), attention(q, q, q, ~mask))


@pytest.mark.parametrize("kind", _masks(2))
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(kind: str, use_reentrant: bool) -> None:
    model, mask = Model(), _masks(140)[kind]
    x = torch.randn(2, 140, 16, requires_grad=True)
    expected = _grads(model, model, x, mask)
    again = _grads(model, lambda *args: checkpoint(model, *args, use_reentrant=use_reentrant), x, mask)
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)


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
    tensors[4].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize(("q_len", "kv_len", "batch"), [(0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 5, 0)])
def test_fakes_agree_on_nothing(q_len: int, kv_len: int, batch: int) -> None:
    q, k, v = make_qkv(batch, 2, 1, q_len, kv_len, 4, 6, requires_grad=True)
    torch.library.opcheck(ops.forward_op, (q, k, v, [], 0.5, None, False))


def test_packing_inside_a_compiled_function_shares_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def sharing(*args: Any, **kwargs: Any) -> BlockMask:
        """As on a GPU: the lists of both views are views of one tensor."""
        packed = pack(*args, **kwargs)
        tensors = packed.tensors()
        lists = [i for i, t in enumerate(tensors) if t.dtype == torch.int32 and t.shape[1:] != (128, 4)]
        parts = torch.cat([tensors[i].flatten() for i in lists]).split([tensors[i].numel() for i in lists])
        for i, part in zip(lists, parts, strict=True):
            tensors[i] = part.view(tensors[i].shape)
        return BlockMask.from_tensors(tensors, packed.q_len, packed.kv_len)

    monkeypatch.setattr(ops, "pack", sharing)
    program = program_of(causal() & document(torch.arange(300) // 90))
    assert program is not None
    torch.library.opcheck(ops.pack_op, (*program, 300, 300, torch.device("cpu")))
