"""Packing on a GPU is packing, field by field; and what only a GPU can show: memory, synchronisation, compilation."""

import sys
import threading
from pathlib import Path

import pytest
import torch

from anymask import (
    BlockMask,
    block_sparse,
    causal,
    causal_lower_right,
    dilated,
    document,
    extend,
    from_dense,
    from_function,
    gallery,
    key_padding,
    mask_ops,
    pack,
    slice_queries,
    sliding_window,
)
from anymask.block_mask.bits import unpack_bits
from anymask.mask.expr import Mask
from anymask.mask.leaves import Positions
from anymask.mask.program import program_of
from anymask.testing import MASKS, assert_same_block_mask
from tests.helpers.builder_cases import CASES
from tests.helpers.grid import BF16, F16, F32

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


class TestPacking:
    @pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (130, 257), (1024, 640), (999, 2049)], ids=str)
    @pytest.mark.parametrize("name", MASKS)
    def test_is_the_same_on_the_device(self, name: str, q_len: int, kv_len: int, device: str) -> None:
        mask, dense = MASKS[name](2, 3, q_len, kv_len, device=device)
        lens = {"q_len": q_len, "kv_len": kv_len}
        on_device = pack(dense if mask is None else mask, **lens, device=device)
        assert on_device.device.type == "cuda"
        assert_same_block_mask(on_device.to("cpu"), pack(MASKS[name](2, 3, q_len, kv_len)[1], **lens))

    @pytest.mark.parametrize("name", gallery.EXAMPLES)
    def test_of_the_gallery(self, name: str, device: str) -> None:
        mask, expected = gallery.example(name), gallery.packed(name)
        packed = pack(mask, q_len=gallery.LENGTH, kv_len=gallery.LENGTH, device=device)
        assert_same_block_mask(packed.to("cpu"), expected)
        assert_same_block_mask(slice_queries(packed, 100, 700).to("cpu"), slice_queries(expected, 100, 700))
        if mask.is_prefix_stable:
            small = pack(expected.to_dense()[..., :400, :300].to(device))
            assert_same_block_mask(extend(small, mask, gallery.LENGTH, gallery.LENGTH).to("cpu"), expected)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, F16, BF16, F32, torch.float64], ids=str)
    def test_of_any_dtype(self, dtype: torch.dtype, device: str) -> None:
        from anymask.packing import triton as triton_pack

        values = torch.randint(-2, 3, (1, 2, 300, 400), device=device).to(dtype)
        if dtype.is_floating_point:
            values[..., ::7] = -0.0
        assert_same_block_mask(triton_pack.pack_dense(values, 300, 400), pack(values != 0))

    def test_of_any_form(self, device: str) -> None:
        from anymask.packing import triton as triton_pack

        rows = torch.rand(2, 3, 1000, 1040, device=device) < 0.5
        rows[0, 1, :700, :700] = True
        rows[1, 0] = False
        forms = {
            "aligned": rows[:, :, 5:995, 16:1024],
            "broadcast": rows[:1, 1:2, :1, 16:1024].expand(2, 3, 990, 1008),
            "base of 4": rows[:, :, 5:995, 4:1012],
            "columns of 4": rows[..., :996],
            "odd base": rows[:, :, :990, 1:1009],
            "odd length": rows[:, :, :990, :1007],
            "transposed": rows.mT[:, :, 16:1000, :999],
            "every other": rows[:, :, :990, ::2],
            "bytes": (rows * torch.randint(-128, 128, rows.shape, device=device)).to(torch.int8),
            "unsigned bytes": (rows * torch.randint(0, 256, rows.shape, device=device)).to(torch.uint8)[..., 4:],
        }
        for form in forms.values():
            # twice: the second launch is that of a compiled kernel
            for _ in range(2):
                packed = triton_pack.pack_dense(form, *form.shape[2:])
                assert_same_block_mask(packed.to("cpu"), pack((form != 0).cpu()))

    def test_of_a_bool_whose_bytes_are_any(self, device: str) -> None:
        octets = torch.randint(0, 256, (2, 1, 700, 704), device=device, dtype=torch.uint8) * (
            torch.rand(700, 704, device=device) < 0.5
        )
        for form in (octets, octets[..., 4:], octets[..., 1:], octets.mT):
            assert_same_block_mask(pack(form.view(torch.bool)).to("cpu"), pack((form != 0).cpu()))

    def test_of_a_chain_too_long_for_a_kernel(self, device: str) -> None:
        chain = causal(-600)
        for i in range(600):
            chain = chain | Positions(i, i + 1, of_query=i % 2 == 0)
        lens = {"q_len": 700, "kv_len": 700}
        assert_same_block_mask(pack(chain, **lens, device=device).to("cpu"), pack(chain, **lens))

    def test_of_the_largest_ids_and_numbers(self, device: str) -> None:
        ids = torch.tensor([2**63 - 1, -(2**63), 0, -1, 2**63 - 2])[torch.arange(300) // 70]
        lens = {"q_len": 300, "kv_len": 300}
        for mask in (document(ids) & causal(10**20), ~document(ids) | Positions(-(10**20), 7, of_query=True)):
            assert_same_block_mask(pack(mask, **lens, device=device).to("cpu"), pack(mask, **lens))

    def test_saves_what_shares_memory(self, device: str, tmp_path: Path) -> None:
        packed = pack(
            causal() & document(torch.arange(3000, device=device) // 700), q_len=3000, kv_len=3000, device=device
        )
        packed.save(tmp_path / "mask.safetensors")
        assert_same_block_mask(BlockMask.load(tmp_path / "mask.safetensors"), packed.to("cpu"))

    def test_inside_a_compiled_function(self, device: str) -> None:
        program = program_of(causal() & document(torch.arange(300, device=device) // 90))
        assert program is not None
        torch.library.opcheck(mask_ops.pack_op, (*program, 300, 300, torch.device(device)))

    def test_of_nothing(self, device: str) -> None:
        for q_len, kv_len in ((0, 0), (0, 200), (200, 0)):
            tensor = torch.ones(2, 1, q_len, kv_len, dtype=torch.bool)
            assert_same_block_mask(pack(tensor.to(device)).to("cpu"), pack(tensor))

    def test_of_many_tiles(self, device: str) -> None:
        mask = causal() & ~sliding_window(3000)
        lens = {"q_len": 40000, "kv_len": 40000}
        assert_same_block_mask(pack(mask, **lens, device=device).to("cpu"), pack(mask, **lens))

    @pytest.mark.parametrize("length", [1, 300, 512, 5000])
    @pytest.mark.parametrize("name", CASES)
    def test_of_every_builder(self, name: str, length: int, device: str) -> None:
        mask, lens = CASES[name][0](length), {"q_len": length, "kv_len": length}
        assert_same_block_mask(pack(mask, **lens, device=device).to("cpu"), pack(mask, **lens))
        assert_same_block_mask(pack(~mask, **lens, device=device).to("cpu"), pack(~mask, **lens))

    @pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (130, 260), (257, 100), (4300, 900)], ids=str)
    def test_of_expressions_with_planes(self, q_len: int, kv_len: int, device: str) -> None:
        ids, kv_ids = torch.randint(-3, 3, (2, 1, q_len)) << 40, torch.randint(-3, 3, (1, 3, kv_len)) << 40
        documents = document(ids.sort().values, kv_ids=kv_ids.sort().values)
        lengths = key_padding(torch.tensor([kv_len // 2, kv_len - 1]))
        layout = torch.rand(2, 1, -(-q_len // 70), -(-kv_len // 70)) < 0.5
        dense = from_dense(torch.rand(3, q_len, kv_len) < 0.5)
        for mask in (
            causal_lower_right() & documents,
            ~(documents & lengths) | sliding_window(9, 5),
            causal(5) & dense & ~block_sparse(layout, 70) | lengths,
            documents & from_function(lambda b, h, q, k: (q * k + b) % 3 > 0, batch=2),
        ):
            lens = {"q_len": q_len, "kv_len": kv_len}
            assert_same_block_mask(pack(mask, **lens, device=device).to("cpu"), pack(mask, **lens))

    def test_of_many_tiles_of_a_function(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules["anymask.packing.definition"], "GROUP_TILES", 5000)
        lens = {"q_len": 11000, "kv_len": 10000}
        for fn in (lambda b, h, q, k: (q >= k) & (q // 3000 == k // 3000), lambda b, h, q, k: k % 7000 > 300):
            expected = pack(fn(0, 0, torch.arange(11000)[:, None], torch.arange(10000)).expand(11000, 10000))
            assert_same_block_mask(pack(from_function(fn), **lens, device=device).to("cpu"), expected)

    def test_new_numbers_and_lengths_compile_nothing(self, device: str) -> None:
        from anymask.packing.triton.kernels import lists, tiles

        def compiled() -> int:
            kernels = lists.prepare_kernel, tiles.tiles_kernel, tiles.words_kernel
            return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

        counts = set()
        for n in (1000, 1, 2, 16, 129, 384, 4096):
            mask = sliding_window(n, n - 1) & document(torch.arange(n, device=device)[None].expand(n % 3 + 1, n))
            pack(mask & dilated(n, 1), q_len=n, kv_len=n, device=device)
            counts.add(compiled())
        assert len(counts) == 1

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
    def test_waits_once_and_never_for_the_device(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The host reads the totals when they are there; what comes after them it does not wait for."""
        from anymask.packing.triton.answer import Answer

        mask = causal() & document(torch.arange(3000, device=device) // 700) & block_sparse(torch.eye(30).bool(), 100)
        mask = mask.to(device)
        pack(mask, q_len=3000, kv_len=3000, device=device)
        waits, wait = [], Answer.wait
        monkeypatch.setattr(Answer, "wait", lambda *args: waits.append(args) or wait(*args))
        torch.cuda.set_sync_debug_mode("error")
        try:
            pack(mask, q_len=3000, kv_len=3000, device=device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(waits) == 1

    @pytest.mark.parametrize("looks", [0, 2000])
    def test_again_and_again(self, looks: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Launches of a plan go through the driver from the third on; with no look the host waits for the stream."""
        monkeypatch.setattr("anymask.packing.triton.answer.LOOKS", looks)
        for n in range(12):
            ids = torch.arange(2500) // (40 + 100 * n)
            ids[: 200 * (n % 3)] = -1
            lens = {"q_len": 2500, "kv_len": 2500}
            assert_same_block_mask(
                pack(causal() & document(ids.to(device)), **lens, device=device).to("cpu"),
                pack(causal() & document(ids), **lens),
            )
            tensor = torch.rand(2, 1, 640, 700, device=device) < n / 11
            assert_same_block_mask(pack(tensor).to("cpu"), pack(tensor.cpu()))

    def test_on_streams_and_threads(self, device: str) -> None:
        """Whatever the device has to do before, and whoever packs beside it."""
        masks = [causal() & document(torch.arange(2500) // size) for size in (100, 700, 900)]
        lens = {"q_len": 2500, "kv_len": 2500}
        expected, right, big = [pack(mask, **lens) for mask in masks], [], torch.randn(4096, 4096, device=device)

        def many(mask: Mask, packed: BlockMask) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    _ = big @ big
                    assert_same_block_mask(pack(mask, **lens, device=device).to("cpu"), packed)
            right.append(mask)

        threads = [threading.Thread(target=many, args=args) for args in zip(masks, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(right) == len(threads)

    def test_raises_while_a_graph_is_captured(self, device: str) -> None:
        """And packs again afterwards."""
        mask = causal() & document(torch.arange(900, device=device) // 200)
        lens = {"q_len": 900, "kv_len": 900}
        expected = pack(mask, **lens, device=device)
        with pytest.raises(RuntimeError, match="being captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            pack(mask, **lens, device=device)
        torch.cuda.synchronize()
        assert_same_block_mask(pack(mask, **lens, device=device), expected)

    def test_of_a_million_tokens(self, device: str) -> None:
        length = 2**20
        at = torch.arange(length, device=device)
        ids = at // 65000
        mask = causal() & document(ids)
        pack(mask, q_len=length, kv_len=length, device=device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        packed = pack(mask, q_len=length, kv_len=length, device=device)
        assert torch.cuda.max_memory_allocated() - before <= 256 * 2**20

        def defined(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (q[..., :, None] >= k[..., None, :]) & (ids[q][..., :, None] == ids[k][..., None, :])

        # whole lines of tiles, at the borders of documents and of the plane
        for start in (0, 65000 // 128 * 128, 65000 * 9 // 128 * 128, length - 128):
            rows = slice_queries(packed, start, start + 128).to_dense()[0, 0]
            assert torch.equal(rows, defined(at[start : start + 128], at))
        cols, within = packed.cols, torch.arange(128, device=device)
        some = torch.randperm(cols.partial_tiles.numel(), device=device)[:500]
        q = cols.partial_tiles[some].long()[:, None] * 128 + within
        k = cols.tile_row_numbers(1)[some][:, None] * 128 + within
        assert torch.equal(unpack_bits(cols.words[some]), defined(q, k).mT)
        assert cols.partial_tiles.numel() == packed.rows.partial_tiles.numel()
        assert torch.equal(packed.rows.full_offsets[-1], packed.cols.full_offsets[-1])
        assert packed.rows.has_pair.numel() == packed.cols.has_pair.numel() == 0

    def test_memory_by_name(self, device: str) -> None:
        mask = causal() & document(torch.arange(32768, device=device) // 3000)
        pack(mask, q_len=32768, kv_len=32768, device=device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        packed = pack(mask, q_len=32768, kv_len=32768, device=device)
        assert torch.cuda.max_memory_allocated() - before <= packed.nbytes + 8 * 2**20

    def test_memory_of_a_function(self, device: str) -> None:
        mask = from_function(lambda b, h, q, k: (q >= k) & (q // 3000 == k // 3000))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pack(mask, q_len=32768, kv_len=32768, device=device)
        assert torch.cuda.max_memory_allocated() - before <= 500 * 2**20

    def test_memory(self, device: str) -> None:
        tensor = torch.rand(8192, 8192, device=device) < 0.5
        pack(tensor)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        packed = pack(tensor)
        # the words of all tiles, as they are found, and both views
        assert torch.cuda.max_memory_allocated() - before <= 1.1 * (tensor.nbytes / 8 + packed.nbytes)
        assert packed.nbytes <= tensor.nbytes / 4 * 1.01
