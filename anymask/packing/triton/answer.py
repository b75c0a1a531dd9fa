"""What a device tells the host in the midst of a call: four integers that a kernel writes where the host reads.

The host looks at pinned memory until they are there, which takes less time than a copy and a wait for the stream.
"""

from __future__ import annotations

from ctypes import Array, c_int32
from typing import NamedTuple

import torch
from torch import Tensor

# places in one piece of pinned memory: a page
PLACES = 256
# how often the host looks before it waits for the stream instead: about half a millisecond
LOOKS = 2000
NOT_YET = -1


class Totals(NamedTuple):
    """Of a mask: full tiles, partial tiles, queries and keys that have a pair."""

    full: int
    partial: int
    used_queries: int
    used_keys: int


class Answer:
    """A place for the totals of one call at a time."""

    def __init__(self, tensor: Tensor) -> None:
        # int32 [4], which kernels can write
        self.tensor = tensor
        self._cells: Array[c_int32] = (c_int32 * len(Totals._fields)).from_address(tensor.data_ptr())
        self._cells[:] = [NOT_YET] * len(Totals._fields)

    def wait(self, device: torch.device) -> Totals:
        """The totals once they are there: a kernel writes them that is on its way, on the current stream.

        Raises:
            RuntimeError: a CUDA graph is being captured, and nothing runs.
        """
        for _ in range(LOOKS):
            # each number is there by itself, whatever the order in which they come
            found = self._cells[:]
            if min(found) >= 0:
                break
        else:
            if device.type == "cuda":
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "mask is packed, which waits for the GPU, while a CUDA graph is being captured; allowed is a "
                        "BlockMask that was packed before"
                    )
                # many kernels before it, or one that failed
                torch.cuda.current_stream(device).synchronize()
            found = self._cells[:]
        totals = Totals._make(found)
        assert min(totals) >= 0, f"no kernel has told the totals of a mask, {totals}"
        self._cells[:] = [NOT_YET] * len(totals)
        _free.append(self)
        return totals


# Places that no call has. One whose call was broken off never comes back, as a kernel may still write to it.
_free: list[Answer] = []
# the memory of all places is never freed
_pages: list[Tensor] = []


def take(device: torch.device) -> Answer:
    """A place that no other call has, until `Answer.wait` gives it back."""
    try:
        return _free.pop()
    except IndexError:
        shape = PLACES, len(Totals._fields)
        page = torch.empty(shape, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        _pages.append(page)
        first, *others = map(Answer, page)
        _free.extend(others)
        return first
