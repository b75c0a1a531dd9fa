"""Two ranks by gloo: DDP, FSDP2 under `torch.compile`, tensor parallel heads and DTensors, equal to one process."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from anymask import BlockMask, attention, causal, document, from_dense, pack
from anymask.integrations.torch import sharded_attention

RANKS = 2
HEADS, HEAD_DIM, LENGTH, BATCH = 4, 8, 150, 4
WIDTH = HEADS * HEAD_DIM


class Layer(nn.Module):
    """Attention with its projections; of fewer heads where they are sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        q, k, v = (f(x).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.o(attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two layers under one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def whole() -> tuple[Net, Tensor, BlockMask]:
    """The same net, batch and mask, with a plane for each sample and head, on all ranks."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(BATCH, LENGTH, WIDTH)
    seen = causal() & from_dense(torch.rand(BATCH, HEADS, LENGTH, LENGTH) < 0.5)
    return net, x, pack(seen, q_len=LENGTH, kv_len=LENGTH)


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()]


def expected_gradients() -> list[Tensor]:
    """Those of the mean over the whole batch, in one process."""
    net, x, mask = whole()
    net(x, mask).square().mean().backward()
    return gradients(net)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def own(rank: int, size: int) -> slice:
    return slice(rank * size // RANKS, (rank + 1) * size // RANKS)


def ddp(rank: int, mesh: DeviceMesh) -> None:
    net, x, mask = whole()
    mine = own(rank, BATCH)
    parallel = nn.parallel.DistributedDataParallel(net)
    parallel(x[mine], mask[mine]).square().mean().backward()
    assert_equal(gradients(net), expected_gradients())


def fsdp(rank: int, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    net, x, mask = whole()
    mine = own(rank, BATCH)
    for layer in net.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    net(x[mine], mask[mine]).square().mean().backward()
    assert_equal(gradients(net), expected_gradients())


def tensor_parallel(rank: int, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    net, x, mask = whole()
    for layer in net.layers:
        plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
        parallelize_module(layer, mesh, plan)
    mine = mask[:, own(rank, HEADS)]
    assert mine.heads == HEADS // RANKS
    net(x, mine).square().mean().backward()
    assert_equal(gradients(net), expected_gradients())


def dtensors(rank: int, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    seen = torch.rand(BATCH, HEADS, LENGTH, LENGTH) < 0.5
    ids = torch.arange(LENGTH).expand(BATCH, -1) // torch.tensor([[20], [50], [70], [150]])
    masks: dict[str, Any] = {
        "none": None,
        "causal": causal(),
        "one plane": seen[0, 0],
        "of heads": seen[0],
        "bools": seen,
        "shared heads": seen[:, :1],
        "packed": pack(seen),
        "documents": causal() & document(ids),
    }
    shapes = (BATCH, HEADS, LENGTH, HEAD_DIM), (BATCH, 2, LENGTH, HEAD_DIM), (BATCH, 2, LENGTH, 6)
    plain = [torch.randn(s, requires_grad=True) for s in shapes]
    do = torch.randn(BATCH, HEADS, LENGTH, 6)
    for placement in (Shard(0), Shard(1), Replicate()):
        for name, mask in masks.items():
            o, lse = attention(*plain, mask, return_lse=True)
            expected = [o, lse, *torch.autograd.grad(o, plain, do)]
            q, k, v = (distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in plain)
            o, lse = sharded_attention(q, k, v, mask, return_lse=True)
            assert o.placements == lse.placements == (placement,), name
            grads = torch.autograd.grad(o, (q, k, v), distribute_tensor(do, mesh, [placement]))
            assert_equal([t.full_tensor() for t in (o, lse, *grads)], expected)
    q, k, v = (distribute_tensor(t.detach(), mesh, [Shard(1)]) for t in plain)
    expected = attention(*plain, seen)
    # the planes of this rank, cut before
    for mine in (seen[:, own(rank, HEADS)], pack(seen)[:, own(rank, HEADS)]):
        assert_equal([sharded_attention(q, k, v, mine).full_tensor()], [expected])


def refusals(rank: int, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    t = torch.randn(3, 4, 5, 8)
    heads, lengths = (distribute_tensor(t, mesh, [Shard(dim)]) for dim in (1, 2))
    samples = distribute_tensor(t, mesh, [Shard(0)])
    for q, k, kind, message in (
        (t, heads, TypeError, "q is a Tensor; allowed is a DTensor"),
        (heads, samples, ValueError, "k is placed as .* but q as .*; allowed is one placement"),
        (lengths, lengths, ValueError, "q is placed as .*; allowed are Shard"),
        (samples, samples, ValueError, "q has 3 along 0, sharded by 2; allowed are multiples of it"),
    ):
        with pytest.raises(kind, match=message):
            sharded_attention(q, k, k)


SCENARIOS: dict[str, Callable[[int, DeviceMesh], None]] = {
    f.__name__: f for f in (ddp, fsdp, tensor_parallel, dtensors, refusals)
}


def run_rank(rank: int, folder: str) -> None:
    """All scenarios in one pair of processes, whose start takes longest; what failed is written down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, scenario in SCENARIOS.items():
        failed = ""
        try:
            scenario(rank, mesh)
        except (AssertionError, RuntimeError, ValueError, TypeError, pytest.fail.Exception):
            failed = traceback.format_exc()
        Path(folder, f"{name}-{rank}").write_text(failed)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what both ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_are_as_one(name: str, results: Path) -> None:
    for rank in range(RANKS):
        assert not (failed := (results / f"{name}-{rank}").read_text()), failed
