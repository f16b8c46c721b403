"""CPU kernel of the Fourier family for large inputs: Taylor expansions about grid nodes, at a cost independent of n."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .cpu import FourierSeries

LEAST_NODES, MOST_NODES = 64, 4096  # three tables of 4096 nodes take 48 KB
ROUNDING = 2.0**-22
ROUNDER = 1.5 * 2.0**23  # ulp 1 in float32: adding it rounds to an integer, found in the low bits of the sum


class TaylorSeries:
    """S by its Taylor polynomial of degree 2 about the nearest node of a grid.

    ``grid`` holds the middle, the step h, the number 2^m of nodes, and whether x may lie off the grid. In units of h,
    t = (x - middle)/h, node i is at t = i, and x has the distance d = t - i, |d| <= 1/2, so the remainder is at most
    h^3 max |S'''|/48. Indices are modulo 2^m: node -1 is the last one. Chunks with an x off the grid use the cosines.
    """

    # Three look-ups and two products replace n cosines: S(x) = S_i + d h S_i' + d^2 h^2 S_i''/2.
    # Backward uses the expansion in reverse. A parameter's gradient is the sum of g phi(x), phi = dS/dparameter. With
    # phi expanded about the nodes it is sum_i (W0_i phi_i + W1_i h phi_i' + W2_i h^2 phi_i''/2). The weights
    # Wj_i = sum of g d^j over the x near node i do not depend on phi: three scatters serve all 3n + 1 parameters, and
    # the products with phi are computed once, over the nodes.

    scratch_rows = 4

    def __init__(self, parameters, grid: tuple[float, float, int, bool], dtype: torch.dtype, device: torch.device):
        self.cosines = FourierSeries(parameters, dtype, device)
        (offset,), _, self.w, self.p = (np.array(vector) for vector in parameters)
        self.middle, self.step, self.nodes, self.open = grid
        self.scale, self.reach = 1 / self.step, self.step * (self.nodes // 2 - 1)
        self.shift = torch.tensor(-self.middle / self.step, dtype=dtype, device=device)
        # The jth derivative of A cos(w x - p) = Re A e^(i(w x - p)) is Re A (iw)^j e^(i(w x - p)).
        orders = np.arange(4)[:, None]
        amplitudes = np.array(self.cosines.amplitudes) * (1j * self.w) ** orders
        derivatives = np.einsum("jk,ki->ji", amplitudes, self._waves()).real
        derivatives[0] += offset
        terms = derivatives * self.step**orders / [[1], [1], [2], [6]]
        tables = [terms[:3], terms[1:] * [[1], [2], [3]] / self.step]
        self.of_value, self.of_slope = (torch.tensor(t, dtype=dtype, device=device).unbind() for t in tables)

    def _waves(self) -> np.ndarray:
        """e^(i(w_k x - p_k)) at the nodes, shape (n, nodes), as products of its values at every 32nd node with
        e^(i w_k x) at 32 offsets."""
        half, step = self.nodes // 2, self.step
        starts = self.middle + step * np.arange(-half, half, 32)
        every = np.exp(1j * (np.outer(self.w, starts) - self.p[:, None]))
        between = np.exp(1j * np.outer(self.w, step * np.arange(32)))
        return np.fft.ifftshift((every[:, :, None] * between[:, None]).reshape(len(self.w), -1), 1)

    def _off(self, x: Tensor) -> bool:
        """Whether any x other than NaN is off the grid."""
        if not self.open:
            return False
        least, most = (v.item() for v in x.aminmax())
        if math.isnan(least):
            least, most = (v.item() for v in x.nan_to_num(0.0).aminmax())
        return not -self.reach <= least <= most <= self.reach

    def _nearest(self, x: Tensor, scratch) -> tuple[Tensor, Tensor]:
        """d in the first row, and the indices of the nodes in the last two; NaN gets index 0."""
        d = torch.add(self.shift, x, alpha=self.scale, out=scratch[0])
        rounded = torch.add(d, ROUNDER, out=scratch[1])
        d.sub_(torch.sub(rounded, ROUNDER, out=scratch[2]))
        index = rounded.view(torch.int32).bitwise_and_(self.nodes - 1)
        return d, _wide(scratch[2], torch.int64).copy_(index)  # otherwise ATen converts it for each table

    def _evaluate(self, tables, d: Tensor, index: Tensor, out: Tensor, row: Tensor) -> Tensor:
        zeroth, first, second = tables
        y = torch.index_select(first, 0, index, out=row)
        y.addcmul_(d, torch.index_select(second, 0, index, out=out))
        return torch.index_select(zeroth, 0, index, out=out).addcmul_(d, y)

    def value(self, x: Tensor, out, scratch) -> Tensor:
        if self._off(x):
            return self.cosines.value(x, out, scratch)
        scratch = x.new_empty(self.scratch_rows, len(x)) if scratch[0] is None else scratch
        return self._evaluate(self.of_value, *self._nearest(x, scratch), out, scratch[1])

    def backward_chunk(self, x: Tensor, g: Tensor, out, scratch, reduce: bool) -> list:
        if self._off(x):
            sums = self.cosines.backward_chunk(x, g, out, scratch, reduce)
            return [0.0, 0.0, *sums] if reduce else []
        d, index = self._nearest(x, scratch)
        if out is not None:
            self._evaluate(self.of_slope, d, index, out, scratch[1]).mul_(g)
        if not reduce:
            return []
        higher, product = torch.zeros(2, self.nodes, dtype=x.dtype, device=x.device), g
        for weights in higher:
            product = torch.mul(product, d, out=scratch[1])
            weights.scatter_add_(0, index, product)
        # In float64, since all x beyond a domain are clamped to one point and add up in one weight.
        lowest = torch.zeros(self.nodes, dtype=torch.float64, device=x.device)
        lowest.scatter_add_(0, index, _wide(scratch[0], torch.float64).copy_(g))
        return [lowest.numpy(), higher.numpy(), *(0.0 for _ in range(1 + 3 * len(self.w)))]

    def parameter_gradients(self, sums: list) -> list[list[float]]:
        with np.errstate(invalid="ignore", over="ignore"):  # a gradient may have overflowed
            lowest, higher, *from_cosines = sums
            w0, w1 = lowest + np.zeros(self.nodes), higher + np.zeros((2, self.nodes))
            w1, w2 = w1 * [[self.step], [self.step**2 / 2]]
            x = self.middle + self.step * np.fft.fftfreq(self.nodes, 1 / self.nodes)  # 0, 1, .., -2, -1 steps
            moments = np.stack([w0, w1, w2, x * w0 + w1, x * w1 + 2 * w2, x * w2])  # of d^j and of x d^j
            # Not with @: for a product this small, the threads of a BLAS cost more than the arithmetic.
            terms = np.einsum("mi,ki->mk", moments, self._waves()) * (1j * self.w) ** [[0], [1], [2], [0], [1], [2]]
            plain, times_x = terms[:3].sum(0), terms[3:].sum(0)
            each = np.stack([plain.real, plain.imag, times_x.imag], 1)
            return self.cosines.parameter_gradients((np.array([w0.sum(), *each.ravel()]) + from_cosines).tolist())


def _wide(row: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a row and the next row as one row of 64-bit numbers."""
    return row.as_strided((2 * len(row),), (1,)).view(dtype)


def _grid(parameters, domain) -> tuple[float, float, int, bool] | None:
    """A grid on which S and its gradients are accurate to ``ROUNDING``; None if it needs more than ``MOST_NODES``.

    For an infinite domain it has ``MOST_NODES`` nodes, and each chunk is checked for x off the grid.
    """
    _, a, w, _ = map(np.array, parameters)
    if not all(math.isfinite(v) for vector in parameters for v in vector):
        return None
    # The remainder for a step h is h^3/48 times a third derivative. Relative to the largest amplitude A_k = a_k/k!, S
    # has at most sum_k A_k w_k^3; relative to the largest A_k w_k, S' has at most sum_k A_k w_k^4; and the gradient of
    # a_k has at most w_k^3/k!. ``remainder`` bounds all three for h = 1. The step is the largest power of two for which
    # the remainder stays below ROUNDING.
    relative = 1 / np.cumprod(np.arange(1.0, len(a) + 1))
    amplitudes, w = np.abs(a) * relative, np.abs(w)
    weights = np.maximum(amplitudes / (amplitudes.max() or 1.0), relative)
    slope = (amplitudes * w).max() or 1.0
    remainder = max(weights @ w**3, amplitudes @ w**4 / slope, 1e-9) / 48
    # With a power of two as step and a multiple of it as middle, t is exact: otherwise thousands of equal x, clamped to
    # a domain, would accumulate the same error.
    step = 2.0 ** math.floor(math.log2(ROUNDING / remainder) / 3)
    lo, hi = domain
    if domain == (-math.inf, math.inf):
        return 0.0, step, MOST_NODES, True
    if not (lo < hi and (hi - lo) / step <= MOST_NODES - 4):  # also False for one infinite end
        return None
    nodes = max(LEAST_NODES, 2 ** math.ceil(math.log2((hi - lo) / step + 4)))
    return step * round((lo + hi) / 2 / step), step, nodes, False


def make_fourier_series(
    parameters, domain, dtype: torch.dtype, device: torch.device, large: bool
) -> FourierSeries | TaylorSeries:
    """S(x) = a_0 + sum_k a_k cos(w_k x - p_k)/k!; tables pay off for ``large`` inputs only."""
    tables = large and dtype == torch.float32 and device.type == "cpu"
    grid = _grid(parameters, domain) if tables else None
    return FourierSeries(parameters, dtype, device) if grid is None else TaylorSeries(parameters, grid, dtype, device)
