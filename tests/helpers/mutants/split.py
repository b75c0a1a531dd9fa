"""Bugs of split-KV, seen without a GPU."""

from tests.helpers.mutants.record import Mutant, seen_by

LAUNCHER, KERNELS = "anymask/backends/gpu/split.py", "anymask/backends/gpu/kernels/split.py"


def _kernel(name: str, old: str, new: str, chosen: str) -> Mutant:
    return Mutant(f"split: {name}", KERNELS, old, new, seen_by("test_interpreter_split", chosen))


SPLIT: tuple[Mutant, ...] = (
    _kernel(
        "the remainder of the steps for nobody",
        "part * (n // parts) + tl.minimum(part, n % parts)",
        "part * (n // parts)",
        "met_once",
    ),
    _kernel("partial steps from the first split on", "tl.maximum(begin - n_full, 0)", "begin", "met_once"),
    _kernel(
        "rows of the mask by packed row", "mask_rows = query % TILE", "mask_rows = rows % TILE", "q64-kv257 and random"
    ),
    _kernel(
        "the first head's queries for all", "first_head + rows // q_len", "first_head + 0 * rows", "q1-kv513 and random"
    ),
    _kernel(
        "lines of the first tile of queries", "tl.minimum(start // TILE, q_tiles - 1)", "0", "q130 and lower_right"
    ),
    _kernel(
        "unused keys read",
        "some_v = Operand(v, v_strides, off_b, off_kvh, kv_len, kv_has_pair)",
        "some_v = Operand(v, v_strides, off_b, off_kvh, kv_len, None)",
        "test_unused_keys and nan",
    ),
    _kernel(
        "parts joined as if their maxima were one", "exp2(part_m - m_safe)", "exp2(part_m * 0.0)", "test_masks and tree"
    ),
    _kernel("a row without a key is NaN", "tl.where(l_all == 0.0, 1.0, l_all)", "l_all", "test_masks and empty_rows"),
    Mutant(
        "split: work tiles by rows of one head",
        LAUNCHER,
        "lines = q.shape[0] * q.shape[1] // line.packed",
        "lines = q.shape[0] * q.shape[1]",
        seen_by("test_split", "splits_of_calls"),
    ),
    Mutant(
        "split: tiles of the whole mask",
        LAUNCHER,
        "tiles = block_mask.rows.mean_tiles",
        "tiles = tiles_over(k.shape[2])",
        seen_by("test_split", "splits_of_calls"),
    ),
    Mutant(
        "split: keys that nobody attends to are no part of the key",
        LAUNCHER,
        "block_mask is None, used is None)",
        "block_mask is None)",
        seen_by("test_split", "dead_keys_are_another_kernel"),
    ),
)
