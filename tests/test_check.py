"""`anymask check`: what it plans, that it fails when it should, that a dead process is one failed case, its reports."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import anymask
from anymask.check import arguments, command, jobs
from anymask.check.jobs import Job, Runner, execute
from anymask.check.plan import FULL, QUICK, plan
from anymask.check.report import CAUSAL, Run, figures, markdown
from anymask.check.tally import Tally
from anymask.check.workers import Worker, run_units
from anymask.testing import Case, Record, properties
from anymask.testing import cases as testing_cases
from anymask.testing.expressions import make_mask, names_of

CPU = Runner("cpu")
CASE = Case("empty_rows", 40, 30, 16)
# a unit each of what the command runs
TINY = [
    [Job("oracle", CASE, (CPU,)), Job("oracle", replace(CASE, mask="causal & ~row"), (CPU,), fuzzed=True)],
    [Job("arguments", CASE, args=(0, 20)), Job("packing", CASE)],
    [Job("repeats", CASE, (CPU,), (2,))],
]


def test_the_full_plan_is_large_enough() -> None:
    units = plan(FULL, "cuda", 0)
    every = [job for unit in units for job in unit]
    oracle = [job for job in every if job.check == "oracle"]
    fuzzed = [job for job in oracle if job.fuzzed]
    # of the backends some do not take a case; the reference always does, and Triton but for fp64
    cases = sum(
        len(job.runners) - 2 for job in oracle if job.case.mask not in CAUSAL and job.case.dtype != torch.float64
    )
    assert cases >= 40_000
    assert len({job.case.mask for job in oracle if not job.fuzzed} - CAUSAL) >= 30
    assert len(fuzzed) >= 20_000
    assert sum(len(names_of(job.case.mask)) > 1 for job in fuzzed) >= 10_000
    # every remainder of 128 by every shift
    far = {(job.case.kv_len % 128, job.args[0]) for job in every if job.check == "far_from_zero"}
    assert len(far) == 128 * 4
    # kernels and packing kernels to compile are few
    assert len({(c.head_dim, c.v_dim, c.dtype) for c in (job.case for job in oracle)}) <= 20
    assert len({job.case.mask for job in fuzzed}) <= FULL.pool
    for check in ("unused_keys_reach_nothing", "repeats", "a_sample_alone", "packing", "memory", "arguments"):
        assert any(job.check == check for job in every), check


def test_a_plan_repeats_and_follows_its_seed() -> None:
    first, again, other = (plan(QUICK, "cpu", seed) for seed in (3, 3, 4))
    # a NaN among the arguments is not equal to itself
    assert repr(first) == repr(again) != repr(other)
    for unit in first:
        for job in unit:
            assert repr(Job.from_json(json.loads(json.dumps(job.to_json())))) == repr(job)
    assert all(job.runners == (Runner("reference"),) for job in plan(QUICK, "cpu", 0, ["reference"])[0] if job.runners)
    with pytest.raises(ValueError, match="--backend is hopper, which does not run on cpu; allowed are cpu, reference"):
        plan(QUICK, "cpu", 0, ["hopper"])


@pytest.fixture
def dropped_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that sees everything."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Any:
        return anymask.attention(q, k, v, **options)

    for module in (testing_cases, properties, arguments):
        monkeypatch.setattr(module, "attention", attention)


def test_a_job_passes_and_counts() -> None:
    tally = execute(Job("oracle", CASE, (CPU, Runner("reference"), Runner("triton"))), "cpu")
    assert tally.cases["oracle"]["cpu"] == {"passed": 1}
    assert tally.cases["oracle"]["triton"] == {"not applicable": 1}
    assert tally.masks == {"empty_rows": 2}
    assert tally.inputs["grid"] == 1
    assert tally.total("passed", "oracle") == 2
    assert {"f32 o max", "f32 dq max", "f32 lse max"} <= set(tally.worst) | set(tally.few)
    assert not tally.failures


@pytest.mark.usefixtures("dropped_mask")
@pytest.mark.parametrize(
    "job",
    [
        Job("oracle", CASE, (CPU,)),
        Job("oracle", replace(CASE, mask="~(causal & random)"), (CPU,), fuzzed=True),
        Job("unused_keys_reach_nothing", replace(CASE, mask="one_pair"), (CPU,), (float("nan"),)),
        Job("emptied_rows_leave_the_others", CASE, (CPU,)),
        Job("high_hidden_scores", CASE, (CPU,)),
        Job("arguments", CASE, args=(0, 40)),
    ],
    ids=lambda job: job.check,
)
def test_a_failure_has_a_line_that_repeats_it(job: Job) -> None:
    tally = execute(job, "cpu")
    assert tally.total("failed") == len(tally.failures) >= 1
    line = tally.failures[0]["python"]
    with pytest.raises(AssertionError):
        exec(line, {})


def test_wrong_packing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("packing", replace(CASE, mask="drawn_document", kv_len=40))
    assert not execute(job, "cpu").failures
    monkeypatch.setattr(
        properties, "pack", lambda mask, **options: anymask.pack(~anymask.causal(), q_len=40, kv_len=40)
    )
    assert "pairs differ" in execute(job, "cpu").failures[0]["error"]


def test_a_sample_that_depends_on_its_batch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    properties.check_a_sample_alone(CASE, "cpu", "cpu")

    def run(inputs: Any, *args: Any) -> Any:
        return jobs.run(inputs, *args)._replace(dv=inputs.v.detach() + len(inputs.q) * 1e-3)

    monkeypatch.setattr(properties, "run", run)
    with pytest.raises(AssertionError, match="dv differs"):
        properties.check_a_sample_alone(CASE, "cpu", "cpu")


def test_memory_of_all_pairs_fails() -> None:
    case = Case("row", 1024, 1024, 16, batch=1)
    properties.check_memory(case, "cpu", "cpu")
    with pytest.raises(AssertionError, match="four times both lengths"):
        properties.check_memory(case, "reference", "cpu")


def test_expressions_are_checked() -> None:
    sizes = 1, 1, 8, 9
    for wrong in ("causal +", "causal + row", "nothing", "causal(3)", "drawn_tree"):
        with pytest.raises(ValueError, match=r"mask is|drawn_tree is for q_len == kv_len"):
            make_mask(wrong, *sizes)
    mask, dense = make_mask("~(causal | row) & column", *sizes, seed=1)
    assert torch.equal(anymask.pack(mask, q_len=8, kv_len=9).to_dense()[0, 0], dense.expand(8, 9))


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("cpu", 1)
    yield made
    made.close()


def test_a_dead_process_is_one_failed_case(worker: Worker) -> None:
    # nobody catches what an unknown property raises
    tally = worker.run([Job("oracle", CASE, (CPU,)), Job("of_no_kind", CASE, (CPU,)), Job("oracle", CASE, (CPU,))])
    assert tally is not None
    assert tally.total("passed", "oracle") == 2
    assert tally.cases["of_no_kind"]["process"] == {"failed": 1}
    (failure,) = tally.failures
    assert "ended with code 1" in failure["error"]
    assert "has no attribute 'check_of_no_kind'" in failure["error"]
    assert "check_of_no_kind(Case(" in failure["python"]


def test_a_process_that_hangs_is_one_failed_case() -> None:
    worker = Worker("cpu", 1, seconds=0.2)
    tally = worker.run([Job("oracle", CASE, (CPU,))])
    worker.close()
    assert tally is not None
    assert tally.failures[0]["error"] == "no result after 0.2 s"


def test_units_that_would_end_too_late_are_dropped() -> None:
    found: list[int] = []
    unit = [Job("oracle", CASE, (CPU,))]
    run_units([(7, unit), (8, unit)], "cpu", 1, 1, lambda n, tally: found.append(n), lambda: None, end=0.0)
    assert found == []
    run_units([(7, unit), (8, unit)], "cpu", 1, 1, lambda n, tally: found.append(n), lambda: None)
    assert sorted(found) == [7, 8]


def _main(*arguments: str) -> int:
    return command.main(["--jobs", "1", *arguments])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "plan", lambda *args: TINY)
    numbers, report, log = (tmp_path / name for name in ("check.json", "check.md", "check.jsonl"))
    arguments = "--device", "cpu", "--resume", str(log), "--json", str(numbers), "--report", str(report)
    assert _main(*arguments) == 0
    found = json.loads(numbers.read_text())
    assert found["passed"]
    assert found["complete"]
    assert found["cases"]["arguments"]["-"] == {"passed": 20}
    assert found["not_causal_cases"] == 2
    assert found["run"]["machine"]["versions"]["torch"] == torch.__version__
    text = report.read_text()
    assert text.startswith("# anymask check: passed\n")
    assert "| repeats | cpu | 1 | 0 | 0 |" in text
    assert "No case failed." in text
    lines = log.read_text().splitlines()
    # all is done but what was cut off
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:50])
    monkeypatch.setattr(command, "run_units", _counted(ran := []))
    assert _main(*arguments) == 0
    assert len(ran) == 1
    assert json.loads(numbers.read_text())["cases"] == found["cases"]
    assert _main(*arguments, "--seed", "9") == 2
    assert "holds another check" in capsys.readouterr().err


def _counted(ran: list[Any]) -> Any:
    def run(units: list[Any], *rest: Any) -> None:
        ran.extend(units)
        run_units(units, *rest)

    return run


def test_the_command_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "plan", lambda *args: [[Job("of_no_kind", CASE, (CPU,))]])
    assert _main("--device", "cpu") == 1
    out = capsys.readouterr().out
    assert out.startswith("# anymask check: 1 cases FAILED")
    assert "check_of_no_kind" in out
    for wrong, message in (
        (["--device", "abacus"], "--device is abacus; allowed are auto, cpu, cuda and cuda:N"),
        (["--device", "cuda:99"], "but torch finds"),
        (["--jobs", "0"], "--jobs is 0; allowed are numbers above 0"),
        (["--seconds", "-1"], "--seconds is -1.0"),
        (["--json", str(tmp_path / "no" / "such.json")], "No such file"),
        (["--backend", "flash"], "invalid choice: 'flash'"),
        (["--quick", "--full"], "not allowed with"),
    ):
        assert command.main(["--device", "cpu", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_it_needs_torch_alone() -> None:
    code = (
        "import sys\n"
        "for name in ('rich', 'typer', 'hypothesis', 'pytest', 'matplotlib', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "from anymask.check import command, plan\n"
        "import anymask.check.worker\n"
        "units = plan.plan(plan.QUICK, 'cpu', 0)\n"
        "assert not anymask.check.jobs.execute(units[0][0], 'cpu').failures\n"
        "sys.exit(command.main(['--help']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


def test_strategies_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "anymask.testing.strategies", raising=False)
    with pytest.raises(ImportError, match="needs hypothesis: pip install hypothesis"):
        importlib.import_module("anymask.testing.strategies")


def test_tallies_add_up_and_keep_the_worst() -> None:
    a, b = Tally(), Tally()
    a.add_record(Record("o", torch.float16, "max", 0.5, 2.0), "first", "cpu")
    b.add_record(Record("o", torch.float16, "max", 0.7, 2.0), "second", "cpu")
    b.add_record(Record("o", torch.float16, "max", 2.2, 4.0), "few rows", "cpu")
    b.count("oracle", "cpu", "failed")
    a.merge(Tally.from_json(json.loads(json.dumps(b.to_json()))))
    assert a.worst == {"f16 o max": (0.7, 2.0, "second", "cpu")}
    assert a.few == {"f16 o max": (2.2, 4.0, "few rows", "cpu")}
    run = Run("anymask check", "today", 0, "cpu", {"versions": {}, "gpus": []}, 1.0, 2, 1)
    assert figures(run, a)["worst_16_bit"] == {"max": 0.7, "rmse": None}
    assert not figures(run, a)["passed"]
    assert "1 of 2 parts" in markdown(run, a)


def test_values_of_the_yardstick_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    # a result that is off in one element fails for its tensor, whatever the others are
    def wrong(*args: Any, **options: Any) -> Any:
        results = true_run(*args, **options)
        return results._replace(dk=_off(results.dk))

    true_run = jobs.run
    monkeypatch.setattr(jobs, "run", wrong)
    (failure,) = execute(Job("oracle", CASE, (CPU,)), "cpu").failures
    assert failure["error"].startswith("AssertionError: dk: max error")


def _off(t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[7] += 0.01
    return t
