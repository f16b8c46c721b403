"""``polynomials`` of a model, and ``expand`` against evaluation of the network and against hand-computed cases."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sympy import Poly, Rational, symbols
from torch import nn

import hf_ortho
from hf_ortho.activations import FAMILIES, Hermite
from hf_ortho.activations.polynomial import PolynomialActivation
from hf_ortho.errors import PolynomialError


def hermite(*coefficients, domain=None):
    module = Hermite(len(coefficients) - 1)
    with torch.no_grad():
        module.coefficients.copy_(torch.tensor(coefficients))
        if domain is not None:
            module.domain.copy_(torch.tensor(domain))
    return module


def linear(weight, bias=None):
    weight = torch.tensor(weight)
    module = nn.Linear(*weight.shape[::-1], bias=bias is not None)
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(torch.tensor(bias))
    return module


def assert_equal(polys, network, points):
    """Values of the polynomials, by exact arithmetic, and of the network in float64."""
    with torch.no_grad():
        expected = network.double()(torch.from_numpy(points)).numpy()
    exact = [[float(p(*map(Rational, point.tolist()))) for p in polys] for point in points]
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


# ---- the activations of a model ------------------------------------------------------------------------------------


def test_polynomials_of_a_converted_model(gpt2, ids):
    model = gpt2(scale=60)
    hf_ortho.convert(model, "hermite_6", calibration=[ids])
    forms = hf_ortho.polynomials(model)
    assert list(forms) == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    for path, form in forms.items():
        module = model.get_submodule(path)
        assert form.domain == tuple(module.domain.tolist())
        x = np.linspace(*form.domain, 50)
        np.testing.assert_allclose(form.chebyshev(x), module(torch.from_numpy(x)).detach().numpy(), rtol=0, atol=1e-13)
    first, second = forms.values()
    assert first.domain != second.domain


def test_interval_of_a_pure_polynomial_from_the_config(gpt2):
    model = gpt2(activation_function="hermite_4")
    with pytest.raises(PolynomialError, match=r"^transformer\.h\.0\.mlp\.act: domain \[-inf, inf\] of hermite_4"):
        hf_ortho.polynomials(model)
    paths = [f"transformer.h.{i}.mlp.act" for i in (0, 1)]
    model.config.hf_ortho = {"layers": [{"module": p, "domain": [-1.0, 2.0 + i]} for i, p in enumerate(paths)]}
    assert {p: form.domain for p, form in hf_ortho.polynomials(model).items()} == {
        paths[0]: (-1.0, 2.0),
        paths[1]: (-1.0, 3.0),
    }


def grouped(degree, groups, seed=0):
    """Polynomials of ``groups`` groups of channels, without domains."""
    module = Hermite(degree, groups=groups)
    torch.nn.init.normal_(module.coefficients, generator=torch.Generator().manual_seed(seed))
    return module


def test_one_polynomial_per_group_of_channels(gpt2, ids):
    model = gpt2(scale=60)
    hf_ortho.convert(model, "hermite_4_g8", calibration=[ids])
    forms = hf_ortho.polynomials(model)
    for path, per_group in forms.items():
        module = model.get_submodule(path)
        assert len(per_group) == 8
        with pytest.raises(PolynomialError, match="hermite_4_g8 is 8 polynomials: call to_"):
            module.to_polynomial()
        for i, form in enumerate(per_group):
            assert form.domain == tuple(module.domain[i].tolist())
            x = np.linspace(*form.domain, 50)
            y = module(torch.from_numpy(x)[:, None].expand(-1, 8)).detach().numpy()[:, i]
            np.testing.assert_allclose(form.chebyshev(x), y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("family", [f for f, cls in FAMILIES.items() if not issubclass(cls, PolynomialActivation)])
def test_other_families_are_not_polynomials(family, gpt2):
    model = gpt2(activation_function=f"{family}_3")
    with pytest.raises(PolynomialError, match=rf"transformer\.h\.0\.mlp\.act is {family}_3, which is not a polynomial"):
        hf_ortho.polynomials(model)


def test_a_model_without_activations_of_ours(gpt2):
    with pytest.raises(PolynomialError, match="GPT2LMHeadModel has no learnable activations: convert it first"):
        hf_ortho.polynomials(gpt2())


# ---- a whole network -----------------------------------------------------------------------------------------------


def test_expansion_by_hand():
    x0, x1 = symbols("x:2")
    # z + z^2 at z = 2 x + 1
    (one,) = hf_ortho.expand(nn.Sequential(linear([[2.0]], [1.0]), hermite(1.0, 1.0, 2.0)))
    assert one == Poly(4 * x0**2 + 6 * x0 + 2, x0, domain="QQ")
    # z^2 at z = x0 + x1/2, then -1 and +3 times it
    square = nn.Sequential(linear([[1.0, 0.5]]), hermite(1.0, 0.0, 2.0))
    minus, thrice = hf_ortho.expand(nn.Sequential(square, linear([[-1.0], [3.0]], [0.0, 0.25])))
    assert minus == Poly(-(x0**2) - x0 * x1 - x1**2 / 4, x0, x1, domain="QQ")
    assert thrice == Poly(3 * x0**2 + 3 * x0 * x1 + 3 * x1**2 / 4 + Rational(1, 4), x0, x1, domain="QQ")


def test_affine_network():
    x0, x1 = symbols("x:2")
    assert hf_ortho.expand(linear([[1.0, -2.0]], [0.5])) == [Poly(x0 - 2 * x1 + Rational(1, 2), x0, x1, domain="QQ")]


@pytest.mark.parametrize(
    ("widths", "degree", "total"), [((2, 3, 2), 3, 3), ((2, 3, 2, 1), 3, 9), ((3, 2, 2), 5, 5), ((1, 2, 2, 2, 1), 2, 8)]
)
def test_expansion_equals_the_network(widths, degree, total):
    torch.manual_seed(0)
    layers = [nn.Linear(widths[0], widths[1])]
    for a, b in pairwise(widths[1:]):
        layers.append(nn.Sequential(Hermite(degree), nn.Linear(a, b)))
    network = nn.Sequential(*layers)
    polys = hf_ortho.expand(network)
    assert len(polys) == widths[-1]
    assert [p.total_degree() for p in polys] == [total] * widths[-1]
    assert_equal(polys, network, np.random.default_rng(0).uniform(-2, 2, (5, widths[0])))


def test_groups_of_channels():
    """Before and after an affine map: 4 channels in 2 groups, 6 in 3."""
    torch.manual_seed(0)
    network = nn.Sequential(grouped(2, 2), nn.Linear(4, 6), grouped(2, 3, seed=1), nn.Linear(6, 1))
    polys = hf_ortho.expand(network)
    assert polys[0].total_degree() == 4
    assert_equal(polys, network, np.random.default_rng(0).uniform(-2, 2, (5, 4)))
    with pytest.raises(PolynomialError, match="5 groups of channels gets 6 values: the width must be a multiple of 5"):
        hf_ortho.expand(nn.Sequential(nn.Linear(2, 6), grouped(2, 5)))


def test_one_module_at_two_places():
    act = hermite(0.0, 1.0, 0.5)
    network = nn.Sequential(linear([[1.0], [-1.0]]), act, linear([[1.0, 0.5]]), act)
    (poly,) = hf_ortho.expand(network)
    assert poly.total_degree() == 4
    assert_equal([poly], network, np.linspace(-2, 2, 5)[:, None])


def test_zero_coefficients_do_not_count():
    network = nn.Sequential(linear([[1.0, 1.0]]), hermite(0.0, 1.0, 1.0, *[0.0] * 6))
    (poly,) = hf_ortho.expand(network, max_terms=6)  # C(2 + 2, 2)
    assert poly.total_degree() == 2


def test_tails_are_refused_or_ignored():
    network = nn.Sequential(linear([[1.0, 1.0]]), hermite(0.25, 1.0, 0.5, domain=(-1.0, 2.0)))
    with pytest.raises(PolynomialError, match=r"module 1 is a straight line outside .*\[-1, 2\].*ignore_tails"):
        hf_ortho.expand(network)
    polys = hf_ortho.expand(network, ignore_tails=True)
    assert_equal(polys, network, np.array([[0.5, 0.75], [-1.0, 0.5], [1.0, 1.0]]))
    with torch.no_grad():
        beyond = float(network(torch.tensor([[2.0, 2.0]], dtype=torch.float64)))
    assert float(polys[0](2, 2)) != pytest.approx(beyond, abs=1.0)


def test_too_many_terms():
    network = nn.Sequential(nn.Linear(4, 2), Hermite(3), nn.Linear(2, 2), Hermite(3))  # C(4 + 9, 9) = 715
    with pytest.raises(PolynomialError, match=r"C\(4 \+ 9, 9\) = 715 monomials \(4 inputs, degree 9\).*max_terms=714"):
        hf_ortho.expand(network, max_terms=714)
    small = nn.Sequential(nn.Linear(2, 1), Hermite(3))
    assert len(hf_ortho.expand(small, max_terms=10)[0].terms()) == 10
    with pytest.raises(PolynomialError, match=r"= 10 monomials.*max_terms=9"):
        hf_ortho.expand(small, max_terms=9)


def test_too_many_terms_by_thousands_of_digits():
    # 768 log10(8^12) - log10(768!) = 8322.87 - 1884.26 = 6438.6
    layers = [nn.Linear(768, 1), Hermite(8), *[m for _ in range(11) for m in (nn.Linear(1, 1), Hermite(8))]]
    with pytest.raises(PolynomialError, match=r"= 4\.\d+e\+6438 monomials"):
        hf_ortho.expand(nn.Sequential(*layers))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            nn.Sequential(linear([[1.0]]), nn.Sequential(nn.GELU())),
            r"module 1\.0 is GELU: expected an nn\.Sequential",
        ),
        (nn.Sequential(linear([[1.0]]), nn.LayerNorm(1)), r"module 1 is LayerNorm"),
        (nn.GELU(), r"the network is GELU"),
        (nn.Sequential(linear([[1.0]]), Residual(linear([[2.0]]))), r"module 1 is Residual"),
        (nn.Sequential(hermite(1.0, 1.0)), r"Sequential has no nn\.Linear: the number of inputs is unknown"),
        (
            nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 1)),
            r"module 1 takes 2 values, but the previous nn\.Linear outputs 3",
        ),
        (nn.Sequential(linear([[1.0]], [float("nan")])), r"bias of module 0 contains NaN or infinity"),
        (nn.Sequential(linear([[1.0]]), hermite(1.0, float("inf"))), r"coefficient 1 is inf"),
    ],
)
def test_what_does_not_expand(network, message):
    with pytest.raises(PolynomialError, match=message):
        hf_ortho.expand(network)
