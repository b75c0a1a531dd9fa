"""What `attention` remembers: when it packs, when it does not, and what it must never take for the same mask."""

from __future__ import annotations

import gc
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import anymask
from anymask import (
    attention,
    causal,
    document,
    explain,
    flash_attention_custom_mask,
    from_dense,
    from_function,
    mask_ops,
    pack,
)
from anymask.packing import cache
from anymask.testing import make_qkv

Q, K, V = make_qkv(2, 4, 2, 10, 20, 8, 6)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One entry for each mask that is packed, from an empty memory on."""
    calls: list[str] = []
    original = cache.pack

    def counted(mask: Any, **kwargs: Any) -> Any:
        # not the mask itself: it would be kept alive
        calls.append(repr(mask))
        return original(mask, **kwargs)

    monkeypatch.setattr(cache, "pack", counted)
    anymask.forget()
    yield calls
    anymask.forget()


def _random(*shape: int) -> Tensor:
    return torch.rand(shape or (10, 20)) < 0.5


def _expected(mask: Tensor) -> Tensor:
    """By a tensor that nobody has seen."""
    return attention(Q, K, V, mask.detach().clone())


class TestHits:
    def test_the_second_call_does_not_pack(self, packs: list[str]) -> None:
        mask = _random()
        first = attention(Q, K, V, mask)
        assert torch.equal(attention(Q, K, V, mask), first)
        explain(Q, K, V, mask)
        assert len(packs) == 1

    def test_views_made_anew_are_one_mask(self, packs: list[str]) -> None:
        mask, keep = _random(), _random(2, 20)
        for _ in range(3):
            attention(Q, K, V, mask[None, None])
            attention(Q, K, V, mask.expand(2, 4, 10, 20))
            attention(Q, K, V, keep[:, None, None])
        assert len(packs) == 3

    def test_masks_that_hold_tensors(self, packs: list[str]) -> None:
        dense, ids = _random(), document(torch.arange(20) // 7, kv_ids=torch.arange(20) // 7)
        q = torch.randn(2, 4, 20, 8)
        for _ in range(3):
            attention(Q, K, V, causal() & from_dense(dense))
            attention(q, K, V, causal() & ids)
        assert len(packs) == 2
        dense[0, 0] = ~dense[0, 0]
        assert torch.equal(attention(Q, K, V, causal() & from_dense(dense)), _expected(dense & (_tril())))
        assert len(packs) == 4

    def test_a_mask_without_tensors(self, packs: list[str]) -> None:
        for _ in range(3):
            attention(Q, K, V, is_causal=True)
            attention(Q, K, V, causal())
            attention(Q, K, V, causal(1) & ~causal(-1))
        attention(Q[:, :, :9], K, V, causal())
        assert len(packs) == 3

    def test_layers_with_checkpointing(self, packs: list[str]) -> None:
        mask, x = causal() & from_dense(_random()), Q.clone().requires_grad_()
        for _ in range(3):
            checkpoint(lambda x: attention(x, K, V, mask), x, use_reentrant=False).sum().backward()
        assert len(packs) == 1

    def test_what_inference_mode_packed_serves_training(self, packs: list[str]) -> None:
        q = Q.clone().requires_grad_()
        for mask in (_random(), causal()):
            with torch.inference_mode():
                o = attention(q, K, V, mask)
            trained = attention(q, K, V, mask)
            assert torch.equal(o, trained)
            trained.sum().backward()
        assert len(packs) == 2


def _tril() -> Tensor:
    return torch.ones(10, 20, dtype=torch.bool).tril()


class TestMisses:
    def test_a_write(self, packs: list[str]) -> None:
        mask = _random()
        view = mask[None]
        attention(Q, K, V, mask)
        for written in (mask, view):
            written[..., 3, :] = ~written[..., 3, :]
            assert torch.equal(attention(Q, K, V, mask), _expected(mask))
        # the fresh copies are gone, and older versions
        assert len(cache.masks) == 1

    def test_lengths(self, packs: list[str]) -> None:
        mask = _random(1, 1, 10, 1)
        attention(Q, K, V, mask)
        attention(Q, K[:, :, :7], V[:, :, :7], mask)
        attention(Q, K, V, mask)
        assert len(packs) == 2

    def test_other_parts_and_strides_of_a_storage(self, packs: list[str]) -> None:
        whole = _random(2, 40, 40)
        parts = [
            whole[0, :10, :20],
            whole[1, :10, :20],
            whole[0, 10:20, :20],
            whole[0, :10, ::2],
            whole[0].T[:10, :20],
            whole[0, :1, :20],
            whole[0, :10, :1],
            whole[:, :10, :20][:, None],
        ]
        for _ in range(2):
            for part in parts:
                assert torch.equal(attention(Q, K, V, part), _expected(part))

    def test_dtypes_of_one_storage(self, packs: list[str]) -> None:
        mask = torch.randint(0, 2, (10, 20)).to(torch.uint8)
        as_bool = mask.view(torch.bool)
        assert torch.equal(flash_attention_custom_mask(Q, K, V, mask), attention(Q, K, V, as_bool))
        # as fp16 it is -0.0
        mask = torch.full((10, 20), -(2**15), dtype=torch.int16)
        for values in (mask, mask.view(torch.float16)):
            assert torch.equal(flash_attention_custom_mask(Q, K, V, values), _expected(values != 0))
        with pytest.raises(ValueError, match=r"mask has dtype torch\.int16"):
            attention(Q, K, V, mask)

    def test_the_address_of_another_dtype_that_is_gone(self) -> None:
        mask = torch.full((10, 20), -(2**15), dtype=torch.int16)
        before = cache._tensor_key(mask)
        # a tensor of its own, which may be where one that was remembered is no more
        view = mask.view(torch.float16)
        del mask
        after = cache._tensor_key(view)
        assert before is not None
        assert after is not None
        assert after._replace(base=before.base) != before

    def test_a_parameter_that_moves(self, packs: list[str]) -> None:
        module = nn.Module()
        module.mask = nn.Parameter(_random(), requires_grad=False)
        attention(Q, K, V, module.mask)
        assert len(cache.masks) == 1
        version = module.mask._version
        # what .to(), .cuda() and .cpu() do: parameter.data = fn(parameter.data)
        module._apply(torch.logical_not)
        assert module.mask._version == version
        assert torch.equal(attention(Q, K, V, module.mask), _expected(module.mask))

    def test_another_storage_and_other_sizes(self, packs: list[str]) -> None:
        mask, other = _random(), _random()
        attention(Q, K, V, mask)
        mask.set_(other)
        assert torch.equal(attention(Q, K, V, mask), _expected(other))
        mask = _random(30, 20)
        view = mask[:10]
        attention(Q, K, V, view)
        mask.resize_(10, 20)
        assert torch.equal(attention(Q, K, V, mask), _expected(mask))
        mask.resize_(40, 20).copy_(_random(40, 20))
        assert torch.equal(attention(Q, K, V, mask[:10]), _expected(mask[:10]))
        mask.untyped_storage().resize_(0)
        mask.untyped_storage().resize_(800)
        mask.copy_(_random(40, 20))
        assert torch.equal(attention(Q, K, V, mask[:10]), _expected(mask[:10]))

    def test_swapped_tensors(self, packs: list[str]) -> None:
        module, new = nn.Module(), _random()
        module.register_buffer("mask", _random())
        attention(Q, K, V, module.mask)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            module.load_state_dict({"mask": new})
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert torch.equal(attention(Q, K, V, module.mask), _expected(new))
        other = _random()
        attention(Q, K, V, other)
        torch.utils.swap_tensors(module.mask, other)
        assert torch.equal(attention(Q, K, V, other), _expected(new))

    def test_data_of_a_buffer(self, packs: list[str]) -> None:
        """Each `.data` counts from 0, and is freed before the next one takes its place in memory."""
        buffer = _random()
        for _ in range(20):
            buffer.copy_(_random())
            assert torch.equal(attention(Q, K, V, buffer.data), _expected(buffer))
        assert len(cache.masks) == 0
        mask = _random()
        mask.logical_not_()
        attention(Q, K, V, mask)
        mask = mask.data
        # as many writes as the entry has seen
        mask.logical_not_()
        assert torch.equal(attention(Q, K, V, mask), _expected(mask))

    def test_memory_that_is_used_again(self, packs: list[str]) -> None:
        """Freed and taken again: tensors have the address of one that was remembered."""
        addresses, used_again = set(), 0
        for _ in range(2000):
            mask = _random()
            used_again += mask.data_ptr() in addresses
            addresses.add(mask.data_ptr())
            assert torch.equal(attention(Q, K, V, mask), attention(Q, K, V, pack(mask)))
            del mask
        assert used_again > 0

    def test_a_function_may_read_what_changes(self, packs: list[str]) -> None:
        table = _random()
        mask = from_function(lambda b, h, q, k: table[q, k])
        for masks in (mask, mask & causal(50)):
            table.logical_not_()
            assert torch.equal(attention(Q, K, V, masks), _expected(table))
        assert len(cache.masks) == 0

    def test_inference_tensors_have_no_version(self, packs: list[str]) -> None:
        with torch.inference_mode():
            mask = _random()
            for _ in range(2):
                expected = attention(Q, K, V, mask.clone())
                assert torch.equal(attention(Q, K, V, mask), expected)
                mask[0] = ~mask[0]
        assert len(cache.masks) == 0

    def test_custom_masks_of_one_tensor_and_bool_ones_do_not_mix(self, packs: list[str]) -> None:
        mask = torch.randint(0, 2, (10, 20))
        expected = attention(Q, K, V, mask != 0)
        for _ in range(2):
            assert torch.equal(flash_attention_custom_mask(Q, K, V, mask), expected)
        assert len(packs) == 2

    def test_an_additive_mask_is_looked_at_again_after_a_write(self, packs: list[str]) -> None:
        mask = torch.ones(10, 20)
        flash_attention_custom_mask(Q, K, V, mask)
        mask[3, 3] = -torch.inf
        for _ in range(2):
            with pytest.raises(ValueError, match="mask is a float tensor that holds -inf, NaN or values up to -10000"):
                flash_attention_custom_mask(Q, K, V, mask)


class TestUncounted:
    """Writes that no version counts: seen after `forget`."""

    def test_through_numpy_and_dlpack(self, packs: list[str]) -> None:
        for write in (lambda t: t.numpy(), lambda t: torch.from_dlpack(t)):
            mask = torch.randint(0, 2, (10, 20)).to(torch.uint8)
            flash_attention_custom_mask(Q, K, V, mask)
            write(mask)[:] = 1 - write(mask)[:]
            anymask.forget()
            assert torch.equal(flash_attention_custom_mask(Q, K, V, mask), _expected(mask != 0))

    def test_by_torch_distributed(self, packs: list[str]) -> None:
        dist = torch.distributed
        if not dist.is_available():
            pytest.skip("torch has no torch.distributed")
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
            try:
                mask = _random()
                attention(Q, K, V, mask)
                version = mask._version
                dist.scatter(mask, [~mask], src=0)
                # the reason why it cannot be seen
                assert mask._version == version
                anymask.forget()
                assert torch.equal(attention(Q, K, V, mask), _expected(mask))
            finally:
                dist.destroy_process_group()


class TestBounds:
    def test_an_entry_dies_with_its_tensor(self, packs: list[str]) -> None:
        mask = _random()
        attention(Q, K, V, mask[None])
        assert len(cache.masks) == 1
        # a view keeps the storage
        view = mask[2:]
        packs.clear()
        del mask
        gc.collect()
        assert len(cache.masks) == 1
        del view
        gc.collect()
        assert len(cache.masks) == 0
        # nor does a call find it, whose tensor may have the same addresses
        assert [found() for found in cache.masks._calls.values()] == [None]

    def test_entries(self) -> None:
        memory, device = cache.MaskCache(max_entries=3), torch.device("cpu")
        masks = [causal(n) for n in range(4)]
        first = [memory.pack(mask, 10, 20, device) for mask in masks[:3]]
        # the second is now the one that was not used for longest
        assert memory.pack(masks[0], 10, 20, device) is first[0]
        memory.pack(masks[3], 10, 20, device)
        assert len(memory) == 3
        assert memory.pack(masks[0], 10, 20, device) is first[0]
        assert memory.pack(masks[1], 10, 20, device) is not first[1]

    def test_bytes(self) -> None:
        one = pack(causal(), q_len=300, kv_len=300).nbytes
        memory, device = cache.MaskCache(max_bytes=2 * one), torch.device("cpu")
        for n in range(4):
            memory.pack(causal(n), 300, 300, device)
            assert memory.nbytes <= 2 * one
        assert len(memory) >= 1
        # one that is too large is kept, or it would be packed in each layer
        large = memory.pack(causal(), 900, 900, device)
        assert memory.pack(causal(), 900, 900, device) is large
        assert len(memory) == 1

    def test_no_tensor_of_the_user_is_kept_alive(self, packs: list[str]) -> None:
        mask = _random()
        attention(Q, K, V, causal() & from_dense(mask))
        assert mask._use_count() == 1

    def test_forget(self, packs: list[str]) -> None:
        mask = _random()
        attention(Q, K, V, mask)
        anymask.forget()
        assert len(cache.masks) == 0
        attention(Q, K, V, mask)
        assert len(packs) == 2


class TestWatched:
    def test_selective_checkpointing(self, packs: list[str]) -> None:
        mul = torch.ops.aten.mul.Tensor

        def save(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if op is mul else CheckpointPolicy.PREFER_RECOMPUTE

        for mask in (_random(), causal(), causal() & from_dense(_random())):
            grads = []
            for contexts in (None, partial(create_selective_checkpoint_contexts, save)):
                anymask.forget()
                x = Q.clone().requires_grad_()

                def call(x: Tensor, mask: Any = mask) -> Tensor:
                    return (attention(x, K, V, mask) * 1.5).sin()

                kwargs = {} if contexts is None else {"context_fn": contexts}
                o = call(x) if contexts is None else checkpoint(call, x, use_reentrant=False, **kwargs)
                grads.append(torch.autograd.grad(o.sum(), x)[0])
            assert torch.equal(*grads)

    def test_what_a_transform_packed_outlives_it(self, packs: list[str]) -> None:
        mask = _random()
        torch.func.grad(lambda x: attention(x, K, V, mask).sum())(Q)
        torch.func.grad(lambda x: attention(x, K, V, causal()).sum())(Q)
        for entry in cache.masks._entries.values():
            assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, entry.packed.tensors()))
        assert torch.equal(attention(Q, K, V, mask), _expected(mask))
        assert torch.equal(attention(Q, K, V, causal()), _expected(_tril()))
        # the copies of `_expected` too
        assert len(packs) == 4

    def test_threads(self, packs: list[str]) -> None:
        masks = [_random(10, 20) for _ in range(4)]
        expected = [_expected(mask) for mask in masks]
        wrong: list[int] = []
        barrier = threading.Barrier(8)

        def work(seed: int) -> None:
            barrier.wait(30)
            for n in range(40):
                i = (seed + n) % 4
                if n % 10 == seed:
                    anymask.forget()
                if not torch.equal(attention(Q, K, V, masks[i]), expected[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(cache.masks) <= 4


def test_a_tensor_that_fitted_a_call_is_checked_for_another(packs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    looked, fitting = [], mask_ops.validate.fitting_mask
    monkeypatch.setattr(mask_ops.validate, "fitting_mask", lambda *args: looked.append(1) or fitting(*args))
    mask, one = _random(2, 4, 1, 20), _random(1, 20)
    for m in (mask, one, mask, one):
        assert torch.equal(attention(Q, K, V, m), _expected(m))
    # both, and the copies of `_expected`
    assert len(looked) == 6
    for sizes, name in (((3, 4, 2, 10, 20), "batch"), ((2, 2, 2, 10, 20), "q_heads"), ((2, 4, 2, 10, 21), "kv_len")):
        with pytest.raises(ValueError, match=name):
            attention(*make_qkv(*sizes, 8, 6), mask)
    more = make_qkv(2, 4, 2, 11, 20, 8, 6)
    assert attention(*more, one).shape[2] == 11
    assert len(packs) == 7
    one.logical_not_()
    assert torch.equal(attention(Q, K, V, one), _expected(one))
    with pytest.raises(ValueError, match="dtype"):
        attention(Q, K, V, one.view(torch.uint8))
