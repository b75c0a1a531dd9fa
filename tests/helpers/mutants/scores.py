"""Bugs in scores: builders of biases, the CPU's and the reference's terms, operators, dropout."""

from tests.helpers.mutants.record import Mutant, seen_by

SCORED, SMALL, WEIGHTS, OPS = (
    f"anymask/{name}.py" for name in ("backends/cpu/scored", "backends/cpu/small_scored", "scores/weights", "score_ops")
)
BIAS, BUILDERS, RESOLVE, SCORE_MOD, DROPOUT = (
    f"anymask/scores/{name}.py" for name in ("bias", "builders", "resolve", "score_mod", "dropout")
)

SCORES: tuple[Mutant, ...] = (
    Mutant(
        "scored: slope of the softcap lost",
        SCORED,
        "slope = 1 - s.square()",
        "slope = torch.ones_like(s)",
        seen_by("test_scores", "test_gradcheck and cpu"),
    ),
    Mutant(
        "scored: a hidden pair capped",
        SCORED,
        'hidden = s == -float("inf") if biases else None',
        "hidden = None",
        seen_by("test_scores", "test_every_combination and hides and cpu"),
    ),
    Mutant(
        "scored: NaN of a masked pair kept in the slope",
        SCORED,
        '((s, -float("inf")), (slope, 0.0))',
        '((s, -float("inf")),)',
        seen_by("test_scores", "test_nan_of_masked_pairs and cpu"),
    ),
    Mutant(
        "scored: dv without dropout",
        SCORED,
        "do_rows.mT @ pairs.drop(p)",
        "do_rows.mT @ p",
        seen_by("test_scores", "test_gradcheck and cpu"),
    ),
    Mutant(
        "scored: head of a group by the mask's plane alone",
        SCORED,
        "own if tile_row.head is None else own[:, tile_row.head : tile_row.head + 1]",
        "own if tile_row.head is None else own[:, :1]",
        seen_by("test_scores", "test_every_combination and full-by and cpu"),
    ),
    Mutant(
        "scored: gradient of sinks without dlse",
        SCORED,
        "delta = delta - dlse.to(lse.dtype)",
        "delta = delta + 0 * dlse.to(lse.dtype)",
        seen_by("test_scores", "test_gradcheck and cpu"),
    ),
    Mutant(
        "scored: keys of a step from the first tile",
        SCORED,
        "tiles[:, None] * TILE + torch.arange(TILE)).flatten().clamp_",
        "0 * tiles[:, None] * TILE + torch.arange(TILE)).flatten().clamp_",
        seen_by("test_scores", "test_every_combination and keys-no and cpu"),
    ),
    Mutant(
        "scored: dropout of a step by its first sample",
        SCORED,
        "torch.arange(tile_row.b.start, tile_row.b.stop)",
        "torch.zeros(tile_row.b.stop - tile_row.b.start, dtype=torch.int64)",
        seen_by("test_scores", "test_backends_and_splits_of_work_agree"),
    ),
    Mutant(
        "scored: do of queries without a key read",
        SCORED,
        "torch.where(o == 0, 0, o.to(lse.dtype) * do.to(lse.dtype))",
        "(o.to(lse.dtype) * do.to(lse.dtype))",
        seen_by("test_scores", "test_rows_without_a_key and cpu"),
    ),
    Mutant(
        "small, scored: terms of the first samples for all",
        SMALL,
        "t = t[planes.b] if",
        "t = t[: planes.b.stop - planes.b.start] if",
        seen_by("test_cpu_small_scored", "test_every_bias and full-no"),
    ),
    Mutant(
        "small, scored: gradient of what samples share of the last ones alone",
        SMALL,
        "self.shared[planes.query_heads] += by_head.sum(0)",
        "self.shared[planes.query_heads] = by_head.sum(0)",
        seen_by("test_cpu_small_scored", "test_every_bias and relative-no"),
    ),
    Mutant(
        "small, scored: dv without dropout",
        SMALL,
        "_drop(p, kept, planes).mT @ do_rows",
        "p.mT @ do_rows",
        seen_by("test_cpu_small_scored", "test_dropout"),
    ),
    Mutant(
        "small, scored: dropout of the first heads",
        SMALL,
        "torch.arange(heads.start, heads.stop)",
        "torch.arange(heads.stop - heads.start)",
        seen_by("test_cpu_small_scored", "test_dropout and scores1"),
    ),
    Mutant(
        "small, scored: NaN of a pair that does not attend",
        SMALL,
        'below_inf = below_inf and bool((term < float("inf")).all())',
        "below_inf = True",
        seen_by("test_cpu_small_scored", "reach_nothing and too"),
    ),
    Mutant(
        "weights: softcap before the bias",
        WEIGHTS,
        "s = torch.where(mask, s + bias, 0)",
        "s = torch.where(mask, s, 0)",
        seen_by("test_scores", "test_every_combination and full-no and reference"),
    ),
    Mutant(
        "weights: sink of another head",
        WEIGHTS,
        "scores.sinks[:, None, None]",
        "scores.sinks.flip(0)[:, None, None]",
        seen_by("test_scores", "test_every_combination and None-no and reference"),
    ),
    Mutant(
        "operators: gradients of tables by the flags of dense terms",
        OPS,
        "[*needed[4], *needed[5][::_PARTS], needed[7]]",
        "[*needed[4], *needed[5][1::_PARTS], needed[7]]",
        seen_by("test_scores", "test_only_what_is_needed"),
    ),
    Mutant(
        "operators: exact zero under a softcap",
        OPS,
        "shifts = not softcap and sinks is None and dlse is None",
        "shifts = dlse is None",
        seen_by("test_scores", "test_a_constant_of_a_query"),
    ),
    Mutant(
        "operators: sinks of no keys without gradient",
        OPS,
        "zeros[-1] += dlse.sum((0, 2))",
        "zeros[-1] += 0",
        seen_by("test_scores", "test_no_keys_at_all"),
    ),
    Mutant(
        "expanded bias: gradient of one of its parts",
        BIAS,
        "(grad / (ctx.shape.numel() // max(1, grad.numel()))).expand(ctx.shape)",
        "grad.expand(ctx.shape)",
        seen_by("test_scores", "test_expanded_tensors_stay_narrow"),
    ),
    Mutant(
        "alibi: offset the other way",
        BUILDERS,
        "found.distances(self.offset).abs()",
        "found.distances(-self.offset).abs()",
        seen_by("test_scores", "test_every_combination and alibi-no and cpu"),
    ),
    Mutant(
        "buckets: keys before the query in the second half",
        BUILDERS,
        "(ahead > 0) * buckets",
        "(ahead < 0) * buckets",
        seen_by("test_score_builders", "test_buckets_are_those_of_t5"),
    ),
    Mutant(
        "windows: rows as long as they are high",
        BUILDERS,
        "step = self.height * self.width, 2 * self.width - 1",
        "step = self.height * self.width, 2 * self.height - 1",
        seen_by("test_score_builders", "test_windows_are_those_of_swin"),
    ),
    Mutant(
        "low rank: what is rounded away lost",
        RESOLVE,
        "(t.detach() - high.detach()).to(dtype)",
        "0 * (t.detach() - high.detach()).to(dtype)",
        seen_by("test_score_builders", "test_low_rank_keeps_a_wider_dtype"),
    ),
    Mutant(
        "score_mod: what is multiplied is added",
        SCORE_MOD,
        "if wrong.any():",
        "if wrong.all():",
        seen_by("test_score_builders", "test_others_are_refused"),
    ),
    Mutant(
        "score_mod: head not read",
        SCORE_MOD,
        "tuple(inputs[1:])",
        "(inputs[1], False, *inputs[3:])",
        seen_by("test_score_builders", "test_only_what_fn_reads"),
    ),
    Mutant(
        "dropout: the same bits for two runs of 8 queries",
        DROPOUT,
        "bits = (word >> (16 * half)) & (STEPS - 1)",
        "bits = word & (STEPS - 1)",
        seen_by("test_scores", "test_heads_samples_queries_and_keys_differ"),
    ),
)
