"""What the site needs beside mkdocs: formulas as MathML, which browsers draw, and no links into the code."""

import re
from typing import Any

from latex2mathml.converter import convert

# code first, in which dollars and brackets mean nothing
CODE = r"(?P<code>^```.*?^```|`[^`\n]+`)"
FORMULA = re.compile(CODE + r"|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.DOTALL | re.MULTILINE)
TAG = re.compile(r"\\tag\{(\d+)\}")
OUTSIDE = re.compile(r"\[`?([^\]`]+)`?\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page before it is rendered."""
    return FORMULA.sub(_formula, OUTSIDE.sub(r"`\1`", markdown))


def _formula(found: re.Match[str]) -> str:
    if found["code"]:
        return found[0]
    if found["inline"]:
        return convert(found["inline"])
    # MathML has no numbers of equations
    parts = TAG.sub(r"\\qquad (\1)", found["block"].replace("\n", " "))
    return convert(parts, display="block")
