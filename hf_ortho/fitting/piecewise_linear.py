"""Free-knot least squares with continuous piecewise-linear functions, and their form as a difference of maxima."""

from __future__ import annotations

import math

import numpy as np

from .least_squares import Target, clearly_less, variable_projection
from .nodes import Nodes

WIDEST = 0.1  # half the width of the widest interval that a node stands for
INACTIVE = 1.0  # how far below the maximum an unused line starts; close enough for training to activate it


def fit_knots(
    target: Target, n: int, start: np.ndarray | None = None, search: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Knots and values of the best continuous piecewise-linear function with at most n kinks of either sign.

    ``start`` holds knots to refine, for example the knots found for other weights. If these get too many kinks, others
    are searched for, or without ``search`` the flattest kinks are dropped.
    """
    source = target.source
    if source.piecewise_linear and source.kinks:
        knots = np.array(source.kinks)
        values = source.value(knots)
        if not len(_excess(_bends(knots, values, source.slopes), n)):
            return knots, values
    if start is not None and len(start) > 1:
        knots, values, _ = _refine(target, start, legs=1)  # the next round goes on
        while not search and len(drop := _excess(_bends(knots, values, source.slopes), n)):
            knots, values, _ = _refine(target, np.delete(knots, drop), legs=1)
        if not len(_excess(_bends(knots, values, source.slopes), n)):
            return knots, values
    # The error has local minima in the knots, so the start matters. For the best interpolant, each interval between
    # knots has the same error, and the density of knots is |g''|^(2/5) times a power of the weight. Two powers are
    # tried, with 2n knots. If there are more than n kinks of one sign, the flattest are dropped and the remaining knots
    # refined, until both signs have at most n.
    best, best_cost = None, math.inf
    for power in (0.0, 0.2):
        density, x = _knot_density(target, power)
        cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
        if cumulative[-1] == 0.0:  # a line
            return np.zeros(1), source.value(np.zeros(1))
        knots = np.interp((np.arange(2 * n) + 0.5) / (2 * n) * cumulative[-1], cumulative, x)
        knots, values, cost = _refine(target, knots)
        while len(drop := _excess(_bends(knots, values, source.slopes), n)):
            knots, values, cost = _refine(target, np.delete(knots, drop))
        if clearly_less(cost, best_cost):
            best, best_cost = (knots, values), cost
    assert best is not None
    return best


def interpolate(x: np.ndarray, knots: np.ndarray, values: np.ndarray, slopes: tuple[float, float]) -> np.ndarray:
    """The continuous function that is linear between the knots and has ``slopes`` outside."""
    return (
        np.interp(x, knots, values) + slopes[0] * np.minimum(x - knots[0], 0) + slopes[1] * np.maximum(x - knots[-1], 0)
    )


def _knot_density(target: Target, power: float) -> tuple[np.ndarray, np.ndarray]:
    """w^power |g''|^(2/5) on a grid; power 1/5 equidistributes the weighted squared error, 0 the plain one."""
    nodes: Nodes = target.nodes
    edges = np.linspace(-8.0, 8.0, 65)
    mass = np.histogram(nodes.x, edges, weights=nodes.w)[0]
    x = np.linspace(-8.0, 8.0, 4001)
    w = np.interp(x, (edges[1:] + edges[:-1]) / 2, mass)
    return w**power * np.abs(np.gradient(target.source.derivative(x), x)) ** 0.4, x


def _half_widths(nodes: Nodes) -> np.ndarray:
    """Half the distance of each node to the nearest one, within the data and within the line."""
    half = np.empty_like(nodes.x)
    for group in (nodes.data, ~nodes.data):
        gaps = np.diff(np.concatenate([[-math.inf], nodes.x[group], [math.inf]]))
        half[group] = np.minimum(gaps[:-1], gaps[1:]) / 2
    return np.clip(half, 1e-6, WIDEST)


def _steps(x: np.ndarray, half: np.ndarray, knots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Averages over x +- half of the ramps max(x - t, 0), of the steps x > t, and of the steps that rise from 0 to 1
    between a knot and the next, with a first column of ones and a last one of zeros."""
    away = x[:, None] - knots
    half = half[:, None]
    share = (np.clip(away / half, -1.0, 1.0) + 1) / 2
    ramps = half * share**2 + np.maximum(away - half, 0.0)
    rises = np.ones((len(x), len(knots) + 1))
    rises[:, 1:-1] = (ramps[:, :-1] - ramps[:, 1:]) / np.diff(knots)
    rises[:, -1] = 0.0
    return ramps, share, rises


def _refine(target: Target, knots: np.ndarray, legs: int = 4) -> tuple[np.ndarray, np.ndarray, float]:
    """Move the knots (parametrized by the first one and the logarithms of the gaps); values by least squares.

    The end knots lie on the source's asymptotes, so both tails are exact.
    """
    # For fixed knots the interpolant is linear in its values: ``solve`` finds them by QR. The knots are found by
    # variable projection: moving a knot t_j at fixed values shifts the two lines through it, which changes f by
    # -slope * hat_j on either side. The Jacobian is that column minus its part in the space of the hats (Q Q^T,
    # Kaufman). The logarithms of the gaps keep the knots in order without constraints; the chain rule from them to the
    # knots is a lower triangle of ones times the gaps. The Jacobian of f' leaves out the jump at the knot itself, which
    # is too narrow for a linear model. Each node stands for the interval around it, so f is averaged over that: at the
    # nodes alone the error would have a kink wherever a knot meets a node, and the search would stop at one of these.
    source, (x, w) = target.source, (target.nodes.x, target.nodes.w)
    (s_lo, s_hi), (i_lo, i_hi) = source.slopes, source.intercepts
    root, half = np.sqrt(w), _half_widths(target.nodes)

    def unpack(theta):
        return theta[0] + np.concatenate([[0.0], np.cumsum(np.exp(theta[1:]))])

    def solve(t):
        ramps, beyond, rises = _steps(x, half, t)
        hats = rises[:, :-1] - rises[:, 1:]
        ends = np.zeros(len(t))
        ends[0], ends[-1] = s_lo * t[0] + i_lo, s_hi * t[-1] + i_hi
        # Solve for deviations from g at the knots, with a small ridge: a hat may cover no data at all.
        prior = source.value(t)
        prior[[0, -1]] = ends[[0, -1]]
        fixed = hats @ prior + s_lo * (x - t[0] - ramps[:, 0]) + s_hi * ramps[:, -1]
        free = hats[:, 1:-1]
        m = free.shape[1]
        blocks, right = [free * root[:, None]], [(target.g - fixed) * root]
        if target.derivative_weight:
            slopes = np.pad((beyond[:, :-1] - beyond[:, 1:]) / np.diff(t), ((0, 0), (1, 1)))
            slope_hats = slopes[:, :-1] - slopes[:, 1:]
            outer = s_lo * (1 - beyond[:, 0]) + s_hi * beyond[:, -1]
            scale = root * math.sqrt(target.derivative_weight)
            blocks.append(slope_hats[:, 1:-1] * scale[:, None])
            right.append((target.dg - outer - slope_hats @ prior) * scale)
        blocks.append(1e-6 * np.eye(m))
        right.append(np.zeros(m))
        a, b = np.concatenate(blocks), np.concatenate(right)
        q, r = np.linalg.qr(a)
        deviation = np.linalg.solve(r, q.T @ b) if m else np.zeros(0)
        values = prior.copy()
        values[1:-1] += deviation
        return values, a @ deviation - b, (beyond, rises), q

    def problem(theta):
        t = unpack(theta)
        values, residual, (beyond, rises), q = solve(t)
        slopes = np.concatenate([[s_lo], np.diff(values) / np.diff(t), [s_hi]])
        # d/dt_j of the interpolant at fixed values is -slope * hat_j. The end values move along the asymptotes.
        rising, falling = rises[:, :-1] - beyond, beyond - rises[:, 1:]
        moves = -slopes[:-1] * rising - slopes[1:] * falling
        moves[:, 0] += s_lo * (rising + falling)[:, 0]
        moves[:, -1] += s_hi * (rising + falling)[:, -1]
        columns = np.zeros((len(residual), len(t)))
        columns[: len(x)] = moves * root[:, None]
        if target.derivative_weight:
            turns = np.zeros((len(x), len(t) + 1))
            turns[:, 1:-1] = (beyond[:, :-1] - beyond[:, 1:]) * slopes[1:-1] / np.diff(t)
            columns[len(x) : 2 * len(x)] = np.diff(turns) * root[:, None] * math.sqrt(target.derivative_weight)
        columns -= q @ (q.T @ columns)
        chain = np.tril(np.ones((len(t), len(t))))
        chain[:, 1:] *= np.exp(theta[1:])
        return residual, columns @ chain

    if len(knots) < 2:
        values = source.value(knots)
        error = target.g - interpolate(x, knots, values, source.slopes)
        return knots, values, float(w @ error**2)
    gaps = np.maximum(np.diff(knots), 1e-3)
    start = np.concatenate([knots[:1], np.log(gaps)])
    # Knots that are too close would fit the gaps between the nodes.
    least = math.log(0.1 * gaps.min())
    bounds = ([-30.0] + [least] * len(gaps), [30.0] + [math.log(30.0)] * len(gaps))
    t = unpack(variable_projection(problem, [start], bounds, legs=legs if len(gaps) < 32 else 1))
    values, residual, *_ = solve(t)
    return t, values, float(residual @ residual)


def _bends(knots, values, slopes) -> np.ndarray:
    """The change of slope at each knot."""
    inner = np.diff(values) / np.diff(knots)
    return np.diff(np.concatenate([[slopes[0]], inner, [slopes[1]]]))


def _excess(bends: np.ndarray, n: int) -> np.ndarray:
    """The knots to drop if there are more than n kinks of one sign: the flattest ones."""
    drop: list[int] = []
    for sign in (1, -1):
        of_sign = np.flatnonzero(sign * bends > 0)
        flattest = of_sign[np.argsort(np.abs(bends[of_sign]))]
        drop += flattest[: max(0, len(of_sign) - n)].tolist()
    return np.array(drop, dtype=int)


def lines_through(knots, values, slopes, n) -> dict[str, np.ndarray]:
    """Convex kinks become numerator lines, concave kinks denominator lines. Unused lines start below the maximum.

    Both maxima are built outwards from the flattest piece, to avoid the cancellation of large slopes there.
    """
    bends = _bends(knots, values, slopes)
    pieces = np.cumsum([slopes[0], *bends])  # the slope left of each knot, then right of the last
    flat = int(np.argmin(np.abs(pieces)))
    through = min(flat, len(knots) - 1)
    numerator = [(pieces[flat], values[through] - pieces[flat] * knots[through])]
    denominator = [(0.0, 0.0)]
    rightwards = [(i, 1.0) for i in range(flat, len(knots))]
    for i, direction in rightwards + [(i, -1.0) for i in range(flat - 1, -1, -1)]:
        lines, size = (numerator, bends[i]) if bends[i] > 0 else (denominator, -bends[i])
        if size:
            p, a = max(lines) if direction > 0 else min(lines)
            lines.append((p + direction * size, a - direction * size * knots[i]))
    out = {}
    for name, lines in (("numerator", numerator), ("denominator", denominator)):
        spare = n + 1 - len(lines)
        lines = lines + [(p, a - INACTIVE) for p, a in (lines * (spare + 1))[:spare]]
        out[f"{name}_slopes"], out[f"{name}_intercepts"] = np.array(lines).T
    return out
