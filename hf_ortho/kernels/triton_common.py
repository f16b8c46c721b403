"""Triton code shared by several families."""

# Tuples of device values grow by concatenation, which mypy sees as a change of type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import dataclasses
from typing import Any

import triton
import triton.language as tl

# In Triton 3.4, which torch 2.8 uses, it is in the language module.
constexpr_function = getattr(triton, "constexpr_function", None) or tl.constexpr_function
ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)


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


@dataclasses.dataclass(frozen=True)
class DeviceFunctions:
    """S, S' and the parameter gradients of a family, per element, as four small ``triton.jit`` functions.

    With ``p`` the pointers of the parameters in their order,

        scalars(p, DEGREE)              -> a tuple of float32 scalars that all elements share
        value(x, scalars, DEGREE)       -> S(x)
        gradient(x, g, scalars, DEGREE) -> S'(x), and for every parameter the summand whose sum over x is its gradient
        scales(scalars, DEGREE)         -> a constant factor of each of these sums

    The compiler removes unused summands as dead code.

    Attributes:
        cumulative: sum k is the total over the entries k, k + 1, ... of the parameter.
        beyond_degree: the length of the last parameter minus the degree.
        half_precision: the functions for bfloat16 and float16 inputs, if they differ.
    """

    scalars: Any
    value: Any
    gradient: Any
    scales: Any
    cumulative: bool = False
    beyond_degree: int = 1
    half_precision: "DeviceFunctions | None" = None
