"""CPU kernel of the Hermite family: Horner's scheme in monomials up to degree 8, recurrences above."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...kernels.cpu import rounded

HORNER_MAX_DEGREE = 8  # above, cancellation in Horner's scheme loses digits in float32


def monomial(j: int, k: int) -> float:
    """The coefficient of x^j in He_k(x)/k! = sum_m (-1)^m x^(k-2m) / (m! (k-2m)! 2^m) (DLMF 18.5.13, rescaled)."""
    if j > k or (k - j) % 2:
        return 0.0
    m = (k - j) // 2
    return (-1) ** m / (math.factorial(m) * math.factorial(j) * 2**m)


# For each degree n, the matrix (row j, column k) from the coefficients of He_k/k! to the coefficients of x^j.
MONOMIALS = [[[monomial(j, k) for k in range(n + 1)] for j in range(n + 1)] for n in range(HORNER_MAX_DEGREE + 1)]


class _Horner:
    """S(x) = sum_j m_j x^j; sum k is the sum of g x^k."""

    scratch_rows = 1

    def __init__(self, parameters, dtype: torch.dtype, device: torch.device):
        self.table = np.array(MONOMIALS[len(parameters[0]) - 1])
        with np.errstate(invalid="ignore", over="ignore"):  # coefficients may have diverged
            m = np.array(rounded(self.table @ parameters[0], dtype))
            of_slope = rounded(m[1:] * np.arange(1, len(m)), dtype)
        *lower, last, _ = torch.tensor(m, dtype=dtype, device=device).unbind()
        self.terms = last, float(m[-1]), lower[::-1]
        self.slope_terms = of_slope[-1], torch.tensor(of_slope[:-1], dtype=dtype, device=device).unbind()[::-1]

    def value(self, x: Tensor, out, scratch) -> Tensor:
        last, leading, lower = self.terms
        y = torch.add(last, x, alpha=leading, out=out)
        for m in lower:
            torch.addcmul(m, x, y, out=y)
        return y

    def backward_chunk(self, x: Tensor, g: Tensor, out, scratch, reduce: bool) -> list[float]:
        sums = []
        if reduce:
            power = torch.mul(g, x, out=scratch[0])  # g x^k
            sums = [g.sum().item(), power.sum().item()]
            for _ in range(2, len(self.table)):
                sums.append(power.mul_(x).sum().item())
        if out is not None:
            leading, lower = self.slope_terms
            if lower:
                torch.add(lower[0], x, alpha=leading, out=out)
            else:
                out.fill_(leading)
            for m in lower[1:]:
                torch.addcmul(m, x, out, out=out)
            out.mul_(g)
        return sums

    def parameter_gradients(self, sums: list[float]) -> list[list[float]]:
        with np.errstate(invalid="ignore", over="ignore"):  # a gradient may have overflowed
            return [(self.table.T @ sums).tolist()]


class _Recurrence:
    """S(x) = sum_k c_k h_k(x) with (k+1) h_{k+1} = x h_k - h_{k-1} (DLMF 18.9.1); sum k is the sum of g h_k."""

    scratch_rows = 2

    def __init__(self, parameters, dtype: torch.dtype, device: torch.device):
        (self.c,) = parameters
        terms = np.array(self.c)
        terms[-3] -= terms[-1] / (len(terms) - 1)
        self.terms = torch.tensor(terms, dtype=dtype, device=device).unbind()

    def value(self, x: Tensor, out, scratch) -> Tensor:
        """Clenshaw: b_k = c_k - b_{k+2}/(k+2) + x b_{k+1}/(k+1), S = b_0."""
        terms, n = self.terms, len(self.c) - 1
        first, second = (scratch[0], out) if n % 2 == 0 else (out, scratch[0])  # b_0 ends in ``out``
        after = torch.add(terms[n - 1], x, alpha=self.c[n] / n, out=first)
        y = torch.addcmul(terms[n - 2], x, after, value=1 / (n - 1), out=second)
        for k in range(n - 3, -1, -1):
            spare = torch.add(terms[k], after, alpha=-1 / (k + 2), out=after)
            y, after = torch.addcmul(spare, x, y, value=1 / (k + 1), out=spare), y
        return y

    def backward_chunk(self, x: Tensor, g: Tensor, out, scratch, reduce: bool) -> list[float]:
        """u_k = g h_k: sum_k c_{k+1} u_k is g S'(x), since h_k' = h_{k-1}."""
        sums = [g.sum().item()] if reduce else []
        if out is not None:
            torch.mul(g, self.c[1], out=out)
        before, now = g, torch.mul(g, x, out=scratch[0])
        for k in range(1, len(self.c)):
            if reduce:
                sums.append(now.sum().item())
            if k == len(self.c) - 1:
                break
            if out is not None:
                out.add_(now, alpha=self.c[k + 1])
            spare = torch.mul(before, -1 / (k + 1), out=scratch[1] if before is g else before)
            before, now = now, torch.addcmul(spare, x, now, value=1 / (k + 1), out=spare)
        return sums

    def parameter_gradients(self, sums: list[float]) -> list[list[float]]:
        return [sums]


def make_hermite_series(
    parameters, domain, dtype: torch.dtype, device: torch.device, large: bool
) -> _Horner | _Recurrence:
    """S(x) = sum_k c_k He_k(x)/k!."""
    series = _Horner if len(parameters[0]) <= HORNER_MAX_DEGREE + 1 else _Recurrence
    return series(parameters, dtype, device)
