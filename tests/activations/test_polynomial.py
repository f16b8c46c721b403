"""``Hermite.to_polynomial`` against numpy.polynomial.hermite_e, sympy's exact polynomials and the module itself."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Chebyshev, Polynomial
from numpy.polynomial.hermite_e import hermeval
from sympy import Poly, Rational, Symbol
from sympy.polys.orthopolys import hermite_prob_poly

from hf_ortho.activations import Hermite
from hf_ortho.errors import PolynomialError


def forms_of(polynomial):
    return polynomial.monomial, polynomial.hermite_e, polynomial.chebyshev


def with_coefficients(values):
    module = Hermite(len(values) - 1)
    with torch.no_grad():
        module.coefficients.copy_(torch.tensor(values))
    return module


@pytest.fixture(scope="module")
def fitted():
    """GELU at degree 32: terms that cancel, and an interval that is not symmetric."""
    module = Hermite(32)
    module.fit("gelu", domain=(-5.25, 5.5))
    return module


@torch.no_grad()
def evaluate(fn, x):
    return fn(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("degree", [1, 2, 3, 8, 9, 16, 32])
@pytest.mark.parametrize("interval", [(-1.8, 1.3), (-6.0, 6.0), (0.5, 4.0)])
def test_values_and_derivatives_in_units_of_x(degree, interval, randomized):
    module = randomized(f"hermite_{degree}")
    c = module.coefficients.detach().numpy() / [float(math.factorial(k)) for k in range(degree + 1)]
    polynomial = module.to_polynomial(interval)
    x = np.linspace(*interval, 101)
    expected, slope = hermeval(x, c), evaluate(module.derivative, x)
    np.testing.assert_allclose(evaluate(module, x), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    assert (polynomial.degree, polynomial.domain) == (degree, interval)
    for form in forms_of(polynomial):
        assert tuple(form.domain) == interval
        np.testing.assert_allclose(form.linspace(101)[0], x, rtol=0, atol=1e-14)
        np.testing.assert_allclose(form(x), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        np.testing.assert_allclose(form.deriv()(x), slope, rtol=0, atol=1e-12 * np.abs(slope).max())


def test_degree_32_is_exact_up_to_one_rounding(fitted):
    x = Symbol("x")
    terms = enumerate(fitted.coefficients.tolist())
    exact = sum((hermite_prob_poly(k, x, polys=True) * (Rational(c) / math.factorial(k)) for k, c in terms), Poly(0, x))
    polynomial = fitted.to_polynomial()
    np.testing.assert_allclose(polynomial.monomial.coef, np.array(exact.all_coeffs()[::-1], dtype=float), rtol=1e-15)
    assert polynomial.degree == 32
    interpolant = Chebyshev.interpolate(lambda at: [float(exact.eval(Rational(v))) for v in at], 32, polynomial.domain)
    np.testing.assert_allclose(polynomial.chebyshev.coef, interpolant.coef, rtol=0, atol=1e-14)


def test_fitted_module_on_its_domain_and_not_beyond(fitted):
    polynomial = fitted.to_polynomial()
    assert polynomial.domain == (-5.25, 5.5)
    double = Hermite(32).double()
    double.load_state_dict(fitted.state_dict())
    x = np.linspace(-5.25, 5.5, 301)
    module = evaluate(double, x)
    np.testing.assert_allclose(polynomial.chebyshev(x), module, rtol=0, atol=1e-13)
    np.testing.assert_allclose(polynomial.hermite_e(x), module, rtol=0, atol=1e-13)
    cancellation = Polynomial(np.abs(polynomial.monomial.coef))(np.abs(x))
    assert np.all(np.abs(polynomial.monomial(x) - module) <= 32 * np.finfo(float).eps * cancellation + 1e-13)
    # at 7 the activation has its tail of slope 1, the polynomial of degree 32 has left it
    assert abs(evaluate(double, np.array([7.0]))[0] - 7.0) < 1e-4
    assert abs(polynomial.chebyshev(7.0) - 7.0) > 0.1


@pytest.mark.parametrize(
    ("values", "degree", "depth"),
    [
        ([2.0, 0.0], 0, 0),
        ([0.0, 0.0, 0.0], 0, 0),
        ([1.0, 2.0, 0.0], 1, 0),
        ([1.0, 2.0, 3.0], 2, 1),
        ([1.0, 2.0, 3.0, 4.0], 3, 2),
        ([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0], 4, 2),
        ([1.0] * 6, 5, 3),
        ([1.0] * 9, 8, 3),
        ([1.0] * 10, 9, 4),
        ([1.0] * 33, 32, 5),
    ],
)
def test_degree_and_depth(values, degree, depth):
    polynomial = with_coefficients(values).to_polynomial((-1.0, 2.0))
    assert (polynomial.degree, polynomial.multiplicative_depth) == (degree, depth)
    assert [len(form.coef) for form in forms_of(polynomial)] == [degree + 1] * 3


def test_by_hand():
    # 1 + 2 x + 3 (x^2 - 1)/2 = 3/2 x^2 + 2 x - 1/2; with x = 1 + 2 t: 6 t^2 + 10 t + 3, and t^2 = (T_2 + 1)/2
    polynomial = with_coefficients([1.0, 2.0, 3.0]).to_polynomial((-1.0, 3.0))
    assert polynomial.monomial.coef.tolist() == [-0.5, 2.0, 1.5]
    assert polynomial.hermite_e.coef.tolist() == [1.0, 2.0, 1.5]
    assert polynomial.chebyshev.coef.tolist() == [6.0, 10.0, 3.0]


def test_part_of_the_domain(fitted):
    part = fitted.to_polynomial((-1.0, 1.0))
    assert part.domain == (-1.0, 1.0)
    x = np.linspace(-1, 1, 11)
    np.testing.assert_allclose(part.chebyshev(x), fitted.to_polynomial().chebyshev(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("interval", [None, (1.0, 1.0), (2.0, -2.0), (-math.inf, 2.0), (math.nan, 2.0)])
def test_an_interval_is_needed(interval):
    with pytest.raises(PolynomialError, match=r"hermite_3: the polynomial needs a finite interval.*domain=\(lo, hi\)"):
        Hermite(3).to_polynomial(interval)


def test_refused_beyond_the_domain(fitted):
    with pytest.raises(PolynomialError, match=r"\[-2, 6\] of hermite_32: outside its domain \[-5.25, 5.5\]"):
        fitted.to_polynomial((-2.0, 6.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_coefficients_that_are_not_finite(value):
    with pytest.raises(PolynomialError, match=rf"coefficient 1 is {value}"):
        with_coefficients([1.0, value, 2.0]).to_polynomial((-1.0, 1.0))
