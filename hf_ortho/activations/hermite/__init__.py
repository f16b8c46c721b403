"""Hermite activations: probabilists' Hermite polynomials He_k over k!."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import torch
from numpy.polynomial import chebyshev, hermite_e
from torch import Tensor, nn

from ...fitting.least_squares import NEGLIGIBLE, Balanced, Target, balance, first_of_least, to_grid, width_bounds
from ..polynomial import PolynomialActivation, fractions_of
from . import compiled
from .cpu import HORNER_MAX_DEGREE, MONOMIALS, make_hermite_series

SCALES = 0.75, 0.9, 1.0, 1.1, 1.3, 1.6, 2.0  # of [lo, hi], in units of sqrt(n)
ROUNDING = 2.0**-25, 2e-6  # of float32: relative, and the error that is not worth a lower degree


def hermite_sum(x: Tensor, coefficients: Tensor) -> Tensor:
    """sum_k c_k He_k(x)/k!: Horner in monomials up to degree 8, above Clenshaw with
    (k+1) h_{k+1} = x h_k - h_{k-1} for h_k = He_k/k! (DLMF 18.9.1)."""
    degree = coefficients.shape[0] - 1
    if degree <= HORNER_MAX_DEGREE:
        table = torch.tensor(MONOMIALS[degree], dtype=x.dtype, device=x.device)
        *rest, y = (table * coefficients).sum(1)  # not a matmul, which autocast would run in low precision
        y = y.expand_as(x)
        for m in reversed(rest):
            y = torch.addcmul(m, y, x)
        return y
    after = torch.zeros_like(x)
    y = after + coefficients[degree]
    for k in range(degree - 1, -1, -1):
        y, after = torch.addcmul(coefficients[k] - after / (k + 2), y, x, value=1 / (k + 1)), y
    return y


class Hermite(PolynomialActivation):
    r"""Hermite activation of degree n (arXiv 2502.01247, section 3; DLMF 18.3 for He_k):

        S(x) = sum_{k=0..n} c_k He_k(x) / k!,    S'(x) = sum_{k=1..n} c_k He_{k-1}(x) / (k-1)!

    Parameters: ``coefficients`` c, shape (n+1,), float32. Paper initialisation: c_0 = sqrt((1 - 1/n!) / e),
    c_k = 1/sqrt(e).
    """

    family = "hermite"
    equation = "S(x) = sum_{k=0..n} c_k He_k(x) / k!,    S'(x) = sum_{k=1..n} c_k He_{k-1}(x) / (k-1)!"
    default_degree = 8
    cpu_series = staticmethod(make_hermite_series)
    compiled = compiled.Hermite
    triton = "hf_ortho.activations.hermite.triton:KERNELS"
    coefficients: nn.Parameter

    @classmethod
    def initial_parameters(cls, degree, init):
        c = np.full(degree + 1, math.exp(-0.5))
        c[0] *= math.sqrt(1 - 1 / math.factorial(degree))
        if init == "unit":  # E[S^2] = sum_k c_k^2 / k!
            c /= math.sqrt(sum(v**2 / math.factorial(k) for k, v in enumerate(c)))
        return {"coefficients": c.tolist()}

    @staticmethod
    def series(x, coefficients):
        return hermite_sum(x, coefficients)

    @staticmethod
    def series_derivative(x, coefficients):
        return hermite_sum(x, coefficients[1:])

    def natural_units(self):
        """sqrt(k!) for c_k, since E[(He_k(x)/k!)^2] = 1/k! for x ~ N(0, 1)."""
        return {"coefficients": [math.sqrt(math.factorial(k)) for k in range(self.degree + 1)]}

    def exact_monomials(self):
        factorials = [math.factorial(k) for k in range(self.degree + 1)]
        return hermite_e.herme2poly(fractions_of(self.coefficients.tolist()) / np.array(factorials, dtype=object))

    def fit_parameters(self, target: Target):
        """Closed form for the coefficients given [lo, hi]; Nelder-Mead over the two ends.

        Where float32 arithmetic at the full degree would do more harm than good (high degrees around a kink), the
        highest ones stay 0.
        """
        for n in range(self.degree, 0, -1):
            if target.domain is None:
                lo, hi, weighted = _search_interval(target, n)
            else:
                lo, hi, weighted = *target.domain, target
            lo, hi = float(np.float32(lo)), float(np.float32(hi))
            weighted = _balance(weighted, n, lo, hi, rounds=10 if target.domain is None else 30).target
            design, slopes = _designs(target, n, lo, hi)
            series, residual, _ = weighted.least_squares(design, slopes, lo, hi)
            c = chebyshev_to_hermite(series, lo, hi)
            # What float32 loses, up to a factor of 4: each term c_k He_k/k! is off by 2^-25 of itself. An estimate
            # finds the same degree on every processor, as the float32 arithmetic itself would not.
            terms = hermite_e.hermevander(np.clip(target.nodes.x, lo, hi), n) * (c / _factorials(n))
            if target.nodes.w @ np.sum((ROUNDING[0] * terms) ** 2, 1) <= 0.1 * residual @ residual + ROUNDING[1] ** 2:
                break
        note = f"float32 carries degree {n} of {self.degree} here: higher coefficients are 0" if n < self.degree else ""
        return {"coefficients": np.pad(c, (0, self.degree - n)), "domain": np.array([lo, hi])}, note


def _factorials(n: int) -> np.ndarray:
    return np.array([float(math.factorial(k)) for k in range(n + 1)])


def _designs(target: Target, n: int, lo: float, hi: float):
    """T_k at the nodes, shifted to [lo, hi], and their derivatives where these count."""
    design = chebyshev.chebvander((2 * np.clip(target.nodes.x, lo, hi) - (lo + hi)) / (hi - lo), n)
    return design, design @ _differentiation(n) * (2 / (hi - lo)) if target.derivative_weight else design


def _balance(target: Target, n: int, lo: float, hi: float, rounds: int) -> Balanced:
    """``balance`` with the interval fixed."""
    design, slopes = _designs(target, n, lo, hi)
    tails = target.tails(lo, hi)

    def solve(weighted: Target, start):
        c = weighted.normal_equations(design, slopes, lo, hi)
        return c, design @ c + tails - target.g

    return balance(solve, target, rounds)


def _search_interval(target: Target, n: int) -> tuple[float, float, Target]:
    """[lo, hi] as multiples of GRID, and ``target`` with the weights found on the way."""
    from scipy.optimize import minimize

    bounds = np.log(width_bounds(n))
    reach = math.sqrt(max(n, 2))
    scale = first_of_least(SCALES, lambda r: _balance(target, n, -r * reach, r * reach, rounds=2).score)
    found = []
    # Odd degrees gain from a skewed interval: GELU and its kin are x/2 plus an even function.
    skews = ((1.0, 1.0), (1.3, 0.8), (0.8, 1.3)) if n % 2 else ((1.0, 1.0),)
    for a, b in skews:
        tried: list[tuple[float, float, Balanced]] = []

        def cost(widths, tried=tried):
            lo, hi = -math.exp(widths[0]), math.exp(widths[1])
            weights = tried[-1][2].after if tried else target
            tried.append((lo, hi, _balance(weights, n, lo, hi, rounds=3)))
            return math.log(tried[-1][2].score + NEGLIGIBLE**2)

        z = np.clip(np.log([a * scale * reach, b * scale * reach]), bounds[:, 0], bounds[:, 1] - 0.1)
        for size in (0.1, 0.03):  # a second simplex, since the first may shrink in a valley of the largest error
            simplex = z + np.array([[0, 0], [size, 0], [0, size]])
            options = {
                "xatol": 1e-3,
                "fatol": 1e-3,
                "maxfev": 30 if len(skews) == 1 else 15,
                "initial_simplex": simplex,
            }
            z = minimize(cost, z, method="Nelder-Mead", bounds=bounds, options=options).x
        found.append(first_of_least(tried, lambda t: t[2].score))
    if len(target.source.kinks) > 1:  # where the tails may begin, as those of hardswish do
        lo, hi = target.source.kinks[0], target.source.kinks[-1]
        if np.all((np.exp(bounds[:, 0]) <= (-lo, hi)) & ((-lo, hi) <= np.exp(bounds[:, 1]))):
            found.append((lo, hi, _balance(target, n, lo, hi, rounds=3)))
    lo, hi, best = first_of_least(found, lambda t: t[2].mean_square)
    lo, hi = to_grid(np.array([lo, hi]))
    return lo, hi, best.after


@functools.cache
def _differentiation(n: int) -> np.ndarray:
    """The matrix that takes Chebyshev coefficients to those of the derivative."""
    return np.stack([np.pad(chebyshev.chebder(row), (0, n + 1))[: n + 1] for row in np.eye(n + 1)], 1)


def chebyshev_to_hermite(c: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """Coefficients of sum_k c_k T_k((2x - lo - hi)/(hi - lo)) in He_k/k!, by exact rationals.

    T_{k+1}(t) = 2 t T_k(t) - T_{k-1}(t) (DLMF 18.9.1) with x He_j = He_{j+1} + j He_{j-1}; in floating point the
    change of basis has condition number 1e12 at degree 32.
    """
    half, middle = (Fraction(hi) - Fraction(lo)) / 2, (Fraction(hi) + Fraction(lo)) / 2

    def times_t(p: list[Fraction]) -> list[Fraction]:
        out = [Fraction(0)] * (len(p) + 1)
        for j, v in enumerate(p):
            out[j + 1] += v / half
            out[j] -= v * middle / half
            if j:
                out[j - 1] += v * j / half
        return out

    before, now = [Fraction(1)], times_t([Fraction(1)])
    total = [Fraction(0)] * (len(c) + 1)
    for v in c:
        for j, w in enumerate(before):
            total[j] += Fraction(float(v)) * w
        longer = times_t(now)
        after = [2 * w - (before[j] if j < len(before) else 0) for j, w in enumerate(longer)]
        before, now = now, after
    return np.array([float(v * math.factorial(k)) for k, v in enumerate(total[: len(c)])])
