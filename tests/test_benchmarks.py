"""The benchmark driver must show what is wrong, missing or missed, and lose nothing when interrupted."""

import csv
import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_benchmark_rivals import SMALL, case_of, one_thread, problem  # noqa: F401  (one_thread is a fixture)

import anymask
from benchmarks import masks, measure, providers, run, sanitize, suites, timing
from benchmarks.results import FAILED, OK, SKIPPED, WRONG, Row


def shrunk(suite: suites.Suite, **changes: object) -> suites.Suite:
    """The suite at a small shape."""
    return replace(suite, cases=tuple(replace(c, shape=SMALL) for c in suite.cases), **changes)


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    one = timing.Quantiles(1.0, 0.9, 1.1)
    monkeypatch.setattr(timing, "cuda_ms", lambda functions, rounds, block_ms: dict.fromkeys(functions, one))
    monkeypatch.setattr(timing, "extra_bytes", lambda function: (1024, 2048))
    monkeypatch.setattr(timing, "host_us", lambda function: 50.0)
    monkeypatch.setattr(timing, "device_work_ms", lambda functions: 0.05)
    monkeypatch.setattr(timing, "wall_ms", lambda functions: one)


@pytest.fixture
def gpu_suite_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's suite, tiny, on the CPU, with invented times: everything but the clock is real."""
    fake_clock(monkeypatch)
    monkeypatch.setattr(run, "quick_cpu", lambda: shrunk(suites.quick_gpu(), ours=("cpu",)))


@pytest.mark.filterwarnings("ignore")
def test_gpu_suite_with_failing_rivals(gpu_suite_on_cpu: None, tmp_path: Path) -> None:
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "quick.json").read_text())
    rows = {(r["group"], r["case"], r["provider"]): r for r in data["rows"]}
    assert rows["attention", "random50", "flex"]["status"] == SKIPPED
    assert rows["attention", "causal", "cudnn"]["status"] == FAILED
    assert rows["attention", "causal", "cudnn"]["note"].startswith("RuntimeError")
    mine = rows["attention", "causal", "anymask:cpu"]
    assert mine["status"] == OK
    flop = 4 * SMALL.batch * SMALL.heads * SMALL.head_dim * (256 * 257 // 2)
    assert mine["values"]["forward_tflops"] == pytest.approx(flop / 1e-3 / 1e12)
    assert mine["values"]["backward_tflops"] == pytest.approx(2.5 * flop / 1e-3 / 1e12)
    assert mine["values"]["forward_tile_tflops"] > mine["values"]["forward_tflops"]
    assert rows["pack", "random50", "flex-build-dense"]["status"] == OK
    for provider in ("anymask", "anymask:symbolic", "anymask:function", "flex-build", "flex-build-eager"):
        assert rows["pack", "causal", provider]["status"] == OK, provider
    assert rows["pack", "random50", "copy"]["values"]["extra_bytes"] == 1024
    text = (tmp_path / "quick.md").read_text()
    assert "not measured" in text
    assert "the mask has no closed form" in text
    assert str(tmp_path) not in text + json.dumps(data)
    assert (tmp_path / "quick-attention-forward.png").stat().st_size > 1000
    lines = list(csv.DictReader((tmp_path / "quick.csv").open()))
    assert len(lines) == len(rows)
    # every file says where it comes from
    assert {line["command"] for line in lines} == {"python -m benchmarks.run --quick --device cpu"}
    assert b"python -m benchmarks.run" in (tmp_path / "quick-attention-forward.png").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_a_call_that_crashes_the_gpu_ends_the_run(
    gpu_suite_on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # the rivals that fail here leave it alone in the first case
    answers = iter([False] * 4)
    monkeypatch.setattr(measure, "is_lost", lambda device: next(answers, True))
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "quick.json").read_text())["rows"]
    # nobody else is blamed, and what was measured before is there
    assert [r["status"] for r in rows].count(FAILED) == 5
    assert rows[-1]["status"] == FAILED
    assert any(r["status"] == OK for r in rows)
    last = f"stopped, as the GPU answers no more calls after {rows[-1]['case']}/{rows[-1]['provider']}: RuntimeError"
    assert last in capsys.readouterr().out
    assert (tmp_path / "quick-attention-forward.png").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore")
def test_the_build_suite_builds_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_clock(monkeypatch)
    monkeypatch.setattr(suites, "DENSE_LENGTH", 512)
    monkeypatch.setattr(measure, "DENSE_LENGTH", 512)
    small = shrunk(suites.build())
    million = replace(small.cases[-1], shape=replace(SMALL, length=1024))
    monkeypatch.setattr(run, "quick_cpu", lambda: replace(small, cases=(*small.cases[:-1], million)))
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "build.json").read_text())
    assert {r["group"] for r in data["rows"]} == {"pack"}
    assert {r["status"] for r in data["rows"]} == {OK}
    assert "0 not measured" in (tmp_path / "build.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_a_mask_by_name_that_is_another_is_wrong(
    gpu_suite_on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(masks.causal(), symbolic=lambda length, device: anymask.causal(offset=1))
    monkeypatch.setattr(run, "quick_cpu", lambda: replace(suites.build(), cases=(case_of(wrong),)))
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = {r["provider"]: r["status"] for r in json.loads((tmp_path / "build.json").read_text())["rows"]}
    assert rows["anymask:symbolic"] == WRONG
    assert rows["anymask"] == rows["anymask:function"] == OK


@pytest.mark.filterwarnings("ignore")
def test_a_yardstick_leaves_the_mask_out_and_is_checked_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_clock(monkeypatch)
    suite = shrunk(suites.hopper("hopper-d64", replace(SMALL, length=8192)), ours=("cpu",))
    one_case = replace(suite, cases=tuple(c for c in suite.cases if c.name == "random50"))
    monkeypatch.setattr(run, "quick_cpu", lambda: one_case)
    plain = providers._sdpa
    monkeypatch.setattr(providers, "_sdpa", lambda problem, kernel, *rest: plain(problem, None, *rest))
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = {r["provider"]: r for r in json.loads((tmp_path / "hopper-d64.json").read_text())["rows"]}
    assert rows["cudnn-unmasked"]["status"] == OK
    pairs = {name: row["values"]["pairs"] for name, row in rows.items()}
    assert pairs["cudnn-unmasked"] == SMALL.batch * SMALL.heads * 256 * 256 > pairs["anymask:cpu"]
    # a yardstick that minds the mask, and a result of ours that is wrong
    masked = replace(providers.find("cudnn")(problem(masks.random(0.5))), unmasked=True)
    monkeypatch.setitem(providers.PROVIDERS, "cudnn-unmasked", lambda problem: masked)
    monkeypatch.setattr(providers.anymask, "attention", lambda q, k, v, *a, **o: q * k * v)
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = {r["provider"]: r for r in json.loads((tmp_path / "hopper-d64.json").read_text())["rows"]}
    assert rows["cudnn-unmasked"]["status"] == WRONG


RACE = (
    "========= Error: Race reported between Read access at _fwd_kernel+0x140 in {}\n"
    "=========     and Write access at _fwd_kernel+0x77e0 in {} [12 hazards]\n"
    "========= RACECHECK SUMMARY: 1 hazards displayed (1 errors, 0 warnings)"
)


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [
        ("x\n========= ERROR SUMMARY: 0 errors\n", 0, "clean"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "clean"),
        ("========= ERROR SUMMARY: 3 errors", 0, "3 errors"),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)", 1, "2 hazards displayed (2 errors)"),
        ("AssertionError: dq\n========= ERROR SUMMARY: 0 errors", 1, "exit code 1: AssertionError: dq"),
        ("Device not supported", 1, "no summary: Device not supported"),
        (RACE.format(*sanitize.handshake()), 0, "clean, but for Triton's handshake"),
        (RACE.format(*sanitize.handshake()), 1, "1 hazards displayed"),
        (
            RACE.format("forward_kernel.py:1", *sanitize.handshake()),
            0,
            "1 hazards displayed (1 errors, 0 warnings) forwa",
        ),
    ],
)
def test_what_a_sanitizer_says(output: str, code: int, expected: str) -> None:
    assert sanitize.verdict(output, code).startswith(expected)
    assert len(set(sanitize.CASES)) >= 10


@pytest.mark.filterwarnings("ignore")
def test_our_wrong_result_fails_the_run(
    gpu_suite_on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = anymask.attention
    monkeypatch.setattr(providers.anymask, "attention", lambda *a, **k: honest(*a, **k) * 1.001)
    assert run.main(["--quick", "--device", "cpu", "--only", "causal/anymask:cpu", "--out", str(tmp_path)]) == 1
    rows = [r for r in json.loads((tmp_path / "quick.json").read_text())["rows"] if r["case"] == "causal"]
    assert rows[0]["status"] == WRONG
    assert "forward_ms" not in rows[0]["values"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_our_failure_fails_the_run(
    gpu_suite_on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(*a: object, **k: object) -> None:
        raise error("a kernel in /some/folder/kernel.py broke\nmore")

    monkeypatch.setattr(providers.anymask, "attention", broken)
    assert run.main(["--quick", "--device", "cpu", "--only", "causal/anymask:cpu", "--out", str(tmp_path)]) == 1
    row = json.loads((tmp_path / "quick.json").read_text())["rows"][0]
    assert row["note"] == f"{error.__name__}: a kernel in kernel.py broke"


def test_cpu_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cpu_ratios", functools.partial(timing.cpu_ratios, rounds=1))
    arguments = ["--quick", "--device", "cpu", "--length", "128", "--only", "random50", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    data = json.loads((tmp_path / "quick.json").read_text())
    mine, rival, flex, pack = data["rows"]
    assert flex["status"] == OK
    assert {key for key in flex["values"] if key.startswith(("error", "backward"))} == {"error_o"}
    assert mine["values"]["both_ratio"] > 0
    assert rival["values"]["both_ratio"] == 1
    assert not any("_ms" in key for row in data["rows"] for key in row["values"])
    # one partial tile of 128 x 128: a bit per pair in each view
    assert pack["values"]["words_bytes"] * 4 == pack["values"]["dense_bytes"]
    assert "stated for other lengths" in (tmp_path / "quick.md").read_text()


def test_interrupted_run_keeps_its_rows_and_resumes(
    gpu_suite_on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--quick", "--device", "cpu", "--only", "/anymask", "--out", str(tmp_path), "--commit", "abc"]
    original = measure.attention_rows
    seen: list[str] = []

    def interrupted(suite: suites.Suite, p: suites.Problem, ready: dict[str, measure.Ready]) -> Iterator[Row]:
        seen.append(p.case.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(suite, p, ready)

    monkeypatch.setattr(measure, "attention_rows", interrupted)
    assert run.main(arguments) == 130
    assert [r["case"] for r in json.loads((tmp_path / "quick.json").read_text())["rows"]] == ["random50", "random50"]
    assert run.main([*arguments, "--resume"]) == 0
    # random50 is not run again, causal is
    assert seen[:3] == ["random50", "causal", "causal"]
    data = json.loads((tmp_path / "quick.json").read_text())
    assert len(data["rows"]) == 15
    assert "resumed" in data["environment"]
    with pytest.raises(SystemExit):
        run.main([*arguments[:-1], "another", "--resume"])


def test_budget_leaves_rows_that_say_so(gpu_suite_on_cpu: None, tmp_path: Path) -> None:
    assert run.main(["--quick", "--device", "cpu", "--budget", "0", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "quick.json").read_text())["rows"]
    assert {(r["status"], r["note"]) for r in rows} == {(SKIPPED, run.BUDGET)}


def test_quantiles_and_turns() -> None:
    assert timing.Quantiles.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == timing.Quantiles(3.5, 2.0, 5.0)
    order: list[str] = []
    found = timing.cpu_ratios({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "a", rounds=2)
    assert order[:4] == ["a", "b", "b", "a"]
    assert found.of["a"] == timing.Quantiles(1.0, 1.0, 1.0)


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
    functions = {"a": lambda: gpu.queue(host_ms, 0.2), "b": lambda: gpu.queue(0.01, 3.0)}
    found = timing.cuda_ms(functions, rounds=2, block_ms=15.0)
    assert found["a"].p20 == pytest.approx(0.2)
    assert found["a"].p80 == pytest.approx(0.2)
    assert found["b"].median == pytest.approx(3.0)


def test_a_call_that_others_interrupt_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # begin and end of each call, in seconds: the second takes 1000 times as long
    clock = iter([0.0, 1e-5, 0.0, 1e-2, 0.0, 1e-5])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.host_us(lambda: None, calls=3, rounds=1) == pytest.approx(10.0)


def test_disturbed_rounds_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([0, 9, 9, 9, 9, 18, 18, 18, 18, 18])
    monkeypatch.setattr(timing, "_others_s", lambda: float(next(used)))
    found = timing.cpu_ratios({"a": lambda: None}, "a", rounds=3)
    assert (found.rounds, found.quiet) == (3, 3)


EARLIER = """
from torch.nn.functional import scaled_dot_product_attention

def flash_attention_custom_mask(q, k, v, mask=None, sm_scale=1.3):
    right = scaled_dot_product_attention(q, k, v, mask, scale=sm_scale)
    wrong = scaled_dot_product_attention(q, k, v, mask, scale=2 * sm_scale)
    return wrong + (right - wrong).detach()
"""


@pytest.mark.filterwarnings("ignore")
def test_the_earlier_package_is_loaded_beside_ours_and_its_wrong_gradients_have_no_speed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import fa2_custom_mask as ours

    package = tmp_path / "fa2_custom_mask"
    package.mkdir()
    (package / "__init__.py").write_text("from fa2_custom_mask.impl import flash_attention_custom_mask\n")
    (package / "impl.py").write_text(EARLIER)
    fake_clock(monkeypatch)
    shape = replace(SMALL, dtype=torch.float16, head_dim=32)
    suite = replace(suites.classic(), cases=(case_of(masks.causal(), "earlier", shape=shape),), ours=("cpu",))
    monkeypatch.setattr(run, "quick_cpu", lambda: suite)
    arguments = ["--quick", "--device", "cpu", "--earlier", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run.main(arguments) == 0
    data = json.loads((tmp_path / "out" / "classic.json").read_text())
    row = next(r for r in data["rows"] if r["provider"] == "earlier")
    assert row["status"] == OK
    assert "gradients WRONG" in row["note"]
    assert "forward_tflops" in row["values"]
    assert not [key for key in row["values"] if key.startswith("backward")]
    assert str(tmp_path) not in json.dumps(data)
    import fa2_custom_mask as still

    assert still is ours
    with pytest.raises(providers.Unsupported, match="__init__"):
        providers.find("earlier")(replace(problem(masks.causal(), shape), earlier=str(tmp_path / "none")))


@pytest.mark.filterwarnings("ignore")
def test_resuming_tries_again_what_was_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu_suite_on_cpu: None
) -> None:
    asked: list[str] = []

    def counted(problem: suites.Problem) -> providers.Prepared:
        asked.append(problem.case.name)
        return providers.sdpa(problem)

    arguments = ["--quick", "--device", "cpu", "--only", "causal/", "--out", str(tmp_path), "--commit", "abc"]
    assert run.main(arguments) == 0
    before = {r["provider"]: r for r in json.loads((tmp_path / "quick.json").read_text())["rows"]}
    assert before["xformers"]["note"] == "xformers is not installed"
    monkeypatch.setitem(providers.PROVIDERS, "xformers", counted)
    monkeypatch.setitem(providers.PROVIDERS, "flex", counted)
    assert run.main([*arguments, "--resume"]) == 0
    data = json.loads((tmp_path / "quick.json").read_text())
    after = {r["provider"]: r for r in data["rows"]}
    assert after["xformers"]["status"] == OK
    # flex had a row
    assert asked == ["causal", "documents8_causal"]
    assert data["environment"]["command"].count("--quick") == 2
