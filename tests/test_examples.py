"""Every example runs, is short, and says what it does."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_six() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_runs(path: Path, tmp_path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 60
    assert ast.get_docstring(ast.parse(source))
    if "transformers" in source and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    command = [sys.executable, "-W", "error::UserWarning:anymask", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
