"""What a release shows on a GPU beside right numbers: 64-bit offsets, equal bits, threads, streams, devices, leaks."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from itertools import product

import pytest
import torch
from torch import Tensor

from anymask import attention, causal, explain, pack, sliding_window
from anymask.mask.leaves import Stride
from anymask.testing import Case, Results, assert_matches, eager, make_inputs, make_qkv, reference, run
from tests.helpers import grid

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


class TestBeyond31Bits:
    """q, k, v, o and gradients, and words, of more than 2^31 elements. test_gpu_cases.py has masks and strides."""

    @pytest.mark.parametrize("backend", ["hopper", "triton"])
    def test_elements_of_every_tensor(self, backend: str, device: str) -> None:
        batch, heads, length, dim = 66, 16, 32000, 64
        assert batch * heads * length * dim > 2**31
        tensors = [grid.randn(batch, heads, length, dim, dtype=F16, seed=i) for i in range(4)]
        got = grid.results_of(*tensors[:3], sliding_window(300, 20), tensors[3], backend)
        q, k, v, do = (t[-1:, -1:, -700:] for t in tensors)
        position = torch.arange(700, device=device)
        distance = position[:, None] - position
        dense = (distance <= 300) & (distance >= -20)
        args = q, k, v, dense, None, do
        # rows and keys whose windows lie whole in what is compared
        for what, x, want, near in zip(Results._fields, got, reference(*args), eager(*args), strict=True):
            rows = slice(400, 680) if what in ("o", "lse", "dq") else slice(330, 380)
            assert_matches(x[-1:, -1:, -700:][:, :, rows], want[:, :, rows], near[:, :, rows], F16, what)
        del got, tensors
        torch.cuda.empty_cache()

    @pytest.mark.parametrize("backend", ["hopper", "triton"])
    def test_words(self, backend: str, device: str) -> None:
        length = 2049 * 128
        # in every tile some pairs, by a kernel that evaluates them
        mask = pack(Stride(3), q_len=length, kv_len=length, device=device)
        assert mask.rows.words.numel() > 2**31
        q, k, v, do = (grid.randn(1, 1, length, 64, dtype=F16, seed=i) for i in range(4))
        got = grid.results_of(q, k, v, mask, do, backend)
        # queries of one remainder attend to the keys of the same
        for remainder in (0, 2):
            rows = torch.arange(remainder, length, 3, device=device)
            chosen = rows[-300:]
            few = _few_rows(q[:, :, chosen], k[:, :, rows], v[:, :, rows])
            for what, x, want in (("o", got.o, few[0]), ("lse", got.lse, few[1])):
                x = x[:, :, chosen].double()
                assert (x - want).abs().max() <= (1e-3 if what == "lse" else 2e-4), what
        assert got.dk.isfinite().all()
        dv = torch.zeros(300, 64, dtype=torch.float64, device=device)
        keys = torch.arange(length - 300, length, device=device)
        for remainder in range(3):
            rows = torch.arange(remainder, length, 3, device=device)
            mine = keys % 3 == remainder
            s = q[0, 0, rows].double() @ k[0, 0, keys[mine]].double().mT / 8 - got.lse[0, 0, rows].double()[:, None]
            dv[mine] = s.exp().mT @ do[0, 0, rows].double()
        error = (got.dv[0, 0, -300:].double() - dv).abs().max()
        assert error <= 2e-3 * dv.abs().max(), float(error)


def _few_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = q.double() @ k.double().mT / 8
    return torch.softmax(s, -1) @ v.double(), torch.logsumexp(s, -1)


# 5 masks, 2 head_dims, 2 dtypes, 2 pairs of lengths, 5 groups of heads: 200
REPEATED = [
    Case(mask, q_len, kv_len, dim, dtype, batch=batch, q_heads=q_heads, kv_heads=kv_heads)
    for mask, dim, dtype, (q_len, kv_len), (batch, q_heads, kv_heads) in product(
        ("random", "documents", "causal", "per_batch_head", "none"),
        (64, 128),
        (F16, BF16),
        ((513, 1025), (1000, 700)),
        ((2, 2, 2), (1, 4, 2), (3, 4, 1), (1, 6, 6), (2, 8, 4)),
    )
]


@pytest.mark.parametrize("mask", ["random", "documents", "causal", "per_batch_head", "none"])
def test_fifty_runs_are_equal_beside_a_busy_stream(mask: str, device: str) -> None:
    busy, x = torch.cuda.Stream(), torch.randn(2048, 2048, device=device, dtype=F16)
    cases = [case for case in REPEATED if case.mask == mask]
    assert len(cases) * 5 == 200
    for case in cases:
        inputs = make_inputs(case, device)
        packed = None
        if inputs.mask is not None:
            packed = pack(inputs.mask, q_len=case.q_len, kv_len=case.kv_len, device=device)
        inputs = inputs._replace(mask=packed)
        first = run(inputs, deterministic=True)
        differ = []
        for i in range(50):
            if i % 5 == 0:
                with torch.cuda.stream(busy):
                    x = (x @ x).clamp_(-1, 1)
            again = run(inputs, deterministic=True)
            differ += [(a != b).any() for a, b in zip(first, again, strict=True)]
        assert not torch.stack(differ).any(), str(case)


HASHED = """
import hashlib, torch
from anymask.testing import Case, make_inputs, run
digest = hashlib.sha256()
for dtype in (torch.float16, torch.float32):
    for mask, dim in (("random", 64), ("documents", 128), ("none", 72)):
        for t in run(make_inputs(Case(mask, 700, 513, dim, dtype, q_heads=4), "cuda"), deterministic=True):
            digest.update(t.cpu().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_five_fresh_processes_agree(device: str) -> None:
    started = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", HASHED], stdout=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    digests = {process.communicate(timeout=250)[0].strip() for process in started}
    assert all(process.returncode == 0 for process in started)
    assert len(digests) == 1
    assert len(digests.pop()) == len(hashlib.sha256().hexdigest())


@grid.cases(
    ("hopper", "triton"),
    [
        Case(mask, q_len, kv_len, dim, dtype, batch=3, q_heads=q_heads, kv_heads=2)
        for mask in ("per_batch", "documents", "empty_sample", "none", "key_padding")
        for q_len, kv_len in ((500, 700), (129, 1))
        for dim, dtype in ((64, F16), (128, BF16), (32, F32), (64, F32), (128, F32), (256, F32), (256, BF16))
        for q_heads in (2, 8)
    ],
)
def test_a_sample_alone_is_a_sample_in_a_batch(backend: str, case: Case, device: str) -> None:
    inputs = make_inputs(case, device)
    packed = pack(inputs.dense[:, :1], q_len=case.q_len, kv_len=case.kv_len)
    together = run(inputs._replace(mask=packed), backend=backend, deterministic=True)
    for b in range(case.batch):
        q, k, v, dense, do, dlse = (
            t[b : b + 1].detach() for t in (*inputs[:3], inputs.dense[:, :1], inputs.do, inputs.dlse)
        )
        leaves = [t.requires_grad_() for t in (q, k, v)]
        alone = run(type(inputs)(*leaves, pack(dense), dense, do, dlse), backend=backend, deterministic=True)
        for what, x, y in zip(Results._fields, together, alone, strict=True):
            assert torch.equal(x[b : b + 1], y), f"{what} of sample {b}"


COLD = """
import threading, torch
from anymask import attention, causal, document
torch.manual_seed(0)
jobs = []
for i in range(100):
    dim, dtype = (64, 128, 72, 32)[i % 4], (torch.float16, torch.bfloat16, torch.float32)[i % 3]
    length = 100 + 7 * i
    shape = 1, 2, length, dim
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    documents = causal() & document(torch.arange(length, device="cuda") // 60)
    mask = (None, causal(), torch.rand(length, length, device="cuda") < 0.5, documents)[i // 4 % 4]
    jobs.append((q, k, v, mask))
def work(found):
    for q, k, v, mask in jobs:
        o = attention(q, k, v, mask, deterministic=True)
        found.append([o.detach(), *torch.autograd.grad(o.float().sum(), (q, k, v))])
found, errors = [[] for _ in range(8)], []
def guarded(mine):
    try:
        work(mine)
    except BaseException as error:
        errors.append(repr(error))
        raise
threads = [threading.Thread(target=guarded, args=(mine,)) for mine in found]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not errors, errors[:3]
torch.cuda.synchronize()
for mine in found[1:]:
    for a, b in zip(found[0], mine, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)
print("equal", len(found), len(found[0]))
"""


def test_eight_threads_of_cold_calls(device: str) -> None:
    # a process of its own, in which nothing is compiled and nothing is remembered
    command = [sys.executable, "-W", "ignore", "-c", COLD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["equal", "8", "100"]


def test_two_streams_and_a_late_producer(device: str) -> None:
    q, k, v = make_qkv(1, 4, 4, 1000, 1000, 128, dtype=F16, device=device)
    mask = torch.rand(1000, 1000, device=device) < 0.5
    expected = attention(q, k, v, mask.clone())
    late, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    slow = [torch.empty_like(t).fill_(float("nan")) for t in (q, k, v)]
    late_mask = torch.zeros_like(mask)
    torch.cuda.synchronize()
    with torch.cuda.stream(late):
        torch.cuda._sleep(200_000_000)
        for to, t in zip(slow, (q, k, v), strict=True):
            to.copy_(t)
        late_mask.copy_(mask)
        made = torch.cuda.Event()
        made.record()
    with torch.cuda.stream(consumer):
        consumer.wait_event(made)
        first = attention(*slow, late_mask)
    with torch.cuda.stream(late):
        # remembered now, on another stream than it was packed on
        second = attention(*slow, late_mask)
    torch.cuda.synchronize()
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_second_device_while_the_first_is_current(device: str) -> None:
    assert torch.cuda.current_device() == 0
    for dtype, dim, mask in product((F16, F32), (64, 128), ("documents", "random", "none", "causal")):
        here, there = (
            run(make_inputs(Case(mask, 500, 700, dim, dtype), d), deterministic=True) for d in ("cuda:0", "cuda:1")
        )
        for what, x, y in zip(Results._fields, here, there, strict=True):
            assert y.device == torch.device("cuda:1")
            assert torch.equal(x.cpu(), y.cpu()), what
    assert torch.cuda.current_device() == 0


def test_threads_on_two_streams(device: str) -> None:
    q, k, v = make_qkv(1, 2, 2, 300, 300, 64, dtype=F16, device=device)
    masks = [torch.rand(300, 300, device=device) < 0.1 * (i + 1) for i in range(8)]
    expected = [attention(q, k, v, m.clone()) for m in masks]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(50):
                if not torch.equal(attention(q, k, v, masks[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thousand_steps_allocate_nothing(device: str) -> None:
    q, k, v = make_qkv(2, 4, 2, 500, 500, 64, dtype=F16, device=device, requires_grad=True)
    assert explain(q, k, v, causal()).backend in ("hopper", "triton")
    used = []
    for step in range(1000):
        ids = (torch.arange(500, device=device) + step) // 90
        mask = (ids[:, None] == ids) & (torch.rand(500, 500, device=device) < 0.9)
        o = attention(q, k, v, mask)
        o.sum().backward()
        q.grad = k.grad = v.grad = None
        del o, mask, ids
        if step % 50 == 49:
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
    assert max(used[4:]) == min(used[4:]), used
