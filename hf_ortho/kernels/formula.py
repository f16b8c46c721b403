"""An activation from its series, domain and straight tails, in plain differentiable operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def value(series: Callable[..., Tensor], x: Tensor, domain: Tensor, tail_slopes: Tensor, *parameters: Tensor) -> Tensor:
    """f(x) = S(clamp(x, lo, hi)) + s_lo min(x - lo, 0) + s_hi max(x - hi, 0), all tensors of one dtype.

    A slope of 0 adds nothing, even at infinity.
    """
    lo, hi = domain
    s_lo, s_hi = tail_slopes
    inside = torch.clamp(x, lo, hi)
    beyond = x - inside
    below, above = s_lo * torch.clamp(beyond, max=0.0), s_hi * torch.clamp(beyond, min=0.0)
    y = series(inside, *parameters)
    return y + torch.where(s_lo == 0, 0.0, below) + torch.where(s_hi == 0, 0.0, above)


def slope(
    derivative: Callable[..., Tensor], x: Tensor, domain: Tensor, tail_slopes: Tensor, *parameters: Tensor
) -> Tensor:
    """f'(x): S' on [lo, hi], s_lo below, s_hi above."""
    return splice(x, derivative(torch.clamp(x, domain[0], domain[1]), *parameters), domain, tail_slopes)


def splice(x: Tensor, inside: Tensor, domain: Tensor, tail_slopes: Tensor, g: Tensor | float = 1.0) -> Tensor:
    """``inside`` on the domain, g times the slope of the tail outside."""
    beyond = torch.where(x < domain[0], tail_slopes[0] * g, tail_slopes[1] * g)
    return torch.where((x < domain[0]) | (x > domain[1]), beyond, inside)
