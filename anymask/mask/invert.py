"""`~mask` inside `torch.compile`.

Of Python's operators dynamo lacks `~` of objects (torch 2.11 to 2.13; `&`, `|` and `-` are there): a function with
`~mask` would break its graph, or raise. So its class of builtin functions gets the method that it looks for, which
knows masks alone. Dynamo takes seconds to import, and is told once somebody else imports it.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from anymask.mask.expr import Mask

MODULE = "torch._dynamo.variables.builtin"


def _call_invert(self: Any, tx: Any, operand: Any) -> Any:
    """The result of `~operand` as dynamo traces it; None leaves the operand to torch."""
    kind = getattr(operand, "value_type", None)
    return operand.call_method(tx, "__invert__", [], {}) if isinstance(kind, type) and issubclass(kind, Mask) else None


def _teach(builtin: ModuleType) -> None:
    """Nothing to do in a torch that can."""
    if not hasattr(builtin.BuiltinVariable, "call_invert"):
        builtin.BuiltinVariable.call_invert = _call_invert


class _Waiting(MetaPathFinder):
    """Finds nothing, but teaches the module once it was executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_teach(module: ModuleType) -> None:
                execute(module)
                _teach(module)

            spec.loader.exec_module = execute_and_teach  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Teach dynamo, now or when it is imported."""
    known = sys.modules.get(MODULE)
    if known is not None:
        _teach(known)
    else:
        sys.meta_path.insert(0, _Waiting())
