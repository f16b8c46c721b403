"""CPU kernels of the tropical families, which compute only the lines of the upper envelope."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ...kernels.cpu import above, rounded


def line_scale(degree: int) -> float:
    """The factor sqrt(2)/n of the tropical polynomial of degree n."""
    return math.sqrt(2) / degree


def upper_envelope(slopes, intercepts) -> list[tuple[int, float]]:
    """The lines that attain max_k (slopes_k x + intercepts_k), left to right, each with the x where it takes over.

    If lines coincide, the first one counts. The first x is -inf.
    """
    # A stack of lines in order of slope. Each new line is the steepest, so it is the maximum from some x on. If that x
    # is left of the start of the last line on the stack, the last line is nowhere the maximum: remove it and compare
    # with the previous one.
    hull: list[tuple[int, float]] = []
    for k in sorted(range(len(slopes)), key=lambda k: (slopes[k], -intercepts[k], k)):
        if hull and slopes[hull[-1][0]] == slopes[k]:
            continue  # parallel and not above
        start = -math.inf
        while hull:
            last, since = hull[-1]
            start = (intercepts[last] - intercepts[k]) / (slopes[k] - slopes[last])
            if start > since:
                break
            hull.pop()
            start = -math.inf
        hull.append((k, start))
    return hull


class Maximum:
    """max_k (slopes_k x + intercepts_k), by its upper envelope; see ``add_gradient`` for the sums."""

    def __init__(self, slopes, intercepts, dtype: torch.dtype, device: torch.device):
        self.count = len(slopes)
        lines = [k for k in range(self.count) if intercepts[k] != -math.inf]  # -inf is never the maximum
        self.defined = bool(lines) and all(math.isfinite(v) for k in lines for v in (slopes[k], intercepts[k]))
        if self.defined:
            hull = upper_envelope([slopes[k] for k in lines], [intercepts[k] for k in lines])
            self.hull = [(lines[k], start) for k, start in hull]
        else:
            self.hull = [(k, -math.inf) for k in range(self.count)]  # NaN must reach the output
        self.slopes = [slopes[k] for k, _ in self.hull]
        self.rises = rounded([b - a for a, b in itertools.pairwise([0.0, *self.slopes])], dtype)
        *self.floors, last = rounded([intercepts[k] for k, _ in self.hull], dtype)
        self.intercepts = torch.tensor([*self.floors, last], dtype=dtype, device=device).unbind()
        self.last = self.intercepts[-1]
        self.short = len(self.hull) <= 2

    def value(self, x: Tensor, out, row, least_slope: float | None = None) -> Tensor:
        """The maximum; ``least_slope`` replaces the least slope s_0."""
        exact = self.short and least_slope is None
        return self.lines(x, out, row) if exact else self.horner(x, out, least_slope)

    def lines(self, x: Tensor, out, row) -> Tensor:
        """Line by line. Each line is rounded once, so a maximum with x itself, as in ReLU, is exact."""
        y = torch.add(self.intercepts[0], x, alpha=self.slopes[0], out=out)
        for slope, intercept in zip(self.slopes[1:], self.intercepts[1:], strict=True):
            torch.maximum(y, torch.add(intercept, x, alpha=slope, out=row), out=y)  # propagates NaN
        return y

    def horner(self, x: Tensor, out, least_slope: float | None) -> Tensor:
        """Max-plus Horner scheme: max(a_0, r_1 x + max(a_1, r_2 x + a_2)) + s_0 x, r_i the increases of the slope.

        Needs no scratch row and propagates NaN.
        """
        first = self.rises[0] if least_slope is None else least_slope
        if not self.floors:
            return torch.add(self.last, x, alpha=first, out=out)
        y = torch.add(self.last, x, alpha=self.rises[-1], out=out)
        for floor, rise in zip(self.floors[:0:-1], self.rises[-2:0:-1], strict=True):
            y.clamp_(min=floor).add_(x, alpha=rise)
        y.clamp_(min=self.floors[0])
        return y.add_(x, alpha=first) if first else y

    def add_gradient(
        self, x: Tensor, g: Tensor, out, scratch, reduce: bool, moments: bool, sign: float = 1.0
    ) -> list[float]:
        """Add sign g f'(x) to ``out``. Returns, per line of the envelope, the sum of g to the right of its start,
        followed by the sum of g x if ``moments``."""
        if not self.defined and out is not None:
            out.fill_(math.nan)
        sums, right = [], g
        for i, (rise, (_, start)) in enumerate(zip(self.rises, self.hull, strict=True)):
            if i > 0:
                right = above(right, x, start, grad_input=scratch[0])
            if out is not None and rise:
                out.add_(right, alpha=sign * rise)
            if reduce:
                sums.append(right.sum().item())
            if reduce and moments:
                sums.append(torch.mul(right, x, out=scratch[1]).sum().item())
        return sums

    def per_line(self, sums: list[float]) -> list[float]:
        """The sum over the interval of each line, from the sums to the right of each start; 0 off the envelope."""
        total = [0.0] * self.count
        for (k, _), here, after in zip(self.hull, sums, [*sums[1:], 0.0], strict=True):
            total[k] = here - after
        return total


class TropicalSeries:
    """S(x) = (sqrt(2)/n) max_k (k x + a_k)."""

    scratch_rows = 1

    def __init__(self, parameters, domain, dtype: torch.dtype, device: torch.device, large: bool):
        (a,) = parameters
        self.scale = line_scale(len(a) - 1)
        slopes = [self.scale * k for k in range(len(a))]
        self.maximum = Maximum(slopes, [self.scale * v for v in a], dtype, device)

    def value(self, x: Tensor, out, scratch) -> Tensor:
        return self.maximum.value(x, out, scratch[0])

    def backward_chunk(self, x: Tensor, g: Tensor, out, scratch, reduce: bool) -> list[float]:
        if out is not None:
            out.zero_()
        return self.maximum.add_gradient(x, g, out, scratch, reduce, moments=False)

    def parameter_gradients(self, sums: list[float]) -> list[list[float]]:
        return [[self.scale * v for v in self.maximum.per_line(sums)]]


class TropicalRationalSeries:
    """S(x) = max_k (p_k x + a_k) - max_k (q_k x + b_k)."""

    scratch_rows = 2

    def __init__(self, parameters, domain, dtype: torch.dtype, device: torch.device, large: bool):
        p, a, q, b = parameters
        self.top, self.bottom = Maximum(p, a, dtype, device), Maximum(q, b, dtype, device)
        self.least_slope = self.top.rises[0] - self.bottom.rises[0]

    def value(self, x: Tensor, out, scratch) -> Tensor:
        exact = self.top.short and self.bottom.short
        y = self.top.value(x, out, scratch[0], None if exact else self.least_slope)
        return y.sub_(self.bottom.value(x, scratch[0], scratch[1], None if exact else 0.0))

    def backward_chunk(self, x: Tensor, g: Tensor, out, scratch, reduce: bool) -> list[float]:
        if out is not None:
            out.zero_()
        sums = self.top.add_gradient(x, g, out, scratch, reduce, moments=True)
        return sums + self.bottom.add_gradient(x, g, out, scratch, reduce, moments=True, sign=-1.0)

    def parameter_gradients(self, sums: list[float]) -> list[list[float]]:
        cut = 2 * len(self.top.hull)
        top, bottom = sums[:cut], [-v for v in sums[cut:]]
        return [
            self.top.per_line(top[1::2]),
            self.top.per_line(top[::2]),
            self.bottom.per_line(bottom[1::2]),
            self.bottom.per_line(bottom[::2]),
        ]
