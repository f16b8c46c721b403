"""Plot source and learned shapes over the histogram of their pre-activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from transformers.activations import ACT2FN

from ..activations import LearnableActivation
from ..checkpoints.activations import StoredActivations
from ..files import written
from ..fitting.histogram import Histogram
from ..path_patterns import thin
from .layout import BLACK, BLUE, MAX_PANELS, SKY, VERMILION, Grid, difference, draw_curve, interval, mark_domain, values

POINTS = 801
STYLES: list[dict[str, Any]] = [
    {"color": VERMILION, "lw": 2.0},  # the learned shape
    {"color": BLUE, "lw": 1.4, "ls": "-."},  # the shape in the other checkpoint
]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One activation to draw.

    Attributes:
        title: its path in the model.
        learned: the activation.
        source: the function that it replaced, None if unknown.
        histogram: the histogram of its pre-activations, None if unknown.
        other: the same activation in another checkpoint, or None.

    Example:
        >>> from hf_ortho.plotting import Panel
        >>> panel = Panel("act", hf_ortho.activations.Hermite(4), source=torch.nn.GELU())
        >>> panel.has_data
        False
    """

    title: str
    learned: LearnableActivation
    source: nn.Module | None = None
    histogram: Histogram | None = None
    other: LearnableActivation | None = None

    @property
    def modules(self) -> list[LearnableActivation]:
        return [self.learned] if self.other is None else [self.learned, self.other]

    @property
    def has_data(self) -> bool:
        return self.histogram is not None and bool(self.histogram.counts.any())


def _interval(panel: Panel) -> tuple[float, float]:
    """From the 1e-4 to the 1 - 1e-4 quantile of the data, extended to include [-4, 3] and the domain."""
    lo, hi = -5.0, 4.0
    if panel.histogram is not None and panel.has_data:
        cumulative = np.cumsum(panel.histogram.counts) / panel.histogram.counts.sum()
        edges = panel.histogram.edges
        lo, hi = (float(edges[np.searchsorted(cumulative, q)]) for q in (1e-4, 1 - 1e-4))
        lo, hi = min(lo, -4.0), max(hi, 3.0)
    return interval(panel.modules, lo, hi)


def plot_activations(panels: Sequence[Panel], path: str | Path, title: str = "", *, other: str = "the other") -> None:
    """Write the figure of ``draw_activations`` as a PNG, atomically.

    Raises:
        OutputError: ``path`` cannot be written.

    Example:
        >>> from hf_ortho.plotting import Panel, plot_activations
        >>> panel = Panel("act", hf_ortho.activations.Hermite(4), source=torch.nn.GELU())
        >>> plot_activations([panel], "activations.png", "A Hermite activation")
    """
    figure = draw_activations(panels, title, other=other)
    with written(path) as draft:
        figure.savefig(draft)


def plot_stored(
    stored: StoredActivations,
    path: str | Path,
    name: str,
    *,
    histograms: Mapping[str, Histogram] | None = None,
    others: Mapping[str, LearnableActivation] | None = None,
    other: str = "the other",
) -> None:
    """Write a PNG of the activations of a checkpoint, each with the source recorded in its config.

    Args:
        name: the name of the checkpoint, for the title.
        histograms: the histograms of the pre-activations, by the path of the activation.
        others, other: the same activations in another checkpoint, and its name.

    Raises:
        OutputError: ``path`` cannot be written.

    Example:
        >>> from hf_ortho.checkpoints.activations import load_activations
        >>> from hf_ortho.plotting import plot_stored
        >>> report = hf_ortho.convert(model, "hermite_4")
        >>> model.save_pretrained("converted")
        >>> plot_stored(load_activations("converted"), "activations.png", "converted")
    """
    names = stored.provenance.source_names(stored.modules)
    sources = {source: ACT2FN[source] for source in names.values() if source in ACT2FN}
    panels = [
        Panel(place, module, sources.get(names[place]), (histograms or {}).get(place), (others or {}).get(place))
        for place, module in stored.modules.items()
    ]
    if known := sorted({source for source in names.values() if source}):
        name += f": {', '.join(sorted({module.name for module in stored.modules.values()}))} for {', '.join(known)}"
    plot_activations(panels, path, name, other=other)


def draw_activations(panels: Sequence[Panel], title: str = "", *, other: str = "the other") -> Figure:
    """Draw, per activation, the learned shape, its source (dashed), the data behind and the difference below.

    Up to 12 activations have separate axes; more share their axes in a compact grid. Of more than 64 activations, 64
    evenly spaced ones are drawn, with a note in the title. The domain is shaded. Of an activation with groups of
    channels, the median over the groups is drawn, in bands that hold 90 % and all of them. The difference is relative
    to the source, or to ``Panel.other`` if no source is known.

    Args:
        panels: one per activation, at least one.
        title: title of the figure, followed by the common part of the panels' paths.
        other: the name of the checkpoint of ``Panel.other``.

    Example:
        >>> from hf_ortho.plotting import Panel, draw_activations
        >>> figure = draw_activations([Panel("act", hf_ortho.activations.Hermite(4), torch.nn.GELU())])
        >>> len(figure.axes)  # the shape, and the difference
        2
    """
    chosen = [panels[i] for i in thin(len(panels), MAX_PANELS)]
    by_source = any(panel.source is not None for panel in chosen)
    by_other = not by_source and any(panel.other is not None for panel in chosen)
    below = "difference\nfrom source" if by_source else "difference\nfrom other" if by_other else ""
    labels = [_label("learned", [panel.learned for panel in chosen]), _label(other, [panel.other for panel in chosen])]
    grid = Grid([panel.title for panel in chosen], title, below, len(panels))
    intervals = [_interval(panel) for panel in chosen]
    if grid.compact:  # the medians, as the data of a few layers may reach far
        lo, hi = np.median(intervals, axis=0).tolist()
        intervals = [interval([module for panel in chosen for module in panel.modules], lo, hi)] * len(chosen)
    for i, (panel, (lo, hi), axes) in enumerate(zip(chosen, intervals, grid.upper, strict=True)):
        x = np.linspace(lo, hi, POINTS)
        grid.set_interval(i, lo, hi)
        _draw_shapes(axes, panel, x, labels)
        if panel.has_data:
            _draw_data(axes, panel)
        if grid.lower:
            _draw_differences(grid.lower[i], panel, x, panel.source if by_source else panel.other)
    grid.finish()
    return grid.figure


def _label(prefix: str, modules: Sequence[LearnableActivation | None]) -> str:
    return f"{prefix} ({', '.join(sorted({module.name for module in modules if module is not None}))})"


def _draw_shapes(axes: Axes, panel: Panel, x: np.ndarray, labels: list[str]) -> None:
    for module, label, style in zip(panel.modules, labels, STYLES, strict=False):
        draw_curve(axes, x, values(module, x), label=label, zorder=3, **style)
    if panel.source is not None:
        axes.plot(x, np.median(values(panel.source, x), axis=0), color=BLACK, ls="--", lw=1.0, label="source", zorder=4)
    mark_domain(axes, panel.learned)


def _draw_data(axes: Axes, panel: Panel) -> None:
    """The histogram of the pre-activations, scaled to the height of the axes."""
    assert panel.histogram is not None
    counts, edges = panel.histogram.counts, panel.histogram.edges
    density = counts / np.diff(edges)
    lo, hi = axes.get_xlim()
    visible = (edges[1:] > lo) & (edges[:-1] < hi)
    centers = (edges[1:] + edges[:-1])[visible] / 2
    height = 0.95 * density[visible] / density[visible].max()
    scaled = axes.get_xaxis_transform()
    axes.fill_between(centers, height, color=SKY, alpha=0.45, lw=0, transform=scaled, label="pre-activations", zorder=1)


def _draw_differences(axes: Axes, panel: Panel, x: np.ndarray, reference: nn.Module | None) -> None:
    mark_domain(axes, panel.learned)
    if reference is None:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "source unknown", transform=axes.transAxes, ha="center", va="center", fontsize=7)
        return
    axes.axhline(0, color=BLACK, lw=0.6)
    for module, style in zip(panel.modules, STYLES, strict=False):
        if module is not reference:
            draw_curve(axes, x, difference(module, reference, x), **(style | {"lw": 1.0}))
