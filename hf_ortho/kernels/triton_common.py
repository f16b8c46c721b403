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


@constexpr_function
def log2(power: int) -> int:
    return power.bit_length() - 1


@triton.jit
def load_scalars(pointer, COUNT: tl.constexpr):
    """The first ``COUNT`` values as a tuple of float32 scalars."""
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(pointer + k).to(tl.float32),)
    return values


@triton.jit
def columns(block, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The columns of a block of LANES x WIDTH elements, in the order of ``side_by_side``.

    If a thread holds whole rows, each column is one of its registers, and nothing moves.
    """
    pieces = (block,)
    for level in tl.static_range(log2(WIDTH)):
        halves = ()
        for i in tl.static_range(2**level):
            halves = halves + tl.split(tl.reshape(pieces[i], [LANES, WIDTH >> (level + 1), 2]))
        pieces = halves
    found = ()
    for i in tl.static_range(WIDTH):
        found = found + (tl.reshape(pieces[i], [LANES]),)
    return found


@triton.jit
def side_by_side(pieces, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The block whose ``columns`` are the pieces."""
    for level in tl.static_range(log2(WIDTH)):
        joined = ()
        for i in tl.static_range(WIDTH >> (level + 1)):
            pair = tl.join(pieces[2 * i], pieces[2 * i + 1])
            joined = joined + (tl.reshape(pair, [LANES, 2 << level]),)
        pieces = joined
    return tl.reshape(pieces[0], [LANES, WIDTH])


@triton.jit
def unchanged(totals, scalars, DEGREE: tl.constexpr):
    return totals


@dataclasses.dataclass(frozen=True)
class DeviceFunctions:
    """S, S' and the parameter gradients of a family, per element, as four small ``triton.jit`` functions.

    With ``p`` the pointers of the parameters in their order,

        scalars(p, DEGREE)              -> a tuple of float32 scalars that all elements share
        value(x, scalars, DEGREE)       -> S(x)
        gradient(x, g, scalars, DEGREE) -> S'(x), and for every parameter the summand whose sum over x is its gradient
        finish(totals, scalars, DEGREE) -> the gradients of the parameters from the sums of these summands

    With many parameters, ``finish`` gets some of the sums at a time and 0 for the others. The compiler removes unused
    summands as dead code.

    Attributes:
        cumulative: sum k is the total over the entries k, k + 1, ... of the parameter.
        beyond_degree: the length of the last parameter minus the degree.
        half_precision: the functions for bfloat16 and float16 inputs, if they differ.
    """

    scalars: Any
    value: Any
    gradient: Any
    finish: Any
    cumulative: bool = False
    beyond_degree: int = 1
    half_precision: "DeviceFunctions | None" = None
