"""Bugs in packing, in torch and by kernels under the interpreter, in packed masks, and in what is remembered."""

from tests.helpers.mutants.record import Mutant, seen_by

DEFINITION, CHANGES, CACHE = (f"anymask/packing/{name}.py" for name in ("definition", "changes", "cache"))
HOST, HOST_PLANS, HOST_PROGRAM = (f"anymask/packing/triton/{name}.py" for name in ("__init__", "plans", "program"))
BITS, LISTS, PROGRAM, TILES = (
    f"anymask/packing/triton/kernels/{name}.py" for name in ("bits", "lists", "program", "tiles")
)
BLOCK_MASK, TILE_LISTS, FULL, KNOWN = (
    f"anymask/block_mask/{name}.py" for name in ("block_mask", "tile_lists", "full", "known")
)
TENSOR_KEY = "base._cdata, storage, t.data_ptr(), version, t.dtype, t.shape, t.stride()"
CALL_KEY = "call = of_mask, q.shape, kv_len, device"
MASK_KEY = "MaskKey(program.nodes, program.numbers, tuple(keys), q_len, kv_len, device)"
NARROW_SPANS = "narrow_spans_and_chunks and wide"


def _without(key: str, field: str, instead: str, chosen: str) -> Mutant:
    """A bug: what is remembered is found by a key without a field."""
    name = f"{'TensorKey' if key == TENSOR_KEY else 'MaskKey'} without {field}"
    return Mutant(
        name,
        CACHE,
        key,
        key.replace(field, instead),
        ("tests/test_cache.py", "tests/test_planted_bugs.py", "-k", chosen),
    )


PACKING: tuple[Mutant, ...] = (
    Mutant(
        "last column of tiles full beyond kv_len",
        DEFINITION,
        "if grid.kv_len % TILE:",
        "if grid.kv_len % TILE == 1:",
        seen_by("test_pack", "test_every_field and 63-200"),
    ),
    Mutant(
        "strip with a short last line lost",
        DEFINITION,
        "for first in range(0, grid.q_tiles, step):",
        "for first in range(0, grid.q_tiles - step + 1, step):",
        seen_by("test_pack", "chunks_do_not_show"),
    ),
    Mutant(
        "last group of words alone kept",
        DEFINITION,
        "        kept.append(words[found == PARTIAL])",
        "        kept[1:] = [words[found == PARTIAL]]",
        seen_by("test_pack", "chunks_do_not_show"),
    ),
    Mutant(
        "keys beyond kv_len evaluated",
        DEFINITION,
        "k = (kv_tile * TILE + within).clamp_(max=grid.kv_len - 1)",
        "k = kv_tile * TILE + within",
        seen_by("test_pack", "test_every_field and key_padding"),
    ),
    Mutant(
        "the key at kv_len attends",
        DEFINITION,
        "(k < grid.kv_len)[:, None, :]",
        "(k <= grid.kv_len)[:, None, :]",
        seen_by("test_pack", "test_every_field and composed"),
    ),
    Mutant(
        "full tile by its first row beyond q_len",
        DEFINITION,
        "(words == -1).all(-1) | (row >= grid.q_len)",
        "(words == -1).all(-1) | (row > grid.q_len)",
        seen_by("test_pack", "test_every_field and all_full"),
    ),
    Mutant(
        "order by partial tiles alone",
        DEFINITION,
        "order = (kinds != EMPTY).sum(-1)",
        "order = (kinds == PARTIAL).sum(-1)",
        seen_by("test_pack", "test_every_field and causal"),
    ),
    Mutant(
        "full and partial lists swapped",
        DEFINITION,
        "TileLists(*found[FULL], *found[PARTIAL],",
        "TileLists(*found[PARTIAL], *found[FULL],",
        seen_by("test_pack", "test_every_field and causal"),
    ),
    Mutant(
        "columns of the length of rows",
        DEFINITION,
        "_lists(swapped, both[1], grid.kv_len)",
        "_lists(swapped, both[1], grid.q_len)",
        seen_by("test_pack", "test_every_field and empty_columns"),
    ),
    Mutant(
        "positions of full tiles alone are unused",
        DEFINITION,
        "count = (kinds == FULL).any(-1)",
        "count = (kinds == PARTIAL).any(-1)",
        seen_by("test_pack", "test_every_field and tiles"),
    ),
    Mutant(
        "dense mask: kinds of the first head alone",
        DEFINITION,
        "kinds[b, h, first:last] = found",
        "kinds[b, 0, first:last] = found",
        seen_by("test_pack", "test_every_field and per_head"),
    ),
    Mutant(
        "words of columns as they are in rows",
        DEFINITION,
        "found.copy_(transpose_bits(words[n]))",
        "found.copy_(words[n])",
        seen_by("test_pack", "test_every_field and causal"),
    ),
    Mutant(
        "two bits of a byte exchanged",
        "anymask/block_mask/bits.py",
        "_GATHER_BITS = 0x0102040810204080",
        "_GATHER_BITS = 0x0102040810208040",
        seen_by("test_bits", "numpy_packbits"),
    ),
    Mutant(
        "slice with a row beyond its end",
        CHANGES,
        "TILE + row < grid.q_len)",
        "TILE + row <= grid.q_len)",
        seen_by("test_block_mask", "queries_are_those and random"),
    ),
    Mutant(
        "slice without tiles that only its lower half meets",
        CHANGES,
        "(torch.maximum(kinds[:, :-1], kinds[:, 1:]) != EMPTY)",
        "(kinds[:, :-1] != EMPTY)",
        seen_by("test_block_mask", "queries_are_those and tiles"),
    ),
    Mutant(
        "grown mask keeps the short last column",
        CHANGES,
        "slice(known.kv_len // TILE)",
        "slice(tiles_over(known.kv_len))",
        seen_by("test_block_mask", "grown_mask and random"),
    ),
    Mutant(
        "rows of a table from the first on",
        "anymask/block_mask/tables.py",
        "tile_row % max(1, q_tiles) - first",
        "tile_row % max(1, q_tiles)",
        seen_by("test_block_mask", "queries_are_those and random"),
    ),
    Mutant(
        "slice of the first heads",
        TILE_LISTS,
        "slice(batch.start, batch.stop), slice(heads.start, heads.stop)",
        "slice(batch.start, batch.stop), slice(0, len(heads))",
        seen_by("test_taken_apart", "test_a_slice_is"),
    ),
    # not by the lists of rows for columns: the tiles of a plane are as many in both
    Mutant(
        "plane from the end",
        TILE_LISTS,
        "range(place % size, place % size + 1)",
        "range(place, place + 1)",
        seen_by("test_taken_apart", "test_a_slice_is"),
    ),
    Mutant(
        "density of short rows as of whole ones",
        BLOCK_MASK,
        "last_rows = self.q_len - TILE * (tiles_over(self.q_len) - 1)",
        "last_rows = TILE",
        seen_by("test_pack", "density_and_counts"),
    ),
    Mutant(
        "full mask: rows beyond q_len in its bits",
        FULL,
        "bits[-1, q_len % TILE :] = False",
        "bits[0, q_len % TILE :] = False",
        seen_by("test_taken_apart", "the_full_mask_is"),
    ),
    _without(TENSOR_KEY, "base._cdata", "0", "data_of"),
    # not without the storage: an entry goes with it, and no other one that is alive has its address
    _without(TENSOR_KEY, "t.data_ptr()", "0", "other_parts"),
    _without(TENSOR_KEY, "version", "0", "test_a_write"),
    _without(TENSOR_KEY, "t.dtype", "torch.bool", "address_of_another_dtype"),
    _without(TENSOR_KEY, "t.shape", "()", "TestMisses"),
    _without(TENSOR_KEY, "t.stride()", "()", "other_parts"),
    _without(MASK_KEY, "program.nodes", "()", "each_part_of_a_key"),
    _without(MASK_KEY, "program.numbers", "()", "each_part_of_a_key"),
    _without(MASK_KEY, "tuple(keys)", "()", "TestMisses"),
    _without(MASK_KEY, "q_len", "0", "test_lengths or each_part_of_a_key"),
    _without(MASK_KEY, "kv_len", "0", "test_lengths or each_part_of_a_key"),
    _without(MASK_KEY, "device", 'torch.device("cpu")', "each_part_of_a_key"),
    Mutant(
        "the newest entry goes",
        CACHE,
        "oldest = min(",
        "oldest = max(",
        seen_by("test_cache", "TestBounds"),
    ),
    Mutant(
        "a mask that is found again becomes the oldest",
        CACHE,
        "        entry.used = next(self._ticks)\n        if capturing:",
        "        entry.used = -next(self._ticks)\n        if capturing:",
        seen_by("test_cache", "TestBounds"),
    ),
    *(
        Mutant(
            f"a tensor is found for a call of another {name}",
            CACHE,
            CALL_KEY,
            CALL_KEY.replace(field, instead),
            seen_by("test_cache", "fitted_a_call"),
        )
        for name, field, instead in (
            ("batch", "q.shape", "(0, *q.shape[1:])"),
            ("heads", "q.shape", "(q.shape[0], 0, *q.shape[2:])"),
            ("q_len", "q.shape", "(*q.shape[:2], 0, q.shape[3])"),
            ("kv_len", "kv_len", "0"),
            ("mask", "of_mask", "of_mask[:3] + of_mask[4:]"),
        )
    ),
    Mutant(
        "a call finds an entry that is gone",
        CACHE,
        "self._calls[call] = weakref.ref(entry)",
        "self._calls[call] = lambda: entry",
        seen_by("test_cache", "dies_with_its_tensor"),
    ),
    Mutant(
        "a mask of other words is taken for one that is there",
        KNOWN,
        " or known.words is not tensors[1] or",
        " or",
        seen_by("test_block_mask", "one_that_is_there"),
    ),
    Mutant(
        "a mask of other used positions is taken for one that is there",
        KNOWN,
        "return known if same and known.q_len",
        "return known if known.q_len",
        seen_by("test_block_mask", "one_that_is_there"),
    ),
    Mutant(
        "a storage that others write to is remembered",
        CACHE,
        "_storage_Use_Count(storage) - 1 > base",
        "_storage_Use_Count(storage) - 9 > base",
        seen_by("test_cache", "TestMisses or TestUncounted"),
    ),
    Mutant(
        "span: columns of the first one",
        TILES,
        "cols = (first + at) * TILE + strip_columns()",
        "cols = at * TILE + strip_columns()",
        seen_by("test_interpreter_packing", NARROW_SPANS),
    ),
    Mutant(
        "span: kinds at the place of the first one",
        TILES,
        "at = tile_row.to(tl.int64) * kv_tiles + first + lane",
        "at = tile_row.to(tl.int64) * kv_tiles + lane",
        seen_by("test_interpreter_packing", NARROW_SPANS),
    ),
    Mutant(
        "fill: full tiles of a chunk over those before",
        LISTS,
        "full_offset += tl.sum(is_full)",
        "full_offset += 0 * tl.sum(is_full)",
        seen_by("test_interpreter_packing", NARROW_SPANS),
    ),
    Mutant(
        "fill: partial tiles of a chunk over those before",
        LISTS,
        "partial_offset += tl.sum(is_partial)",
        "partial_offset += 0 * tl.sum(is_partial)",
        seen_by("test_interpreter_packing", NARROW_SPANS),
    ),
    Mutant(
        "fill: order by the last chunk alone",
        LISTS,
        "place += tl.sum(before.to(tl.int32))",
        "place = tl.sum(before.to(tl.int32))",
        seen_by("test_interpreter_packing", NARROW_SPANS),
    ),
    Mutant(
        "scan: offsets of a chunk from 0 on",
        LISTS,
        "tl.store(offsets + 1 + x, total + tl.cumsum(n, 0)",
        "tl.store(offsets + 1 + x, tl.cumsum(n, 0)",
        seen_by("test_interpreter_packing", NARROW_SPANS),
    ),
    Mutant(
        "has_pair: positions in int32",
        LISTS,
        "(row // tile_rows).to(tl.int64)[:, None] * length",
        "(row // tile_rows)[:, None] * length",
        seen_by("test_interpreter_packing", "used_positions_beyond_int32"),
    ),
    Mutant(
        "has_pair: rows of the second plane by its positions",
        LISTS,
        "((row % tile_rows) * TILE)[:, None]",
        "(row * TILE)[:, None]",
        seen_by("test_interpreter_packing", "packing_is_the_same and tiles and 130"),
    ),
    Mutant(
        "extremes: head stride dropped",
        PROGRAM,
        "tiles.h * at.tile_head",
        "0 * tiles.h * at.tile_head",
        seen_by("test_interpreter_packing", "tile_minima_of_each_head"),
    ),
    Mutant(
        "extremes: samples a head apart",
        HOST_PROGRAM,
        "sample, head = heads * (batch > 1), int(heads > 1)",
        "sample, head = int(batch > 1), int(heads > 1)",
        seen_by("test_interpreter_packing", "tile_minima_of_each_head"),
    ),
    Mutant(
        "kernel: lower-right band shifted the other way",
        PROGRAM,
        "shift = (kv_len - q_len) * nodes[i].flag",
        "shift = (q_len - kv_len) * nodes[i].flag",
        seen_by("test_interpreter_packing", "packing_is_the_same and causal_lower_right"),
    ),
    Mutant(
        "kernel: range whose full tiles reach one too far",
        PROGRAM,
        "(low_most <= least) & (most < high_least)",
        "(low_most <= least) & (most <= high_least)",
        seen_by(
            "test_interpreter_packing", "every_builder and spans and 300 or expressions_with_planes or tile_minima"
        ),
    ),
    Mutant(
        "kernel: rectangle of blocks without its last row",
        PROGRAM,
        "end_q, end_k = tiles.last_q // size + 1,",
        "end_q, end_k = tiles.last_q // size,",
        seen_by("test_interpreter_packing", "triangle_of_blocks"),
    ),
    Mutant(
        "kernel: keys beyond kv_len attend",
        PROGRAM,
        "return bits & (q < q_len) & (k < kv_len)",
        "return bits & (q < q_len)",
        seen_by("test_interpreter_packing", "expressions_with_planes and 130"),
    ),
    Mutant(
        "blocks smaller than a tile taken for whole tiles",
        "anymask/mask/leaves.py",
        "flag=self.size % TILE == 0",
        "flag=TILE % self.size == 0",
        seen_by("test_interpreter_packing", "block_masks_pack and 1"),
    ),
    Mutant(
        "kernel: full tile by one row beyond q_len",
        TILES,
        "n == TILE * tl.minimum(TILE, q_len - q_tile * TILE)",
        "n == TILE * tl.minimum(TILE, q_len - q_tile * TILE + 1)",
        seen_by("test_interpreter_packing", "full_tiles_that_bounds"),
    ),
    Mutant(
        "kernel: used keys a plane of queries apart",
        TILES,
        "_mark(work.kv_has_pair, plane, kv_len, cols, by_column != 0)",
        "_mark(work.kv_has_pair, plane, q_len, cols, by_column != 0)",
        seen_by("test_interpreter_packing", "expressions_with_planes and 130"),
    ),
    Mutant(
        "kernel: words of each strip over those of the first",
        TILES,
        "tl.store(at + start * WORDS + strip_word_offsets(STRIP)",
        "tl.store(at + 0 * start + strip_word_offsets(STRIP)",
        seen_by("test_interpreter_packing", "packing_is_the_same and causal-130"),
    ),
    Mutant(
        "kernel: bits in the order of columns",
        BITS,
        "(column // 2) % 4, 2 * (column // 8) + column % 2",
        "(column // 2) % 4, column // 8 + 16 * (column % 2)",
        seen_by("test_interpreter_packing", "packing_is_the_same and composed_deep and 130"),
    ),
    Mutant(
        "kernel: the byte 128 is no True",
        BITS,
        "((((x & 0x7F7F7F7F) + 0x7F7F7F7F) | x) >> 7)",
        "(((x & 0x7F7F7F7F) + 0x7F7F7F7F) >> 7)",
        seen_by("test_interpreter_packing", "any_byte_of_a_bool and aligned"),
    ),
    Mutant(
        "dense kernel: heads a sample apart",
        TILES,
        "(plane % heads).to(tl.int64) * (strides[1] // ALIGN)",
        "(plane % heads).to(tl.int64) * (strides[1] // ALIGN) * 0",
        seen_by("test_interpreter_packing", "packing_is_the_same and per_head-130"),
    ),
    Mutant(
        "copy kernel: columns with the stride of rows",
        TILES,
        "(tile_row.to(tl.int64) * q_tiles + tile)",
        "(tile_row.to(tl.int64) * kv_tiles + tile)",
        seen_by("test_interpreter_packing", "packing_is_the_same and tiles-130"),
    ),
    Mutant(
        "unused keys without unused queries lost",
        HOST,
        "if totals.used_queries < work.n_queries or totals.used_keys < work.n_keys:",
        "if totals.used_queries < work.n_queries:",
        seen_by("test_interpreter_packing", "packing_is_the_same and empty_columns and 130"),
    ),
    Mutant(
        "address of a tensor lost from its alignment",
        HOST_PLANS,
        "together = t.data_ptr() | kv_len",
        "together = kv_len",
        seen_by("test_interpreter_packing", "any_form and odd_base or any_form and base"),
    ),
    Mutant(
        "numbers of kernels beyond int32",
        HOST_PROGRAM,
        "encode(max(-FAR, min(n, FAR)) for n in numbers)",
        "encode(n for n in numbers)",
        seen_by("test_interpreter_packing", "far_limits"),
    ),
    Mutant(
        "launch key without the alignment of a tensor",
        "anymask/launch.py",
        "return t.dtype, t.data_ptr() % 16 == 0",
        "return (t.dtype,)",
        seen_by("test_launch", "keys_tell_apart"),
    ),
)
