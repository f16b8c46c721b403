"""CPU kernel of the Fourier family on a finite domain: a Chebyshev interpolant where it costs less than the cosines."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from .fourier import FourierSeries

TERMS_PER_COSINE = 6  # at 8 terms for each cosine the interpolant takes as long as the cosines
LEAST_TERMS = 6  # Clenshaw's scheme starts from three steps of two terms
ROUNDING = 2.0**-22


class ChebyshevSeries:
    """S on [lo, hi] = sum_m (even_m + odd_m t) T_m(u), t = (2x - lo - hi)/(hi - lo), u = T_2(t) = 2 t^2 - 1.

    T_m(u) = T_2m(t), so this is the polynomial that equals S at ``terms`` Chebyshev points in t. The sums are those of
    g T_m(u) and g t T_m(u).
    """

    rows = 5

    def __init__(self, parameters, domain, terms: int, dtype: torch.dtype, device: torch.device):
        self.cosines = FourierSeries(parameters, dtype, device)
        (offset,), _, w, p = parameters
        lo, hi = domain
        t, self.inverse = _interpolation(terms)
        self.points = (lo + hi) / 2 + (hi - lo) / 2 * t
        angles = np.outer(self.points, w) - p
        self.cosine, self.sine = np.cos(angles), np.sin(angles)
        amplitudes = np.array(self.cosines.amplitudes)
        c = self.inverse @ (offset + self.cosine @ amplitudes)
        self.even, self.odd = torch.tensor(c[::2], dtype=dtype, device=device).unbind(), c[1::2].tolist()
        self.slopes = (self.inverse @ (self.sine @ (-amplitudes * w))).reshape(-1, 2).tolist()
        self.scale = 2 / (hi - lo)
        self.shift, self.minus_one = torch.tensor([-(lo + hi) / (hi - lo), -1], dtype=dtype, device=device).unbind()

    def _variables(self, x: Tensor, rows) -> tuple[Tensor, Tensor]:
        t = torch.add(self.shift, x, alpha=self.scale, out=rows[0])
        return t, torch.addcmul(self.minus_one, t, t, value=2, out=rows[1])

    def value(self, x: Tensor, out, rows) -> Tensor:
        """Clenshaw: b_m = even_m + odd_m t - b_{m+2} + 2 u b_{m+1}, but u b_1 in b_0 = S."""
        if out is None:  # a small input: the number of operations counts, and the cosines take fewer
            return self.cosines.value(x, out, rows)
        t, u = self._variables(x, rows)
        even, odd, last = self.even, self.odd, len(self.odd) - 1
        first, second = (out, rows[2]) if last % 2 == 0 else (rows[2], out)  # so that b_0 ends in ``out``
        after = torch.add(even[last], t, alpha=odd[last], out=first)
        y = torch.add(even[last - 1], t, alpha=odd[last - 1], out=second).addcmul_(u, after, value=2)
        for m in range(last - 2, -1, -1):
            spare = torch.sub(even[m], after, out=after).add_(t, alpha=odd[m])
            y, after = spare.addcmul_(u, y, value=2 if m else 1), y
        return y

    def gradient(self, x: Tensor, g: Tensor, out, rows, reduce: bool) -> list[float]:
        """v_m = +-g T_m(u): with the signs ++--++.. T_{m+1} = 2 u T_m - T_{m-1} is one operation in place."""
        t, u = self._variables(x, rows)
        sums = []
        if out is not None:
            out.zero_()
        before, now, after = rows[4], g, torch.mul(g, u, out=rows[3])
        for m, (even, odd) in enumerate(self.slopes):
            sign = 1 if m % 4 < 2 else -1
            moment = torch.mul(now, t, out=rows[2])
            if out is not None:
                out.add_(now, alpha=sign * even).add_(moment, alpha=sign * odd)
            if reduce:
                sums += [sign * now.sum().item(), sign * moment.sum().item()]
            spare = rows[4] if now is g else now
            before, now = now, after
            after = torch.addcmul(before, u, now, value=-2 if m % 2 == 0 else 2, out=spare)
        return sums

    def gradients(self, sums: list[float]) -> list[list[float]]:
        """The sum of g phi(x) is that of weights phi(x) over the points, for any phi that the terms resolve."""
        with np.errstate(invalid="ignore", over="ignore"):  # of a gradient that has overflowed
            weights = self.inverse.T @ sums
            each = np.stack([weights @ self.cosine, weights @ self.sine, (weights * self.points) @ self.sine], 1)
            return self.cosines.gradients([weights.sum(), *each.ravel()])


@functools.cache
def _interpolation(terms: int) -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev points, and the matrix from values there to (even_0, odd_0, even_1, ..)."""
    t = chebyshev.chebpts1(terms)
    even = chebyshev.chebvander(2 * t**2 - 1, terms // 2 - 1)
    return t, np.linalg.inv(np.stack([even, even * t[:, None]], 2).reshape(terms, terms))


def _terms(parameters, domain) -> int | None:
    """How many terms give S and its gradients to ``ROUNDING``; None if more than ``TERMS_PER_COSINE`` for each cosine.

    The Chebyshev coefficients of cos(w x - p) are at most 2 |J_j(z)| <= 2 (z/2)^j/j!, z = |w| (hi - lo)/2
    (DLMF 10.14.4).
    """
    _, a, w, _ = parameters
    if not all(math.isfinite(v) for vector in (domain, *parameters) for v in vector):
        return None
    z = np.abs(w) * (domain[1] - domain[0]) / 2
    limit = TERMS_PER_COSINE * len(w)
    if not domain[0] < domain[1] or z.max() >= limit:
        return None
    relative = 1 / np.cumprod(np.arange(1.0, len(a) + 1))
    amplitudes = np.abs(a) * relative
    weights = np.maximum(amplitudes / (amplitudes.max() or 1.0), relative)
    j = np.arange(1, limit + 1)
    bounds = weights @ np.cumprod(z[:, None] / (2 * j), 1)
    enough = j[(bounds < ROUNDING) & (j >= max(z.max(), LEAST_TERMS)) & (j % 2 == 0)]
    return int(enough[0]) if len(enough) else None


def fourier_series(parameters, domain, dtype: torch.dtype, device: torch.device) -> FourierSeries | ChebyshevSeries:
    """S(x) = a_0 + sum_k a_k cos(w_k x - p_k)/k!."""
    terms = _terms(parameters, domain) if dtype == torch.float32 else None
    if terms is None:
        return FourierSeries(parameters, dtype, device)
    return ChebyshevSeries(parameters, domain, terms, dtype, device)
