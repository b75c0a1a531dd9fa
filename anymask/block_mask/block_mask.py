"""`BlockMask`: the packed mask that kernels read.

A plane is the mask of one (batch, head); a tile is 128 x 128 positions of a plane. The mask is two views of the same
tiles: `rows` lists, for each query tile, the kv tiles it attends to; `cols` is the transpose, for dk and dv. Empty
tiles appear nowhere, full tiles cost one index, partial tiles one index and 2,048 bytes of words in each view. Both
views are parts of four tensors, as each tensor costs time wherever the mask goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymask.block_mask import known, parts, text
from anymask.block_mask.bits import unpack_bits
from anymask.block_mask.checks import contradiction_of, is_mapped, refuse_mapped
from anymask.block_mask.files import read_safetensors, write_safetensors
from anymask.block_mask.full import full_lists
from anymask.block_mask.structure import Structure, structure_of
from anymask.block_mask.tile_lists import FIELDS, plane_range, select_planes
from anymask.block_mask.tile_lists import TileLists as TileLists
from anymask.tiles import FULL, PARTIAL, TILE, tiles_over
from anymask.vmap import ALL, completed

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

    It is a pytree of four tensors and two ints, so it passes through `torch.compile`, `torch.export`, checkpointing; it
    pickles, also for `torch.load` with weights_only, and compares by identity. What splits each tensor of a pytree, as
    micro-batches of torch.distributed.pipelining do, gets a ValueError; `block_mask[i:j]` has the planes of samples i
    to j - 1. Make one with `anymask.pack`; the constructor checks nothing.
    """

    q_len: int
    kv_len: int
    # int32 [n], the lists of both views and their orders, see `parts`
    lists: Tensor
    # int32 [2, n_partial, 128, 4], bits of the partial tiles of rows and of columns; each half is dense
    words: Tensor
    # uint8 [mask_batch, mask_heads, q_len], 1 where a query has a key; [..., 0] when every one has
    q_has_pair: Tensor
    # uint8 [mask_batch, mask_heads, kv_len], 1 where a key has a query; [..., 0] when every one has
    kv_has_pair: Tensor

    # indexing alone would make Python iterate over samples, and a shared mask would end after the first
    __iter__ = None
    # how many of `tensors` say what all do; a compiler that makes a mask does not know, as sizes are no numbers yet
    n_first = ALL

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():
            known.register(self)
            self.__dict__["n_first"] = parts.said_by_first(self.tensors())

    @property
    def rows(self) -> TileLists:
        """The tiles by query tiles; parts of the mask's tensors."""
        found = self.__dict__.get("_rows")
        return self._remember("rows") if found is None else found

    @property
    def cols(self) -> TileLists:
        """The tiles by kv tiles; parts of the mask's tensors."""
        found = self.__dict__.get("_cols")
        return self._remember("cols") if found is None else found

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors of `rows` and of `cols`."""
        found: tuple[Tensor, ...] | None = self.__dict__.get("_parts")
        if found is None:
            found = self.__dict__["_parts"] = (*self.rows.tensors(), *self.cols.tensors())
        return found

    @property
    def structure(self) -> Structure:
        """What plans of calls depend on."""
        found: Structure | None = self.__dict__.get("_structure")
        if found is None:
            found = self.__dict__["_structure"] = structure_of(self.rows, self.cols, self.q_len, self.kv_len)
        return found

    def _remember(self, view: str) -> TileLists:
        refuse_mapped(self.q_has_pair)
        tensors = self.lists, self.words, self.q_has_pair, self.kv_has_pair
        found = parts.view_of(view, tensors, self.q_len, self.kv_len)
        # not while torch traces: what is made there is no tensor
        if not torch.compiler.is_compiling():
            self.__dict__[f"_{view}"] = found
        return found

    @staticmethod
    def of_views(q_len: int, kv_len: int, rows: TileLists, cols: TileLists, words: Tensor | None = None) -> BlockMask:
        """The mask of two views, which are copied but for `words`, those of both if they lie together already."""
        return BlockMask(q_len, kv_len, *parts.joined(rows, cols, words))

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
        return self.q_has_pair.shape[0]

    @property
    def heads(self) -> int:
        """Planes along the heads: 1 (shared by all heads) or the number of query heads."""
        return self.q_has_pair.shape[1]

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.lists.device

    @property
    def tile_counts(self) -> tuple[int, int, int]:
        """Tiles over all planes, (empty, partial, full)."""
        refuse_mapped(self.q_has_pair)
        n_rows, n_cols = (self.batch * self.heads * tiles_over(n) for n in (self.q_len, self.kv_len))
        partial = self.words.shape[1]
        full = parts.full_tiles_in(self.lists.shape[0], n_rows, n_cols, partial)
        return n_rows * tiles_over(self.kv_len) - partial - full, partial, full

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held: words, lists and order of both views."""
        return sum(t.nbytes for t in self.tensors())

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
            self.words.nbytes,
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
        views = self.rows.tensors() + self.cols.tensors()
        tensors = {name: t.contiguous() for name, t in zip(NAMES, views, strict=True)}
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
        rows, cols = (TileLists(*(tensors[f"{view}.{name}"] for name in FIELDS)) for view in ("rows", "cols"))
        wrong = contradiction_of(rows, cols, int(q_len), int(kv_len))
        if wrong:
            raise ValueError(f"{path}: {wrong} contradicts the other tensors; the file is damaged")
        return BlockMask.of_views(int(q_len), int(kv_len), rows, cols).to(place)

    def contradiction(self) -> str | None:
        """The first part, such as `words` or `rows.order`, that contradicts the others; None if the lists are a mask's.

        Reads the lists and not the words: for masks from files. A kernel would read beyond its memory.
        """
        # what torch.load puts together of a damaged file has any attributes, or none
        found = vars(self)
        for name in ("q_len", "kv_len"):
            if type(found.get(name)) is not int or found[name] < 0:
                return name
        for name in TENSORS:
            t = found.get(name)
            if not isinstance(t, Tensor) or t.dtype != (torch.uint8 if "has_pair" in name else torch.int32):
                return name
        wrong = parts.wrong_tensor(self.tensors(), self.q_len, self.kv_len)
        return wrong or contradiction_of(self.rows, self.cols, self.q_len, self.kv_len)

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
        return BlockMask.of_views(q_len, kv_len, *full_lists(q_len, kv_len, (batch, heads))).to(device)

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
        given = index if isinstance(index, tuple) else (index,)
        if len(given) > 2:
            raise IndexError(
                f"block_mask[...] has {len(given)} indices; allowed are 2, batch and heads: "
                "anymask.slice_queries cuts queries"
            )
        batch = plane_range(given[0], self.batch, "batch") if given else range(self.batch)
        heads = plane_range(given[1], self.heads, "heads") if len(given) > 1 else range(self.heads)
        if (len(batch), len(heads)) == (self.batch, self.heads):
            return self
        if torch.compiler.is_compiling():
            # an operator of `anymask.mask_ops`, which compilers do not look into
            bounds = batch.start, batch.stop, heads.start, heads.stop
            tensors = torch.ops.anymask.slice_planes(self.tensors(), self.q_len, self.kv_len, *bounds)
            return BlockMask(self.q_len, self.kv_len, *tensors)
        return BlockMask.of_views(
            self.q_len, self.kv_len, *select_planes(self.rows, self.cols, self.words, batch, heads)
        )

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
        """The four tensors in field order: what a torch op takes and `from_tensors` reads."""
        return [self.lists, self.words, self.q_has_pair, self.kv_has_pair]

    def first_tensors(self) -> list[Tensor]:
        """Those of `tensors` that operators take: without the last ones, where the others say all; see `completed`."""
        return self.tensors()[: self.n_first]

    @staticmethod
    def from_tensors(tensors: list[Tensor], q_len: int, kv_len: int) -> BlockMask:
        """Of `tensors` or `first_tensors`; of a mask that is there, that mask, which may have its views."""
        found: BlockMask | None = known.find(tensors, q_len, kv_len)
        return BlockMask(q_len, kv_len, *completed(tensors)) if found is None else found

    def __getstate__(self) -> dict[str, Any]:
        # without the views, whose memory would be written once more
        return {name: getattr(self, name) for name in ("q_len", "kv_len", *TENSORS)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "rows" in state:
            # as it was pickled when the views were fourteen tensors of their own
            state = vars(BlockMask.of_views(**state))
        self.__dict__.update(state)
        self.__post_init__()

    def __str__(self) -> str:
        if is_mapped(self.q_has_pair):
            return repr(self)
        kinds = self.tile_kinds()
        scale = text.scale(kinds)
        return f"{self!r}\n{scale} x {scale} tiles to a character: {text.LEGEND}\n{text.draw(kinds)}"

    def __repr__(self) -> str:
        kinds = {type(t).__name__ for t in self.tensors() if not isinstance(t, Tensor)}
        if kinds or is_mapped(self.q_has_pair):
            # what tree_map made of one; torch prints it in its errors
            of = ", ".join(sorted(kinds)) or "slices that torch.vmap maps"
            return f"BlockMask(q_len={self.q_len}, kv_len={self.kv_len}, of {of})"
        empty, partial, full = self.tile_counts
        return (
            f"BlockMask(q_len={self.q_len}, kv_len={self.kv_len}, planes={self.batch}x{self.heads}, "
            f"tiles: {empty} empty, {partial} partial, {full} full, {self.nbytes / 2**20:.2f} MiB, {self.device})"
        )


def _device(device: Any) -> torch.device:
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(
            f"device is {device!r} of type {type(device).__name__}; allowed are a torch.device and its name"
        )
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; allowed are those of torch, such as 'cpu' and 'cuda:0'") from error


TENSORS = "lists", "words", "q_has_pair", "kv_has_pair"
# of the tensors of both views, as files have them
NAMES = [f"{view}.{name}" for view in ("rows", "cols") for name in FIELDS]
# for torch.load with weights_only, its default
torch.serialization.add_safe_globals([BlockMask, TileLists])
