"""Launches of plans: the driver gets the same bytes from `anymask.direct` as from Triton's launcher."""

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_size_t, c_uint, c_void_p
from typing import Any

import pytest
import torch
from torch import Tensor

from anymask import BlockMask, calls, causal, pack, plan
from anymask.direct import Direct

pytestmark = pytest.mark.gpu
KERNEL_NODE = 0


class _NodeParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("function", c_void_p),
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("params", ctypes.POINTER(c_void_p)),
        ("extra", c_void_p),
        ("kernel", c_void_p),
        ("context", c_void_p),
    )


def _captured(call: Callable[[], object]) -> list[Any]:
    """What the driver was asked to launch: function, grid, block, shared memory, and the bytes of each parameter."""
    cuda = ctypes.CDLL("libcuda.so.1")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    handle, n = c_void_p(graph.raw_cuda_graph()), c_size_t()
    assert cuda.cuGraphGetNodes(handle, None, ctypes.byref(n)) == 0
    nodes = (c_void_p * n.value)()
    assert cuda.cuGraphGetNodes(handle, nodes, ctypes.byref(n)) == 0
    found = []
    for node in nodes:
        kind, of = c_uint(), _NodeParams()
        assert cuda.cuGraphNodeGetType(c_void_p(node), ctypes.byref(kind)) == 0
        assert kind.value == KERNEL_NODE
        assert cuda.cuGraphKernelNodeGetParams_v2(c_void_p(node), ctypes.byref(of)) == 0
        params = []
        for size in _param_sizes(cuda, of.function):
            params.append(ctypes.string_at(of.params[len(params)], size))
        found.append((of.function, tuple(of.grid), tuple(of.block), of.shared_bytes, params))
    return found


def _param_sizes(cuda: Any, function: int) -> Iterator[int]:
    offset, size, at = c_size_t(), c_size_t(), 0
    while cuda.cuFuncGetParamInfo(c_void_p(function), c_size_t(at), ctypes.byref(offset), ctypes.byref(size)) == 0:
        yield size.value
        at += 1


def _check(tensors: list[Tensor], mask: BlockMask | None, found: plan.Plan | None) -> int:
    assert found is not None
    lying, launches = [*tensors, *(() if mask is None else mask.parts)], 0
    for step in found._steps:
        for _ in range(3):
            # the third launch is the first that goes through the driver alone
            added = len(lying)
            step(lying)
            del lying[added + (not isinstance(step, plan._Launch)) :]
            if not isinstance(step, plan._Launch):
                break
        else:
            assert isinstance(step, plan._Launch)
            assert isinstance(step._direct, Direct)
            direct = _captured(lambda step=step: step._direct(lying))
            assert direct == _captured(lambda step=step: step._by_triton(lying, None))
            assert len(direct) == 1
            launches += 1
    return launches


@pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=pytest.mark.hopper)])
@pytest.mark.parametrize(
    ("dim", "v_dim", "heads", "q_len", "kv_len", "dtype"),
    [
        (128, 128, (8, 8), 512, 512, torch.bfloat16),
        (64, 64, (8, 2), 300, 500, torch.float16),
        (192, 128, (4, 4), 300, 300, torch.bfloat16),
        (128, 128, (8, 2), 1, 4096, torch.bfloat16),
        (32, 32, (4, 4), 49, 49, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_launch_the_same_bytes(
    backend: str, masked: bool, dim: int, v_dim: int, heads: tuple[int, int], q_len: int, kv_len: int,
    dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    if backend == "hopper" and max(dim, v_dim) < 33:
        pytest.skip("the portable backend has those")
    make = {"device": device, "dtype": dtype}
    q = torch.randn(2, q_len, heads[0], dim, **make).transpose(1, 2)
    k, v = (torch.randn(2, heads[1], kv_len, d, **make) for d in (dim, v_dim))
    mask = pack(causal(kv_len - q_len), q_len=q_len, kv_len=kv_len, device=device) if masked else None
    o, lse = calls.forward(q, k, v, mask, 0.1, backend)
    do = torch.randn_like(o)
    for _ in range(2):
        calls.backward(q, k, v, o, lse, do, None, mask, 0.1, backend, False)
    structure = None if mask is None else mask.structure
    tensors = [q, k, v]
    kinds = [calls._kind(t) for t in tensors]
    _, found = calls._forward(backend, structure, 0.1, q.device, None, *kinds)
    assert _check(tensors, mask, found) >= 1
    tensors += [o, lse, do]
    kinds = [calls._kind(t) for t in tensors]
    _, found = calls._backward(backend, structure, 0.1, False, q.device, None, *kinds)
    assert _check(tensors, mask, found) >= 1
