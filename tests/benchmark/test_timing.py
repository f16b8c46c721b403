"""Interleaved times on a clock of known durations, and the clocks on a GPU of known speed."""

import types

import numpy as np
import pytest
import torch

from hf_ortho.profiling import timing
from hf_ortho.profiling.timing import MOST_QUEUED, Times, computing, elapsed, host, interleave


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


@pytest.mark.parametrize("clock", [elapsed, host, computing])
def test_clocks_call_as_often_as_asked(clock):
    calls = []
    seconds = clock(lambda: calls.append(torch.ones(10).sum()), 7, "cpu")
    assert len(calls) == 7
    assert seconds > 0


class GPU:
    """A stream that works through what is queued. A launch takes time on the host, and the work time on the GPU."""

    def __init__(self):
        self.now = 0.0  # on the host
        self.free = 0.0  # when the GPU has done all that is queued

    def queue(self, work, launch=0.0):
        self.now += launch
        self.free = max(self.free, self.now) + work

    def sleep(self, cycles):
        self.queue(cycles / timing.CYCLES_PER_SECOND)

    def synchronize(self):
        self.now = max(self.now, self.free)

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu.queue(0.0)
        self.time = self.gpu.free

    def query(self):
        return self.time <= self.gpu.now

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


@pytest.fixture
def gpu(monkeypatch):
    gpu = GPU()
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: gpu.now))
    return gpu


@pytest.mark.parametrize("launch", [1e-6, 20e-6, 5e-3])
@pytest.mark.parametrize("work", [2e-6, 40e-6, 3e-3])
def test_computing_hides_any_launch(gpu, launch, work):
    assert computing(lambda: gpu.queue(work, launch), 10, "cuda") == pytest.approx(work)


@pytest.mark.parametrize(("launch", "work"), [(20e-6, 2e-6), (20e-6, 3e-3)])
def test_host_is_the_launch_alone(gpu, launch, work):
    assert host(lambda: gpu.queue(work, launch), 10, "cuda") == pytest.approx(launch)


def test_elapsed_is_the_longer_of_both(gpu):
    assert elapsed(lambda: gpu.queue(2e-6, 20e-6), 10, "cuda") == pytest.approx(20e-6, rel=0.02)  # and the last work
    assert elapsed(lambda: gpu.queue(3e-3, 20e-6), 10, "cuda") == pytest.approx(3e-3, rel=0.02)  # and the first launch


def test_computing_tries_again_behind_a_longer_sleep(gpu):
    """Launches that take twice as long when they are timed."""
    slow = 0

    def call():
        nonlocal slow
        slow += 1
        gpu.queue(1e-6, 1e-3 if slow <= 20 else 2e-3)

    assert computing(call, 20, "cuda") == pytest.approx(1e-6)
    assert slow == 20 + 20 + 10 + 10


def test_computing_ends_for_a_call_that_waits(gpu):
    def call():
        gpu.queue(1e-3, 20e-6)
        gpu.synchronize()

    assert computing(call, 4, "cuda") == pytest.approx(1e-3, rel=0.05)


def test_the_queue_is_limited(gpu):
    calls = []
    computing(lambda: calls.append(gpu.queue(1e-6, 1e-6)), 1000, "cuda")
    assert len(calls) == 2 * MOST_QUEUED  # to time the launches, and to time the work
