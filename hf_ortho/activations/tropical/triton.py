"""Device functions of the tropical families.

Summand k is non-zero where the maximum of all lines is above the maximum of the first k, that is, where line k or a
later one is the first to attain the maximum. The gradient of line k is the difference of neighboring sums.
"""

# Tuples of device values grow by concatenation, which mypy sees as a change of type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from ...kernels.triton_common import ALL_NAN, DeviceFunctions, constexpr_function, load_scalars, unchanged
from . import cpu

line_scale = constexpr_function(cpu.line_scale)


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


@triton.jit
def tropical_scalars(p, DEGREE: tl.constexpr):
    slopes = ()
    intercepts = ()
    for k in tl.static_range(DEGREE + 1):
        slopes = slopes + (line_scale(DEGREE) * k,)
        intercepts = intercepts + (tl.load(p[0] + k).to(tl.float32) * line_scale(DEGREE),)
    return slopes, intercepts


@triton.jit
def tropical_value(x, scalars, DEGREE: tl.constexpr):
    return max_of_lines(x, scalars[0], scalars[1], DEGREE + 1)


@triton.jit
def tropical_gradient(x, g, scalars, DEGREE: tl.constexpr):
    slope, _, of_intercepts = gradient_of_max(x, g, scalars[0], scalars[1], DEGREE + 1)
    return slope, of_intercepts


@triton.jit
def tropical_finish(totals, scalars, DEGREE: tl.constexpr):
    gradients = ()
    for k in tl.static_range(DEGREE + 1):
        gradients = gradients + (totals[k] * line_scale(DEGREE),)
    return gradients


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


TROPICAL = DeviceFunctions(tropical_scalars, tropical_value, tropical_gradient, tropical_finish, cumulative=True)
RATIONAL = DeviceFunctions(
    tropical_rational_scalars, tropical_rational_value, tropical_rational_gradient, unchanged, cumulative=True
)
