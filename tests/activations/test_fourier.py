"""Fourier against its closed formula and the closed forms of arXiv 2502.01247, section 3."""

import math

import numpy as np
import pytest
from scipy.special import i0

from hf_ortho.activations import Fourier


@pytest.mark.parametrize("degree", [1, 2, 3, 8, 9, 16, 32])
def test_values_and_derivative(degree, domain, randomized, assert_follows):
    module = randomized(f"fourier_{degree}", domain)
    a0, a, w, p = (v.detach().numpy() for v in (module.offset, module.coefficients, module.frequencies, module.phases))
    a = a / np.array([math.factorial(k) for k in range(1, degree + 1)], dtype=float)
    assert_follows(
        module,
        lambda x: a0 + np.cos(np.outer(x, w) - p) @ a,
        lambda x: -np.sin(np.outer(x, w) - p) @ (a * w),
    )


@pytest.mark.parametrize("degree", [1, 2, 5, 6, 32])
def test_paper_parameters(degree):
    module, amplitude = Fourier(degree), 1 / math.sqrt(i0(2.0))
    assert amplitude == pytest.approx(0.66233, abs=5e-6)
    offset = amplitude * math.sqrt(1 - 1 / math.factorial(degree) ** 2)
    assert module.offset.tolist() == pytest.approx([offset], rel=1e-6)
    assert module.coefficients.tolist() == pytest.approx([amplitude] * degree, rel=1e-6)
    assert module.frequencies.tolist() == [float(k) for k in range(1, degree + 1)]
    assert module.phases.tolist() == pytest.approx([math.pi / 4] * degree, rel=1e-6)


def test_paper_moments():
    assert Fourier(5).gain(1.0) == pytest.approx((1.307, 0.965), abs=5e-4)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_moments_of_one_cosine(sigma):
    # S = A (cos(x - pi/4)) at degree 1: E cos(2x - pi/2) = E sin 2x = 0, so both moments are A^2/2 at any sigma.
    assert Fourier(1).gain(sigma) == pytest.approx((1 / i0(2.0) / 2,) * 2, rel=1e-6)
