"""Targets against made-up results."""

import collections
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ortho.benchmark import TARGETS, BenchResults, Figure, SpeedTarget, check
from hf_ortho.benchmark.floors import FLOORS, Floor

TARGET = SpeedTarget("cpu", "sequence", "hermite_3", "forward", 2.0)


def outcome(ratio):
    results = BenchResults([Figure("sequence", "hermite_3", "forward", 1.0, ratio)])
    (found,) = check(results, "cpu", [TARGET])
    return found


@pytest.mark.parametrize(
    ("ratio", "fails", "verdict"),
    [
        (1.5, False, "met"),
        (2.0, False, "met"),
        (2.0001, False, "met"),
        (2.28, False, "missed by 14%"),
        (2.32, True, "missed by 16%"),
    ],
)
def test_tolerance(ratio, fails, verdict):
    found = outcome(ratio)
    assert (found.fails, found.verdict) == (fails, verdict)
    assert found.missed_by == pytest.approx(max(0, ratio / 2 - 1))


@pytest.mark.parametrize(
    ("floor", "ratio", "fails", "verdict"),
    [
        (1.9, 2.28, False, "missed by 14%"),  # below the limit, it changes nothing
        (3.0, 2.9, False, "met, relative to the measured floor of 3.00"),
        (3.0, 3.3, False, "missed by 10%, relative to the measured floor of 3.00"),
        (3.0, 3.6, True, "missed by 20%, relative to the measured floor of 3.00"),
    ],
)
def test_a_floor_above_the_limit_takes_its_place(floor, ratio, fails, verdict):
    figures = [
        Figure("sequence", row, "forward", 1.0, r) for row, r in (("hermite_3", ratio), ("floor of hermite_3", floor))
    ]
    (found,) = check(BenchResults(figures), "cpu", [TARGET])
    assert (found.fails, found.verdict) == (fails, verdict)


@pytest.mark.parametrize("row", FLOORS)
def test_a_floor_takes_the_operations_that_it_names(row):
    forward, backward = FLOORS[row]
    x = torch.randn(3, 50_000, requires_grad=True)  # three chunks, the last one short
    with Counter() as counter:
        y = Floor(forward, backward)(x)
        counted_forward = collections.Counter(counter.calls)
        counter.calls.clear()
        y.backward(torch.ones_like(y))
    for operations, counted in ((forward, counted_forward), (backward, counter.calls)):
        found = [counted[name] // 3 for name in ("mul", "sum", "index_select", "scatter_add_")]
        assert found == [operations.passes, operations.sums, operations.gathers, operations.scatters]


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_what_was_not_run_fails():
    (found,) = check(BenchResults(), "cpu", [TARGET])
    assert (found.fails, found.verdict, found.figure) == (True, "not run", None)


def test_a_target_over_another_row():
    """5 ms over the 4 ms of the copy, whatever the ratio to the first row."""
    target = dataclasses.replace(TARGET, over="copy", limit=1.0)
    ours, copy = (Figure("sequence", row, "forward", t, 9.0) for row, t in (("hermite_3", 5e-3), ("copy", 4e-3)))
    (found,) = check(BenchResults([ours, copy]), "cpu", [target])
    assert (found.figure.ratio, found.verdict) == (1.25, "missed by 25%")
    (found,) = check(BenchResults([ours]), "cpu", [target])
    assert found.verdict == "not run"
    assert str(target) == "sequence: hermite_3, forward, over copy"


def test_only_the_targets_of_the_device_count():
    both = [TARGET, dataclasses.replace(TARGET, device="cuda")]
    assert [o.target for o in check(BenchResults(), "cuda", both)] == [both[1]]


def test_no_target_is_given_twice():
    keys = [(t.device, t.case, t.row, t.measure, t.over) for t in TARGETS]
    assert len(keys) == len(set(keys))
