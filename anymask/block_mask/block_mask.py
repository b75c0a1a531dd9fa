"""`BlockMask`: the packed mask that kernels read.

A plane is the mask of one (batch, head); a tile is 128 x 128 positions of a plane. The mask is two views of the same
tiles: `rows` lists, for each query tile, the kv tiles it attends to; `cols` is the transpose, for dk and dv. Empty
tiles appear nowhere, full tiles cost one index, partial tiles one index and 2,048 bytes of words in each view.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from anymask.block_mask import text
from anymask.block_mask.bits import unpack_bits
from anymask.block_mask.files import read_safetensors, write_safetensors
from anymask.block_mask.full import full_lists
from anymask.block_mask.tile_lists import FIELDS, plane_range, select_planes
from anymask.block_mask.tile_lists import TileLists as TileLists
from anymask.tiles import FULL, PARTIAL, TILE, tiles_over

# what `BlockMask.save` writes into a file's header
FORMAT = "anymask.BlockMask 1"


@dataclass(frozen=True)
class Stats:
    """What a `BlockMask` holds and what it costs, over all planes that it stores."""

    # tiles by kind
    empty: int
    partial: int
    full: int
    # share of attended pairs
    density: float
    # bytes of the bits, both views; of everything held; of the same planes as one byte a pair
    words_bytes: int
    nbytes: int
    dense_bytes: int
    # multiply-adds count 2: forward, over attended pairs and over the tiles that are visited
    pair_flops: int
    tile_flops: int
    # tiles of the heaviest row of tiles over those of the mean row; 1.0 is even
    imbalance: float
    # all tiles over those visited: how much faster than without a mask a kernel could be
    speedup: float


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A mask over `q_len x kv_len` pairs, packed into 128 x 128 tiles that are empty, partial or full.

    Worked example: `pack(causal(), q_len=512, kv_len=512)` has 4 x 4 tiles,

        rows of tiles        rows.full_tiles      rows.partial_tiles    rows.order
        ░ · · ·              row 0: -             row 0: 0              [3, 2, 1, 0]
        █ ░ · ·              row 1: 0             row 1: 1
        █ █ ░ ·              row 2: 0 1           row 2: 2
        █ █ █ ░              row 3: 0 1 2         row 3: 3

    so `rows.full_offsets = [0, 0, 1, 3, 6]`, `rows.partial_offsets = [0, 1, 2, 3, 4]`, and `words` hold four tiles.
    `cols` says the same by columns: `cols.full_tiles = [1, 2, 3, 2, 3, 3]`.

    It is a pytree of tensors and two ints, so it passes through `torch.compile`, `torch.export` and checkpointing; it
    pickles, also for `torch.load` with weights_only, and compares by identity. What splits each tensor of a pytree, as
    micro-batches of torch.distributed.pipelining do, gets a ValueError; `block_mask[i:j]` has the planes of samples i
    to j - 1. Make one with `anymask.pack`; the constructor checks nothing.
    """

    q_len: int
    kv_len: int
    rows: TileLists
    cols: TileLists

    # indexing alone would make Python iterate over samples, and a shared mask would end after the first
    __iter__ = None

    @property
    def ndim(self) -> int:
        """4, as of the scores that the mask is for."""
        return 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, q_len, kv_len), those of `to_dense()`: 1 where a dimension is shared."""
        return self.batch, self.heads, self.q_len, self.kv_len

    @property
    def batch(self) -> int:
        """Planes along the batch: 1 (shared by all samples) or the batch size."""
        return self.rows.order.shape[0]

    @property
    def heads(self) -> int:
        """Planes along the heads: 1 (shared by all heads) or the number of query heads."""
        return self.rows.order.shape[1]

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.rows.words.device

    @property
    def tile_counts(self) -> tuple[int, int, int]:
        """Tiles over all planes, (empty, partial, full)."""
        partial, full = self.rows.partial_tiles.numel(), self.rows.full_tiles.numel()
        total = self.batch * self.heads * tiles_over(self.q_len) * tiles_over(self.kv_len)
        return total - partial - full, partial, full

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held: words, lists and order of both views."""
        return self.rows.nbytes + self.cols.nbytes

    def density(self) -> float:
        """Share of attended pairs among all `planes * q_len * kv_len`; 0.0 if there is none. Reads the words."""
        pairs = self.batch * self.heads * self.q_len * self.kv_len
        if not pairs:
            return 0.0
        attended = sum(int(unpack_bits(w).sum()) for w in self.rows.words.split(1024))
        last_rows = self.q_len - TILE * (tiles_over(self.q_len) - 1)
        tile_rows = self.rows.tile_row_numbers(FULL) % tiles_over(self.q_len)
        short = int((tile_rows == tiles_over(self.q_len) - 1).sum())
        full = (tile_rows.numel() - short) * TILE * TILE + short * last_rows * TILE
        return (attended + full) / pairs

    def stats(self, head_dim: int = 128) -> Stats:
        """Tiles, bytes, work and balance; `head_dim` of q, k and v, 1 or more, for the FLOPs. Reads the words."""
        if isinstance(head_dim, bool) or not isinstance(head_dim, int):
            raise TypeError(f"head_dim is {head_dim!r} of type {type(head_dim).__name__}; allowed is an int")
        if head_dim < 1:
            raise ValueError(f"head_dim is {head_dim}; allowed are 1 and more")
        empty, partial, full = self.tile_counts
        density, pairs = self.density(), self.batch * self.heads * self.q_len * self.kv_len
        work = self.rows.full_offsets.diff() + self.rows.partial_offsets.diff()
        visited = partial + full
        return Stats(
            empty,
            partial,
            full,
            density,
            self.rows.words.nbytes + self.cols.words.nbytes,
            self.nbytes,
            pairs,
            4 * head_dim * round(pairs * density),
            4 * head_dim * visited * TILE * TILE,
            int(work.max()) * work.numel() / visited if visited else 1.0,
            (empty + visited) / visited if visited else float("inf"),
        )

    def tile_kinds(self, plane: tuple[int, int] = (0, 0)) -> Tensor:
        """int8 `[q_tiles, kv_tiles]` on the CPU: kind of each tile of one plane, 0 empty, 1 partial, 2 full.

        Raises ValueError for a plane (batch, head) that the mask does not store, TypeError for what is no plane.
        """
        kinds = torch.zeros(tiles_over(self.q_len), tiles_over(self.kv_len), dtype=torch.int8)
        for kind in (FULL, PARTIAL):
            q_tile, kv_tile, _ = self.plane_tiles(plane, kind)
            kinds[q_tile, kv_tile] = kind
        return kinds

    def plane_tiles(self, plane: tuple[int, int], kind: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query tile, kv tile and words of the tiles of a kind, on the CPU; full tiles have words of size 0."""
        if not isinstance(plane, (tuple, list)) or [type(n) for n in plane] != [int, int]:
            raise TypeError(f"plane is {plane!r}; allowed are two ints, (batch, head)")
        b, h = plane
        if not (0 <= b < self.batch and 0 <= h < self.heads):
            raise ValueError(
                f"plane is {plane}; the mask stores {self.batch} x {self.heads} planes (batch, heads), "
                "and a dimension of 1 is shared"
            )
        rows, tile_rows = self.rows, tiles_over(self.q_len)
        offsets, tiles = (
            (rows.full_offsets, rows.full_tiles) if kind == FULL else (rows.partial_offsets, rows.partial_tiles)
        )
        first = (b * self.heads + h) * tile_rows
        start, stop = int(offsets[first]), int(offsets[first + tile_rows])
        tile_row = rows.tile_row_numbers(kind)[start:stop].cpu() - first
        tile = tiles[start:stop].cpu().long()
        return tile_row, tile, rows.words[start:stop].cpu() if kind == PARTIAL else tile.new_empty(tile.numel(), 0)

    def save(self, path: str | Path) -> None:
        """Write the mask as a safetensors file, whole or not at all. Needs `pip install safetensors`.

        Raises:
            OSError: no file can be written there. TypeError: no path.
        """
        header = {"format": FORMAT, "q_len": str(self.q_len), "kv_len": str(self.kv_len)}
        tensors = {name: t.contiguous() for name, t in zip(NAMES, self.tensors(), strict=True)}
        write_safetensors(path, header, tensors)

    @staticmethod
    def load(path: str | Path, device: torch.device | str | int = "cpu") -> BlockMask:
        """The mask that `save` wrote, on `device`.

        Raises:
            ValueError: the file is truncated, or holds something else. OSError: there is none. TypeError: no path.
        """
        place = _device(device)
        header, tensors = read_safetensors(path)
        if header.get("format") != FORMAT or set(tensors) != set(NAMES):
            found = header.get("format", f"tensors {', '.join(sorted(tensors)[:4])}")
            raise ValueError(f"{path} holds {found}; allowed is {FORMAT}, as BlockMask.save writes it")
        q_len, kv_len = header.get("q_len", ""), header.get("kv_len", "")
        if not (q_len.isdecimal() and kv_len.isdecimal()):
            raise ValueError(f"{path} has q_len {q_len!r} and kv_len {kv_len!r}; allowed are 0 and more")
        mask = BlockMask.from_tensors([tensors[name] for name in NAMES], int(q_len), int(kv_len))
        wrong = mask.contradiction()
        if wrong:
            raise ValueError(f"{path}: {wrong} contradicts the other tensors; the file is damaged")
        return mask.to(place)

    def contradiction(self) -> str | None:
        """The first part, such as `rows.order`, that contradicts the others; None if the lists are a mask's.

        Reads the lists and not the words: for masks from files. A kernel would read beyond its memory.
        """
        # what torch.load puts together of a damaged file has any attributes, or none
        parts = vars(self)
        for name in ("q_len", "kv_len"):
            if type(parts.get(name)) is not int or parts[name] < 0:
                return name
        for view in ("rows", "cols"):
            lists = parts.get(view)
            if type(lists) is not TileLists or not all(isinstance(vars(lists).get(name), Tensor) for name in FIELDS):
                return view
        planes, lengths = tuple(self.rows.order.shape[:2]), (self.q_len, self.kv_len)
        for view, lists, (length, other) in (("rows", self.rows, lengths), ("cols", self.cols, lengths[::-1])):
            wrong = lists.wrong_value(planes, length, other)
            if wrong:
                return f"{view}.{wrong}"
        q_tiles, kv_tiles = map(tiles_over, lengths)
        places = []
        for kind, name in ((FULL, "full"), (PARTIAL, "partial")):
            by_row = self.rows.tile_row_numbers(kind) * kv_tiles + _tiles(self.rows, kind)
            column, q_tile = self.cols.tile_row_numbers(kind), _tiles(self.cols, kind)
            by_column = (column // max(1, kv_tiles) * q_tiles + q_tile) * kv_tiles + column % max(1, kv_tiles)
            places.append(by_row)
            for view, numbers in (("rows", by_row), ("cols", column * q_tiles + q_tile)):
                if (numbers.diff() <= 0).any():
                    return f"{view}.{name}_tiles"
            if not torch.equal(by_column.sort().values, by_row):
                return f"cols.{name}_tiles"
        return "rows.partial_tiles" if (torch.cat(places).sort().values.diff() == 0).any() else None

    @staticmethod
    def full(
        q_len: int, kv_len: int, device: torch.device | str | int = "cpu", batch: int = 1, heads: int = 1
    ) -> BlockMask:
        """The mask of every pair, what `pack` gives for it: full tiles, and a partial column if kv_len ends inside one.

        Args:
            q_len, kv_len: lengths in tokens.
            device: of all tensors.
            batch, heads: planes.

        Raises:
            ValueError: a negative number. TypeError: one that is no integer, or no device.
        """
        sizes = {"q_len": q_len, "kv_len": kv_len, "batch": batch, "heads": heads}
        for name, n in sizes.items():
            if isinstance(n, bool) or not isinstance(n, int):
                raise TypeError(f"{name} is {n!r} of type {type(n).__name__}; allowed is an int")
            if n < 0:
                raise ValueError(f"{name} is {n}; allowed are 0 and more")
        return BlockMask(q_len, kv_len, *full_lists(q_len, kv_len, (batch, heads))).to(device)

    def to_dense(self) -> Tensor:
        """bool `[batch, heads, q_len, kv_len]` with size 1 where a dimension is shared. For tests and small masks."""
        q_tiles, kv_tiles = tiles_over(self.q_len), tiles_over(self.kv_len)
        planes = self.batch * self.heads
        tiles = torch.zeros(planes * q_tiles, kv_tiles, TILE, TILE, dtype=torch.bool, device=self.device)
        rows = self.rows
        tiles[rows.tile_row_numbers(FULL), rows.full_tiles.long()] = True
        tiles[rows.tile_row_numbers(PARTIAL), rows.partial_tiles.long()] = unpack_bits(rows.words)
        dense = tiles.view(planes, q_tiles, kv_tiles, TILE, TILE).transpose(2, 3)
        dense = dense.reshape(self.batch, self.heads, q_tiles * TILE, kv_tiles * TILE)
        return dense[..., : self.q_len, : self.kv_len]

    def __getitem__(self, index: Any) -> BlockMask:
        """The mask of some samples, `mask[i:j]`, or of some heads, `mask[:, i:j]`; an int keeps its dimension, as 1.

        For micro-batches and for heads of tensor parallelism. A dimension of 1 is shared by all samples or heads, and
        has nothing to cut: `mask if mask.batch == 1 else mask[i:j]`. Nothing is packed again; samples are a view of the
        same words, some of the heads of several samples a copy. On a GPU it synchronises with the host once.

        Raises:
            IndexError: beyond the planes, also by a slice. TypeError: no ints and slices of step 1.
        """
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) > 2:
            raise IndexError(
                f"block_mask[...] has {len(parts)} indices; allowed are 2, batch and heads: "
                "anymask.slice_queries cuts queries"
            )
        batch = plane_range(parts[0], self.batch, "batch") if parts else range(self.batch)
        heads = plane_range(parts[1], self.heads, "heads") if len(parts) > 1 else range(self.heads)
        if (len(batch), len(heads)) == (self.batch, self.heads):
            return self
        return BlockMask(self.q_len, self.kv_len, *select_planes((self.rows, self.cols), batch, heads))

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> BlockMask:
        """The same mask on another device; itself if it is there already. `non_blocking` is that of `Tensor.to`.

        Raises:
            TypeError: no device; a mask has no dtype. ValueError: no such kind of device.
        """
        place, tensors = _device(device), self.tensors()
        moved = [t.to(place, non_blocking=non_blocking) for t in tensors]
        if all(new is old for new, old in zip(moved, tensors, strict=True)):
            return self
        return BlockMask.from_tensors(moved, self.q_len, self.kv_len)

    def cpu(self) -> BlockMask:
        """The same mask on the CPU."""
        return self.to("cpu")

    def cuda(self, device: torch.device | str | int | None = None, non_blocking: bool = False) -> BlockMask:
        """The same mask on a GPU, the current one by default."""
        index = isinstance(device, int) and not isinstance(device, bool)
        return self.to("cuda" if device is None else f"cuda:{device}" if index else device, non_blocking)

    def pin_memory(self) -> BlockMask:
        """A copy in pinned memory, as a `DataLoader` with pin_memory makes, for `.to(device, non_blocking=True)`."""
        return BlockMask.from_tensors([t.pin_memory() for t in self.tensors()], self.q_len, self.kv_len)

    def tensors(self) -> list[Tensor]:
        """The tensors of `rows`, then of `cols`, in field order: what a torch op takes and `from_tensors` reads."""
        return self.rows.tensors() + self.cols.tensors()

    @staticmethod
    def from_tensors(tensors: list[Tensor], q_len: int, kv_len: int) -> BlockMask:
        """Inverse of `tensors`."""
        half = len(tensors) // 2
        return BlockMask(q_len, kv_len, TileLists(*tensors[:half]), TileLists(*tensors[half:]))

    def __str__(self) -> str:
        kinds = self.tile_kinds()
        scale = text.scale(kinds)
        return f"{self!r}\n{scale} x {scale} tiles to a character: {text.LEGEND}\n{text.draw(kinds)}"

    def __repr__(self) -> str:
        kinds = {type(t).__name__ for t in self.tensors() if not isinstance(t, Tensor)}
        if kinds:
            # what tree_map made of one; torch prints it in its errors
            return f"BlockMask(q_len={self.q_len}, kv_len={self.kv_len}, of {', '.join(sorted(kinds))})"
        empty, partial, full = self.tile_counts
        return (
            f"BlockMask(q_len={self.q_len}, kv_len={self.kv_len}, planes={self.batch}x{self.heads}, "
            f"tiles: {empty} empty, {partial} partial, {full} full, {self.nbytes / 2**20:.2f} MiB, {self.device})"
        )


def _tiles(lists: TileLists, kind: int) -> Tensor:
    return lists.full_tiles if kind == FULL else lists.partial_tiles


def _device(device: Any) -> torch.device:
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(
            f"device is {device!r} of type {type(device).__name__}; allowed are a torch.device and its name"
        )
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; allowed are those of torch, such as 'cpu' and 'cuda:0'") from error


# of the tensors, in the order of `BlockMask.tensors`
NAMES = [f"{view}.{name}" for view in ("rows", "cols") for name in FIELDS]


def _put_together(views: Any, lengths: tuple[int, int]) -> BlockMask:
    """A mask of two views, whatever they hold; if tensors, those of one mask, which what splits each would not notice.

    Raises:
        ValueError: tensors of shapes that are never together.
    """
    mask = BlockMask(*lengths, *views)
    known = all(isinstance(v, TileLists) and all(isinstance(t, Tensor) for t in v.tensors()) for v in views)
    # traced sizes are numbers to be, and a comparison would bind them
    if torch.compiler.is_compiling() or not known:
        return mask
    if any(not isinstance(n, int) for n in (*lengths, *(n for t in mask.tensors() for n in t.shape))):
        return mask
    planes = tuple(mask.rows.order.shape[:2])
    for view, lists, length in (("rows", mask.rows, lengths[0]), ("cols", mask.cols, lengths[1])):
        wrong = lists.wrong_shape(planes, length)
        if wrong:
            raise ValueError(
                f"a BlockMask was put together from tensors that do not fit: {view}.{wrong} has shape "
                f"{tuple(getattr(lists, wrong).shape)} beside rows.order of shape {tuple(mask.rows.order.shape)}. "
                "Micro-batches of torch.distributed.pipelining split each of its tensors along dimension 0; keep it "
                "out of what they split, and cut it by block_mask[i:j]"
            )
    return mask


# two levels, so that the path of a leaf is how Python reaches it: torch.export makes names of it
pytree.register_pytree_node(
    TileLists,
    lambda lists: (lists.tensors(), None),
    lambda tensors, _: TileLists(*tensors),
    serialized_type_name="anymask.TileLists",
    flatten_with_keys_fn=lambda lists: (
        [(pytree.GetAttrKey(name), t) for name, t in zip(FIELDS, lists.tensors(), strict=True)],
        None,
    ),
)
pytree.register_pytree_node(
    BlockMask,
    lambda m: ([m.rows, m.cols], (m.q_len, m.kv_len)),
    _put_together,
    serialized_type_name="anymask.BlockMask",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda m: (
        [(pytree.GetAttrKey("rows"), m.rows), (pytree.GetAttrKey("cols"), m.cols)],
        (m.q_len, m.kv_len),
    ),
)
# for torch.load with weights_only, its default
torch.serialization.add_safe_globals([BlockMask, TileLists])
