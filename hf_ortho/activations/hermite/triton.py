"""Device functions of the Hermite family: Horner's scheme in monomials up to degree 8, the recurrence above."""

# Tuples of device values grow by concatenation, which mypy sees as a change of type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from ...kernels.triton_common import DeviceFunctions, constexpr_function, load_scalars
from . import cpu

HORNER_MAX_DEGREE = tl.constexpr(cpu.HORNER_MAX_DEGREE)
monomial = constexpr_function(cpu.monomial)


@triton.jit
def hermite_scalars(p, DEGREE: tl.constexpr):
    """The coefficients of x^j up to degree 8, of h_k above."""
    c = load_scalars(p[0], DEGREE + 1)
    if DEGREE <= HORNER_MAX_DEGREE:
        monomials = ()
        for j in tl.static_range(DEGREE + 1):
            total = c[j] * monomial(j, j)
            for k in tl.static_range(j + 2, DEGREE + 1, 2):
                total += c[k] * monomial(j, k)
            monomials = monomials + (total,)
        c = monomials
    return c


@triton.jit
def hermite_value(x, c, DEGREE: tl.constexpr):
    if DEGREE <= HORNER_MAX_DEGREE:
        y = c[DEGREE]
        for i in tl.static_range(1, DEGREE + 1):
            y = y * x + c[DEGREE - i]
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
    """S'(x), and the summands g x^k up to degree 8, g h_k(x) above."""
    if DEGREE <= HORNER_MAX_DEGREE:
        slope = c[DEGREE] * DEGREE
        power = g
        terms = (g,)
        for k in tl.static_range(1, DEGREE + 1):
            power = power * x
            terms = terms + (power,)
            if k < DEGREE:
                slope = slope * x + c[DEGREE - k] * (DEGREE - k)
    else:
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
def hermite_finish(totals, c, DEGREE: tl.constexpr):
    """The sums of g h_k from those of g x^j."""
    gradients = totals
    if DEGREE <= HORNER_MAX_DEGREE:
        gradients = ()
        for k in tl.static_range(DEGREE + 1):
            total = totals[k] * monomial(k, k)
            for j in tl.static_range(k % 2, k, 2):
                total += totals[j] * monomial(j, k)
            gradients = gradients + (total,)
    return gradients


KERNELS = DeviceFunctions(hermite_scalars, hermite_value, hermite_gradient, hermite_finish)
