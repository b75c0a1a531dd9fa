"""Bugs of plans: of what they are looked up by, of what a launch gives to the driver, and of parts of a mask."""

from tests.helpers.mutants.record import Mutant, seen_by

CALLS, PLAN, DIRECT = "anymask/calls.py", "anymask/plan.py", "anymask/direct.py"
STRUCTURE = "anymask/block_mask/structure.py"
KIND = "return t.shape, t.stride(), t.dtype, t.data_ptr() % 16"
LAUNCHES = seen_by("test_plan", "launch_what_backends_do")

CHANGES = seen_by("test_plan", "not launch_what_backends_do")
WRITTEN = seen_by("test_plan_scores", "not launch_what_backends_do")
FORM = "Form(len(scores.dense), diagonal, scores.softcap, scores.sinks is not None, scores.dropout_p)"

PLANS = (
    Mutant("plan key without strides", CALLS, KIND, "return t.shape, t.contiguous().stride(), t.dtype, 0", LAUNCHES),
    Mutant("plan key without the alignment", CALLS, KIND, "return t.shape, t.stride(), t.dtype, 0", LAUNCHES),
    Mutant("plan key without the dtype", CALLS, "t.stride(), t.dtype", "t.stride(), torch.float16", LAUNCHES),
    Mutant(
        "plan key without the scale",
        CALLS,
        "_forward(backend, structure, sm_scale,",
        "_forward(backend, structure, 0.125,",
        LAUNCHES,
    ),
    Mutant(
        "plan key without whether results repeat",
        CALLS,
        "_backward(backend, structure, sm_scale, deterministic,",
        "_backward(backend, structure, sm_scale, False,",
        LAUNCHES,
    ),
    Mutant(
        "plan key without the way fp32 is multiplied",
        CALLS,
        "fp32_precision if q.dtype is torch.float32 else None",
        "fp32_precision[:0] if q.dtype is torch.float32 else None",
        LAUNCHES,
    ),
    Mutant(
        "plan key without the alignment of the mask",
        STRUCTURE,
        "t.data_ptr() % 16 for t in",
        "0 * t.data_ptr() for t in",
        LAUNCHES,
    ),
    Mutant(
        "plan key without tiles of a column",
        STRUCTURE,
        "cols.mean_tiles,",
        "9 + 0 * cols.mean_tiles,",
        LAUNCHES,
    ),
    Mutant("plan key without unused keys", STRUCTURE, "cols.has_pair.numel()", "0 * cols.has_pair.numel()", LAUNCHES),
    Mutant(
        "plan key without planes of samples",
        STRUCTURE,
        "rows.order.shape[0],",
        "1 + 0 * rows.order.shape[0],",
        LAUNCHES,
    ),
    Mutant(
        "launch with the descriptors of another call",
        DIRECT,
        "failed |= self._replace(",
        "failed |= 0 and self._replace(",
        LAUNCHES,
    ),
    Mutant(
        "launch with a descriptor of the call before",
        DIRECT,
        "wanted[at] != written[at]:",
        "wanted[at] > written[at]:",
        CHANGES,
    ),
    Mutant(
        "launch on the stream of another call",
        DIRECT,
        "self._config.stream = ",
        "self._config.stream = self._config.stream or ",
        CHANGES,
    ),
    Mutant("launches of two threads at once", DIRECT, "with self._lock:", "with threading.Lock():", CHANGES),
    Mutant(
        "launch that the driver refused",
        DIRECT,
        "return not self._launch(*self._call)",
        "return self._launch(*self._call) >= 0",
        CHANGES,
    ),
    Mutant(
        "launch with an address that the driver refused",
        DIRECT,
        "if failed:\n                    return False",
        "if failed < 0:\n                    return False",
        CHANGES,
    ),
    Mutant(
        "launch with the addresses of the call before",
        DIRECT,
        "if wanted != written:",
        "if written is None:",
        CHANGES,
    ),
    Mutant(
        "launch with what a refused call has written",
        DIRECT,
        "self._written, at, failed = None, ",
        "self._written, at, failed = wanted, ",
        CHANGES,
    ),
    Mutant("launch that a profiler does not see", PLAN, " or now.is_watched()", "", CHANGES),
    *(
        Mutant(
            f"plan key without {name}",
            CALLS,
            f"return {FORM}",
            f"return {FORM.replace(field, instead)}",
            seen_by("test_plan_scores", "launch_what_backends_do"),
        )
        for name, field, instead in (
            ("the soft cap", "scores.softcap,", "20.0 * bool(scores.softcap),"),
            ("the probability of dropout", "scores.dropout_p)", "0.1 * bool(scores.dropout_p))"),
        )
    ),
    Mutant("plan: a view of another size", PLAN, "if self.is_view else t", "if False else t", WRITTEN),
    Mutant("plan: a result of another size", PLAN, "if not operand.is_view:", "if True:", WRITTEN),
    Mutant("plan: writes are left out", PLAN, "if _writes(function):", "if False:", WRITTEN),
    Mutant("plan: alignment of a part", PLAN, "(of.residue + offset) % 16", "of.residue", WRITTEN),
    Mutant(
        "plan: sizes that masks do not share", CALLS, "plan.operand(None, (1,),", "plan.operand((9,), (1,),", CHANGES
    ),
    Mutant(
        "a mask is found by tensors that do not say all",
        "anymask/block_mask/known.py",
        " or known.n_first > n:",
        ":",
        seen_by("test_block_mask", "few_tensors"),
    ),
    Mutant(
        "planes of a mask are left out",
        "anymask/block_mask/parts.py",
        "if sizes[0] == sizes[1] == (1, 1, 0)",
        "if sizes[0][2:] == (0,)",
        seen_by("test_block_mask", "few_tensors"),
    ),
    Mutant(
        "a compiled function leaves out which keys are used",
        "anymask/traced.py",
        "[: mask.n_first - ONE_PLANE]",
        "[:1]",
        seen_by("test_compiled", "few_tensors"),
    ),
    Mutant(
        "plan: a tensor of one call in a tuple",
        PLAN,
        "            _refuse_tensors(arg)\n",
        "            pass\n",
        seen_by("test_plan_scores", "of_one_call"),
    ),
    Mutant(
        "plan: an output of one call",
        PLAN,
        "        _refuse_tensors(outputs)\n",
        "",
        seen_by("test_plan_scores", "of_one_call"),
    ),
)
