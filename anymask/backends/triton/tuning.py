"""Launch options of the Triton kernels: a literal table and a pure lookup.

Rows of "hopper" for head_dim 64 and 128 are the fastest without register spills of those that
`python -m benchmarks.tune --kernels triton [--head-dim 64] [--pointers]` timed on an NVIDIA H200 (Triton 3.6, fp16,
B2 H16 L8192) on 2026-11-22. Its other rows, those of "hopper-pointers" for 32 and 256, and fp32 there, are the fastest
of up to eight on an H100 (Triton 3.6, random masks) on 2026-11-27. All others are chosen to fit the shared memory and
the registers of their family, and wait for a measurement.

fp32 products. A tensor core of an NVIDIA GPU takes fp32 numbers only cut to TF32. "bf16x6" writes each as a sum of
three bf16 numbers (8 + 8 + 8 bits of the 24) and adds the six products that fp32 can hold, so results are as close to
fp64 as those of IEEE products, and closer on an H100, at a fifth of the time. Two limits come from bf16: an absolute
value of 3.39618e38 or more, the last 0.2 % of fp32's range, counts as infinite; and what lies below 2**-133 of a number
is lost, which is at most half a unit of fp32 for numbers from 2**-110 (7.7e-34) on. Infinities and NaN act as in
IEEE products. AMD's matrix cores multiply IEEE fp32 as it is.

`HALVES` are the configs of Hopper's kernels of fp32 in two fp16 parts (halves.py). Those of 64 and 128 are the fastest
of two to six on an H200 (Triton 3.6, B2 H16 L2048 and L4096, random and causal masks) on 2026-11-28.
"""

from dataclasses import replace
from typing import TypeAlias

from anymask.backends.gpu.arguments import TileConfig

# pass -> the larger padded dim of head_dim and v_dim, or both, head_dim first -> config
Rows: TypeAlias = dict[str, dict[int | tuple[int, int], TileConfig]]

# by family, for 16-bit inputs
TABLE: dict[str, Rows] = {
    # 227 KiB of shared memory
    "hopper": {
        "fwd": {
            32: TileConfig(64, 128, 4, 3),
            64: TileConfig(64, 128, 4, 2),
            128: TileConfig(128, 128, 8, 3),
            (256, 128): TileConfig(128, 64, 8, 3),
            256: TileConfig(128, 64, 8, 2),
        },
        "dq": {
            32: TileConfig(64, 64, 4, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 64, 8, 3),
            (256, 128): TileConfig(128, 64, 8, 2),
            256: TileConfig(128, 32, 8, 2),
        },
        "dkdv": {
            32: TileConfig(64, 128, 4, 3),
            64: TileConfig(64, 64, 4, 3),
            128: TileConfig(64, 64, 4, 2),
            (256, 128): TileConfig(32, 64, 4, 2),
            256: TileConfig(64, 64, 8, 2),
        },
    },
    # as much shared memory, and tensor memory that holds the sums
    "blackwell": {
        "fwd": {64: TileConfig(64, 128, 4, 2), 128: TileConfig(128, 128, 8, 3), 256: TileConfig(128, 64, 8, 2)},
        "dq": {64: TileConfig(128, 64, 8, 3), 128: TileConfig(128, 64, 8, 3), 256: TileConfig(64, 32, 8, 2)},
        "dkdv": {64: TileConfig(64, 64, 4, 3), 128: TileConfig(64, 64, 4, 2), 256: TileConfig(32, 64, 8, 2)},
    },
    # Hopper where tiles come through pointers, whose addresses take registers
    "hopper-pointers": {
        "fwd": {
            32: TileConfig(64, 128, 4, 2),
            64: TileConfig(128, 128, 8, 3),
            128: TileConfig(128, 128, 8, 3),
            256: TileConfig(128, 64, 8, 2),
        },
        "dq": {
            32: TileConfig(128, 64, 4, 3),
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 64, 8, 3),
            256: TileConfig(128, 32, 8, 2),
        },
        "dkdv": {
            32: TileConfig(64, 64, 4, 3),
            64: TileConfig(64, 128, 8, 2),
            128: TileConfig(64, 64, 4, 2),
            256: TileConfig(64, 64, 8, 2),
        },
    },
    # 163 KiB, no warpgroup products
    "ampere": {
        "fwd": {64: TileConfig(128, 64, 8, 3), 128: TileConfig(128, 64, 8, 3), 256: TileConfig(64, 32, 4, 2)},
        "dq": {64: TileConfig(128, 64, 8, 3), 128: TileConfig(64, 64, 8, 2), 256: TileConfig(64, 32, 8, 1)},
        "dkdv": {64: TileConfig(32, 128, 8, 2), 128: TileConfig(64, 64, 8, 2), 256: TileConfig(32, 64, 8, 1)},
    },
    # 99 KiB: consumer GPUs of every generation
    "small": {
        "fwd": {64: TileConfig(128, 64, 4, 2), 128: TileConfig(64, 64, 4, 2), 256: TileConfig(32, 32, 4, 1)},
        "dq": {64: TileConfig(64, 64, 4, 2), 128: TileConfig(64, 32, 4, 2), 256: TileConfig(32, 32, 4, 1)},
        "dkdv": {64: TileConfig(64, 64, 4, 2), 128: TileConfig(32, 64, 4, 2), 256: TileConfig(32, 32, 4, 1)},
    },
    # 64 KiB, wavefronts of 64
    "cdna": {
        "fwd": {64: TileConfig(128, 64, 4, 1), 128: TileConfig(128, 64, 4, 1), 256: TileConfig(64, 32, 4, 1)},
        "dq": {64: TileConfig(64, 64, 4, 1), 128: TileConfig(64, 32, 4, 1), 256: TileConfig(32, 32, 4, 1)},
        "dkdv": {64: TileConfig(64, 64, 4, 1), 128: TileConfig(32, 64, 4, 1), 256: TileConfig(32, 32, 4, 1)},
    },
}

# small enough for "small", and for Blackwell's tensor memory, where each of six products holds columns with Triton 3.6
_SPLIT: Rows = {
    "fwd": {
        64: TileConfig(64, 32, 4, 2, "bf16x6"),
        128: TileConfig(32, 32, 4, 2, "bf16x6"),
        256: TileConfig(16, 16, 4, 1),
    },
    "dq": {
        64: TileConfig(32, 32, 4, 2, "bf16x6"),
        128: TileConfig(32, 16, 4, 1, "bf16x6"),
        256: TileConfig(16, 16, 4, 1),
    },
    "dkdv": {
        64: TileConfig(32, 32, 4, 1, "bf16x6"),
        128: TileConfig(32, 32, 8, 1, "bf16x6"),
        256: TileConfig(16, 16, 4, 1),
    },
}

# the same for fp32 inputs, which no descriptor reads
FP32: dict[str, Rows] = {
    "hopper-pointers": {
        "fwd": {
            32: TileConfig(128, 64, 4, 2, "bf16x6"),
            64: TileConfig(128, 32, 8, 2, "bf16x6"),
            128: TileConfig(128, 64, 8, 2, "bf16x6"),
            256: TileConfig(64, 16, 4, 1, "bf16x6"),
        },
        "dq": {
            32: TileConfig(64, 64, 4, 2, "bf16x6"),
            64: TileConfig(128, 64, 8, 2, "bf16x6"),
            128: TileConfig(128, 32, 8, 1, "bf16x6"),
            256: TileConfig(16, 16, 4, 1, "bf16x6"),
        },
        "dkdv": {
            32: TileConfig(64, 64, 4, 2, "bf16x6"),
            64: TileConfig(32, 64, 4, 1, "bf16x6"),
            128: TileConfig(16, 64, 4, 1, "bf16x6"),
            256: TileConfig(16, 16, 4, 1, "bf16x6"),
        },
    },
    "ampere": _SPLIT,
    "small": _SPLIT,
    "cdna": {
        "fwd": {64: TileConfig(64, 64, 4, 1), 128: TileConfig(64, 32, 4, 1), 256: TileConfig(16, 16, 4, 1)},
        "dq": {64: TileConfig(64, 32, 4, 1), 128: TileConfig(32, 32, 4, 1), 256: TileConfig(16, 16, 4, 1)},
        "dkdv": {64: TileConfig(32, 64, 4, 1), 128: TileConfig(32, 32, 4, 1), 256: TileConfig(16, 16, 4, 1)},
    },
}

# Hopper's kernels of fp32 in two fp16 parts, which the copy engine reads
HALVES: Rows = {
    "fwd": {32: TileConfig(64, 64, 4, 2), 64: TileConfig(64, 64, 4, 2), 128: TileConfig(128, 64, 8, 2)},
    "dq": {32: TileConfig(64, 64, 4, 2), 64: TileConfig(64, 64, 4, 2), 128: TileConfig(128, 32, 8, 2)},
    "dkdv": {32: TileConfig(64, 64, 4, 2), 64: TileConfig(64, 64, 4, 2)},
    # dk and dv of more columns do not fit the registers of a program
    "dv": {128: TileConfig(32, 64, 4, 2)},
    "dk": {128: TileConfig(64, 64, 4, 2)},
}


# the same where scores are more than products: they need registers, and a bias memory
SCORED: dict[str, Rows] = {
    family: {
        "fwd": {64: TileConfig(128, 64, 8, 3), 128: TileConfig(128, 64, 8, 3), 256: TileConfig(128, 64, 8, 1)},
        "dq": {64: TileConfig(64, 64, 4, 2), 128: TileConfig(64, 64, 4, 2), 256: TileConfig(128, 32, 8, 1)},
        "dkdv": {64: TileConfig(64, 64, 4, 2), 128: TileConfig(64, 64, 4, 2), 256: TileConfig(64, 64, 8, 1)},
    }
    for family in ("hopper", "hopper-pointers")
}

# blocks of the gradient of a bias of pairs, square: by the bytes of an input, then the padded dim; of every family
BIAS: dict[int, dict[int | tuple[int, int], TileConfig]] = {
    2: {128: TileConfig(64, 64, 4, 2), 256: TileConfig(32, 32, 4, 1)},
    4: {128: TileConfig(32, 32, 4, 1), 256: TileConfig(16, 16, 4, 1)},
}


def family(backend: str, arch: int | str, use_tma: bool) -> str:
    """Table family of a Triton target: `("cuda", 90, True)` -> `"hopper"`."""
    if backend == "hip":
        return "cdna"
    major, minor = divmod(int(arch), 10)
    if (major, minor) in ((8, 6), (8, 9)) or major == 12:
        return "small"
    # addresses of Hopper's long steps do not fit the registers that Blackwell's products leave
    if major < 9 or (major > 9 and not use_tma):
        return "ampere"
    if major > 9:
        return "blackwell"
    return "hopper" if use_tma else "hopper-pointers"


def choose_halves(block_d: int, block_dv: int, which: str) -> TileConfig:
    """Config of pass `which` of fp32 in two fp16 parts, for padded head_dim and v_dim."""
    rows = HALVES[which]
    return rows[min(key for key in rows if isinstance(key, int) and key >= max(block_d, block_dv))]


def choose(
    backend: str,
    arch: int | str,
    use_tma: bool,
    itemsize: int,
    block_d: int,
    block_dv: int,
    which: str,
    allow_tf32: bool = False,
    tables: int | None = None,
) -> TileConfig:
    """Config of pass `which` ("fwd", "dq", "dkdv", "bias"), for inputs of `itemsize` bytes, padded head_dim and v_dim.

    `tables`: of which a call with `Scores` reads an entry for each pair; None without `Scores`. With `allow_tf32`, fp32
    products that would be several of a lower precision become one of TF32.
    """
    table, name = FP32 if itemsize == 4 else TABLE, family(backend, arch, use_tma)
    has_own = tables is not None and itemsize == 2 and name in SCORED
    rows = BIAS[itemsize] if which == "bias" else (SCORED if has_own else table)[name][which]
    larger = max(block_d, block_dv)
    row = min(key for key in rows if isinstance(key, int) and key >= larger)
    config = rows.get((block_d, block_dv)) or rows[row]
    if tables is not None:
        # a stage less leaves memory for a bias, or forward for a second table, whose entries have stages too
        less = (max(0, tables - 1) if which == "fwd" else 0) + (not has_own)
        config = replace(config, num_stages=max(1, config.num_stages - less))
    if allow_tf32 and config.PRECISION != "ieee":
        config = replace(config, PRECISION="tf32")
    return config
