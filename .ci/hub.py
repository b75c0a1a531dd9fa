"""Writes the package as a kernel of the Hugging Face Hub, `dist/hub/build/torch-*`: `make hub`.

The `kernels` library imports such a folder under a name of its own, beside other versions. So its imports are relative,
and operators and pytrees are registered under that name. The command line and the tests' helpers stay out.

`attn_implementation="OWNER/anymask"` of transformers finds `flash_attn_forward` there, and gives it SDPA's bool masks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# the whole of Python: kernels are compiled where they run
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
LEFT_OUT = ("__main__.py", "bench.py", "cli.py", "collect_env.py", "demo.py", "gallery.py", "mask_argument.py")
FOLDERS_LEFT_OUT = ("check", "testing", "__pycache__")
# 0 is for what may still change
VERSION = 0
IMPORT = re.compile(r"^(\s*)from anymask(?:\.([\w.]+))? import ", re.MULTILINE)
# what torch knows by name, for all versions of the package in a process
REGISTERED = re.compile(
    r'(?<=Library\(")anymask(?=")|(?<=torch\.ops\.)anymask\b|(?<=")anymask(?=::)|(?<=type_name=")anymask'
)
TRANSFORMERS = """
from .integrations.transformers import attention_forward as flash_attn_forward

supports_flash_attn = True
"""


def write(folder: Path, commit: str) -> list[Path]:
    """The variants that were written into `folder/build`.

    Args:
        folder: made if it is not there.
        commit: of the source, hexadecimal; it makes the names unique.
    """
    variants = []
    for backend in BACKENDS:
        name, variant = f"_anymask_{backend}_{commit}", folder / "build" / f"torch-{backend}"
        files = {path: converted(text, path, name) for path, text in sources().items()}
        files["__init__.py"] += TRANSFORMERS
        for path, text in files.items():
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            (variant / path).write_text(text)
        digests = {path: _digest(text) for path, text in files.items()}
        metadata = {
            "name": "anymask", "id": name, "version": VERSION, "license": "MIT", "python-depends": [],
            "backend": {"type": backend}, "digest": {"algorithm": "sha256", "files": dict(sorted(digests.items()))},
        }  # fmt: skip
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    return variants


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def sources() -> dict[str, str]:
    """The files of the package by their paths in it."""
    package = ROOT / "anymask"
    paths = sorted(path.relative_to(package) for path in package.rglob("*.py"))
    kept = [p for p in paths if p.as_posix() not in LEFT_OUT and not {*p.parts[:-1]} & {*FOLDERS_LEFT_OUT}]
    return {path.as_posix(): (package / path).read_text() for path in kept}


def converted(text: str, path: str, name: str) -> str:
    """A file as part of a package called `name`.

    Raises:
        ValueError: it imports the package by its own name in a way that has no relative form.
    """
    dots = "." * len(Path(path).parts)
    text = IMPORT.sub(lambda found: f"{found[1]}from {dots}{found[2] or ''} import ", text)
    if re.search(r"^\s*import anymask|import_module\(f?\"anymask", text, re.MULTILINE):
        raise ValueError(f"{path} imports anymask by name; allowed is from anymask import ...")
    return REGISTERED.sub(name, text)


if __name__ == "__main__":
    described = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=_dirty"]
    found = subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    print("\n".join(f"wrote {variant}" for variant in write(Path(sys.argv[1]), found)))
