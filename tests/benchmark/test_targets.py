"""Targets against made-up results."""

import dataclasses

import pytest

from hf_ortho.benchmark import TARGETS, Figure, Results, Target, check

TARGET = Target("cpu", "sequence", "hermite_3", "forward", 2.0)


def outcome(ratio):
    results = Results([Figure("sequence", "hermite_3", "forward", 1.0, ratio)])
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


def test_what_was_not_run_fails():
    (found,) = check(Results(), "cpu", [TARGET])
    assert (found.fails, found.verdict, found.figure) == (True, "not run", None)


def test_only_the_targets_of_the_device_count():
    both = [TARGET, dataclasses.replace(TARGET, device="cuda")]
    assert [o.target for o in check(Results(), "cuda", both)] == [both[1]]


def test_no_target_is_given_twice():
    keys = [(t.device, t.case, t.row, t.measure) for t in TARGETS]
    assert len(keys) == len(set(keys))
