"""Tropical polynomials and rationals against numpy's maximum over lines."""

import math

import numpy as np
import pytest
import torch

from hf_ortho.activations import Tropical, TropicalRational, build

DEGREES = [1, 2, 3, 8, 9, 16, 32]


def max_of_lines(slopes, intercepts):
    """The maximum and its slope, as functions of x."""

    def lines(x):
        return np.outer(x, slopes) + intercepts

    return lambda x: lines(x).max(1), lambda x: slopes[lines(x).argmax(1)]


def numpy_lines(module):
    """(slopes, intercepts) of every maximum in the module."""
    if isinstance(module, Tropical):
        scale = math.sqrt(2) / module.degree
        return [(scale * np.arange(module.degree + 1), scale * module.coefficients.detach().double().numpy())]
    return [
        tuple(getattr(module, f"{part}_{key}").detach().double().numpy() for key in ("slopes", "intercepts"))
        for part in ("numerator", "denominator")
    ]


@pytest.mark.parametrize("degree", DEGREES)
def test_polynomial(degree, domain, randomized, assert_follows):
    module = randomized(f"tropical_{degree}", domain, spread=1.0)
    assert_follows(module, *max_of_lines(*numpy_lines(module)[0]))


@pytest.mark.parametrize("degree", DEGREES)
def test_rational(degree, domain, randomized, assert_follows):
    module = randomized(f"tropical_rational_{degree}", domain, spread=1.0)
    (top, top_slope), (bottom, bottom_slope) = (max_of_lines(*lines) for lines in numpy_lines(module))
    assert_follows(module, lambda x: top(x) - bottom(x), lambda x: top_slope(x) - bottom_slope(x))


@pytest.mark.parametrize("degree", [1, 3, 6, 32])
def test_paper_parameters(degree):
    assert Tropical(degree).coefficients.tolist() == [1.0] * (degree + 1)
    (p, a), (q, b) = numpy_lines(TropicalRational(degree))
    np.testing.assert_allclose(p, math.sqrt(2) / degree * np.arange(degree + 1), rtol=1e-6)
    np.testing.assert_allclose(a, math.sqrt(2) / degree, rtol=1e-6)
    assert not q.any()
    assert not b.any()


@pytest.mark.parametrize("family", ["tropical", "tropical_rational"])
@pytest.mark.parametrize(("degree", "moment"), [(3, 1.754), (5, 1.399), (6, 1.322)])
def test_paper_moments(family, degree, moment):
    assert build(f"{family}_{degree}").gain(1.0) == pytest.approx((moment, 1.0), abs=5e-4)


@pytest.mark.parametrize("degree", [1, 2, 16, 32])
def test_paper_moments_in_closed_form(degree):
    # sqrt(2) relu(x) + sqrt(2)/n
    expected = 1 + 4 / (degree * math.sqrt(2 * math.pi)) + 2 / degree**2
    assert Tropical(degree).gain(1.0) == pytest.approx((expected, 1.0), rel=1e-6)


@pytest.mark.parametrize("family", ["tropical", "tropical_rational"])
@pytest.mark.parametrize("degree", DEGREES)
def test_unit_uses_every_line(family, degree):
    x = np.linspace(-4.0, 4.0, 8001)
    for slopes, intercepts in numpy_lines(build(f"{family}_{degree}", init="unit")):
        assert set((np.outer(x, slopes) + intercepts).argmax(1)) == set(range(degree + 1))


@pytest.mark.parametrize("family", ["tropical", "tropical_rational"])
def test_parallel_and_hidden_lines_do_not_disturb_the_moments(family, second_moment):
    module = build(f"{family}_4")
    values = {
        "coefficients": [0.0, -9.0, 1.0, -9.0, -2.0],
        "numerator_slopes": [0.0, 0.5, 0.5, 1.0, 1.0],
        "numerator_intercepts": [0.0, 0.1, 0.3, -2.0, 0.2],
        "denominator_slopes": [0.2, -1.0, 0.2, 0.7, 0.7],
        "denominator_intercepts": [0.0, 0.0, -3.0, 0.0, 0.0],
    }
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.tensor(values[name]))
    # Without the module's own breaks: many pieces instead.
    pieces = tuple(np.linspace(-6.0, 6.0, 49))
    expected = second_moment(module, breaks=pieces), second_moment(module.derivative, breaks=pieces)
    assert module.gain(1.0) == pytest.approx(expected, rel=1e-5)
