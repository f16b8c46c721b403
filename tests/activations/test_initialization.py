"""Second moments under a Gaussian, and the initialization that keeps the variance."""

import pytest
import torch

from hf_ortho.activations import FAMILIES, build
from hf_ortho.errors import ActivationNameError, FitError


@pytest.mark.parametrize("sigma", [0.5, 2.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_gain_is_the_pair_of_second_moments(family, sigma, domain, randomized, second_moment):
    module = randomized(f"{family}_5", domain)
    value, slope = module.gain(sigma)
    assert value == pytest.approx(second_moment(module, sigma, module.breaks()), rel=1e-6)
    assert slope == pytest.approx(second_moment(module.derivative, sigma, module.breaks()), rel=1e-6)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_gain_needs_a_positive_sigma(sigma):
    with pytest.raises(FitError, match="sigma"):
        build("hermite_3").gain(sigma)


@pytest.mark.parametrize("degree", [1, 2, 3, 8, 16, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_unit_keeps_the_variance(family, degree, second_moment):
    module = build(f"{family}_{degree}", init="unit")
    assert second_moment(module, breaks=module.breaks()) == pytest.approx(1.0, abs=1e-5)
    assert module.gain(1.0)[0] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("degree", [1, 2, 3, 8, 16, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_unit_gives_every_parameter_a_gradient(family, degree):
    module = build(f"{family}_{degree}", init="unit").double()
    x = torch.linspace(-4.0, 4.0, 4001, dtype=torch.float64)
    (module(x) * torch.exp(-0.5 * x**2) * (1 + x)).sum().backward()
    for name, value in module.named_parameters():
        if value.requires_grad:
            reached = value.grad != 0
            # cos(w x - p)/k! with k! = 2.6e35 at degree 32: nonzero, but nothing of it is left in float64.
            assert reached[: min(len(reached), 9)].all(), name
            assert reached.all() or family == "fourier", name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_degree_and_the_initialization_are_checked(family):
    for degree in (0, 33, -1, 2.0, True, "3"):
        with pytest.raises(ActivationNameError, match="degree"):
            FAMILIES[family](degree)
    with pytest.raises(ActivationNameError, match="init"):
        FAMILIES[family](3, init="gelu")


@pytest.mark.parametrize("family", FAMILIES)
def test_domain_and_tail_slopes_are_frozen(family):
    module = build(family)
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"domain", "tail_slopes"}
    assert module.domain.tolist() == [-float("inf"), float("inf")]
    assert module.tail_slopes.tolist() == [0.0, 0.0]
