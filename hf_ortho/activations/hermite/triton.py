"""Device functions of the Hermite family: Horner's scheme in monomials up to degree 8, the recurrence above."""

# Tuples of device values grow by concatenation, which mypy sees as a change of type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from ...kernels.triton_common import DeviceFunctions, constexpr_function, load_scalars, ones
from . import cpu

HORNER_MAX_DEGREE = tl.constexpr(cpu.HORNER_MAX_DEGREE)
monomial = constexpr_function(cpu.monomial)


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


KERNELS = DeviceFunctions(hermite_scalars, hermite_value, hermite_gradient, hermite_scales)
