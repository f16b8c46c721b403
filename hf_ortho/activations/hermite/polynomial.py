"""The polynomial of a Hermite activation, in three bases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.polynomial import Chebyshev, HermiteE, Polynomial, chebyshev, hermite_e

from ...errors import PolynomialError


@dataclasses.dataclass(frozen=True)
class PolynomialForm:
    """One polynomial as three numpy.polynomial objects; each takes x in the units of the pre-activation.

    Every coefficient is the exact rational one, rounded once to float64. High degrees cancel in monomials and in He_k:
    ``chebyshev`` loses the fewest digits on its domain.

    Attributes:
        monomial: sum_j a_j x^j. Its window is its domain, so that x is taken as it is.
        hermite_e: sum_k b_k He_k(x), probabilists' Hermite polynomials (DLMF 18.3); b_k = c_k/k! for the
            ``coefficients`` c of the activation. Its window is its domain too.
        chebyshev: sum_k g_k T_k((2x - lo - hi)/(hi - lo)).
    """

    monomial: Polynomial
    hermite_e: HermiteE
    chebyshev: Chebyshev

    @property
    def domain(self) -> tuple[float, float]:
        """(lo, hi), the interval on which the polynomial is the activation."""
        lo, hi = self.chebyshev.domain
        return float(lo), float(hi)

    @property
    def degree(self) -> int:
        """The degree of the highest coefficient that is not zero; 0 for a constant."""
        return self.hermite_e.degree()

    @property
    def multiplicative_depth(self) -> int:
        """ceil(log2(degree)), 0 for degrees 0 and 1: the longest chain of products of two values that depend on x.

        A balanced tree of powers attains it (Paterson and Stockmeyer, SIAM J. Comput. 2, 1973, save products at about
        the same depth). Products with constants are not counted; where a scheme spends a level on them, add those.
        """
        return max(self.degree - 1, 0).bit_length()

    @classmethod
    def of(cls, coefficients: Sequence[float], domain: tuple[float, float]) -> PolynomialForm:
        """The forms of sum_k c_k He_k(x)/k! on [lo, hi], both finite."""
        lo, hi = (Fraction(float(v)) for v in domain)
        exact = exact_monomials(coefficients)
        middle, half = (lo + hi) / 2, (hi - lo) / 2
        in_chebyshev = exact[-1:]
        for a in exact[-2::-1]:  # Horner's scheme with x = middle + half * T_1
            shifted = chebyshev.chebadd(middle * in_chebyshev, half * chebyshev.chebmulx(in_chebyshev))
            in_chebyshev = chebyshev.chebadd(shifted, [a])
        interval = np.array([float(lo), float(hi)])
        return cls(
            Polynomial(exact.astype(float), domain=interval, window=interval),
            HermiteE(_over_factorials(coefficients)[: len(exact)].astype(float), domain=interval, window=interval),
            Chebyshev(in_chebyshev.astype(float), domain=interval),
        )


def exact_monomials(coefficients: Sequence[float]) -> np.ndarray:
    """a_0 ... a_d of sum_k c_k He_k(x)/k! = sum_j a_j x^j as Fractions in an object array, a_d not zero unless d = 0.

    Raises:
        PolynomialError: a coefficient is NaN or infinite.
    """
    for k, c in enumerate(coefficients):
        if not math.isfinite(c):
            raise PolynomialError(f"coefficient {k} is {c}: a polynomial needs finite coefficients, train or fit again")
    return hermite_e.herme2poly(_over_factorials(coefficients))


def _over_factorials(coefficients: Sequence[float]) -> np.ndarray:
    return np.array([Fraction(c) / math.factorial(k) for k, c in enumerate(coefficients)], dtype=object)
