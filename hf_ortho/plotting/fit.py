"""Plot one fit: the shape and its derivative, with the source."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from ..activations import LearnableActivation
from ..fitting.source import Source
from .layout import BLACK, Grid, draw_curve, interval, mark_domain, values
from .shapes import POINTS, STYLES


def draw_fit(
    module: LearnableActivation, source: Source, ends: tuple[float, float] | None = None
) -> tuple[Figure, Figure]:
    """Two figures, for f and f': each with the source (dashed), and the difference below.

    Args:
        ends: the ends of the interval to draw; by default [-5, 4], extended to include the domain.

    Example:
        >>> from hf_ortho.fitting.source import Source
        >>> from hf_ortho.plotting import draw_fit
        >>> activation = hf_ortho.activations.Hermite(4)
        >>> report = activation.fit("gelu")
        >>> shape, derivative = draw_fit(activation, Source.of("gelu"))
        >>> len(shape.axes)
        2
    """
    lo, hi = ends or interval([module], -5.0, 4.0)
    x = np.linspace(lo, hi, POINTS)
    kinds = (("f", "forward", source.value), ("derivative f'", "derivative", source.derivative))
    drawn = []
    for title, method, expected in kinds:
        grid = Grid([title], "", "difference")
        y, g = values(module, x, method), expected(x)
        (top,), (below,) = grid.upper, grid.lower
        grid.set_interval(0, lo, hi)
        draw_curve(top, x, y, label=module.name, zorder=3, **STYLES[0])
        top.plot(x, g, color=BLACK, ls="--", lw=1.0, label=source.name, zorder=4)
        top.set_ylabel("")  # it is in the title
        below.axhline(0, color=BLACK, lw=0.6)
        draw_curve(below, x, y - g, **(STYLES[0] | {"lw": 1.0}))
        for axes in (top, below):
            mark_domain(axes, module)
        grid.finish()
        drawn.append(grid.figure)
    return drawn[0], drawn[1]
