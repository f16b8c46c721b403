"""The common layout of the plots: a grid of panels for any number of layers, titles, legend and domain."""

from __future__ import annotations

import copy
import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator
from torch import nn

from ..activations import LearnableActivation
from ..path_patterns import split_shared
from ..text import visible

FULL_PANELS = 12  # more panels share their axes in a compact grid
MAX_PANELS = 64  # of more activations, an evenly spaced selection is drawn
# Okabe & Ito's colors, which remain distinct with color blindness
BLACK, SKY, BLUE, VERMILION, GRAY = "#000000", "#56B4E9", "#0072B2", "#D55E00", "#666666"
GREEN, PURPLE, ORANGE = "#009E73", "#CC79A7", "#E69F00"

LONGEST = 300  # characters of a title


def literal(text: str) -> str:
    """``text`` for matplotlib to draw literally, not as a formula."""
    return visible(text).replace("$", r"\$")


class Grid:
    """A figure with one panel per activation: the shape above and, if ``lower``, a difference below.

    Up to 12 panels have separate axes. More panels, up to 64, share them, and only the outer ones have tick labels.

    The common part of the activations' paths is in the figure's title, the rest above each panel.

    Attributes:
        upper: the axes of the shapes, one per activation, in reading order.
        lower: the axes of the differences, empty without them.
    """

    def __init__(self, paths: Sequence[str], title: str, difference: str = "", total: int | None = None):
        n = len(paths)
        self.compact = n > FULL_PANELS
        square = math.ceil(math.sqrt(n))
        columns = min(square, square + 1, key=lambda columns: -n % columns)  # with fewer empty places
        rows = math.ceil(n / columns)
        width, height = (1.3, 0.95) if self.compact else (3.6, 2.2) if n == 1 else (2.2, 1.6)
        per_panel = 2 if difference else 1
        height *= 1.4 if difference else 1.0
        shared, rest = split_shared(list(paths)) if n > 1 else ("", list(paths))
        titles = [_wrapped(text, int(13 * width)) for text in rest]
        height += 0.14 * max(text.count("\n") for text in titles)
        self.size = width * columns + 0.5, height * rows + 1.2
        self.figure = Figure(figsize=self.size, dpi=160, layout="constrained")
        FigureCanvasAgg(self.figure)
        # no sharex or sharey: their time grows with the square of the number of panels
        axes = self.figure.subplots(per_panel * rows, columns, squeeze=False, height_ratios=[3, 1.2][:per_panel] * rows)
        self.upper: list[Axes] = list(axes[::per_panel].flat)
        self.lower: list[Axes] = list(axes[1::2].flat) if difference else []
        for unused in (*self.upper[n:], *self.lower[n:]):
            unused.remove()
        self.upper, self.lower = self.upper[:n], self.lower[:n]
        bottom = self.lower or self.upper
        for i, (top, below) in enumerate(zip(self.upper, bottom, strict=True)):
            first, last = i % columns == 0, i + columns >= n
            for kind in {top, below}:
                kind.grid(alpha=0.25, lw=0.5)
                kind.tick_params(labelsize=8, length=2, labelbottom=kind is below and (last or not self.compact))
                kind.tick_params(labelleft=first or not self.compact)
                kind.xaxis.set_major_locator(MaxNLocator(4 if n > 1 else 7, steps=[1, 2, 5, 10]))
                kind.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            if self.lower:
                below.yaxis.set_major_locator(MaxNLocator(2, symmetric=True))
                below.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            if last:
                below.set_xlabel("pre-activation", fontsize=9)
            if first and not self.compact:
                top.set_ylabel("activation", fontsize=9)
                if self.lower:
                    below.set_ylabel(literal(difference), fontsize=9)
        if self.compact:
            below_that = f" (above), {' '.join(literal(difference).split())} (below)" if difference else ""
            self.figure.supylabel(f"activation{below_that}", fontsize=10)
        for top, text in zip(self.upper, titles, strict=True):
            top.set_title(text, fontsize=9, pad=3)
        lines = [title, shared]
        if total is not None and total > n:
            lines.append(f"{n} of {total} activations, evenly spaced")
        self.heading = "\n".join(_wrapped(line, int(10 * self.size[0])) for line in lines if line)
        self._suptitle = self.figure.suptitle(self.heading, fontsize=11) if self.heading else None

    def set_heading(self, line: str) -> None:
        """Put ``line`` under the figure's title."""
        text = "\n".join(filter(None, (self.heading, literal(line))))
        if self._suptitle is None:
            self._suptitle = self.figure.suptitle(text, fontsize=11)
        self._suptitle.set_text(text)

    def set_interval(self, panel: int, lo: float, hi: float) -> None:
        """Set the interval of x of one panel."""
        for axes in (self.upper[panel], *self.lower[panel : panel + 1]):
            axes.set_xlim(lo, hi)

    def finish(self) -> None:
        """Add the legend, and set one y range for all panels of a compact grid; call it after drawing everything."""
        for kind in (self.upper, self.lower) if self.compact else ():
            drawn = [axes for axes in kind if np.isfinite(axes.dataLim.intervaly).all()]
            limits = np.array([axes.get_ylim() for axes in drawn])
            for axes in drawn:
                axes.set_ylim(limits.min(), limits.max())
        self._legend()

    def _legend(self) -> None:
        """One entry per label of all panels, below the figure."""
        by_label: dict[str, Artist] = {}
        for axes in self.figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                by_label.setdefault(literal(_shortened(label)), handle)
        longest = max(map(len, by_label), default=1)
        columns = max(1, min(len(by_label), int(self.size[0] / (0.07 * longest + 0.5))))
        self.figure.legend(
            by_label.values(), by_label.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def _wrapped(text: str, width: int) -> str:
    """``text`` with long paths broken after dots, slashes and underscores, to keep titles from overlapping."""
    breakable = re.sub(r"(?<=[./_])(?=\S)", "\0 ", visible(_shortened(text)))
    return literal(textwrap.fill(breakable, width).replace("\0 ", "").replace("\0", ""))


def interval(modules: Sequence[LearnableActivation], lo: float, hi: float) -> tuple[float, float]:
    """[lo, hi], widened to include every finite end of a domain with a margin."""
    for module in modules:
        module.check_present()
    ends = [end for module in modules for end in module.domain.flatten().tolist() if math.isfinite(end)]
    margin = 0.08 * (max([hi, *ends]) - min([lo, *ends]))
    return min([lo, *(end - margin for end in ends)]), max([hi, *(end + margin for end in ends)])


def values(module: nn.Module, x: np.ndarray, method: str = "forward") -> np.ndarray:
    """f(x) in float64, or another method, one row per group of channels. On the CPU: some devices have no float64."""
    tensor = next(module.parameters(), torch.empty(0))
    on_cpu = module if tensor.device.type == "cpu" else copy.deepcopy(module).cpu()
    points = torch.as_tensor(x, dtype=torch.float64)[:, None].repeat(1, getattr(module, "groups", 1))
    with torch.no_grad():
        return getattr(on_cpu, method)(points).numpy().T


def difference(module: nn.Module, reference: nn.Module, x: np.ndarray) -> np.ndarray:
    """The difference of two functions, one row for each part of the channels that has one group in both."""
    y, g = values(module, x), values(reference, x)
    rows = math.lcm(len(y), len(g))
    return np.repeat(y, rows // len(y), axis=0) - np.repeat(g, rows // len(g), axis=0)


def draw_curve(axes: Axes, x: np.ndarray, rows: np.ndarray, **style: Any) -> None:
    """Draw a function, or of one per group of channels the median in its bands."""
    draw_bands(axes, x, rows, style["color"], "line: median")
    axes.plot(x, np.median(rows, axis=0), **style)


def draw_bands(axes: Axes, x: np.ndarray, rows: np.ndarray, color: str, note: str) -> None:
    """Shade bands that hold 90 % and all of the rows, one per group of channels; nothing without groups."""
    for kind, outside, alpha in (("all", 0.0, 0.18), ("90 % of", 0.05, 0.3)) if len(rows) > 1 else ():
        band = np.quantile(rows, (outside, 1 - outside), axis=0)
        label = f"{kind} groups ({note})"
        axes.fill_between(x, *band, color=color, alpha=alpha, lw=0, zorder=2, label=label)


def mark_domain(axes: Axes, module: LearnableActivation, label: str = "domain [lo, hi]") -> None:
    """Shade [lo, hi], with a dotted line at each finite end; with groups from the first lo to the last hi, with lines
    at the first and the last of all lo and of all hi."""
    ends = module.domain.detach().reshape(-1, 2).aminmax(dim=0)
    (lo, *_), (*_, hi) = ends.min.tolist(), ends.max.tolist()
    finite = sorted({end for end in torch.cat(ends).tolist() if math.isfinite(end)})
    if not finite:
        return
    left, right = axes.get_xlim()
    axes.axvspan(max(lo, left), min(hi, right), color=GRAY, alpha=0.12, lw=0, label=label)
    for end in finite:
        axes.axvline(end, color=GRAY, lw=0.9, ls=":")
