"""Plot trainings with several activations: losses, their differences, and the final metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import written
from .layout import BLACK, BLUE, GRAY, SKY, VERMILION, literal

COLORS = (BLACK, VERMILION, BLUE, "#009E73", "#CC79A7", "#E69F00", SKY, GRAY)
SMOOTHING = 0.05  # window of the running mean of differences, as a fraction of the training

Curve = Sequence[tuple[int, float]]


def plot_comparison(
    curves: Mapping[str, Mapping[int, Curve]],
    finals: Mapping[str, Mapping[int, float]],
    metric: str,
    title: str,
    path: str | Path,
    unit: str = "nats",
) -> None:
    """Write a PNG with three panels.

    Args:
        curves: by activation and seed, (optimizer step, training loss) pairs; the first activation is the reference.
        finals: by activation and seed, the final metric; at least one activation.
        unit: of the training loss.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    figure = Figure(figsize=(15, 4.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    losses, gaps, final = figure.subplots(1, 3)
    reference = next(iter(curves))
    reach = 0.0  # of all differences after the first fifth
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(curves)}
    for name, by_seed in curves.items():
        if not by_seed:
            continue
        steps, table = _aligned(list(by_seed.values()))
        losses.plot(steps, table.mean(0), lw=1.2, color=colors[name], label=name)
        common = [seed for seed in by_seed if seed in curves[reference]]
        if name == reference or not common:
            continue
        steps, loss = _aligned([by_seed[seed] for seed in common])
        _, reference_loss = _aligned([curves[reference][seed] for seed in common])
        n = min(loss.shape[1], reference_loss.shape[1])
        gap = _smooth(loss[:, :n] - reference_loss[:, :n])
        reach = max(reach, np.abs(gap[:, n // 5 :]).max())
        gaps.plot(steps[:n], gap.mean(0), lw=1.4, color=colors[name], label=name)
        if len(common) > 1:
            gaps.fill_between(steps[:n], gap.min(0), gap.max(0), color=colors[name], alpha=0.15, lw=0)
    losses.set(title="training loss, mean over seeds", xlabel="optimizer step", ylabel=unit)
    if losses.lines:
        losses.legend(fontsize=8)
    gaps.axhline(0, color=BLACK, lw=1.0)
    gaps.set(
        title=f"training loss minus the loss of {reference}, same seed\n(running mean; band: all seeds)",
        xlabel="optimizer step",
        ylabel=unit,
    )
    if reach > 0:
        gaps.set_ylim(-1.3 * reach, 1.3 * reach)
    for i, (name, values) in enumerate(finals.items()):
        final.plot([i] * len(values), list(values.values()), "o", ms=4, color=colors.get(name, GRAY), alpha=0.6)
        final.plot([i - 0.25, i + 0.25], [np.mean(list(values.values()))] * 2, lw=2, color=colors.get(name, GRAY))
    final.set_xticks(range(len(finals)), list(finals), rotation=30, ha="right", fontsize=8)
    final.set(title=f"{metric} after training\n(bar: mean; points: seeds)")
    figure.suptitle(literal(title))
    with written(path) as draft:
        figure.savefig(draft, format="png")


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
