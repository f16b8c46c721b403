r"""What the fits of all families share: the nodes, the weights, the solvers, the error measures.

*Hermite interpolation* here is weighted Sobolev least squares in float64,

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

from .source import Source

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

Array = np.ndarray

# The data-free weight N(-0.5, 1.5^2): pre-activations of pretrained networks lean to the negative side.
DEFAULT_MEAN, DEFAULT_SIGMA = -0.5, 1.5
# What the square of the largest error s on the real line counts for, next to the mean squared error over the data: 0.2
# while s is well below NEAR, and less above, down to 0.01: what cannot come close everywhere serves the data.
SUP_WEIGHT, LEAST_SUP_WEIGHT, NEAR = 0.2, 0.01, 0.02
# Every processor rounds in its own way, and the fits must not depend on it. Where a search chooses, the first candidate
# stays unless the squared error of another is less by this share of it and by the square of a negligible error.
CLEAR, NEGLIGIBLE = 1e-3, 1e-9
# What a search has found is rounded to GRID before anything is built on it.
GRID = 2.0**-10
# The path of a non-linear fit: evaluations in a leg of it, their tolerances, and the weight of staying near where
# the leg began, in root mean squares of the residual there.
LEG, TOLERANCE, PROXIMITY = 15, 1e-5, 0.01
LEAST_FACTOR = 0.03  # of a weight in a step of Lawson's: where the error is near 0, rounding is much of it


def quadrature(lo: float, hi: float, breaks: tuple[float, ...] = (), step: float = 0.5, order: int = 8):
    """Composite Gauss-Legendre nodes and weights on ``[lo, hi]``, split at ``breaks`` (float64)."""
    inner = sorted(b for b in breaks if lo < b < hi)
    edges = np.concatenate(
        [
            np.linspace(a, b, max(2, math.ceil((b - a) / step) + 1))[:-1]
            for a, b in zip([lo, *inner], [*inner, hi], strict=True)
        ]
        + [[hi]]
    )
    t, w = np.polynomial.legendre.leggauss(order)
    half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    return (middle + half * t).ravel(), (half * w).ravel()


def norm_density(z: Array) -> Array:
    """exp(-z^2/2) / sqrt(2 pi)."""
    return np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def gaussian_moments(value, derivative, sigma: float, breaks: tuple[float, ...] = ()) -> tuple[float, float]:
    """E[F(x)^2] and E[F'(x)^2] for x ~ N(0, sigma^2), by quadrature split at ``breaks``."""
    x, w = quadrature(-16 * sigma, 16 * sigma, breaks, step=sigma / 4)
    w = w * norm_density(x / sigma) / sigma
    return float(w @ value(x) ** 2), float(w @ derivative(x) ** 2)


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Points x_i with weights w_i: the data (or the data-free density) with sum 1, then the real line.

    ``data`` marks the former. ``minimum`` and ``maximum`` are the exact extremes of the data, None without data.
    """

    x: Array
    w: Array
    data: Array
    minimum: float | None = None
    maximum: float | None = None

    @classmethod
    def of(
        cls,
        source: Source,
        x: Array,
        w: Array,
        minimum: float | None = None,
        maximum: float | None = None,
        line: tuple[float, float] | None = None,
    ) -> Nodes:
        """The points ``x`` of positive weight ``w``, and evenly weighted ones on ``line``, by default 6 sigma to either
        side."""
        lo, hi = line or _reach(6.0)
        points, length = quadrature(lo, hi, (0.0, *source.kinks), min(0.25, (hi - lo) / 8), order=4)
        x, w = x[w > 0], w[w > 0]
        data = np.arange(len(x) + len(points)) < len(x)
        weights = np.concatenate([w / w.sum(), SUP_WEIGHT * length / length.sum()])
        return cls(np.concatenate([x, points]), weights, data, minimum, maximum)

    @classmethod
    def gaussian(cls, source: Source, step: float = 0.25) -> Nodes:
        """The data-free weight."""
        x, length = quadrature(*_reach(7.0), (0.0, *source.kinks), step)
        return cls.of(source, x, length * norm_density((x - DEFAULT_MEAN) / DEFAULT_SIGMA))

    def within(self, source: Source, lo: float, hi: float) -> Nodes:
        """For a fit to [lo, hi] alone: the data there, or the data-free weight if it has any mass there, else an even
        one."""
        x, w = self.x[self.data], self.w[self.data]
        if self.minimum is None:
            x, length = quadrature(lo, hi, (0.0, *source.kinks), min(0.25, (hi - lo) / 8))
            w = length * norm_density((x - DEFAULT_MEAN) / DEFAULT_SIGMA)
            w = w if w.sum() > 1e-9 else length
        w = np.where((x >= lo) & (x <= hi), w, 0.0)
        return Nodes.of(source, x, w, self.minimum, self.maximum, (lo, hi))

    def mean(self, values: Array) -> float:
        """Average over the data."""
        return float(self.w[self.data] @ values[self.data] / self.w[self.data].sum())

    def score(self, error: Array) -> float:
        """Mean squared error over the data + a s^2 + (b - a) NEAR^2 log(1 + (s / NEAR)^2), s = max |error|, a and b
        the least and the full weight."""
        square = float(np.max(np.abs(error[~self.data]))) ** 2
        spread = (SUP_WEIGHT - LEAST_SUP_WEIGHT) * NEAR**2 * math.log1p(square / NEAR**2)
        return self.mean(error**2) + LEAST_SUP_WEIGHT * square + spread

    def reweighted(self, error: Array) -> Nodes:
        """Lawson's step: weight on the line moves to where |error| is large.

        s^2 is the maximum over all weights u of sum 1 of sum_i u_i error_i^2, so that with the derivative of ``score``
        by s^2 for the sum of the weights a fixed point minimises it.
        """
        size = np.abs(error)
        most = float(np.max(size[~self.data]))
        total = LEAST_SUP_WEIGHT + (SUP_WEIGHT - LEAST_SUP_WEIGHT) / (1 + most**2 / NEAR**2)
        w = np.where(self.data, self.w, self.w * np.maximum(size, LEAST_FACTOR * most))
        w[~self.data] *= total / w[~self.data].sum()
        return dataclasses.replace(self, w=w)


def _reach(sigmas: float) -> tuple[float, float]:
    return DEFAULT_MEAN - sigmas * DEFAULT_SIGMA, DEFAULT_MEAN + sigmas * DEFAULT_SIGMA


def is_interval(domain) -> bool:
    """Whether ``domain`` is two finite numbers lo < hi."""
    numbers = isinstance(domain, (tuple, list)) and all(isinstance(v, (int, float)) for v in domain)
    return numbers and len(domain) == 2 and all(map(math.isfinite, domain)) and domain[0] < domain[1]


def width_bounds(degree: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """The least and the largest -lo, and the least and the largest hi, that a search tries, in units of x.

    Around a kink the least-squares error alone would shrink the interval to nothing, where float32 coefficients blow up
    and no data is left to learn from. Beyond the nodes on the line nothing would hold the series.
    """
    least, (lo, hi) = 0.6 * math.sqrt(max(degree, 2)), _reach(6.0)
    return (least, -lo), (least, hi)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a fit gets: the nodes, g and g' there, the tails' slopes, and lambda (``derivative_weight``)."""

    source: Source
    nodes: Nodes
    g: Array
    dg: Array
    derivative_weight: float
    domain: tuple[float, float] | None

    @classmethod
    def of(cls, source: Source, nodes: Nodes, derivative_weight: float, domain: tuple[float, float] | None) -> Target:
        return cls(source, nodes, source.value(nodes.x), source.derivative(nodes.x), derivative_weight, domain)

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
    """The best of some rounds: ``Nodes.score``, mean squared error over the data, solution and weights; and the weights
    that the next round would have."""

    score: float
    mean_square: float
    solution: Any
    target: Target
    after: Target


def balance(solve, target: Target, rounds: int) -> Balanced:
    """Alternate least squares and Lawson's step.

    ``solve(target, start)`` gives the solution for fixed weights, from the one of the last round, and f - g at the
    nodes.
    """
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
    """Minimise |P(theta) b| over the non-linear parameters alone (Golub & Pereyra), Kaufman's Jacobian.

    ``problem(theta)`` returns the residual and its Jacobian; the best of all ``starts`` is returned.

    The path of a trust region doubles a rounding error in about every step, and is free to drift where nothing depends
    on a parameter. So every leg of the path is short, stays near its start by a small penalty, and ends at a multiple
    of GRID, where all processors meet again.
    """
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
