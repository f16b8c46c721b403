"""Histograms of each group of channels against numpy."""

import math

import numpy as np
import pytest
import torch

import hf_ortho
from hf_ortho.conversion import Histogram, collect
from hf_ortho.conversion.calibrate import Calibration
from hf_ortho.conversion.fit_sites import sources_of_groups
from hf_ortho.conversion.sites import Site
from hf_ortho.errors import CalibrationError, SiteError, WidthError
from hf_ortho.fitting import histogram as module
from hf_ortho.fitting.source import Source

EDGES = np.linspace(-math.asinh(2.0**16), math.asinh(2.0**16), 1025)


def values(*shape, groups=1, seed=0):
    """Values in the middle half of bins, with a location and gradients of another size for each group."""
    rng = np.random.default_rng(seed)
    of_group = np.repeat(np.arange(groups), shape[-1] // groups)
    bins = np.clip(rng.normal(512 + 40 * of_group, 20, shape).round(), 0, 1023)
    width = EDGES[1] - EDGES[0]
    x = np.sinh(EDGES[0] + (bins + 0.5 + rng.uniform(-0.25, 0.25, shape)) * width)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(
        rng.normal(0, 1e-3 * (1 + of_group), shape), dtype=torch.float32
    )


def seen(histogram, *batches):
    for x, gradient in batches:
        histogram.update(x)
        histogram.weigh(x, gradient)
    return histogram


def split(tensor, groups):
    """The float64 values of each group, (groups, values)."""
    channels = tensor.double().numpy().reshape(-1, groups, tensor.shape[-1] // groups)
    return channels.transpose(1, 0, 2).reshape(groups, -1)


def mixed(own, prior, count):
    """(1 - p) own + p mean over the groups, p = prior / (prior + count)."""
    p = prior / (prior + count)
    return (1 - p) * own + p * own.mean(0)


@pytest.mark.parametrize("prior", [0, 100])
@pytest.mark.parametrize("groups", [1, 2, 3, 12])
@pytest.mark.parametrize("shape", [(5, 7, 12), (60, 12), (12,), (2, 3, 4, 24)], ids=str)
def test_each_group_against_numpy(monkeypatch, shape, groups, prior):
    monkeypatch.setattr(module, "PRIOR", prior)
    x, gradient = values(*shape, groups=groups)
    histogram = seen(Histogram(groups), (x, gradient))
    found = histogram.by_group()
    own, squares = split(x, groups), split(gradient, groups) ** 2
    counts = np.stack([np.histogram(np.arcsinh(v), EDGES)[0] for v in own])
    importance = np.stack([np.histogram(np.arcsinh(v), EDGES, weights=g)[0] for v, g in zip(own, squares, strict=True)])
    count = own.shape[1]
    np.testing.assert_allclose([h.counts for h in found], mixed(counts, prior, count), rtol=1e-12)
    # sums of squares in float32
    np.testing.assert_allclose([h.importance for h in found], mixed(importance, prior, count), rtol=1e-5)
    assert [(h.minimum, h.maximum) for h in found] == [(v.min(), v.max()) for v in own]
    assert {h.groups for h in found} == {1}
    np.testing.assert_array_equal(histogram.counts, counts.sum(0))
    np.testing.assert_allclose(histogram.importance, importance.sum(0), rtol=1e-5)
    assert (histogram.minimum, histogram.maximum) == (own.min(), own.max())


def test_the_whole_layer_is_that_of_a_histogram_without_groups():
    batches = [values(4, 9, 24, groups=8), values(3, 24, groups=8, seed=1)]
    grouped, plain = seen(Histogram(8), *batches), seen(Histogram(), *batches)
    np.testing.assert_array_equal(grouped.counts, plain.counts)
    np.testing.assert_allclose(grouped.importance, plain.importance, rtol=1e-6)
    assert (grouped.minimum, grouped.maximum) == (plain.minimum, plain.maximum)
    a, b = (h.nodes(Source.of("gelu")) for h in (grouped, plain))
    np.testing.assert_array_equal(a.x, b.x)
    np.testing.assert_allclose(a.w, b.w, rtol=1e-6)


def test_the_effects_of_the_groups_add_up():
    histogram = seen(Histogram(4), values(50, 16, groups=4))
    histogram.scale(0.5)
    source, layer = Source.of("gelu"), histogram.nodes(Source.of("gelu"))
    nodes = [part.nodes(source) for part in histogram.by_group()]
    assert sum(n.effect for n in nodes) == pytest.approx(layer.effect, rel=1e-6)
    # an error moves by at most half a bin where a bin center is clipped to the extreme of a group
    found = sum(n.divergence(np.sin(n.x)) for n in nodes)
    assert found == pytest.approx(layer.divergence(np.sin(layer.x)), rel=1e-2)


@pytest.mark.parametrize("groups", [1025, 16384])
def test_many_groups_have_wider_bins(monkeypatch, groups):
    monkeypatch.setattr(module, "PRIOR", 0)
    x, gradient = values(5, groups)
    histogram = seen(Histogram(groups), (x, gradient))
    stored = [t for t in vars(histogram).values() if isinstance(t, torch.Tensor)]
    assert max(t.numel() for t in stored) == 256 * groups
    parts = histogram.by_group()
    for i in (0, groups - 1):
        counts = np.histogram(np.arcsinh(x[:, i].double().numpy()), EDGES[::4])[0]
        np.testing.assert_array_equal(parts[i].counts, counts)
        np.testing.assert_allclose(parts[i].edges, np.sinh(EDGES[::4]))
    np.testing.assert_array_equal(sum(part.counts for part in parts), histogram.counts)
    source = Source.of("gelu")
    effects = [part.nodes(source).effect for part in (*parts[:1], histogram)]
    np.testing.assert_allclose(effects, [gradient[:, 0].square().sum(), gradient.square().sum()], rtol=1e-5)


def test_pooled_values_keep_their_place_beyond_the_extremes_of_a_group():
    x = torch.cat([torch.linspace(-1, 1, 40)[:, None], torch.linspace(4, 6, 40)[:, None]], 1)
    histogram = Histogram(2)
    histogram.update(x)
    nodes = histogram.by_group()[0].nodes(Source.of("gelu"))
    of_others = nodes.data & (nodes.x > 1)
    p = module.PRIOR / (module.PRIOR + 40)
    assert nodes.share[of_others].sum() == pytest.approx(p / 2)
    assert nodes.x[of_others].min() == pytest.approx(4, rel=0.03)  # a bin
    assert (nodes.minimum, nodes.maximum) == (-1, 1)


@pytest.mark.parametrize("empty", [torch.empty(0, 8), torch.empty(3, 0)], ids=["no positions", "no channels"])
def test_empty(empty):
    histogram = seen(Histogram(4), (empty, empty))
    found = histogram.by_group()[2]
    assert (found.counts.sum(), found.importance) == (0, None)
    assert math.isnan(found.minimum)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_of_one_group_are_reported(bad):
    x, gradient = values(10, 8, groups=4)
    histogram = seen(Histogram(4), (x, gradient))
    x[3, 5] = bad
    histogram.update(x)
    with pytest.raises(CalibrationError, match=r"h\.3\.mlp\.act"):
        histogram.check("h.3.mlp.act")


@pytest.mark.parametrize("groups", [0, -2, 2.0])
def test_groups_that_cannot_be(groups):
    with pytest.raises(WidthError, match="must be a positive integer"):
        Histogram(groups)


def test_a_width_that_is_no_multiple():
    histogram = Histogram(5)
    for method in (histogram.update, lambda x: histogram.weigh(x, x)):
        with pytest.raises(WidthError, match=r"\[3, 12\].* 5 groups"):
            method(torch.ones(3, 12))


PATH = "transformer.h.0.mlp.act"


@pytest.mark.parametrize("weights", ["fisher", "density"])
def test_collect_tells_the_groups_of_unmasked_positions_apart(monkeypatch, gpt2, ids, weights):
    monkeypatch.setattr(module, "PRIOR", 0)
    model, mask = gpt2(scale=20), torch.ones_like(ids)
    mask[2, 20:] = 0
    (found,) = collect(model, [PATH], [{"input_ids": ids, "attention_mask": mask}], weights=weights, groups=16).values()
    inputs = []
    handle = model.get_submodule(PATH).register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(ids, attention_mask=mask)
    handle.remove()
    own = split(inputs[0][mask.bool()], 16)
    parts = found.by_group()
    for i, v in enumerate(own):
        group = parts[i]
        assert np.abs(group.counts - np.histogram(np.arcsinh(v), EDGES)[0]).sum() <= 4  # values on an edge
        assert (group.minimum, group.maximum) == (v.min(), v.max())
    if weights == "fisher":
        total = sum(part.importance for part in found.by_group())
        np.testing.assert_allclose(total, found.importance, rtol=1e-4)


def test_tied_modules_share_the_groups_of_both(gpt2, ids):
    model = gpt2(scale=20)
    paths = ("transformer.h.0.mlp.act", "transformer.h.1.mlp.act")
    site = Site("activation_function", "", "gelu_new", paths, ((paths[1], paths[0]),))
    found = Calibration.of(model, [site], [{"input_ids": ids}], "density", groups=4).histograms
    apart = collect(model, paths, [ids], weights="density", groups=4)
    for i in range(4):
        shared = [found[path].by_group()[i] for path in paths]
        np.testing.assert_allclose(shared[0].counts, shared[1].counts)
        assert shared[0].minimum == min(apart[path].by_group()[i].minimum for path in paths)
    assert found[paths[0]].groups == 4


def test_a_width_is_named_with_the_module(gpt2, ids, state_of):
    model = gpt2()
    before = state_of(model)
    with pytest.raises(WidthError, match=rf"^{PATH}: .*\[4, 32, 128\].* 12 groups"):
        collect(model, [PATH], [ids], groups=12)
    assert state_of(model) == before


@pytest.mark.parametrize("family", hf_ortho.activations.FAMILIES)
def test_sources_of_groups(family, randomized):
    plain = torch.nn.GELU()
    assert sources_of_groups(plain, 3) == [plain] * 3
    single = randomized(f"{family}_3")
    assert sources_of_groups(single, 2) == [single] * 2
    grouped = randomized(f"{family}_3_g2")
    x = torch.linspace(-3, 3, 12).double()
    sources = sources_of_groups(grouped, 6)
    found = torch.cat([source(part) for source, part in zip(sources, x.split(2), strict=True)])
    torch.testing.assert_close(found, grouped(x))
    for groups in (1, 3):
        with pytest.raises(SiteError, match=f"2 groups.*not with {groups}: revert"):
            sources_of_groups(grouped, groups)
