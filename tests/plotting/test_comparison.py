"""Pictures of a comparison, read back from what is drawn."""

import numpy as np
import pytest

from hf_ortho.errors import OutputError
from hf_ortho.plotting.comparison import plot_comparison

STEPS = np.arange(10, 410, 10)


def curves(shift, seeds=(0, 1), length=40):
    """Losses that fall alike for every activation, apart from ``shift`` and an own level for each seed."""
    falling = 5.0 / np.sqrt(STEPS[:length])
    return {seed: list(zip(STEPS[:length].tolist(), falling + seed + shift, strict=True)) for seed in seeds}


def drawn(figure_of, names, **options):
    finals = {name: {0: float(i), 1: i + 1.0} for i, name in enumerate(names)}
    return figure_of(lambda path: plot_comparison(names, finals, "loss (nats)", "a title", path), **options)


def test_mean_losses_and_paired_differences(figure_of):
    figure = drawn(figure_of, {"gelu": curves(0.0), "hermite_3": curves(-0.3), "tropical_5": curves(0.1, seeds=(1,))})
    gaps, losses, final = figure.axes
    expected = 5.0 / np.sqrt(STEPS)
    for line, level in zip(losses.lines, (0.5, 0.2, 1.1), strict=True):
        np.testing.assert_allclose(line.get_ydata(), expected + level)
    first, second, zero = gaps.lines
    np.testing.assert_allclose(first.get_ydata(), -0.3)
    np.testing.assert_allclose(second.get_ydata(), 0.1)  # only the seed that both have counts
    assert [line.get_label() for line in (first, second)] == ["hermite_3", "tropical_5"]
    assert list(zero.get_ydata()) == [0, 0]
    assert len({line.get_marker() for line in (first, second)}) == 2  # told apart without color
    assert [text.get_text() for text in final.get_xticklabels()] == ["gelu", "hermite_3", "tropical_5"]
    np.testing.assert_allclose(final.lines[3].get_ydata(), [1.5, 1.5])


def test_the_unit_of_the_loss_is_on_both_axes(figure_of):
    names = {"gelu": curves(0.0), "hermite_3": curves(-0.3)}
    finals = {name: {0: 1.0} for name in names}
    for unit, options in (("nats", {}), ("mean squared error", {"unit": "mean squared error"})):
        figure = figure_of(lambda path, options=options: plot_comparison(names, finals, "", "", path, **options))
        assert [axes.get_ylabel() for axes in figure.axes[:2]] == [unit] * 2


def test_the_band_is_not_cut_off(figure_of):
    """The differences of two seeds, -0.3 and 0.5, are on both sides of their mean."""
    wide = {0: curves(-0.3)[0], 1: curves(0.5)[1]}
    low, high = drawn(figure_of, {"gelu": curves(0.0), "hermite_3": wide}).axes[0].get_ylim()
    assert (low, high) == (pytest.approx(-0.65), pytest.approx(0.65))


def test_noise_is_smoothed_but_not_the_level(figure_of):
    noisy = {0: [(step, loss + 0.2 * (-1) ** i) for i, (step, loss) in enumerate(curves(-0.3, seeds=(0,))[0])]}
    gap = drawn(figure_of, {"gelu": curves(0.0, seeds=(0,)), "hermite_3": noisy}).axes[0].lines[0].get_ydata()
    assert np.abs(gap + 0.3).max() < 0.11
    assert np.mean(gap) == pytest.approx(-0.3, abs=0.01)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_few_points(figure_of, length):
    found = {"gelu": curves(0.0, length=length), "hermite_3": curves(-0.3, length=length)}
    np.testing.assert_allclose(drawn(figure_of, found).axes[0].lines[0].get_ydata(), [-0.3] * length)


def test_nothing_logged(figure_of):
    gaps, losses, _ = drawn(figure_of, {"gelu": {}, "hermite_3": {}}).axes
    assert gaps.get_legend() is None
    assert len(losses.lines) == 0


@pytest.mark.parametrize("names", [["gelu"], ["gelu", "hermite_3"]])
def test_runs_of_different_or_no_length(figure_of, names):
    found = {name: curves(0.0, length=length) for name, length in zip(names, (40, 7), strict=False)}
    figure = drawn(figure_of, found | {"fourier_5": {}})
    assert len(figure.axes[0].lines) == len(names)
    if len(names) == 2:
        assert len(figure.axes[0].lines[0].get_xdata()) == 7


def test_a_picture_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="nowhere"):
        plot_comparison({"gelu": curves(0.0)}, {"gelu": {0: 1.0}}, "loss", "", tmp_path / "nowhere" / "drawn.png")
