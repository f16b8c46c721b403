"""The points at which a fit is made, their weights, and the measure of an error that a fit minimizes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .source import Source

Array = np.ndarray

# Weight of the square of the largest error on the real line, next to the mean squared error over the data: FULL while
# the largest error is well below CLOSE, falling to LEAST above. If a fit cannot be close everywhere, it should be close
# on the data.
FULL, LEAST, CLOSE = 0.2, 0.01, 0.02
LEAST_FACTOR = 0.03  # of a weight in a step of Lawson's: where the error is near 0, rounding is much of it


def quadrature(lo: float, hi: float, breaks: tuple[float, ...] = (), step: float = 0.5, order: int = 8):
    """Composite Gauss-Legendre nodes and weights on ``[lo, hi]``, split at ``breaks`` (float64)."""
    inner = sorted(b for b in breaks if lo < b < hi)
    edges = np.concatenate(
        [
            np.linspace(a, b, max(2, math.ceil((b - a) / step) + 1))[:-1]
            for a, b in zip([lo, *inner], [*inner, hi], strict=True)
        ]
        + [[hi]]
    )
    t, w = np.polynomial.legendre.leggauss(order)
    half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    return (middle + half * t).ravel(), (half * w).ravel()


def penalty(square: float) -> float:
    """What the largest error s costs, by its square: a s^2 + (b - a) e^2 log(1 + s^2/e^2), a, b, e the LEAST and FULL
    weights and CLOSE."""
    return LEAST * square + (FULL - LEAST) * CLOSE**2 * math.log1p(square / CLOSE**2)


def penalty_slope(square: float) -> float:
    """The derivative of ``penalty`` by s^2: from FULL at 0 down to LEAST."""
    return LEAST + (FULL - LEAST) / (1 + square / CLOSE**2)


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Points x_i with weights w_i: the data (or the data-free density) with sum 1, then the real line.

    ``data`` marks the former. ``minimum`` and ``maximum`` are the exact extremes of the data, None without data.
    """

    x: Array
    w: Array
    data: Array
    minimum: float | None = None
    maximum: float | None = None

    @classmethod
    def of(
        cls,
        source: Source,
        x: Array,
        w: Array,
        line: tuple[float, float],
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> Nodes:
        """The points ``x`` of positive weight ``w``, and evenly weighted ones on ``line``."""
        lo, hi = line
        points, length = quadrature(lo, hi, (0.0, *source.kinks), min(0.25, (hi - lo) / 8), order=4)
        x, w = x[w > 0], w[w > 0]
        data = np.arange(len(x) + len(points)) < len(x)
        weights = np.concatenate([w / w.sum(), FULL * length / length.sum()])
        return cls(np.concatenate([x, points]), weights, data, minimum, maximum)

    def within(self, source: Source, lo: float, hi: float) -> Nodes:
        """The data in [lo, hi], and that interval in place of the line."""
        x, w = self.x[self.data], self.w[self.data]
        return Nodes.of(source, x, np.where((x >= lo) & (x <= hi), w, 0.0), (lo, hi), self.minimum, self.maximum)

    def mean(self, values: Array) -> float:
        """Average over the data."""
        return float(self.w[self.data] @ values[self.data] / self.w[self.data].sum())

    def score(self, error: Array) -> float:
        """Mean squared error over the data + ``penalty`` of the largest error on the line."""
        return self.mean(error**2) + penalty(float(np.max(np.abs(error[~self.data]))) ** 2)

    def reweighted(self, error: Array) -> Nodes:
        """Lawson's step: weight on the line moves to where |error| is large.

        s^2 is the maximum over all weights u of sum 1 of sum_i u_i error_i^2. With ``penalty_slope`` for the sum of the
        weights on the line, a fixed point of (least squares, this step) is therefore a stationary point of ``score``.
        """
        size = np.abs(error)
        most = float(np.max(size[~self.data]))
        w = np.where(self.data, self.w, self.w * np.maximum(size, LEAST_FACTOR * most))
        w[~self.data] *= penalty_slope(most**2) / w[~self.data].sum()
        return dataclasses.replace(self, w=w)
