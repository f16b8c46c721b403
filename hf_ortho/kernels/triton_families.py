"""What the Triton kernels need of each family: S, S' and the gradients of its parameters, element by element.

A family is four small ``triton.jit`` functions, with ``p`` the pointers of its parameters in their order:

    scalars(p, DEGREE)              -> what all elements share, a tuple of float32 scalars
    value(x, scalars, DEGREE)       -> S(x)
    gradient(x, g, scalars, DEGREE) -> S'(x), and for every parameter the summand whose sum over x is its gradient
    scales(scalars, DEGREE)         -> a constant factor of each of these sums

Summands that nobody needs are dead code, which the compiler removes.
"""

# Triton 3.4 compiles tuple concatenation only, which mypy takes for a change of type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import dataclasses
import math
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.polynomial import Chebyshev, Polynomial
from triton.language.extra import libdevice

# Triton 3.4, which torch 2.8 brings, has it in the language module.
constexpr_function = getattr(triton, "constexpr_function", None) or tl.constexpr_function

ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)
HORNER_MAX_DEGREE = tl.constexpr(8)  # above, Horner's cancellation costs digits in float32


@triton.jit
def load_scalars(pointer, COUNT: tl.constexpr):
    """The first ``COUNT`` values as a tuple of float32 scalars."""
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(pointer + k).to(tl.float32),)
    return values


@triton.jit
def ones(scalars, COUNT: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (1.0,)
    return values


# ---- Hermite -----------------------------------------------------------------------------------------------------


@constexpr_function
def monomial(j, k):
    """The coefficient of x^j in He_k(x)/k!, k - j even (DLMF 18.5.13)."""
    m = (k - j) // 2
    return (-1) ** m / (math.factorial(m) * math.factorial(j) * 2**m)


@triton.jit
def hermite_scalars(p, DEGREE: tl.constexpr):
    return load_scalars(p[0], DEGREE + 1)


@triton.jit
def hermite_monomial_sum(c, J: tl.constexpr, DEGREE: tl.constexpr):
    """The coefficient of x^J in S."""
    total = c[J] * monomial(J, J)
    for k in tl.static_range(J + 2, DEGREE + 1, 2):
        total += c[k] * monomial(J, k)
    return total


@triton.jit
def hermite_value(x, c, DEGREE: tl.constexpr):
    if DEGREE <= HORNER_MAX_DEGREE:
        y = hermite_monomial_sum(c, DEGREE, DEGREE)
        for i in tl.static_range(1, DEGREE + 1):
            y = y * x + hermite_monomial_sum(c, DEGREE - i, DEGREE)
    else:
        y = x * c[1] + c[0]
        before = 1.0
        h = x
        for k in tl.static_range(2, DEGREE + 1):
            after = (x * h - before) * (1.0 / k)
            before = h
            h = after
            y += c[k] * h
    return y


@triton.jit
def hermite_gradient(x, g, c, DEGREE: tl.constexpr):
    slope = c[1]
    before = 1.0
    h = x
    terms = (g, g * x)
    for k in tl.static_range(2, DEGREE + 1):
        slope += c[k] * h
        after = (x * h - before) * (1.0 / k)  # k h_k = x h_{k-1} - h_{k-2} for h_k = He_k/k! (DLMF 18.9.1)
        before = h
        h = after
        terms = terms + (g * h,)
    return slope, terms


@triton.jit
def hermite_scales(c, DEGREE: tl.constexpr):
    return ones(c, DEGREE + 1)


# ---- Fourier -----------------------------------------------------------------------------------------------------

INVERSE_PI = tl.constexpr(float(np.float32(1 / math.pi)))
INVERSE_PI_REST = tl.constexpr(1 / math.pi - float(np.float32(1 / math.pi)))
INVERSE_TWO_PI = tl.constexpr(1 / (2 * math.pi))
MINUS_TWO_PI = tl.constexpr(-2 * math.pi)
# A float32 t + ROUND is rounded to an integer, whose parity is the lowest bit, for |t| < 2^22.
ROUND = tl.constexpr(1.5 * 2**23)
REACH = tl.constexpr(2.0**22)


def interpolate(fn, degree):
    """The coefficients of the polynomial that meets ``fn`` at the Chebyshev points of [0, 1/4]."""
    on_interval = Chebyshev.interpolate(fn, degree, domain=[0, 0.25])
    return on_interval.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef.tolist()


COSINE = interpolate(lambda u: np.cos(math.pi * np.sqrt(u)), 5)  # of cos(pi r) in u = r^2; error 2.3e-10
SINE = interpolate(lambda u: math.pi * np.sinc(np.sqrt(u)), 4)  # of sin(pi r)/r; error 7e-9 of sin(pi r)


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
    """radians/pi, as a float32 and the rest."""
    high = radians * INVERSE_PI
    return high, tl.fma(radians, INVERSE_PI, -high) + radians * INVERSE_PI_REST


@triton.jit
def fourier_scalars(p, DEGREE: tl.constexpr):
    """a_0, the largest w_k/pi, and for each k: a_k/k!, w_k, w_k/pi as a sum of two, p_k/pi."""
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
    """x; 0 where neighbouring float32 x are too far apart to tell the phase of all terms; NaN where x is infinite."""
    return tl.where(tl.abs(x * fastest) < REACH, x, x - x)


@triton.jit
def cosine_and_sine(x, high, low, phase):
    """cos and sin of w x - p = pi (m - r), m an integer, |r| <= 1/2.

    The fused products are exact, so that r keeps its digits where m is large.
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


@triton.jit
def fourier_value(x, scalars, DEGREE: tl.constexpr):
    x = resolved(x, scalars[1])
    y = scalars[0]
    for k in tl.static_range(DEGREE):
        c, _ = cosine_and_sine(x, scalars[4 + 5 * k], scalars[5 + 5 * k], scalars[6 + 5 * k])
        y += scalars[2 + 5 * k] * c
    return y


@triton.jit
def fourier_gradient(x, g, scalars, DEGREE: tl.constexpr):
    x = resolved(x, scalars[1])
    slope = 0.0
    gx = g * x
    amplitudes = ()
    frequencies = ()
    phases = ()
    for k in tl.static_range(DEGREE):
        c, s = cosine_and_sine(x, scalars[4 + 5 * k], scalars[5 + 5 * k], scalars[6 + 5 * k])
        slope -= scalars[2 + 5 * k] * scalars[3 + 5 * k] * s
        amplitudes = amplitudes + (g * c,)
        frequencies = frequencies + (gx * s,)
        phases = phases + (g * s,)
    return slope, (g,) + amplitudes + frequencies + phases


@triton.jit
def fourier_scales(scalars, DEGREE: tl.constexpr):
    amplitudes = ()
    frequencies = ()
    phases = ()
    for k in tl.static_range(DEGREE):
        amplitudes = amplitudes + (inverse_factorial(k + 1),)
        frequencies = frequencies + (-scalars[2 + 5 * k],)
        phases = phases + (scalars[2 + 5 * k],)
    return (1.0,) + amplitudes + frequencies + phases


# ---- Fourier in half precision -----------------------------------------------------------------------------------
# The GPU's own cosine, with an error below 2^-20 on [-pi, pi] (PTX ISA, cos.approx), is far better than the output.

INTERPRETED = tl.constexpr(not isinstance(ones, triton.JITFunction))


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
    turns = (angle * INVERSE_TWO_PI + ROUND) - ROUND
    angle += turns * MINUS_TWO_PI
    if INTERPRETED:  # without a device library
        c, s = tl.cos(angle), tl.sin(angle)
    else:
        c, s = libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    return c, s


@triton.jit
def half_fourier_value(x, scalars, DEGREE: tl.constexpr):
    y = scalars[0]
    for k in tl.static_range(DEGREE):
        c, _ = approximate_cosine_and_sine(x, scalars[2 + 3 * k], scalars[3 + 3 * k])
        y += scalars[1 + 3 * k] * c
    return y


@triton.jit
def half_fourier_gradient(x, g, scalars, DEGREE: tl.constexpr):
    slope = 0.0
    gx = g * x
    amplitudes = ()
    frequencies = ()
    phases = ()
    for k in tl.static_range(DEGREE):
        c, s = approximate_cosine_and_sine(x, scalars[2 + 3 * k], scalars[3 + 3 * k])
        slope -= scalars[1 + 3 * k] * scalars[2 + 3 * k] * s
        amplitudes = amplitudes + (g * c,)
        frequencies = frequencies + (gx * s,)
        phases = phases + (g * s,)
    return slope, (g,) + amplitudes + frequencies + phases


@triton.jit
def half_fourier_scales(scalars, DEGREE: tl.constexpr):
    amplitudes = ()
    frequencies = ()
    phases = ()
    for k in tl.static_range(DEGREE):
        amplitudes = amplitudes + (inverse_factorial(k + 1),)
        frequencies = frequencies + (-scalars[1 + 3 * k],)
        phases = phases + (scalars[1 + 3 * k],)
    return (1.0,) + amplitudes + frequencies + phases


# ---- Tropical ----------------------------------------------------------------------------------------------------
# Their summands for line k count where line k or a later one is the first that attains the maximum, which is where the
# maximum of all lines is above that of the first k. The gradient of line k is the difference of neighbouring sums.


@triton.jit
def running_maxima(x, slopes, intercepts, LINES: tl.constexpr):
    """The maxima of the first 1, 2, ..., LINES lines."""
    y = x * slopes[0] + intercepts[0]
    maxima = (y,)
    for k in tl.static_range(1, LINES):
        y = tl.maximum(y, x * slopes[k] + intercepts[k], propagate_nan=ALL_NAN)
        maxima = maxima + (y,)
    return maxima


@triton.jit
def max_of_lines(x, slopes, intercepts, LINES: tl.constexpr):
    return running_maxima(x, slopes, intercepts, LINES)[LINES - 1]


@triton.jit
def gradient_of_max(x, g, slopes, intercepts, LINES: tl.constexpr):
    """The slope of the line that attains the maximum, and the summands of the slopes and of the intercepts."""
    maxima = running_maxima(x, slopes, intercepts, LINES)
    slope = slopes[0]
    gx = g * x
    of_slopes = (gx,)
    of_intercepts = (g,)
    for k in tl.static_range(1, LINES):
        later = tl.where(maxima[LINES - 1] > maxima[k - 1], 1.0, 0.0)
        slope += later * (slopes[k] - slopes[k - 1])
        of_slopes = of_slopes + (later * gx,)
        of_intercepts = of_intercepts + (later * g,)
    return slope, of_slopes, of_intercepts


@constexpr_function
def tropical_scale(degree):
    return math.sqrt(2) / degree


@triton.jit
def tropical_scalars(p, DEGREE: tl.constexpr):
    slopes = ()
    intercepts = ()
    for k in tl.static_range(DEGREE + 1):
        slopes = slopes + (tropical_scale(DEGREE) * k,)
        intercepts = intercepts + (tl.load(p[0] + k).to(tl.float32) * tropical_scale(DEGREE),)
    return slopes, intercepts


@triton.jit
def tropical_value(x, scalars, DEGREE: tl.constexpr):
    return max_of_lines(x, scalars[0], scalars[1], DEGREE + 1)


@triton.jit
def tropical_gradient(x, g, scalars, DEGREE: tl.constexpr):
    slope, _, of_intercepts = gradient_of_max(x, g, scalars[0], scalars[1], DEGREE + 1)
    return slope, of_intercepts


@triton.jit
def tropical_scales(scalars, DEGREE: tl.constexpr):
    scales = ()
    for _ in tl.static_range(DEGREE + 1):
        scales = scales + (tropical_scale(DEGREE),)
    return scales


# ---- Tropical rational -------------------------------------------------------------------------------------------


@triton.jit
def tropical_rational_scalars(p, DEGREE: tl.constexpr):
    return (
        load_scalars(p[0], DEGREE + 1),
        load_scalars(p[1], DEGREE + 1),
        load_scalars(p[2], DEGREE + 1),
        load_scalars(p[3], DEGREE + 1),
    )


@triton.jit
def tropical_rational_value(x, s, DEGREE: tl.constexpr):
    return max_of_lines(x, s[0], s[1], DEGREE + 1) - max_of_lines(x, s[2], s[3], DEGREE + 1)


@triton.jit
def tropical_rational_gradient(x, g, s, DEGREE: tl.constexpr):
    up, up_slopes, up_intercepts = gradient_of_max(x, g, s[0], s[1], DEGREE + 1)
    down, down_slopes, down_intercepts = gradient_of_max(x, -g, s[2], s[3], DEGREE + 1)
    return up - down, up_slopes + up_intercepts + down_slopes + down_intercepts


@triton.jit
def tropical_rational_scales(s, DEGREE: tl.constexpr):
    return ones(s, 4 * DEGREE + 4)


@dataclasses.dataclass(frozen=True)
class Family:
    """The device functions of a family.

    ``cumulative``: the sum of summand k of a parameter belongs to all its entries from k on. ``beyond_degree``: the
    length of the last parameter minus the degree.
    """

    scalars: Any
    value: Any
    gradient: Any
    scales: Any
    cumulative: bool = False
    beyond_degree: int = 1


FAMILIES = {
    "hermite": Family(hermite_scalars, hermite_value, hermite_gradient, hermite_scales),
    "fourier": Family(fourier_scalars, fourier_value, fourier_gradient, fourier_scales, beyond_degree=0),
    "tropical": Family(tropical_scalars, tropical_value, tropical_gradient, tropical_scales, cumulative=True),
    "tropical_rational": Family(
        tropical_rational_scalars,
        tropical_rational_value,
        tropical_rational_gradient,
        tropical_rational_scales,
        cumulative=True,
    ),
}
IN_HALF_PRECISION = FAMILIES | {
    "fourier": Family(
        half_fourier_scalars, half_fourier_value, half_fourier_gradient, half_fourier_scales, beyond_degree=0
    ),
}
