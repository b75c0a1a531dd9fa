"""What is released: the wheel and the sdist are small and whole, and the wheel works where nothing else of it is."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import anymask

pytest.importorskip("build")
pytest.importorskip("hatchling")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
# run in an empty folder, where nothing but the wheel has the name
CALLS = """
import anymask, torch, sys
from pathlib import Path
from fa2_custom_mask import flash_attention_custom_mask
assert Path(anymask.__file__).is_relative_to(sys.argv[1]), anymask.__file__
q, k, v = (torch.randn(1, 2, 140, 16, requires_grad=True) for _ in range(3))
mask = torch.rand(140, 140) < 0.5
o = anymask.attention(q, k, v, mask)
o.sum().backward()
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
torch.testing.assert_close(o, expected)
torch.testing.assert_close(flash_attention_custom_mask(q, k, v, mask), expected)
"""


def _run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(x) for x in command], capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


def _wheel(dist: Path) -> Path:
    return dist / f"anymask-{anymask.__version__}-py3-none-any.whl"


def test_wheel_and_sdist_hold_the_package_and_little_else(dist: Path) -> None:
    sdist = dist / f"anymask-{anymask.__version__}.tar.gz"
    assert set(dist.iterdir()) == {_wheel(dist), sdist}
    assert all(path.stat().st_size < 1e6 for path in dist.iterdir())

    package = {str(path.relative_to(ROOT)) for path in (ROOT / "anymask").rglob("*.py")}
    package |= {"anymask/py.typed", "fa2_custom_mask.py"}
    with zipfile.ZipFile(_wheel(dist)) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == package
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert package <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= names
    assert {name.split("/")[0] for name in names if "/" in name} == {"anymask", "examples"}


def test_the_wheel_works_in_a_fresh_environment(dist: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False)
    scripts = fresh / ("Scripts" if sys.platform == "win32" else "bin")
    python = scripts / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    _run(*pip, _wheel(dist), cwd=tmp_path)
    packages = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # torch and what else this environment has; a path alone, so that no .pth there is read, which may name the checkout
    (packages / "others.pth").write_text(str(Path(torch.__file__).parent.parent))

    _run(python, "-c", CALLS, packages, cwd=tmp_path)
    found = _run(scripts / "anymask", "env", cwd=tmp_path)
    assert re.search(rf"^anymask +{re.escape(anymask.__version__)}$", found, re.MULTILINE)
    assert re.search(r"^cpu +can run$", found, re.MULTILINE)
    assert "2 partial, 1 full" in _run(scripts / "anymask", "show", "causal", "--len", "256", cwd=tmp_path)


def test_the_version_is_one() -> None:
    assert f"## [{anymask.__version__}] - 20" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {anymask.__version__}\n" in (ROOT / "CITATION.cff").read_text()
