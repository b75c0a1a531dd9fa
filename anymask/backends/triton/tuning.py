"""Launch options of the Triton kernels: a literal table and a pure lookup.

Rows of "hopper" for head_dim 64 and 128 are the fastest without register spills of those that
`python -m benchmarks.tune --kernels triton [--head-dim 64] [--pointers]` timed on an NVIDIA H200 (Triton 3.6, fp16,
B2 H16 L8192) on 2026-11-22. All others are chosen to fit the shared memory and the registers of their family, and wait
for a measurement.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """Queries and keys of a kernel step (both divide the 128 of a tile), warps a program, stages of the pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# family -> pass -> padded head_dim -> config, for 16-bit inputs
TABLE: dict[str, dict[str, dict[int, TileConfig]]] = {
    # 227 KiB of shared memory
    "hopper": {
        "fwd": {64: TileConfig(64, 128, 4, 2), 128: TileConfig(128, 128, 8, 3), 256: TileConfig(128, 64, 8, 2)},
        "dq": {64: TileConfig(128, 64, 8, 3), 128: TileConfig(128, 64, 8, 3), 256: TileConfig(64, 32, 8, 2)},
        "dkdv": {64: TileConfig(64, 64, 4, 3), 128: TileConfig(64, 64, 4, 2), 256: TileConfig(32, 64, 8, 2)},
    },
    # the same chip where tiles come through pointers, whose addresses take registers
    "hopper-pointers": {
        "fwd": {64: TileConfig(128, 128, 8, 3), 128: TileConfig(128, 128, 8, 3), 256: TileConfig(128, 32, 8, 2)},
        "dq": {64: TileConfig(128, 64, 8, 3), 128: TileConfig(128, 64, 8, 3), 256: TileConfig(64, 32, 8, 1)},
        "dkdv": {64: TileConfig(64, 128, 8, 2), 128: TileConfig(64, 64, 4, 2), 256: TileConfig(32, 64, 8, 1)},
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

# IEEE fp32 products run on the plain ALUs and hold both operands in registers
FP32 = {64: TileConfig(32, 32, 4, 1), 128: TileConfig(32, 32, 4, 1), 256: TileConfig(16, 16, 4, 1)}


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
    return "hopper" if use_tma else "hopper-pointers"


def choose(backend: str, arch: int | str, use_tma: bool, itemsize: int, block_d: int, which: str) -> TileConfig:
    """Config of pass `which` ("fwd", "dq", "dkdv") for inputs of `itemsize` bytes and a padded head_dim."""
    by_dim = FP32 if itemsize == 4 else TABLE[family(backend, arch, use_tma)][which]
    return by_dim[max(64, block_d)]
