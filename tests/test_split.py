"""Split-KV without a GPU: how many splits a call has, and that its kernels compile and fit every architecture."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

import triton

from anymask import causal_lower_right, pack, sliding_window
from anymask.backends.gpu import split, target
from anymask.backends.gpu.split import splits_of
from tests.helpers.compile_only import assert_fits, spilled_bytes

compiles = [
    pytest.mark.compile,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing"),
]
KERNELS = ["_split_kernel", "_join_kernel"]


@pytest.mark.parametrize(
    ("lines", "rows", "block", "tiles", "expected"),
    [
        # 8 kv heads of one sample, 4 query heads each: 128 programs on 132 multiprocessors
        (8, 4, 16, 64, 16),
        (8, 4, 16, 1024, 16),
        (32, 4, 16, 1024, 4),
        # a split has a tile at least
        (8, 4, 16, 9, 9),
        (8, 4, 16, 1, 1),
        # work tiles enough: of a quarter of the multiprocessors at most nothing is made
        (66, 4, 16, 1024, 2),
        (99, 4, 16, 1024, 1),
        (100, 4, 16, 1024, 1),
        # one line never has more than the partial outputs may take
        (1, 1, 16, 4096, 64),
        # several programs for the rows of a line share its splits
        (8, 256, 64, 1024, 4),
        (8, 2048, 64, 1024, 1),
        # nothing to do
        (0, 4, 16, 64, 1),
        (8, 0, 16, 64, 1),
    ],
)
def test_the_number_of_splits(lines: int, rows: int, block: int, tiles: int, expected: int) -> None:
    assert splits_of(lines, rows, block, tiles, 132) == expected


@pytest.fixture
def gpu_of_132(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors that say that they are on a GPU."""
    monkeypatch.setattr(target, "multiprocessors", lambda device: 132)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _qk(batch: int, q_heads: int, kv_heads: int, q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    q = torch.empty(batch, q_heads, q_len, 128, device="cuda", dtype=torch.float16)
    return q, torch.empty(batch, kv_heads, kv_len, 128, device="cuda", dtype=torch.float16)


LAST = pack(causal_lower_right(), q_len=1, kv_len=8192)
WINDOW = pack(sliding_window(1023, offset=8191), q_len=1, kv_len=8192)
EACH_HEAD = pack(torch.ones(1, 32, 1, 8192, dtype=torch.bool))


@pytest.mark.usefixtures("gpu_of_132")
def test_splits_of_calls() -> None:
    q, k = _qk(1, 32, 8, 1, 8192)
    assert split.count(q, k, None) == split.count(q, k, LAST) == 16
    # tiles that the mask leaves out are not shared
    assert split.count(q, k, WINDOW) == 8
    # heads with masks of their own are not packed
    assert split.count(q, k, EACH_HEAD) == 4
    assert split.count(*_qk(16, 32, 8, 1, 8192), None) == 1
    assert split.count(*_qk(1, 32, 8, 4096, 4096), None) == 1


@pytest.mark.usefixtures("gpu_of_132")
@pytest.mark.parametrize(
    ("q_len", "kv_len", "expected"), [(64, 384, 1), (64, 385, 4), (65, 8064, 1), (65, 8065, 16), (512, 65536, 4)]
)
def test_short_calls_are_not_split(q_len: int, kv_len: int, expected: int) -> None:
    assert split.count(*_qk(1, 4, 4, q_len, kv_len), None) == expected


def test_a_cpu_has_no_splits() -> None:
    assert split.count(torch.empty(1, 32, 1, 128), torch.empty(1, 8, 8192, 128), None) == 1


def compile_split(dtype: torch.dtype, dim: int, q_len: int, v_dim: int | None = None, scale: float = 0.1) -> None:
    """Forward over zeros, a mask with every kind of tile and dead keys: a launcher reads shapes and addresses."""
    q, k = torch.zeros(1, 16, q_len, dim, dtype=dtype), torch.zeros(1, 4, 1024, dim, dtype=dtype)
    keys = torch.arange(1024)
    mask = pack(((keys >= 300) & (keys < 800) & (keys != 700)).expand(q_len, 1024))
    split.forward(q, k, torch.zeros(1, 4, 1024, v_dim or dim, dtype=dtype), mask, scale, 16)


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


class TestCompile:
    pytestmark = compiles

    @pytest.mark.parametrize(
        ("arch", "dtype", "dim", "q_len"),
        [
            *((arch, BF16, 128, q_len) for arch in ("sm_80", "sm_90", "gfx942") for q_len in (1, 16)),
            ("sm_90", F16, 64, 4),
            ("sm_90", F16, 256, 1),
            ("sm_89", BF16, 128, 16),
            ("sm_100", BF16, 128, 1),
            ("sm_90", F32, 64, 1),
            ("sm_80", F32, 128, 1),
            ("sm_89", F32, 256, 1),
            ("gfx942", F32, 128, 1),
        ],
        ids=str,
    )
    def test_fits_and_spills_two_scalars_at_most(self, compiled, arch, dtype, dim, q_len):
        kernels = compiled(arch)
        compile_split(dtype, dim, q_len)
        assert_fits(kernels, arch, KERNELS)
        assert max(spilled_bytes(k) for k in kernels) <= 8

    @pytest.mark.parametrize(("arch", "dim"), [("sm_80", 256), ("sm_90", 256), ("sm_89", 256)])
    def test_64_rows_of_256_fit(self, compiled, arch, dim):
        kernels = compiled(arch)
        compile_split(F16, dim, 16)
        assert_fits(kernels, arch, KERNELS)
        assert max(spilled_bytes(k) for k in kernels) <= 32

    def test_odd_dims_compile(self, compiled):
        kernels = compiled("sm_90")
        compile_split(F16, 31, 3, 72, -0.1)
        assert_fits(kernels, "sm_90", KERNELS)
        assert max(spilled_bytes(k) for k in kernels) == 0

    def test_loads_go_to_shared_memory_and_the_second_kernel_waits(self, compiled):
        kernels = compiled("sm_90")
        compile_split(BF16, 128, 1)
        ptx = [k.asm["ptx"] for k in kernels]
        assert ptx[0].count("cp.async.cg.shared.global") >= 4 * 16
        assert "griddepcontrol.launch_dependents" in ptx[0]
        assert "griddepcontrol.wait" in ptx[1]

    def test_lengths_masks_and_splits_compile_nothing(self, compiled):
        kernels = compiled("sm_90")
        for splits, q_len, length in ((17, 1, 300), (32, 2, 1024), (20, 4, 999)):
            q, k = torch.zeros(1, 8, q_len, 128, dtype=F16), torch.zeros(1, 2, length, 128, dtype=F16)
            split.forward(q, k, k, pack(causal_lower_right(), q_len=q_len, kv_len=length), 0.1, splits)
        assert {name: len({id(k) for k in kernels if k.metadata.name == name}) for name in KERNELS} == dict.fromkeys(
            KERNELS, 1
        )

    def test_dead_keys_are_another_kernel(self, compiled):
        kernels = compiled("sm_90")
        q, k = torch.zeros(1, 8, 1, 128, dtype=F16), torch.zeros(1, 2, 1024, 128, dtype=F16)
        for mask in (pack(causal_lower_right(), q_len=1, kv_len=1024), pack((torch.arange(1024) > 3)[None])):
            split.forward(q, k, k, mask, 0.1, 17)
        assert len({id(k) for k in kernels if k.metadata.name == KERNELS[0]}) == 2
