"""CPU kernel of the Fourier family on a finite domain: expansions about the nodes of a grid, whatever the degree."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .fourier import FourierSeries

LEAST_NODES, MOST_NODES = 64, 4096  # the tables of the most nodes still fit a cache of 64 KB
ROUNDING = 2.0**-22
ROUNDER = 1.5 * 2.0**23  # float32 has ulp 1 here: adding it rounds to integers, which the low bits of the sum hold


class TaylorSeries:
    """S on [lo, hi] by its Taylor polynomial of degree 2 about the nearest of 2^m evenly spaced nodes.

    In units of the grid's step h from the middle, t = (x - (lo + hi)/2)/h, node i stands at t = i and x is d = t - i
    off, |d| <= 1/2, so that the remainder is at most h^3 max |S'''|/48. Indices count modulo 2^m: node -1 is the last
    one. A parameter's gradient is a sum of g phi(x) with a smooth phi, of which the same expansion makes
    sum_i (W0_i phi_i + W1_i h phi_i' + W2_i h^2 phi_i''/2): the sums are Wj_i, those of g d^j over the x near node i.
    """

    rows = 4

    def __init__(self, parameters, domain, nodes: int, dtype: torch.dtype, device: torch.device):
        self.cosines = FourierSeries(parameters, dtype, device)
        (offset,), _, self.w, self.p = (np.array(vector) for vector in parameters)
        lo, hi = domain
        self.step = (hi - lo) / (nodes - 2)  # rounding may take an x to half a step beyond the ends
        self.points = (lo + hi) / 2 + self.step * np.fft.fftfreq(nodes, 1 / nodes)  # 0, 1, .., -2, -1
        self.scale = 1 / self.step
        self.shift = torch.tensor(-(lo + hi) / 2 / self.step, dtype=dtype, device=device)
        # S and its derivatives: of A cos(w x - p) = Re A e^(i(w x - p)) the jth is Re A (iw)^j e^(i(w x - p)).
        orders = np.arange(4)
        derivatives = (self._waves() @ (np.array(self.cosines.amplitudes) * (1j * self.w) ** orders[:, None]).T).real
        derivatives[:, 0] += offset
        terms = derivatives * self.step**orders / [1, 1, 2, 6]
        tables = [terms[:, :3], terms[:, 1:] * [1, 2, 3] / self.step]
        self.of_value, self.of_slope = (torch.tensor(t.T, dtype=dtype, device=device).unbind() for t in tables)

    def _waves(self) -> np.ndarray:
        """e^(i(w_k x - p_k)) at the nodes, shape (nodes, n)."""
        angles = np.outer(self.points, self.w) - self.p
        return np.cos(angles) + 1j * np.sin(angles)

    def _nearest(self, x: Tensor, rows) -> tuple[Tensor, Tensor]:
        """d, and the indices of the nodes; that of NaN is 0."""
        d = torch.add(self.shift, x, alpha=self.scale, out=rows[0])
        rounded = torch.add(d, ROUNDER, out=rows[1])
        d.sub_(torch.sub(rounded, ROUNDER, out=rows[2]))
        return d, rounded.view(torch.int32).bitwise_and_(len(self.points) - 1)

    def _evaluate(self, tables, d: Tensor, index: Tensor, out: Tensor, row: Tensor) -> Tensor:
        zeroth, first, second = tables
        y = torch.index_select(first, 0, index, out=row)
        y.addcmul_(d, torch.index_select(second, 0, index, out=out))
        return torch.index_select(zeroth, 0, index, out=out).addcmul_(d, y)

    def value(self, x: Tensor, out: Tensor, rows) -> Tensor:
        rows = [torch.empty_like(out) if row is None else row for row in rows]
        return self._evaluate(self.of_value, *self._nearest(x, rows), out, rows[2])

    def gradient(self, x: Tensor, g: Tensor, out, rows, reduce: bool) -> list:
        d, index = self._nearest(x, rows)
        if out is not None:
            self._evaluate(self.of_slope, d, index, out, rows[2]).mul_(g)
        if not reduce:
            return []
        weights = torch.zeros(3, len(self.points), dtype=x.dtype, device=x.device)
        index = rows[2].as_strided((2 * len(x),), (1,)).view(torch.int64).copy_(index)  # two rows: no allocation
        weights[0].scatter_add_(0, index, g)
        for row in weights[1:]:
            g = torch.mul(g, d, out=rows[1])
            row.scatter_add_(0, index, g)
        return [weights.numpy()]

    def gradients(self, sums: list) -> list[list[float]]:
        with np.errstate(invalid="ignore", over="ignore"):  # of a gradient that has overflowed
            w0, w1, w2 = sums[0] * self.step ** np.arange(3)[:, None] / [[1], [1], [2]]
            x, waves, iw = self.points, self._waves(), 1j * self.w
            plain = w0 @ waves + (w1 @ waves + w2 @ waves * iw) * iw
            times_x = (x * w0 + w1) @ waves + ((x * w1 + 2 * w2) @ waves + (x * w2) @ waves * iw) * iw
            each = np.stack([plain.real, plain.imag, times_x.imag], 1)
            return self.cosines.gradients([w0.sum(), *each.ravel()])


def _nodes(parameters, domain) -> int | None:
    """How many nodes give S and its gradients to ``ROUNDING``, a power of two; None if more than ``MOST_NODES``."""
    _, a, w, _ = map(np.array, parameters)
    if not all(math.isfinite(v) for vector in (domain, *parameters) for v in vector) or not domain[0] < domain[1]:
        return None
    relative = 1 / np.cumprod(np.arange(1.0, len(a) + 1))
    amplitudes, w = np.abs(a) * relative, np.abs(w)
    weights = np.maximum(amplitudes / (amplitudes.max() or 1.0), relative)
    slope = (amplitudes * w).max() or 1.0
    remainder = max(weights @ w**3, amplitudes @ w**4 / slope) / 48 / ROUNDING
    nodes = 2 + (domain[1] - domain[0]) * remainder ** (1 / 3)
    if not nodes <= MOST_NODES:
        return None
    return max(LEAST_NODES, 2 ** math.ceil(math.log2(nodes)))


def fourier_series(
    parameters, domain, dtype: torch.dtype, device: torch.device, large: bool
) -> FourierSeries | TaylorSeries:
    """S(x) = a_0 + sum_k a_k cos(w_k x - p_k)/k!, for ``large`` inputs on which tables pay off, or for small ones."""
    tables = large and dtype == torch.float32 and device.type == "cpu"
    nodes = _nodes(parameters, domain) if tables else None
    if nodes is None:
        return FourierSeries(parameters, dtype, device)
    return TaylorSeries(parameters, domain, nodes, dtype, device)
