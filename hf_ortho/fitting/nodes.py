"""The points and weights of a fit, and the score that a fit minimizes."""

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
LEAST_FACTOR = 0.03  # of a weight in one Lawson step: where the error is near 0, it is mostly rounding


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
    """The cost of the largest error s, given s^2, with a, b, e = LEAST, FULL, CLOSE:

    a s^2 + (b - a) e^2 log(1 + s^2/e^2).
    """
    return LEAST * square + (FULL - LEAST) * CLOSE**2 * math.log1p(square / CLOSE**2)


def penalty_slope(square: float) -> float:
    """The derivative of ``penalty`` with respect to s^2, falling from FULL at 0 to LEAST."""
    return LEAST + (FULL - LEAST) / (1 + square / CLOSE**2)


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Points x_i with weights w_i: the data (or the data-free density) with sum 1, then the real line.

    ``data`` is True for the first group. ``minimum`` and ``maximum`` are the exact extremes of the data, or None.
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
        """The points ``x`` with positive weight ``w``, and uniformly weighted points on ``line``."""
        lo, hi = line
        points, length = quadrature(lo, hi, (0.0, *source.kinks), min(0.25, (hi - lo) / 8), order=4)
        x, w = x[w > 0], w[w > 0]
        data = np.arange(len(x) + len(points)) < len(x)
        weights = np.concatenate([w / w.sum(), FULL * length / length.sum()])
        return cls(np.concatenate([x, points]), weights, data, minimum, maximum)

    def within(self, source: Source, lo: float, hi: float) -> Nodes:
        """The data in [lo, hi], with that interval instead of the line."""
        x, w = self.x[self.data], self.w[self.data]
        return Nodes.of(source, x, np.where((x >= lo) & (x <= hi), w, 0.0), (lo, hi), self.minimum, self.maximum)

    def mean(self, values: Array) -> float:
        """Average over the data."""
        return float(self.w[self.data] @ values[self.data] / self.w[self.data].sum())

    def score(self, error: Array) -> float:
        """Mean squared error over the data plus ``penalty`` of the largest error on the line."""
        return self.mean(error**2) + penalty(float(np.max(np.abs(error[~self.data]))) ** 2)

    def reweighted(self, error: Array) -> Nodes:
        """Lawson's step: move weight on the line to where |error| is large.

        s^2 is the maximum of sum_i u_i error_i^2 over all weights u of sum 1. If the weights on the line sum to
        ``penalty_slope``, a fixed point of (least squares, this step) is therefore a stationary point of ``score``.
        """
        size = np.abs(error)
        most = float(np.max(size[~self.data]))
        w = np.where(self.data, self.w, self.w * np.maximum(size, LEAST_FACTOR * most))
        w[~self.data] *= penalty_slope(most**2) / w[~self.data].sum()
        return dataclasses.replace(self, w=w)
