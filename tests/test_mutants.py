"""The bugs of `python -m tests.mutate` have a place in today's code, and the runner tells a seen one from another."""

import ast
import shutil
from pathlib import Path

import pytest

from tests import mutate
from tests.helpers.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_has_a_place(mutant: Mutant) -> None:
    source = (mutate.ROOT / mutant.file).read_text()
    planted = mutate.plant(mutant, source)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))
    for test in mutant.tests:
        # options stand beside files
        if test.startswith("tests/"):
            assert (mutate.ROOT / test.split("::")[0]).is_file(), test


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 150
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    assert sum(m.gpu for m in MUTANTS) >= 18


def test_a_place_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"0 times in a\.py"):
        mutate.plant(Mutant("gone", "a.py", "x = 1", "x = 2", ("tests/test_a.py",)), "y = 1\n")


def test_the_interpreter_is_on_for_its_tests_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for tests, expected in ((("tests/test_interpreter.py",), "1"), (("tests/test_mask.py",), None)):
        found = mutate.environment(Mutant("name", "a.py", "x", "y", tests), tmp_path)
        assert found.get("TRITON_INTERPRET") == expected
        assert found["PYTHONPATH"] == str(tmp_path)


def test_files_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = mutate.tracked_files()
    assert Path("anymask/api.py") in tracked
    assert Path("pyproject.toml") in tracked
    root = mutate.copy_checkout(tmp_path / "copy")
    (root / "tests" / "__pycache__").mkdir()
    for other in ("tests/__pycache__/test_api.cpython-310.pyc", "picture.png"):
        (root / other).touch()
    (root / "build").mkdir()
    (root / "build" / "left.py").touch()
    monkeypatch.setattr(mutate, "ROOT", root)
    # a folder that is no repository, then a machine that has no git
    assert mutate.tracked_files() == tracked
    monkeypatch.setenv("PATH", "")
    assert mutate.tracked_files() == tracked


@pytest.mark.parametrize(
    ("new", "verdict"), [("a - b", "killed"), ("b + a", "survived"), ("a +", "pytest exit code 2")]
)
def test_verdicts(new: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    (root / "sums.py").write_text("def plus(a, b):\n    return a + b\n")
    (root / "tests" / "test_sums.py").write_text(
        "from sums import plus\n\n\ndef test_plus():\n    assert plus(2, 1) == 3\n"
    )
    monkeypatch.setattr(mutate, "ROOT", root)
    monkeypatch.setattr(mutate, "tracked_files", lambda: [Path("sums.py"), Path("tests/test_sums.py")])
    mutant = Mutant("sum", "sums.py", "a + b", new, ("tests/test_sums.py",))
    (found,) = mutate.run([mutant], gpu=False, jobs=1, limit_s=120)
    assert found.verdict == verdict
    assert (root / "sums.py").read_text().endswith("a + b\n")
    assert mutant.name in mutate.table([found], gpu=False)
    shutil.rmtree(root)
