"""What the Triton code of several families shares."""

# Tuples of device values grow by concatenation, which mypy takes for a change of type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import dataclasses
from typing import Any

import triton
import triton.language as tl

# Triton 3.4, which torch 2.8 brings, has it in the language module.
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
    """S, S' and the gradients of the parameters of a family, element by element: four small ``triton.jit`` functions.

    With ``p`` the pointers of the parameters in their order,

        scalars(p, DEGREE)              -> what all elements share, a tuple of float32 scalars
        value(x, scalars, DEGREE)       -> S(x)
        gradient(x, g, scalars, DEGREE) -> S'(x), and for every parameter the summand whose sum over x is its gradient
        scales(scalars, DEGREE)         -> a constant factor of each of these sums

    Summands that nobody needs are dead code, which the compiler removes.

    Attributes:
        cumulative: the sum of summand k of a parameter belongs to all its entries from k on.
        beyond_degree: the length of the last parameter minus the degree.
        half_precision: those for bfloat16 and float16 inputs, if they differ.
    """

    scalars: Any
    value: Any
    gradient: Any
    scales: Any
    cumulative: bool = False
    beyond_degree: int = 1
    half_precision: "DeviceFunctions | None" = None
