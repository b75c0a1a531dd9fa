"""Every Triton kernel compiles, without a GPU, for each architecture, keeps its registers and fits shared memory.

The launchers run as they are, on CPU tensors, against a driver that knows only its target; each launch is turned into a
compilation.
"""

import pytest
import torch

pytest.importorskip("triton")

import triton

from anymask import (
    block_sparse,
    causal,
    causal_lower_right,
    dilated,
    document,
    from_dense,
    global_tokens,
    pack,
    sliding_window,
)
from anymask.backends import triton as backend
from anymask.mask.expr import TileGrid
from anymask.mask.leaves import Stride
from anymask.packing import triton as triton_pack
from anymask.packing.triton.answer import Answer, Totals
from tests.helpers import scored
from tests.helpers.compile_only import (
    PASSES,
    TARGETS,
    assert_fits,
    causal_mask,
    compile_passes,
    padded_mask,
    spilled_bytes,
)

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing"),
]


@pytest.mark.parametrize("mask", [causal_mask, padded_mask, lambda: None], ids=["causal", "padded", "none"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_spills(compiled, target, dim, mask):
    if target == "gfx942" and mask is padded_mask:
        pytest.skip("there is no other path for tiles than pointers")
    kernels = compiled(target)
    compile_passes(torch.float16, dim, mask())
    assert_fits(kernels, target, PASSES)
    assert {k.metadata.name: spilled_bytes(k) for k in kernels} == dict.fromkeys(PASSES, 0)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_grouped_heads_spill_little(compiled, target):
    """The loop over a group takes the last registers of dk, dv on sm_90: up to 32 bytes a thread with Triton 3.9."""
    kernels = compiled(target)
    compile_passes(torch.float16, 128, causal_mask(), group=2)
    assert_fits(kernels, target, PASSES)
    assert max(spilled_bytes(k) for k in kernels) <= 32


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_bias_fits(compiled, target):
    """Through pointers, whose addresses take registers."""
    kernels = compiled(target)
    _compile_scores(dense=("by_head",))
    assert_fits(kernels, target, [*PASSES, "_bwd_bias_kernel"])
    if target != "sm_80":
        assert max(spilled_bytes(k) for k in kernels) <= 128


@pytest.mark.parametrize("tables", [("relative",), ("relative_shared", "relative"), ("relative",) * 3], ids=len)
def test_all_that_happens_to_scores_fits(compiled, tables):
    kernels = compiled("sm_90")
    _compile_scores(dense=("by_sample", "keys_by_head"), tables=tables, softcap=3.0, sinks=True, dropout_p=0.1)
    assert_fits(kernels, "sm_90", [*PASSES, *["_bwd_bias_kernel"] * (1 + len(tables))])


def _compile_scores(**kind):
    call = scored.make_call("causal", shape=(2, 2, 2, 300, 304), dims=(128, 128), **kind)
    o, lse = backend.forward(call.q, call.k, call.v, call.mask, 0.1, call.scores)
    rest = call.mask, 0.1, True, call.scores, call.needs
    backend.backward_scores(call.q, call.k, call.v, o, lse, call.do, call.dlse, *rest)


def test_spills_are_seen(compiled, monkeypatch):
    """The helper above is no constant: a config far too large for its warps spills."""
    config = backend.tuning.TileConfig(128, 128, 4, 2)
    monkeypatch.setitem(backend.tuning.TABLE["hopper"]["dkdv"], 128, config)
    kernels = compiled("sm_90")
    compile_passes(torch.float16, 128, causal_mask())
    assert spilled_bytes(kernels[-1]) > 0


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("target", TARGETS)
def test_bf16_fits(compiled, target, dim):
    kernels = compiled(target)
    compile_passes(torch.bfloat16, dim, causal_mask())
    assert_fits(kernels, target, PASSES)


@pytest.mark.parametrize("mask", [padded_mask, lambda *_: None], ids=["padded", "none"])
@pytest.mark.parametrize(("length", "dim"), [(49, 32), (64, 64), (128, 32), (128, 64)])
@pytest.mark.parametrize("target", TARGETS)
def test_windows_fit(compiled, target, length, dim, mask):
    """What a program keeps of 128 queries, 128 keys and 64 dimensions in backward is more than its registers."""
    if length * dim > 64 * 64 and target not in ("sm_90", "sm_100"):
        pytest.skip("they take the kernels over lists")
    kernels = compiled(target)
    compile_passes(torch.bfloat16, dim, mask(length), shape=(2, 2, length), group=2)
    assert_fits(kernels, target, ["_window_fwd_kernel", "_window_bwd_kernel"])
    forward, backward = map(spilled_bytes, kernels)
    assert forward == 0
    # read back once: none of that is in a loop over tiles
    assert backward <= (1280 if target in ("sm_80", "sm_89") else 512)


@pytest.mark.parametrize(("dim", "v_dim"), [(31, 72), (96, 64), (192, 128)])
def test_uneven_dims_compile(compiled, dim, v_dim):
    kernels = compiled("sm_90")
    compile_passes(torch.float16, dim, padded_mask(), v_dim)
    assert_fits(kernels, "sm_90", PASSES)


def test_new_lengths_and_masks_compile_nothing(compiled):
    """A length is no part of a kernel, nor what a mask holds: 40 lengths share one, two where strides are odd."""
    kernels = compiled("sm_90")
    for length in range(4, 164, 4):
        compile_passes(torch.float16, 128, pack(causal(), q_len=length, kv_len=length), shape=(1, 8, length))
    by_name = {name: {id(k) for k in kernels if k.metadata.name == name} for name in PASSES}
    assert {name: len(ids) for name, ids in by_name.items()} == dict.fromkeys(PASSES, 1)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_packing_fits(compiled, monkeypatch, target):
    kernels = compiled(target)
    # what the device would tell
    monkeypatch.setattr(Answer, "wait", lambda *_: Totals(3, 3, 384, 384))
    triton_pack.pack_dense(torch.zeros(1, 1, 384, 384, dtype=torch.bool), 384, 384)
    kinds, words = torch.ones(1, 1, 3, 3, dtype=torch.int8), torch.zeros(3, 128, 4, dtype=torch.int32)
    triton_pack.lists_from_tiles(kinds, words, TileGrid(384, 384, torch.device("cpu")))
    lists = ["scan_kernel", "fill_kernel"]
    dense = ["prepare_kernel", "dense_kernel", *lists, "copy_kernel"]
    assert_fits(kernels, target, [*dense, "prepare_kernel", "tiles_kernel", *lists, "words_kernel"])
    assert_packing_spills_little(kernels, target)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_packing_dense_tensors_of_any_form_fits(compiled, monkeypatch, target):
    kernels = compiled(target)
    monkeypatch.setattr(Answer, "wait", lambda *_: Totals(0, 9, 384, 384))
    tensor = torch.zeros(1, 1, 384, 400, dtype=torch.bool)
    for form in (tensor[..., :384], tensor[..., 4:388], tensor[..., 1:385], tensor.mT, tensor.float(), tensor.double()):
        triton_pack.pack_dense(form, *form.shape[2:])
    dense = [k for k in kernels if k.metadata.name == "dense_kernel"]
    assert len(set(map(id, dense))) == len(dense) == 6
    assert_packing_spills_little(kernels, target)
    if target == "sm_90":
        # all 16 bytes at a time, and none at all one at a time
        assert dense[0].asm["ptx"].count("ld.global.v4.b32") == 32
        assert "ld.global.b8" not in dense[1].asm["ptx"]


def assert_packing_spills_little(kernels, target):
    """On sm_90 a scalar or two that are read back after all loops; elsewhere a few, on AMD into lanes of a vector
    register."""
    assert max(spilled_bytes(k) for k in kernels) <= (8 if target == "sm_90" else 128)


EXPRESSIONS = {
    "causal": lambda n: causal(),
    "documents": lambda n: causal() & document(torch.arange(n) // 100),
    "blocks": lambda n: block_sparse(torch.ones(1, 1, n // 64, n // 64).bool(), 64) | sliding_window(200) & Stride(3),
    "dense": lambda n: ~(causal_lower_right() & from_dense(torch.ones(2, n, n).bool())) | global_tokens(4),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_packing_expressions_fits(compiled, monkeypatch, target, name):
    kernels = compiled(target)
    monkeypatch.setattr(Answer, "wait", lambda *_: Totals(3, 3, 384, 384))
    triton_pack.pack_expression(EXPRESSIONS[name](384), TileGrid(384, 384, torch.device("cpu")))
    lists = ["tiles_kernel", "scan_kernel", "fill_kernel", "words_kernel"]
    assert_fits(kernels, target, ["prepare_kernel", *lists])
    assert_packing_spills_little(kernels, target)


def test_words_of_tiles_fit(compiled):
    kernels = compiled("sm_90")
    space, places = TileGrid(384, 384, torch.device("cpu")), torch.zeros(3, 4, dtype=torch.long)
    words, kinds = torch.zeros(3, 128, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int8)
    triton_pack.words_of_tiles(torch.zeros(3, 128, 128, dtype=torch.bool), places, space, words, kinds)
    assert_fits(kernels, "sm_90", ["tile_words_kernel"])
    assert_packing_spills_little(kernels, "sm_90")


def test_new_numbers_and_lengths_of_an_expression_compile_nothing(compiled, monkeypatch):
    kernels = compiled("sm_90")
    monkeypatch.setattr(Answer, "wait", lambda *_: Totals(3, 3, 1, 1))
    for n in (1, 2, 16, 129, 384, 4096):
        mask = sliding_window(n, n - 1) & document(torch.arange(n)[None].expand(n % 3 + 1, n)) & dilated(n, 1)
        triton_pack.pack_expression(mask, TileGrid(n, n, torch.device("cpu")))
    names = ["prepare_kernel", "tiles_kernel", "scan_kernel", "fill_kernel", "words_kernel"]
    assert {name: len({id(k) for k in kernels if k.metadata.name == name}) for name in names} == dict.fromkeys(names, 1)
