"""Pictures of a training's course, read back from the drawn lines and from the frames of the GIF."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ortho.activations import FAMILIES, build
from hf_ortho.errors import OutputError
from hf_ortho.plotting import Snapshot, animate_history, plot_history


def moved(name, by):
    module = build(name)
    module.fit("gelu")
    with torch.no_grad():
        next(parameter for key, parameter in module.named_parameters() if key != "domain")[-1] += by
    return module


def history(name="hermite_4", layers=1, end=True):
    """Steps 10, 20, 40 and, if wanted, the end."""
    shifts = [0.0, 0.1, 0.3, 0.4] if end else [0.0, 0.1, 0.3]
    paths = [f"h.{i}.act" for i in range(layers)]
    modules = [{path: moved(name, shift) for path in paths} for shift in shifts]
    known = [Snapshot(entry, step) for entry, step in zip(modules, (10, 20, 40), strict=False)]
    return [*known, Snapshot(modules[3], name="a model")] if end else known


def curves(axes):
    return [line for line in axes.lines if len(line.get_xdata()) > 2]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_curves(figure_of, family):
    snapshots = history(f"{family}_4")
    figure = figure_of(plot_history, snapshots)
    upper, lower = figure.axes[:2]
    x = curves(upper)[0].get_xdata()
    expected = [s.modules["h.0.act"](torch.from_numpy(x)).detach().numpy() for s in snapshots]
    np.testing.assert_allclose([line.get_ydata() for line in curves(upper)], expected, atol=1e-12)
    np.testing.assert_allclose([line.get_ydata() for line in curves(lower)], expected - expected[0], atol=1e-12)
    assert np.abs(expected[2] - expected[0]).max() > 1e-3
    assert lower.get_ylabel() == "change since\nstep 10"


def test_colors_follow_the_steps(figure_of):
    figure = figure_of(plot_history, history())
    lines = curves(figure.axes[0])
    assert [line.get_linestyle() for line in lines] == ["--", "-", "-", "-."]
    lightness = [np.dot(line.get_color()[:3], (0.299, 0.587, 0.114)) for line in lines[:3]]
    assert lightness[0] < lightness[1] < lightness[2]
    (bar,) = (axes for axes in figure.axes if axes.get_ylabel() == "optimizer step")
    assert list(bar.get_yticks()) == [10, 20, 40]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"step 10, the first", "end (a model)"} <= set(legend)


@pytest.mark.parametrize("layers", [3, 13])
def test_one_panel_per_layer(figure_of, layers):
    modules = [moved("tropical_2", by) for by in (0.0, 0.2)]
    snapshots = [Snapshot({f"h.{i}.act": m for i in range(layers)}, step) for step, m in enumerate(modules)]
    figure = figure_of(plot_history, snapshots, title="a run")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert (len(titles), titles[0], titles[-1]) == (layers, "0", str(layers - 1))
    assert figure.get_suptitle().startswith("a run\nh.*.act")


def test_one_step_and_the_end_need_no_color_bar(figure_of):
    figure = figure_of(plot_history, [history()[0], history()[3]])
    assert len(figure.axes) == 2
    assert len(curves(figure.axes[0])) == 2


def test_animation(tmp_path, monkeypatch):
    """One frame per snapshot; between two frames only the title and the insides of the panels change."""
    from matplotlib.animation import PillowWriter

    seen = []
    grab = PillowWriter.grab_frame

    def grab_frame(writer, **kwargs):
        axes = writer.fig.axes[0]
        lines = [line.get_ydata().copy() for line in curves(axes)]
        position = tuple(axes.get_position().bounds)
        seen.append((writer.fig.get_suptitle(), axes.get_xlim(), axes.get_ylim(), position, lines))
        grab(writer, **kwargs)

    monkeypatch.setattr(PillowWriter, "grab_frame", grab_frame)
    snapshots = history()
    path = tmp_path / "shapes.gif"
    animate_history(snapshots, path, title="a run")
    with Image.open(path) as image:
        assert (image.format, image.n_frames) == ("GIF", 4)
    assert [title.splitlines()[-1] for title, *_ in seen] == ["step 10", "step 20", "step 40", "end (a model)"]
    assert len({(xlim, ylim, position) for _, xlim, ylim, position, _ in seen}) == 1
    (_, xlim, (low, high), *_) = seen[0]
    x = torch.linspace(*xlim, len(seen[0][-1][0]), dtype=torch.float64)
    for snapshot, (*_, (start, now)) in zip(snapshots, seen, strict=True):
        np.testing.assert_allclose(start, snapshots[0].modules["h.0.act"](x).detach().numpy(), atol=1e-12)
        np.testing.assert_allclose(now, snapshot.modules["h.0.act"](x).detach().numpy(), atol=1e-12)
        assert low < now.min()
        assert now.max() < high
    assert [p.name for p in tmp_path.iterdir()] == ["shapes.gif"]


@pytest.mark.parametrize(("draw", "name"), [(plot_history, "x.png"), (animate_history, "x.gif")])
def test_a_folder_that_is_missing(tmp_path, draw, name):
    with pytest.raises(OutputError, match="cannot be written"):
        draw(history(end=False), tmp_path / "none" / name)
    assert list(tmp_path.iterdir()) == []


def test_groups_of_channels_are_drawn_by_their_median(figure_of):
    modules = [build("hermite_3_g5") for _ in range(2)]
    with torch.no_grad():
        modules[1].coefficients[:, 1] += torch.tensor([0.1, 0.2, 0.4, 0.5, 0.9])  # times He_1(x) = x
    snapshots = [Snapshot({"act": module}, step=i) for i, module in enumerate(modules)]
    upper, lower = figure_of(plot_history, snapshots).axes[:2]
    x, y = curves(lower)[1].get_data()
    np.testing.assert_allclose(y, 0.4 * x, atol=1e-6)
    labels = {band.get_label() for band in upper.collections}
    assert labels == {f"{kind} groups (at the end; lines: medians)" for kind in ("all", "90 % of")}
