"""Plot the results of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter

from ..activations import parse
from ..files import written
from ..plotting.layout import BLACK, BLUE, SKY, VERMILION
from .competitors import REFERENCE
from .results import BenchResults, Figure
from .settings import Settings
from .targets import SpeedTarget

COLORS = {
    "forward": BLUE,
    "forward + backward": SKY,
    "call": BLUE,
    "call + backward": SKY,
    "step": BLUE,
    "peak": VERMILION,
    "generate": SKY,
}
MODELS = ("gpt2", "gpt2_eager", "gpt2_compiled", "convnext", "generation", "vllm")
MARKERS = "osD^v<>"

Limits = Mapping[tuple[str, str, str], float]


def plot_results(results: BenchResults, settings: Settings, targets: Sequence[SpeedTarget], path: str | Path) -> None:
    """Plot the results to a PNG: bars of the ratios with spread and targets, and the curves over elements and degree.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    canvas = Canvas(figsize=(16, 13), dpi=100, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplot_mosaic(
        [["sequence", "image"], ["sequence", "image"], ["elements", "decode"], ["degree", "models"]]
    )
    limits = {(t.case, t.row, t.measure): t.limit for t in targets if t.device == settings.device and not t.over}
    for case in ("sequence", "image"):
        _bars(axes[case], results, limits, (case,), ("forward", "forward + backward"))
        axes[case].set_title(f"{getattr(settings, case)}, time over that of {REFERENCE}")
    _bars(axes["decode"], results, limits, ("decode",), ("call", "call + backward"))
    axes["decode"].set_title(f"one call on {settings.decode}, time over that of {REFERENCE}")
    _bars(axes["models"], results, limits, MODELS, ("step", "generate", "peak"))
    axes["models"].set_title("training steps and generation, over the original model")
    _elements(axes["elements"], results)
    _degrees(axes["degree"], results)
    for case, panel in axes.items():
        if not any(map(results.of, MODELS if case == "models" else (case,))):
            panel.set_visible(False)
    where = f"{settings.device}, {settings.to_dict()['dtype']}"
    canvas.suptitle(f"Learnable activations on {where}; whiskers: interquartile range")
    with written(path) as draft:
        canvas.savefig(draft, format="png")


def _bars(axes: Axes, results: BenchResults, limits: Limits, cases: tuple[str, ...], measures: tuple[str, ...]) -> None:
    """One group per row of the cases, one bar per measure, on a logarithmic scale from 1."""
    labels: list[str] = []
    for case in cases:
        for row, figures in results.of(case).items():
            drawn = [figures[measure] for measure in measures if measure in figures]
            height = 0.8 / len(drawn)
            for j, figure in enumerate(drawn):
                y = len(labels) + (j - (len(drawn) - 1) / 2) * height
                limit = limits.get((case, row, figure.measure))
                _bar(axes, figure, y, height, limit)
            labels.append(row if len(cases) == 1 else f"{case}: {row}")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.axvline(1, color=BLACK, lw=0.6)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.grid(axis="x", which="both", alpha=0.25, lw=0.5)
    _legend(axes)


def _bar(axes: Axes, figure: Figure, y: float, height: float, limit: float | None) -> None:
    axes.barh(y, figure.ratio - 1, height, left=1, color=COLORS[figure.measure], label=figure.measure)
    end = max(figure.ratio, 1.0)
    if figure.spread is not None:
        axes.errorbar(figure.ratio, y, xerr=figure.spread / 2, color=BLACK, lw=0.8, capsize=2)
        end = max(end, figure.ratio + figure.spread / 2)
    if limit is not None:
        axes.plot([limit] * 2, [y - height / 2, y + height / 2], color="red", lw=2, label="target")
        end = max(end, limit)
    axes.annotate(f"{figure.ratio:.2f}", (end, y), (4, 0), textcoords="offset points", va="center", fontsize=7)


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10 instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(list(unique.values()), list(unique), fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _elements(axes: Axes, results: BenchResults) -> None:
    """Plot nanoseconds per element over the number of elements."""
    rows = results.of("elements")
    for name, color in ((REFERENCE, BLACK), ("hermite_8", VERMILION)):
        for measure, style in (("forward", "-"), ("forward + backward", "--")):
            sizes = [int(row.split()[1]) for row in rows if row.split()[0] == name and measure in rows[row]]
            times = [rows[f"{name} {n}"][measure].value / n * 1e9 for n in sizes]
            axes.plot(sizes, times, style, marker="o", ms=3, color=color, label=f"{name}, {measure}")
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="ns per element", title="time per element")
    axes.grid(which="both", alpha=0.25, lw=0.5)
    _legend(axes)


def _degrees(axes: Axes, results: BenchResults) -> None:
    """Plot the ratio of forward and backward over the degree, one curve per family."""
    curves: dict[str, list[tuple[int, Figure]]] = {}
    for row, measures in results.of("degree").items():
        if row != REFERENCE and "forward + backward" in measures:
            name = parse(row)
            curves.setdefault(name.family, []).append((name.degree, measures["forward + backward"]))
    for (family, points), marker in zip(curves.items(), MARKERS, strict=False):
        x = [degree for degree, _ in points]
        spread = np.array([figure.spread or 0.0 for _, figure in points]) / 2
        axes.errorbar(x, [f.ratio for _, f in points], spread, marker=marker, ms=4, lw=1, capsize=2, label=family)
    axes.set(yscale="log", xlabel="degree", title=f"forward + backward, time over that of {REFERENCE}")
    _plain_numbers(axes.yaxis)
    axes.grid(which="both", alpha=0.25, lw=0.5)
    _legend(axes)
