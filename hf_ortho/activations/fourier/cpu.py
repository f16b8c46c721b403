"""CPU kernel of the Fourier family, cosine by cosine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels.cpu import rounded


class FourierSeries:
    """S(x) = a_0 + sum_k A_k cos(w_k x - p_k), A_k = a_k/k!; sums of g, and for each k of g cos, g sin and g x sin."""

    scratch_rows = 3

    def __init__(self, parameters, dtype: torch.dtype, device: torch.device):
        (offset,), a, self.w, p = parameters
        self.factorials = [math.factorial(k) for k in range(1, len(a) + 1)]
        self.amplitudes = [v / f for v, f in zip(a, self.factorials, strict=True)]
        self.slopes = rounded([-a * w for a, w in zip(self.amplitudes, self.w, strict=True)], dtype)
        self.offset, *self.phases = torch.tensor([offset, *(-v for v in p)], dtype=dtype, device=device).unbind()

    def value(self, x: Tensor, out, scratch) -> Tensor:
        y = self.offset
        for w, phase, amplitude in zip(self.w, self.phases, self.amplitudes, strict=True):
            wave = torch.add(phase, x, alpha=w, out=scratch[0]).cos_()
            y = torch.add(y, wave, alpha=amplitude, out=wave if out is None else out)
        return y

    def backward_chunk(self, x: Tensor, g: Tensor, out, scratch, reduce: bool) -> list[float]:
        sums = [g.sum().item()] if reduce else []
        if out is not None:
            out.zero_()
        step = scratch[1].storage_offset() - scratch[0].storage_offset()
        products = scratch[0].as_strided((3, len(x)), (step, 1))  # of g with cos, sin and x sin, summed in one call
        for w, phase, slope in zip(self.w, self.phases, self.slopes, strict=True):
            angle = torch.add(phase, x, alpha=w, out=scratch[2])
            if reduce:
                torch.cos(angle, out=scratch[0]).mul_(g)
            sine = torch.sin(angle, out=scratch[1]).mul_(g)
            if out is not None:
                out.add_(sine, alpha=slope)
            if reduce:
                torch.mul(sine, x, out=scratch[2])
                sums += products.sum(1).tolist()
        return sums

    def parameter_gradients(self, sums: list[float]) -> list[list[float]]:
        cosines, sines, moments = (sums[1 + i :: 3] for i in range(3))
        return [
            sums[:1],
            [v / f for v, f in zip(cosines, self.factorials, strict=True)],
            [-a * v for a, v in zip(self.amplitudes, moments, strict=True)],
            [a * v for a, v in zip(self.amplitudes, sines, strict=True)],
        ]
