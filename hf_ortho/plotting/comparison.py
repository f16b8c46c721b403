"""Plot trainings with several activations: losses, their differences, and the final metric."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import written
from .layout import BLACK, BLUE, GRAY, GREEN, ORANGE, PURPLE, SKY, VERMILION, literal

COLORS = (BLACK, VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY, GRAY)
MARKERS = "osD^vP*X"
SMOOTHING = 0.05  # window of the running mean of differences, as a fraction of the training

Curve = Sequence[tuple[int, float]]


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A color and a marker for each activation."""
    pairs = zip(names, itertools.cycle(COLORS), itertools.cycle(MARKERS), strict=False)
    return {name: {"color": color, "marker": marker, "markersize": 5} for name, color, marker in pairs}


def plot_comparison(
    curves: Mapping[str, Mapping[int, Curve]],
    finals: Mapping[str, Mapping[int, float]],
    metric: str,
    title: str,
    path: str | Path,
    unit: str = "nats",
) -> None:
    """Write a PNG: the differences of the losses above, the losses and the final metric below.

    Args:
        curves: by activation and seed, (optimizer step, training loss) pairs; the first activation is the reference.
        finals: by activation and seed, the final metric; at least one activation.
        title: what was run, written small below the panels.
        unit: of the training loss.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    figure = Figure(figsize=(6.0, 6.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic([["gaps", "gaps"], ["losses", "final"]], height_ratios=[1.2, 1])
    losses, gaps, final = (panels[name] for name in ("losses", "gaps", "final"))
    looks = styles(list(curves))
    for name, by_seed in curves.items():
        if by_seed:
            steps, table = _aligned(list(by_seed.values()))
            losses.plot(steps, table.mean(0), lw=1.4, color=looks[name]["color"])
    losses.set_title("training loss", fontsize=10)
    losses.set_xlabel("step", fontsize=10)
    losses.set_ylabel(unit, fontsize=10)
    draw_differences(gaps, curves, unit)
    for i, (name, values) in enumerate(finals.items()):
        look = looks.get(name, {"color": GRAY, "marker": "o"})
        final.plot([i] * len(values), list(values.values()), ls="", alpha=0.6, **(look | {"markersize": 4}))
        final.plot([i - 0.3, i + 0.3], [np.mean(list(values.values()))] * 2, lw=2.5, color=look["color"])
    final.set_xticks(range(len(finals)), list(finals), rotation=40, ha="right", rotation_mode="anchor")
    final.set_title(metric, fontsize=10)
    for axes in panels.values():
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.25, lw=0.5)
    for axis in (losses.xaxis, losses.yaxis, final.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    figure.supxlabel(literal(textwrap.fill(title, 100)), fontsize=7, color=GRAY)
    with written(path) as draft:
        figure.savefig(draft, format="png")


def draw_differences(axes: Axes, curves: Mapping[str, Mapping[int, Curve]], unit: str = "nats") -> None:
    """Draw the training losses minus those of the first activation with the same seed: running means, averaged over
    the seeds, in a band that holds them all. The arguments are those of ``plot_comparison``."""
    reference, *others = curves
    looks = styles(list(curves))
    reach = 0.0  # of all differences after the first fifth
    for name in others:
        common = [seed for seed in curves[name] if seed in curves[reference]]
        if not common:
            continue
        steps, loss = _aligned([curves[name][seed] for seed in common])
        _, reference_loss = _aligned([curves[reference][seed] for seed in common])
        n = min(loss.shape[1], reference_loss.shape[1])
        gap = _smooth(loss[:, :n] - reference_loss[:, :n])
        reach = max(reach, np.abs(gap[:, n // 5 :]).max())
        axes.plot(steps[:n], gap.mean(0), lw=1.8, label=name, markevery=(n // 8, max(1, n // 4)), **looks[name])
        if len(common) > 1:
            axes.fill_between(steps[:n], gap.min(0), gap.max(0), color=looks[name]["color"], alpha=0.15, lw=0)
    axes.axhline(0, color=BLACK, lw=1.0)
    axes.set_title(f"training loss minus {reference}'s, same seed", fontsize=11)
    axes.set_xlabel("optimizer step", fontsize=10)
    axes.set_ylabel(unit, fontsize=10)
    axes.locator_params(nbins=5)
    if reach > 0:
        axes.set_ylim(-1.3 * reach, 1.3 * reach)
        axes.legend(fontsize=9, ncols=2, frameon=False, loc="best")


def _aligned(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, (n,), and values, (curves, n), up to the end of the shortest curve."""
    n = min(map(len, curves))
    return np.array([step for step, _ in curves[0][:n]]), np.array([[value for _, value in c[:n]] for c in curves])


def _smooth(y: np.ndarray) -> np.ndarray:
    """The running mean along the last axis, with shorter windows at the ends."""
    width = min(max(1, int(SMOOTHING * y.shape[-1])), (y.shape[-1] - 1) // 2)
    kernel = np.ones(2 * width + 1)
    count = np.convolve(np.ones(y.shape[-1]), kernel, "same")
    return np.stack([np.convolve(row, kernel, "same")[: len(count)] / count for row in y])
