"""Imports go downwards only, and the CPU path needs neither Triton nor CUDA."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import anymask

PACKAGE = Path(anymask.__file__).parent
# package-relative prefix -> layer; a module may import from lower layers and from its own
LAYERS = {
    "cli": 9, "__main__": 9, "bench": 8, "check": 8, "demo": 8, "mask_argument": 8,
    "gallery": 7, "collect_env": 7, "testing": 7, "__init__": 6, "integrations": 6,
    "drop_in": 5, "varlen": 5, "api": 5, "traced": 4, "score_ops": 4, "ops": 4, "mask_ops": 4, "validate": 4,
    "calls": 4,
    "backends": 3, "formats": 3, "packing": 2, "viz": 2, "flops": 2, "mask": 1, "block_mask": 1, "scores": 1,
    "direct": 0, "launch": 0, "layout": 0, "plan": 0, "precision": 0, "shapes": 0, "tiles": 0, "vmap": 0,
    "score_vmap": 0,
}  # fmt: skip
BACKENDS = ["reference", "cpu", "triton", "hopper"]
# beside the backends: what those on a GPU share
SHARED = "gpu"


def _modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if "__pycache__" not in path.parts
    }


def _imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, without the package's name; `""` is the package itself."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("anymask").removeprefix(".") for name in names if name.split(".")[0] == "anymask"}


def _layer(name: str) -> int:
    head = name.split(".")[0]
    # a name of the package itself, such as anymask.attention, is as high as its __init__
    return LAYERS.get(head, LAYERS["__init__"])


@pytest.mark.parametrize("module", _modules())
def test_imports_go_down(module: str) -> None:
    assert module.split(".")[0] in LAYERS, f"{module} has no layer; give it one in LAYERS"
    for name in _imports(_modules()[module]):
        assert _layer(name) <= _layer(module), f"{module} imports {name}, which is above it"


@pytest.mark.parametrize("module", [m for m in _modules() if m.startswith("backends.")])
def test_backends_do_not_import_each_other(module: str) -> None:
    own = module.split(".")[1]
    others = [f"backends.{b}" for b in BACKENDS if b != own]
    if own in ("reference", "cpu"):
        others.append(f"backends.{SHARED}")
    for name in _imports(_modules()[module]):
        assert not name.startswith(tuple(others)), f"{module} imports {name}"


def test_every_backend_is_checked_here() -> None:
    found = {m.split(".")[1] for m in _modules() if m.startswith("backends.")} - {"__init__", SHARED}
    assert found == set(BACKENDS) == set(anymask.backends.NAMES)


@pytest.mark.parametrize("module", _modules())
def test_triton_is_imported_where_kernels_are(module: str) -> None:
    tree = ast.parse(_modules()[module].read_text())
    top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
    if any(name.split(".")[0] == "triton" for name in names):
        assert ".kernels." in module or module.startswith("packing.triton")


def test_no_broad_except() -> None:
    for module, path in _modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in ("everything", "Exception", "BaseException"), f"{module}:{node.lineno}"


def _edges() -> dict[str, set[str]]:
    """Which modules of the package each module imports, inside functions too."""
    files = {f"anymask.{module}".removesuffix(".__init__"): path for module, path in _modules().items()}
    edges = {}
    for module, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                # a name of a package is a module of it, or made in its __init__
                found |= {
                    f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in files else node.module for a in node.names
                }
        edges[module] = (found & set(files)) - {module}
    return edges


def _cycle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if none do. Those that nobody needs are taken away by turns."""
    left = dict(edges)
    while left:
        free = [m for m, needs in left.items() if not needs & set(left)]
        if not free:
            return sorted(left)
        for m in free:
            del left[m]
    return []


def test_no_module_imports_itself_in_a_circle() -> None:
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    edges = _edges()
    assert sum(map(len, edges.values())) > 100
    assert not _cycle(edges)


def _fresh(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_import_touches_neither_triton_nor_cuda() -> None:
    _fresh(
        "import sys, anymask, torch\n"
        "assert 'triton' not in sys.modules, 'triton was imported'\n"
        "assert not torch.cuda.is_initialized(), 'CUDA was initialised'\n"
        "assert 'matplotlib' not in sys.modules and 'typer' not in sys.modules\n"
    )


def test_the_cpu_path_works_without_triton() -> None:
    _fresh(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton':\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import torch, anymask\n"
        "q, k, v = (torch.randn(1, 2, 140, 16, requires_grad=True) for _ in range(3))\n"
        "for mask in (None, torch.rand(140, 140) < 0.5, anymask.causal()):\n"
        "    anymask.attention(q, k, v, mask).sum().backward()\n"
        "assert q.grad.isfinite().all()\n"
    )


def test_a_machine_without_triton_says_so() -> None:
    _fresh(
        "import sys\n"
        "from importlib import util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "sys.modules['triton'] = None\n"
        "import torch, anymask\n"
        "q = torch.randn(1, 1, 4, 8)\n"
        "e = anymask.explain(q, q, q, anymask.causal())\n"
        "assert e.backend == 'cpu' and 'not installed' in e.not_chosen['triton'], e\n"
        "try:\n"
        "    anymask.attention(q, q, q, backend='triton')\n"
        "except ValueError as error:\n"
        "    assert 'not installed' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('no error')\n"
    )
