"""What every family promises, whatever its formula: gradients, tails, shapes, NaN."""

import copy
import math

import pytest
import torch
from torch.func import functional_call

from hf_ortho.activations import FAMILIES, build

LO, HI = TAILS = (-1.5, 1.8)
POINTS = torch.tensor([-2.31, -1.13, -0.37, 0.42, 1.27, 2.63], dtype=torch.float64)  # inside and on both sides


@pytest.fixture(params=[f"{family}_{n}" for family in FAMILIES for n in (3, 9)])
def name(request):
    return request.param


def as_function(module):
    """The module as a function of x and of all its parameters."""
    names, values = zip(*module.named_parameters(), strict=True)
    return lambda x, *p: functional_call(module, dict(zip(names, p, strict=True)), (x,)), values


def test_gradients_of_the_input_the_parameters_and_the_domain(name, domain, randomized):
    module = randomized(name, domain)
    module.domain.requires_grad_(domain is not None)
    function, parameters = as_function(module)
    x = POINTS.clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradcheck(module.derivative, (x,))


def test_an_infinite_domain_has_gradient_zero(name, randomized):
    module = randomized(name)
    module.domain.requires_grad_()
    module(POINTS).sum().backward()
    assert module.domain.grad.tolist() == [0.0, 0.0]


def test_derivative_is_the_gradient_of_forward(name, domain, randomized):
    module = randomized(name, domain)
    x = torch.linspace(-4.01, 4.02, 501, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(module.derivative(x), gradient, rtol=1e-11, atol=1e-11)


def test_tails_are_straight_and_continuous(name, randomized):
    ends = torch.tensor(TAILS, dtype=torch.float64)
    module, (at_lo, at_hi) = randomized(name, TAILS), randomized(name)(ends).tolist()
    below = module(torch.tensor([LO - 1e6, LO - 2.0, LO], dtype=torch.float64)).tolist()
    above = module(torch.tensor([HI, HI + 2.0, HI + 1e6], dtype=torch.float64)).tolist()
    assert below == pytest.approx([at_lo - 0.3e6, at_lo - 0.6, at_lo], rel=1e-12)
    assert above == pytest.approx([at_hi, at_hi + 2.4, at_hi + 1.2e6], rel=1e-12)


def test_derivative_at_the_ends_of_the_domain_is_that_of_the_series(name, randomized):
    ends = torch.tensor(TAILS, dtype=torch.float64)
    assert torch.equal(randomized(name, TAILS).derivative(ends), randomized(name).derivative(ends))


def test_nan_propagates(name, randomized):
    module = randomized(name, TAILS)
    for x in (torch.tensor([0.5, math.nan, -3.0]), torch.tensor([0.5, math.nan, -3.0], dtype=torch.float64)):
        assert module(x).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 5), (0,), (4, 0, 2)], ids=str)
def test_any_shape(name, shape, randomized):
    module = randomized(name, TAILS)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for fn in (module, module.derivative):
        y = fn(x)
        assert y.shape == shape
        torch.testing.assert_close(y.flatten(), fn(x.flatten()))
    module(x).sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("degree", [3, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_layouts(family, degree, randomized):
    module = randomized(f"{family}_{degree}", TAILS).float()
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    y = module(x)
    torch.testing.assert_close(module(x.transpose(1, 3)), y.transpose(1, 3))
    torch.testing.assert_close(module(x[:, ::2]), y[:, ::2])
    torch.testing.assert_close(module(x[:1].expand(3, -1, -1, -1)), y[:1].expand(3, -1, -1, -1))
    last = module(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, y)
    assert last.is_contiguous(memory_format=torch.channels_last)  # as torch's own activations


def test_the_input_is_not_changed(name, randomized):
    module, x = randomized(name, TAILS), POINTS.clone()
    module(x), module.derivative(x)
    assert torch.equal(x, POINTS)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_floating_point_inputs(family, dtype):
    module, x = build(family), torch.ones(3).to(dtype)
    for fn in (module, module.derivative):
        with pytest.raises(TypeError, match=f"{family} takes floating-point tensors"):
            fn(x)


@pytest.mark.parametrize("degree", [3, 8, 9, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_keeps_its_digits(family, degree, randomized):
    single = randomized(f"{family}_{degree}").float()
    x = torch.linspace(-4.0, 4.0, 501)
    with torch.no_grad():
        exact = copy.deepcopy(single).double()(x.double())
        assert (single(x) - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_repr_shows_degree_domain_and_tails(family, randomized):
    text = repr(randomized(f"{family}_3", TAILS))
    assert all(part in text for part in ("degree=3", "[-1.5, 1.8]", "[0.3, 1.2]"))
