"""The command line: what it prints, writes and returns."""

import io
import json
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import tensor

import anymask
from anymask import demo, gallery, viz

pytest.importorskip("typer")
pytest.importorskip("safetensors")

from safetensors.torch import save_file
from typer.testing import CliRunner

from anymask.__main__ import print_in_any_encoding
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
    assert "pip install matplotlib" in result.output


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
    assert "has dtype float64; allowed is bool" in result.output
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


# files that a test of bad command lines finds in its folder
def make_files() -> None:
    torch.save(torch.ones(3, 3), "float.pt")
    torch.save({}, "dict.pt")
    torch.save(torch.ones(3, 3, dtype=torch.bool), "square.pt")
    torch.save(torch.ones(3, dtype=torch.bool), "line.pt")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, "two.safetensors")
    save_file({"a": torch.ones(2, 2)}, "one.safetensors")
    anymask.pack(anymask.causal(), q_len=300, kv_len=300).save("packed.safetensors")
    for name in ("two.safetensors", "square.pt"):
        Path(f"cut.{name.split('.')[1]}").write_bytes(Path(name).read_bytes()[:-3])
    for suffix in ("pt", "npy", "safetensors"):
        Path(f"empty.{suffix}").touch()
        Path(f"text.{suffix}").write_text("neither header nor tensor\n" * 3)
    Path("mask.txt").write_text("1 0\n0 1\n")
    Path("folder.pt").mkdir()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["causal", "--window", "3"], 2, "causal takes no --window; allowed are --offset"),
        (["causal", "--ofset", "3"], 2, "causal takes no --ofset, did you mean --offset?"),
        (["causal", "--lenght", "3"], 2, "causal takes no --lenght, did you mean --len?"),
        (["dilated", "--step", "4"], 2, "dilated also needs --window; allowed are --step, --window"),
        (["sliding_window", "--windw", "3"], 2, "sliding_window takes no --windw, did you mean --window?"),
        (["sliding_window", "--window", "3", "--left", "2"], 2, "--window and --left both; allowed is one of them"),
        (["chunked", "--size"], 2, "--size is no option"),
        (["chunked", "--size", "x"], 2, "--size x is no option"),
        (["chunked", "--size", "1,2"], 2, "size is (1, 2)"),
        (["chunked", "--size", "0.5"], 2, "size is 0.5"),
        (["chunked", "--size", "9" * 30], 2, "is too large; allowed are numbers below 2^62"),
        (["chunked", "extra"], 2, "extra is no option"),
        (["document", "--lens", "3,-1"], 2, "--lens is [3, -1]; allowed are 0 and more"),
        (["document", "--lens", "0.5"], 2, "--lens is 0.5; allowed are whole numbers"),
        (["document", "--lens", "1,2", "--ids", "0,0"], 2, "--lens and --ids both; allowed is one of them"),
        (["document", "--lens", "3,4", "--len", "9"], 2, "ids has length 7 but q_len is 9"),
        (["tree", "--parents", "5,6"], 2, "parents"),
        (["neighbourhood_2d", "--shape", "4", "--kernel", "3"], 2, "--shape is 4; allowed are whole numbers"),
        (["from_function", "--batch", "2"], 2, "from_function needs fn, which no number says"),
        (["from_dense", "--tensor", "2"], 2, "from_dense needs tensor, which no number says"),
        (["square.pt", "--size", "3"], 2, "--size is for a mask by name, not for square.pt"),
        (["sliding_window", "--window", "-3"], 2, "left is -3"),
        (["no_such_mask"], 2, "no_such_mask is no file and no mask; allowed are causal, "),
        (["slidingwindow"], 2, "slidingwindow is no file and no mask, did you mean sliding_window?"),
        (["nothing.pt"], 2, "there is no file nothing.pt"),
        (["mask.txt"], 2, "mask.txt has the suffix .txt; allowed are .pt, .pth, .npy, .safetensors"),
        (["causal", "--plane", "1", "0"], 2, "plane is (1, 0)"),
        (["causal", "--plane", "1"], 2, "--plane"),
        (["causal", "--len", "0"], 2, "--len"),
        (["causal", "--len", "9999999999"], 2, "--len"),
        (["causal", "-o", "mask.docx"], 2, "path mask.docx has the suffix .docx; allowed are none and"),
        (["causal", "-o", "nowhere/mask.png"], 1, "path is nowhere/mask.png, but there is no folder nowhere"),
        (["causal", "-o", "folder.pt"], 1, "path is folder.pt, which is a folder"),
        (["folder.pt"], 1, "folder.pt is no regular file"),
        (["float.pt"], 1, "float.pt holds torch.float32 of shape (3, 3); allowed is torch.bool (True = attend)"),
        (["line.pt"], 1, "line.pt holds torch.bool of shape (3,)"),
        (["dict.pt"], 1, "dict.pt holds a dict; allowed are one bool tensor and a BlockMask"),
        (["one.safetensors"], 1, "one.safetensors holds torch.float32"),
        (["square.pt", "--len", "5"], 2, "q_len is 5"),
        (["packed.safetensors", "--len", "5"], 2, "--len is 5 but the mask was packed for 300"),
        (["tree", "--len", "5"], 2, "parents has length 1024 but q_len is 5"),
        (["cut.safetensors"], 1, "cut.safetensors is no whole safetensors file"),
        (["cut.pt"], 1, "cut.pt is no whole tensor or BlockMask that torch.save wrote"),
        (["two.safetensors"], 1, "two.safetensors holds tensors a, b; allowed is anymask.BlockMask"),
        (["text.pt"], 1, "text.pt is no whole tensor or BlockMask that torch.save wrote"),
        (["text.npy"], 1, "text.npy is no whole array that numpy.save wrote"),
        (["text.safetensors"], 1, "text.safetensors is no whole safetensors file"),
        *(
            ([f"empty.{s}"], 1, f"empty.{s} is empty; allowed is a file with a mask")
            for s in ("pt", "npy", "safetensors")
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_show_says_in_one_line_what_does_not_fit(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_files()
    result = run(app, ["show", *arguments])
    assert message in result.output
    assert result.output.startswith("anymask: ")
    assert len(result.output.splitlines()) == 1
    assert result.exit_code == code
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["shwo", "causal"], 2, "No such command 'shwo'"),
        (["show"], 2, "issing argument"),
        (["--lenght"], 2, "No such option: --lenght"),
        (["demo", "--quik"], 2, "No such option: --quik"),
        (["demo", "--steps", "0"], 2, "--steps"),
        (["demo", "--seed", "-1"], 2, "--seed"),
        (["demo", "--device", "cuda:x"], 2, "--device is cuda:x; allowed are auto, cpu, cuda and cuda:N"),
        (["demo", "--out", "mask.docx"], 2, "suffix .docx"),
        (["demo", "--out", "nowhere/mask.png"], 1, "there is no folder nowhere"),
        (["demo", "--json", "nowhere/n.json"], 1, "there is no folder nowhere"),
        (["env", "causal"], 2, "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_commands_say_it_in_one_line(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(app, arguments)
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert result.exit_code == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["pt", "legacy.pt", "npy", "safetensors", "BlockMask.pt"])
def test_no_damaged_file_makes_a_traceback(kind: str, tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    dense, path, rng = torch.eye(5).bool(), tmp_path / f"mask.{kind}", random.Random(0)
    if kind == "npy":
        np.save(path, dense.numpy())
    elif kind == "safetensors":
        anymask.pack(dense).save(path)
    else:
        saved = anymask.pack(dense) if kind == "BlockMask.pt" else dense
        torch.save(saved, path, _use_new_zipfile_serialization=kind != "legacy.pt")
    whole = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            damaged[rng.randrange(min(len(damaged), rng.choice((60, 400, 10**6))))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice((len(whole), rng.randrange(len(whole))))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run(app, ["show", str(path)])
        # some bytes are of no consequence, or make another mask
        assert result.exit_code in (0, 1), (result.output, result.exception)
        assert result.exit_code == 0 or result.output.startswith("anymask: "), result.output


def test_a_saved_mask_of_torch_is_shown(tmp_path: Path) -> None:
    torch.save(anymask.pack(anymask.causal(), q_len=256, kv_len=256), tmp_path / "mask.pt")
    result = run(app, ["show", str(tmp_path / "mask.pt"), "--len", "256"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-2:] == ["░ ·", "█ ░"]


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
    assert done.stderr.strip() == f"anymask: the command line needs {missing}: pip install typer rich"


THREE = torch.arange(3).repeat_interleave(tensor([300, 250, 474]))


@pytest.mark.parametrize(
    ("line", "mask", "lengths"),
    [
        ("document --lens 300,250,474", anymask.document(THREE), (1024, 1024)),
        ("document --cu-seqlens=0,3,8", anymask.document(cu_seqlens=tensor([0, 3, 8])), (8, 8)),
        ("document --ids 0,0,1 --kv-ids 0,1", anymask.document(tensor([0, 0, 1]), kv_ids=tensor([0, 1])), (3, 2)),
        ("shared_prefix --lens 2,3,1", anymask.shared_prefix(tensor([0, 0, 1, 1, 1, 2])), (6, 6)),
        ("key_padding --lens 300,700 --plane 1 0", anymask.key_padding(tensor([300, 700])), (1024, 1024)),
        ("tree --parents -1,0,0,1", anymask.tree(tensor([-1, 0, 0, 1])), (4, 4)),
        ("global_tokens --tokens 3,500", anymask.global_tokens(tensor([3, 500])), (1024, 1024)),
        ("neighbourhood_2d --shape 16,64 --kernel 5", anymask.neighbourhood_2d((16, 64), 5), (1024, 1024)),
        ("neighbourhood_3d --shape 3,5,7 --kernel 3", anymask.neighbourhood_3d((3, 5, 7), 3), (105, 105)),
        ("block_diffusion --block 4 --length 40", anymask.block_diffusion(4, 40), (80, 80)),
    ],
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else "",
)
def test_names_take_lists_and_their_lengths(line: str, mask: anymask.Mask, lengths: tuple[int, int]) -> None:
    found = json.loads(run(app, ["show", *line.split(), "--json"]).output)
    stats = anymask.pack(mask, q_len=lengths[0], kv_len=lengths[1]).stats()
    assert (found["q_len"], found["kv_len"]) == lengths
    assert (found["partial"], found["full"], found["density"]) == (stats.partial, stats.full, stats.density)


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ("", (1024, 1024)),
        ("--len 600", (600, 600)),
        ("--len 300 --kv-len 500", (300, 500)),
        ("--q-len 400", (400, 400)),
    ],
)
def test_random_blocks_take_the_lengths_of_show(options: str, lengths: tuple[int, int]) -> None:
    found = json.loads(run(app, ["show", "random_blocks", "--share", "0.3", *options.split(), "--json"]).output)
    assert (found["q_len"], found["kv_len"]) == lengths


def test_a_picture_is_the_file_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(app, ["show", "causal", "--len", "9", "-o", "picture"])
    assert result.output.splitlines()[-1] == str(tmp_path / "picture")
    assert [path.name for path in tmp_path.iterdir()] == ["picture"]
    assert Path("picture").read_bytes().startswith(b"\x89PNG")


def test_output_of_a_process_that_has_ascii_alone() -> None:
    command = [sys.executable, "-O", "-m", "anymask", "show", "causal", "--len", "384"]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").splitlines()[-2:] == ["# + .", "# # +"]


@pytest.mark.parametrize(
    ("encoding", "errors", "glyphs"),
    [("cp1252", "strict", "# + ·"), ("utf-8", "strict", "█ ░ ·"), ("ascii", "replace", "? ? ?")],
)
def test_output_in_any_encoding(encoding: str, errors: str, glyphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors)
    monkeypatch.setattr(sys, "stdout", stream)
    print_in_any_encoding()
    print("█ ░ ·", flush=True)
    assert stream.buffer.getvalue().decode(encoding).strip() == glyphs


def test_a_name_that_no_encoding_has() -> None:
    command = [sys.executable, "-m", "anymask", "show", "\udcff\N{SNOWMAN}"]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert b"is no file and no mask" in done.stderr
    assert b"Traceback" not in done.stderr


def test_every_character_has_a_plain_form() -> None:
    print_in_any_encoding()
    assert "█░· … ─┼ \udc80\N{SNOWMAN}".encode("ascii", "anymask") == b"#+. ... -- ??"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", "anymask")


def test_no_command_prints_the_help() -> None:
    result = run(app, [])
    assert result.exit_code == 2
    for name in ("demo", "env", "show"):
        assert name in result.output


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
        (["sliding-window", "--window", "9"], anymask.sliding_window(9)),
        (["neighbourhood_2d", "--shape", "32,32", "--kernel", "5"], anymask.neighbourhood_2d((32, 32), 5)),
    ],
)
def test_numbers_of_a_mask_by_name(arguments: list[str], mask: anymask.Mask) -> None:
    found = json.loads(run(app, ["show", *arguments, "--json"]).output)
    stats = anymask.pack(mask, q_len=1024, kv_len=1024).stats()
    assert (found["partial"], found["full"], found["density"]) == (stats.partial, stats.full, stats.density)
