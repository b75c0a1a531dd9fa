"""The tiles that a plane of pairs is cut into, 128 x 128, and their three kinds."""

TILE = 128
# int32 words of a row of a tile
WORDS = 4

EMPTY, PARTIAL, FULL = 0, 1, 2


def tiles_over(length: int) -> int:
    """Number of tiles that cover `length` positions."""
    return (length + TILE - 1) // TILE
