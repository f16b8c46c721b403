"""Which CPU kernel a Fourier activation gets, and the one of tables against float64 autograd of the formula."""

import math

import pytest
import torch

from hf_ortho.activations import build
from hf_ortho.activations.base import SHARED
from hf_ortho.activations.fourier.cpu import FourierSeries
from hf_ortho.activations.fourier.taylor import LEAST_NODES, MOST_NODES, TaylorSeries, make_fourier_series
from hf_ortho.kernels import cpu

CPU = torch.device("cpu")


def kernel(module, dtype=torch.float32, large=True):
    vectors = tuple(tuple(p.tolist()) for key, p in module.named_parameters() if key not in SHARED)
    return make_fourier_series(vectors, tuple(module.domain.tolist()), dtype, CPU, large)


def data(count, scale=3.0):
    generator = torch.Generator().manual_seed(1)
    x = scale * torch.randn(count, generator=generator)
    return x, 1 + 0.5 * torch.randn(count, generator=generator)


@pytest.fixture
def tables(monkeypatch):
    """For small inputs too, which get the cosines otherwise."""
    monkeypatch.setattr(cpu, "GRAIN", 50)
    monkeypatch.setattr(cpu, "LARGE", 51)


@pytest.mark.slow
@pytest.mark.parametrize("degree", [4, 6, 8])
@pytest.mark.parametrize("source", ["gelu", "silu", "tanh"])
def test_fits(source, degree, measured, reference, assert_near, tables):
    module = build(f"fourier_{degree}")
    module.fit(source)
    assert isinstance(kernel(module), TaylorSeries)
    x, g = data(5000)
    assert_near(measured(module, x, g), reference(module, x, g), 1e-6, 1e-5)


@pytest.mark.parametrize("domain", [(-1.5, 1.8), (2.0, 3.0), (-0.1, 0.3), (99.0, 100.0)], ids=str)
@pytest.mark.parametrize("degree", [1, 2, 7, 12, 32])
def test_random_parameters(degree, domain, randomized, measured, reference, assert_near, tables):
    module = randomized(f"fourier_{degree}").float()
    with torch.no_grad():
        module.domain.copy_(torch.tensor(domain))
        module.frequencies.mul_(1.5 / (domain[1] - domain[0])).clamp_(max=20.0)
    assert isinstance(kernel(module), TaylorSeries)
    x, g = data(2000, scale=1.0)
    x = x + sum(domain) / 2
    magnitude = max(1.0, abs(domain[1])) * module.frequencies.max().item()  # of the angle, which float32 rounds
    rounding = 2e-6 + 1e-7 * magnitude
    assert_near(measured(module, x, g), reference(module, x, g), rounding, 5e-6 + rounding)


@pytest.mark.parametrize("nodes", [64, 256])
@pytest.mark.parametrize("reduce", [False, True])
def test_the_remainder_is_that_of_taylors_theorem(nodes, reduce):
    """Against closed forms, up to both ends, and not better than the step allows."""
    lo, hi = -1.0, 3.0
    step = (hi - lo) / (nodes - 2)
    grid = (lo + hi) / 2, step, nodes, False
    series = TaylorSeries(((0.5,), (2.0,), (1.5,), (0.3,)), grid, torch.float32, CPU)
    x = torch.linspace(lo, hi, 1001)
    g = 1 + x**2
    scratch = list(torch.empty(series.scratch_rows, 1002)[:, :1001])
    out = torch.empty_like(x)
    angle = 1.5 * x.double() - 0.3
    remainder = (1.5 * step) ** 3 / 48  # of cos and of sin
    value = series.value(x, out, scratch)
    error = (value - (0.5 + 2 * torch.cos(angle))).abs().max()
    rounding = 1e-6  # a few ulp of values up to 2.5
    assert remainder <= error <= 2 * remainder + rounding
    sums = series.backward_chunk(x, g, out, scratch, reduce)
    assert (out + 3 * g * torch.sin(angle)).abs().max() <= 10 * (3 * remainder + rounding)
    assert bool(sums) == reduce
    if reduce:
        cosine, sine = torch.cos(angle), torch.sin(angle)
        expected = [g.double().sum(), (g * cosine).sum(), -2 * (g * x * sine).sum(), 2 * (g * sine).sum()]
        found = [v for vector in series.parameter_gradients(sums) for v in vector]
        assert found == pytest.approx(
            [v.item() for v in expected], rel=0, abs=g.sum().item() * 6 * (remainder + rounding)
        )


def test_nodes_follow_the_curvature():
    """Twice the frequency, or twice the domain, takes twice the nodes."""
    parameters, twice = ((0.0,), (1.0,), (2.0,), (0.0,)), ((0.0,), (1.0,), (4.0,), (0.0,))
    nodes = [
        make_fourier_series(p, (-end, end), torch.float32, CPU, True).nodes
        for p, end in ((parameters, 3.0), (twice, 3.0), (parameters, 6.0))
    ]
    assert nodes[1] == nodes[2] == 2 * nodes[0]


def test_cosines_where_tables_do_not_serve():
    module = build("fourier_6")
    with torch.no_grad():
        module.domain.copy_(torch.tensor([-2.0, 2.0]))
    found = kernel(module)
    assert isinstance(found, TaylorSeries)
    assert LEAST_NODES <= found.nodes <= MOST_NODES
    assert isinstance(kernel(module, torch.float64), FourierSeries)
    assert isinstance(kernel(module, large=False), FourierSeries)
    for key, value in [
        ("domain", [-200.0, 200.0]),
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
    assert isinstance(kernel(module), TaylorSeries)


@pytest.mark.parametrize("far", [0.0, 1.5, -1.5, math.inf, math.nan])
@pytest.mark.parametrize("degree", [1, 6, 12])
def test_the_whole_real_line(degree, far, randomized, measured, reference, assert_near, small_chunks):
    """Chunks that reach beyond the grid take the cosines, the others do not, and the sums meet."""
    module = randomized(f"fourier_{degree}").float()
    found = kernel(module)
    assert found.open
    x, g = data(400, scale=1.5)
    assert x.abs().max() < found.reach
    x[100], g[100] = far * found.reach, 0.01
    result, exact = measured(module, x, g), reference(module, x, g)
    if math.isfinite(far):
        rounding = 1e-7 * abs(x[100].item()) * module.frequencies.abs().max().item()  # of that angle in float32
        assert_near(result, exact, 2e-6 + rounding, 5e-6 + rounding)
    else:
        assert result[0].isnan().nonzero().flatten().tolist() == [100]
        result[0][100] = exact[0][100] = 0.0
        torch.testing.assert_close(result[0].double(), exact[0], rtol=0, atol=5e-6)


def test_many_equal_inputs(tables, measured):
    """Thousands of the same summand, whose float32 sum one by one is off by a thousandth."""
    module = build("fourier_6")
    with torch.no_grad():
        module.domain.copy_(torch.tensor([-2.0, 2.0]))
    count = 60_000
    x, g = torch.full((count,), 0.1), torch.full((count,), 0.1)
    found = measured(module, x, g)[1]
    expected = count * 0.1 * torch.cos(module.frequencies * 0.1 - module.phases) / torch.arange(1.0, 7.0).cumprod(0)
    torch.testing.assert_close(found["coefficients"], expected.detach(), rtol=1e-5, atol=0)


def test_nan_reaches_the_values(tables):
    module = build("fourier_6")
    with torch.no_grad():
        module.domain.copy_(torch.tensor([-2.0, 2.0]))
    assert isinstance(kernel(module), TaylorSeries)
    x = data(300)[0]
    x[[3, 130]] = math.nan
    assert module(x).isnan().nonzero().flatten().tolist() == [3, 130]
