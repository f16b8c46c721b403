"""Fits of each group of channels to its own data."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_ortho.activations import FAMILIES, FitReport, build
from hf_ortho.conversion import Histogram
from hf_ortho.errors import FitError
from hf_ortho.fitting.density import DATA_FREE
from hf_ortho.fitting.histogram import PRIOR

CENTERS = (-1.5, 0.3, 1.5)  # of the data of each group


def samples(centers, count=4000, width=0.7):
    """Pre-activations (count, channels), one channel per group, and squares of gradients that differ in size."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    x = torch.tensor(centers, dtype=torch.float64) + width * noise
    return x, torch.linspace(0.5, 1.0, len(centers), dtype=torch.float64) * torch.ones_like(x)


def histogram_of(x, gradient=None, groups=None):
    histogram = Histogram(x.shape[-1] if groups is None else groups)
    histogram.update(x)
    if gradient is not None:
        histogram.weigh(x, gradient)
    return histogram


def square_errors(module, x, fn=nn.functional.gelu):
    """The mean squared error of each channel."""
    with torch.no_grad():
        return (module(x) - fn(x)).square().mean(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_group_follows_its_own_data_better_than_the_layer(family):
    x, gradient = samples(CENTERS)
    histogram = histogram_of(x, gradient)
    layer, groups = build(f"{family}_3"), build(f"{family}_3_g3")
    whole, report = (module.fit("gelu", histogram=histogram) for module in (layer, groups))
    # Bins are 2 % wide, and each group also counts some data of the layer: 1 % for squared errors.
    ratios = square_errors(groups, x) / square_errors(layer, x)
    assert (ratios < 1.01).all()
    assert ratios.min() < 0.7  # groups differ, so one function cannot be best for all
    assert report.divergence < whole.divergence
    assert (report.activation, whole.worst_group) == (f"{family}_3_g3", None)
    assert torch.equal(groups.tail_slopes, layer.tail_slopes)
    # It refines the fit of the layer, and gets about as close as a search from scratch.
    alone = build(f"{family}_3").fit("gelu", histogram=histogram.by_group()[1])
    assert groups.members()[1].measure("gelu", histogram=histogram.by_group()[1]).divergence < 1.3 * alone.divergence


def test_no_cubic_on_the_interval_is_better():
    # The fit minimizes the mean square over a group's data plus 2e-4 times the largest square on the line. A group
    # also counts PRIOR values of the layer. numpy's least squares gives the first summand alone its minimum.
    x, gradient = samples((-0.8, 0.1, 0.6), width=0.3)
    module = build("hermite_3_g3")
    module.fit("gelu", histogram=histogram_of(x, gradient * 0 + 1), domain=(-4.0, 4.0), derivative_weight=0.0)
    line = torch.linspace(-9.5, 8.5, 1801, dtype=torch.float64)
    prior = PRIOR / (PRIOR + len(x))
    for i, member in enumerate(module.members()):
        points = np.concatenate([x[:, i].numpy(), x.flatten().numpy()])
        weights = np.repeat([(1 - prior) / len(x), prior / x.numel()], [len(x), x.numel()])
        target = nn.functional.gelu(torch.from_numpy(points)).numpy()
        cubic = np.polynomial.Polynomial.fit(points, target, 3, w=np.sqrt(weights))
        best = weights @ (cubic(points) - target) ** 2
        tails = np.maximum(line.numpy() - 4.0, 0.0)
        largest = np.abs(cubic(line.numpy().clip(-4.0, 4.0)) + tails - nn.functional.gelu(line).numpy()).max()
        with torch.no_grad():
            found = weights @ (member(torch.from_numpy(points)).numpy() - target) ** 2
        assert 0.99 * best <= found <= 1.02 * best + 2e-4 * largest**2  # 1 and 2 %: the width of the bins


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_groups_have_equal_functions(family):
    x, gradient = samples((0.2, 0.2))
    module, layer = build(f"{family}_3_g2"), build(f"{family}_3")
    report = module.fit("silu", histogram=histogram_of(x, 0 * gradient + 1))
    layer.fit("silu", histogram=histogram_of(x, 0 * gradient + 1))
    for one, other in zip(*(member.parameters() for member in module.members()), strict=True):
        assert torch.equal(one, other)
    both = square_errors(layer, x, nn.functional.silu)
    assert (square_errors(module, x, nn.functional.silu) <= 1.01 * both).all()
    assert report.worst_group[1] == pytest.approx(report.median_group[1], rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_data_all_groups_have_the_function_of_the_layer(family):
    module, layer = build(f"{family}_3_g4"), build(f"{family}_3")
    report, whole = module.fit("gelu"), layer.fit("gelu")
    for member in module.members():
        for ours, theirs in zip(member.parameters(), layer.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert report.rms_error == pytest.approx(whole.rms_error, rel=1e-9)
    assert report.sup_error == pytest.approx(whole.sup_error, rel=1e-3)  # on fewer points
    assert (report.domain, report.mass_outside) == (whole.domain, pytest.approx(whole.mass_outside))


def test_the_report_of_groups_adds_up_the_reports_of_each():
    x, gradient = samples(CENTERS)
    histogram = histogram_of(x, gradient)
    module = build("hermite_4_g3")
    report = module.fit("gelu", histogram=histogram)
    parts = [m.measure("gelu", histogram=histogram.by_group()[i]) for i, m in enumerate(module.members())]
    assert report.divergence == pytest.approx(sum(part.divergence for part in parts), rel=1e-9)
    assert report.rms_error**2 == pytest.approx(np.mean([part.rms_error**2 for part in parts]), rel=1e-9)
    assert report.mass_outside == pytest.approx(np.mean([part.mass_outside for part in parts]), rel=1e-9)
    assert report.sup_error == pytest.approx(max(part.sup_error for part in parts), rel=1e-3)  # on fewer points
    assert report.domain == (min(part.domain[0] for part in parts), max(part.domain[1] for part in parts))
    ranked = sorted(range(3), key=lambda i: parts[i].divergence)
    assert (report.median_group[0], report.worst_group[0]) == (ranked[1], ranked[2])
    assert report.worst_group[1] == pytest.approx(parts[ranked[2]].divergence, rel=1e-9)
    assert FitReport.from_dict(report.to_dict()) == report
    assert module.measure("gelu", histogram=histogram) == report
    old = {key: value for key, value in parts[0].to_dict().items() if "group" not in key}
    assert FitReport.from_dict(old) == parts[0]


def test_a_function_for_each_group():
    module = build("tropical_rational_2_g2")
    report = module.fit([nn.ReLU(), nn.ReLU6()])
    assert report.sup_error < 1e-5  # both are piecewise linear
    x = torch.tensor([[3.0, 3.0], [9.0, 9.0], [-2.0, -2.0]])
    torch.testing.assert_close(module(x), torch.tensor([[3.0, 3.0], [9.0, 6.0], [0.0, 0.0]]), rtol=0, atol=1e-5)


def test_refused():
    module = build("hermite_3_g2")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(FitError, match="needs one function, or one for each group; got 3"):
        module.fit(["gelu"] * 3)
    with pytest.raises(FitError, match="differ in their slopes far out"):
        module.fit(["relu", "tanh"])
    members = [build("hermite_3"), build("hermite_3")]
    for member, fn in zip(members, ("relu", "tanh"), strict=True):
        member.fit(fn)
    with pytest.raises(FitError, match="differ in their slopes far out"):  # also if the others could be copied
        module.fit(members)
    with pytest.raises(FitError, match="hermite_3_g2 has 2 groups, but the histogram has 3"):
        module.fit("gelu", histogram=histogram_of(samples(CENTERS)[0]))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_without_tails_all_groups_are_fitted_on_the_interval_of_all_data():
    x, _ = samples(CENTERS)
    module = build("hermite_4_g3")
    report = module.fit("gelu", histogram=histogram_of(x), tails=False)
    assert report.domain == (pytest.approx(float(x.min())), pytest.approx(float(x.max())))
    assert torch.isinf(module.domain).all()
    assert report.mass_outside == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_each_group_starts_from_the_layer_and_never_gets_worse_on_its_own_data(family):
    x, gradient = samples((-1.0, -0.95, 0.0, 2.5))
    histogram, fitted = histogram_of(x, gradient), {}
    for name in (f"{family}_5", f"{family}_5_g4"):
        module = build(name)
        module.fit("silu", histogram=histogram)
        fitted[name] = [
            (module.members() * 4)[i].measure("silu", histogram=part).divergence
            for i, part in enumerate(histogram.by_group())
        ]
    layer, groups = map(np.array, fitted.values())
    assert (groups <= layer * (1 + 1e-12)).all()


class Plain:
    """A density without a hash."""

    __hash__ = None

    def __str__(self):
        return "plain"

    def nodes(self, source, within=None):
        return DATA_FREE.nodes(source, within)


def test_any_density_and_callable_will_do():
    class Function:
        __hash__ = None

        def __call__(self, x):
            return nn.functional.silu(x)

    module, expected = build("hermite_3_g2"), build("hermite_3_g2")
    module.fit(Function(), histogram=Plain())
    expected.fit("silu", histogram=DATA_FREE)
    assert torch.equal(module.coefficients, expected.coefficients)
