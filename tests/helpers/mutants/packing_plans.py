"""Bugs of plans of packing: of what they are looked up by, of the last kernel, and of how the host gets the totals."""

from tests.helpers.mutants.record import Mutant, seen_by

HOST, PLANS, ANSWER = (f"anymask/packing/triton/{name}.py" for name in ("__init__", "plans", "answer"))

TILES = "anymask/packing/triton/kernels/tiles.py"

PACKING_PLANS: tuple[Mutant, ...] = (
    Mutant(
        "packing: plan key without strides",
        PLANS,
        "t.shape, t.stride(), t.dtype",
        "t.shape, t.contiguous().stride(), t.dtype",
        seen_by("test_interpreter_packing", "any_form and transposed"),
    ),
    Mutant(
        "packing: plan key without the alignment",
        PLANS,
        "t.dtype, t.data_ptr() % 16",
        "t.dtype, 0 * t.data_ptr()",
        seen_by("test_packing_plans", "what_new_ones_do"),
    ),
    Mutant(
        "packing: plan key without the dtype",
        PLANS,
        "t.stride(), t.dtype, t.data_ptr()",
        "t.stride(), torch.uint8, t.data_ptr()",
        seen_by("test_packing_plans", "what_new_ones_do"),
    ),
    Mutant(
        "packing: plan key without the numbers",
        HOST,
        "program.nodes, program.numbers, mask.planes",
        "program.nodes, tuple(1 for _ in program.numbers), mask.planes",
        seen_by("test_interpreter_packing", "packing_is_the_same and causal and 130"),
    ),
    Mutant(
        "packing: as many programs as in the call before",
        "anymask/direct.py",
        "self._config.grid[0] = programs",
        "self._config.grid[0] = max(programs, self._config.grid[0])",
        seen_by("test_packing_plans", "what_new_ones_do"),
    ),
    Mutant(
        "packing: words of no partial tile launched",
        "anymask/plan.py",
        "        if programs:",
        "        if programs >= 0:",
        seen_by("test_packing_plans", "without_partial_tiles"),
    ),
    Mutant(
        "kernel: words of a column over those of the tile before",
        TILES,
        "other=0) < q_tile)",
        "other=0) < q_tile - 1)",
        seen_by("test_interpreter_packing", "packing_is_the_same and causal and 300"),
    ),
    Mutant(
        "kernel: tiles of a column counted from its last span alone",
        TILES,
        "place += tl.sum(before.to(tl.int32))",
        "place = first + tl.sum(before.to(tl.int32))",
        seen_by("test_interpreter_packing", "narrow_spans"),
    ),
    Mutant(
        "kernel: bits of a strip in the order of columns",
        "anymask/packing/triton/kernels/bits.py",
        "8 * (_strip_bits() // 2) + 2 * word + _strip_bits() % 2",
        "32 * word + _strip_bits()",
        seen_by("test_interpreter_packing", "packing_is_the_same and causal-300"),
    ),
    Mutant(
        "kernel: pairs of eight columns counted in three bits",
        "anymask/packing/triton/kernels/bits.py",
        "(4 * tl.arange(0, 8))",
        "(3 * tl.arange(0, 8))",
        seen_by("test_interpreter_packing", "expressions_with_planes and 130 or packing_is_the_same and empty_columns"),
    ),
    Mutant(
        "answer: the first total taken for all",
        ANSWER,
        "if min(found) >= 0:",
        "if max(found) >= 0:",
        seen_by("test_packing_plans", "waits_for_all"),
    ),
    Mutant(
        "answer: that of the call before",
        ANSWER,
        "self._cells[:] = [NOT_YET] * len(totals)",
        "self._cells[:] = list(totals)",
        seen_by("test_packing_plans", "place_of_its_own"),
    ),
    Mutant(
        "answer: by the last program but one to end",
        "anymask/packing/triton/kernels/lists.py",
        "== tl.num_programs(0) - 1:",
        "== tl.num_programs(0) - 2:",
        seen_by("test_interpreter_packing", "packing_is_the_same and causal and 130"),
    ),
)
