"""Files and functions stay of a size that is read at once, and the benchmarks smaller than what they measure."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for folder in ("anymask", "benchmarks", "examples", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__pycache__" not in path.parts
]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def _is_jit(function: Function, names: tuple[str, ...] = ("jit",)) -> bool:
    """Whether a decorator compiles the function for a GPU."""
    return any(name in ast.unparse(decorator) for decorator in function.decorator_list for name in names)


def _length(function: Function) -> int:
    """Lines from `def` to the end, without those of the docstring."""
    assert function.end_lineno is not None
    first, lines = function.body[0], function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None:
        return lines
    assert first.end_lineno is not None
    return lines - (first.end_lineno - first.lineno + 1)


def too_large(source: str) -> list[str]:
    """Functions of more than 60 lines (kernels: 120) or 12 parameters (kernels that are launched: any number).

    Calls that take what their users know from elsewhere may have 16, if those beyond 12 are named by the caller.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, Function):
            continue
        arguments, length = node.args, _length(node)
        by_place = len(arguments.posonlyargs) + len(arguments.args)
        count = by_place + len(arguments.kwonlyargs)
        if length > (120 if _is_jit(node) else 60):
            found.append(f"{node.name} has {length} lines")
        if (by_place > 12 or count > 16) and not (_is_jit(node) and node.name.endswith("_kernel")):
            found.append(f"{node.name} has {count} parameters")
    return found


def test_a_large_function_is_found() -> None:
    body = '    """One line."""\n' + "    x = 1\n" * 59
    names = ", ".join("abcdefghijkl")
    assert too_large(f"def f({names}):\n{body}") == []
    assert too_large(f"def f({names}, m):\n{body}    y = 1\n") == ["f has 61 lines", "f has 13 parameters"]
    assert too_large(f"def f({names}, *, m, n, o, p):\n{body}") == []
    assert too_large(f"def f({names}, *, m, n, o, p, q):\n{body}") == ["f has 17 parameters"]
    assert too_large(f"@triton.jit\ndef f_kernel({names}, m):\n{body * 2}") == []
    assert too_large(f"@triton.jit\ndef helper({names}, m):\n{body}") == ["helper has 13 parameters"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    assert _lines(path) <= 450
    found = too_large(path.read_text())
    if "integrations" in path.parts:
        # the signatures of another library
        found = [text for text in found if not text.endswith("parameters")]
    assert found == []


def test_folders_of_kernels_hold_jit_functions_alone() -> None:
    kernels = [path for path in FILES if "kernels" in path.parts]
    assert len(kernels) > 10
    for path in kernels:
        # a function of constants, or a builtin, is run by the compiler
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, Function)]
        others = [node.name for node in functions if not _is_jit(node, ("jit", "constexpr_function", "builtin"))]
        assert not others, f"{path.name}: {', '.join(others)}"


def test_benchmarks_stay_small() -> None:
    lines = sum(_lines(path) for path in FILES if path.is_relative_to(ROOT / "benchmarks"))
    assert lines <= 2600
    assert _lines(ROOT / "tests/test_benchmarks.py") <= 400
