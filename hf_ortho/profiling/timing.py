"""Interleaved timings of several competitors: other load on the machine slows all of them alike."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

LEAST_ROUNDS = 5
QUEUE_CYCLES = 20_000_000  # about 10 ms

Call = Callable[[], object]


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


def measure(call: Call, repeats: int, device: str) -> float:
    """Mean seconds of one call over ``repeats`` calls: CPU time of the process, or CUDA events."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(QUEUE_CYCLES)  # the calls are queued in the meantime, so their launches are not timed
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - begin) / repeats


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    seconds: float = math.inf,
    sample: float = 0.0,
    device: str = "cpu",
    clock: Callable[[Call, int, str], float] = measure,
) -> dict[str, Times]:
    """Run all competitors once per round, in rotating and alternating order; the first is the reference.

    Args:
        rounds: at least 1.
        seconds: a competitor drops out after 5 rounds once it has taken this long; the reference stays.
        sample: one measurement repeats the call to take about this many seconds, after a warm-up call; 0 to measure
            single calls without warm-up.
        clock: measures the seconds of one call.
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
