"""The command line: what it prints, writes and returns."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anymask
from anymask import demo, gallery, viz

pytest.importorskip("typer")
pytest.importorskip("safetensors")

from safetensors.torch import save_file
from typer.testing import CliRunner

from anymask.cli import app

run = CliRunner().invoke


def test_demo_shows_the_proof_and_writes_picture_and_numbers(tmp_path: Path) -> None:
    png, numbers = tmp_path / "mask.png", tmp_path / "numbers.json"
    result = run(app, ["demo", "--quick", "--device", "cpu", "--out", str(png), "--json", str(numbers)])
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    assert found["comparison"]["ok"] is True
    assert len(found["losses"]) == found["sizes"]["steps"]
    assert [row["mask"] for row in found["table"]][:1] == ["causal"]
    for text in ("each document alone", "equal", "leaks", "random per head", "mask KiB", str(png)):
        assert text in result.output.replace("\n", " "), text
    assert "…" not in result.output, "a cell of a table is cut"


def test_demo_exits_1_when_the_mask_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.Batch, "mask", lambda self: anymask.causal())
    result = run(app, ["demo", "--quick", "--device", "cpu", "--out", str(tmp_path / "mask.png")])
    assert result.exit_code == 1
    assert "check failed: the comparison of packed and separate documents" in result.output
    assert "equal" not in result.output


def test_demo_exits_1_when_a_number_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TABLE_TOLERANCE", {torch.float32: 1e-9})
    result = run(app, ["demo", "--quick", "--device", "cpu", "--steps", "1", "--out", str(tmp_path / "mask.png")])
    assert result.exit_code == 1
    assert "check failed: causal" in result.output


def test_demo_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(app, ["demo", "--quick", "--device", "cuda"])
    assert result.exit_code == 1
    assert "torch finds no GPU" in result.output
    assert "allowed are auto, cpu, cuda" in run(app, ["demo", "--device", "abacus"]).output
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(app, ["demo", "--quick"])
    assert result.exit_code == 1
    assert "pip install 'anymask[viz]'" in result.output


def test_show_draws_tokens_and_tiles() -> None:
    result = run(app, ["show", "sliding_window", "--window", "1", "--len", "3", "--kv-len", "4"])
    assert result.exit_code == 0
    assert result.output.splitlines()[1:4] == ["█ · · ·", "█ █ · ·", "· █ █ ·"]
    assert result.output.splitlines()[-1] == "░"
    result = run(app, ["show", "causal", "--len", "256"])
    assert result.output.splitlines()[-2:] == ["░ ·", "█ ░"]
    result = run(app, ["show", "causal_lower_right", "--len", "1", "--kv-len", "2"])
    assert result.output.splitlines()[1] == "█ █"


def test_show_reads_a_file(tmp_path: Path) -> None:
    mask, png = tmp_path / "mask.pt", tmp_path / "mask.png"
    torch.save(torch.tensor([[[[True, False]]], [[[False, True]]]]), mask)
    result = run(app, ["show", str(mask), "--plane", "1", "0", "-o", str(png)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[1] == "· █"
    assert png.is_file()


@pytest.mark.parametrize("name", gallery.EXAMPLES)
def test_show_draws_the_gallery(name: str) -> None:
    result = run(app, ["show", name])
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith(viz.to_text(gallery.packed(name)))


def test_show_reads_numpy(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    np.save(tmp_path / "mask.npy", np.eye(2, dtype=bool))
    result = run(app, ["show", str(tmp_path / "mask.npy")])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[1:3] == ["█ ·", "· █"]
    np.save(tmp_path / "float.npy", np.eye(2))
    result = run(app, ["show", str(tmp_path / "float.npy")])
    assert result.exit_code == 1
    assert "has dtype float64; allowed is bool" in " ".join(result.output.split())
    (tmp_path / "cut.npy").write_bytes((tmp_path / "mask.npy").read_bytes()[:-2])
    result = run(app, ["show", str(tmp_path / "cut.npy")])
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_show_reads_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dense = torch.eye(2).bool()
    save_file({"mask": dense}, "dense.safetensors")
    anymask.pack(dense).save("packed.safetensors")
    for name in ("dense.safetensors", "packed.safetensors"):
        result = run(app, ["show", name])
        assert result.exit_code == 0, result.output
        assert result.output.splitlines()[1:3] == ["█ ·", "· █"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["causal", "--window", "3"], "causal has no number window; allowed are offset"),
        (["document", "--ids", "3"], "document has no number ids; allowed are none"),
        (["dilated", "--step", "4"], "dilated also needs window; allowed are step, window"),
        (["chunked", "--size"], "--size is no option"),
        (["chunked", "--size", "x"], "--size x is no option"),
        (["nothing.pt", "--size", "3"], "--size is for a mask by name, not for nothing.pt"),
        (["sliding_window", "--window", "-3"], "left is -3"),
        (["no_such_mask"], "no_such_mask is no file and no mask"),
        (["causal", "--plane", "1", "0"], "plane is (1, 0)"),
        (["float.pt"], "mask has dtype torch.float32"),
        (["dict.pt"], "holds a dict"),
        (["square.pt", "--len", "5"], "q_len is 5"),
        (["tree", "--len", "5"], "parents has length 1024 but q_len is 5"),
        (["cut.safetensors"], "cut.safetensors is no whole safetensors file"),
        (["two.safetensors"], "two.safetensors holds tensors a, b; allowed is anymask.BlockMask"),
    ],
)
def test_show_names_what_does_not_fit(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torch.ones(3, 3), "float.pt")
    torch.save({}, "dict.pt")
    torch.save(torch.ones(3, 3, dtype=torch.bool), "square.pt")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, "two.safetensors")
    Path("cut.safetensors").write_bytes(Path("two.safetensors").read_bytes()[:-3])
    result = run(app, ["show", *arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_env_says_what_can_run_and_why_not() -> None:
    result = run(app, ["env"])
    assert result.exit_code == 0, result.output
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", result.output, re.MULTILINE)
    found = json.loads(run(app, ["env", "--json"]).output)
    assert found["versions"]["anymask"] == anymask.__version__
    assert set(found["backends"]) == set(anymask.backends.NAMES)
    assert found["backends"]["reference"] == "yes"
    if not torch.cuda.is_available():
        assert found["gpus"] == []
        assert found["backends"]["cpu"] == "yes"
        assert "the tensors are on cpu" in found["backends"]["hopper"]
        assert re.search(r"^hopper +not here: the tensors are on cpu", result.output, re.MULTILINE)


def test_module_runs_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "anymask", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"anymask {anymask.__version__}, torch {torch.__version__}")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_named_without_a_traceback(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from anymask.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"anymask: the command line needs {missing}: pip install 'anymask[demo]'"


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/concepts.md"])
def test_examples_of_the_pages_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)


def test_masks_of_the_readme_pack() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.partition("## Your mask in one line")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| .* \| (`.*`) \|$", table, flags=re.MULTILINE)
    lines = [line.replace(r"\|", "|") for cell in cells for line in re.findall(r"`(.*?)`", cell)]
    assert len(lines) >= 25
    numbers = torch.arange(1200).repeat(2, 1)
    names = vars(anymask) | {
        "ids": numbers // 500,
        "keep": numbers < 900,
        "lengths": torch.tensor([900, 500]),
        "cu_seqlens": torch.tensor([0, 300, 1200]),
        "positions": numbers % 500,
        "start": torch.where(numbers < 600, numbers // 300 * 300, 0),
        "end": torch.where(numbers < 600, numbers // 300 * 300 + 300, 0),
        "parents": (numbers[0] - 1) // 2,
        "answers": numbers // 100 % 5,
        "length": 600 // 16 * 16,
        "layout": torch.eye(10, dtype=torch.bool),
        "q_len": 1200,
        "kv_len": 1200,
        "mask_mod": lambda b, h, q_idx, kv_idx: q_idx % 7 >= kv_idx % 5,
        "tensor": torch.eye(1200, dtype=torch.bool),
    }
    for line in lines:
        dense = anymask.pack(eval(line, dict(names)), q_len=1200, kv_len=1200).to_dense()
        assert dense.any(), line
        assert not dense.all(), line


def test_show_as_json() -> None:
    found = json.loads(run(app, ["show", "causal", "--len", "512", "--json"]).output)
    assert (found["q_len"], found["partial"], found["full"], found["empty"]) == (512, 4, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "mask"),
    [
        (["chunked", "--size", "200"], anymask.chunked(200)),
        (["causal", "--offset", "-3"], anymask.causal(-3)),
        (["prefix_lm", "--prefix-len", "100"], anymask.prefix_lm(100)),
        (["dilated", "--step", "4", "--window", "64"], anymask.dilated(4, 64)),
        (["sliding_window", "--window", "9", "--right", "2"], anymask.sliding_window(9, 2)),
        (["neighbourhood_2d", "--shape", "32,32", "--kernel", "5"], anymask.neighbourhood_2d((32, 32), 5)),
    ],
)
def test_numbers_of_a_mask_by_name(arguments: list[str], mask: anymask.Mask) -> None:
    found = json.loads(run(app, ["show", *arguments, "--json"]).output)
    stats = anymask.pack(mask, q_len=1024, kv_len=1024).stats()
    assert (found["partial"], found["full"], found["density"]) == (stats.partial, stats.full, stats.density)
