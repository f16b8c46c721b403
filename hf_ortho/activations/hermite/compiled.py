"""The Hermite family for ``torch.compile``: explicit gradients that fuse into one loop."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.sums import totals
from .cpu import HORNER_MAX_DEGREE, from_powers, to_monomials


class Hermite:
    """S(x) = sum_k c_k h_k(x), h_k = He_k/k!, h_k' = h_{k-1}; with monomials g x^k up to degree 8, g h_k above."""

    @staticmethod
    def gradients(x: Tensor, g: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        degree = len(coefficients) - 1
        horner = degree <= HORNER_MAX_DEGREE
        c = to_monomials(coefficients) if horner else coefficients
        gx, before, now = torch.zeros_like(g), torch.zeros_like(g), g
        terms = [g]
        for k in range(degree):
            gx = gx + c[k + 1] * (k + 1 if horner else 1) * now
            before, now = now, now * x if horner else (x * now - before) / (k + 1)
            terms.append(now)
        gradient = totals(terms, coefficients[0])
        return gx, from_powers(gradient) if horner else gradient
