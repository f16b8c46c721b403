"""What ``torch.compile`` sees in place of autograd's own derivative of a series, so that all of it fuses into one loop.

Differentiated automatically, a maximum or a sum of cosines becomes several passes over memory. Each class has
``gradients(x, g, *parameters)``: g S'(x) and, for each parameter, the sum of g dS/dparameter; and ``value`` where the
family's own ``series`` is not the fastest form. All tensors have one dtype, which the results have too.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from .hermite import HORNER_MAX_DEGREE, MONOMIALS


class Hermite:
    """S(x) = sum_k c_k h_k(x), h_k = He_k/k!, h_k' = h_{k-1}; with monomials g x^k up to degree 8, g h_k above."""

    @staticmethod
    def gradients(x: Tensor, g: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        degree = len(coefficients) - 1
        horner = degree <= HORNER_MAX_DEGREE
        table = torch.tensor(MONOMIALS[degree], dtype=x.dtype, device=x.device) if horner else None
        c = coefficients if table is None else (table * coefficients).sum(1)  # no matmul: autocast would round it
        gx, before, now = torch.zeros_like(g), torch.zeros_like(g), g
        sums = [g.sum()]
        for k in range(degree):
            gx = gx + c[k + 1] * (k + 1 if horner else 1) * now
            before, now = now, now * x if horner else (x * now - before) / (k + 1)
            sums.append(now.sum())
        gradient = torch.stack(sums)
        return gx, gradient if table is None else (table.T * gradient).sum(1)


class Fourier:
    """S(x) = a_0 + sum_k A_k cos(w_k x - p_k), A_k = a_k/k!."""

    @staticmethod
    def value(x: Tensor, offset: Tensor, coefficients: Tensor, frequencies: Tensor, phases: Tensor) -> Tensor:
        y = offset[0].expand_as(x)
        for k, (a, w, p) in enumerate(zip(coefficients, frequencies, phases, strict=True), 1):
            y = y + a / math.factorial(k) * cosine_and_sine(x, w, p)[0]
        return y

    @staticmethod
    def gradients(x: Tensor, g: Tensor, offset: Tensor, coefficients: Tensor, frequencies: Tensor, phases: Tensor):
        moment = g * x
        slope = torch.zeros_like(x)
        of_cosine, of_sine, of_moment, amplitudes = [], [], [], []
        for k, (a, w, p) in enumerate(zip(coefficients, frequencies, phases, strict=True), 1):
            cosine, sine = cosine_and_sine(x, w, p)
            amplitudes.append(a / math.factorial(k))
            slope = slope - amplitudes[-1] * w * sine
            of_cosine.append((g * cosine).sum() / math.factorial(k))
            of_sine.append((g * sine).sum())
            of_moment.append((moment * sine).sum())
        amplitude = torch.stack(amplitudes)
        at_frequencies, at_phases = -amplitude * torch.stack(of_moment), amplitude * torch.stack(of_sine)
        return g * slope, g.sum().reshape(1), torch.stack(of_cosine), at_frequencies, at_phases


def _in_turns(fn, degree: int) -> list[float]:
    """Monomial coefficients in u = r^2 of the interpolant of ``fn(r)`` in Chebyshev nodes on 0 <= u <= 1/4."""
    found = Chebyshev.interpolate(lambda u: fn(np.sqrt(u)), degree, domain=[0, 0.25])
    return found.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef.tolist()


# cos(2 pi r) and sin(2 pi r)/r for |r| <= 1/2, both within 1e-8: a third of the time of the compiler's own.
COSINE = _in_turns(lambda r: np.cos(2 * np.pi * r), 7)
SINE = _in_turns(lambda r: 2 * np.pi * np.sinc(2 * r), 6)


def cosine_and_sine(x: Tensor, frequency: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """cos(w x - p) and sin(w x - p); in float32 by polynomials of the angle in turns."""
    if x.dtype != torch.float32:
        angle = frequency * x - phase
        return torch.cos(angle), torch.sin(angle)
    turns = x * (frequency / (2 * math.pi)) - phase / (2 * math.pi)
    r = turns - torch.round(turns)
    return _horner(COSINE, r * r), r * _horner(SINE, r * r)


def _horner(coefficients: list[float], u: Tensor) -> Tensor:
    y = coefficients[-1] * u + coefficients[-2]
    for c in coefficients[-3::-1]:
        y = y * u + c
    return y


class Tropical:
    """S(x) = (sqrt(2)/n) max_k (k x + a_k)."""

    @staticmethod
    def gradients(x: Tensor, g: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        lines = len(coefficients)
        scale = math.sqrt(2) / (lines - 1)
        index = _winner(x, [scale * k for k in range(lines)], scale * coefficients)[0]
        return scale * index * g, scale * _per_line(index, g, lines)


class TropicalRational:
    """S(x) = max_k (p_k x + a_k) - max_k (q_k x + b_k)."""

    @staticmethod
    def gradients(x: Tensor, g: Tensor, p: Tensor, a: Tensor, q: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        (above, p_above), (below, q_below) = _winner(x, p, a), _winner(x, q, b)
        lines, moment = len(p), g * x
        top = _per_line(above, moment, lines), _per_line(above, g, lines)
        return (p_above - q_below) * g, *top, -_per_line(below, moment, lines), -_per_line(below, g, lines)


def _winner(x: Tensor, slopes, intercepts: Tensor) -> tuple[Tensor, Tensor]:
    """Index and slope of the first line that attains max_k (slopes_k x + intercepts_k)."""
    best = slopes[0] * x + intercepts[0]
    index, slope = torch.zeros_like(x), torch.zeros_like(x) + slopes[0]
    for k in range(1, len(intercepts)):
        line = slopes[k] * x + intercepts[k]
        higher = line > best
        index, slope = torch.where(higher, float(k), index), torch.where(higher, slopes[k], slope)
        best = torch.where(higher, line, best)
    return index, slope


def _per_line(index: Tensor, values: Tensor, lines: int) -> Tensor:
    return torch.stack([torch.where(index == k, values, 0.0).sum() for k in range(lines)])
