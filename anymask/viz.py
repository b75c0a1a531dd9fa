"""Pictures of a `BlockMask`: its tiles in the terminal, its tokens and tiles in a PNG; and of a bias beside it.

Cost is that of the tiles, and of a bias that of its pairs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anymask.block_mask import BlockMask, text
from anymask.block_mask.bits import unpack_bits
from anymask.block_mask.files import check_target
from anymask.block_mask.text import LEGEND as LEGEND
from anymask.block_mask.text import NAMES, draw
from anymask.tiles import EMPTY, FULL, PARTIAL, TILE, tiles_over

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {EMPTY: "#f2f2f2", PARTIAL: "#f0a030", FULL: "#1f4e79"}

# most tiles whose borders are drawn: more would be a grey veil
MAX_BORDERED = 24 * 24
BORDER = "#b0b0b0"
# pixels along the longer side of a plotted mask
MAX_PIXELS = 1024
# partial tiles unpacked at a time: 16 MiB of booleans
CHUNK_TILES = 1024


def to_text(block_mask: BlockMask, plane: tuple[int, int] = (0, 0), width: int = 64) -> str:
    """The tiles of one plane, one character each: `█` full, `░` partial, `·` empty; lines are query tiles.

    Args:
        block_mask: the mask to draw.
        plane: batch and head, counted among the planes the mask stores.
        width: most characters along either side, spaces between them apart. A larger plane is drawn with `scale`
            tiles a side in one character, which is full (empty) if all of them are.

    >>> from anymask import causal, pack
    >>> print(to_text(pack(causal(), q_len=384, kv_len=384)))
    ░ · ·
    █ ░ ·
    █ █ ░
    """
    return draw(_checked(block_mask).tile_kinds(plane), width)


def scale(block_mask: BlockMask, width: int = 64) -> int:
    """Tiles along each side of one character of `to_text`."""
    return text.scale(_checked(block_mask).tile_kinds(), width)


def plot(
    block_mask: BlockMask, path: str | Path | None = None, plane: tuple[int, int] = (0, 0), title: str | None = None
) -> Figure:
    """A figure with the tokens of one plane on the left and its tiles, coloured by kind, on the right.

    Args:
        block_mask: the mask to draw; its lengths are 1 or more tokens.
        path: where to write the figure too, in the format of the file's suffix, PNG if it has none.
        plane: batch and head, counted among the planes the mask stores.
        title: line above both panels.

    Raises:
        ImportError: matplotlib is not installed. ValueError: no such plane, one without tokens, or a suffix of no known
        format. OSError: no file can be written at path. TypeError: an argument of another type.
    """
    require_matplotlib()
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title is a {type(title).__name__}; allowed are None and a str")
    target = None if path is None else picture_target(path)
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    q_len, kv_len = _checked(block_mask).q_len, block_mask.kv_len
    if not (q_len and kv_len):
        raise ValueError(f"block_mask has q_len={q_len}, kv_len={kv_len}; allowed are lengths of 1 and more tokens")
    kinds = block_mask.tile_kinds(plane)
    counts = {kind: int((kinds == kind).sum()) for kind in (FULL, PARTIAL, EMPTY)}
    shares, density = token_shares(block_mask, plane)

    figure = Figure(figsize=(10, 5.6), dpi=120, layout="constrained")
    tokens, tiles = figure.subplots(1, 2)
    aspect = "equal" if max(q_len, kv_len) <= 4 * min(q_len, kv_len) else "auto"
    tokens.imshow(
        shares.numpy(), cmap="Blues", vmin=0, vmax=1, extent=(0, kv_len, q_len, 0), aspect=aspect, interpolation="none"
    )
    if kinds.numel() <= MAX_BORDERED:
        for axes in (tokens, tiles):
            axes.set_xticks(range(0, kv_len, TILE), minor=True)
            axes.set_yticks(range(0, q_len, TILE), minor=True)
            # a border under a tick is a border too
            axes.xaxis.remove_overlapping_locs = axes.yaxis.remove_overlapping_locs = False
            axes.grid(which="minor", color=BORDER, linewidth=0.6)
            axes.tick_params(which="minor", length=0)
    tokens.set(title=f"tokens: {density:.1%} of pairs attend", xlabel="key", ylabel="query")
    shape = (0, kinds.shape[1] * TILE, kinds.shape[0] * TILE, 0)
    palette = ListedColormap([COLOURS[kind] for kind in (EMPTY, PARTIAL, FULL)])
    tiles.imshow(kinds.numpy(), cmap=palette, vmin=0, vmax=2, extent=shape, aspect=aspect, interpolation="none")
    visited = (counts[PARTIAL] + counts[FULL]) / kinds.numel()
    tiles.set(title=f"tiles of {TILE} x {TILE}: {visited:.1%} are visited", xlabel="key", ylabel="query")
    handles = [
        Patch(facecolor=COLOURS[kind], edgecolor="#808080", label=f"{NAMES[kind]}: {count:,} tiles")
        for kind, count in counts.items()
    ]
    pairs = (
        Patch(facecolor="#08306b", edgecolor="#808080", label="tokens: attends"),
        Patch(facecolor="#f7fbff", edgecolor="#808080", label="tokens: does not"),
    )
    # outside of the axes: a legend over the data would hide tiles
    figure.legend(handles=[*pairs, *handles], loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    if title is not None:
        # dollars of a file's name are no formula
        figure.suptitle(title, parse_math=False)
    if target is not None:
        figure.savefig(target, format=target.suffix[1:].lower() or "png")
    return figure


def plot_bias(added: Tensor, block_mask: BlockMask, path: str | Path | None = None, title: str | None = None) -> Figure:
    """A figure with what a bias adds to scores on the left, and the first plane of the mask on the right.

    Args:
        added: floats `[q_len, kv_len]`, a plane of `Bias.to_dense`; -inf is left white.
        block_mask: the mask, for the same lengths, which are 1 or more tokens.
        path: where to write the figure too, in the format of the file's suffix, PNG if it has none.
        title: line above both panels.

    Raises:
        ImportError: matplotlib is not installed. ValueError: lengths that differ, or a suffix of no known format.
        OSError: no file can be written at path. TypeError: an argument of another type.
    """
    require_matplotlib()
    target = None if path is None else picture_target(path)
    from matplotlib.figure import Figure

    q_len, kv_len = _checked(block_mask).q_len, block_mask.kv_len
    if not isinstance(added, Tensor) or tuple(added.shape) != (q_len, kv_len) or 0 in added.shape:
        shown = tuple(added.shape) if isinstance(added, Tensor) else type(added).__name__
        raise ValueError(f"added is {shown}; allowed is a tensor of the mask's lengths, {(q_len, kv_len)}, 1 and more")
    values = added.detach().float().cpu()
    values = values.masked_fill(~values.isfinite(), math.nan)
    most = max(float(values.abs().nan_to_num().max()), 1e-6)

    figure = Figure(figsize=(7.5, 3.2), dpi=80, layout="constrained")
    terms, pairs = figure.subplots(1, 2)
    extent = (0, kv_len, q_len, 0)
    image = terms.imshow(values.numpy(), cmap="RdBu", vmin=-most, vmax=most, extent=extent)
    figure.colorbar(image, ax=terms, shrink=0.8)
    terms.set(title="added to scores", xlabel="key", ylabel="query")
    pairs.imshow(token_shares(block_mask)[0].numpy(), cmap="Blues", vmin=0, vmax=1, extent=extent)
    pairs.set(title="pairs that attend", xlabel="key", ylabel="query")
    if title is not None:
        figure.suptitle(title, parse_math=False)
    if target is not None:
        figure.savefig(target, format=target.suffix[1:].lower() or "png")
    return figure


def token_shares(block_mask: BlockMask, plane: tuple[int, int] = (0, 0)) -> tuple[Tensor, float]:
    """fp32 `[rows, columns]` of at most 1024 a side, share of attended pairs in each cell, and the plane's density."""
    q_len, kv_len = _checked(block_mask).q_len, block_mask.kv_len
    q_tiles, kv_tiles = tiles_over(q_len), tiles_over(kv_len)
    # a cell is `cell` tokens a side: a part of a tile, or several whole tiles
    cell = 1
    while max(q_len, kv_len) > MAX_PIXELS * cell:
        cell *= 2
    parts, tiles_per_cell = max(1, TILE // cell), max(1, cell // TILE)
    part = TILE // parts
    pairs = torch.zeros(math.ceil(q_tiles / tiles_per_cell), math.ceil(kv_tiles / tiles_per_cell), parts, parts)
    for kind in (FULL, PARTIAL):
        tiles = (torch.split(t, CHUNK_TILES) for t in block_mask.plane_tiles(plane, kind))
        for line, tile, words in zip(*tiles, strict=True):
            if kind == PARTIAL:
                counts = unpack_bits(words).view(-1, parts, part, parts, part).sum((2, 4), dtype=torch.float32)
            else:
                # the rows of a full tile beyond q_len hold no pair
                inside = line[:, None] * TILE + torch.arange(TILE) < q_len
                counts = inside.view(-1, parts, part, 1).sum(2).expand(-1, -1, parts) * float(part)
            pairs.index_put_((line // tiles_per_cell, tile // tiles_per_cell), counts, accumulate=True)
    grid = pairs.transpose(1, 2).flatten(2, 3).flatten(0, 1)[: math.ceil(q_len / cell), : math.ceil(kv_len / cell)]
    q_size, kv_size = (torch.arange(0, n, cell).neg().add(n).clamp(max=cell) for n in (q_len, kv_len))
    return grid / (q_size[:, None] * kv_size), float(grid.sum(dtype=torch.float64)) / max(1, q_len * kv_len)


def picture_target(path: str | Path) -> Path:
    """`path`, if `plot` can write there.

    Raises:
        ValueError: its suffix is of no format that matplotlib writes. OSError: no file can be written there.
        TypeError: no path. ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    target, formats = check_target(path), sorted(FigureCanvasBase.get_supported_filetypes())
    if target.suffix and target.suffix[1:].lower() not in formats:
        raise ValueError(f"path {target} has the suffix {target.suffix}; allowed are none and .{', .'.join(formats)}")
    return target


def _checked(block_mask: BlockMask) -> BlockMask:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask is a {type(block_mask).__name__}; allowed is a BlockMask, which pack makes")
    return block_mask


def require_matplotlib() -> None:
    """Raise ImportError, with the command that helps, if `plot` cannot work."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
