"""The fit of a tropical polynomial: Gauss-Newton on the points where its lines meet."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from ...fitting.least_squares import Balanced, Target, balance, clearly_less, variable_projection, width_bounds
from .cpu import line_scale

ROUNDS = 12
# The largest |b_k|, -lo and hi, and the least -lo and hi. Wider than ``width_bounds``, which protects the coefficients
# of smooth series: here the slopes are fixed, so a short interval or a break beyond the nodes is harmless.
LARGEST, LEAST = 40.0, 0.6
STEPS, SWEEPS = (0.25, 0.0625, 0.015625), 4  # of the coordinate descent; sweeps per step


class Hinges(NamedTuple):
    """offset + step sum_k max(x - breaks_k, 0) on [lo, hi], the breaks in ascending order."""

    offset: float
    breaks: np.ndarray
    domain: np.ndarray


def fit_hinges(target: Target, n: int, near: Balanced | None = None) -> tuple[Hinges, Balanced]:
    """The best sum of n hinges of slope sqrt(2)/n each, and the start ``near`` of a fit to similar data."""
    balanced = balance(lambda target, start: _solve(target, n, start), target, ROUNDS, near)
    theta = balanced.solution
    breaks = np.sort(theta[1 : n + 1])
    domain = np.array(theta[n + 1 :] if target.domain is None else target.domain)
    if target.domain is None and target.source.slopes[0] == 0 and domain[0] <= breaks[0]:
        domain[0] = -width_bounds(n)[0][1]  # the series and the tail are the same constant there
    return Hinges(theta[0], breaks, domain), balanced


def _solve(target: Target, n: int, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """theta = (offset, n breaks, and lo and hi unless given) for fixed weights, and f - g at the nodes."""
    # As a function of the a_k of max_k (k x + a_k), a line that is nowhere the maximum has gradient 0 and never
    # returns. As a function of the points b_k where line k takes over from k - 1, every line has a gradient: the
    # derivative of the sum of hinges by b_k is -step where x > b_k; lo and hi matter only where x is beyond them. The
    # slopes are fixed, so only the offset is linear, and plain Gauss-Newton is enough. The problem is not convex:
    # there are three starts, with breaks at the quantiles of normal distributions of three widths.
    source, x = target.source, target.nodes.x
    step, (s_lo, s_hi) = line_scale(n), source.slopes
    root = np.sqrt(target.nodes.w)
    root_slope = root * math.sqrt(target.derivative_weight)

    def problem(theta):
        offset, breaks = theta[0], theta[1 : n + 1]
        lo, hi = theta[n + 1 :] if target.domain is None else target.domain
        t = np.clip(x, lo, hi)
        beyond = t[:, None] > breaks
        slope = step * beyond.sum(1)
        value = offset + step * np.maximum(t[:, None] - breaks, 0).sum(1)
        value = value + s_lo * np.minimum(x - lo, 0) + s_hi * np.maximum(x - hi, 0)
        columns = [np.ones((len(x), 1)), -step * beyond]
        if target.domain is None:
            columns.append(np.stack([(x < lo) * (slope - s_lo), (x > hi) * (slope - s_hi)], 1))
        slope = np.where(x < lo, s_lo, np.where(x > hi, s_hi, slope))
        jacobian = np.concatenate(columns, 1) * root[:, None]
        residual = np.concatenate([root * (value - target.g), root_slope * (slope - target.dg)])
        return residual, np.concatenate([jacobian, np.zeros_like(jacobian)])

    starts = [] if start is None else [start]
    for spread in (0.5, 1.0, 2.0) if start is None else ():
        breaks = spread * ndtri((np.arange(n) + 0.5) / n)
        starts.append(np.concatenate([[0.0], breaks, [-2 * spread, 2 * spread] if target.domain is None else []]))
    lower, upper = np.full(len(starts[0]), -LARGEST), np.full(len(starts[0]), LARGEST)
    lower[0], upper[0] = -np.inf, np.inf
    if target.domain is None:
        upper[-2], lower[-1] = -LEAST, LEAST
    theta = variable_projection(problem, starts, (lower, upper))
    if target.derivative_weight:  # Gauss-Newton cannot see the jumps of the slope at the breaks
        theta = _descend(lambda theta: problem(theta)[0], theta, lower, upper)
    return theta, problem(theta)[0][: len(x)] / np.where(root > 0, root, 1.0)


def _descend(residual, theta: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Coordinate descent with fixed steps, as long as |residual|^2 decreases clearly."""

    def square(theta):
        return float(np.sum(residual(theta) ** 2))

    best = square(theta)
    for step in STEPS:
        for _ in range(SWEEPS):
            before = best
            for move in step * np.concatenate([np.eye(len(theta)), -np.eye(len(theta))]):
                there = np.clip(theta + move, lower, upper)
                value = square(there)
                if clearly_less(value, best):
                    theta, best = there, value
            if best == before:
                break
    return theta
