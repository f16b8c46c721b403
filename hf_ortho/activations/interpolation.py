r"""What the fits of all families share: the nodes, the weights, the solvers, the error measures.

*Hermite interpolation* here is weighted Sobolev least squares in float64,

    min_theta  sum_i w_i [ (f(x_i) - g(x_i))^2 + lambda (f'(x_i) - g'(x_i))^2 ],

with the tails inside f, so that the interval [lo, hi] is part of the problem.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import least_squares

from .source import Source

if TYPE_CHECKING:
    from .base import LearnableActivation

Array = np.ndarray

# The data-free weight N(-0.5, 1.5^2): pre-activations of pretrained networks lean to the negative side. It also backs a
# histogram, so that regions without data stay sane.
DEFAULT_MEAN, DEFAULT_SIGMA = -0.5, 1.5
BACKGROUND_MASS = 1.0e-3
# Share of the data-free weight spread evenly, so that high degrees stay close where the density vanishes.
UNIFORM_MASS = 1.0e-3


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


def norm_density(z: Array) -> Array:
    """exp(-z^2/2) / sqrt(2 pi)."""
    return np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def gaussian_moments(value, derivative, sigma: float, breaks: tuple[float, ...] = ()) -> tuple[float, float]:
    """E[F(x)^2] and E[F'(x)^2] for x ~ N(0, sigma^2), by quadrature split at ``breaks``."""
    x, w = quadrature(-16 * sigma, 16 * sigma, breaks, step=sigma / 4)
    w = w * norm_density(x / sigma) / sigma
    return float(w @ value(x) ** 2), float(w @ derivative(x) ** 2)


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Points x_i with weights w_i (sum 1), and what is known of the data behind them.

    ``minimum`` and ``maximum`` are the exact extremes of the data, None without data;
    ``data`` marks the nodes that come from data.
    """

    x: Array
    w: Array
    data: Array
    minimum: float | None = None
    maximum: float | None = None

    @classmethod
    def gaussian(cls, source: Source, step: float = 0.25) -> Nodes:
        """The data-free weight, with a little mass everywhere on 7 sigma to either side."""
        reach = 7 * DEFAULT_SIGMA
        x, length = quadrature(DEFAULT_MEAN - reach, DEFAULT_MEAN + reach, (0.0, *source.kinks), step)
        density = norm_density((x - DEFAULT_MEAN) / DEFAULT_SIGMA) / DEFAULT_SIGMA
        w = length * ((1 - UNIFORM_MASS) * density + UNIFORM_MASS / (2 * reach))
        return cls(x, w / w.sum(), np.ones(len(x), dtype=bool))

    @classmethod
    def histogram(cls, source: Source, x: Array, counts: Array, minimum: float, maximum: float) -> Nodes:
        back = cls.gaussian(source, step=0.5)
        seen = counts > 0
        x, w = x[seen], counts[seen] / counts.sum()
        return cls(
            np.concatenate([x, back.x]),
            np.concatenate([w * (1 - BACKGROUND_MASS), back.w * BACKGROUND_MASS]),
            np.concatenate([np.ones(len(x), dtype=bool), np.zeros(len(back.x), dtype=bool)]),
            minimum,
            maximum,
        )

    def mean(self, values: Array) -> float:
        """Average over the data."""
        return float(self.w[self.data] @ values[self.data] / self.w[self.data].sum())


def width_bounds(degree: int) -> tuple[float, float]:
    """The least and the largest -lo and hi that a search tries, in units of x.

    Around a kink the least-squares error alone would shrink the interval to nothing, where float32 coefficients blow up
    and no data is left to learn from.
    """
    return 0.6 * math.sqrt(max(degree, 2)), 40.0


@dataclasses.dataclass(frozen=True)
class Target:
    """What a fit gets: the nodes, g and g' there, the tails' slopes, and lambda (``derivative_weight``)."""

    source: Source
    nodes: Nodes
    g: Array
    dg: Array
    derivative_weight: float
    domain: tuple[float, float] | None

    @classmethod
    def of(cls, source: Source, nodes: Nodes, derivative_weight: float, domain: tuple[float, float] | None) -> Target:
        return cls(source, nodes, source.value(nodes.x), source.derivative(nodes.x), derivative_weight, domain)

    def least_squares(self, design: Array, slope_design: Array, lo: float, hi: float, ridge: float = 0.0):
        """Solve for the linear coefficients with the interval fixed.

        ``design`` and ``slope_design`` hold the basis and its derivative at clamp(x, lo, hi), shape (nodes, p).
        Returns the coefficients, the residual, and a function that projects onto the residual space.
        """
        x, (s_lo, s_hi) = self.nodes.x, self.source.slopes
        root = np.sqrt(self.nodes.w)[:, None]
        tails = s_lo * np.minimum(x - lo, 0) + s_hi * np.maximum(x - hi, 0)
        blocks, right = [design * root], [(self.g - tails) * root[:, 0]]
        if self.derivative_weight:
            inside = ((x >= lo) & (x <= hi))[:, None]
            root = root * math.sqrt(self.derivative_weight)
            blocks.append(np.where(inside, slope_design, 0.0) * root)
            outside_slope = np.where(x < lo, s_lo, np.where(x > hi, s_hi, 0.0))
            right.append((self.dg - outside_slope) * root[:, 0])
        if ridge:
            blocks.append(ridge * np.eye(design.shape[1]))
            right.append(np.zeros(design.shape[1]))
        a, b = np.concatenate(blocks), np.concatenate(right)
        u, s, vt = np.linalg.svd(a, full_matrices=False)
        keep = s > 1e-13 * s[0]
        u, projected = u[:, keep], u[:, keep].T @ b
        return vt[keep].T @ (projected / s[keep]), u @ projected - b, lambda v: v - u @ (u.T @ v)


def variable_projection(problem, starts, bounds, max_nfev: int = 60) -> Array:
    """Minimise |P(theta) b| over the non-linear parameters alone (Golub & Pereyra), Kaufman's Jacobian.

    ``problem(theta)`` returns the residual and its Jacobian; the best of all ``starts`` is returned.
    """
    best, best_cost = None, math.inf
    lower, upper = (np.asarray(v, dtype=float) for v in bounds)
    for start in starts:
        start = np.clip(start, lower + 1e-9, upper - 1e-9)
        memo: dict[bytes, tuple[Array, Array]] = {}

        def at(theta, memo=memo):
            key = theta.tobytes()
            if key not in memo:
                memo.clear()
                memo[key] = problem(theta)
            return memo[key]

        result = least_squares(
            lambda theta, at=at: at(theta)[0],
            start,
            jac=lambda theta, at=at: at(theta)[1],
            bounds=(lower, upper),
            max_nfev=max_nfev,
            x_scale="jac",
        )
        if result.cost < best_cost:
            best, best_cost = result.x, result.cost
    assert best is not None
    return best


@dataclasses.dataclass(frozen=True)
class FitReport:
    """How well f matches g: ``sup`` over the real line, ``rms`` under the weight of the nodes.

    Attributes:
        domain, tail_slopes: the interval [lo, hi] and the slopes outside, as stored in the module.
        sup_error, sup_derivative_error: max |f - g| and max |f' - g'| (away from kinks) on the real line.
        rms_error, rms_derivative_error: root mean squares over the data, or over N(-0.5, 1.5^2) without data.
        mass_outside: share of the data outside [lo, hi].
        minimum, maximum: exact extremes of the data, None without data.
        note: what a reader must know, for example that a convex family cannot follow the source; else empty.
    """

    activation: str
    source: str
    domain: tuple[float, float]
    tail_slopes: tuple[float, float]
    sup_error: float
    sup_derivative_error: float
    rms_error: float
    rms_derivative_error: float
    mass_outside: float
    minimum: float | None
    maximum: float | None
    note: str = ""

    @classmethod
    def measure(cls, module: LearnableActivation, target: Target, note: str = "") -> FitReport:
        """Compare the module as stored (float32 parameters, float64 arithmetic) with the source."""
        nodes, source = target.nodes, target.source
        lo, hi = (float(v) for v in module.domain.tolist())
        reach = [20.0] + [abs(v) for v in (nodes.minimum, nodes.maximum, lo, hi) if v is not None and math.isfinite(v)]
        grid = np.union1d(np.linspace(-max(reach), max(reach), 8001), np.linspace(-12, 12, 9601))
        smooth = np.ones(len(grid), dtype=bool)
        for kink in source.kinks:
            smooth &= np.abs(grid - kink) > 1e-3

        def errors(x: Array, g: Array, dg: Array):
            t = torch.as_tensor(x, dtype=torch.float64, device=module.domain.device)
            with torch.no_grad():
                return module(t).cpu().numpy() - g, module.derivative(t).cpu().numpy() - dg

        e, de = errors(grid, source.value(grid), source.derivative(grid))
        if nodes.minimum is None:  # other nodes than the fit has seen
            nodes = Nodes.gaussian(source, step=0.2)
        en, den = errors(nodes.x, source.value(nodes.x), source.derivative(nodes.x))
        return cls(
            module.name,
            source.name,
            (lo, hi),
            tuple(module.tail_slopes.tolist()),
            float(np.abs(e).max()),
            float(np.abs(de[smooth]).max()),
            math.sqrt(nodes.mean(en**2)),
            math.sqrt(nodes.mean(den**2)),
            nodes.mean((nodes.x < lo) | (nodes.x > hi)),
            nodes.minimum,
            nodes.maximum,
            note,
        )

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
