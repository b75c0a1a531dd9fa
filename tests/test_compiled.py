"""What torch.compile, torch.export and checkpointing make of attention: the same results, in few graphs."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import anymask
from anymask import attention, causal, document, from_dense, ops, pack, sliding_window

# torch.compile imports parts of torch that warn on their own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _random(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.5


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
@pytest.mark.parametrize("dynamic", [None, True])
def test_new_windows_compile_nothing_new(dynamic: bool | None) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, window: int) -> Tensor:
        return attention(q, q, q, causal() & sliding_window(window, window // 2))

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=dynamic)
    q = torch.randn(1, 2, 140, 8)
    for window in (*range(2, 12), *range(20, 200, 20)):
        assert torch.equal(compiled(q, window), call(q, window))
    assert counter.frame_count <= 2


@pytest.mark.compile
def test_new_documents_compile_nothing_new() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, ids: Tensor) -> Tensor:
        return attention(q, q, q, causal() & document(ids))

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length in range(100, 500, 20):
        q, ids = torch.randn(1, 2, length, 8), torch.arange(length) // (length // 7)
        torch.testing.assert_close(compiled(q, ids), call(q, ids))
    assert counter.frame_count <= 2


@pytest.mark.compile
@pytest.mark.parametrize(("kind", "n"), [("causal", 2), ("of samples", 3), ("with unused keys", 4)])
def test_graphs_take_few_tensors_of_a_mask(kind: str, n: int) -> None:
    """Also to their backward pass; a mask with others to say is compiled for anew."""
    torch.compiler.reset()
    inputs: list[int] = []

    def counted(graph: Any, args: Any) -> Any:
        inputs.append(len(args))
        return graph

    unused = torch.arange(140) < 130
    masks = {"causal": causal(), "of samples": from_dense(_random(2, 1, 140, 140))}
    masks["with unused keys"] = from_dense(_random(140, 140) & unused)
    q = torch.randn(2, 2, 140, 8, requires_grad=True)
    compiled = torch.compile(lambda q, mask: attention(q, q, q, mask), fullgraph=True, backend=counted)
    mask = pack(masks[kind], q_len=140, kv_len=140)
    torch.testing.assert_close(compiled(q, mask), attention(q, q, q, mask))
    assert inputs == [1 + n]
    for other in masks.values():
        mask = pack(other, q_len=140, kv_len=140)
        (grad,) = torch.autograd.grad(compiled(q, mask).sum(), q)
        torch.testing.assert_close(grad, torch.autograd.grad(attention(q, q, q, mask).sum(), q)[0])
    assert len(inputs) == 3


@pytest.mark.compile
def test_masks_that_are_made_of_opposites_inside() -> None:
    rows = torch.randint(0, 140, (1, 1, 140, 1), dtype=torch.int32)

    def call(q: Tensor) -> tuple[Tensor, Tensor]:
        training = attention(q, q, q, anymask.block_diffusion(10, 70))
        return training, attention(q, q, q, anymask.formats.from_startend_row_indices(rows, causal=True))

    q = torch.randn(1, 2, 140, 8)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for a, b in zip(compiled(q), call(q), strict=True):
        assert torch.equal(a, b)


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


def _parents(length: int) -> Tensor:
    parents = torch.arange(length) - 1
    parents[length // 2] = 3
    return parents


def _bounds(length: int) -> Tensor:
    return torch.tensor([0, length // 3, length // 2, length])


# what is built inside of a compiled function, of q and of something that is given
BUILT: dict[str, tuple[Any, Any]] = {
    "not": (lambda q, x: ~causal() | sliding_window(3), lambda n: None),
    "not, given": (lambda q, mask: ~mask, lambda n: causal() & document(torch.arange(n) // 50)),
    "training of block diffusion": (lambda q, x: anymask.block_diffusion(10, q.shape[2] // 2), lambda n: None),
    "documents by bounds": (lambda q, cu: causal() & document(cu_seqlens=cu), _bounds),
    "of other keys": (lambda q, cu: document(cu_seqlens=cu, kv_cu_seqlens=cu.flip(0).sort().values), _bounds),
    "windows of documents": (lambda q, cu: anymask.document_window(cu, left=9), _bounds),
    "tree": (lambda q, parents: anymask.tree(parents), _parents),
    "packed": (lambda q, x: pack(causal(), q_len=q.shape[2], kv_len=q.shape[2]), lambda n: None),
    "lists of queries": (
        lambda q, mask: anymask.slice_queries(mask, 20, 20 + q.shape[2]),
        lambda n: pack(causal(), q_len=n + 40, kv_len=n),
    ),
    "lists of samples": (lambda q, mask: mask[1], lambda n: pack(torch.arange(3)[:, None, None, None] < _random(n, n))),
}  # fmt: skip


@pytest.mark.compile
@pytest.mark.parametrize(("fullgraph", "dynamic"), [(False, None), (True, True)])
@pytest.mark.parametrize("kind", BUILT)
def test_masks_built_inside_are_one_graph(kind: str, fullgraph: bool, dynamic: bool | None) -> None:
    torch.compiler.reset()
    counter, (build, make) = CompileCounterWithBackend("eager"), BUILT[kind]

    def call(q: Tensor, given: Any) -> Tensor:
        return attention(q, q, q, build(q, given))

    compiled = torch.compile(call, backend=counter, fullgraph=fullgraph, dynamic=dynamic)
    q, given = torch.randn(1, 2, 140, 8), make(140)
    assert torch.equal(compiled(q, given), call(q, given))
    assert counter.frame_count == 1


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["documents by bounds", "windows of documents", "tree", "lists of queries"])
def test_new_lengths_of_what_is_built_inside(kind: str) -> None:
    torch.compiler.reset()
    counter, (build, make) = CompileCounterWithBackend("aot_eager"), BUILT[kind]

    def call(q: Tensor, given: Any) -> Tensor:
        return attention(q, q, q, build(q, given))

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for length in range(100, 500, 20):
        q, given = torch.randn(1, 2, length, 8, requires_grad=True), make(length)
        gradients = []
        for attend in (compiled, call):
            o = attend(q, given)
            gradients.append(torch.autograd.grad(o.square().sum(), q)[0])
        assert torch.equal(*gradients)
    assert counter.frame_count <= 4


@pytest.mark.compile
def test_what_a_compiled_function_finds_wrong_when_it_runs() -> None:
    torch.compiler.reset()
    q = torch.randn(1, 1, 20, 8)
    documents, of_tree = (
        torch.compile(lambda q, x, build=BUILT[kind][0]: attention(q, q, q, build(q, x)), backend="eager")
        for kind in ("documents by bounds", "tree")
    )
    for bounds, message in (
        ([0, 9, 4, 20], r"cu_seqlens is \[0, 9, 4, 20\]; allowed are numbers that start at 0"),
        ([0, 9, 12, 21], "document: cu_seqlens has length 21 but q_len is 20|tensors of the mask has length 21"),
    ):
        with pytest.raises(ValueError, match=message):
            documents(q, torch.tensor(bounds))
    with pytest.raises(ValueError, match="parents form a cycle through token 3"):
        of_tree(q, torch.arange(20) - 1 + 2 * (torch.arange(20) == 3))


@pytest.mark.compile
def test_every_other_operator_of_an_object_is_left_to_torch() -> None:
    class Number:
        def __invert__(self) -> int:
            return 3

    def call(q: Tensor, x: Any) -> Tensor:
        return q + (~x if isinstance(x, (int, Tensor)) else x.__invert__())

    torch.compiler.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for x in (5, torch.tensor([5]), Number()):
        assert torch.equal(compiled(torch.zeros(1), x), call(torch.zeros(1), x))


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_new_scales_compile_nothing_new(backend: str, fullgraph: bool, dynamic: bool | None) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)

    def call(q: Tensor, scale: float) -> list[Tensor]:
        o, lse = attention(q, q, q, causal(), scale=scale, return_lse=True)
        return [o.sin(), lse]

    compiled = torch.compile(call, fullgraph=fullgraph, backend=counter, dynamic=dynamic)
    q = torch.randn(1, 2, 10, 8, requires_grad=True)
    for scale in (0.5, 0.25, -0.125, 0.1, 1 / 3, 1e-8, 0.0, 7.3, *torch.rand(4).tolist()):
        got, expected = compiled(q, scale), call(q, scale)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        gradients = [torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), q)[0] for outputs in (got, expected)]
        assert torch.equal(*gradients)
    assert counter.frame_count <= 2
    assert torch.equal(compiled(q, 3)[0], call(q, 3)[0])
    for scale in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match=f"scale is {scale}"):
            compiled(q, scale)


@pytest.mark.compile
def test_layers_with_a_scale_each_share_a_graph() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    q = torch.randn(1, 2, 10, 8)
    for layer in range(12):
        net = Scaled(1 / (layer + 2))
        expected = net(q)
        net.compile(backend=counter, fullgraph=True)
        assert torch.equal(net(q), expected)
    assert counter.frame_count <= 2


class Scaled(nn.Module):
    """Attention with a scale of its own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor) -> Tensor:
        return attention(q, q, q, scale=self.scale)


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_constant_scale_is_no_tensor(dynamic: bool | None) -> None:
    """A number on the CPU beside tensors on a GPU would keep CUDA graphs from recording."""
    torch.compiler.reset()
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(node for node in graph.graph.nodes if node.target is ops.forward_op)
        return graph.forward

    q = torch.randn(1, 2, 10, 8)
    for call in (lambda q: attention(q, q, q, scale=0.3), lambda q: attention(q, q, q)):
        assert torch.equal(torch.compile(call, backend=backend, dynamic=dynamic)(q), call(q))
    assert [node.args[7] for node in seen] == [None, None]


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


@pytest.mark.parametrize("kind", _masks(2))
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(kind: str, use_reentrant: bool) -> None:
    model, mask = Model(), _masks(140)[kind]
    x = torch.randn(2, 140, 16, requires_grad=True)
    expected = _grads(model, model, x, mask)
    again = _grads(model, lambda *args: checkpoint(model, *args, use_reentrant=use_reentrant), x, mask)
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)
