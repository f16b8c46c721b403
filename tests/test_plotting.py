"""Pictures of activations, read back from the PNG and from the drawn lines; and ``hf-ortho plot``."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn
from transformers.activations import ACT2FN

import hf_ortho.cli.plot
from hf_ortho import Histogram
from hf_ortho.activations import FAMILIES, build
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
def drawn(monkeypatch, tmp_path):
    """Draw without writing; per panel the lines of the upper axes by label, those of the lower, and the upper axes."""

    def drawn(*panels):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
        plot_activations(panels, tmp_path / "unused.png")
        monkeypatch.undo()
        found = []
        for block in figures[0].subfigs:
            if block.axes:
                upper, lower = block.axes[:2]
                found.append(({line.get_label(): line.get_xydata().T for line in upper.lines}, lower.lines, upper))
        return found

    return drawn


@pytest.mark.parametrize("with_histogram", [False, True])
@pytest.mark.parametrize("with_source", [False, True])
def test_png(tmp_path, with_histogram, with_source):
    panel = Panel("h.0.act", fitted(), nn.GELU() if with_source else None, histogram() if with_histogram else None)
    path = tmp_path / "shapes.png"
    plot_activations([panel], path, title="a model")
    image = picture(path)
    assert min(image.shape[:2]) > 300
    light_blue = np.abs(image - np.array([201, 226, 254]) / 255).max(-1) < 0.02
    orange = np.abs(image - np.array([0xC2, 0x41, 0x0C]) / 255).max(-1) < 0.02
    assert (light_blue.sum() > 1000) == with_histogram
    assert orange.sum() > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_lines(drawn, family):
    module = fitted(f"{family}_4")
    ((upper, lower, axes),) = drawn(Panel("h.0.act", module, nn.GELU()))
    assert axes.get_title() == "h.0.act"
    x, learned = upper[f"learned ({family}_4)"]
    assert x[0] <= -4
    assert x[-1] >= 3
    inputs = torch.from_numpy(x)
    np.testing.assert_allclose(learned, module(inputs).detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(upper["source"][1], F.gelu(inputs).numpy(), atol=1e-12)
    np.testing.assert_allclose(lower[0].get_ydata(), learned - F.gelu(inputs).numpy(), atol=1e-12)


def test_without_source_there_is_no_difference(drawn):
    ((upper, lower, _),) = drawn(Panel("act", fitted()))
    assert "source" not in upper
    assert len(lower) == 0


def test_the_interval_follows_the_data(drawn):
    wide = histogram(mean=2.0, sigma=20.0)
    ((upper, _, axes),) = drawn(Panel("act", fitted(), nn.GELU(), wide))
    data = (2.0 + 20.0 * torch.randn(50_000, generator=torch.Generator().manual_seed(0))).numpy()
    expected = np.quantile(data, [1e-4, 1 - 1e-4])
    np.testing.assert_allclose(axes.get_xlim(), expected, rtol=0.05)
    np.testing.assert_allclose(upper["source"][0][[0, -1]], axes.get_xlim())


def test_domain_ends_are_marked(drawn):
    module = fitted(domain=(-2.0, 1.5))
    ((_, _, axes),) = drawn(Panel("act", module))
    marks = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
    assert marks == [-2.0, 1.5]


@pytest.mark.parametrize("family", FAMILIES)
def test_infinite_domain(drawn, family):
    module = build(f"{family}_3")
    ((upper, _, axes),) = drawn(Panel("act", module))
    assert len(axes.lines) == 1
    x, learned = upper[f"learned ({family}_3)"]
    np.testing.assert_allclose(learned, module(torch.from_numpy(x)).detach().numpy())


def test_png_of_an_infinite_domain(tmp_path):
    plot_activations([Panel("act", build("hermite_3"))], tmp_path / "shapes.png")
    assert picture(tmp_path / "shapes.png").size


@pytest.mark.parametrize("count", [2, 5, 12, 13, 30])
def test_at_most_twelve_panels(drawn, count):
    panels = [Panel(f"h.{i}.act", fitted("tropical_rational_1", "relu")) for i in range(count)]
    titles = [axes.get_title() for *_, axes in drawn(*panels)]
    assert len(titles) == min(count, 12)
    indices = np.array([int(title.split(".")[1]) for title in titles])
    assert (indices[0], indices[-1]) == (0, count - 1)
    assert np.ptp(np.diff(indices)) <= 1


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory, gpt2_folder, hf_ortho_command):
    folder = tmp_path_factory.mktemp("plot") / "converted"
    assert hf_ortho_command("convert", gpt2_folder, "-o", folder).code == 0
    return folder


@pytest.fixture
def panels(monkeypatch):
    """The panels that the command draws."""
    found = []
    monkeypatch.setattr(hf_ortho.cli.plot, "plot_activations", lambda panels, *rest: found.extend(panels))
    return found


def test_command(hf_ortho_command, converted, text_file, tmp_path):
    path = tmp_path / "shapes.png"
    ran = hf_ortho_command("plot", converted, "-o", path, "--calibration-data", text_file, "--calibration-samples", 2)
    assert (ran.code, ran.err) == (0, "")
    assert picture(path).size
    assert str(path) in ran.out


def test_command_draws_source_and_data(hf_ortho_command, converted, text_file, panels):
    assert hf_ortho_command("plot", converted, "--calibration-data", text_file, "--calibration-samples", 3).code == 0
    assert [panel.title for panel in panels] == [f"transformer.h.{i}.mlp.act" for i in range(2)]
    x = torch.linspace(-4, 4, 81)
    for panel in panels:
        assert torch.equal(panel.source(x), ACT2FN["gelu_new"](x))
        assert (panel.learned(x) - F.gelu(x)).abs().max() < 1e-2
        assert panel.histogram.counts.sum() == 3 * 32 * 64  # blocks, tokens, channels


def test_command_without_data(hf_ortho_command, converted, panels):
    assert hf_ortho_command("plot", converted).code == 0
    assert [panel.histogram for panel in panels] == [None, None]


def test_the_source_of_a_second_conversion(hf_ortho_command, converted, panels, tmp_path):
    """A learned shape has no name; its initial values are not what was replaced."""
    again = tmp_path / "again"
    assert hf_ortho_command("convert", converted, "-o", again, "--family", "fourier").code == 0
    assert json.loads((again / "config.json").read_text())["activation_function"] == "fourier_6"
    assert hf_ortho_command("plot", again).code == 0
    assert len(panels) == 2
    x = torch.linspace(-4, 4, 81)
    for panel in panels:
        assert panel.source is None or (panel.source(x) - F.gelu(x)).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "shapes.pdf"], "must end in .png"),
        (["-o", "no/such/folder/shapes.png"], "no/such/folder/shapes.png cannot be written"),
        (["--calibration-data", "/no/such/file.txt"], "/no/such/file.txt does not exist"),
        (["--calibration-data", "words.docx"], "words.docx"),
        (["--size", "3"], "unrecognized arguments: --size 3"),
    ],
)
def test_command_refuses(hf_ortho_command, converted, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in hf_ortho_command("plot", converted, *flags).error
    assert list(tmp_path.iterdir()) == []


def test_command_needs_a_converted_model(hf_ortho_command, gpt2_folder, tmp_path):
    for model, message in ((gpt2_folder, "no learnable activations"), (tmp_path / "missing", "does not exist")):
        assert message in hf_ortho_command("plot", model, "-o", tmp_path / "shapes.png").error
    assert list(tmp_path.iterdir()) == []
