"""Plot how activations change during training: one curve per checkpoint, as an image or an animation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.animation import PillowWriter
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize

from ..activations import LearnableActivation
from ..files import written
from ..path_patterns import thin
from .layout import BLACK, MAX_PANELS, SKY, VERMILION, Grid, difference, draw_bands, interval, mark_domain, values

POINTS = 401
FRAMES_PER_SECOND = 3
# without the bright end of viridis, which is hard to see on white
STEPS = ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256)))


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The activations at one step of a training.

    Attributes:
        modules: the activations by path; every snapshot of a history has the same paths.
        step: the optimizer step, None for the final model.
        name: the name of the final model.

    Example:
        >>> from hf_ortho.plotting import Snapshot
        >>> Snapshot({"act": hf_ortho.activations.Hermite(4)}, step=100).label
        'step 100'
    """

    modules: Mapping[str, LearnableActivation]
    step: int | None = None
    name: str = ""

    @property
    def label(self) -> str:
        return f"end ({self.name})" if self.step is None else f"step {self.step}"


class _History:
    """The figure without curves, and the values of all snapshots in each panel; of groups of channels the medians."""

    def __init__(self, snapshots: Sequence[Snapshot], title: str):
        paths = list(snapshots[0].modules)
        chosen = [paths[i] for i in thin(len(paths), MAX_PANELS)]
        start = snapshots[0].label
        self.grid = Grid(chosen, title, f"change since\n{start}", len(paths))
        by_path = [[snapshot.modules[path] for snapshot in snapshots] for path in chosen]
        intervals = [interval(modules, -5.0, 4.0) for modules in by_path]
        if self.grid.compact:
            intervals = [(min(lo for lo, _ in intervals), max(hi for _, hi in intervals))] * len(chosen)
        self.x = [np.linspace(lo, hi, POINTS) for lo, hi in intervals]
        self.y: list[list[np.ndarray]] = []  # per panel the functions and their changes, each a row per snapshot
        for panel, (modules, ends) in enumerate(zip(by_path, intervals, strict=True)):
            self.grid.set_interval(panel, *ends)
            x = self.x[panel]
            both = [values(module, x) for module in modules], [difference(module, modules[0], x) for module in modules]
            self.y.append([np.stack([np.median(rows, axis=0) for rows in each]) for each in both])
            for axes, each in zip((self.grid.upper[panel], self.grid.lower[panel]), both, strict=True):
                mark_domain(axes, modules[-1], "domain [lo, hi] at the end")
                draw_bands(axes, x, each[-1], SKY, "at the end; lines: medians")

    def curve(self, panel: int, snapshot: int, **style) -> tuple:
        """Draw one snapshot in one panel. Returns the lines of the shape and of its change since the first snapshot."""
        both = zip((self.grid.upper[panel], self.grid.lower[panel]), self.y[panel], strict=True)
        return tuple(axes.plot(self.x[panel], y[snapshot], **style)[0] for axes, y in both)


def plot_history(snapshots: Sequence[Snapshot], path: str | Path, title: str = "") -> None:
    """Write a PNG with one panel per activation: one curve per snapshot, colored by step, and the change below.

    The change is relative to the first snapshot, which is dashed. A final model has a separate color. Of groups of
    channels, the medians are drawn, and the last snapshot also with bands. Panels are laid out as in
    ``plot_activations``.

    Raises:
        OutputError: ``path`` cannot be written.

    Example:
        >>> from hf_ortho.plotting import Snapshot, plot_history
        >>> a, b = hf_ortho.activations.Hermite(4), hf_ortho.activations.Hermite(4, init="unit")
        >>> plot_history([Snapshot({"act": a}, step=0), Snapshot({"act": b}, step=10)], "history.png")
    """
    history = _History(snapshots, title)
    steps = [snapshot.step for snapshot in snapshots if snapshot.step is not None]
    scale = ScalarMappable(Normalize(min(steps), max(steps)), STEPS)
    colors = scale.to_rgba(np.array([snapshot.step or 0 for snapshot in snapshots]))
    for panel in range(len(history.x)):
        for i, snapshot in enumerate(snapshots):
            style: dict[str, Any] = {
                "label": f"_{snapshot.label}",
                "lw": 1.1,
                "color": colors[i],
            }
            if i == 0:
                style |= {"label": f"{snapshot.label}, the first", "ls": "--", "lw": 1.4, "zorder": 4}
            elif snapshot.step is None:
                style |= {"label": snapshot.label, "color": VERMILION, "ls": "-."}
            history.curve(panel, i, **style)
    grid = history.grid
    ticks = steps if len(steps) <= 8 else None
    if len(steps) > 1:
        bar = grid.figure.colorbar(scale, ax=[*grid.upper, *grid.lower], ticks=ticks, aspect=40, pad=0.01)
        bar.set_label("optimizer step", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    grid.finish()
    with written(path) as draft:
        grid.figure.savefig(draft)


def animate_history(snapshots: Sequence[Snapshot], path: str | Path, title: str = "") -> None:
    """Write an animated GIF with one frame per snapshot and its step in the title.

    The first snapshot stays as a dashed line. All frames have the same axes.

    Raises:
        OutputError: ``path`` cannot be written.

    Example:
        >>> from hf_ortho.plotting import Snapshot, animate_history
        >>> a, b = hf_ortho.activations.Hermite(4), hf_ortho.activations.Hermite(4, init="unit")
        >>> animate_history([Snapshot({"act": a}, step=0), Snapshot({"act": b}, step=10)], "history.gif")
    """
    history = _History(snapshots, title)
    grid, moving = history.grid, []
    for panel in range(len(history.x)):
        history.curve(panel, 0, color=BLACK, ls="--", lw=1.0, label=f"{snapshots[0].label}, the first", zorder=4)
        moving.append(history.curve(panel, 0, color=VERMILION, lw=1.4, label="the step in the title"))
        x = history.x[panel]
        for axes, frames in zip((grid.upper[panel], grid.lower[panel]), history.y[panel], strict=True):
            axes.update_datalim([(x[0], frames.min()), (x[0], frames.max())])
            axes.autoscale_view(scalex=False)
    grid.finish()
    grid.set_heading(max((snapshot.label for snapshot in snapshots), key=len))
    grid.figure.draw_without_rendering()
    grid.figure.set_layout_engine("none")  # keep the panels in place from frame to frame
    for axes in (*grid.upper, *grid.lower):
        axes.autoscale(False)
    writer = PillowWriter(fps=FRAMES_PER_SECOND)
    with written(path) as draft, writer.saving(grid.figure, draft, grid.figure.dpi):
        for i, snapshot in enumerate(snapshots):
            grid.set_heading(snapshot.label)
            for lines, both in zip(moving, history.y, strict=True):
                for line, y in zip(lines, both, strict=True):
                    line.set_ydata(y[i])
            writer.grab_frame()
