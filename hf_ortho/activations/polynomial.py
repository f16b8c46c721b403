"""Families whose series is a polynomial, and the polynomial in three bases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.polynomial import Chebyshev, HermiteE, Polynomial, chebyshev, hermite_e

from ..errors import PolynomialError
from .base import LearnableActivation


@dataclasses.dataclass(frozen=True)
class PolynomialForm:
    """One polynomial as three numpy.polynomial objects; each takes x in the units of the pre-activation.

    Every coefficient is computed exactly and rounded once to float64. High degrees cancel in monomials and in He_k;
    ``chebyshev`` loses the fewest digits on its domain.

    Attributes:
        monomial: sum_j a_j x^j. Window and domain are equal, so x is not rescaled.
        hermite_e: sum_k b_k He_k(x), probabilists' Hermite polynomials (DLMF 18.3). Window and domain are equal.
        chebyshev: sum_k g_k T_k((2x - lo - hi)/(hi - lo)).

    Example:
        >>> square = hf_ortho.activations.Hermite(2)
        >>> _ = square.coefficients.data.copy_(torch.tensor([1.0, 0.0, 2.0]))  # He_0 + 2 He_2/2! = x^2
        >>> form = square.to_polynomial(domain=(-1.0, 1.0))
        >>> form.monomial.coef.tolist(), form.chebyshev.coef.tolist()
        ([0.0, 0.0, 1.0], [0.5, 0.0, 0.5])
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
        """The degree of the highest non-zero coefficient; 0 for a constant."""
        return self.hermite_e.degree()

    @property
    def multiplicative_depth(self) -> int:
        """ceil(log2(degree)), 0 for degrees 0 and 1: the longest chain of products of two values that depend on x.

        A balanced tree of powers attains it (Paterson and Stockmeyer, SIAM J. Comput. 2, 1973, save products at about
        the same depth). Products with constants are not counted; add them if your scheme spends levels on them.
        """
        return max(self.degree - 1, 0).bit_length()

    @classmethod
    def of(cls, exact: np.ndarray, domain: tuple[float, float]) -> PolynomialForm:
        """The forms of sum_j a_j x^j on a finite [lo, hi]; ``exact`` are the a_j of ``exact_monomials``."""
        lo, hi = (Fraction(float(v)) for v in domain)
        middle, half = (lo + hi) / 2, (hi - lo) / 2
        in_chebyshev = in_hermite = exact[-1:]
        for a in exact[-2::-1]:  # Horner's scheme with x = He_1 = middle + half * T_1
            shifted = chebyshev.chebadd(middle * in_chebyshev, half * chebyshev.chebmulx(in_chebyshev))
            in_chebyshev = chebyshev.chebadd(shifted, [a])
            in_hermite = hermite_e.hermeadd(hermite_e.hermemulx(in_hermite), [a])
        interval = np.array([float(lo), float(hi)])
        return cls(
            Polynomial(exact.astype(float), domain=interval, window=interval),
            HermiteE(in_hermite.astype(float), domain=interval, window=interval),
            Chebyshev(in_chebyshev.astype(float), domain=interval),
        )


def fractions_of(coefficients: Sequence[float]) -> np.ndarray:
    """An object array of the numbers as Fractions.

    Raises:
        PolynomialError: one is NaN or infinite.
    """
    for k, c in enumerate(coefficients):
        if not math.isfinite(c):
            raise PolynomialError(
                f"coefficient {k} is {c}: a polynomial needs finite coefficients; retrain or refit it"
            )
    return np.array([Fraction(c) for c in coefficients], dtype=object)


class PolynomialActivation(LearnableActivation):
    """Base class of families whose series is a polynomial of degree n. A subclass also defines ``exact_monomials``."""

    def exact_monomials(self) -> np.ndarray:
        """a_0 ... a_d of S(x) = sum_j a_j x^j as Fractions in an object array, a_d not zero unless d = 0.

        Raises:
            PolynomialError: a coefficient is NaN or infinite.
        """
        raise NotImplementedError

    def to_polynomial(self, domain: tuple[float, float] | None = None) -> PolynomialForm:
        """S on [lo, hi] in monomials, He_k and Chebyshev polynomials, without the tails.

        Args:
            domain: [lo, hi], finite and inside the domain of the module, which is the default.

        Raises:
            PolynomialError: the interval is not finite (a module without tails needs ``domain``), it extends beyond
                the module's domain, where the activation is a straight line, a coefficient is not finite, or the module
                has groups of channels: each of its ``members()`` is a polynomial.
        """
        self.check_present()
        if self.groups > 1:
            raise PolynomialError(
                f"{self.name} is {self.groups} polynomials: call to_polynomial of each of its members()"
            )
        module_domain = self.domain.tolist()
        lo, hi = map(float, module_domain if domain is None else domain)
        if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
            raise PolynomialError(
                f"domain [{lo:g}, {hi:g}] of {self.name}: the polynomial needs a finite interval lo < hi; pass one "
                "with to_polynomial(domain=(lo, hi))"
            )
        if not module_domain[0] <= lo < hi <= module_domain[1]:
            raise PolynomialError(
                f"domain [{lo:g}, {hi:g}] of {self.name}: outside its domain [{module_domain[0]:g}, "
                f"{module_domain[1]:g}] the activation is a straight line; give an interval inside"
            )
        return PolynomialForm.of(self.exact_monomials(), (lo, hi))
