"""Hermite against numpy.polynomial.hermite_e and the closed forms of arXiv 2502.01247, section 3."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Chebyshev, HermiteE
from numpy.polynomial.hermite_e import hermeval

from hf_ortho.activations.hermite import Hermite, chebyshev_to_hermite

FACTORIALS = np.array([math.factorial(k) for k in range(33)], dtype=float)


@pytest.mark.parametrize("degree", [1, 2, 3, 8, 9, 16, 32])
def test_values_and_derivative(degree, domain, randomized, assert_follows):
    module = randomized(f"hermite_{degree}", domain)
    c = module.coefficients.detach().numpy()
    assert_follows(
        module,
        lambda x: hermeval(x, c / FACTORIALS[: degree + 1]),
        lambda x: hermeval(x, c[1:] / FACTORIALS[:degree]),
    )


@pytest.mark.parametrize("degree", [1, 2, 3, 8, 32])
def test_paper_coefficients(degree):
    c0, *rest = Hermite(degree).coefficients.tolist()
    assert c0 == pytest.approx(math.sqrt(1 - 1 / math.factorial(degree)) / math.sqrt(math.e), rel=1e-6)
    assert rest == pytest.approx([1 / math.sqrt(math.e)] * degree, rel=1e-6)


@pytest.mark.parametrize(("degree", "moment"), [(2, 0.736), (3, 0.920), (5, 0.996)])
def test_paper_moments_of_value_and_derivative_are_equal(degree, moment):
    value, slope = Hermite(degree).gain(1.0)
    assert value == pytest.approx(moment, abs=5e-4)
    assert slope == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("degree", [1, 5, 9, 32])
def test_moments_by_orthogonality(degree, randomized):
    module = randomized(f"hermite_{degree}")
    squares = module.coefficients.detach().numpy() ** 2
    value, slope = module.gain(1.0)
    assert value == pytest.approx((squares / FACTORIALS[: degree + 1]).sum(), rel=1e-9)
    assert slope == pytest.approx((squares[1:] / FACTORIALS[:degree]).sum(), rel=1e-9)


@pytest.mark.parametrize(("lo", "hi"), [(-1.0, 1.0), (-2.8, 2.8), (-1.8, 1.3), (0.5, 4.0)])
@pytest.mark.parametrize("degree", [0, 1, 5, 12])
def test_change_of_basis_from_chebyshev(degree, lo, hi):
    c = np.random.default_rng(0).normal(size=degree + 1)
    expected = Chebyshev(c, domain=[lo, hi]).convert(kind=HermiteE, domain=[-1, 1], window=[-1, 1]).coef
    expected = expected * FACTORIALS[: degree + 1]
    ours = chebyshev_to_hermite(c, lo, hi)
    np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())


def test_change_of_basis_at_degree_32_is_exact():
    # T_32(x/4) at x = 0, 4, -4 is 1, and its sum over He_k/k! is an integer identity only without rounding errors:
    # in float64 the terms reach 1e12 times the sum.
    from fractions import Fraction

    c = chebyshev_to_hermite(np.eye(33)[32], -4.0, 4.0)
    for x in (0, 4, -4):
        before, now = Fraction(1), Fraction(x)
        total = Fraction(c[0]) + Fraction(c[1]) * now
        for k in range(2, 33):  # He_k/k!
            before, now = now, (x * now - before) / k
            total += Fraction(c[k]) * now
        assert float(total) == pytest.approx(1.0, abs=1e-3)


def test_float32_at_degree_32_on_a_wide_input():
    x = torch.linspace(-6.0, 6.0, 301)
    expected = hermeval(x.double().numpy(), Hermite(32).coefficients.detach().double().numpy() / FACTORIALS)
    np.testing.assert_allclose(Hermite(32)(x).detach().numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
