"""What the Triton kernels need of each family: S, S' and the gradients of its parameters, element by element.

A family is four small ``triton.jit`` functions, with ``p`` the pointers of its parameters in their order:

    scalars(p, DEGREE)              -> what all elements share, a tuple of float32 scalars
    value(x, scalars, DEGREE)       -> S(x)
    gradient(x, g, scalars, DEGREE) -> S'(x), and for every parameter the summand whose sum over x is its gradient
    scales(scalars, DEGREE)         -> a constant factor of each of these sums

Summands that nobody needs are dead code, which the compiler removes.
"""

# Tuples of device values grow by concatenation, which mypy takes for a change of type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import math

import triton
import triton.language as tl

from ..activations.fourier.triton import FOURIER, HALF_FOURIER
from .triton_common import Family, constexpr_function, load_scalars, ones

ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)
HORNER_MAX_DEGREE = tl.constexpr(8)  # above, Horner's cancellation costs digits in float32


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


FAMILIES = {
    "hermite": Family(hermite_scalars, hermite_value, hermite_gradient, hermite_scales),
    "fourier": FOURIER,
    "tropical": Family(tropical_scalars, tropical_value, tropical_gradient, tropical_scales, cumulative=True),
    "tropical_rational": Family(
        tropical_rational_scalars,
        tropical_rational_value,
        tropical_rational_gradient,
        tropical_rational_scales,
        cumulative=True,
    ),
}
IN_HALF_PRECISION = FAMILIES | {"fourier": HALF_FOURIER}
