"""Times of several competitors, interleaved, so that what else runs on the machine slows all of them alike."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

LEAST_ROUNDS = 3
QUEUE_CYCLES = 20_000_000  # about 10 ms

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one competitor, and their ratios to the reference in the same round; one of each per round."""

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
    """Seconds of one call, the mean of ``repeats``: CPU time of the process, or CUDA events."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(QUEUE_CYCLES)  # meanwhile the calls are queued, so that their launches are not timed
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
    """Run all competitors once per round, in an order that rotates and turns round; the first is the reference.

    Args:
        rounds: at least 1.
        seconds: a competitor leaves after 3 rounds once it has taken this long; the reference stays.
        sample: calls are repeated until one measurement takes this many seconds, after one that does not count; 0 is
            for long calls, which are measured one by one.
        clock: gives the seconds of one call.
    """
    names = list(calls)
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        clock(call, 1, device)  # first calls compile, and fill caches
        repeats[name] = math.ceil(sample / max(clock(call, 1, device), 1e-7)) if sample else 1
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        order = names[shift:] + names[:shift]
        for name in order if i % 2 == 0 else reversed(order):
            if name != names[0] and i >= LEAST_ROUNDS and sum(found[name]) * repeats[name] >= seconds:
                continue
            if sample:
                clock(calls[name], 1, device)  # not counted: it pays for the memory that the one before left behind
            found[name].append(clock(calls[name], repeats[name], device))
    reference = found[names[0]]
    # Whoever leaves does so for good, so that the nth time of each is of the nth round.
    return {name: Times(own, [a / b for a, b in zip(own, reference, strict=False)]) for name, own in found.items()}
