"""Pictures of activations: source and learned shapes over the histogram of pre-activations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import nn

from .activations import LearnableActivation
from .conversion import Histogram

MAX_PANELS = 12
SOURCE, LEARNED, DATA = "#444444", "#c2410c", "#93c5fd"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One activation to draw: its path, the function it replaced, and what is known of its inputs."""

    title: str
    learned: LearnableActivation
    source: nn.Module | None = None
    histogram: Histogram | None = None


def _interval(panel: Panel) -> tuple[float, float]:
    """From the 1e-4 to the 1 - 1e-4 quantile of the data, and at least [-4, 3]."""
    if panel.histogram is None or not panel.histogram.counts.any():
        return -5.0, 4.0
    cumulative = np.cumsum(panel.histogram.counts) / panel.histogram.counts.sum()
    edges = panel.histogram.edges
    lo, hi = (float(edges[np.searchsorted(cumulative, q)]) for q in (1e-4, 1 - 1e-4))
    return min(lo, -4.0), max(hi, 3.0)


def plot_activations(panels: Sequence[Panel], path: str | Path, title: str = "") -> None:
    """Write a PNG: per activation the source (dashed), the learned shape, their difference below, and the data behind.

    More than 12 activations are thinned evenly.
    """
    if len(panels) > MAX_PANELS:
        panels = [panels[i] for i in np.linspace(0, len(panels) - 1, MAX_PANELS).round().astype(int)]
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns, 3.5 * rows + 0.7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    blocks = np.atleast_1d(np.array(figure.subfigures(rows, columns, squeeze=False))).ravel()
    for block, panel in zip(blocks, panels, strict=False):
        _draw(block, panel)
    handles: list[Artist] = [Line2D([], [], color=LEARNED, lw=1.4, label=f"learned ({panels[0].learned.name})")]
    if any(panel.source is not None for panel in panels):
        handles.append(Line2D([], [], color=SOURCE, lw=1.4, ls="--", label="source"))
    if any(panel.histogram is not None for panel in panels):
        handles.append(Patch(color=DATA, alpha=0.5, label="pre-activations (density)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _draw(block, panel: Panel) -> None:
    top, below = block.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    lo, hi = _interval(panel)
    x = torch.linspace(lo, hi, 801, dtype=torch.float64)
    with torch.no_grad():
        learned = panel.learned(x.to(panel.learned.domain.device)).cpu()
        source = None if panel.source is None else panel.source(x)
    if panel.histogram is not None and panel.histogram.counts.any():
        counts, edges = panel.histogram.counts, panel.histogram.edges
        density = counts / counts.sum() / np.diff(edges)
        kept = (edges[1:] > lo) & (edges[:-1] < hi)
        behind = top.twinx()
        behind.fill_between((edges[1:] + edges[:-1])[kept] / 2, density[kept], color=DATA, alpha=0.5, lw=0)
        behind.set_yticks([])
        behind.set_ylim(bottom=0)
        top.set_zorder(behind.get_zorder() + 1)
        top.patch.set_visible(False)
    if source is not None:
        top.plot(x, source, color=SOURCE, ls="--", lw=1.4, label="source")
        below.plot(x, learned - source, color=LEARNED, lw=1.0)
        below.axhline(0, color=SOURCE, lw=0.6)
        below.set_ylabel("difference", fontsize=7)
    top.plot(x, learned, color=LEARNED, lw=1.4, label=f"learned ({panel.learned.name})")
    for end in panel.learned.domain.tolist():
        if lo < end < hi:
            top.axvline(end, color=LEARNED, lw=0.6, ls=":")
    top.set_title(panel.title, fontsize=8)
    top.set_xlim(lo, hi)
    for axes in (top, below):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.2, lw=0.5)
    below.set_xlabel("pre-activation", fontsize=7)
