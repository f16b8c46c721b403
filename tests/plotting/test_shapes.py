"""Pictures of activations, read back from the PNG and from the drawn artists."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.cbook import is_math_text
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from torch import nn

from hf_ortho import Histogram
from hf_ortho.activations import FAMILIES, build
from hf_ortho.errors import OutputError
from hf_ortho.plotting import Panel, plot_activations


def fitted(name="hermite_8", fn="gelu", **options):
    module = build(name)
    module.fit(fn, **options)
    return module


def histogram(mean=-1.0, sigma=3.0):
    found = Histogram()
    found.update(mean + sigma * torch.randn(50_000, generator=torch.Generator().manual_seed(0)))
    return found


def picture(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return imread(path)[..., :3]


@pytest.fixture
def drawn(figure_of):
    """Per panel the lines of the upper axes by label, those of the lower, and the axes; and the figure."""

    def drawn(*panels, **options):
        figure = figure_of(plot_activations, panels, **options)
        upper = [axes for axes in figure.axes if axes.get_title()]
        differences = [axes for axes in figure.axes if axes not in upper]
        differences = differences or [None] * len(upper)
        found = [
            ({line.get_label(): line.get_xydata().T for line in axes.lines}, below, axes)
            for axes, below in zip(upper, differences, strict=True)
        ]
        return found, figure

    return drawn


@pytest.mark.parametrize("with_histogram", [False, True])
@pytest.mark.parametrize("with_source", [False, True])
def test_png(tmp_path, with_histogram, with_source):
    panel = Panel("h.0.act", fitted(), nn.GELU() if with_source else None, histogram() if with_histogram else None)
    path = tmp_path / "shapes.png"
    plot_activations([panel], path, title="a model")
    assert min(picture(path).shape[:2]) > 300
    assert [p.name for p in tmp_path.iterdir()] == ["shapes.png"]


@pytest.mark.parametrize("family", FAMILIES)
def test_lines(drawn, family):
    module = fitted(f"{family}_4")
    ((upper, lower, axes),), figure = drawn(Panel("h.0.act", module, nn.GELU()), title="a model")
    assert axes.get_title() == "h.0.act"
    assert figure.get_suptitle() == "a model"
    x, learned = upper[f"learned ({family}_4)"]
    assert x[0] <= -4
    assert x[-1] >= 3
    inputs = torch.from_numpy(x)
    np.testing.assert_allclose(learned, module(inputs).detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(upper["source"][1], F.gelu(inputs).numpy(), atol=1e-12)
    (difference,) = (line for line in lower.lines if len(line.get_xdata()) == len(x))
    np.testing.assert_allclose(difference.get_ydata(), learned - F.gelu(inputs).numpy(), atol=1e-12)


def test_axes_are_named(drawn):
    ((_, lower, axes),), figure = drawn(Panel("act", fitted(), nn.GELU(), histogram()))
    assert axes.get_ylabel() == "activation"
    assert lower.get_xlabel() == "pre-activation"
    assert lower.get_ylabel() == "difference\nfrom source"
    assert figure.axes == [axes, lower]
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"learned (hermite_8)", "source", "domain [lo, hi]", "pre-activations"}


def test_the_histogram_is_scaled_to_the_axes(drawn):
    """It is that of a normal distribution; its bins are not equally wide."""
    ((_, _, axes),), _ = drawn(Panel("act", fitted(), nn.GELU(), histogram(mean=-1.0, sigma=3.0)))
    (behind,) = (area for area in axes.collections if area.get_label() == "pre-activations")
    x, y = behind.get_paths()[0].vertices.T
    assert y.max() == pytest.approx(0.95)
    heights = np.array([y[(np.abs(x + 1 - 3 * away) < 0.3) & (y > 0)].mean() for away in (-2, -1, 0, 1, 2)])
    np.testing.assert_allclose(heights / heights[2], np.exp([-2, -0.5, 0, -0.5, -2]), atol=0.05)


def test_without_source_there_is_no_difference(drawn):
    ((upper, lower, _),), figure = drawn(Panel("act", fitted()))
    assert "source" not in upper
    assert lower is None
    assert len(figure.axes) == 1


def test_one_unknown_source_of_two(drawn):
    (_, (_, lower, _)), _ = drawn(Panel("h.0.act", fitted(), nn.GELU()), Panel("h.1.act", fitted()))
    assert [text.get_text() for text in lower.texts] == ["source unknown"]


def test_the_other_checkpoint(drawn):
    learned, other = fitted(), fitted("fourier_4")
    ((upper, lower, _),), _ = drawn(Panel("act", learned, nn.GELU(), None, other), other="before")
    x, y = upper["before (fourier_4)"]
    inputs = torch.from_numpy(x)
    np.testing.assert_allclose(y, other(inputs).detach().numpy(), atol=1e-12)
    differences = [line.get_ydata() for line in lower.lines if len(line.get_xdata()) == len(x)]
    expected = [module(inputs).detach().numpy() - F.gelu(inputs).numpy() for module in (learned, other)]
    np.testing.assert_allclose(differences, expected, atol=1e-12)


def test_the_other_checkpoint_without_a_source(drawn):
    learned, other = fitted(), fitted("fourier_4")
    ((upper, lower, _),), _ = drawn(Panel("act", learned, None, None, other))
    x, y = upper["learned (hermite_8)"]
    assert lower.get_ylabel() == "difference\nfrom other"
    (difference,) = (line.get_ydata() for line in lower.lines if len(line.get_xdata()) == len(x))
    np.testing.assert_allclose(difference, y - other(torch.from_numpy(x)).detach().numpy(), atol=1e-12)


def test_styles_differ_in_more_than_color(drawn):
    ((_, _, axes),), _ = drawn(Panel("act", fitted(), nn.GELU(), None, fitted()))
    curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len({line.get_linestyle() for line in curves}) == 3
    okabe_ito = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}
    assert {to_hex(line.get_color()) for line in curves} <= okabe_ito


def test_the_interval_follows_the_data(drawn):
    wide = histogram(mean=2.0, sigma=20.0)
    ((upper, lower, axes),), _ = drawn(Panel("act", fitted(), nn.GELU(), wide))
    data = (2.0 + 20.0 * torch.randn(50_000, generator=torch.Generator().manual_seed(0))).numpy()
    expected = np.quantile(data, [1e-4, 1 - 1e-4])
    np.testing.assert_allclose(axes.get_xlim(), expected, rtol=0.05)
    assert lower.get_xlim() == axes.get_xlim()
    np.testing.assert_allclose(upper["source"][0][[0, -1]], axes.get_xlim())


@pytest.mark.parametrize("domain", [(-2.0, 1.5), (-9.0, 14.0)])
def test_the_domain_is_marked(drawn, domain):
    ((_, lower, axes),), _ = drawn(Panel("act", fitted(domain=domain), nn.GELU()))
    assert axes.get_xlim()[0] < domain[0]
    assert domain[1] < axes.get_xlim()[1]
    for each in (axes, lower):
        lines = [line.get_xdata()[0] for line in each.lines if line.get_linestyle() == ":"]
        assert lines == list(domain)
        (shade,) = each.patches
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == domain


@pytest.mark.parametrize("family", FAMILIES)
def test_infinite_domain(drawn, family):
    module = build(f"{family}_3")
    ((upper, _, axes),), figure = drawn(Panel("act", module))
    assert len(axes.lines) == 1
    assert len(axes.patches) == 0
    assert len(figure.legends[0].get_texts()) == 1
    x, learned = upper[f"learned ({family}_3)"]
    np.testing.assert_allclose(learned, module(torch.from_numpy(x)).detach().numpy())


@pytest.fixture(scope="module")
def step():
    return fitted("tropical_rational_1", "relu")


@pytest.mark.parametrize("count", [3, 12, 48])
def test_every_layer_is_drawn(drawn, step, count):
    found, figure = drawn(*(Panel(f"model.h.{i}.act", step, nn.ReLU()) for i in range(count)), title="a model")
    assert [axes.get_title() for *_, axes in found] == [str(i) for i in range(count)]
    assert figure.get_suptitle() == "a model\nmodel.h.*.act"


def test_deep_models_are_thinned_and_the_title_says_so(drawn, step):
    found, figure = drawn(*(Panel(f"h.{i}.act", step) for i in range(96)))
    indices = np.array([int(axes.get_title()) for *_, axes in found])
    assert (len(indices), indices[0], indices[-1]) == (64, 0, 95)
    assert np.ptp(np.diff(indices)) <= 1
    assert "64 of 96 activations" in figure.get_suptitle()


def test_many_panels_share_their_axes(drawn, step):
    data = [histogram(sigma=1.0 + i) for i in range(13)]
    panels = [Panel(f"h.{i}.act", step, nn.GELU() if i else None, data[i]) for i in range(13)]
    found, _ = drawn(*panels)
    assert len({axes.get_xlim() for *_, axes in found}) == 1
    assert len({axes.get_ylim() for *_, axes in found}) == 1
    assert len({lower.get_ylim() for _, lower, _ in found[1:]}) == 1


def test_one_layer_with_far_data_does_not_shrink_the_others(drawn, step):
    sigmas = [1.0] * 12 + [100.0]
    found, _ = drawn(*(Panel(f"h.{i}.act", step, nn.ReLU(), histogram(0.0, sigma)) for i, sigma in enumerate(sigmas)))
    assert found[0][2].get_xlim() == found[12][2].get_xlim()
    assert found[0][2].get_xlim() == pytest.approx((-4.0, 3.7), abs=0.5)


def test_long_titles_are_wrapped_in_full(drawn, step):
    paths = [f"vision_model_with_a_name.encoder_of_{kind}.layers.7.act" for kind in ("images", "text")] * 10
    found, _ = drawn(*(Panel(path, step) for path in paths))
    for (*_, axes), kind in zip(found, ("images", "text") * 10, strict=True):
        assert axes.get_title().replace("\n", "") == f"encoder_of_{kind}"
    (*_, axes), *_ = drawn(Panel(paths[0] + paths[0], step))[0]
    lines = axes.get_title().splitlines()
    assert "".join(lines) == paths[0] * 2
    assert len(lines) > 1
    assert max(map(len, lines)) <= 80


def test_a_failure_leaves_the_old_picture(tmp_path, step, monkeypatch):
    path = tmp_path / "shapes.png"
    path.write_bytes(b"old")

    def fail(figure, draft, *args, **kwargs):
        draft.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OutputError, match=r"shapes.png cannot be written: No space left"):
        plot_activations([Panel("act", step)], path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_names_are_drawn_as_they_are(figure_of):
    names = ["$\\frac{$", "$x$\\$1", "h.\x1b[31m.act", "a_{b}^c", "ab." * 20_000]
    panels = [Panel(name, build("hermite_2"), None, None, build("hermite_4")) for name in names]
    figure = figure_of(plot_activations, panels, title=names[0], other=names[-1])
    texts = {text.get_text().replace("\n", "") for text in figure.findobj(Text)}
    assert {r"\$\frac{\$", r"\$x\$\\$1", r"h.\x1b[31m.act", "a_{b}^c"} <= texts
    assert not any(is_math_text(text) for text in texts)
    assert max(map(len, texts)) < 400


def in_groups(name, seed=0):
    """An activation whose groups have parameters and domains of their own."""
    module = fitted(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key != "tail_slopes":
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def bands(axes):
    """The lower and the upper edge of each shaded band of groups, by its label."""
    found = {}
    for band in axes.collections:
        if "groups" in band.get_label():
            x, y = band.get_paths()[0].vertices.T
            found[band.get_label().partition(" (")[0]] = np.array([[y[x == v].min(), y[x == v].max()] for v in set(x)])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_channels_are_bands_around_their_median(drawn, family):
    module = in_groups(f"{family}_4_g6")
    (((lines, below, axes),), _) = drawn(Panel("act", module, nn.GELU()))
    x, median = lines[f"learned ({module.name})"]
    points = torch.tensor(x)
    with torch.no_grad():
        each = np.stack([member(points).numpy() for member in module.members()])
        source = F.gelu(points).numpy()
    np.testing.assert_allclose(median, np.median(each, axis=0), atol=1e-12)
    found = bands(axes)
    assert found.keys() == {"all groups", "90 % of groups"}
    np.testing.assert_allclose([found["all groups"].min(), found["all groups"].max()], [each.min(), each.max()])
    widths = {kind: np.sort(np.diff(edges).ravel()) for kind, edges in found.items()}
    np.testing.assert_allclose(widths["all groups"], np.sort(np.ptp(each, axis=0)), atol=1e-12)
    assert (widths["90 % of groups"] <= widths["all groups"]).all()
    (change,) = (line.get_ydata() for line in below.lines if len(line.get_xdata()) == len(x))
    np.testing.assert_allclose(change, np.median(each - source, axis=0), atol=1e-12)
    lo, hi = module.domain.detach().numpy().T
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert marks == [end for end in (lo.min(), lo.max(), hi.min(), hi.max()) if np.isfinite(end)]


def test_groups_against_other_groups(drawn):
    """Of 2 and of 3 groups: their difference has 6 parts."""
    ours, other = in_groups("hermite_3_g2"), in_groups("hermite_3_g3", seed=1)
    (((lines, below, _),), _) = drawn(Panel("act", ours, other=other))
    x = torch.tensor(lines["learned (hermite_3_g2)"][0])
    with torch.no_grad():
        pairs = [(ours.members()[i // 3], other.members()[i // 2]) for i in range(6)]
        expected = np.median([(a(x) - b(x)).numpy() for a, b in pairs], axis=0)
    (change,) = (line.get_ydata() for line in below.lines if len(line.get_xdata()) == len(x))
    np.testing.assert_allclose(change, expected, atol=1e-12)
