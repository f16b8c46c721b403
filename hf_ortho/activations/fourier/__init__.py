"""Fourier activations: cosines with learnable frequencies and phases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn

from ...fitting.least_squares import Target, balance, variable_projection, width_bounds
from ..base import LearnableActivation
from . import compiled
from .cpu import make_cosine_series
from .taylor import make_fourier_series

MIN_FREQUENCY, MAX_FREQUENCY = 0.1, 60.0
ROUNDS = 8
HALF_TURN = math.pi + 1e-3  # the largest phase: rounding must not decide between -pi and pi, common for even functions
RIDGE = 1e-6  # prevents low frequencies from canceling with amplitudes of 1e3


def bessel_i0_of_2() -> float:
    """I_0(2) = sum_k 1/k!^2 (DLMF 10.25.2)."""
    return sum(1 / math.factorial(k) ** 2 for k in range(20))


class Fourier(LearnableActivation):
    r"""Fourier activation of degree n (arXiv 2502.01247, section 3):

        S(x) = a_0 + sum_{k=1..n} a_k cos(w_k x - p_k) / k!

    Parameters, float32: ``offset`` a_0, shape (1,); ``coefficients`` a, ``frequencies`` w (radians per unit of x) and
    ``phases`` p (radians), shape (n,) each. Paper initialization: a_0 = A sqrt(1 - 1/n!^2), a_k = A = 1/sqrt(I_0(2)),
    w_k = k, p_k = pi/4.

    Example:
        >>> activation = hf_ortho.activations.Fourier(6, init="unit")
        >>> round(activation.gain()[0], 6)  # E[f(x)^2] for x ~ N(0, 1)
        1.0
    """

    family = "fourier"
    equation = "S(x) = a_0 + sum_{k=1..n} a_k cos(w_k x - p_k) / k!"
    default_degree = 6
    cpu_series, cpu_rows = staticmethod(make_fourier_series), staticmethod(make_cosine_series)
    compiled = compiled.Fourier
    triton = "hf_ortho.activations.fourier.triton:KERNELS"
    offset: nn.Parameter
    coefficients: nn.Parameter
    frequencies: nn.Parameter
    phases: nn.Parameter

    @classmethod
    def initial_parameters(cls, degree, init):
        k = range(1, degree + 1)
        amplitude = 1 / math.sqrt(bessel_i0_of_2())
        offset = amplitude * math.sqrt(1 - 1 / math.factorial(degree) ** 2)
        if init == "unit":
            scale = 1 / math.sqrt(_second_moment(offset / amplitude, degree))
            offset, amplitude = offset / amplitude * scale, scale
        return {
            "offset": [offset],
            "coefficients": [amplitude] * degree,
            "frequencies": [float(v) for v in k],
            "phases": [math.pi / 4] * degree,
        }

    @staticmethod
    def series(x, offset, coefficients, frequencies, phases):
        y = offset[0].expand_as(x)
        for a, w, p in zip(coefficients / _factorials(coefficients), frequencies, phases, strict=True):
            y = torch.addcmul(y, a, torch.cos(w * x - p))
        return y

    @staticmethod
    def series_derivative(x, offset, coefficients, frequencies, phases):
        y = torch.zeros_like(x)
        for a, w, p in zip(coefficients / _factorials(coefficients), frequencies, phases, strict=True):
            y = torch.addcmul(y, -a * w, torch.sin(w * x - p))
        return y

    def natural_units(self):
        """k! for a_k, since the series divides a_k by k!."""
        return {"coefficients": [float(math.factorial(k)) for k in range(1, self.degree + 1)]}

    def fit_parameters(self, target, near=None):
        """Variable projection over frequencies and [lo, hi]; cosine and sine amplitudes are linear."""
        balanced = balance(self._solve, target, ROUNDS, near)
        target, theta = balanced.target, balanced.solution.copy()
        n = self.degree
        theta[:n] = np.sort(theta[:n])
        theta = theta.astype(np.float32).astype(np.float64)
        linear = self._expand(target, theta)[4][0]
        cosine, sine = linear[1 : n + 1], linear[n + 1 :]
        phases = np.arctan2(sine, cosine)
        factorials = np.array([math.factorial(k) for k in range(1, n + 1)], dtype=float)
        values = {
            "offset": linear[:1],
            "coefficients": np.hypot(cosine, sine) * factorials,
            "frequencies": theta[:n],
            "phases": np.where(phases < HALF_TURN - 2 * math.pi, phases + 2 * math.pi, phases),
            "domain": np.array(theta[n:] if target.domain is None else target.domain),
        }
        return values, "", balanced

    def _solve(self, target: Target, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Frequencies (and lo and hi unless given) for fixed weights, and f - g at the nodes."""
        # With a_k cos(w_k t - p_k) = c_k cos(w_k t) + s_k sin(w_k t), only the frequencies and the two ends are
        # non-linear. The columns of the Jacobian are derivatives of f at fixed amplitudes: t (s cos - c sin) for a
        # frequency, and for an end, at the nodes beyond it, the slope of the series there minus the slope of the tail.
        # ``project`` removes the part that the amplitudes can compensate (see ``variable_projection``). There are many
        # local minima in the frequencies, hence six starts: harmonics of a period of 1.2 to 2 times the width of the
        # interval (the series need not be periodic inside it), each lowered by the same fraction of a step.
        n, x = self.degree, target.nodes.x
        slopes = target.source.slopes
        root = np.sqrt(target.nodes.w)

        def problem(theta):
            t, c, s, slope_design, (linear, residual, project) = self._expand(target, theta)
            a, b, w = linear[1 : n + 1], linear[n + 1 :], theta[:n]
            columns = np.zeros((len(residual), len(theta)))
            columns[: len(x), :n] = root[:, None] * t[:, None] * (b * c - a * s)
            if target.derivative_weight:
                inside = ((x == t) * root * math.sqrt(target.derivative_weight))[:, None]
                wt = w * t[:, None]
                columns[len(x) : 2 * len(x), :n] = inside * (b * (c - wt * s) - a * (s + wt * c))
            if target.domain is None:
                slope = slope_design @ linear
                columns[: len(x), n] = root * (x < t) * (slope - slopes[0])
                columns[: len(x), n + 1] = root * (x > t) * (slope - slopes[1])
            return residual, project(columns)

        starts = [] if start is None else [start]
        for widen, stretch in itertools.product((1.75, 1.0), (1.2, 1.6, 2.0)) if start is None else ():
            reach, shift = widen * math.sqrt(max(n, 2)), 0.3
            w = math.pi / (stretch * reach) * (np.arange(1, n + 1) - shift)
            starts.append(np.concatenate([w, [-reach, reach] if target.domain is None else []]))
        lower, upper = [MIN_FREQUENCY] * n, [MAX_FREQUENCY] * n
        if target.domain is None:
            (least_lo, most_lo), (least_hi, most_hi) = width_bounds(n)
            lower, upper = [*lower, -most_lo, least_hi], [*upper, -least_lo, most_hi]
        theta = variable_projection(problem, starts, (lower, upper), 4 if start is None else 1)
        return theta, problem(theta)[0][: len(x)] / np.where(root > 0, root, 1.0)

    def _expand(self, target: Target, theta: np.ndarray):
        """clamp(x), its cosines and sines, the derivatives of the basis, and the least-squares solution."""
        # For given frequencies and ends the problem is linear in 2n + 1 amplitudes. Cosines and sines are columns of
        # one design at t = clamp(x, lo, hi), so the series is constant outside, where the tails take over. At low
        # frequencies the columns are nearly dependent, hence RIDGE.
        n, x = self.degree, target.nodes.x
        w, (lo, hi) = theta[:n], theta[n:] if target.domain is None else target.domain
        t = np.clip(x, lo, hi)
        c, s = np.cos(np.outer(t, w)), np.sin(np.outer(t, w))
        design = np.concatenate([np.ones((len(x), 1)), c, s], 1)
        slope_design = np.concatenate([np.zeros((len(x), 1)), -s * w, c * w], 1)
        return t, c, s, slope_design, target.least_squares(design, slope_design, lo, hi, RIDGE)


def _factorials(like: Tensor) -> Tensor:
    factorials = [math.factorial(k) for k in range(1, len(like) + 1)]
    return torch.tensor(factorials, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))


def _second_moment(offset: float, degree: int) -> float:
    """E[S(x)^2], x ~ N(0, 1), for a_k = 1, w_k = k, p_k = pi/4, by E cos(w x) = exp(-w^2/2)."""
    total = offset**2
    for j in range(1, degree + 1):
        fj = math.factorial(j)
        total += 2 * offset * math.cos(math.pi / 4) * math.exp(-(j**2) / 2) / fj
        for k in range(1, degree + 1):
            # cos A cos B = (cos(A - B) + cos(A + B)) / 2 with phases 0 and pi/2; sines have expectation 0.
            total += 0.5 * math.exp(-((j - k) ** 2) / 2) / (fj * math.factorial(k))
    return total
