"""What the pages say runs, exists, and is what was measured."""

import importlib
import importlib.util
import re
import types
from functools import reduce
from pathlib import Path

import pytest
import torch

import anymask

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# the examples of recipes.md are files, which tests/test_examples.py runs; tests/test_gallery.py holds masks.md
WITH_CODE = [p for p in PAGES if "```python" in p.read_text() and p.stem not in ("recipes", "masks")]
# blocks about Hugging Face take a model that the reader has
FREE_NAMES = {
    "AutoModelForCausalLM": types.SimpleNamespace(from_pretrained=lambda name, **options: options),
    "name": "",
}


def _name(path: Path) -> str:
    return path.stem


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def _slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _exists(parts: list[str]) -> bool:
    """Whether a module, or a name in one."""
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return reduce(lambda owner, part: getattr(owner, part, None), parts[length:], found) is not None
    return False


@pytest.mark.parametrize("page", WITH_CODE, ids=_name)
def test_python_blocks_run_one_after_the_other(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = dict(FREE_NAMES)
    for block in blocks:
        code = compile(block, str(page), "exec")
        if "transformers" not in block or importlib.util.find_spec("transformers"):
            exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", _without_code(page.read_text())):
        assert not re.search(r"\s", target), f"{page.name} breaks the line of a link to {target.strip()}"
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", _without_code(file.read_text()), flags=re.MULTILINE)
            assert anchor in {_slug(heading) for heading in headings}, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "journal.md"], ids=_name)
def test_names_of_the_library_exist(page: Path) -> None:
    for name in set(re.findall(r"(?<![\w./-])anymask(?:\.[A-Za-z_]\w*)+", page.read_text())):
        # an operator is written as torch writes it
        assert _exists(name.split(".")) or hasattr(torch.ops.anymask, name.partition(".")[2]), name


def test_masks_of_the_readme_pack() -> None:
    table = README.read_text().partition("## Your mask in one line")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| .* \| (`.*`).* \|$", table, flags=re.MULTILINE)
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


def test_the_readme_is_short_and_its_figures_are_those_of_the_results() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    said = re.search(r"takes \*\*([\d.]+)\*\* of the time.*?\*\*([\d.]+)\*\* backward", text, flags=re.DOTALL)
    assert said
    assert text[: said.start()].count("\n") < 10
    table = (
        (ROOT / "docs/performance.md").read_text().partition("<!-- table: quick -->")[2].partition("<!-- end -->")[0]
    )
    rows = {cells[0].strip(): cells[1:] for cells in (line.strip("|").split("|") for line in table.splitlines())}
    # the first column has the random mask, the last one none
    ours, theirs = (re.findall(r"[\d.]+", cell) for cell in (rows["anymask"][0], rows["cuDNN with the mask"][-1]))
    for ratio, ms, without in zip(said.groups(), ours, theirs, strict=True):
        # two runs differ by as much
        assert float(ratio) == pytest.approx(float(ms) / float(without), abs=0.04)


def test_the_path_of_a_reader_is_complete_and_short() -> None:
    section = README.read_text().partition("## Read the code in half an hour")[2].partition("The\nmathematics")[0]
    files = [ROOT / link for link in re.findall(r"\]\(([^)]+)\)", section)]
    text = "\n".join(file.read_text() for file in files)
    assert len(text.splitlines()) <= 1500
    # a mask, a leaf of it, packing, attention, and the softmax of a kernel with the loop around it
    for part in ("class Mask", "class Band", "def pack_mask", "def pack_bits", "def softmax_step", "def _fwd_kernel"):
        assert part in text, part
    assert "def forward(" in (ROOT / "anymask/backends/reference.py").read_text()
