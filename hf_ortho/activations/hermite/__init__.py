"""Hermite activations: probabilists' Hermite polynomials He_k over k!."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from numpy.polynomial import hermite_e
from torch import Tensor, nn

from ...fitting.polynomial import fit_polynomial
from ..polynomial import PolynomialActivation, fractions_of
from . import compiled
from .cpu import HORNER_MAX_DEGREE, make_hermite_series, to_monomials

ROUNDING = 2.0**-25, 2e-6  # of float32: the relative error, and an absolute error that is always acceptable


def hermite_sum(x: Tensor, coefficients: Tensor) -> Tensor:
    """sum_k c_k He_k(x)/k!: Horner in monomials up to degree 8, Clenshaw above.

    Clenshaw uses (k+1) h_{k+1} = x h_k - h_{k-1} for h_k = He_k/k! (DLMF 18.9.1).
    """
    degree = coefficients.shape[0] - 1
    if degree <= HORNER_MAX_DEGREE:
        *rest, y = to_monomials(coefficients)
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

    Parameters: ``coefficients`` c, shape (n+1,), float32. Paper initialization: c_0 = sqrt((1 - 1/n!) / e),
    c_k = 1/sqrt(e).

    Example:
        >>> activation = hf_ortho.activations.Hermite(3)
        >>> _ = activation.coefficients.data.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))  # S(x) = He_1(x) = x
        >>> activation(torch.tensor([-1.0, 0.5])).tolist()
        [-1.0, 0.5]
    """

    family = "hermite"
    equation = "S(x) = sum_{k=0..n} c_k He_k(x) / k!,    S'(x) = sum_{k=1..n} c_k He_{k-1}(x) / (k-1)!"
    default_degree = 8
    cpu_series = cpu_rows = staticmethod(make_hermite_series)
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
        self.check_present()
        factorials = [math.factorial(k) for k in range(self.degree + 1)]
        return hermite_e.herme2poly(fractions_of(self.coefficients.tolist()) / np.array(factorials, dtype=object))

    def fit_parameters(self, target, near=None):
        """Closed form for the coefficients given [lo, hi]; Nelder-Mead over the two ends.

        If float32 rounding at the full degree costs more than the degree gains (high degrees around a kink), the
        highest coefficients stay 0.
        """
        for n in range(self.degree, 0, -1):
            fit = fit_polynomial(target, n, near)
            c = chebyshev_to_hermite(fit.series, fit.lo, fit.hi)
            # Estimate of the float32 error, up to a factor of 4: each term c_k He_k/k! has a relative error of 2^-25.
            # Unlike a measurement in float32, the estimate gives the same degree on every processor.
            terms = hermite_e.hermevander(np.clip(target.nodes.x, fit.lo, fit.hi), n) * (c / _factorials(n))
            if target.nodes.w @ np.sum((ROUNDING[0] * terms) ** 2, 1) <= 0.1 * fit.square + ROUNDING[1] ** 2:
                break
        note = (
            f"float32 supports only degree {n} of {self.degree} here: higher coefficients are 0"
            if n < self.degree
            else ""
        )
        return {"coefficients": np.pad(c, (0, self.degree - n)), "domain": np.array([fit.lo, fit.hi])}, note, fit.start


def _factorials(n: int) -> np.ndarray:
    return np.array([float(math.factorial(k)) for k in range(n + 1)])


def chebyshev_to_hermite(c: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """Coefficients of sum_k c_k T_k((2x - lo - hi)/(hi - lo)) in He_k/k!, in exact rational arithmetic.

    Uses T_{k+1}(t) = 2 t T_k(t) - T_{k-1}(t) (DLMF 18.9.1) and x He_j = He_{j+1} + j He_{j-1}. Floating point is not
    enough: the change of basis has condition number 1e12 at degree 32.
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
