"""The bit order that packing and every kernel share, in torch.

Bit `b` of word `c` of a row is column `8*(b // 2) + 2*c + (b % 2)` of the 128 columns of a tile:

    column   0 1   2 3   4 5   6 7   8 9   10 11 ...  120 121 ... 126 127
    word     0 0   1 1   2 2   3 3   0 0    1  1 ...   0   0       3   3
    bit      0 1   0 1   0 1   0 1   2 3    2  3 ...  30  31      30  31

It is how a tensor-core accumulator (mma and wgmma) spreads 128 columns over the four threads of a quad (PTX ISA,
"Register Fragments for wgmma.m64nNk16"), so thread `c` of a quad needs exactly word `c` of its row.
"""

import torch
from torch import Tensor

from anymask.shapes import TileBits, Words
from anymask.tiles import TILE, WORDS

# multiplying eight 0/1 bytes by this moves byte k to bit 56 + k without a carry
_GATHER_BITS = 0x0102040810204080


def pack_bits(tiles: TileBits) -> Words:
    """Words of rows of boolean tiles: bool `[..., 128]` -> int32 `[..., 4]`."""
    if tiles.numel() == 0:
        return torch.zeros(*tiles.shape[:-1], WORDS, dtype=torch.int32, device=tiles.device)
    pairs = tiles.contiguous().view(torch.uint8).view(torch.int16).unflatten(-1, (16, WORDS))
    eights = pairs.transpose(-1, -2).contiguous().view(torch.int64)
    words: Tensor = ((eights * _GATHER_BITS) >> 56).to(torch.uint8).view(torch.int32)
    return words.squeeze(-1)


def unpack_bits(words: Words) -> TileBits:
    """Inverse of `pack_bits`: int32 `[..., 4]` -> bool `[..., 128]`."""
    if words.numel() == 0:
        return torch.zeros(*words.shape[:-1], TILE, dtype=torch.bool, device=words.device)
    octets = words.contiguous().view(torch.uint8).flatten().to(torch.int32)
    eights = _spread_table(words.device).index_select(0, octets)
    pairs = eights.view(torch.int16).view(*words.shape[:-1], WORDS, 16)
    return pairs.transpose(-1, -2).contiguous().view(torch.uint8).view(torch.bool).flatten(-2)


def transpose_bits(words: Words) -> Words:
    """Words of the transposed tiles: int32 `[..., 128, 4]`, both."""
    return pack_bits(unpack_bits(words).transpose(-1, -2))


def _spread_table(device: torch.device) -> Tensor:
    """int64 `[256]`: entry `x` holds bit k of `x` as its byte k."""
    octets = torch.arange(256, device=device)[:, None]
    return ((octets >> torch.arange(8, device=device)) & 1).to(torch.uint8).view(torch.int64).flatten()
