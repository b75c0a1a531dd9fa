"""Times and bytes. Nothing here knows what is measured."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Function = Callable[[], object]

# larger than any L2 cache, zeroed before each timed call
FLUSH_BYTES = 256 * 2**20
# flushes queued before a block, so that the host runs ahead of the device for the calls that follow
AHEAD = 16
# the same before the calls by which the others are planned
FAR_AHEAD = 64
# a round on the CPU counts as quiet if other processes used less than this share of one core
BUSY_SHARE = 0.15
# resolution of the system's account
TICK_S = 0.02
# quiet rounds that suffice to leave the others out
MIN_QUIET = 3


@dataclass(frozen=True)
class Quantiles:
    """Median, 20 % and 80 % of repeated measurements."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples: list[float]) -> Quantiles:
        """Quantiles of at least one sample."""
        if len(samples) == 1:
            return Quantiles(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return Quantiles(statistics.median(samples), fifths[0], fifths[3])


def cuda_ms(functions: Mapping[str, Function], rounds: int, block_ms: float) -> dict[str, Quantiles]:
    """Device time of each function in ms, by CUDA events, L2 flushed before every call.

    Functions take turns in blocks of about `block_ms`, so a change of clock meets them all. The slower the host is with
    a function, the more flushes are queued before a block of its calls.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in functions}
    flush_ms = statistics.median(_cuda_block(flush.zero_, 3, flush, FAR_AHEAD)[0])
    plans = {}
    for name, function in functions.items():
        times, host_ms = _cuda_block(function, 3, flush, FAR_AHEAD)
        call_ms = max(statistics.median(times), 1e-3)
        repeats = min(50, max(3, round(block_ms / call_ms)))
        late_ms = repeats * max(0.0, host_ms - call_ms - flush_ms)
        plans[name] = repeats, AHEAD + math.ceil(late_ms / flush_ms)
    for _ in range(rounds):
        for name, function in functions.items():
            repeats, ahead = plans[name]
            samples[name] += _cuda_block(function, repeats, flush, ahead)[0]
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


@dataclass(frozen=True)
class Ratios:
    """Times in parts of a baseline's, per function."""

    of: dict[str, Quantiles]
    # rounds counted, and how many of them other processes did not disturb
    rounds: int
    quiet: int


def cpu_ratios(functions: Mapping[str, Function], baseline: str, rounds: int = 9, limit_s: float = 40.0) -> Ratios:
    """Time of each function in parts of the time of `baseline`, both taken from the same round.

    Each round runs all functions once, every other round in reverse. Rounds in which other processes had the cores are
    left out while enough quiet ones are found: threads that wait for each other suffer far more than in proportion.
    """
    quiet: list[dict[str, float]] = []
    noisy: list[dict[str, float]] = []
    begin = time.perf_counter()
    # a few rounds at least, however slow
    while len(quiet) < rounds and len(quiet) + len(noisy) < 4 * rounds:
        if len(quiet) + len(noisy) >= MIN_QUIET and time.perf_counter() - begin > limit_s:
            break
        others, start = _others_s(), time.perf_counter()
        seconds = _round(functions, backwards=(len(quiet) + len(noisy)) % 2 == 1)
        wall, others = time.perf_counter() - start, _others_s() - others
        (noisy if others > BUSY_SHARE * wall + TICK_S else quiet).append(seconds)
    counted = quiet if len(quiet) >= MIN_QUIET else quiet + noisy
    ratios = {name: Quantiles.of([s[name] / s[baseline] for s in counted]) for name in functions}
    return Ratios(ratios, len(counted), len(quiet))


def _round(functions: Mapping[str, Function], backwards: bool) -> dict[str, float]:
    """Seconds of each function, called once."""
    seconds = {}
    for name in reversed(list(functions)) if backwards else functions:
        start = time.perf_counter()
        functions[name]()
        seconds[name] = time.perf_counter() - start
    return seconds


def _others_s() -> float:
    """Core seconds spent so far by other processes; 0 where the system does not say."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def device_work_ms(functions: list[Function]) -> float:
    """Mean ms of kernels, copies and fills per call, from the profiler: idle gaps and the host are not in it.

    Pass several functions that read different memory, more than fits into the L2 cache, and each reads cold memory.

    Raises:
        RuntimeError: the profiler saw no work on the device.
    """
    for function in functions:
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for function in functions:
            function()
        torch.cuda.synchronize()
    events = [e for e in found.events() or [] if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    if not events:
        raise RuntimeError("the profiler saw no work on the device")
    return float(sum(e.time_range.elapsed_us() for e in events)) / 1e3 / len(functions)


def wall_ms(functions: list[Function], rounds: int = 25) -> Quantiles:
    """Host ms from an idle device to an idle device, the synchronisation included."""
    samples = []
    for _ in range(rounds):
        for function in functions:
            torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            torch.cuda.synchronize()
            samples.append((time.perf_counter() - start) * 1e3)
    return Quantiles.of(samples)


def host_us(function: Function, calls: int = 20, rounds: int = 3) -> float:
    """Median us of host time a call takes while the device lags behind; `calls` fit into its queue.

    Each call is timed by itself: one that other processes interrupt would spoil a mean.
    """
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        for _ in range(calls):
            start = time.perf_counter()
            function()
            samples.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples)


def extra_bytes(function: Function) -> tuple[int, int]:
    """Peak of the bytes a call adds, its result included: as requested, and with the allocator's rounding."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    # the result lives until the peak is read
    result = function()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    del result
    kinds = ("requested_bytes", "allocated_bytes")
    requested, allocated = (after[f"{kind}.all.peak"] - before[f"{kind}.all.current"] for kind in kinds)
    return requested, allocated
