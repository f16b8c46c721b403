"""Interleaved timings of several competitors: other load on the machine slows all of them alike."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

LEAST_ROUNDS = 5
MOST_QUEUED = 40  # calls; CUDA queues about 1000 launches, and a backward pass can take 20
CYCLES_PER_SECOND = 2e9  # of a GPU; at a lower clock rate it sleeps longer
LEAST_SLEEP = 0.5e-3
ATTEMPTS = 3

Call = Callable[[], object]
Clock = Callable[[Call, int, str], float]  # (call, repeats, device) to seconds per call


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one competitor per round, and their ratios to the reference in the same round."""

    seconds: list[float]
    ratios: list[float]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def ratio(self) -> float:
        """The median ratio."""
        return float(np.median(self.ratios))

    @property
    def spread(self) -> float:
        """The interquartile range of the ratios."""
        low, high = np.percentile(self.ratios, [25, 75])
        return float(high - low)


def elapsed(call: Call, repeats: int, device: str) -> float:
    """Mean seconds of one call: CPU time of the process; on CUDA wall time, until the GPU has finished."""
    if device != "cuda":
        begin = time.process_time()
        _repeat(call, repeats)
        return (time.process_time() - begin) / repeats
    torch.cuda.synchronize()
    begin = time.perf_counter()
    _repeat(call, repeats)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def wall(call: Call, repeats: int, device: str) -> float:
    """Mean seconds of one call: wall time, for calls that wait for other processes."""
    begin = time.perf_counter()
    _repeat(call, repeats)
    return (time.perf_counter() - begin) / repeats


def host(call: Call, repeats: int, device: str) -> float:
    """Mean seconds until a call returns: CPU time of the process; on CUDA wall time, without waiting for the GPU."""
    if device != "cuda":
        return elapsed(call, repeats, device)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    _repeat(call, repeats)
    seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    return seconds / repeats


def computing(call: Call, repeats: int, device: str) -> float:
    """Mean seconds of computation of one call: CPU time of the process; on CUDA without the launches.

    On CUDA the calls are first run without a clock, which gives the host time of their launches. The GPU then sleeps
    for longer than that, while the same calls are queued behind it, between two events. If the sleep ended before all
    were queued, the calls are measured again, fewer of them behind a longer sleep. A call that waits for the GPU can
    never be queued: its last measurement includes its launches.
    """
    if device != "cuda":
        return elapsed(call, repeats, device)
    repeats, seconds = min(repeats, MOST_QUEUED), math.nan
    for attempt in range(ATTEMPTS):
        launches = host(call, repeats, device) * repeats
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(CYCLES_PER_SECOND * (1.5 * launches + LEAST_SLEEP) * 2**attempt))
        start.record()
        _repeat(call, repeats)
        end.record()
        queued = not start.query()
        torch.cuda.synchronize()
        seconds = start.elapsed_time(end) / 1e3 / repeats
        if queued:
            break
        repeats = max(1, repeats // 2)
    return seconds


def _repeat(call: Call, repeats: int) -> None:
    for _ in range(repeats):
        call()


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    seconds: float = math.inf,
    sample: float = 0.0,
    device: str = "cpu",
    clock: Clock = elapsed,
) -> dict[str, Times]:
    """Run all competitors once per round, in rotating and alternating order; the first is the reference.

    Args:
        rounds: at least 1.
        seconds: a competitor drops out after 5 rounds once it has taken this long; the reference stays.
        sample: one measurement repeats the call to take about this many seconds, after a warm-up call; 0 to measure
            single calls without warm-up.
        clock: ``elapsed``, ``wall``, ``host`` or ``computing``.
    """
    names = list(calls)
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        clock(call, 1, device)  # first calls compile and fill caches
        repeats[name] = math.ceil(sample / max(clock(call, 1, device), 1e-7)) if sample else 1
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        order = names[shift:] + names[:shift]
        for name in order if i % 2 == 0 else reversed(order):
            if name != names[0] and i >= LEAST_ROUNDS and sum(times[name]) * repeats[name] >= seconds:
                continue
            if sample:
                clock(calls[name], 1, device)  # not counted: recovers from the caches that the previous call left
            times[name].append(clock(calls[name], repeats[name], device))
    reference = times[names[0]]
    # A competitor that drops out never returns, so the nth time of each is from the nth round.
    return {name: Times(t, [a / b for a, b in zip(t, reference, strict=False)]) for name, t in times.items()}
