"""Tropical activations: max-plus polynomials and their differences."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor, nn

from ...fitting.density import gaussian_moments
from ...fitting.least_squares import Target, balance
from ...fitting.piecewise_linear import fit_knots, interpolate, lines_through
from ..base import LearnableActivation
from . import compiled
from .cpu import TropicalRationalSeries, TropicalSeries, line_scale, upper_envelope
from .fit import ROUNDS, fit_hinges


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


def _breaks(module: LearnableActivation, *maxima: tuple[Tensor, Tensor]) -> tuple[float, ...]:
    """The ends of the domain, and within it the points where a maximum changes from one line to the next."""
    lo, hi = module.domain.tolist()
    starts = [start for lines in maxima for _, start in upper_envelope(*(v.tolist() for v in lines))]
    ends = [v for v in (lo, hi) if math.isfinite(v)]
    return tuple(sorted([*ends, *(b for b in starts if lo < b < hi)]))


def _quantile_intercepts(slopes: np.ndarray) -> np.ndarray:
    """Intercepts for which neighboring lines meet at the normal quantiles (k + 1/2)/n; every line is used."""
    n = len(slopes) - 1
    meet = ndtri((np.arange(n) + 0.5) / n)
    return np.concatenate([[0.0], np.cumsum(-np.diff(slopes) * meet)])


def _normal_moments(value) -> tuple[float, float]:
    """E[F(x)] and E[F(x)^2] for x ~ N(0, 1), F piecewise linear, on a fine grid instead of a split at every break."""
    breaks = tuple(np.linspace(-8.0, 8.0, 2001))
    second, _ = gaussian_moments(value, value, 1.0, breaks)
    shifted, _ = gaussian_moments(lambda x: value(x) + 1.0, value, 1.0, breaks)
    return (shifted - second - 1.0) / 2, second


class Tropical(LearnableActivation):
    r"""Tropical (max-plus) polynomial of degree n (arXiv 2502.01247, section 3), a convex function:

        S(x) = (sqrt(2)/n) max_{k=0..n} (k x + a_k)

    Parameters: ``coefficients`` a, shape (n+1,), float32. Paper initialization: a_k = 1. The lines 0 < k < n then only
    touch the maximum, at x = 0, and get no gradient elsewhere. With ``init="unit"`` each line is the maximum on an
    interval.

    Example:
        >>> activation = hf_ortho.activations.Tropical(2)  # max(0, x, 2x) / sqrt(2) + 1 / sqrt(2)
        >>> [round(v, 4) for v in activation(torch.tensor([-1.0, 1.0])).tolist()]
        [0.7071, 2.1213]
    """

    family = "tropical"
    equation = "S(x) = (sqrt(2)/n) max_{k=0..n} (k x + a_k)"
    default_degree = 6
    default_derivative_weight = 0.0  # steps cannot follow a slope: it only moves the knots
    cpu_series = cpu_rows = TropicalSeries
    compiled = compiled.Tropical
    triton = "hf_ortho.activations.tropical.triton:TROPICAL"
    coefficients: nn.Parameter

    @classmethod
    def initial_parameters(cls, degree, init):
        if init == "paper":
            return {"coefficients": [1.0] * (degree + 1)}
        slopes = line_scale(degree) * np.arange(degree + 1)
        b = _quantile_intercepts(slopes)
        mean, second = _normal_moments(lambda x: np.max(np.outer(x, slopes) + b, axis=1))
        b = b - mean + math.sqrt(mean**2 - second + 1.0)  # E[(F + s)^2] = 1
        return {"coefficients": (b / line_scale(degree)).tolist()}

    @staticmethod
    def _lines(coefficients: Tensor) -> tuple[Tensor, Tensor]:
        scale = line_scale(len(coefficients) - 1)
        slopes = scale * torch.arange(len(coefficients), dtype=coefficients.dtype, device=coefficients.device)
        return slopes, scale * coefficients

    @classmethod
    def series(cls, x, coefficients):
        return max_of_lines(x, *cls._lines(coefficients))

    @classmethod
    def series_derivative(cls, x, coefficients):
        return slope_of_max(x, *cls._lines(coefficients))

    def breaks(self):
        return _breaks(self, self._lines(self.coefficients.cpu().double()))

    def fit_parameters(self, target, near=None):
        """In the equivalent form S(x) = offset + (sqrt(2)/n) sum_{k=1..n} max(x - b_k, 0)."""
        source, (hinges, balanced) = target.source, fit_hinges(target, self.degree, near)
        grid = np.linspace(-8.0, 8.0, 1601)
        slopes = source.derivative(grid)
        fall = float(np.max(np.maximum.accumulate(slopes) - slopes))
        note = ""
        if fall > 0.01:
            note = (
                f"tropical polynomials are convex, but {source.name} is not (its slope falls by {fall:.2g}): "
                "a higher degree cannot remove the error; tropical_rational has no such limit"
            )
        # Line k meets line k - 1 at b_k: a_k = a_{k-1} - b_k.
        lines = hinges.offset / line_scale(self.degree) - np.concatenate([[0.0], np.cumsum(hinges.breaks)])
        return {"coefficients": lines, "domain": hinges.domain}, note, balanced


class TropicalRational(LearnableActivation):
    r"""Tropical rational function of degree n: a difference of two maxima of n + 1 lines each,

        S(x) = max_k (p_k x + a_k) - max_k (q_k x + b_k),

    (arXiv 2502.01247, section 3, with learnable slopes). It can represent every continuous piecewise-linear function
    with at most n convex and n concave kinks.

    Parameters, float32, shape (n+1,) each: ``numerator_slopes`` p, ``numerator_intercepts`` a,
    ``denominator_slopes`` q, ``denominator_intercepts`` b. Paper initialization: the numerator is the initial tropical
    polynomial, the denominator is 0.

    Example:
        >>> activation = hf_ortho.activations.TropicalRational(2)
        >>> report = activation.fit("relu6")  # one convex and one concave kink
        >>> report.sup_error < 1e-5
        True
    """

    family = "tropical_rational"
    equation = "S(x) = max_k (p_k x + a_k) - max_k (q_k x + b_k)"
    default_degree = 6
    default_derivative_weight = 0.0  # steps cannot follow a slope: it only moves the knots
    cpu_series = cpu_rows = TropicalRationalSeries
    compiled = compiled.TropicalRational
    triton = "hf_ortho.activations.tropical.triton:RATIONAL"
    numerator_slopes: nn.Parameter
    numerator_intercepts: nn.Parameter
    denominator_slopes: nn.Parameter
    denominator_intercepts: nn.Parameter

    @classmethod
    def initial_parameters(cls, degree, init):
        p = line_scale(degree) * np.arange(degree + 1)
        a, q, b = np.full(degree + 1, line_scale(degree)), 0 * p, 0 * p
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

    @staticmethod
    def series(x, numerator_slopes, numerator_intercepts, denominator_slopes, denominator_intercepts):
        numerator = max_of_lines(x, numerator_slopes, numerator_intercepts)
        return numerator - max_of_lines(x, denominator_slopes, denominator_intercepts)

    @staticmethod
    def series_derivative(x, numerator_slopes, numerator_intercepts, denominator_slopes, denominator_intercepts):
        numerator = slope_of_max(x, numerator_slopes, numerator_intercepts)
        return numerator - slope_of_max(x, denominator_slopes, denominator_intercepts)

    def breaks(self):
        numerator = self.numerator_slopes, self.numerator_intercepts
        return _breaks(self, numerator, (self.denominator_slopes, self.denominator_intercepts))

    def fit_parameters(self, target, near=None):
        """Free-knot least squares: exact for piecewise-linear sources, otherwise variable projection over the knots.

        The tails are exact lines, so ``domain`` stays infinite unless one is requested.
        """

        def solve(target: Target, start):
            knots, values = fit_knots(target, self.degree, None if start is None else start[0], search=near is None)
            return (knots, values), interpolate(target.nodes.x, knots, values, target.source.slopes) - target.g

        balanced = balance(solve, target, ROUNDS, near)
        knots, values = balanced.solution
        domain = np.array([-math.inf, math.inf] if target.domain is None else target.domain)
        return lines_through(knots, values, target.source.slopes, self.degree) | {"domain": domain}, "", balanced
