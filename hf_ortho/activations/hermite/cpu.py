"""CPU kernel of the Hermite family: Horner's scheme in monomials up to degree 8, recurrences above."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...kernels.cpu import add_scaled, factors, rounded, tensors, total

HORNER_MAX_DEGREE = 8  # above, cancellation in Horner's scheme loses digits in float32


def monomial(j: int, k: int) -> float:
    """The coefficient of x^j in He_k(x)/k! = sum_m (-1)^m x^(k-2m) / (m! (k-2m)! 2^m) (DLMF 18.5.13, rescaled)."""
    if j > k or (k - j) % 2:
        return 0.0
    m = (k - j) // 2
    return (-1) ** m / (math.factorial(m) * math.factorial(j) * 2**m)


# For each degree n, the matrix (row j, column k) from the coefficients of He_k/k! to the coefficients of x^j.
MONOMIALS = [[[monomial(j, k) for k in range(n + 1)] for j in range(n + 1)] for n in range(HORNER_MAX_DEGREE + 1)]


def to_monomials(coefficients: Tensor) -> Tensor:
    """The coefficients of x^j from those of He_k/k! in the first dimension, up to degree 8."""
    return _product(MONOMIALS[len(coefficients) - 1], coefficients)


def from_powers(sums: Tensor) -> Tensor:
    """The gradient with respect to the coefficients of He_k/k!, from that with respect to those of x^j."""
    return _product(list(zip(*MONOMIALS[len(sums) - 1], strict=True)), sums)


def _product(table, vector: Tensor) -> Tensor:
    matrix = torch.tensor(table, dtype=vector.dtype, device=vector.device)
    # not a matmul, which autocast would run in low precision
    return (matrix.view(*matrix.shape, *[1] * (vector.ndim - 1)) * vector).sum(1)


class _Horner:
    """S(x) = sum_j m_j x^j; sum k is the sum of g x^k."""

    scratch_rows = 1

    def __init__(self, parameters, dtype: torch.dtype, device: torch.device):
        self.table = np.array(MONOMIALS[len(parameters[0]) - 1])
        with np.errstate(invalid="ignore", over="ignore"):  # coefficients may have diverged
            m = rounded(self.table @ np.array(parameters[0], float), dtype)
            of_slope = rounded((m[1:].T * np.arange(1.0, len(m))).T, dtype)
        *lower, last, _ = tensors(m, dtype, device)
        self.terms = last, factors(m[-1:], dtype, device)[0], lower[::-1]
        self.slope_terms = factors(of_slope[-1:], dtype, device)[0], tensors(of_slope, dtype, device)[::-1]

    def value(self, x: Tensor, out, scratch) -> Tensor:
        last, leading, lower = self.terms
        y = add_scaled(last, x, leading, out)
        for m in lower:
            torch.addcmul(m, x, y, out=y)
        return y

    def backward_chunk(self, x: Tensor, g: Tensor, out, scratch, reduce: bool) -> list:
        sums = []
        if reduce:
            power = torch.mul(g, x, out=scratch[0])  # g x^k
            sums = [total(g), total(power)]
            for _ in range(2, len(self.table)):
                sums.append(total(power.mul_(x)))
        if out is not None:
            leading, (last, *lower) = self.slope_terms
            if lower:
                add_scaled(lower[0], x, leading, out)
            else:
                out.copy_(last)
            for m in lower[1:]:
                torch.addcmul(m, x, out, out=out)
            out.mul_(g)
        return sums

    def parameter_gradients(self, sums: list) -> list:
        with np.errstate(invalid="ignore", over="ignore"):  # a gradient may have overflowed
            return [self.table.T @ np.array(sums)]


class _Recurrence:
    """S(x) = sum_k c_k h_k(x) with (k+1) h_{k+1} = x h_k - h_{k-1} (DLMF 18.9.1); sum k is the sum of g h_k."""

    scratch_rows = 2

    def __init__(self, parameters, dtype: torch.dtype, device: torch.device):
        terms = np.array(parameters[0], float)
        self.c = factors(terms, dtype, device)
        terms[-3] -= terms[-1] / (len(terms) - 1)
        self.terms = tensors(terms, dtype, device)

    def value(self, x: Tensor, out, scratch) -> Tensor:
        """Clenshaw: b_k = c_k - b_{k+2}/(k+2) + x b_{k+1}/(k+1), S = b_0."""
        terms, n = self.terms, len(self.c) - 1
        first, second = (scratch[0], out) if n % 2 == 0 else (out, scratch[0])  # b_0 ends in ``out``
        after = add_scaled(terms[n - 1], x, self.c[n] / n, first)
        y = torch.addcmul(terms[n - 2], x, after, value=1 / (n - 1), out=second)
        for k in range(n - 3, -1, -1):
            spare = torch.add(terms[k], after, alpha=-1 / (k + 2), out=after)
            y, after = torch.addcmul(spare, x, y, value=1 / (k + 1), out=spare), y
        return y

    def backward_chunk(self, x: Tensor, g: Tensor, out, scratch, reduce: bool) -> list:
        """u_k = g h_k: sum_k c_{k+1} u_k is g S'(x), since h_k' = h_{k-1}."""
        sums = [total(g)] if reduce else []
        if out is not None:
            torch.mul(g, self.c[1], out=out)
        before, now = g, torch.mul(g, x, out=scratch[0])
        for k in range(1, len(self.c)):
            if reduce:
                sums.append(total(now))
            if k == len(self.c) - 1:
                break
            if out is not None:
                add_scaled(out, now, self.c[k + 1], out)
            spare = torch.mul(before, -1 / (k + 1), out=scratch[1] if before is g else before)
            before, now = now, torch.addcmul(spare, x, now, value=1 / (k + 1), out=spare)
        return sums

    def parameter_gradients(self, sums: list) -> list:
        return [sums]


def make_hermite_series(
    parameters, domain, dtype: torch.dtype, device: torch.device, large: bool
) -> _Horner | _Recurrence:
    """S(x) = sum_k c_k He_k(x)/k!."""
    series = _Horner if len(parameters[0]) <= HORNER_MAX_DEGREE + 1 else _Recurrence
    return series(parameters, dtype, device)
