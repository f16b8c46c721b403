"""The points and weights of a fit, and the score that a fit minimizes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .source import Source

Array = np.ndarray

# The weight of the square of the largest error on the real line, next to the mean squared error over the data. It
# protects inputs unlike the data. More of it costs accuracy on the data, and on unlike data as well: the fit then
# spends its freedom where no network has many inputs.
GUARD = 5e-3
# The same next to an error that is weighted by its effect on the output of the model.
GUARD_OF_EFFECT = 2e-4
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


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Points x_i with weights w_i: the data (or the data-free density) with sum 1, then the real line.

    Attributes:
        x, w: the points and their weights.
        data: True for the first group.
        share: of the data at each point, with sum 1, for averages; 0 on the line.
        guard: weight of the square of the largest error on the line.
        effect: sum of the importance of all data, or None; see ``divergence``.
        minimum, maximum: the exact extremes of the data, or None.
    """

    x: Array
    w: Array
    data: Array
    share: Array
    guard: float
    effect: float | None = None
    minimum: float | None = None
    maximum: float | None = None

    @classmethod
    def of(
        cls,
        source: Source,
        x: Array,
        share: Array,
        line: tuple[float, float],
        importance: Array | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> Nodes:
        """The points ``x`` with a positive ``share`` of the data, weighted by it or by ``importance``, and uniformly
        weighted points on ``line``."""
        lo, hi = line
        points, length = quadrature(lo, hi, (0.0, *source.kinks), min(0.25, (hi - lo) / 8), order=4)
        kept = share > 0
        w = share[kept] if importance is None else importance[kept]
        guard, effect = (GUARD, None) if importance is None else (GUARD_OF_EFFECT, float(w.sum()))
        nothing = np.zeros(len(points))
        return cls(
            np.concatenate([x[kept], points]),
            np.concatenate([w / w.sum(), guard * length / length.sum()]),
            np.arange(len(w) + len(points)) < len(w),
            np.concatenate([share[kept] / share[kept].sum(), nothing]),
            guard,
            effect,
            minimum,
            maximum,
        )

    def mean(self, values: Array) -> float:
        """Average over the data."""
        return float(self.share @ values)

    def mean_square(self, error: Array) -> float:
        """Weighted mean of the squared error over the data."""
        return float(self.w[self.data] @ error[self.data] ** 2)

    def divergence(self, error: Array) -> float | None:
        """sum_i F_i error_i^2 / 2: the expected divergence of a model with only this error, with the importance F."""
        return None if self.effect is None else 0.5 * self.effect * self.mean_square(error)

    def score(self, error: Array) -> float:
        """Weighted mean squared error over the data, plus ``guard`` times the largest squared error on the line."""
        return self.mean_square(error) + self.guard * float(np.max(np.abs(error[~self.data]))) ** 2

    def reweighted(self, error: Array) -> Nodes:
        """Lawson's step: move weight on the line to where |error| is large.

        s^2 is the maximum of sum_i u_i error_i^2 over all weights u of sum 1. If the weights on the line sum to
        ``guard``, a fixed point of (least squares, this step) is therefore a stationary point of ``score``.
        """
        size = np.abs(error)
        most = float(np.max(size[~self.data]))
        w = np.where(self.data, self.w, self.w * np.maximum(size, LEAST_FACTOR * most))
        w[~self.data] *= self.guard / w[~self.data].sum()
        return dataclasses.replace(self, w=w)

    def continued(self, other: Nodes) -> Nodes:
        """The same data, with the weights of ``other`` on the line, if these are weights of the same points."""
        if not np.array_equal(self.x[~self.data], other.x[~other.data]):
            return self
        w = self.w.copy()
        w[~self.data] = other.w[~other.data] * (self.guard / other.guard)
        return dataclasses.replace(self, w=w)
