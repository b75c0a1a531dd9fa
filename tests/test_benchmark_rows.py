"""From rows to figures, reports, pictures and comparisons: what is missing or missed must show, and nothing is lost."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import figures, report, results, run, suites
from benchmarks.results import FAILED, OK, SKIPPED, WRONG, Results, Row, Rows

OURS = "anymask:triton"
ENV = {"device": "Some GPU", "shape": "a shape", "date": "today", "command": "a command", "commit": "abc", "seed": "0"}


def good_rows() -> Rows:
    """Rows with which every figure of the GPU is reached."""

    def timed(case: str, provider: str, ms: float, **more: float) -> Row:
        values = {f"forward_ms{q}": ms for q in ("", "_p20", "_p80")} | {
            f"backward_ms{q}": 2 * ms for q in ("", "_p20", "_p80")
        }
        return Row("attention", case, provider, OK, "", values | more)

    memory = {"forward_extra_bytes": 5.0, "forward_extra_allocated_bytes": 6.0, "result_bytes": 5.0}
    rows = Rows([timed("random50", name, 4.0) for name in ("flex-dense", "cudnn", "cudnn-bias", "efficient")])
    rows.append(timed("random50", OURS, 2.0, **memory))
    for case in ("causal", "window1024", "documents8_causal"):
        rows += [timed(case, "flex", 1.0), timed(case, OURS, 1.0, **memory)]
    packed = {
        "device_ms": 0.05,
        "wall_ms": 0.2,
        "wall_ms_p20": 0.2,
        "wall_ms_p80": 0.2,
        "words_bytes": 1.0,
        "held_bytes": 1.1,
        "dense_bytes": 4.0,
    }
    rows.append(Row("pack", "random50", "anymask", OK, "", packed))
    return rows


def verdict(rows: Rows, name: str) -> figures.Verdict:
    return next(v for v in figures.judge(figures.gpu_figures(), rows, OURS) if v.figure == name)


def changed(rows: Rows, group: str, case: str, provider: str, **new: object) -> Rows:
    return Rows(replace(r, **new) if (r.group, r.case, r.provider) == (group, case, provider) else r for r in rows)


def test_all_figures_reached() -> None:
    found = figures.judge(figures.gpu_figures(), good_rows(), OURS)
    assert [v.reached for v in found] == [figures.REACHED] * 12


@pytest.mark.parametrize(("ratio", "reached"), [(0.80, "yes"), (0.81, "NO")])
def test_figure_compares_with_the_fastest_rival(ratio: float, reached: str) -> None:
    rows = changed(
        good_rows(), "attention", "random50", "cudnn", values={"forward_ms": 2.0 / ratio, "backward_ms": 9.0}
    )
    found = verdict(rows, "random50 forward")
    assert found.reached == reached
    assert "of cudnn" in found.note


def test_missed_figures() -> None:
    rows = changed(good_rows(), "attention", "causal", "flex", values={"forward_ms": 0.99, "backward_ms": 2.0})
    assert verdict(rows, "causal forward").reached == figures.MISSED
    assert verdict(rows, "causal backward").reached == figures.REACHED
    packed = {"device_ms": 0.101, "wall_ms": 0.2, "words_bytes": 1.01, "held_bytes": 1.1, "dense_bytes": 4.0}
    rows = changed(good_rows(), "pack", "random50", "anymask", values=packed)
    assert verdict(rows, "packing, device time").reached == figures.MISSED
    assert verdict(rows, "random50, words of both views").reached == figures.MISSED


def test_figures_without_rows_are_not_measured() -> None:
    found = figures.judge(figures.gpu_figures(), Rows(), OURS)
    assert {v.reached for v in found} == {figures.NOT_MEASURED}
    assert all(v.note for v in found)


@pytest.mark.parametrize(
    ("status", "reached"), [(FAILED, figures.REACHED), (WRONG, figures.REACHED), (SKIPPED, figures.NOT_MEASURED)]
)
def test_rival_out_of_the_race(status: str, reached: str) -> None:
    rows = changed(good_rows(), "attention", "random50", "efficient", status=status, values={})
    found = verdict(rows, "random50 forward")
    assert found.reached == reached
    assert "efficient" in found.note


def test_our_wrong_result_reaches_nothing() -> None:
    rows = changed(good_rows(), "attention", "causal", OURS, status=WRONG, values={"error_o": 1.0})
    assert verdict(rows, "causal forward").reached == figures.NOT_MEASURED


def test_cpu_figures_need_a_quiet_machine() -> None:
    values = {f"{step}_ratio": 0.5 for step in ("forward", "backward", "both")}
    values |= {f"{step}_{kind}": 9.0 for step in ("forward", "backward", "both") for kind in ("rounds", "quiet_rounds")}
    rows = Rows(
        Row("attention", case, "anymask:cpu", OK, "", dict(values)) for case in ("random50", "documents8_causal")
    )
    rows += [r for r in good_rows() if r.group == "pack"]
    assert {v.reached for v in figures.judge(figures.cpu_figures(), rows, "anymask:cpu")} == {figures.REACHED}
    rows[0].values["both_quiet_rounds"] = 2.0
    found = figures.judge(figures.cpu_figures(), rows, "anymask:cpu")
    assert [v.reached for v in found] == [figures.NOT_MEASURED, figures.REACHED, figures.REACHED]
    assert "busy" in found[0].note


@pytest.mark.parametrize("suite", [name for name in suites.GPU_SUITES if name.startswith("hopper")])
def test_hopper_figures_name_rows_that_their_suite_has(suite: str) -> None:
    rows = Rows()
    for job in run.plan(suites.GPU_SUITES[suite](), ("anymask:hopper", "anymask:hopper:deterministic"), ""):
        for group, provider in job.wanted:
            values = {"forward_ms": 1.0, "backward_ms": 1.0, "forward_host_us": 61.0, "inference_host_us": 59.0}
            rows.append(Row(group, job.case.name, provider, OK, "", values))
    verdicts = {v.figure: v for v in figures.judge(figures.hopper_figures(suite), rows, "anymask:hopper")}
    assert figures.NOT_MEASURED not in {v.reached for v in verdicts.values()}
    assert verdicts["forward, host time a call"].reached == figures.REACHED
    assert verdicts["forward, with gradients recorded"].reached == figures.MISSED
    with pytest.raises(SystemExit):
        run.main(["--suite", suite, "--device", "cpu"])


def test_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Results.start(tmp_path / "x.json", dict(ENV))
    found.add(Row("attention", "causal", "a", WRONG, "", {"error_o": math.nan}))
    before = (tmp_path / "x.json").read_text()
    assert json.loads(before)["rows"][0]["values"] == {"error_o": None}

    def torn(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(KeyboardInterrupt):
        found.add(Row("attention", "causal", "b", OK, ""))
    assert (tmp_path / "x.json").read_text() == before
    monkeypatch.undo()
    again = Results.start(tmp_path / "x.json", dict(ENV), resume=True)
    assert math.isnan(again.rows[0].values["error_o"])
    again.add(Row("attention", "causal", "a", OK, "", {"error_o": 0.0}))
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 1


def test_report_shows_missed_as_plainly_as_reached() -> None:
    rows = good_rows()
    rows.find("attention", "causal", "flex").values["forward_ms"] = 0.5
    found = Results(Path("x.json"), ENV, rows)
    text = report.to_markdown(found, figures.judge(figures.gpu_figures(), rows, OURS))
    assert "11 reached, 1 missed, 0 not measured." in text
    assert "| causal forward | ≤ 1.00 x FlexAttention, closed form | 2.000 x | NO |" in text


def test_command_and_reasons_name_no_folders() -> None:
    for arguments in (["--quick", "--out", "/home/me/x"], ["--quick", "--out=/home/me/x"]):
        assert run.command_line(arguments) == "python -m benchmarks.run --quick"
    assert results.reason(OSError("no /home/me/x.py, line 3\nsecond")) == "OSError: no x.py, line 3"
    assert len(results.reason(RuntimeError("x" * 999))) == results.MAX_REASON


def written(path: Path, rows: Rows, **environment: str) -> Path:
    Results(path, ENV | {"suite": "quick"} | environment, rows).save()
    return path


def spread(row: str, ms: float, noise: float = 0.01) -> Row:
    values = {"forward_ms": ms, "forward_ms_p20": ms * (1 - noise), "forward_ms_p80": ms * (1 + noise)}
    return Row("attention", row, OURS, OK, "", values)


def test_two_runs_are_compared_beyond_their_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Rows([spread("a", 1.0), spread("b", 1.0), spread("c", 1.0), spread("d", 1.0, 0.2), spread("e", 1.0)])
    after = Rows([spread("a", 1.1), spread("b", 0.9), spread("c", 1.025), spread("d", 1.1, 0.2), spread("f", 1.0)])
    files = [str(written(tmp_path / f"{n}.json", rows)) for n, rows in enumerate((before, after))]
    assert run.main(["--compare", *files, "--json"]) == 0
    found = {c["row"].split("/")[1]: (c["verdict"], c["ratio"]) for c in json.loads(capsys.readouterr().out)}
    # c moved less than clocks drift, d less than its own spread
    assert found == {
        "a": ("slower", pytest.approx(1.1)),
        "b": ("faster", pytest.approx(0.9)),
        "c": ("same", pytest.approx(1.025)),
        "d": ("same", pytest.approx(1.1)),
        "e": ("lost", None),
        "f": ("appeared", None),
    }
    assert run.main(["--compare", *files]) == 0
    text = capsys.readouterr().out
    assert text.startswith("slower")
    assert "2 of 6 numbers did not change" in text
    other = written(tmp_path / "other.json", after, shape="another")
    (tmp_path / "none.json").write_text("[]")
    for bad, why in ((str(other), "differ in shape"), (str(tmp_path / "none.json"), "no result of this benchmark")):
        with pytest.raises(SystemExit):
            run.main(["--compare", files[0], bad])
        assert why in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, make in suites.GPU_SUITES.items() if make().passes])
def test_every_suite_draws_what_it_measures(name: str, tmp_path: Path) -> None:
    suite = suites.GPU_SUITES[name]()
    assert len({c.name for c in suite.cases}) == len(suite.cases)
    keys = suite.curves.y if suite.curves else ("forward_ms", "backward_ms")
    rows = Rows()
    for n, job in enumerate(run.plan(suite, ("anymask:hopper", "anymask:triton"), "attention/")):
        rows += [Row(g, job.case.name, p, OK, "", dict.fromkeys(keys, 1.0 + n)) for g, p in job.wanted]
    drawn = report.pictures.draw(suite, Results(tmp_path / "x.json", ENV, rows), tmp_path, name)
    assert len(drawn) == len(keys)
    assert all(path.stat().st_size > 10_000 for path in drawn)
    # every rival has a colour of its own kind, the same in all pictures
    assert {row.provider for row in rows} - {"anymask:hopper:deterministic"} <= set(report.pictures.COLOURS)


def test_density_figure_is_the_worst_distance_from_proportion() -> None:
    shares = (0.05, 0.1, 0.5, 1.0)

    def rows(*times: float) -> Rows:
        timed = zip(shares, times, strict=True)
        return Rows(
            Row("attention", f"tiles{100 * s:.0f}", OURS, OK, "", {"forward_ms": t, "backward_ms": t}) for s, t in timed
        )

    good, _ = figures.judge(figures.density_figures(shares), rows(9.0, 1.09, 4.8, 10.0), OURS)
    assert (good.reached, good.measured) == (figures.REACHED, "0.090 x")
    bad, _ = figures.judge(figures.density_figures(shares), rows(9.0, 1.09, 5.6, 10.0), OURS)
    assert bad.reached == figures.MISSED
    assert "at 50%" in bad.note
    none, _ = figures.judge(figures.density_figures(shares), Rows(rows(9.0, 1.09, 5.6, 10.0)[:3]), OURS)
    assert none.reached == figures.NOT_MEASURED
