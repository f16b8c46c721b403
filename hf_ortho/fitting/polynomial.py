"""Weighted least squares with polynomials and straight tails, in Chebyshev polynomials; searches for the interval."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

from .least_squares import NEGLIGIBLE, Balanced, Target, balance, first_of_least, to_grid, width_bounds
from .nodes import Array

SCALES = 0.75, 0.9, 1.0, 1.1, 1.3, 1.6, 2.0  # of [lo, hi], in units of sqrt(n)


class ChebyshevFit(NamedTuple):
    """sum_k ``series``_k T_k((2x - lo - hi)/(hi - lo)) on [lo, hi], the weighted sum of its squared errors, and the
    start of a fit to similar data, whose ``solution`` is (lo, hi)."""

    series: Array
    lo: float
    hi: float
    square: float
    start: Balanced


def fit_polynomial(target: Target, n: int, near: Balanced | None = None) -> ChebyshevFit:
    """The best polynomial of degree n for ``target``; the ends of its interval are float32 numbers. ``near`` is the
    ``start`` found for similar data."""
    lo, hi, weighted = search_interval(target, n, near) if target.domain is None else (*target.domain, target)
    lo, hi = float(np.float32(lo)), float(np.float32(hi))
    balanced = fit_on_interval(weighted, n, lo, hi, rounds=10 if target.domain is None else 30)
    series, residual, _ = balanced.target.least_squares(*chebyshev_designs(target, n, lo, hi), lo, hi)
    start = dataclasses.replace(balanced, solution=(lo, hi))
    return ChebyshevFit(series, lo, hi, float(residual @ residual), start)


def chebyshev_designs(target: Target, n: int, lo: float, hi: float) -> tuple[Array, Array]:
    """T_k on [lo, hi] at the nodes, shape (nodes, n + 1), and the derivatives (or T_k again if they have no weight)."""
    design = chebyshev.chebvander((2 * np.clip(target.nodes.x, lo, hi) - (lo + hi)) / (hi - lo), n)
    return design, design @ _differentiation(n) * (2 / (hi - lo)) if target.derivative_weight else design


@functools.cache
def _differentiation(n: int) -> Array:
    """The matrix from the Chebyshev coefficients of a series to the coefficients of its derivative."""
    return np.stack([np.pad(chebyshev.chebder(row), (0, n + 1))[: n + 1] for row in np.eye(n + 1)], 1)


def fit_on_interval(target: Target, n: int, lo: float, hi: float, rounds: int) -> Balanced:
    """``balance`` with a fixed interval; the solution is a Chebyshev series."""
    design, slopes = chebyshev_designs(target, n, lo, hi)
    tails = target.tails(lo, hi)

    def solve(weighted: Target, start):
        c = weighted.normal_equations(design, slopes, lo, hi)
        return c, design @ c + tails - target.g

    return balance(solve, target, rounds)


def search_interval(target: Target, n: int, near: Balanced | None = None) -> tuple[float, float, Target]:
    """The best [lo, hi], as multiples of GRID, and ``target`` with the weights found by the search; with ``near``, the
    result for similar data, the best one close to its interval."""
    # Only the two ends are non-linear, so the search has two dimensions. The score is a long curved valley (where the
    # errors of the series and of the tails are equal), with a kink wherever the location of the largest error jumps.
    # Nelder-Mead needs no derivatives; it searches over the logarithms of the widths, where a step means the same at
    # every degree. Each evaluation continues with the weights of the last one, so two or three rounds are enough.
    # Coarse scales give a start in the valley. The final candidates are compared by the error over the data.
    if near is not None:
        lo, hi, best = _descend(
            target.at(target.nodes.continued(near.target.nodes)), n, near.solution, (0.3,), 24, rounds=2
        )
        return *to_grid(np.array([lo, hi])), best.after
    reach = math.sqrt(max(n, 2))
    scale = reach * first_of_least(SCALES, lambda r: fit_on_interval(target, n, -r * reach, r * reach, rounds=2).score)
    # Odd degrees gain from a skewed interval: GELU and similar functions are x/2 plus an even function.
    skews = ((1.0, 1.0), (1.3, 0.8), (0.8, 1.3)) if n % 2 else ((1.0, 1.0),)
    evaluations = 30 if len(skews) == 1 else 15
    # a second simplex, since the first may collapse at a kink of the score
    candidates = [_descend(target, n, (-a * scale, b * scale), (0.1, 0.03), evaluations, rounds=3) for a, b in skews]
    if len(target.source.kinks) > 1:  # the tails may start at the kinks, as for hardswish
        lo, hi = target.source.kinks[0], target.source.kinks[-1]
        bounds = np.array(width_bounds(n))
        if np.all((bounds[:, 0] <= (-lo, hi)) & ((-lo, hi) <= bounds[:, 1])):
            candidates.append((lo, hi, fit_on_interval(target, n, lo, hi, rounds=3)))
    lo, hi, best = first_of_least(candidates, lambda t: t[2].mean_square)
    lo, hi = to_grid(np.array([lo, hi]))
    return lo, hi, best.after


def _descend(
    target: Target, n: int, start: tuple[float, float], sizes: tuple[float, ...], evaluations: int, rounds: int
) -> tuple[float, float, Balanced]:
    """The best interval that Nelder-Mead tries, and its fit; one simplex of each size, the first at ``start``."""
    from scipy.optimize import minimize

    bounds = np.log(width_bounds(n))
    tried: list[tuple[float, float, Balanced]] = []

    def cost(widths):
        lo, hi = -math.exp(widths[0]), math.exp(widths[1])
        weights = tried[-1][2].after if tried else target
        tried.append((lo, hi, fit_on_interval(weights, n, lo, hi, rounds)))
        return math.log(tried[-1][2].score + NEGLIGIBLE**2)

    z = np.clip(np.log([-start[0], start[1]]), bounds[:, 0], bounds[:, 1] - 0.1)
    for size in sizes:
        simplex = z + np.array([[0, 0], [size, 0], [0, size]])
        options = {"xatol": 1e-3, "fatol": 1e-3, "maxfev": evaluations, "initial_simplex": simplex}
        z = minimize(cost, z, method="Nelder-Mead", bounds=bounds, options=options).x
    return first_of_least(tried, lambda t: t[2].score)
