"""The Fourier family for ``torch.compile``: explicit gradients that fuse into one loop."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from ...kernels.sums import totals


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
        terms, amplitudes = [g], []
        for k, (a, w, p) in enumerate(zip(coefficients, frequencies, phases, strict=True), 1):
            cosine, sine = cosine_and_sine(x, w, p)
            amplitudes.append(a / math.factorial(k))
            slope = slope - amplitudes[-1] * w * sine
            terms += [g * cosine / math.factorial(k), moment * sine, g * sine]
        sums, amplitude = totals(terms, offset[0]), torch.stack(amplitudes)
        return g * slope, sums[:1], sums[1::3], -amplitude * sums[2::3], amplitude * sums[3::3]


def in_square(fn, degree: int) -> list[float]:
    """Monomial coefficients in u = r^2 of the interpolant of an even ``fn(r)`` at Chebyshev nodes on 0 <= u <= 1/4."""
    interpolant = Chebyshev.interpolate(lambda u: fn(np.sqrt(u)), degree, domain=[0, 0.25])
    return interpolant.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef.tolist()


# cos(2 pi r) and sin(2 pi r)/r for |r| <= 1/2, both within 1e-8, in a third of the time of the compiler's functions.
COSINE = in_square(lambda r: np.cos(2 * np.pi * r), 7)
SINE = in_square(lambda r: 2 * np.pi * np.sinc(2 * r), 6)


def cosine_and_sine(x: Tensor, frequency: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """cos(w x - p) and sin(w x - p); in float32 by polynomials in the angle, measured in turns."""
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
