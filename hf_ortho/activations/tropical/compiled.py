"""The tropical families for ``torch.compile``: explicit gradients that fuse into one loop."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.sums import totals
from .cpu import line_scale


class Tropical:
    """S(x) = (sqrt(2)/n) max_k (k x + a_k)."""

    @staticmethod
    def gradients(x: Tensor, g: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        lines = len(coefficients)
        scale = line_scale(lines - 1)
        index = _winner(x, [scale * k for k in range(lines)], scale * coefficients)[0]
        return scale * index * g, scale * _per_line(index, g, coefficients)


class TropicalRational:
    """S(x) = max_k (p_k x + a_k) - max_k (q_k x + b_k)."""

    @staticmethod
    def gradients(x: Tensor, g: Tensor, p: Tensor, a: Tensor, q: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        (above, p_above), (below, q_below) = _winner(x, p, a), _winner(x, q, b)
        moment = g * x
        top = _per_line(above, moment, a), _per_line(above, g, a)
        return (p_above - q_below) * g, *top, -_per_line(below, moment, b), -_per_line(below, g, b)


def _winner(x: Tensor, slopes, intercepts: Tensor) -> tuple[Tensor, Tensor]:
    """Index and slope of the first line that attains max_k (slopes_k x + intercepts_k)."""
    best = slopes[0] * x + intercepts[0]
    index, slope = torch.zeros_like(x), torch.zeros_like(x) + slopes[0]
    for k in range(1, len(intercepts)):
        line = slopes[k] * x + intercepts[k]
        higher = line > best
        index, slope = torch.where(higher, float(k), index), torch.where(higher, slopes[k], slope)
        best = torch.where(higher, line, best)
    return index, slope


def _per_line(index: Tensor, values: Tensor, intercepts: Tensor) -> Tensor:
    return totals([torch.where(index == k, values, 0.0) for k in range(len(intercepts))], intercepts[0])
