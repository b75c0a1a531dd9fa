"""A `BlockMask` in the hands of others: sliced, moved, pickled, batched, traced, split."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental import _config as fx_config
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

import anymask
from anymask import BlockMask, attention, causal, document, pack
from anymask.block_mask import MaskBuffer
from anymask.testing import MASKS, assert_same_block_mask, make_qkv
from tests.helpers import grid


def planes(batch: int, heads: int, q_len: int = 300, kv_len: int = 260) -> tuple[torch.Tensor, BlockMask]:
    """Tiles of all kinds, unused queries and keys in some planes only."""
    dense = torch.rand(batch, heads, q_len, kv_len) < 0.5
    dense[:, :, :128, :128] = True
    dense[:, :, 128:256, 128:256] = False
    dense[0, :, :, 5] = dense[0, :, 7] = False
    # heads of other numbers of tiles, by rows and by columns
    dense[:, 1:2, :128] = True
    dense[1:, 2:3, :, 128:] = False
    return dense, pack(dense)


@pytest.mark.parametrize(
    ("index", "same"),
    [
        (0, (slice(0, 1),)),
        (-1, (slice(2, 3),)),
        (slice(1, 3), (slice(1, 3),)),
        (slice(-2, None), (slice(1, 3),)),
        (slice(2, 2), (slice(2, 2),)),
        ((slice(None), slice(1, 3)), (slice(None), slice(1, 3))),
        ((slice(None), -1), (slice(None), slice(3, 4))),
        ((1, 2), (slice(1, 2), slice(2, 3))),
        ((slice(0, 2), slice(0, 0)), (slice(0, 2), slice(0, 0))),
        ((), ()),
    ],
    ids=str,
)
@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 260), (0, 100), (100, 0)], ids=str)
def test_a_slice_is_the_dense_mask_s_packed(index: Any, same: Any, q_len: int, kv_len: int) -> None:
    dense, mask = planes(3, 4, 300, 260)
    dense, mask = (dense, mask) if q_len == 300 else (dense[..., :q_len, :kv_len], pack(dense[..., :q_len, :kv_len]))
    assert mask.shape == dense.shape
    assert_same_block_mask(mask[index], pack(dense[same], q_len=q_len, kv_len=kv_len))
    assert mask[index].contradiction() is None


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_slices(name: str) -> None:
    whole = grid.packed(name)
    for b in range(whole.batch):
        for h in range(whole.heads):
            alone = pack(whole.to_dense()[b : b + 1, h : h + 1])
            assert_same_block_mask(whole[b, h], alone)


def test_samples_are_views() -> None:
    _, mask = planes(3, 2)
    some = mask[1:]
    assert some.rows.words.untyped_storage().data_ptr() == mask.rows.words.untyped_storage().data_ptr()
    assert mask[:, 0:2] is mask
    assert mask[0:3] is mask


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (3, IndexError, "batch index 3 of a mask with 3 planes along it; allowed are -3 to 2"),
        (-4, IndexError, "batch index -4 of a mask with 3"),
        (slice(1, 4), IndexError, r"batch index slice\(1, 4, None\) .* slices of step 1 within 0 to 3"),
        (slice(None, None, 2), IndexError, "allowed are slices of step 1"),
        (slice(2, 1), IndexError, "within 0 to 3"),
        ((0, 1), IndexError, "heads index 1 of a mask with 1 planes .* shared by all and has nothing to cut"),
        ((slice(None), slice(0, 2)), IndexError, "heads index .* shared by all and has nothing to cut"),
        ((0, 0, slice(0, 9)), IndexError, r"3 indices; allowed are 2, batch and heads: anymask\.slice_queries"),
        (True, TypeError, "batch index is True of type bool; allowed are an int and a slice"),
        (1.0, TypeError, "batch index is 1.0 of type float"),
        ([0, 1], TypeError, r"batch index is \[0, 1\] of type list"),
        (torch.tensor([True, False, True]), TypeError, "of type Tensor"),
        (..., TypeError, "of type ellipsis"),
        (slice("a", None), TypeError, "batch index is 'a' of type str"),
    ],
    ids=str,
)
def test_what_is_no_slice(index: Any, error: type[Exception], message: str) -> None:
    mask = pack(torch.rand(3, 1, 50, 60) < 0.5)
    with pytest.raises(error, match=message):
        mask[index]
    with pytest.raises(TypeError, match="not iterable"):
        list(mask)


def test_heads_of_tensor_parallelism_and_samples_of_micro_batches() -> None:
    _, mask = planes(2, 4, 200, 150)
    q, k, v = make_qkv(2, 4, 2, 200, 150, 16)
    for t in (q, k, v):
        t.requires_grad_()
    whole = attention(q, k, v, mask)
    grads = torch.autograd.grad(whole.sum(), (q, k, v))
    parts = [
        attention(q[:, 2 * r :][:, :2], k[:, r : r + 1], v[:, r : r + 1], mask[:, 2 * r : 2 * r + 2]) for r in (0, 1)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(p.sum() for p in parts), (q, k, v)), grads)
    samples = [attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(torch.cat(samples), whole)


def test_pipelining_gets_an_error_or_the_samples() -> None:
    microbatch = pytest.importorskip("torch.distributed.pipelining.microbatch")
    x = torch.randn(2, 1, 300, 8)
    keep = (torch.arange(300) < torch.tensor([[290], [270]]))[:, None]
    dense = keep[..., None] & keep[..., None, :]
    mask = pack(dense)
    with pytest.raises(ValueError, match=r"\w+ has shape .*pipelining split .* cut it by block_mask\[i:j\]"):
        microbatch.split_args_kwargs_into_chunks((x,), {"mask": mask}, 2)
    # what to do instead: numbers of the samples travel with x, and the mask stays where the stage is
    args, kwargs = microbatch.split_args_kwargs_into_chunks((x,), {"samples": torch.arange(2)}, 2)
    for i, ((a,), kw) in enumerate(zip(args, kwargs, strict=True)):
        first, last = kw["samples"][[0, -1]].tolist()
        o = attention(a, a, a, mask[first : last + 1])
        torch.testing.assert_close(o, attention(x, x, x, dense)[i : i + 1])
    # replicated by a spec of that shape, it arrives whole
    spec = {"mask": pytree.tree_map(lambda _: microbatch._Replicate(), mask)}
    _, kwargs = microbatch.split_args_kwargs_into_chunks(
        (x,), {"mask": mask}, 2, kwargs_chunk_spec=spec, args_chunk_spec=(microbatch.TensorChunkSpec(0),)
    )
    assert_same_block_mask(kwargs[1]["mask"], mask)


@pytest.mark.parametrize(("batch", "chunks"), [(2, 2), (3, 2), (5, 5), (7, 3)])
def test_no_split_goes_unnoticed(batch: int, chunks: int) -> None:
    _, mask = planes(batch, 2)
    leaves, spec = pytree.tree_flatten(mask)
    split = [t.tensor_split(chunks) for t in leaves]
    wrong = 0
    for n in range(chunks):
        try:
            pytree.tree_unflatten([parts[n] for parts in split], spec)
        except ValueError:
            wrong += 1
    assert wrong


def test_a_tree_of_anything() -> None:
    _, mask = planes(2, 2)
    assert pytree.tree_map(lambda t: t.shape, mask).q_has_pair == (2, 2, 300)
    assert pytree.tree_map(lambda t: None, mask).words is None
    assert repr(pytree.tree_map(lambda t: 3, mask)) == "BlockMask(q_len=300, kv_len=260, of int)"
    assert_same_block_mask(pytree.tree_map(lambda t: t.clone(), mask), mask)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = pytree.tree_map(mode.from_tensor, mask)
    assert fake.shape == mask.shape
    meta = mask.to("meta")
    assert (meta.device.type, meta.shape) == ("meta", mask.shape)


@pytest.mark.compile
def test_traced_sizes_are_not_bound() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def twice(mask: BlockMask) -> BlockMask:
        return pytree.tree_map(lambda t: t + t, mask)

    call = torch.compile(twice, backend=counter, fullgraph=True, dynamic=True)
    # without it sizes that happen to be equal stay equal
    with fx_config.patch(use_duck_shape=False):
        for batch in (3, 5, 7):
            _, mask = planes(batch, 2)
            assert torch.equal(call(mask).q_has_pair, mask.q_has_pair * 2)
    assert counter.frame_count == 1
    # nor sizes that are known when it runs
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        chosen = torch.compile(_chosen, backend="eager", fullgraph=True)
        assert_same_block_mask(chosen(mask), mask)


def _chosen(mask: BlockMask) -> BlockMask:
    return pytree.tree_map(lambda t: t[t >= 0] if t.dim() == 1 else t.clone(), mask)


@pytest.mark.compile
def test_a_mask_is_an_input_of_an_exported_program() -> None:
    class Net(torch.nn.Module):
        def forward(self, q: torch.Tensor, mask: BlockMask) -> torch.Tensor:
            return attention(q, q, q, mask)

    q = torch.randn(1, 2, 300, 16)
    mask, other = (pack(causal() & document(torch.arange(300) // n), q_len=300, kv_len=300) for n in (90, 140))
    dynamic = [{0: torch.export.Dim.AUTO}, {1: torch.export.Dim.AUTO}, {}, {}]
    program = torch.export.export(Net(), (q, mask), dynamic_shapes=(None, dynamic)).module()
    torch.testing.assert_close(program(q, other), attention(q, q, q, other))


class Masks(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[int, BlockMask]:
        return index, pack(causal(index), q_len=200, kv_len=300)


@pytest.mark.parametrize("workers", [0, 1])
def test_masks_come_from_a_data_loader(workers: int) -> None:
    context = "fork" if workers and sys.platform == "linux" else None
    loader = DataLoader(Masks(), batch_size=None, num_workers=workers, multiprocessing_context=context)
    found = list(loader)
    assert [i for i, _ in found] == [0, 1, 2]
    for i, mask in found:
        assert_same_block_mask(mask, pack(causal(i), q_len=200, kv_len=300))


def test_pinning_pins_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t.clone())
    _, mask = planes(2, 2)
    batch = pin_memory({"x": torch.ones(1), "mask": mask})
    assert len(pinned) == 1 + len(mask.tensors())
    assert_same_block_mask(batch["mask"], mask)


def test_moves() -> None:
    _, mask = planes(2, 2)
    assert mask.to("cpu", non_blocking=True) is mask
    assert mask.cpu() is mask
    assert mask.to(torch.device("cpu")) is mask
    there = mask.to("meta")
    assert {t.device.type for t in there.tensors()} == {"meta"}
    seen = []

    def to(self: torch.Tensor, device: Any, non_blocking: bool = False) -> torch.Tensor:
        seen.append((str(device), non_blocking))
        return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        mask.cuda(non_blocking=True)
        mask.cuda(1)
    assert set(seen[:4]) == {("cuda", True)}
    assert set(seen[4:]) == {("cuda:1", False)}


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        (torch.float16, TypeError, "device is torch.float16 of type dtype; allowed are a torch.device and its name"),
        (None, TypeError, "device is None"),
        (True, TypeError, "device is True"),
        ("abacus", ValueError, "device is 'abacus'; allowed are those of torch"),
    ],
    ids=str,
)
def test_no_device(device: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    mask = pack(causal(), q_len=9, kv_len=9)
    calls = [lambda: mask.to(device), lambda: BlockMask.full(3, 3, device), lambda: BlockMask.load(tmp_path, device)]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_copies_and_identity() -> None:
    _, mask = planes(2, 2)
    for other in (copy.copy(mask), copy.deepcopy(mask)):
        assert_same_block_mask(other, mask)
        assert other != mask
    assert mask == mask
    assert len({mask, mask, copy.copy(mask)}) == 2


def test_torch_load_reads_it_with_weights_only(tmp_path: Path) -> None:
    _, mask = planes(2, 2)
    torch.save({"mask": mask, "step": 3}, tmp_path / "state.pt")
    code = (
        f"import torch, anymask; found = torch.load({str(tmp_path / 'state.pt')!r})['mask']; "
        "assert found.shape == (2, 2, 300, 260) and found.contradiction() is None; "
        "print(int(found.to_dense().sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == int(mask.to_dense().sum())


def test_what_was_pickled_as_fourteen_tensors_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, mask = planes(2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            BlockMask,
            "__getstate__",
            lambda m: {"q_len": m.q_len, "kv_len": m.kv_len, "rows": m.rows, "cols": m.cols},
        )
        torch.save(mask, tmp_path / "mask.pt")
    found = torch.load(tmp_path / "mask.pt")
    assert found.contradiction() is None
    assert_same_block_mask(found, mask)
    assert len(pytree.tree_leaves(found)) == 4


def test_a_mask_moves_with_its_module() -> None:
    _, mask = planes(2, 2)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)
            self.attend = MaskBuffer(mask)

    net = Net()
    assert_same_block_mask(net.attend.mask, mask)
    assert set(net.state_dict()) == {"linear.weight", "linear.bias"}
    net.half()
    assert_same_block_mask(copy.deepcopy(net).attend.mask, mask)
    assert net.to("meta").attend.mask.device.type == "meta"
    with pytest.raises(TypeError, match="block_mask is a Tensor; allowed is a BlockMask, which pack makes"):
        MaskBuffer(torch.ones(3, 3, dtype=torch.bool))


@pytest.mark.compile
def test_a_module_with_a_mask_compiles_to_one_graph() -> None:
    class Net(torch.nn.Module):
        def __init__(self, mask: BlockMask) -> None:
            super().__init__()
            self.attend = MaskBuffer(mask)

        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return attention(q, q, q, self.attend.mask)

    q = torch.randn(1, 2, 200, 16)
    net = Net(pack(causal(), q_len=200, kv_len=200))
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(q), net(q))


@pytest.mark.parametrize("q_len", [0, 1, 128, 300])
@pytest.mark.parametrize("kv_len", [0, 1, 128, 260])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (0, 2)], ids=str)
def test_the_full_mask_is_the_packed_one(q_len: int, kv_len: int, shape: tuple[int, int]) -> None:
    full = BlockMask.full(q_len, kv_len, batch=shape[0], heads=shape[1])
    assert_same_block_mask(full, pack(torch.ones(*shape, q_len, kv_len, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 3), ValueError, "q_len is -1; allowed are 0 and more"),
        ((3, 2.5), TypeError, "kv_len is 2.5 of type float; allowed is an int"),
        ((3, 3, "cpu", True), TypeError, "batch is True"),
        ((3, 3, "cpu", 1, -2), ValueError, "heads is -2"),
    ],
)
def test_what_is_no_full_mask(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockMask.full(*arguments)


@pytest.mark.parametrize("plane", [0, (0,), (0, 0, 0), "00", (0.0, 0), (True, 0), None], ids=str)
def test_what_is_no_plane(plane: Any) -> None:
    with pytest.raises(TypeError, match=r"plane is .*; allowed are two ints, \(batch, head\)"):
        pack(causal(), q_len=9, kv_len=9).tile_kinds(plane)


@pytest.mark.parametrize(
    ("head_dim", "error"), [("x", TypeError), (True, TypeError), (1.5, TypeError), (0, ValueError)]
)
def test_what_is_no_head_dim(head_dim: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"head_dim is .*; allowed"):
        pack(causal(), q_len=9, kv_len=9).stats(head_dim)


def test_default_devices_do_not_reach_the_full_mask() -> None:
    with torch.device("meta"):
        assert BlockMask.full(300, 300).device.type == "cpu"
    q = torch.randn(1, 1, 130, 8)
    expected = anymask.attention(q, q, q)
    with torch.device("meta"):
        mask = BlockMask.full(130, 130)
    torch.testing.assert_close(anymask.attention(q, q, q, mask), expected)
