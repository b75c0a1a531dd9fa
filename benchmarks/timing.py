"""Times and bytes. Nothing here knows what is measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[], object]

# larger than any L2 cache, zeroed before each timed call
FLUSH_BYTES = 256 * 2**20
# flushes queued before a block, so that the host runs ahead of the device for the calls that follow
AHEAD = 16
# the same before the calls by which the others are planned
FAR_AHEAD = 64
# ms above which a function is timed by the calls that plan alone
SLOW_MS = 1000.0


@dataclass(frozen=True)
class Quantiles:
    """Median, 20 % and 80 % of repeated measurements."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples: Sequence[float]) -> Quantiles:
        """Quantiles of at least one sample."""
        fifths = statistics.quantiles(samples * 2 if len(samples) == 1 else samples, n=5, method="inclusive")
        return Quantiles(statistics.median(samples), fifths[0], fifths[3])


def cuda_ms(functions: Mapping[str, Function], rounds: int, block_ms: float) -> dict[str, Quantiles]:
    """Device time of each function in ms, by CUDA events, L2 flushed before every call.

    Functions take turns in blocks of about `block_ms`, so a change of clock meets them all. The slower the host is with
    a function, the more flushes are queued before a block of its calls. One that takes over a second has one block.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {}
    flush_ms = statistics.median(_cuda_block(flush.zero_, 3, flush, FAR_AHEAD)[0])
    plans = {}
    for name, function in functions.items():
        times, host_ms = _cuda_block(function, 3, flush, FAR_AHEAD)
        call_ms = max(statistics.median(times), 1e-3)
        samples[name] = times if call_ms > SLOW_MS else []
        if call_ms <= SLOW_MS:
            repeats = min(50, max(3, round(block_ms / call_ms)))
            plans[name] = repeats, AHEAD + math.ceil(repeats * max(0.0, host_ms - call_ms - flush_ms) / flush_ms)
    for _ in range(rounds):
        for name, (repeats, ahead) in plans.items():
            samples[name] += _cuda_block(functions[name], repeats, flush, ahead)[0]
    return {name: Quantiles.of(found) for name, found in samples.items()}


def _cuda_block(function: Function, repeats: int, flush: Tensor, ahead: int) -> tuple[list[float], float]:
    """Device ms of each of `repeats` calls, and the host's ms a call with its flush."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for _ in range(ahead):
        flush.zero_()
    function()
    begin = time.perf_counter()
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    host_ms = (time.perf_counter() - begin) * 1e3 / repeats
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events], host_ms


def wall_ms(functions: Mapping[str, Function], calls: int, device: str) -> dict[str, tuple[Quantiles, float]]:
    """Ms from an idle device to an idle device, and the median us until a call returned to the host; in turns.

    Each call is timed by itself: one that other processes interrupt would spoil a mean.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for n in range(calls):
        # a call finds the caches as the call before left them
        for name in reversed(list(functions)) if n % 2 else functions:
            wait()
            start = time.perf_counter()
            functions[name]()
            returned = time.perf_counter() - start
            wait()
            samples[name].append(((time.perf_counter() - start) * 1e3, returned * 1e6))
    columns = {name: list(zip(*found, strict=True)) for name, found in samples.items()}
    return {name: (Quantiles.of(walls), statistics.median(us)) for name, (walls, us) in columns.items()}


def host_us(function: Function, calls: int = 20, rounds: int = 3) -> float:
    """Median us of host time a call takes while the device lags behind; `calls` fit into its queue."""
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        for _ in range(calls):
            start = time.perf_counter()
            function()
            samples.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples)


def extra_bytes(function: Function) -> int:
    """Peak of the bytes a call asks the allocator for, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    # the result lives until the peak is read
    _result = function()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)
