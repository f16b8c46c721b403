"""The weight of a fit over pre-activations: a histogram of data, or ``DATA_FREE``."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np

from .nodes import Array, Nodes, quadrature
from .source import Source


class Density(Protocol):
    """The weight of each pre-activation in a fit; ``str`` names it in reports."""

    def nodes(self, source: Source, within: tuple[float, float] | None = None) -> Nodes:
        """The nodes of a fit to ``source``, or of a fit on the interval ``within`` only."""
        ...

    def __str__(self) -> str: ...


def norm_density(z: Array) -> Array:
    """exp(-z^2/2) / sqrt(2 pi)."""
    return np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Normal:
    """The density of N(mean, deviation^2)."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"N({self.mean:g}, {self.deviation:g}^2)"

    def interval(self, deviations: float) -> tuple[float, float]:
        """``deviations`` standard deviations on either side of the mean."""
        return self.mean - deviations * self.deviation, self.mean + deviations * self.deviation

    def nodes(self, source: Source, within: tuple[float, float] | None = None, step: float = 0.25) -> Nodes:
        """Gauss-Legendre nodes weighted by the density, or uniformly if the density is 0 on the interval."""
        lo, hi = within or self.interval(7.0)
        step = min(step, (hi - lo) / 8) if within else step
        x, length = quadrature(lo, hi, (0.0, *source.kinks), step)
        w = length * norm_density((x - self.mean) / self.deviation)
        return Nodes.of(source, x, w if w.sum() > 1e-9 else length, within or LINE)


PRE_ACTIVATIONS = "the pre-activations"  # name of the weight of a fit with data
# The weight without data: pre-activations of pretrained networks are mostly negative.
DATA_FREE = Normal(-0.5, 1.5)
LINE = DATA_FREE.interval(6.0)  # stands for the real line in a fit: beyond it, only the tails remain


def gaussian_moments(value, derivative, sigma: float, breaks: tuple[float, ...] = ()) -> tuple[float, float]:
    """E[F(x)^2] and E[F'(x)^2] for x ~ N(0, sigma^2), by quadrature split at ``breaks``."""
    x, w = quadrature(-16 * sigma, 16 * sigma, breaks, step=sigma / 4)
    w = w * norm_density(x / sigma) / sigma
    return float(w @ value(x) ** 2), float(w @ derivative(x) ** 2)
