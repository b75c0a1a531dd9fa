"""`BlockMask`: the packed mask that kernels read.

A plane is the mask of one (batch, head); a tile is 128 x 128 positions of a plane. The mask is two views of the same
tiles: `rows` lists, for each query tile, the kv tiles it attends to; `cols` is the transpose, for dk and dv. Empty
tiles appear nowhere, full tiles cost one index, partial tiles one index and 2,048 bytes of words in each view.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from anymask.block_mask import text
from anymask.block_mask.bits import unpack_bits
from anymask.tiles import FULL, PARTIAL, TILE, WORDS, tiles_over

# what `BlockMask.save` writes into a file's header
FORMAT = "anymask.BlockMask 1"


@dataclass(frozen=True, eq=False)
class TileLists:
    """The non-empty tiles of each line of tiles, as two CSR lists.

    Line `x` of plane `p` has the global number `n = p * lines + x`. Its full tiles are
    `full_tiles[full_offsets[n]:full_offsets[n + 1]]`, in ascending order, and likewise its partial ones.
    """

    # int32 [planes * lines + 1]
    full_offsets: Tensor
    # int32 [n_full], index of the tile in the other direction
    full_tiles: Tensor
    # int32 [planes * lines + 1]
    partial_offsets: Tensor
    # int32 [n_partial]
    partial_tiles: Tensor
    # int32 [n_partial, 128, 4], bits of partial_tiles in the order of bits.py, four words per position of the line
    words: Tensor
    # int32 [mask_batch, mask_heads, lines], lines in descending order of tiles, ties in ascending order of line
    order: Tensor
    # uint8 [planes * length], 1 where the position has a pair; [0] when every position has one
    live: Tensor

    def line_numbers(self, kind: int) -> Tensor:
        """int64 `[n]`: global line number of each full (`kind=2`) or partial (`kind=1`) tile."""
        offsets = self.full_offsets if kind == FULL else self.partial_offsets
        lines = torch.arange(offsets.numel() - 1, device=offsets.device)
        return lines.repeat_interleave(offsets.diff().to(torch.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of all seven tensors."""
        return sum(t.nbytes for t in _tensors(self))


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
    # tiles of the heaviest line of query tiles over those of the mean one; 1.0 is even
    imbalance: float
    # all tiles over those visited: how much faster than without a mask a kernel could be
    speedup: float


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A mask over `q_len x kv_len` pairs, packed into 128 x 128 tiles that are empty, partial or full.

    Worked example: `pack(causal(), q_len=512, kv_len=512)` has 4 x 4 tiles,

        rows of tiles        rows.full_tiles      rows.partial_tiles    rows.order
        ░ · · ·              line 0: -            line 0: 0             [3, 2, 1, 0]
        █ ░ · ·              line 1: 0            line 1: 1
        █ █ ░ ·              line 2: 0 1          line 2: 2
        █ █ █ ░              line 3: 0 1 2        line 3: 3

    so `rows.full_offsets = [0, 0, 1, 3, 6]`, `rows.partial_offsets = [0, 1, 2, 3, 4]`, and `words` hold four tiles.
    `cols` says the same by columns: `cols.full_tiles = [1, 2, 3, 2, 3, 3]`.

    It is a pytree of tensors and two ints, so it passes through `torch.compile`, checkpointing and `.to`. Make one with
    `anymask.pack`; the constructor checks nothing.
    """

    q_len: int
    kv_len: int
    rows: TileLists
    cols: TileLists

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
        """Where all tensors live."""
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
        lines = self.rows.line_numbers(FULL) % tiles_over(self.q_len)
        short = int((lines == tiles_over(self.q_len) - 1).sum())
        full = (lines.numel() - short) * TILE * TILE + short * last_rows * TILE
        return (attended + full) / pairs

    def stats(self, head_dim: int = 128) -> Stats:
        """Tiles, bytes, work and balance; `head_dim` of q, k and v for the FLOPs. Reads the words."""
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

        Raises ValueError for a plane (batch, head) that the mask does not store.
        """
        kinds = torch.zeros(tiles_over(self.q_len), tiles_over(self.kv_len), dtype=torch.int8)
        for kind in (FULL, PARTIAL):
            q_tile, kv_tile, _ = self.plane_tiles(plane, kind)
            kinds[q_tile, kv_tile] = kind
        return kinds

    def plane_tiles(self, plane: tuple[int, int], kind: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query tile, kv tile and words of the tiles of a kind, on the CPU; full tiles have words of size 0."""
        b, h = plane
        if not (0 <= b < self.batch and 0 <= h < self.heads):
            raise ValueError(
                f"plane is {plane}; the mask stores {self.batch} x {self.heads} planes (batch, heads), "
                "and a dimension of 1 is shared"
            )
        rows, lines = self.rows, tiles_over(self.q_len)
        offsets, tiles = (
            (rows.full_offsets, rows.full_tiles) if kind == FULL else (rows.partial_offsets, rows.partial_tiles)
        )
        first = (b * self.heads + h) * lines
        start, stop = int(offsets[first]), int(offsets[first + lines])
        line = rows.line_numbers(kind)[start:stop].cpu() - first
        tile = tiles[start:stop].cpu().long()
        return line, tile, rows.words[start:stop].cpu() if kind == PARTIAL else tile.new_empty(tile.numel(), 0)

    def save(self, path: str | Path) -> None:
        """Write the mask as a safetensors file, whole or not at all. Needs `pip install 'anymask[files]'`."""
        header = {"format": FORMAT, "q_len": str(self.q_len), "kv_len": str(self.kv_len)}
        tensors = {name: t.contiguous() for name, t in zip(_NAMES, self.tensors(), strict=True)}
        part = Path(f"{path}.{os.getpid()}.part")
        try:
            _safetensors().torch.save_file(tensors, part, header)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> BlockMask:
        """The mask that `save` wrote, on `device`.

        Raises:
            ValueError: the file is truncated, or holds something else. FileNotFoundError: there is none.
        """
        header, tensors = read_safetensors(path)
        if header.get("format") != FORMAT or set(tensors) != set(_NAMES):
            found = header.get("format", f"tensors {', '.join(sorted(tensors)[:4])}")
            raise ValueError(f"{path} holds {found}; allowed is {FORMAT}, as BlockMask.save writes it")
        q_len, kv_len = header.get("q_len", ""), header.get("kv_len", "")
        if not (q_len.isdecimal() and kv_len.isdecimal()):
            raise ValueError(f"{path} has q_len {q_len!r} and kv_len {kv_len!r}; allowed are 0 and more")
        lengths = int(q_len), int(kv_len)
        mask = BlockMask.from_tensors([tensors[name] for name in _NAMES], *lengths)
        planes = mask.rows.order.shape[:2]
        for view, lists, (length, other) in (("rows", mask.rows, lengths), ("cols", mask.cols, lengths[::-1])):
            wrong = _inconsistent(lists, planes, length, other)
            if wrong:
                raise ValueError(f"{path}: {view}.{wrong} contradicts the other tensors; the file is damaged")
        return mask.to(device)

    def to_dense(self) -> Tensor:
        """bool `[batch, heads, q_len, kv_len]` with size 1 where a dimension is shared. For tests and small masks."""
        q_tiles, kv_tiles = tiles_over(self.q_len), tiles_over(self.kv_len)
        planes = self.batch * self.heads
        tiles = torch.zeros(planes * q_tiles, kv_tiles, TILE, TILE, dtype=torch.bool, device=self.device)
        rows = self.rows
        tiles[rows.line_numbers(FULL), rows.full_tiles.long()] = True
        tiles[rows.line_numbers(PARTIAL), rows.partial_tiles.long()] = unpack_bits(rows.words)
        dense = tiles.view(planes, q_tiles, kv_tiles, TILE, TILE).transpose(2, 3)
        dense = dense.reshape(self.batch, self.heads, q_tiles * TILE, kv_tiles * TILE)
        return dense[..., : self.q_len, : self.kv_len]

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device; itself if it is there already."""
        if torch.device(device) == self.device:
            return self
        return BlockMask.from_tensors([t.to(device) for t in self.tensors()], self.q_len, self.kv_len)

    def tensors(self) -> list[Tensor]:
        """The tensors of `rows`, then of `cols`, in field order: what a torch op takes and `from_tensors` reads."""
        return _tensors(self.rows) + _tensors(self.cols)

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
        empty, partial, full = self.tile_counts
        return (
            f"BlockMask(q_len={self.q_len}, kv_len={self.kv_len}, planes={self.batch}x{self.heads}, "
            f"tiles: {empty} empty, {partial} partial, {full} full, {self.nbytes / 2**20:.2f} MiB, {self.device})"
        )


def _tensors(lists: TileLists) -> list[Tensor]:
    return [getattr(lists, name) for name in _FIELDS]


def _inconsistent(lists: TileLists, planes: tuple[int, ...], length: int, other: int) -> str | None:
    """The first tensor of a view of `length` positions that cannot be one beside the rest."""
    ints, lines, count = torch.int32, tiles_over(length), math.prod(planes)
    if lists.order.dtype != ints or lists.order.shape != (*planes, lines):
        return "order"
    if (lists.order.sort(-1).values != torch.arange(lines)).any():
        return "order"
    for kind in ("full", "partial"):
        offsets, tiles = getattr(lists, f"{kind}_offsets"), getattr(lists, f"{kind}_tiles")
        if offsets.dtype != ints or offsets.shape != (count * lines + 1,):
            return f"{kind}_offsets"
        if offsets[0] != 0 or (offsets.diff() < 0).any():
            return f"{kind}_offsets"
        if tiles.dtype != ints or tiles.shape != (int(offsets[-1]),):
            return f"{kind}_tiles"
        if ((tiles < 0) | (tiles >= tiles_over(other))).any():
            return f"{kind}_tiles"
    if lists.words.dtype != ints or lists.words.shape != (lists.partial_tiles.numel(), TILE, WORDS):
        return "words"
    if lists.live.dtype != torch.uint8 or lists.live.shape not in ((0,), (count * length,)):
        return "live"
    return None


def read_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file, on the CPU; ValueError if it is none or cut short."""
    library = _safetensors()
    try:
        with library.safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError("masks on disk need safetensors: pip install 'anymask[files]'") from error
    return safetensors


_FIELDS = tuple(f.name for f in fields(TileLists))
_NAMES = [f"{view}.{name}" for view in ("rows", "cols") for name in _FIELDS]

pytree.register_pytree_node(
    BlockMask,
    lambda m: (m.tensors(), (m.q_len, m.kv_len)),
    lambda tensors, lens: BlockMask.from_tensors(list(tensors), *lens),
    serialized_type_name="anymask.BlockMask",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda m: (
        [(pytree.GetAttrKey(n), t) for n, t in zip(_NAMES, m.tensors(), strict=True)],
        (m.q_len, m.kv_len),
    ),
)
