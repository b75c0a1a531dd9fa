"""The mask that a command line names: an example of the gallery, a builder with numbers, or a file."""

from __future__ import annotations

import difflib
import inspect
import pickle
import re
import struct
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

import anymask
from anymask import BlockMask, Mask, gallery
from anymask.block_mask.files import read_safetensors

Number: TypeAlias = "int | float | tuple[int, ...]"

# what readers of torch and numpy raise for bytes that they did not write
DAMAGE = (
    AssertionError, AttributeError, EOFError, LookupError, MemoryError, OverflowError, pickle.PickleError, RuntimeError,
    struct.error, SyntaxError, tokenize.TokenError, TypeError, ValueError,
)  # fmt: skip
SUFFIXES = ".pt", ".pth", ".npy", ".safetensors"
# tokens of a mask that is made of numbers: a million
MOST_TOKENS = 2**20


class UnreadableFile(Exception):
    """A file that is there and holds no mask; the message says which, and what it holds."""


@dataclass(frozen=True)
class Found:
    """A mask, and its lengths in tokens where it says them."""

    mask: Mask | BlockMask | Tensor
    q_len: int | None = None
    kv_len: int | None = None


def find(name: str, options: list[str], q_len: int | None = None, kv_len: int | None = None) -> Found:
    """The mask of a name and of the options behind it.

    Args:
        name: an example of the gallery, `sliding_window` or `sliding-window`, or a file.
        options: numbers of a builder, `--window 64`, `--lens=300,250`; none for a file.
        q_len, kv_len: what was asked for, for a builder that takes them.

    Raises:
        ValueError: no such mask, or numbers that it does not take. UnreadableFile: a file without a mask. OSError: a
        file that cannot be read. ImportError: a library that the file needs.
    """
    numbers = parse_numbers(options)
    if (example := name.replace("-", "_")) in gallery.EXAMPLES:
        if not numbers:
            return Found(gallery.example(example))
        if example == "random_blocks":
            numbers.setdefault("q_len", q_len or gallery.LENGTH)
            numbers.setdefault("kv_len", kv_len or numbers["q_len"])
        return _by_numbers(example, numbers)
    if numbers:
        raise ValueError(f"--{next(iter(numbers)).replace('_', '-')} is for a mask by name, not for {name}")
    if not Path(name).exists():
        if Path(name).suffix.lower() in SUFFIXES:
            raise ValueError(f"there is no file {name}")
        hint = _did_you_mean(name, gallery.EXAMPLES)
        raise ValueError(f"{name} is no file and no mask{hint}; allowed are {', '.join(gallery.EXAMPLES)}, FILE")
    return Found(read_file(name))


def parse_numbers(options: list[str]) -> dict[str, Number]:
    """`--name 3`, `--name=0.5` and `--name 3,4`, as arguments of a builder."""
    words = [part for option in options for part in (option.split("=", 1) if option.startswith("--") else [option])]
    found: dict[str, Number] = {}
    for option, value in zip(words[::2], [*words[1::2], ""], strict=False):
        if not option.startswith("--") or not re.fullmatch(r"-?\d+(\.\d+|(,-?\d+)*)", value, re.ASCII):
            raise ValueError(
                f"{option} {value}".strip() + " is no option; allowed are --NAME 3, --NAME 0.5, --NAME 3,4"
            )
        parts = [float(part) if "." in part else int(part) for part in value.split(",")]
        if max(map(abs, parts)) >= 2**62:
            raise ValueError(f"{option} {value} is too large; allowed are numbers below 2^62")
        found[option[2:].replace("-", "_")] = parts[0] if len(parts) == 1 else tuple(map(int, parts))
    return found


def _by_numbers(name: str, numbers: dict[str, Number]) -> Found:
    """A builder called with numbers; where it takes tensors of integers, with lists."""
    builder = getattr(anymask, name)
    # the name that people use
    if name == "sliding_window" and "window" in numbers:
        if "left" in numbers:
            raise ValueError("sliding_window has --window and --left both; allowed is one of them")
        numbers = {("left" if key == "window" else key): value for key, value in numbers.items()}
    kinds = {key: str(p.annotation) for key, p in inspect.signature(builder).parameters.items()}
    # a command line has no form of layouts and dense masks, nor of functions and generators
    said = {key for key, kind in kinds.items() if re.search("int|float|Tensor", kind) and "Callable" not in kind}
    takes = [key for key in kinds if key in said - {"layout", "tensor"}]
    needed = [key for key, p in inspect.signature(builder).parameters.items() if p.default is p.empty]
    if unsaid := [key for key in needed if key not in takes]:
        raise ValueError(
            f"{name} needs {', '.join(unsaid)}, which no number says; allowed is its example, without numbers"
        )
    lens = {"document": "ids", "shared_prefix": "ids", "key_padding": "keep"}.get(name)
    others = {"sliding_window": ["window"]}.get(name, ["lens"] if lens else [])
    allowed = [f"--{key.replace('_', '-')}" for key in [*takes, *others]]
    for key in numbers:
        option = f"--{key.replace('_', '-')}"
        if option not in allowed:
            hint = _did_you_mean(option, [*allowed, "--len", "--kv-len", "--plane", "--out", "--json"])
            raise ValueError(f"{name} takes no {option}{hint}; allowed are {', '.join(allowed) or 'none'}")
        if kinds.get(key, "").startswith("tuple") and not isinstance(numbers[key], tuple):
            raise ValueError(f"{option} is {numbers[key]}; allowed are whole numbers, 16,64")
    arguments: dict[str, Any] = dict(numbers)
    if lens and "lens" in arguments:
        if lens in arguments:
            raise ValueError(f"{name} has --lens and --{lens} both; allowed is one of them")
        given = _as_list("lens", arguments.pop("lens"))
        if min(given) < 0 or sum(given) > MOST_TOKENS:
            raise ValueError(f"--lens is {given}; allowed are 0 and more, {MOST_TOKENS:,} in all")
        parts = torch.arange(len(given)).repeat_interleave(torch.tensor(given))
        arguments[lens] = torch.tensor(given) if name == "key_padding" else parts
    for key, value in arguments.items():
        if (
            "Tensor" in kinds[key]
            and not isinstance(value, Tensor)
            and not (isinstance(value, int) and "int" in kinds[key])
        ):
            arguments[key] = torch.tensor(_as_list(key, value))
    missing = [f"--{key.replace('_', '-')}" for key in needed if key not in arguments]
    if missing:
        raise ValueError(f"{name} also needs {', '.join(missing)}; allowed are {', '.join(allowed) or 'none'}")
    return Found(builder(**arguments), *_lengths(name, arguments))


def _as_list(key: str, value: Number) -> list[int]:
    values = list(value) if isinstance(value, tuple) else [value]
    if not all(isinstance(n, int) for n in values):
        raise ValueError(f"--{key.replace('_', '-')} is {value}; allowed are whole numbers, 3,4,5")
    return [int(n) for n in values]


def _lengths(name: str, arguments: dict[str, Any]) -> tuple[int | None, int | None]:
    """q_len and kv_len that the arguments of a builder say."""
    if name in ("neighbourhood_2d", "neighbourhood_3d"):
        return prod(arguments["shape"]), None
    if name == "block_diffusion" and "length" in arguments:
        return 2 * arguments["length"], None
    if name == "random_blocks":
        return arguments["q_len"], arguments["kv_len"]
    if "cu_seqlens" in arguments:
        return int(arguments["cu_seqlens"][-1]), None
    per_token = [key for key in ("ids", "position_ids", "parents", "start", "questions") if key in arguments]
    kv_ids = arguments.get("kv_ids")
    return len(arguments[per_token[0]]) if per_token else None, None if kv_ids is None else len(kv_ids)


def read_file(name: str) -> BlockMask | Tensor:
    """The bool tensor, or the `BlockMask`, that a file holds.

    Raises:
        UnreadableFile: the file is damaged, or holds something else. OSError: it cannot be read. ImportError: a library
        that it needs. ValueError: a suffix of no format that is read.
    """
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name} has the suffix {path.suffix or 'of no format'}; allowed are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise OSError(f"{name} is no regular file; allowed is a file with a mask")
    if path.stat().st_size == 0:
        raise UnreadableFile(f"{name} is empty; allowed is a file with a mask")
    suffix = path.suffix.lower()
    found: BlockMask | Tensor = (
        _safetensors(path) if suffix == ".safetensors" else _numpy(path) if suffix == ".npy" else _torch(path)
    )
    if isinstance(found, BlockMask):
        wrong = found.contradiction()
        if wrong:
            raise UnreadableFile(f"{name}: {wrong} contradicts the other tensors; the file is damaged")
    elif not isinstance(found, Tensor):
        raise UnreadableFile(f"{name} holds a {type(found).__name__}; allowed are one bool tensor and a BlockMask")
    elif found.dtype != torch.bool or not 2 <= found.dim() <= 4:
        raise UnreadableFile(
            f"{name} holds {found.dtype} of shape {tuple(found.shape)}; allowed is torch.bool (True = attend) "
            "of 2 to 4 dimensions"
        )
    return found


def _safetensors(path: Path) -> Any:
    try:
        _, tensors = read_safetensors(path)
        return next(iter(tensors.values())) if len(tensors) == 1 else BlockMask.load(path)
    except ValueError as error:
        raise UnreadableFile(str(error)) from error


def _numpy(path: Path) -> Any:
    try:
        import numpy as np
    except ModuleNotFoundError as error:
        raise ImportError(f"{path} needs numpy: pip install numpy") from error
    try:
        array = np.load(path, allow_pickle=False)
    except DAMAGE as error:
        raise UnreadableFile(f"{path} is no whole array that numpy.save wrote ({type(error).__name__})") from error
    if array.dtype != np.bool_:
        raise UnreadableFile(f"{path} has dtype {array.dtype}; allowed is bool (True = attend)")
    return torch.from_numpy(array)


def _torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise UnreadableFile(
            f"{path} is no whole tensor or BlockMask that torch.save wrote ({type(error).__name__})"
        ) from error


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else ""
