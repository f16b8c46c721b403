"""Tropical activations: max-plus polynomials and their differences."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import ndtri
from torch import Tensor, nn

from .base import LearnableActivation
from .interpolation import Target, balance, gaussian_moments, variable_projection
from .piecewise_linear import fit_knots, interpolate, lines_through

ROUNDS = 12


def max_of_lines(x: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    """max_k (slopes_k x + intercepts_k); NaN propagates."""
    y = torch.addcmul(intercepts[0], slopes[0], x)
    for k in range(1, slopes.shape[0]):
        y = torch.maximum(y, torch.addcmul(intercepts[k], slopes[k], x))
    return y


def slope_of_max(x: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    """The slope of the first line that attains the maximum."""
    best, slope = torch.addcmul(intercepts[0], slopes[0], x), slopes[0].expand_as(x)
    for k in range(1, slopes.shape[0]):
        line = torch.addcmul(intercepts[k], slopes[k], x)
        slope = torch.where(line > best, slopes[k], slope)
        best = torch.maximum(best, line)
    return slope


def envelope_breaks(slopes: np.ndarray, intercepts: np.ndarray) -> list[float]:
    """Where the upper envelope of the lines changes from one line to the next, ascending."""
    hull: list[tuple[float, float]] = []
    breaks: list[float] = []
    for p, a in sorted(zip(slopes.tolist(), intercepts.tolist(), strict=True)):
        if hull and hull[-1][0] == p:
            hull.pop()  # parallel and not above
            if breaks:
                breaks.pop()
        while hull and breaks and (hull[-1][1] - a) / (p - hull[-1][0]) <= breaks[-1]:
            hull.pop()
            breaks.pop()
        if hull:
            breaks.append((hull[-1][1] - a) / (p - hull[-1][0]))
        hull.append((p, a))
    return breaks


def _quantile_intercepts(slopes: np.ndarray) -> np.ndarray:
    """Intercepts that make neighbouring lines meet at the normal quantiles (k + 1/2)/n, so that every line is used."""
    n = len(slopes) - 1
    meet = ndtri((np.arange(n) + 0.5) / n)
    return np.concatenate([[0.0], np.cumsum(-np.diff(slopes) * meet)])


def _normal_moments(value) -> tuple[float, float]:
    """E[F(x)] and E[F(x)^2] for x ~ N(0, 1), F piecewise linear: a fine grid stands in for the split at every break."""
    breaks = tuple(np.linspace(-8.0, 8.0, 2001))
    second, _ = gaussian_moments(value, value, 1.0, breaks)
    shifted, _ = gaussian_moments(lambda x: value(x) + 1.0, value, 1.0, breaks)
    return (shifted - second - 1.0) / 2, second


class Tropical(LearnableActivation):
    r"""Tropical (max-plus) polynomial of degree n (arXiv 2502.01247, section 3), a convex function:

        S(x) = (sqrt(2)/n) max_{k=0..n} (k x + a_k)

    Parameters: ``coefficients`` a, shape (n+1,), float32. Paper initialisation: a_k = 1, with which all lines
    0 < k < n only touch the maximum at x = 0 and get no gradient elsewhere; ``init="unit"`` gives each line an
    interval of its own.
    """

    family = "tropical"
    default_degree = 6
    coefficients: nn.Parameter

    @classmethod
    def initial_parameters(cls, degree, init):
        if init == "paper":
            return {"coefficients": [1.0] * (degree + 1)}
        slopes = math.sqrt(2) / degree * np.arange(degree + 1)
        b = _quantile_intercepts(slopes)
        mean, second = _normal_moments(lambda x: np.max(np.outer(x, slopes) + b, axis=1))
        b = b - mean + math.sqrt(mean**2 - second + 1.0)  # E[(F + s)^2] = 1
        return {"coefficients": (b * degree / math.sqrt(2)).tolist()}

    def _lines(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = math.sqrt(2) / self.degree
        slopes = scale * torch.arange(self.degree + 1, dtype=x.dtype, device=x.device)
        return slopes, scale * self.coefficients.to(x.dtype)

    def series(self, x):
        return max_of_lines(x, *self._lines(x))

    def series_derivative(self, x):
        return slope_of_max(x, *self._lines(x))

    def breaks(self):
        slopes, intercepts = (v.detach().cpu().numpy() for v in self._lines(self.coefficients.double()))
        lo, hi = self.domain.tolist()
        inner = [b for b in envelope_breaks(slopes, intercepts) if lo < b < hi]
        return tuple(sorted([*super().breaks(), *inner]))

    def fit_parameters(self, target: Target):
        """Gauss-Newton on the breaks b_k, the offset and [lo, hi], in the equivalent form

        S(x) = offset + (sqrt(2)/n) sum_{k=1..n} max(x - b_k, 0), in which every line keeps its gradient.
        """
        theta = balance(self._solve, target, rounds=ROUNDS).solution
        n, source = self.degree, target.source
        step = math.sqrt(2) / n
        breaks = np.sort(theta[1 : n + 1])
        domain = np.array(theta[n + 1 :] if target.domain is None else target.domain)
        grid = np.linspace(-8.0, 8.0, 1601)
        slopes = source.derivative(grid)
        fall = float(np.max(np.maximum.accumulate(slopes) - slopes))
        note = ""
        if fall > 0.01:
            note = (
                f"tropical polynomials are convex, {source.name} is not (its slope falls by {fall:.2g}): "
                "the error does not vanish with the degree; tropical_rational has no such limit"
            )
        return {"coefficients": theta[0] / step - np.concatenate([[0.0], np.cumsum(breaks)]), "domain": domain}, note

    def _solve(self, target: Target, start: np.ndarray | None):
        n, source, x = self.degree, target.source, target.nodes.x
        step, (s_lo, s_hi) = math.sqrt(2) / n, source.slopes
        root = np.sqrt(target.nodes.w)
        root_slope = root * math.sqrt(target.derivative_weight)

        def problem(theta):
            offset, breaks = theta[0], theta[1 : n + 1]
            lo, hi = theta[n + 1 :] if target.domain is None else target.domain
            t = np.clip(x, lo, hi)
            beyond = t[:, None] > breaks
            value = offset + step * np.maximum(t[:, None] - breaks, 0).sum(1)
            slope = step * beyond.sum(1)
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
        lower, upper = np.full(len(starts[0]), -40.0), np.full(len(starts[0]), 40.0)
        lower[0], upper[0] = -np.inf, np.inf
        if target.domain is None:
            upper[-2], lower[-1] = -0.6, 0.6
        theta = variable_projection(problem, starts, (lower, upper))
        if target.derivative_weight:  # the slope jumps at each break, which Gauss-Newton does not see

            def cost(theta):
                residual = problem(np.clip(theta, lower, upper))[0]
                return residual @ residual

            theta = np.clip(minimize(cost, theta, method="Powell", options={"maxfev": 2000}).x, lower, upper)
        return theta, problem(theta)[0][: len(x)] / np.where(root > 0, root, 1.0)


class TropicalRational(LearnableActivation):
    r"""Tropical rational function of degree n: a difference of two maxima of n + 1 lines each,

        S(x) = max_k (p_k x + a_k) - max_k (q_k x + b_k),

    which is any continuous piecewise-linear function with at most n convex and n concave kinks (arXiv 2502.01247,
    section 3, with learnable slopes).

    Parameters, float32, shape (n+1,) each: ``numerator_slopes`` p, ``numerator_intercepts`` a,
    ``denominator_slopes`` q, ``denominator_intercepts`` b. Paper initialisation: the numerator is the tropical
    polynomial at its own initialisation, the denominator 0.
    """

    family = "tropical_rational"
    default_degree = 6
    numerator_slopes: nn.Parameter
    numerator_intercepts: nn.Parameter
    denominator_slopes: nn.Parameter
    denominator_intercepts: nn.Parameter

    @classmethod
    def initial_parameters(cls, degree, init):
        p = math.sqrt(2) / degree * np.arange(degree + 1)
        a, q, b = np.full(degree + 1, math.sqrt(2) / degree), 0 * p, 0 * p
        if init == "unit":
            q = (p - p.mean()) / 2
            a, b = _quantile_intercepts(p), _quantile_intercepts(q)
            _, second = _normal_moments(lambda x: np.max(np.outer(x, p) + a, 1) - np.max(np.outer(x, q) + b, 1))
            p, a, q, b = (v / math.sqrt(second) for v in (p, a, q, b))
        return {
            "numerator_slopes": p.tolist(),
            "numerator_intercepts": a.tolist(),
            "denominator_slopes": q.tolist(),
            "denominator_intercepts": b.tolist(),
        }

    def _lines(self, dtype: torch.dtype):
        numerator = self.numerator_slopes.to(dtype), self.numerator_intercepts.to(dtype)
        return numerator, (self.denominator_slopes.to(dtype), self.denominator_intercepts.to(dtype))

    def series(self, x):
        numerator, denominator = self._lines(x.dtype)
        return max_of_lines(x, *numerator) - max_of_lines(x, *denominator)

    def series_derivative(self, x):
        numerator, denominator = self._lines(x.dtype)
        return slope_of_max(x, *numerator) - slope_of_max(x, *denominator)

    def breaks(self):
        lo, hi = self.domain.tolist()
        points = [
            b
            for lines in self._lines(torch.float64)
            for b in envelope_breaks(*(v.detach().cpu().numpy() for v in lines))
            if lo < b < hi
        ]
        return tuple(sorted([*super().breaks(), *points]))

    def fit_parameters(self, target: Target):
        """Free-knot least squares: exact for piecewise-linear sources, else variable projection over the knots.

        The tails are exact lines, so ``domain`` stays infinite unless one is asked for.
        """
        first = balance(self._solve, target, rounds=ROUNDS)
        again = balance(self._solve, first.after, rounds=ROUNDS)  # knots anew: the best ones for other weights are far
        knots, values = min(first, again, key=lambda found: found.score).solution
        domain = np.array([-math.inf, math.inf] if target.domain is None else target.domain)
        return lines_through(knots, values, target.source.slopes, self.degree) | {"domain": domain}, ""

    def _solve(self, target: Target, start: tuple[np.ndarray, np.ndarray] | None):
        knots, values = fit_knots(target, self.degree, None if start is None else start[0])
        return (knots, values), interpolate(target.nodes.x, knots, values, target.source.slopes) - target.g
