"""What a planted bug is."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A bug."""

    name: str
    # path of the file in the checkout
    file: str
    # what stands there once, and what is planted in its place
    old: str
    new: str
    # arguments of pytest
    tests: tuple[str, ...]
    # of GPU kernels, whose tests need one
    gpu: bool = False


def seen_by(file: str, chosen: str = "") -> tuple[str, ...]:
    """Arguments of pytest: a file of `tests/` without its ending, and an expression that chooses some of its tests."""
    return (f"tests/{file}.py", *(("-k", chosen) if chosen else ()))
