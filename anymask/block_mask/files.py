"""Tensors in safetensors files, whole or not at all, and sentences for what goes wrong with a file."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor


def check_path(path: Any) -> Path:
    """`path` as a Path; TypeError if it is none."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is a {type(path).__name__}; allowed are a str and a Path")
    return Path(path)


def check_target(path: Any) -> Path:
    """`path` as a Path where a file can be written.

    Raises:
        OSError: it is a folder, its folder does not exist, or one may not write there. TypeError: no path.
    """
    target = check_path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path is {target}, which is a folder; allowed is the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path is {target}, but there is no folder {target.parent}; make it first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise PermissionError(f"path is {target}, where this process may not write")
    return target


def write_safetensors(path: Any, header: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Write a file; after an error what was there before is there still."""
    library, target = _safetensors(), check_target(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        library.torch.save_file(tensors, part, header)
        part.replace(target)
    except library.SafetensorError as error:
        raise OSError(f"{target} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def read_safetensors(path: Any) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a file, on the CPU.

    Raises:
        ValueError: it is no safetensors file, or cut short. OSError: none that can be read. TypeError: no path.
    """
    library, source = _safetensors(), check_path(path)
    # what the library says of a folder or a device depends on the system
    if source.exists() and not source.is_file():
        raise OSError(f"{source} is no regular file; allowed is a safetensors file")
    try:
        with library.safe_open(source, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{source} is no whole safetensors file: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError("masks on disk need safetensors: pip install safetensors") from error
    return safetensors
