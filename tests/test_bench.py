"""`anymask bench`: what it times, compares and says."""

import json
from pathlib import Path

import pytest
import torch

import anymask
from anymask.testing import make_qkv

pytest.importorskip("typer")

from typer.testing import CliRunner

from anymask import bench
from anymask.cli import app

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS", 1e-3)


def test_it_times_every_way_there_is(tmp_path: Path) -> None:
    sizes = ["--batch", "2", "--q-heads", "4", "--kv-heads", "2", "--len", "70", "--kv-len", "90", "--head-dim", "8"]
    out = tmp_path / "numbers.json"
    result = run(app, ["bench", "--mask", "documents", *sizes, "--v-dim", "16", "--device", "cpu", "--json", str(out)])
    assert result.exit_code == 0, result.output
    numbers = json.loads(out.read_text())
    rows = {row["name"]: row for row in numbers["rows"]}
    assert numbers["shape"] == "float32 B2 H4:2 L70x90 D8/16"
    timed = {name for name, row in rows.items() if row["both_ms"]}
    assert timed == {"anymask, cpu (chosen)", "anymask, reference", "SDPA with the mask", "SDPA, mask left out"}
    assert all(0 < rows[name]["error"] < 1e-5 for name in timed)
    assert "GPU" in rows["anymask, triton"]["note"]
    assert "ratio: to SDPA with the mask" in result.output


def test_a_nan_in_a_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench._run
    monkeypatch.setattr(
        bench, "_run", lambda *a: [t * (1 if i else float("nan")) for i, t in enumerate(honest(*a)[::-1])][::-1]
    )
    rows = list(bench.measure(*make_qkv(1, 1, 1, 20, 20, 8), None, None))
    assert all("WRONG: error nan" in row.note for row in rows if row.error is not None)
    assert not any(row.forward_ms for row in rows)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_reads_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    q, k, v = make_qkv(2, 4, 2, 150, 140, 16)
    for shape in ((150, 140), (2, 1, 150, 140), (1, 4, 150, 140)):
        dense = torch.rand(shape) < 0.5
        found = bench._flex(q, k, dense)(q, k, v)
        torch.testing.assert_close(found, anymask.attention(q, k, v, dense))


def test_a_wrong_result_shows_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = anymask.attention
    monkeypatch.setattr(anymask, "attention", lambda *a, **k: 1.01 * honest(*a, **k))
    q, k, v = make_qkv(1, 2, 2, 40, 40, 8)
    rows = {row.name: row for row in bench.measure(q, k, v, None, None)}
    mine = rows["anymask, cpu (chosen)"]
    assert mine.error == pytest.approx(0.01, rel=1e-2)
    assert "WRONG" in mine.note
    assert mine.forward_ms is None
    assert bench.SDPA not in rows
    assert "ratio: to SDPA, mask left out" in bench.table(list(rows.values()), True)


def test_a_long_problem_is_timed_without_dense_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DENSE_PAIRS", {"cpu": 100})
    q, k, v = make_qkv(1, 2, 2, 40, 40, 8)
    rows = {row.name: row for row in bench.measure(q, k, v, None, None, backward=False)}
    assert "timed up to 100 pairs" in rows["anymask, reference"].note
    mine = rows["anymask, cpu (chosen)"]
    assert mine.forward_ms
    assert (mine.both_ms, mine.error) == (None, None)


def test_it_reads_a_mask_of_yours(tmp_path: Path) -> None:
    mask = torch.rand(2, 1, 40, 50) < 0.5
    torch.save(mask, tmp_path / "mask.pt")
    packed, dense = bench.load_mask(str(tmp_path / "mask.pt"), 2, 3, 40, 50, "cpu")
    assert torch.equal(dense, mask)
    assert torch.equal(packed.to_dense(), mask)
    with pytest.raises(ValueError, match=r"40 x 50; it needs --len 40 --kv-len 50"):
        bench.load_mask(str(tmp_path / "mask.pt"), 2, 3, 50, 50, "cpu")
    with pytest.raises(ValueError, match="2 samples and 1 heads"):
        bench.load_mask(str(tmp_path / "mask.pt"), 3, 3, 40, 50, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "nonsense"], "--mask is 'nonsense'; allowed are a file and none, causal"),
        (["--device", "abacus"], "--device is abacus; allowed are auto, cpu, cuda and cuda:N"),
        (["--dtype", "int8"], "--dtype is int8; allowed are float16"),
        (["--q-heads", "3", "--kv-heads", "2"], "q has 3 heads and k has 2"),
        (["--mask", __file__], "is not what torch.save wrote"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    result = run(app, ["bench", "--device", "cpu", "--len", "8", *arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_tensor_of_another_dtype_is_refused(tmp_path: Path) -> None:
    torch.save(torch.ones(8, 8), tmp_path / "mask.pt")
    result = run(app, ["bench", "--mask", str(tmp_path / "mask.pt"), "--len", "8", "--device", "cpu"])
    assert "holds a torch.float32 [8, 8]; allowed is a bool tensor" in result.output
