"""Bugs of the turns at which columns add to dq on Hopper."""

from tests.helpers.mutants.record import Mutant, seen_by

FILE = "anymask/backends/hopper/turns.py"

TURNS: tuple[Mutant, ...] = (
    Mutant(
        "hopper: turns by the lists, not by the time of workers",
        FILE,
        "time = some[:, column] + place",
        "time = some[:, column] * 0 + place",
        seen_by("test_turns", "mask_has_its_turn and 5"),
    ),
    Mutant(
        "hopper: turns of walks that all start at the first entry",
        FILE,
        "turned = (entries - offsets[column] - column % kv_tiles) % length[column]",
        "turned = entries - offsets[column]",
        seen_by("test_turns", "mask_has_its_turn and 13"),
    ),
    Mutant(
        "hopper: turns of heads that share a plane",
        FILE,
        "found.shape[1] * (block_mask.heads == 1))",
        "0)",
        seen_by("test_turns", "mask_has_its_turn and 5"),
    ),
    Mutant(
        "hopper: turns without a mask of a wave that starts within a head",
        "anymask/backends/hopper/kernels/turns.py",
        "begin = gl.maximum(gl.maximum(first_rank, group), 0)",
        "begin = group",
        seen_by("test_turns", "without_a_mask and lengths0"),
    ),
)
