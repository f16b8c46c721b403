r"""Weighted least squares: the problem of a fit, and the solvers that all families share.

The problem is weighted Sobolev least squares in float64,

    min_theta  sum_i w_i [ (f(x_i) - g(x_i))^2 + lambda (f'(x_i) - g'(x_i))^2 ],

with the tails inside f, so that the interval [lo, hi] is part of the problem. The nodes are the data and, with weights
that Lawson's iteration finds, the real line: next to the mean squared error over the data, the largest error anywhere
gets small.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .density import LINE
from .nodes import Array, Nodes
from .options import FitOptions
from .source import Source

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

# Every processor rounds in its own way, and the fits must not depend on it. Where a search chooses, the first candidate
# stays unless the squared error of another is less by this share of it and by the square of a negligible error.
CLEAR, NEGLIGIBLE = 1e-3, 1e-9
# What a search has found is rounded to GRID before anything is built on it.
GRID = 2.0**-10
# The path of a non-linear fit: evaluations in a leg of it, their tolerances, and the weight of staying near where
# the leg began, in root mean squares of the residual there.
LEG, TOLERANCE, PROXIMITY = 15, 1e-5, 0.01


def width_bounds(degree: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """The least and the largest -lo, and the least and the largest hi, that a search tries, in units of x.

    Around a kink the least-squares error alone would shrink the interval to nothing, where float32 coefficients blow up
    and no data is left to learn from. Beyond the nodes on the line nothing would hold the series.
    """
    least, (lo, hi) = 0.6 * math.sqrt(max(degree, 2)), LINE
    return (least, -lo), (least, hi)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a fit gets: the source and the nodes, g and g' there, and the options, with a domain if there are no
    tails."""

    source: Source
    nodes: Nodes
    g: Array
    dg: Array
    options: FitOptions

    @classmethod
    def of(cls, source: Source, nodes: Nodes, options: FitOptions) -> Target:
        return cls(source, nodes, source.value(nodes.x), source.derivative(nodes.x), options)

    @property
    def derivative_weight(self) -> float:
        return self.options.derivative_weight

    @property
    def domain(self) -> tuple[float, float] | None:
        return self.options.domain

    def at(self, nodes: Nodes) -> Target:
        """The same with other weights."""
        return dataclasses.replace(self, nodes=nodes)

    def least_squares(self, design: Array, slope_design: Array, lo: float, hi: float, ridge: float = 0.0):
        """Solve for the linear coefficients with the interval fixed.

        ``design`` and ``slope_design`` hold the basis and its derivative at clamp(x, lo, hi), shape (nodes, p).
        Returns the coefficients, the residual, and a function that projects onto the residual space.
        """
        a, b = self._weighted(design, slope_design, lo, hi)
        if ridge:
            a = np.concatenate([a, ridge * np.eye(a.shape[1])])
            b = np.concatenate([b, np.zeros(a.shape[1])])
        u, s, vt = np.linalg.svd(a, full_matrices=False)
        keep = s > 1e-13 * s[0]
        u, projected = u[:, keep], u[:, keep].T @ b
        return vt[keep].T @ (projected / s[keep]), u @ projected - b, lambda v: v - u @ (u.T @ v)

    def normal_equations(self, design: Array, slope_design: Array, lo: float, hi: float) -> Array:
        """The coefficients alone, five times faster; the weight on the line keeps good bases well conditioned."""
        a, b = self._weighted(design, slope_design, lo, hi)
        gram = a.T @ a
        gram.flat[:: len(gram) + 1] *= 1 + 1e-13
        return np.linalg.solve(gram, a.T @ b)

    def tails(self, lo: float, hi: float) -> Array:
        """s_lo min(x - lo, 0) + s_hi max(x - hi, 0) at the nodes."""
        x, (s_lo, s_hi) = self.nodes.x, self.source.slopes
        return s_lo * np.minimum(x - lo, 0) + s_hi * np.maximum(x - hi, 0)

    def _weighted(self, design: Array, slope_design: Array, lo: float, hi: float) -> tuple[Array, Array]:
        """Rows times the roots of the weights, and the right-hand side without the tails."""
        x, (s_lo, s_hi) = self.nodes.x, self.source.slopes
        root = np.sqrt(self.nodes.w)[:, None]
        a, b = design * root, (self.g - self.tails(lo, hi)) * root[:, 0]
        if not self.derivative_weight:
            return a, b
        inside = ((x >= lo) & (x <= hi))[:, None]
        root = root * math.sqrt(self.derivative_weight)
        outside_slope = np.where(x < lo, s_lo, np.where(x > hi, s_hi, 0.0))
        slopes, right = np.where(inside, slope_design, 0.0) * root, (self.dg - outside_slope) * root[:, 0]
        return np.concatenate([a, slopes]), np.concatenate([b, right])


def clearly_less(square: float, best: float) -> bool:
    """Whether a squared error is less than the best one so far by more than rounding explains."""
    return square < (1 - CLEAR) * best - NEGLIGIBLE**2


def first_of_least(candidates, square):
    """The candidate of the least ``square``; of two that are as good as each other the first."""
    first, *others = candidates
    for other in others:
        if clearly_less(square(other), square(first)):
            first = other
    return first


@dataclasses.dataclass(frozen=True)
class Balanced:
    """The best round of ``balance``.

    Attributes:
        score: ``Nodes.score``.
        mean_square: mean squared error over the data.
        solution: as ``solve`` gave it.
        target: with the weights of that round.
        after: with the weights that would have been those of one more round.
    """

    score: float
    mean_square: float
    solution: Any
    target: Target
    after: Target


def balance(solve, target: Target, rounds: int) -> Balanced:
    """Minimize ``Nodes.score`` by least squares with changing weights (Lawson's iteration).

    ``solve(target, start)`` gives the solution for fixed weights, from the one of the last round, and f - g at the
    nodes.
    """
    # A largest error is no sum of squares, but it is one with the right weights: s^2 = max_u sum_i u_i error_i^2 over
    # all weights u of sum 1, attained by those that sit where |error| is largest. So each round solves the least
    # squares problem for the present weights, and then multiplies those on the line by |error|: they pile up at the
    # peaks, the next solution lowers these, and where nothing moves any more all peaks are equally high. Their
    # sum, the price of s^2, is set anew in each round too. Scores do not fall steadily: the best round counts.
    best, solution = None, None
    for _ in range(rounds):
        solution, error = solve(target, solution)
        score = target.nodes.score(error)
        if best is None or clearly_less(score, best[0]):
            best = score, target.nodes.mean(error**2), solution, target
        if np.abs(error).max() < NEGLIGIBLE:
            break
        target = target.at(target.nodes.reweighted(error))
    assert best is not None
    return Balanced(*best, target)


def variable_projection(problem, starts, bounds, legs: int = 4) -> Array:
    """Minimize |P(theta) b| over the non-linear parameters alone (Golub & Pereyra), Kaufman's Jacobian.

    ``problem(theta)`` returns the residual and its Jacobian; the best of all ``starts`` is returned.

    The path of a trust region doubles a rounding error in about every step, and is free to drift where nothing depends
    on a parameter. So every leg of the path is short, stays near its start by a small penalty, and ends at a multiple
    of GRID, where all processors meet again.
    """
    # For given theta (frequencies, knots, ends) the model A(theta) c is linear in the coefficients c, and its least
    # squares solution leaves the residual r(theta) = A c - b = -P b, with P = 1 - A A^+ the projection off the columns
    # of A. Gauss-Newton on r alone searches a small space and needs no start for c. The derivative of r is P A' c, and
    # a second term that lies in the columns of A; Kaufman drops that one, which is small where r is and costs as much
    # as the rest. So each ``problem`` gives A' c with c held fixed, projected by P.
    best, best_cost = None, math.inf
    lower, upper = (np.asarray(v, dtype=float) for v in bounds)
    for theta in starts:
        theta = np.clip(theta, lower, upper)
        for _ in range(legs):
            found = _leg(problem, theta, lower, upper)
            theta = np.clip(to_grid(found.x), lower, upper)
            if found.success:
                break
        residual = problem(theta)[0]
        cost = float(residual @ residual)
        if clearly_less(cost, best_cost):
            best, best_cost = theta, cost
    assert best is not None
    return best


def to_grid(values: Array) -> Array:
    """The nearest multiples of GRID."""
    return np.round(values / GRID) * GRID


def _leg(problem, start: Array, lower: Array, upper: Array) -> OptimizeResult:
    from scipy.optimize import least_squares

    start = np.clip(start, lower + 1e-9, upper - 1e-9)
    residual, _ = problem(start)
    stay = PROXIMITY * math.sqrt(residual @ residual) * np.eye(len(start))
    memo: dict[bytes, tuple[Array, Array]] = {}

    def at(theta):
        key = theta.tobytes()
        if key not in memo:
            memo.clear()
            residual, jacobian = problem(theta)
            memo[key] = np.concatenate([residual, stay @ (theta - start)]), np.concatenate([jacobian, stay])
        return memo[key]

    return least_squares(
        lambda theta: at(theta)[0],
        start,
        jac=lambda theta: at(theta)[1],
        bounds=(lower, upper),
        max_nfev=LEG,
        x_scale="jac",
        ftol=TOLERANCE,
        xtol=TOLERANCE,
    )
