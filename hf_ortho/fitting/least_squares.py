r"""Weighted least squares: the fitting problem, and the solvers shared by all families.

The problem is weighted Sobolev least squares in float64,

    min_theta  sum_i w_i [ (f(x_i) - g(x_i))^2 + lambda (f'(x_i) - g'(x_i))^2 ].

f includes the tails, so the interval [lo, hi] is part of the problem. The nodes are the data and points on the real
line. Lawson's iteration finds the weights on the line: they make the largest error anywhere small, in addition to the
mean squared error over the data.
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

# Processors round differently, and fits must not depend on it. A search prefers a later candidate to an earlier one
# only if its squared error is less by the relative margin CLEAR and by the square of a NEGLIGIBLE error.
CLEAR, NEGLIGIBLE = 1e-3, 1e-9
# The result of a search is rounded to multiples of GRID before it is used.
GRID = 2.0**-10
# A non-linear fit runs in legs: evaluations per leg, tolerance, and the weight of staying near the start of the leg, in
# units of the root mean square of the residual there.
LEG, TOLERANCE, PROXIMITY = 15, 1e-5, 0.01
NEAR_ROUNDS = 3  # of ``balance`` from the result for similar data


def width_bounds(degree: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Bounds for a search of the interval: (least -lo, largest -lo), (least hi, largest hi).

    Around a kink, the least-squares error alone would shrink the interval to nothing: float32 coefficients blow up, and
    no data is left inside to learn from. Beyond the nodes on the line nothing constrains the series.
    """
    least, (lo, hi) = 0.6 * math.sqrt(max(degree, 2)), LINE
    return (least, -lo), (least, hi)


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """The input of a fit: the source, the nodes, g and g' there, and the options (with a domain if no tails)."""

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
        return self.options.derivative_weight or 0.0

    @property
    def domain(self) -> tuple[float, float] | None:
        return self.options.domain

    def at(self, nodes: Nodes) -> Target:
        """The same target with other weights."""
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
        """Only the coefficients, five times faster. The weight on the line keeps good bases well conditioned."""
        a, b = self._weighted(design, slope_design, lo, hi)
        gram = a.T @ a
        gram.flat[:: len(gram) + 1] *= 1 + 1e-13
        return np.linalg.solve(gram, a.T @ b)

    def tails(self, lo: float, hi: float) -> Array:
        """s_lo min(x - lo, 0) + s_hi max(x - hi, 0) at the nodes."""
        x, (s_lo, s_hi) = self.nodes.x, self.source.slopes
        return s_lo * np.minimum(x - lo, 0) + s_hi * np.maximum(x - hi, 0)

    def _weighted(self, design: Array, slope_design: Array, lo: float, hi: float) -> tuple[Array, Array]:
        """The design and g minus the tails, both times the square roots of the weights."""
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
    """Whether a squared error is less than the best so far by more than rounding can explain."""
    return square < (1 - CLEAR) * best - NEGLIGIBLE**2


def first_of_least(candidates, square):
    """The candidate with the least ``square``; among equally good ones, the first."""
    best, *rest = candidates
    for candidate in rest:
        if clearly_less(square(candidate), square(best)):
            best = candidate
    return best


@dataclasses.dataclass(frozen=True)
class Balanced:
    """The best round of ``balance``.

    Attributes:
        score: ``Nodes.score``.
        mean_square: weighted mean squared error over the data.
        solution: the result of ``solve``.
        target: the target with the weights of the best round.
        after: the target with the weights for one more round.
    """

    score: float
    mean_square: float
    solution: Any
    target: Target
    after: Target


def balance(solve, target: Target, rounds: int, near: Balanced | None = None) -> Balanced:
    """Minimize ``Nodes.score`` by least squares with changing weights (Lawson's iteration).

    ``solve(target, start)`` returns the solution for fixed weights and f - g at the nodes; ``start`` is the solution of
    the previous round. With ``near``, the result for similar data, its solution and weights are the start, and
    ``NEAR_ROUNDS`` are enough.
    """
    # The square of the largest error is a sum of squares with the right weights: s^2 = max_u sum_i u_i error_i^2 over
    # all weights u of sum 1, attained by weights located where |error| is largest. Each round solves the least squares
    # problem for the current weights and then multiplies the weights on the line by |error|. They pile up at the peaks,
    # the next solution lowers these, and at a fixed point all peaks are equally high. Scores do not decrease steadily,
    # so the best round is returned.
    best, solution = None, None
    if near is not None:
        solution, target, rounds = near.solution, target.at(target.nodes.continued(near.target.nodes)), NEAR_ROUNDS
    for _ in range(rounds):
        solution, error = solve(target, solution)
        score = target.nodes.score(error)
        if best is None or clearly_less(score, best[0]):
            best = score, target.nodes.mean_square(error), solution, target
        if np.abs(error).max() < NEGLIGIBLE:
            break
        target = target.at(target.nodes.reweighted(error))
    assert best is not None
    return Balanced(*best, target)


def variable_projection(problem, starts, bounds, legs: int = 4) -> Array:
    """Minimize |P(theta) b| over the non-linear parameters only (Golub & Pereyra), with Kaufman's Jacobian.

    ``problem(theta)`` returns the residual and its Jacobian. Returns the best theta over all ``starts``.

    The path of a trust region roughly doubles a rounding error in every step, and drifts freely along parameters that
    have no effect. Therefore every leg of the path is short, stays near its start by a small penalty, and ends at a
    multiple of GRID, where the paths of all processors meet again.
    """
    # For given theta (frequencies, knots, ends) the model A(theta) c is linear in the coefficients c. Its least-squares
    # solution leaves the residual r(theta) = A c - b = -P b, where P = 1 - A A^+ projects off the columns of A.
    # Gauss-Newton on r alone searches a small space and needs no start for c. The derivative of r is P A' c plus a
    # term in the columns of A. Kaufman drops this term: it is small where r is small, and costs as much as the rest.
    # So each ``problem`` returns A' c for fixed c, projected by P.
    best, best_cost = None, math.inf
    lower, upper = (np.asarray(v, dtype=float) for v in bounds)
    for theta in starts:
        theta = np.clip(theta, lower, upper)
        for _ in range(legs):
            result = _leg(problem, theta, lower, upper)
            theta = np.clip(to_grid(result.x), lower, upper)
            if result.success:
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
