"""Bugs of the Hopper kernels, and of what launches kernels on a GPU: by tests that need one."""

from tests.helpers.mutants.record import Mutant, seen_by

HOPPER = "anymask/backends/hopper/__init__.py"
BACKWARD, FORWARD, MAINLOOP, PTX, SCHEDULER, WORDS = (
    f"anymask/backends/hopper/kernels/{name}.py"
    for name in ("backward", "forward", "mainloop", "ptx", "scheduler", "words")
)


def _bug(name: str, file: str, old: str, new: str, chosen: str, by: str = "test_gpu") -> Mutant:
    return Mutant(f"gpu: {name}", file, old, new, seen_by(by, chosen), gpu=True)


GPU: tuple[Mutant, ...] = (
    _bug(
        "backward: a tail by half tiles",
        HOPPER,
        '"HAS_TAIL": block_mask is None and kv_len % TILE != 0,',
        '"HAS_TAIL": block_mask is None and kv_len % 64 != 0,',
        "far_from_zero and hopper-none and kv192",
    ),
    _bug(
        "row max of a row that has met a key may be 0",
        PTX,
        "abs.f32 t, u; max.f32 t, t, 0f{TINY}; copysign",
        "abs.f32 t, u; copysign",
        "first_tile_of_zero_scores and hopper",
    ),
    _bug(
        "row max of half a quad",
        PTX,
        "for lanes in (1, 2)]",
        "for lanes in (1,)]",
        "growing_scores and hopper-none and d128",
    ),
    _bug(
        "packed heads of masks with one sample",
        HOPPER,
        "(block_mask is None or block_mask.heads == 1)",
        "(block_mask is None or block_mask.batch == 1)",
        "short_queries and 7-4-64",
    ),
    _bug(
        "packed heads: mask rows of the second 64",
        WORDS,
        "rows = rows % mask_rows",
        "rows = rows % ROWS % mask_rows",
        "short_queries and 7-16-64 or short_queries and 20-6-64",
    ),
    _bug(
        "last round of workers in the order of the first",
        SCHEDULER,
        "full + (work_index(full, worker) < n_work_tiles).to(gl.int32)",
        "full + (full * worker.num_workers + worker.worker_id < n_work_tiles).to(gl.int32)",
        "few_programs and random-128-9",
    ),
    _bug(
        "ranges of the first head's plane",
        SCHEDULER,
        "(tile.sample * strides.sample + tile.head * strides.head) * q_tiles + tile.tile",
        "(tile.sample * strides.sample) * q_tiles + tile.tile",
        "test_heads and hopper-per_head and h6over6",
    ),
    _bug(
        "forward: wrong group",
        FORWARD,
        "kv_head = head // group",
        "kv_head = head % group",
        "test_heads and hopper-none and h4over2",
    ),
    _bug(
        "forward: missed tile",
        FORWARD,
        "kv_tile = load_kv_tile((t + 1) // STEPS, lists",
        "kv_tile = load_kv_tile(t // STEPS, lists",
        "test_masks and hopper-random-q513 and bf16",
    ),
    _bug(
        "forward: a row without a key divided by its sum",
        FORWARD,
        "alpha / gl.where(l_i == 0.0, 1.0, l_i)",
        "alpha / l_i",
        "test_masks and hopper-empty_rows-q513 and bf16",
    ),
    _bug(
        "forward: words of a work tile in int32",
        FORWARD,
        "tile_range.partial_begin.to(gl.int64) * (TILE * 4)",
        "tile_range.partial_begin * (TILE * 4)",
        "test_words and hopper",
        "test_gpu_gates",
    ),
    _bug(
        "forward: last partial tile taken for full",
        MAINLOOP,
        "step_base + partial_steps - 1",
        "step_base + partial_steps - 2",
        "test_masks and hopper-random-q513 and bf16",
    ),
    _bug(
        "forward: words of a second partial tile unread",
        MAINLOOP,
        "_next_words(words, n_partial > 1,",
        "_next_words(words, n_partial > 2,",
        "growing_scores and hopper-causal and d128 or high_hidden and hopper-causal and d128 and bf16",
    ),
    _bug(
        "forward: words of a step at half their place",
        MAINLOOP,
        "w_next >> (step * (BLOCK_N // 4))",
        "w_next >> (step * (BLOCK_N // 8))",
        "test_masks and hopper-random-q513 and bf16",
    ),
    _bug(
        "forward: bits of a tail below 0",
        WORDS,
        "gl.minimum(gl.maximum(columns % 8 - 2 * c, 0), 2)",
        "gl.minimum(columns % 8 - 2 * c, 2)",
        "test_lengths and hopper-none and f16 and not kv128",
    ),
    _bug(
        "backward: words of a tile in int32",
        BACKWARD,
        "column.tile, cfg.IN_TURN)).to(gl.int64)",
        "column.tile, cfg.IN_TURN))",
        "test_words and hopper",
        "test_gpu_gates",
    ),
    _bug(
        "backward: mask of a group's first head",
        SCHEDULER,
        "plane = sample * strides.sample + head * strides.head",
        "plane = sample * strides.sample + first_head * strides.head",
        "test_heads and hopper-per_head and h4over2",
    ),
    _bug(
        "backward: words of a step at half their place",
        BACKWARD,
        "% STEPS * (BLOCK_M // 4)",
        "% STEPS * (BLOCK_M // 8)",
        "test_head_dims and hopper-random and d128 and bf16",
    ),
    _bug(
        "backward: words of the tile before",
        BACKWARD,
        "(pos + 1 - begin) // STEPS, offs, cfg)",
        "(pos - begin) // STEPS, offs, cfg)",
        "test_masks and hopper-random-q513 and bf16",
    ),
    _bug(
        "backward: scale in base 2",
        BACKWARD,
        "(dk * sm_scale).to(dtype)",
        "(dk * qk_scale).to(dtype)",
        "test_masks and hopper-none-q513 and bf16",
    ),
    _bug(
        "backward: dq of all heads added to the first",
        BACKWARD,
        "head_tile = (sample * kv_heads * group + head) * q_tiles",
        "head_tile = (sample * kv_heads * group) * q_tiles",
        "test_masks and hopper-none-q513 and bf16",
    ),
    _bug(
        "backward: both halves of dq added to the first",
        BACKWARD,
        "row += HALF",
        "row += g * 2 * HALF",
        "test_masks and hopper-none-q513 and bf16",
    ),
    _bug(
        "backward: words of the first 64 keys for both warpgroups",
        BACKWARD,
        "rows = G * ROWS + gl.arange",
        "rows = 0 * G * ROWS + gl.arange",
        "test_masks and hopper-random-q513 and bf16",
    ),
    _bug(
        "backward: unused queries read",
        HOPPER,
        'q, do = (zero_unused_rows(t, block_mask, "rows") for t in (q, do))',
        "q, do = (zero_unused_rows(t, None, 'rows') for t in (q, do))",
        "unused_queries and hopper-empty_rows and nan",
    ),
    _bug(
        "forward: unused values read",
        HOPPER,
        'v = zero_unused_rows(v, block_mask, "cols")\n    group',
        'v = zero_unused_rows(v, None, "cols")\n    group',
        "unused_keys and hopper-key_padding and nan",
    ),
    _bug(
        "backward: deterministic lost",
        HOPPER,
        "if deterministic and dq_acc is not None:",
        "if False and dq_acc is not None:",
        "deterministic_gradients and hopper",
    ),
    _bug(
        "backward: a turn is passed on before what was added is in memory",
        PTX,
        "cp.async.bulk.wait_group 0; bar.warp.sync",
        "bar.warp.sync",
        "turns_are_exact and random",
        "test_gpu_turns",
    ),
    _bug(
        "keys unused in one head of a group",
        HOPPER,
        "block_mask.heads > 1 and q.shape[1] > k.shape[1]",
        "block_mask.batch > 1 and q.shape[1] > k.shape[1]",
        "keys_unused_in_one_head",
    ),
    _bug(
        "triton: unused rows as the copy engine reads them",
        "anymask/backends/gpu/kernels/tiles.py",
        "tile = tl.where(wanted[:, None], tile, 0.0)",
        "tile = tl.where(wanted[:, None], tile, tile)",
        "unused_keys and triton-key_padding and f16 and nan",
    ),
    _bug(
        "triton: words of a tile in int32",
        "anymask/backends/gpu/kernels/tiles.py",
        "tl.cast(entry, tl.int64) * (TILE * 4)",
        "entry * (TILE * 4)",
        "test_words and triton",
        "test_gpu_gates",
    ),
    _bug(
        "triton: a bit that is set masks its pair",
        "anymask/backends/gpu/kernels/tiles.py",
        "setp.ne.u32 p, t, 0;",
        "setp.eq.u32 p, t, 0;",
        "test_masks and triton-random-q513 and bf16",
    ),
)
