"""CPU kernels of the tropical families, which compute only the lines of the upper envelope."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.cpu import above, add_scaled, factors, tensors, total


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
        self.rises = factors([b - a for a, b in itertools.pairwise([0.0, *self.slopes])], dtype, device)
        *self.floors, last = factors([intercepts[k] for k, _ in self.hull], dtype, device)
        self.intercepts = tensors([*self.floors, last], dtype, device)
        self.last = self.intercepts[-1]
        self.short = len(self.hull) <= 2

    def value(self, x: Tensor, out, row, least_slope: float | None = None) -> Tensor:
        """The maximum; ``least_slope`` replaces the least slope s_0."""
        exact = self.short and least_slope is None
        return self.lines(x, out, row) if exact else self.horner(x, out, least_slope)

    def lines(self, x: Tensor, out, row) -> Tensor:
        """Line by line. Each line is rounded once, so a maximum with x itself, as in ReLU, is exact."""
        y = add_scaled(self.intercepts[0], x, self.slopes[0], out)
        for slope, intercept in zip(self.slopes[1:], self.intercepts[1:], strict=True):
            torch.maximum(y, add_scaled(intercept, x, slope, row), out=y)  # propagates NaN
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

    def add_gradient(self, x: Tensor, g: Tensor, out, scratch, reduce: bool, moments: bool, sign: float = 1.0) -> list:
        """Add sign g f'(x) to ``out``. Returns, per line of the envelope, the sum of g to the right of its start,
        followed by the sum of g x if ``moments``."""
        if not self.defined and out is not None:
            out.fill_(math.nan)
        sums, right = [], g
        for i, (rise, (_, start)) in enumerate(zip(self.rises, self.hull, strict=True)):
            if i > 0:
                right = self.beyond(right, x, start, scratch)
            if out is not None and (isinstance(rise, Tensor) or rise):
                add_scaled(out, right, sign * rise, out)
            if reduce:
                sums.append(total(right))
            if reduce and moments:
                sums.append(total(torch.mul(right, x, out=scratch[1])))
        return sums

    def beyond(self, g: Tensor, x: Tensor, start, scratch) -> Tensor:
        """g where x > start, else 0."""
        return above(g, x, start, grad_input=scratch[0])

    @np.errstate(invalid="ignore")  # a sum may have overflowed
    def per_line(self, sums: list) -> list:
        """The sum over the interval of each line, from the sums to the right of each start; 0 off the envelope."""
        of_line = [0.0] * self.count
        for (k, _), here, after in zip(self.hull, sums, [*sums[1:], 0.0], strict=True):
            of_line[k] = here - after
        return of_line


class MaximumPerChannel(Maximum):
    """The same with arrays of shape (lines, C): each channel has its own upper envelope."""

    # In every channel the lines in order of slope are the same list, in which a line off the envelope repeats the one
    # before it: it adds no slope, and between its start and that of the one before lies nothing.

    def __init__(self, slopes, intercepts, dtype: torch.dtype, device: torch.device):
        intercepts = np.array(intercepts, float)
        slopes = (np.zeros_like(intercepts).T + np.transpose(slopes)).T
        self.order = np.lexsort((-intercepts, slopes), axis=0)
        s, a = (np.take_along_axis(v, self.order, 0) for v in (slopes, intercepts))
        start, end = np.full_like(s, -np.inf), np.full_like(s, np.inf)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            for j in range(len(s) - 1):
                meet = (a[j] - a[j + 1 :]) / (s[j + 1 :] - s[j])
                meet[np.isnan(meet)] = np.inf  # lines that coincide
                np.maximum(start[j + 1 :], meet, out=start[j + 1 :])
                end[j] = meet.min(0)
        seen = start < end
        undefined = ~(np.isfinite(s) & (a < np.inf) | (a == -np.inf)).all(0) | (a == -np.inf).all(0)
        s[:, undefined] = np.nan
        before = np.maximum.accumulate(np.where(seen, np.arange(len(s))[:, None], -1))
        index = np.where(before < 0, seen.argmax(0), before)
        index = index[[i for i in range(len(s)) if i == 0 or (index[i] != index[i - 1]).any()]]
        s, a, start, self.order = (np.take_along_axis(v, index, 0) for v in (s, a, start, self.order))
        self.count, self.defined, self.short = len(slopes), True, True
        self.slopes, self.intercepts = factors(s, dtype, device), tensors(a, dtype, device)
        self.rises = factors(np.diff(s, axis=0, prepend=0.0), dtype, device)
        starts: Any = tensors(start, dtype, device)
        self.hull = list(enumerate(starts))

    def beyond(self, g: Tensor, x: Tensor, start: Tensor, scratch) -> Tensor:
        return torch.mul(g, torch.gt(x, start, out=scratch[1]), out=scratch[0])

    @np.errstate(invalid="ignore")  # a sum may have overflowed
    def per_line(self, sums: list) -> list:
        here, of_line = np.array(sums), np.zeros((self.count, self.order.shape[1]))
        within = here - np.append(here[1:], np.zeros_like(here[:1]), 0)
        np.add.at(of_line, (self.order, np.arange(self.order.shape[1])), within)
        return list(of_line)


def maximum(slopes, intercepts, dtype: torch.dtype, device: torch.device) -> Maximum:
    """max_k (slopes_k x + intercepts_k), of numbers or of rows of channels."""
    return (Maximum if np.ndim(intercepts) == 1 else MaximumPerChannel)(slopes, intercepts, dtype, device)


class TropicalSeries:
    """S(x) = (sqrt(2)/n) max_k (k x + a_k)."""

    scratch_rows = 2

    def __init__(self, parameters, domain, dtype: torch.dtype, device: torch.device, large: bool):
        (a,) = parameters
        self.scale = line_scale(len(a) - 1)
        slopes = [self.scale * k for k in range(len(a))]
        self.maximum = maximum(slopes, [self.scale * v for v in a], dtype, device)

    def value(self, x: Tensor, out, scratch) -> Tensor:
        return self.maximum.value(x, out, scratch[0])

    def backward_chunk(self, x: Tensor, g: Tensor, out, scratch, reduce: bool) -> list:
        if out is not None:
            out.zero_()
        return self.maximum.add_gradient(x, g, out, scratch, reduce, moments=False)

    def parameter_gradients(self, sums: list) -> list:
        return [[self.scale * v for v in self.maximum.per_line(sums)]]


class TropicalRationalSeries:
    """S(x) = max_k (p_k x + a_k) - max_k (q_k x + b_k)."""

    scratch_rows = 2

    def __init__(self, parameters, domain, dtype: torch.dtype, device: torch.device, large: bool):
        p, a, q, b = parameters
        self.top, self.bottom = maximum(p, a, dtype, device), maximum(q, b, dtype, device)
        self.least_slope = self.top.rises[0] - self.bottom.rises[0]

    def value(self, x: Tensor, out, scratch) -> Tensor:
        exact = self.top.short and self.bottom.short
        y = self.top.value(x, out, scratch[0], None if exact else self.least_slope)
        return y.sub_(self.bottom.value(x, scratch[0], scratch[1], None if exact else 0.0))

    def backward_chunk(self, x: Tensor, g: Tensor, out, scratch, reduce: bool) -> list:
        if out is not None:
            out.zero_()
        sums = self.top.add_gradient(x, g, out, scratch, reduce, moments=True)
        return sums + self.bottom.add_gradient(x, g, out, scratch, reduce, moments=True, sign=-1.0)

    def parameter_gradients(self, sums: list) -> list:
        cut = 2 * len(self.top.hull)
        top, bottom = sums[:cut], [-v for v in sums[cut:]]
        return [
            self.top.per_line(top[1::2]),
            self.top.per_line(top[::2]),
            self.bottom.per_line(bottom[1::2]),
            self.bottom.per_line(bottom[::2]),
        ]
