"""Which CPU kernel a Fourier activation gets, and the Chebyshev interpolant against float64 autograd of the formula."""

import math

import pytest
import torch

from hf_ortho.activations import build
from hf_ortho.kernels import eager
from hf_ortho.kernels.chebyshev import LEAST_TERMS, TERMS_PER_COSINE, ChebyshevSeries, fourier_series
from hf_ortho.kernels.fourier import FourierSeries

CPU = torch.device("cpu")
INTERPOLATED = ("gelu", 4), ("gelu", 6), ("silu", 6)  # and all of degree 8


def kernel(module, dtype=torch.float32):
    vectors = tuple(tuple(p.tolist()) for key, p in module.named_parameters() if key != "domain")
    return fourier_series(vectors, tuple(module.domain.tolist()), dtype, CPU)


def data(count, scale=3.0):
    generator = torch.Generator().manual_seed(1)
    x = scale * torch.randn(count, generator=generator)
    return x, 1 + 0.5 * torch.randn(count, generator=generator)


@pytest.fixture
def interpolated(monkeypatch):
    """Small inputs in chunks too: without them the cosines are taken."""
    monkeypatch.setattr(eager, "GRAIN", 50)


@pytest.mark.parametrize("degree", [4, 6, 8])
@pytest.mark.parametrize("source", ["gelu", "silu", "tanh"])
def test_fits(source, degree, measured, reference, assert_near, interpolated):
    module = build(f"fourier_{degree}")
    module.fit(source)
    # the others have frequencies too high for so few cosines
    assert isinstance(kernel(module), ChebyshevSeries) == (degree == 8 or (source, degree) in INTERPOLATED)
    x, g = data(5000)
    # low frequencies cancel: float32 rounds every term, the largest of which is that many times the result
    a = module.coefficients.detach() / torch.tensor([math.factorial(k) for k in range(1, degree + 1)])
    cancels = max(1.0, (a.abs().sum() + module.offset.abs().sum()).item() / module(x).abs().max().item())
    assert_near(measured(module, x, g), reference(module, x, g), 1e-6 * cancels, 1e-5)


@pytest.mark.parametrize("domain", [(-1.5, 1.8), (2.0, 3.0), (-0.1, 0.3), (99.0, 100.0)], ids=str)
@pytest.mark.parametrize("degree", [1, 2, 7, 12, 32])
def test_random_parameters(degree, domain, randomised, measured, reference, assert_near, interpolated):
    module = randomised(f"fourier_{degree}").float()
    with torch.no_grad():
        module.domain.copy_(torch.tensor(domain))
        module.frequencies.mul_(1.5 / (domain[1] - domain[0])).clamp_(max=20.0)
    assert isinstance(kernel(module), ChebyshevSeries)
    x, g = data(2000, scale=1.0)
    x = x + sum(domain) / 2
    magnitude = max(1.0, abs(domain[1])) * module.frequencies.max().item()  # of the angle, which float32 rounds
    rounding = 2e-6 + 1e-7 * magnitude
    assert_near(measured(module, x, g), reference(module, x, g), rounding, 5e-6 + rounding)


@pytest.mark.parametrize("last", [0, 1], ids=["even", "odd"])
@pytest.mark.parametrize("reduce", [False, True])
def test_a_polynomial_of_any_length(last, reduce):
    """Both parities of the number of steps, from the fewest on, against closed forms."""
    terms = LEAST_TERMS + 2 * last
    series = ChebyshevSeries(((0.5,), (2.0,), (0.4,), (0.3,)), (-1.0, 1.0), terms, torch.float64, CPU)
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    g = 1 + x**2
    rows = list(torch.empty(series.rows, 101, dtype=torch.float64))
    out = torch.empty_like(x)
    value = series.value(x, out, rows)
    error = 2 * 0.2**terms / math.factorial(terms) * 4  # of interpolation: 2 |J_j(0.4)| for the first missing term
    torch.testing.assert_close(value, 0.5 + 2 * torch.cos(0.4 * x - 0.3), rtol=0, atol=2 * error)
    sums = series.gradient(x, g, out, rows, reduce)
    torch.testing.assert_close(out, -0.8 * g * torch.sin(0.4 * x - 0.3), rtol=0, atol=4 * error)
    assert bool(sums) == reduce
    if reduce:
        cosine, sine = torch.cos(0.4 * x - 0.3), torch.sin(0.4 * x - 0.3)
        expected = [g.sum(), (g * cosine).sum(), -2 * (g * x * sine).sum(), 2 * (g * sine).sum()]
        found = [v for vector in series.gradients(sums) for v in vector]
        assert found == pytest.approx([v.item() for v in expected], rel=0, abs=101 * 20 * error)


def test_cosines_where_the_interpolant_does_not_serve():
    module = build("fourier_6")
    assert isinstance(kernel(module), FourierSeries)  # the whole real line
    with torch.no_grad():
        module.domain.copy_(torch.tensor([-2.0, 2.0]))
    found = kernel(module)
    assert isinstance(found, ChebyshevSeries)
    assert LEAST_TERMS <= len(found.points) <= TERMS_PER_COSINE * 6
    assert isinstance(kernel(module, torch.float64), FourierSeries)
    for key, value in [
        ("domain", [-40.0, 40.0]),
        ("domain", [-2.0, math.inf]),
        ("domain", [1.0, 1.0]),
        ("domain", [1.0, -1.0]),
        ("frequencies", 60.0),
        ("frequencies", math.inf),
        ("coefficients", math.nan),
        ("phases", math.inf),
        ("offset", math.inf),
    ]:
        parameter = getattr(module, key)
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(torch.tensor(value))
        assert isinstance(kernel(module), FourierSeries), (key, value)
        with torch.no_grad():
            parameter.copy_(before)
    with torch.no_grad():
        module.coefficients.zero_()
    assert isinstance(kernel(module), ChebyshevSeries)


def test_nan_reaches_the_values(interpolated):
    module = build("fourier_6")
    with torch.no_grad():
        module.domain.copy_(torch.tensor([-2.0, 2.0]))
    assert isinstance(kernel(module), ChebyshevSeries)
    x = data(300)[0]
    x[[3, 130]] = math.nan
    assert module(x).isnan().nonzero().flatten().tolist() == [3, 130]
