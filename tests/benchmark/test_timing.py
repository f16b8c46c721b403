"""Interleaved times, on a clock of known durations."""

import numpy as np
import pytest
import torch

from hf_ortho.profiling.timing import Times, interleave, measure


class Clock:
    """Gives the next of the durations of each call, the last one over and over; remembers what was called."""

    def __init__(self, **durations):
        self.durations = durations
        self.called = []

    def __call__(self, call, repeats, device):
        self.called.append((call, repeats))
        values = self.durations[call]
        return values.pop(0) if len(values) > 1 else values[0]


def test_ratios_are_taken_within_a_round():
    """A machine that slows down by 10 from one round to the next does not touch them."""
    clock = Clock(gelu=[9.0, 1.0, 10.0, 100.0], ours=[9.0, 3.0, 20.0, 400.0])
    found = interleave({"gelu": "gelu", "ours": "ours"}, rounds=3, clock=clock)
    assert found["gelu"] == Times([1.0, 10.0, 100.0], [1.0, 1.0, 1.0])
    assert found["ours"].ratios == [3.0, 2.0, 4.0]
    assert (found["ours"].median, found["ours"].ratio) == (20.0, 3.0)
    assert found["ours"].spread == pytest.approx(np.subtract(*np.percentile([2, 3, 4], [75, 25])))


def test_the_order_rotates_and_turns_after_the_first_calls():
    clock = Clock(a=[1.0], b=[1.0], c=[1.0])
    interleave({"a": "a", "b": "b", "c": "c"}, rounds=4, clock=clock)
    assert "".join(call for call, _ in clock.called) == "abc" + "abc" + "acb" + "cab" + "cba"


def test_a_slow_competitor_leaves_but_not_before_the_fifth_round():
    clock = Clock(gelu=[1.0], slow=[100.0], fast=[2.0])
    found = interleave({"gelu": "gelu", "slow": "slow", "fast": "fast"}, rounds=8, seconds=14.0, clock=clock)
    assert {name: len(times.seconds) for name, times in found.items()} == {"gelu": 8, "slow": 5, "fast": 7}
    assert found["slow"].ratios == [100.0] * 5


def test_short_calls_are_repeated():
    clock = Clock(gelu=[5.0, 0.25, 9.0, 0.25], ours=[5.0, 2.0, 9.0, 2.0])
    found = interleave({"gelu": "gelu", "ours": "ours"}, rounds=1, sample=1.0, clock=clock)
    assert clock.called[-4:] == [("gelu", 1), ("gelu", 4), ("ours", 1), ("ours", 1)]
    assert found["ours"] == Times([2.0], [8.0])


def test_measure_calls_as_often_as_asked():
    calls = []
    seconds = measure(lambda: calls.append(torch.ones(10).sum()), 7, "cpu")
    assert len(calls) == 7
    assert seconds > 0
