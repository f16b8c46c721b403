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
