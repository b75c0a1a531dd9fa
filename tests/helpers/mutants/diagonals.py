"""Bugs of the gradient of a table by distance on Hopper."""

from tests.helpers.mutants.record import Mutant, seen_by

HOST, KERNELS, PTX = (
    f"anymask/backends/hopper/{name}.py" for name in ("diagonals", "kernels/diagonals", "kernels/ptx")
)
ASSEMBLY, SUMS = (
    seen_by("test_diagonals", "assembly"),
    seen_by("test_interpreter_diagonals"),
)


def _of_kernel(name: str, old: str, new: str, chosen: str) -> Mutant:
    tests = seen_by("test_gpu_scores", f"gradients_of_the_hopper and {chosen}")
    return Mutant(f"gpu: table: {name}", KERNELS, old, new, tests, gpu=True)


DIAGONALS: tuple[Mutant, ...] = (
    Mutant("table: second queries as far as first ones", PTX, "setp.le.u32 below1", "setp.lt.u32 below1", ASSEMBLY),
    Mutant("table: keys of two warps in one place", PTX, "xor.pred high, c1, w0", "and.pred high, c1, c1", ASSEMBLY),
    Mutant("table: a lane's last exchange with itself", PTX, "selp.b32 y, -9, 9, c0", "selp.b32 y, 0, 0, c0", ASSEMBLY),
    Mutant(
        "table: full tiles before the partial ones of their column",
        KERNELS,
        "partial_end + start + at, mask",
        "partial + start + at, mask",
        seen_by("test_interpreter_diagonals", "numbered and causal"),
    ),
    Mutant(
        "table: memory of one head for all",
        HOST,
        "copies //= block_mask.batch * block_mask.heads",
        "copies = 1",
        seen_by("test_diagonals", "memory"),
    ),
    Mutant(
        "table: an entry beside its own",
        KERNELS,
        "place = q_tiles * TILE + kv_len - 1",
        "place = q_tiles * TILE + kv_len",
        SUMS,
    ),
    Mutant("table: empty tiles added", KERNELS, "(exists & (number >= 0))", "exists", SUMS),
    Mutant(
        "table: halves of queries for those of keys",
        KERNELS,
        "PARTS + q_block % PARTS) * PARTS + kv_block",
        "PARTS + kv_block % PARTS) * PARTS + q_block",
        SUMS,
    ),
    _of_kernel("runs in the order of turns", "    if cfg.IN_TURN:", "    if False:", "relative- and none"),
    _of_kernel(
        "samples that share a plane in one place",
        "column.sample * (strides.sample == 0)",
        "column.sample * 0",
        "relative- and causal",
    ),
    _of_kernel("both warpgroups in one place", "(G * RUN + at)", "at", "relative- and none"),
)
