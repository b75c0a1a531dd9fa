"""The benchmark driver must show what is wrong, and time nothing that is."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import anymask
from anymask import backends
from anymask.backends.gpu.arguments import TileConfig
from benchmarks import cases, check, masks, measure, providers, results, run, timing, tune
from benchmarks.cases import BF16, F32, Case, Shape
from docs import draw

SMALL = Shape(2, 2, 256, 16, F32)
EVERY_KIND = {
    kind.name: kind
    for suite in cases.SUITES.values()
    for case in suite.cases
    if (kind := case.mask) is not None and kind.name != "256 documents"
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # threads that spin while they wait take the cores of other tests
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(kind: masks.MaskKind | None = masks.CAUSAL, shape: Shape = SMALL, **changes: object) -> cases.Inputs:
    return cases.make_inputs(Case("case", shape, kind, ("sdpa",), **changes), "cpu")


def main(tmp_path: Path, *arguments: str) -> tuple[int, dict[tuple[str, str, str], dict]]:
    code = run.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), *arguments])
    # NaN is no JSON
    found = json.loads(next(tmp_path.glob("*.json")).read_text(), parse_constant=pytest.fail)
    return code, {(row["case"], row["provider"], row["step"]): row for row in found["rows"]}


@pytest.mark.parametrize("kind", EVERY_KIND.values(), ids=EVERY_KIND)
def test_both_ways_to_write_a_mask_say_the_same(kind: masks.MaskKind) -> None:
    shape = Shape(64, 1, 64, 16, F32) if kind.name == "shifted windows" else Shape(2, 1, 1024, 16, F32)
    p = inputs(kind, shape)
    assert 0 < p.mask.sum() < p.mask.numel() or kind.name in ("decode", "0% of tiles", "window 1024")
    assert torch.equal(p.block_mask.to_dense(), p.mask)
    assert len(p.mask) == (shape.batch if kind.per_sample else 1)
    if kind.per_sample:
        assert not torch.equal(p.mask[0], p.mask[-1])


def test_masks_mean_what_their_names_say() -> None:
    assert inputs(masks.documents(8)).mask.sum() == 8 * (32 * 33 // 2)
    assert 0.45 < inputs(masks.random(0.5)).pairs / (4 * 256 * 256) < 0.55
    tiles = inputs(masks.random_tiles(0.5), replace(SMALL, q_len=512, kv_len=512)).block_mask.tile_counts
    assert tiles == (8, 8, 0)
    assert inputs(masks.DECODE, Shape(1, 1, 1, 16, F32, kv_len=300)).mask.all()
    lengths = inputs(masks.padding("rows", 0.5), Shape(40, 1, 8, 16, F32)).mask[:, 0, 0].sum(-1)
    assert (lengths.min(), lengths.max()) == (4, 8)
    # whole windows, those at the right, at the bottom, and in the corner of an image
    swin = inputs(masks.SHIFTED_WINDOWS, Shape(64, 1, 64, 16, F32)).mask.sum((1, 2, 3))
    assert swin[[0, 7, 56, 63]].tolist() == [4096, 2048, 2048, 1024]


def test_the_table_of_edges_is_complete() -> None:
    shapes = {case.name: (str(case.shape), *case.baselines) for case in cases.SUITES["trades"].cases}
    assert len(shapes) == 24
    assert shapes["fp32, random"] == ("float32 B2 H16 L2048 D64", "efficient", "math")
    assert shapes["D192/128, causal"] == ("bfloat16 B1 H16 L8192 D192/128", "cudnn:causal")
    assert shapes["decoding B4 131072"] == ("bfloat16 B4 H32:8 L1x131072 D128", "cudnn:unmasked")
    assert shapes["FA4, causal L32768"] == ("float16 B1 H16:4 L32768 D128", "fa4", "cudnn:causal")


def test_every_edge_is_built_checked_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = main(tmp_path, "--suite", "trades", "--provider", "anymask")
    assert code == 0
    # decoding has no backward pass
    assert len(rows) == 2 * 24 - 3
    assert {row["status"] for row in rows.values()} == {"ok"}
    row = rows["D256, random", "anymask", "backward"]
    assert row["ms"] > 0
    assert set(row["errors"]) == set(row["error_ratios"]) == {"o", "dq", "dk", "dv"}
    assert 0 < max(row["error_ratios"].values()) < 2
    text = capsys.readouterr().out
    assert "| D256, random |" in text
    assert str(tmp_path) not in (tmp_path / "trades.json").read_text()


@pytest.mark.filterwarnings("ignore")
def test_rivals_that_cannot_say_why(tmp_path: Path) -> None:
    code, rows = main(tmp_path, "--suite", "quick", "--case", "random")
    assert code == 0
    assert rows["random 50%", "flex", ""]["note"] == "the mask has no closed form"
    assert rows["random 50%", "cudnn", ""]["status"] == "failed"
    assert rows["random 50%", "earlier", ""]["status"] == "skipped"
    assert set(rows["random 50%", "flex:dense", "forward"]["errors"]) == {"o"}


def test_builders_are_timed_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["--suite", "build", "--provider", "pack", "--provider", "pack:named", "--provider", "copy"]
    code, rows = main(tmp_path, *wanted)
    assert code == 0
    assert {row["step"] for row in rows.values()} == {"build"}
    assert rows["random 50%, 32768 tokens", "pack", "build"]["baseline"] == "copy"
    honest, other = anymask.pack, anymask.sliding_window(3)
    monkeypatch.setattr(anymask, "pack", lambda mask, **sizes: honest(other, q_len=256, kv_len=256))
    code, rows = main(tmp_path, *wanted)
    assert code == 1
    assert rows["causal, 32768 tokens", "pack:named", ""]["status"] == "wrong"


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_our_wrong_result_fails_the_run_and_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    honest = anymask.attention
    monkeypatch.setattr(anymask, "attention", lambda *a, **k: honest(*a, **k) * factor)
    code, rows = main(tmp_path, "--suite", "cpu", "--case", "random", "--provider", "anymask")
    assert code == 1
    assert [row["status"] for row in rows.values()] == ["wrong"]
    assert "ms" not in rows["random 50%", "anymask", ""]


def test_our_failure_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*a: object, **k: object) -> None:
        raise RuntimeError("a kernel in /some/folder/kernel.py broke\nmore")

    monkeypatch.setattr(anymask, "attention", broken)
    code, rows = main(tmp_path, "--suite", "cpu", "--case", "random", "--provider", "anymask", "--provider", "sdpa")
    assert code == 1
    assert rows["random 50%", "anymask", ""]["note"] == "RuntimeError: a kernel in kernel.py broke"
    assert rows["random 50%", "sdpa", "both"]["ratio"] == 1.0


def test_a_call_that_crashes_the_gpu_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_is_lost", lambda device: True)
    code, rows = main(tmp_path, "--suite", "trades", "--provider", "anymask", "--provider", "cudnn:causal")
    assert code == 1
    # the first call that fails is the last
    assert {case for case, _, _ in rows} == {"fp32, random", "D256, causal"}


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = measure.rows_of

    def interrupted(suite: cases.Suite, case: Case, *rest: object) -> Iterator[results.Row]:
        if case.name == "8 documents":
            raise KeyboardInterrupt
        return honest(suite, case, *rest)

    monkeypatch.setattr(measure, "rows_of", interrupted)
    code, rows = main(tmp_path, "--suite", "cpu", "--provider", "anymask")
    assert code == 1
    assert {case for case, _, _ in rows} == {"random 50%"}


def test_gradients_of_a_rival_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(p: cases.Inputs, base: str, variant: str) -> providers.Prepared:
        return providers.Prepared(lambda q, k, v: scaled_dot_product_attention(q.detach(), k, v, p.mask) + 0 * q, "")

    monkeypatch.setattr("benchmarks.providers.sdpa.attention", wrong)
    suite = cases.SUITES["cpu"]
    case = replace(suite.cases[0], shape=SMALL, passes=("forward", "backward"))
    rows = list(measure.rows_of(replace(suite, rounds=1), case, "cpu", ["sdpa"], None))
    assert [row.step for row in rows] == ["forward"]
    assert "gradients WRONG" in rows[0].note


@pytest.mark.parametrize("name", ["cudnn", "cudnn:unmasked", "cudnn:bias", "cudnn:causal", "flex", "flex:dense"])
@pytest.mark.parametrize("kind", [masks.CAUSAL, masks.padding("rows", 0.1)], ids=["causal", "rows"])
def test_rivals_get_the_mask_or_say_that_they_do_not(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: masks.MaskKind
) -> None:
    # the kernel that a CPU has
    monkeypatch.setattr("benchmarks.providers.sdpa.KERNELS", {})
    p = inputs(kind)
    if name == "cudnn:causal" and kind is not masks.CAUSAL:
        with pytest.raises(providers.Unsupported):
            providers.prepare(name, p)
        return
    prepared, expected = providers.prepare(name, p), partial(check.expected, p)
    assert measure.errors_of(prepared, p, expected).right
    assert not measure.errors_of(replace(prepared, unmasked=not prepared.unmasked), p, expected).right
    if name.startswith("flex"):
        # a CPU does not read the lists of blocks
        assert prepared.attend.keywords["block_mask"].shape[0] == len(p.mask)


@pytest.mark.parametrize("shape", [SMALL, Shape(2, 4, 200, 16, F32, 2, 300, 8), Shape(1, 2, 64, 16, BF16)], ids=str)
@pytest.mark.parametrize("scores", [2**26, 300 * 100])
def test_every_result_is_compared(shape: Shape, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SCORES", scores)
    p = inputs(masks.random(0.5), shape)
    out = anymask.attention(p.q, p.k, p.v, p.block_mask)
    found = out, *torch.autograd.grad(out, (p.q, p.k, p.v), p.do)
    wanted = check.expected(p)
    assert check.errors(p, found, wanted).right
    for n in range(4):
        damaged = [t.detach().clone() for t in found]
        damaged[n][-1, -1, 50] *= 1.2
        assert not check.errors(p, tuple(damaged), wanted).right


def test_an_empty_mask_is_right_if_all_is_zero() -> None:
    p = inputs(masks.random_tiles(0.0))
    zeros = [torch.zeros_like(t) for t in (p.q, p.q, p.k, p.v)]
    wanted = check.expected(p)
    assert check.errors(p, tuple(zeros), wanted).right
    zeros[1][0, 0, 3, 0] = 1.0
    assert not check.errors(p, tuple(zeros), wanted).right


def test_a_mask_too_long_for_a_tensor_is_checked_on_rows_of_tiles() -> None:
    p = replace(inputs(masks.documents(16), replace(SMALL, q_len=4000, kv_len=4000)), mask=None)
    assert check.mask_is(p.block_mask, p)
    wrong = anymask.pack(anymask.causal(offset=-1), q_len=4000, kv_len=4000)
    assert not check.mask_is(wrong, p)


def test_the_ratio_is_to_the_fastest_rival_with_the_mask() -> None:
    case = Case("case", SMALL, masks.CAUSAL, ("cudnn", "cudnn:unmasked", "flex"))
    times = {"anymask": 3.0, "cudnn": 6.0, "flex": 4.0, "cudnn:unmasked": 1.0}
    rows = [results.Row("s", "case", "", n, "forward", "ok", "", ms=ms) for n, ms in times.items()]
    measure.set_ratios(case, rows, {n: n == "cudnn:unmasked" for n in times})
    assert [(row.ratio, row.baseline) for row in rows] == [(0.75, "flex"), (1.5, "flex"), (1.0, "flex"), (0.25, "flex")]
    measure.set_ratios(case, rows[::3], dict.fromkeys(times, True))
    assert (rows[0].ratio, rows[0].baseline) == (3.0, "cudnn:unmasked")


def test_compiled_calls_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options) or f)
    for name in ("anymask", "sdpa"):
        providers.prepare(name, inputs(mode="reduce-overhead"))
        providers.prepare(name, inputs())
    assert asked == [{"dynamic": False, "fullgraph": True, "mode": "reduce-overhead"}] * 2


def test_the_page_has_the_tables_of_the_results() -> None:
    text = draw.PAGE.read_text()
    assert draw.page(text) == text, "run python -m docs.draw"
    assert set(draw.BLOCK.findall(text)) == set(cases.SUITES)
    with pytest.raises(ValueError, match="no table for build"):
        draw.page(text.replace("<!-- table: build -->", ""))


def test_what_is_committed_is_small_and_says_where_it_comes_from() -> None:
    files = [*draw.RESULTS.iterdir(), *draw.PICTURES.iterdir(), draw.DOCS / "mask.png"]
    assert len(files) <= len(cases.SUITES) + 10
    assert sum(file.stat().st_size for file in files) <= 1.5e6
    for path in draw.RESULTS.iterdir():
        found = results.Results.load(path)
        assert {"card", "date", "torch", "triton", "command"} <= set(found.environment)
        known = {case.name for case in cases.SUITES[path.stem].cases}
        assert all(row.case in known and row.provider in providers.PROVIDERS for row in found.rows)


def test_pictures_name_every_bar_and_curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    quick = results.Results.load(draw.RESULTS / "quick.json")
    forward, _ = draw.headline(quick).axes
    assert [label.get_text() for label in forward.get_yticklabels()][-1] == "anymask"
    assert "1.67" in [text.get_text() for text in forward.texts]
    monkeypatch.setattr(draw, "PICTURES", tmp_path / "pictures")
    assert all(path.stat().st_size > 10_000 for path in draw.draw_all())


class Gpu:
    """A host that queues work for a device; both have their clock, in ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.device = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.device, gpu.host)

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.queue(max(0.0, self.device - self.host), 0.0))
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host / 1e3)
        flush = SimpleNamespace(zero_=lambda: self.queue(0.005, 0.08))
        monkeypatch.setattr(timing.torch, "empty", lambda *args, **kwargs: flush)

    def queue(self, host_ms: float, device_ms: float) -> None:
        self.host += host_ms
        if device_ms:
            self.device = max(self.device, self.host) + device_ms


@pytest.mark.parametrize("host_ms", [0.05, 0.4, 1.5])
def test_a_slow_host_is_not_in_the_time_of_the_device(monkeypatch: pytest.MonkeyPatch, host_ms: float) -> None:
    gpu = Gpu(monkeypatch)
    functions = {"a": lambda: gpu.queue(host_ms, 0.2), "b": lambda: gpu.queue(0.01, 3), "c": lambda: gpu.queue(0, 2e3)}
    a, b, slow = timing.cuda_ms(functions, rounds=2, block_ms=15.0).values()
    assert (a.p20, a.p80, b.median, slow.median) == tuple(map(pytest.approx, (0.2, 0.2, 3.0, 2e3)))
    assert gpu.device < 10e3
    wall, host_us = timing.wall_ms(functions, 4, "cuda")["b"]
    assert (wall.median, host_us) == (pytest.approx(3.01), pytest.approx(10))


def test_providers_take_turns() -> None:
    order: list[str] = []
    timing.wall_ms({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, "cpu")
    assert order == ["a", "b", "b", "a"]
    assert timing.Quantiles.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == timing.Quantiles(3.5, 2.0, 5.0)


def test_the_tuner_reaches_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, hopper = pytest.importorskip("triton") and backends.load("triton"), backends.load("hopper")
    table = {family: {which: dict(row) for which, row in rows.items()} for family, rows in triton.tuning.TABLE.items()}
    monkeypatch.setattr(triton.tuning, "TABLE", table)
    monkeypatch.setattr(tune, "current_target", lambda: ("cuda", 90))
    options = next(tune.triton_candidates("dkdv"))
    tune.use_triton("dkdv", 128, options, pointers=False)
    assert triton.tuning.choose("cuda", 90, True, 2, 128, 128, "dkdv") == TileConfig(*options)
    monkeypatch.setattr(hopper.tuning, "FORWARD", dict(hopper.tuning.FORWARD))
    options = list(tune.hopper_candidates("fwd", 64))[-1]
    tune.use_hopper("fwd", 64, options)
    assert hopper.tuning.FORWARD[64] == hopper.tuning.ForwardConfig(*options)
    assert tune.is_close((torch.ones(3),), (torch.ones(3),))
    assert not tune.is_close((torch.full((2,), float("nan")),), (torch.ones(2),))


def fake_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4's functions by dense attention: a mask function is asked about all pairs at once."""

    def dense(q: torch.Tensor, arguments: dict) -> torch.Tensor:
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])[None, :]
        left = arguments.get("window_size", (q.shape[1], 0))[0]
        mask = (i >= j) & (i - j <= left) if {"causal", "window_size"} & set(arguments) else (i >= 0) & (j >= 0)
        if "mask_mod" in arguments:
            asked = [t.expand(mask.shape) for t in (i, j)]
            mask = arguments["mask_mod"](None, None, *(t[None] for t in asked), None, arguments["aux_tensors"])
            mask = mask.view(q.shape[1], -1)
            for key, transposed in (("block_sparse_tensors", "bwd" in arguments), ("block_sparse_tensors_bwd", True)):
                if key in arguments:
                    check_lists(arguments[key], mask.T if transposed else mask)
        return mask

    def check_lists(lists: SimpleNamespace, mask: torch.Tensor) -> None:
        a, b = lists.block_size
        blocks = torch.nn.functional.pad(mask.float(), (0, -mask.shape[1] % b, 0, -mask.shape[0] % a))
        some = blocks.unflatten(0, (-1, a)).unflatten(2, (-1, b)).amax((1, 3)).bool()
        listed = lists.mask_block_cnt + lists.full_block_cnt
        assert torch.equal(listed[0, 0], some.sum(1).int())
        first = lists.mask_block_idx[0, 0, 0, : lists.mask_block_cnt[0, 0, 0]]
        assert some[0, first.long()].all()

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: object) -> tuple[torch.Tensor, ...]:
        swapped = (t.transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(*swapped, dense(q, arguments), scale=arguments["softmax_scale"])
        return out.transpose(1, 2), torch.zeros(1)

    def backward(*tensors: torch.Tensor, **arguments: object) -> tuple[torch.Tensor, ...]:
        q, k, v, _, do, _ = tensors
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            return torch.autograd.grad(forward(*leaves, bwd=True, **arguments)[0], leaves, do)

    same = SimpleNamespace(jit=lambda f: f, scalar_to_ssa=lambda x, kind: x, Int32=lambda x: x)
    kernels = SimpleNamespace(flash_attn_func=forward, utils=same, _flash_attn_bwd=backward)
    made = {"cutlass": same, "cutlass.cute": same, "flash_attn": kernels, "flash_attn.cute": kernels}
    made["flash_attn.cute.interface"] = kernels
    made["flash_attn.cute.block_sparsity"] = SimpleNamespace(BlockSparseTensorsTorch=SimpleNamespace)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    same.cute, kernels.cute = same, kernels
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delitem(sys.modules, "benchmarks.providers.fa4", raising=False)


@pytest.mark.parametrize(
    ("kind", "how"),
    [(None, "built in: {}"), (masks.CAUSAL, "causal"), (masks.window(70), "(70, 0)"), (masks.documents(3), "range"),
     (masks.random(0.5), "transposed bits"), (masks.KINDS[10], "transposed bits")],
)  # fmt: skip
def test_flash_attention_4_gets_the_same_mask(monkeypatch: pytest.MonkeyPatch, kind: object, how: str) -> None:
    fake_flash_attention(monkeypatch)
    p = inputs(kind, replace(SMALL, q_len=900, kv_len=900, heads=1, kv_heads=1))
    prepared = providers.prepare("fa4", p)
    assert how in prepared.note
    assert measure.errors_of(prepared, p, partial(check.expected, p)).right
    monkeypatch.delitem(sys.modules, "benchmarks.providers.fa4")
