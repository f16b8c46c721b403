from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import cubature
from scipy.stats import norm


@pytest.fixture(params=[None, (-1.5, 1.8)], ids=["pure", "tails"])
def domain(request):
    return request.param


@pytest.fixture
def assert_follows():
    """Compare a module and its derivative with a series S and S' in numpy, tails included, to 1e-12 of the scale."""

    def check(module, series, slope):
        lo, hi = module.domain.tolist()
        s_lo, s_hi = module.tail_slopes.tolist()
        x = np.linspace(-4.01, 4.02, 501)
        inside = np.clip(x, lo, hi)
        value = series(inside) + s_lo * np.minimum(x - lo, 0) + s_hi * np.maximum(x - hi, 0)
        derivative = np.where(x < lo, s_lo, np.where(x > hi, s_hi, slope(inside)))
        with torch.no_grad():
            for ours, theirs in (
                (module(torch.from_numpy(x)), value),
                (module.derivative(torch.from_numpy(x)), derivative),
            ):
                assert ours.dtype == torch.float64
                np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())

    return check


@pytest.fixture
def second_moment():
    """E[F(x)^2] for x ~ N(0, sigma^2) by scipy's adaptive Gauss-Kronrod rule, split at ``breaks``."""

    def integrate(fn, sigma=1.0, breaks=()):
        def integrand(x):
            with torch.no_grad():
                y = fn(torch.from_numpy(x[:, 0])).numpy()
            return y**2 * norm.pdf(x[:, 0], scale=sigma)

        ends = [-10 * sigma, *(b for b in breaks if abs(b) < 10 * sigma), 10 * sigma]
        pieces = [cubature(integrand, [a], [b], atol=1e-10, rtol=1e-9) for a, b in pairwise(ends)]
        assert sum(piece.error for piece in pieces) < 1e-6
        return sum(piece.estimate for piece in pieces)

    return integrate
