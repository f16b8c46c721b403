"""Triton code of the Fourier family: float32 accuracy at any angle; the GPU's fast cosine for half precision."""

# Tuples of device values grow by concatenation, which mypy sees as a change of type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import math

import numpy as np
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ...kernels.triton_common import DeviceFunctions, constexpr_function
from .compiled import in_square

INVERSE_PI = tl.constexpr(float(np.float32(1 / math.pi)))
INVERSE_PI_REST = tl.constexpr(1 / math.pi - float(np.float32(1 / math.pi)))
# For |t| < 2^22, the float32 sum t + ROUND is an integer, and its lowest bit is the parity.
ROUND = tl.constexpr(1.5 * 2**23)
LARGEST_ANGLE = tl.constexpr(2.0**22)


COSINE = in_square(lambda r: np.cos(math.pi * r), 5)  # of cos(pi r); error 2.3e-10
SINE = in_square(lambda r: math.pi * np.sinc(r), 4)  # of sin(pi r)/r; error 7e-9 of sin(pi r)


@constexpr_function
def cosine_coefficient(k):
    return COSINE[k]


@constexpr_function
def sine_coefficient(k):
    return -SINE[k]  # the angle has -r


@constexpr_function
def inverse_factorial(k):
    return 1 / math.factorial(k)


@triton.jit
def half_turns(radians):
    """radians/pi as a float32 and a remainder."""
    high = radians * INVERSE_PI
    return high, tl.fma(radians, INVERSE_PI, -high) + radians * INVERSE_PI_REST


@triton.jit
def fourier_scalars(p, DEGREE: tl.constexpr):
    """a_0, the largest |w_k|/pi, and for each k: a_k/k!, w_k, w_k/pi as a sum of two floats, p_k/pi."""
    offset = tl.load(p[0]).to(tl.float32)
    terms = ()
    fastest = 0.0
    for k in tl.static_range(DEGREE):
        amplitude = tl.load(p[1] + k).to(tl.float32) * inverse_factorial(k + 1)
        frequency = tl.load(p[2] + k).to(tl.float32)
        high, low = half_turns(frequency)
        phase, rest = half_turns(tl.load(p[3] + k).to(tl.float32))
        phase = phase - 2.0 * ((0.5 * phase + ROUND) - ROUND) + rest
        fastest = tl.maximum(fastest, tl.abs(high))
        terms = terms + (amplitude, frequency, high, low, phase)
    return (offset, fastest) + terms


@triton.jit
def resolved(x, fastest):
    """x, or 0 where float32 is too coarse to resolve the phase of every term; NaN where x is infinite."""
    return tl.where(tl.abs(x * fastest) < LARGEST_ANGLE, x, x - x)


@triton.jit
def cosine_and_sine(x, high, low, phase):
    """cos and sin of w x - p = pi (m - r), m an integer, |r| <= 1/2.

    The fused products are exact, so r keeps its digits if m is large.
    """
    shifted = tl.fma(x, high, -phase) + ROUND
    r = tl.fma(x, -high, shifted - ROUND) + tl.fma(x, -low, phase)
    u = r * r
    c = u * cosine_coefficient(5) + cosine_coefficient(4)
    s = u * sine_coefficient(4) + sine_coefficient(3)
    for i in tl.static_range(4):
        c = c * u + cosine_coefficient(3 - i)
    for i in tl.static_range(3):
        s = s * u + sine_coefficient(2 - i)
    sign = shifted.to(tl.int32, bitcast=True) << 31
    c = (c.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    s = ((s * r).to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return c, s


# ---- Fourier in half precision -----------------------------------------------------------------------------------
# The GPU's fast cosine has an error below 2^-20 on [-pi, pi] (PTX ISA, cos.approx). Beyond, the error grows with the
# rounding of the angle in float32, 2^-23 of it: below the rounding of the output up to angles of some thousand.

INTERPRETED = tl.constexpr(not isinstance(half_turns, triton.JITFunction))


@triton.jit
def half_fourier_scalars(p, DEGREE: tl.constexpr):
    """a_0, and for each k: a_k/k!, w_k, p_k."""
    terms = ()
    for k in tl.static_range(DEGREE):
        amplitude = tl.load(p[1] + k).to(tl.float32) * inverse_factorial(k + 1)
        terms = terms + (amplitude, tl.load(p[2] + k).to(tl.float32), tl.load(p[3] + k).to(tl.float32))
    return (tl.load(p[0]).to(tl.float32),) + terms


@triton.jit
def approximate_cosine_and_sine(x, frequency, phase):
    angle = x * frequency - phase
    if INTERPRETED:  # without a device library
        c, s = tl.cos(angle), tl.sin(angle)
    else:
        c, s = libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    return c, s


# ---- Shared by both precisions -----------------------------------------------------------------------------------


@constexpr_function
def first_of(k, half):
    """The index of the amplitude of term k among the scalars; the frequency follows."""
    return 1 + 3 * k if half else 2 + 5 * k


@triton.jit
def cosine_and_sine_of(x, scalars, K: tl.constexpr, HALF: tl.constexpr):
    if HALF:
        c, s = approximate_cosine_and_sine(x, scalars[2 + 3 * K], scalars[3 + 3 * K])
    else:
        c, s = cosine_and_sine(x, scalars[4 + 5 * K], scalars[5 + 5 * K], scalars[6 + 5 * K])
    return c, s


@triton.jit
def value_of(x, scalars, DEGREE: tl.constexpr, HALF: tl.constexpr):
    y = scalars[0]
    for k in tl.static_range(DEGREE):
        c, _ = cosine_and_sine_of(x, scalars, k, HALF)
        y += scalars[first_of(k, HALF)] * c
    return y


@triton.jit
def gradient_of(x, g, scalars, DEGREE: tl.constexpr, HALF: tl.constexpr):
    slope = 0.0
    gx = g * x
    amplitudes = ()
    frequencies = ()
    phases = ()
    for k in tl.static_range(DEGREE):
        c, s = cosine_and_sine_of(x, scalars, k, HALF)
        slope -= scalars[first_of(k, HALF)] * scalars[first_of(k, HALF) + 1] * s
        amplitudes = amplitudes + (g * c,)
        frequencies = frequencies + (gx * s,)
        phases = phases + (g * s,)
    return slope, (g,) + amplitudes + frequencies + phases


@triton.jit
def finish_of(totals, scalars, DEGREE: tl.constexpr, HALF: tl.constexpr):
    amplitudes = ()
    frequencies = ()
    phases = ()
    for k in tl.static_range(DEGREE):
        amplitude = scalars[first_of(k, HALF)]
        amplitudes = amplitudes + (totals[1 + k] * inverse_factorial(k + 1),)
        frequencies = frequencies + (-amplitude * totals[1 + DEGREE + k],)
        phases = phases + (amplitude * totals[1 + 2 * DEGREE + k],)
    return (totals[0],) + amplitudes + frequencies + phases


@triton.jit
def fourier_value(x, scalars, DEGREE: tl.constexpr):
    return value_of(resolved(x, scalars[1]), scalars, DEGREE, False)


@triton.jit
def fourier_gradient(x, g, scalars, DEGREE: tl.constexpr):
    return gradient_of(resolved(x, scalars[1]), g, scalars, DEGREE, False)


@triton.jit
def fourier_finish(totals, scalars, DEGREE: tl.constexpr):
    return finish_of(totals, scalars, DEGREE, False)


@triton.jit
def half_fourier_value(x, scalars, DEGREE: tl.constexpr):
    return value_of(x, scalars, DEGREE, True)


@triton.jit
def half_fourier_gradient(x, g, scalars, DEGREE: tl.constexpr):
    return gradient_of(x, g, scalars, DEGREE, True)


@triton.jit
def half_fourier_finish(totals, scalars, DEGREE: tl.constexpr):
    return finish_of(totals, scalars, DEGREE, True)


HALF_PRECISION = DeviceFunctions(
    half_fourier_scalars, half_fourier_value, half_fourier_gradient, half_fourier_finish, beyond_degree=0
)
KERNELS = DeviceFunctions(
    fourier_scalars, fourier_value, fourier_gradient, fourier_finish, beyond_degree=0, half_precision=HALF_PRECISION
)
