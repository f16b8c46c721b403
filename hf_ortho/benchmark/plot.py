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
from ..plotting.comparison import styles
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

Limits = Mapping[tuple[str, str, str], float]


def plot_results(results: BenchResults, settings: Settings, targets: Sequence[SpeedTarget], path: str | Path) -> None:
    """Plot the results to a PNG: bars of the ratios with spread and targets, and the curves over elements and degree.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    limits = {(t.case, t.row, t.measure): t.limit for t in targets if t.device == settings.device and not t.over}
    both, calls, over = ("forward", "forward + backward"), ("call", "call + backward"), f"time over {REFERENCE}'s"
    bars = {
        "sequence": (f"inputs of {settings.sequence}: {over}", ("sequence",), both),
        "image": (f"inputs of {settings.image}: {over}", ("image",), both),
        "decode": (f"one call on {settings.decode}: {over}", ("decode",), calls),
        "models": ("training steps and generation: over the original model", MODELS, ("step", "generate", "peak")),
    }
    curves = {"elements": _elements, "degree": _degrees}
    rows = {name: sum(len(results.of(case)) for case in cases) for name, (_, cases, _) in bars.items()}
    rows |= {name: 9 if results.of(name) else 0 for name in curves}
    rows = {name: count for name, count in rows.items() if count}  # a panel for each that was measured
    heights = [0.26 * count + 1.3 for count in rows.values()]
    canvas = Canvas(figsize=(7, sum(heights) + 0.5), dpi=130, layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0] if rows else ()
    for axes, name in zip(panels, rows, strict=True):
        if name in curves:
            curves[name](axes, results)
        else:
            title, cases, measures = bars[name]
            _bars(axes, results, limits, cases, measures)
            axes.set_title(title, fontsize=11)
        axes.tick_params(labelsize=9)
    where = f"{settings.device}, {settings.to_dict()['dtype']}"
    canvas.suptitle(f"Learnable activations on {where}; whiskers: quartiles", fontsize=12)
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
    axes.set_yticks(range(len(labels)), labels)
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
        axes.plot([limit] * 2, [y - height / 2, y + height / 2], color=BLACK, lw=2.5, label="target")
        end = max(end, limit)
    axes.annotate(f"{figure.ratio:.2f}", (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8)


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10 instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(list(unique.values()), list(unique), fontsize=9, loc="best")


def _elements(axes: Axes, results: BenchResults) -> None:
    """Plot nanoseconds per element over the number of elements."""
    rows = results.of("elements")
    for name, color in ((REFERENCE, BLACK), ("hermite_8", VERMILION)):
        for measure, style in (("forward", "-"), ("forward + backward", "--")):
            sizes = [int(row.split()[1]) for row in rows if row.split()[0] == name and measure in rows[row]]
            times = [rows[f"{name} {n}"][measure].value / n * 1e9 for n in sizes]
            axes.plot(sizes, times, style, marker="o", ms=3, color=color, label=f"{name}, {measure}")
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="ns per element")
    axes.set_title("time per element", fontsize=11)
    axes.grid(which="both", alpha=0.25, lw=0.5)
    _legend(axes)


def _degrees(axes: Axes, results: BenchResults) -> None:
    """Plot the ratio of forward and backward over the degree, one curve per family."""
    curves: dict[str, list[tuple[int, Figure]]] = {}
    for row, measures in results.of("degree").items():
        if row != REFERENCE and "forward + backward" in measures:
            name = parse(row)
            curves.setdefault(name.family, []).append((name.degree, measures["forward + backward"]))
    looks = styles([REFERENCE, *curves])
    for family, points in curves.items():
        x = [degree for degree, _ in points]
        spread = np.array([figure.spread or 0.0 for _, figure in points]) / 2
        axes.errorbar(x, [f.ratio for _, f in points], spread, lw=1.2, capsize=2, label=family, **looks[family])
    axes.set(yscale="log", xlabel="degree")
    axes.set_title(f"forward + backward: time over {REFERENCE}'s", fontsize=11)
    _plain_numbers(axes.yaxis)
    axes.grid(which="both", alpha=0.25, lw=0.5)
    _legend(axes)
