"""Split-KV: the forward pass of few queries over many keys, by programs that share the keys.

Where there are fewer work tiles than multiprocessors, as when a model decodes, each of S splits walks a share of a
row's kv tiles, and a second kernel adds what they found in order (Flash-Decoding; Dao et al., 2023). On one GPU results
have the same bits in every run. S depends on how many work tiles a call has, and with it the last bits of a sample
depend on its batch.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.backends.gpu import target
from anymask.backends.gpu.arguments import (
    LOG2_E,
    TINY_SCALE,
    TileConfig,
    has_pair,
    kernel_options,
    mask_lists,
    padded_dim,
    plane_strides,
)
from anymask.block_mask import BlockMask
from anymask.launch import args_key, device_guard
from anymask.layout import empty_as
from anymask.plan import launch
from anymask.tiles import TILE, tiles_over

# partial outputs are up to so many fp32 numbers for each number of the output
MAX_SPLITS = 64
# kv tiles from which on keys are split, up to SHORT queries and for more of them, whose own tiles are worth more
SHORT = 64
FEWEST_TILES, FEWEST_TILES_OF_MANY = 4, 64
# columns of o that a program joins
JOINED_COLUMNS = 64


class _Line(NamedTuple):
    """The rows that share keys and mask, which programs walk together."""

    # heads of a group that are packed, each with its queries, one after the other (PackGQA of FlashAttention-3)
    packed: int
    rows: int
    # rows of a program
    block: int


def _line(q: Tensor, k: Tensor, block_mask: BlockMask | None) -> _Line:
    q_heads, q_len = q.shape[1], q.shape[2]
    packed = q_heads // k.shape[1] if q_len <= TILE and (block_mask is None or block_mask.heads == 1) else 1
    rows = packed * q_len
    # the parts of fp32 numbers take the registers of more rows
    return _Line(packed, rows, 16 if rows <= 16 or q.element_size() == 4 else 32 if rows <= 32 else 64)


def count(q: Tensor, k: Tensor, block_mask: BlockMask | None) -> int:
    """Splits of the keys of each row, 1 if the call has work tiles enough. Reads sizes only, and waits for nothing."""
    tiles, fewest = tiles_over(k.shape[2]), FEWEST_TILES if q.shape[2] <= SHORT else FEWEST_TILES_OF_MANY
    # Triton's interpreter runs programs one after the other
    if tiles < fewest or not q.is_cuda:
        return 1
    if block_mask is not None:
        tiles = block_mask.rows.mean_tiles
        if tiles < fewest:
            return 1
    line = _line(q, k, block_mask)
    lines = q.shape[0] * q.shape[1] // line.packed
    return splits_of(lines, line.rows, line.block, tiles, target.multiprocessors(q.device))


def splits_of(lines: int, rows: int, block: int, tiles: int, multiprocessors: int) -> int:
    """Splits for `lines` of `rows` each, `block` rows a program, that have `tiles` kv tiles to walk."""
    programs = lines * -(-rows // block)
    # kernels without splits leave a quarter of the multiprocessors idle at most
    if programs == 0 or 4 * lines * tiles_over(rows) > 3 * multiprocessors:
        return 1
    return max(1, min(multiprocessors // programs, tiles, MAX_SPLITS))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None,
    sm_scale: float,
    splits: int,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(o, lse)`. With `allow_tf32`, fp32 products are those of TF32."""
    batch, q_heads, q_len, _ = q.shape
    v_dim = v.shape[3]
    o = empty_as(q, v_dim)
    lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    parts = _Parts(
        q.new_empty(splits, lse.numel(), v_dim, dtype=torch.float32),
        q.new_empty(splits, lse.numel(), 2, dtype=torch.float32),
    )
    with device_guard(q.device):
        current = target.current_target()
        # the second kernel starts while the first one ends
        use_pdl = current[0] == "cuda" and int(current[1]) >= 90
        _launch_split(q, k, v, parts, block_mask, sm_scale, allow_tf32, current, use_pdl)
        _launch_join(parts, o, lse, use_pdl)
    return o, lse


class _Parts(NamedTuple):
    """What splits find, fp32: numerators of o `[splits, rows, v_dim]`, and m and l `[splits, rows, 2]`."""

    o: Tensor
    sums: Tensor


def _launch_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: _Parts,
    block_mask: BlockMask | None,
    sm_scale: float,
    allow_tf32: bool,
    current: tuple[str, int | str],
    use_pdl: bool,
) -> None:
    from anymask.backends.gpu.kernels.split import _split_kernel

    batch, q_heads, q_len, head_dim = q.shape
    splits, v_dim, line = parts.o.shape[0], v.shape[3], _line(q, k, block_mask)
    config = choose(*current, q.element_size(), line.block, padded_dim(head_dim), padded_dim(v_dim), allow_tf32)
    constants, options = kernel_options(config, head_dim, v_dim, False)
    strides, used = (q.stride()[:3], k.stride()[:3], v.stride()[:3]), has_pair(block_mask, "cols")
    launch(
        _split_kernel,
        (-(-line.rows // line.block) * splits, q_heads // line.packed, batch),
        (
            q,
            k,
            v,
            parts.o,
            parts.sums,
            *strides,
            *mask_lists(block_mask, "rows")[:5],
            used,
            *plane_strides(block_mask),
            q_heads,
            q_heads // k.shape[1],
            line.packed,
            q_len,
            k.shape[2],
            splits,
            (abs(sm_scale) or TINY_SCALE) * LOG2_E,
        ),
        {
            **constants,
            "IS_NEGATIVE": sm_scale < 0,
            "USE_ASM": current[0] == "cuda" and not target.interprets(),
            "USE_PDL": use_pdl,
        },
        # what was allocated here is aligned
        (q.device, *args_key((q, k, v, *strides)), block_mask is None, used is None),
        **options,
    )


_JOIN_OPTIONS: dict[bool, dict[str, Any]] = {
    False: {"num_warps": 4, "enable_fp_fusion": True},
    True: {"num_warps": 4, "enable_fp_fusion": True, "launch_pdl": True},
}


def _launch_join(parts: _Parts, o: Tensor, lse: Tensor, use_pdl: bool) -> None:
    from anymask.backends.gpu.kernels.split import _join_kernel

    splits, rows, v_dim = parts.o.shape
    columns, strides = min(JOINED_COLUMNS, padded_dim(v_dim)), o.stride()[:3]
    launch(
        _join_kernel,
        (rows, -(-v_dim // columns), 1),
        (parts.o, parts.sums, o, lse, strides, splits, o.shape[1], o.shape[2]),
        {
            "V_DIM": v_dim,
            "BLOCK_DV": columns,
            # few kernels for many numbers of splits
            "MAX_SPLITS": max(16, padded_dim(splits)),
            "USE_PDL": use_pdl,
        },
        (o.device, o.dtype, *args_key((strides,))),
        **_JOIN_OPTIONS[use_pdl],
    )


# bytes of k and v that a step loads, and stages, up to 32 rows a program and for 64
_STEPS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "hopper": ((32768, 3), (32768, 3)),
    "ampere": ((32768, 3), (32768, 3)),
    "small": ((32768, 3), (16384, 2)),
    "cdna": ((32768, 1), (16384, 1)),
}


@cache
def choose(
    backend: str, arch: int | str, itemsize: int, block_m: int, block_d: int, block_dv: int, allow_tf32: bool = False
) -> TileConfig:
    """Config for inputs of `itemsize` bytes, `block_m` rows of a program, and a padded head_dim and v_dim."""
    if backend == "hip":
        family = "cdna"
    elif int(arch) in (86, 89) or int(arch) >= 120:
        family = "small"
    else:
        family = "ampere" if int(arch) < 90 else "hopper"
    step_bytes, stages = _STEPS[family][block_m == 64]
    keys = step_bytes // (itemsize * (block_d + block_dv))
    block_n = min(TILE, max(16, 1 << (keys.bit_length() - 1)))
    larger = max(block_d, block_dv)
    # accumulators of 64 rows, and the three parts of each fp32 number, fit the registers of more warps
    warps = 8 if (larger > 128 and block_m == 64) or (larger == 128 and itemsize == 4) else 4
    precision = "ieee"
    if itemsize == 4 and larger <= 128 and family != "cdna":
        precision = "tf32" if allow_tf32 else "bf16x6"
    return TileConfig(block_m, block_n, warps, stages, precision)
