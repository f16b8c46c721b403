"""Streamed pre-activation histograms against numpy."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Model

from hf_ortho.activations import build
from hf_ortho.conversion import Histogram, collect
from hf_ortho.errors import CalibrationError, HfOrthoError
from hf_ortho.fitting.source import Source

BINS = 1024
EDGES = np.linspace(-math.asinh(2.0**16), math.asinh(2.0**16), BINS + 1)


def histogram_of(*batches):
    histogram = Histogram()
    for batch in batches:
        histogram.update(torch.as_tensor(batch))
    return histogram


def test_edges_are_uniform_in_asinh():
    edges = Histogram().edges
    assert len(edges) == BINS + 1
    np.testing.assert_allclose(np.arcsinh(edges), EDGES, atol=1e-9)
    assert edges[-1] == pytest.approx(2.0**16)
    middle = np.diff(edges)[BINS // 2 - 20 : BINS // 2 + 20]
    np.testing.assert_allclose(middle, 0.023, rtol=0.12)
    np.testing.assert_allclose(edges[-50:] / edges[-51:-1] - 1, 0.0233, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_exact_away_from_the_edges(dtype):
    rng = np.random.default_rng(0)
    bins = rng.integers(0, BINS, 20_000)
    width = EDGES[1] - EDGES[0]
    x = np.sinh(EDGES[0] + (bins + 0.5 + rng.uniform(-0.4, 0.4, len(bins))) * width)
    histogram = histogram_of(torch.tensor(x, dtype=dtype).reshape(10, 40, 50))
    np.testing.assert_array_equal(histogram.counts, np.bincount(bins, minlength=BINS))
    assert (histogram.minimum, histogram.maximum) == (np.float32(x.min()), np.float32(x.max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gaussian_data_matches_numpy(dtype):
    x = (3 * torch.randn(50_000, generator=torch.Generator().manual_seed(0)) - 1).to(dtype)
    histogram = histogram_of(x)
    values = x.double().numpy()
    expected, _ = np.histogram(np.arcsinh(values), EDGES)
    assert np.abs(histogram.counts - expected).sum() <= 4  # a value on an edge may fall on either side
    assert histogram.counts.sum() == len(values)
    assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())


def test_several_batches_equal_one():
    x = torch.randn(3000, generator=torch.Generator().manual_seed(1)) * 5
    whole, parts = histogram_of(x), histogram_of(x[:1].reshape(1, 1), x[1:700], x[700:].reshape(-1, 2))
    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert (parts.minimum, parts.maximum) == (whole.minimum, whole.maximum)
    assert len(parts.counts) == BINS


def test_outliers_beyond_the_last_bin_are_kept():
    histogram = histogram_of([0.5, 0.5, 1.0e5], [-3.0e30])
    assert (histogram.counts[0], histogram.counts[-1], histogram.counts.sum()) == (1, 1, 4)
    assert (histogram.minimum, histogram.maximum) == (np.float32(-3.0e30), 1.0e5)
    histogram.check("layer")


def test_counts_do_not_saturate_at_the_integers_of_float32():
    count = 2**24 + 2**22
    assert histogram_of(torch.zeros(1, dtype=torch.bfloat16).expand(count)).counts.sum() == count


def test_empty():
    histogram = histogram_of(torch.empty(0, 5))
    assert histogram.counts.sum() == 0
    assert math.isnan(histogram.minimum)
    assert math.isnan(histogram.maximum)
    histogram.check("layer")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_non_finite_values_are_reported_with_the_layer(bad, first):
    good = [1.0, 2.0]
    histogram = histogram_of([0.0, bad], good) if first else histogram_of(good, [bad, 0.0])
    with pytest.raises(CalibrationError, match=r"h\.3\.mlp\.act") as error:
        histogram.check("h.3.mlp.act")
    assert isinstance(error.value, HfOrthoError)
    assert isinstance(error.value, ValueError)


def test_nodes_carry_the_mass_and_the_moments_of_the_data():
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(3)) * 4 + 2
    nodes = histogram_of(x).nodes(Source.of("gelu"))
    assert nodes.w[nodes.data].sum() == pytest.approx(1.0)
    assert nodes.w[~nodes.data].sum() == pytest.approx(5e-3)  # the weight of the largest error on the line
    assert nodes.mean(nodes.x) == pytest.approx(x.mean().item(), abs=0.01)
    assert nodes.mean(nodes.x**2) == pytest.approx((x**2).mean().item(), rel=0.01)
    assert nodes.x[nodes.data].min() >= nodes.minimum == x.min().item()
    assert nodes.x[nodes.data].max() <= nodes.maximum == x.max().item()


def weighed(*batches):
    histogram = histogram_of(*(x for x, _ in batches))
    for x, gradient in batches:
        histogram.weigh(x, gradient)
    return histogram


def expected_importance(*batches):
    """float64 sums of squares by bin, of values rounded to float32."""
    x, g = (
        np.concatenate([v.float().double().numpy().ravel() for v in values]) for values in zip(*batches, strict=True)
    )
    return np.histogram(np.arcsinh(x), EDGES, weights=g**2)[0]


def some(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, g = (scale * torch.randn(shape, generator=generator) for scale in (3.0, 1e-4))
    return x.to(dtype), g.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_importance_against_numpy(dtype):
    batches = [some(50, 40, 3, seed=0, dtype=dtype), some(7, seed=1, dtype=dtype), some(0, 3, seed=2, dtype=dtype)]
    found, expected = weighed(*batches).importance, expected_importance(*batches)
    # a value on an edge may fall on either side: it moves its own weight only
    assert np.abs(found - expected).sum() <= 1e-3 * expected.sum()
    assert found.sum() == pytest.approx(expected.sum(), rel=1e-6)
    assert (np.abs(found - expected) > 1e-5 * expected).sum() <= 4


def test_importance_of_many_equal_values_does_not_saturate():
    x, g = torch.full((2**22 + 100,), 0.5), torch.full((2**22 + 100,), 0.1)
    histogram = weighed((x, g), (x, g))
    assert histogram.importance.sum() == pytest.approx(2 * len(x) * float(g[0].double()) ** 2, rel=2e-3)


def test_importance_of_non_contiguous_values():
    x, g = some(20, 30)
    np.testing.assert_allclose(weighed((x.T, g.T)).importance, weighed((x, g)).importance, rtol=1e-5)


def test_histograms_add_up():
    batches = some(100), some(200, seed=1)
    both, (first, second) = weighed(*batches), map(weighed, batches)
    counted = histogram_of(batches[0][0])
    empty = Histogram()
    for other in (first, second, Histogram()):
        empty.add(other)
    np.testing.assert_array_equal(empty.counts, both.counts)
    np.testing.assert_allclose(empty.importance, both.importance, rtol=1e-6)
    assert (empty.minimum, empty.maximum) == (both.minimum, both.maximum)
    counted.add(second)
    np.testing.assert_allclose(counted.importance, second.importance, rtol=1e-6)
    np.testing.assert_allclose(second.importance, expected_importance(batches[1]), rtol=1e-5, atol=1e-12)


def test_importance_is_scaled():
    histogram, expected = weighed(some(100)), expected_importance(some(100))
    histogram.scale(0.5)
    histogram.scale(0.25)
    np.testing.assert_allclose(histogram.importance, expected / 8, rtol=1e-5, atol=1e-15)
    histogram.scale(0.0)
    assert histogram.importance is None


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, 1e30])  # the last one overflows
def test_importance_that_is_no_weight(bad):
    x, _ = some(100)
    histogram = weighed((x, torch.full_like(x, bad)))
    assert histogram.importance is None
    assert histogram_of(x).importance is None
    nodes, counted = (h.nodes(Source.of("gelu")) for h in (histogram, histogram_of(x)))
    np.testing.assert_array_equal(nodes.w, counted.w)
    assert nodes.effect is None


def test_nodes_are_weighted_by_the_importance():
    x, _ = some(40_000)
    g = 0.1 * torch.exp(-0.25 * (x - 1) ** 2)
    nodes = weighed((x, g)).nodes(Source.of("gelu"))
    e, x, g = (v.double().numpy() for v in (torch.sin(x), x, g))
    assert nodes.w[nodes.data].sum() == pytest.approx(1.0)
    assert nodes.w[~nodes.data].sum() == pytest.approx(2e-4)
    assert nodes.effect == pytest.approx((g**2).sum(), rel=1e-5)
    assert nodes.divergence(np.sin(nodes.x)) == pytest.approx(0.5 * (g**2 * e**2).sum(), rel=1e-3)
    assert nodes.mean_square(np.sin(nodes.x)) == pytest.approx((g**2 * e**2).sum() / (g**2).sum(), rel=1e-3)
    assert nodes.mean(nodes.x**2) == pytest.approx((x**2).mean(), rel=0.01)  # averages are those over the data
    assert nodes.mean(nodes.x < 0) == pytest.approx((x < 0).mean(), abs=0.01)


def test_a_fit_follows_the_importance():
    x = torch.linspace(-3, 3, 20_001)
    where = (x > 1) & (x < 2)
    errors = {}
    for name, g in {"equal": torch.ones_like(x), "some": torch.where(where, 1.0, 1e-3)}.items():
        module = build("hermite_4")
        module.fit("gelu", histogram=weighed((x, g)))
        with torch.no_grad():
            errors[name] = (module(x) - torch.nn.functional.gelu(x)).square()
    assert errors["some"][where].mean() < 0.1 * errors["equal"][where].mean()
    assert errors["some"].mean() > errors["equal"].mean()


def test_collect_sees_what_reaches_the_modules(gpt2, ids, inputs_of):
    model = gpt2(GPT2Model, scale=60)
    names = ["h.0.mlp.act", "h.1.mlp.act"]
    batches = [{"input_ids": ids[:3]}, {"input_ids": ids[3:, :7]}]
    histograms = collect(model, names, batches)
    assert list(histograms) == names
    for name, values in inputs_of(model, names, *batches).items():
        expected, _ = np.histogram(np.arcsinh(values), EDGES)
        assert np.abs(histograms[name].counts - expected).sum() <= 4
        assert (histograms[name].minimum, histograms[name].maximum) == (values.min(), values.max())


def test_collect_leaves_out_modules_that_get_no_input(gpt2, ids):
    model = gpt2()
    model.spare = torch.nn.GELU()
    assert set(collect(model, ["spare", "transformer.h.0.mlp.act"], [ids])) == {"transformer.h.0.mlp.act"}


def test_collect_leaves_no_hooks(gpt2, ids, state_of):
    model = gpt2()
    before = state_of(model)
    collect(model, ["transformer.h.0.mlp.act"], [ids])
    assert state_of(model) == before
    with pytest.raises(CalibrationError):
        collect(model, ["transformer.h.0.mlp.act"], [ids, ids + 97])
    assert state_of(model) == before


def test_collect_names_the_layer_that_overflows(gpt2, ids):
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[5] = math.inf
    with pytest.raises(CalibrationError, match=r"transformer\.h\.1\.mlp\.act"):
        collect(model, ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"], [ids])


def test_update_moves_nothing_to_the_host():
    class Ops(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(func.overloadpacket.__name__)
            assert "device" not in (kwargs or {}) or not args or not isinstance(args[0], torch.Tensor)
            return func(*args, **(kwargs or {}))

    histogram = Histogram()
    with Ops() as ops:
        for x in (torch.randn(100), torch.randn(3, 4, 5)):
            histogram.update(x)
            histogram.weigh(x, x)
    assert {"bincount", "index_add_"} <= ops.names
    assert not ops.names & {"_local_scalar_dense", "item", "copy_"}  # what .item() and .tolist() run
