"""Bugs to plant: each a line of the library that is wrong, and the tests that must see it."""

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


MUTANTS: tuple[Mutant, ...] = ()
