"""What is compared: all ways to write a mask mean the same, every rival gets that mask, every result is checked."""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import anymask
from benchmarks import check, masks, providers, suites

SMALL = suites.Shape(2, 2, 256, 16, torch.float32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case_of(mask: masks.MaskKind | None, *rivals: str, shape: suites.Shape = SMALL) -> suites.Case:
    return suites.Case("none" if mask is None else mask.name, shape, mask, rivals)


def problem(mask: masks.MaskKind | None, shape: suites.Shape = SMALL) -> suites.Problem:
    return suites.make_problem(case_of(mask, shape=shape), "cpu", seed=0)


def right_result(p: suites.Problem) -> tuple[Tensor, ...]:
    out = scaled_dot_product_attention(p.q, p.k, p.v, p.mask)
    return out, *torch.autograd.grad(out, (p.q, p.k, p.v), p.do)


CASES = [masks.random(0.5), masks.causal(), masks.window(64), masks.documents(8)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_checker_accepts_right_and_shows_wrong(case: masks.MaskKind) -> None:
    p = problem(case)
    expected = check.references(p)
    found = right_result(p)
    assert check.errors(p, found, expected).right
    for n, name in enumerate(check.NAMES):
        damaged = list(found)
        damaged[n] = found[n].detach().clone()
        # one row of the last checked plane
        damaged[n][-1, -1, 100] *= 1.1
        errors = check.errors(p, tuple(damaged), expected)
        assert not errors.right
        assert errors.worst_row[name] == max(errors.worst_row.values())
        damaged[n][-1, -1, 100, 0] = math.nan
        assert not check.errors(p, tuple(damaged), expected).right


def test_checker_sees_another_mask() -> None:
    p = problem(CASES[0])
    other = replace(p, mask=p.mask.roll(1, 0))
    assert not check.errors(p, right_result(other), check.references(p)).right


@pytest.mark.parametrize("kind", [*masks.kinds(), masks.documents(8)], ids=lambda k: k.name)
@pytest.mark.parametrize("length", [1000, 2048])
def test_all_ways_to_write_a_mask_say_the_same(kind: masks.MaskKind, length: int) -> None:
    if kind.name in ("block_diffusion", "pixels_2d"):
        # blocks, or pixels, fill it
        length = 1 << (length.bit_length() - 1)
    dense = kind.dense(length, torch.Generator().manual_seed(0))
    assert 0 < dense.sum() < dense.numel()
    i, j, zero = torch.arange(length)[:, None], torch.arange(length)[None, :], torch.zeros((), dtype=torch.int64)
    if kind.rule is not None:
        assert torch.equal(kind.rule(length, "cpu")(zero, zero, i, j).expand(length, length), dense)
    if kind.symbolic is not None:
        packed = anymask.pack(kind.symbolic(length, "cpu"), q_len=length, kv_len=length)
        assert torch.equal(packed.to_dense()[0, 0], dense)


def test_masks_mean_what_their_names_say() -> None:
    assert problem(masks.documents(8)).mask.sum() == 8 * (32 * 33 // 2)
    p = problem(masks.random(0.5))
    assert 0.45 < p.pairs / (4 * 256 * 256) < 0.55
    assert p.tile_pairs == 4 * 256 * 256
    p = problem(masks.random_tiles(0.5), replace(SMALL, length=512))
    assert p.tile_pairs == 4 * 512 * 256
    # seven of the fifteen segments fork
    assert (masks._tree(256, "cpu")[0][1:].bincount() == 2).sum() == 7
    assert len(masks.kinds()) >= 12


def test_a_mask_too_long_for_a_tensor_is_checked_on_lines() -> None:
    kind = masks.documents(16)
    rule = kind.rule(4000, "cpu")
    right = anymask.pack(kind.symbolic(4000, "cpu"), q_len=4000, kv_len=4000)
    assert check.lines_match(right, rule)
    wrong = anymask.pack(kind.symbolic(4000, "cpu") & anymask.causal(offset=-1), q_len=4000, kv_len=4000)
    assert not check.lines_match(wrong, rule)


def test_grouped_heads_are_checked_group_by_group() -> None:
    p = problem(masks.causal(), suites.Shape(2, 4, 256, 16, torch.float32, kv_heads=2))
    out = scaled_dot_product_attention(p.q, p.k, p.v, p.mask, enable_gqa=True)
    found = out, *torch.autograd.grad(out, (p.q, p.k, p.v), p.do)
    assert check.errors(p, found, check.references(p)).right
    for n in range(4):
        damaged = [t.detach().clone() for t in found]
        damaged[n][-1, -1, 100] *= 1.1
        assert not check.errors(p, tuple(damaged), check.references(p)).right
    for name in ("sdpa", "flex"):
        prepared = providers.find(name)(p)
        torch.testing.assert_close(prepared.attend(*(t.detach() for t in (p.q, p.k, p.v))), out.detach())


def test_an_empty_mask_is_right_if_all_is_zero() -> None:
    p = problem(masks.random_tiles(0.0))
    zeros = [torch.zeros_like(t) for t in (p.q, p.q, p.k, p.v)]
    assert check.errors(p, tuple(zeros), check.references(p)).right
    zeros[1][0, 0, 3, 0] = 1.0
    assert not check.errors(p, tuple(zeros), check.references(p)).right


@pytest.mark.parametrize("mask_mod", ["closed", "dense"])
def test_flex_gets_the_same_mask(mask_mod: str) -> None:
    for kind in CASES[1:] if mask_mod == "closed" else CASES:
        p = problem(kind)
        q, k, v = (t.detach() for t in (p.q, p.k, p.v))
        p = replace(p, q=q, k=k, v=v)
        prepared = providers.find("flex" if mask_mod == "closed" else "flex-dense")(p)
        torch.testing.assert_close(prepared.attend(q, k, v), scaled_dot_product_attention(q, k, v, p.mask))
        assert "eager" in prepared.note


def test_providers_refuse_what_they_cannot() -> None:
    with pytest.raises(providers.Unsupported, match="closed form"):
        providers.find("flex")(problem(CASES[0]))
    with pytest.raises(providers.Unsupported, match="no mask tensor"):
        providers.find("flash")(problem(CASES[0]))
    with pytest.raises(providers.Unsupported, match="built in"):
        providers.find("cudnn-causal")(problem(CASES[0]))


def test_rivals_that_are_not_there_say_so() -> None:
    p = problem(masks.causal())
    for name, package in (("fa4", "flash-attn-4"), ("flashinfer", "flashinfer-python"), ("xformers", "xformers")):
        with pytest.raises(providers.Unsupported, match=f"{package} is not installed"):
            providers.find(name)(p)
    with pytest.raises(providers.Unsupported, match="--earlier"):
        providers.find("earlier")(p)


def test_flash_attention_4_reads_every_pair_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    # its package needs a GPU to import; the mask functions are Python
    names = ("cutlass", "cutlass.cute", "flash_attn", "flash_attn.cute", "flash_attn.cute.block_sparsity")
    modules = {name: ModuleType(name) for name in (*names, "flash_attn.cute.interface")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name, attributes in {
        "cutlass": {"cute": modules["cutlass.cute"], "Int32": int},
        "cutlass.cute": {"jit": lambda function: function},
        "flash_attn.cute": {"flash_attn_func": None, "utils": SimpleNamespace(scalar_to_ssa=lambda x, dtype: x)},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": dict},
        "flash_attn.cute.interface": {"_flash_attn_bwd": None},
    }.items():
        vars(modules[name]).update(attributes)
    # a module of its own, which no other test finds
    spec = spec_from_file_location("fa4_without_its_package", Path(providers.__file__).parent / "fa4.py")
    assert spec is not None
    assert spec.loader is not None
    fa4 = module_from_spec(spec)
    spec.loader.exec_module(fa4)
    mask = torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) < 0.5
    for mod, made in fa4.READERS.values():
        tensors = [made(mask)]
        # it asks beyond the end too
        seen = [[mod(None, None, [q], [kv], None, tensors) for kv in range(0, 384, 5)] for q in range(0, 384, 3)]
        assert torch.equal(torch.tensor(seen), torch.nn.functional.pad(mask, (0, 184, 0, 184))[::3, ::5])
    # ranges are found in parts of 1024 rows
    at = torch.arange(1100)
    causal = at[:, None] >= at
    assert fa4._built_in(*fa4._ranges(causal))[0] == {"causal": True}
    assert fa4._built_in(*fa4._ranges(causal & (at[:, None] - at <= 9)))[0] == {"window_size": (9, 0)}
    documents = causal & (at[:, None] // 50 == at // 50)
    first, end = fa4._ranges(documents)
    assert fa4._built_in(first, end)[0] == {}
    assert torch.equal((at >= first[:, None]) & (at < end[:, None]), documents)
    assert fa4._ranges(mask) is None
