"""CPU kernel of the Fourier family, cosine by cosine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels.cpu import add_scaled, factors, tensors, total


class FourierSeries:
    """S(x) = a_0 + sum_k A_k cos(w_k x - p_k), A_k = a_k/k!; sums of g, and for each k of g cos, g sin and g x sin."""

    scratch_rows = 3

    def __init__(self, parameters, dtype: torch.dtype, device: torch.device):
        (offset,), a, w, p = parameters
        self.factorials = [math.factorial(k) for k in range(1, len(a) + 1)]
        self.amplitudes = [v / f for v, f in zip(a, self.factorials, strict=True)]
        self.w, self.scales = factors(w, dtype, device), factors(self.amplitudes, dtype, device)
        self.slopes = factors([-a * v for a, v in zip(self.amplitudes, w, strict=True)], dtype, device)
        self.offset, *self.phases = tensors([offset, *(-v for v in p)], dtype, device)

    def value(self, x: Tensor, out, scratch) -> Tensor:
        y = self.offset
        for w, phase, amplitude in zip(self.w, self.phases, self.scales, strict=True):
            wave = add_scaled(phase, x, w, scratch[0]).cos_()
            y = add_scaled(y, wave, amplitude, wave if out is None else out)
        return y

    def backward_chunk(self, x: Tensor, g: Tensor, out, scratch, reduce: bool) -> list:
        sums = [total(g)] if reduce else []
        if out is not None:
            out.zero_()
        step = scratch[1].storage_offset() - scratch[0].storage_offset()
        # of g with cos, sin and x sin, summed in one call
        products = scratch[0].as_strided((3, *x.shape), (step, *scratch[0].stride()))
        for w, phase, slope in zip(self.w, self.phases, self.slopes, strict=True):
            angle = add_scaled(phase, x, w, scratch[2])
            if reduce:
                torch.cos(angle, out=scratch[0]).mul_(g)
            sine = torch.sin(angle, out=scratch[1]).mul_(g)
            if out is not None:
                add_scaled(out, sine, slope, out)
            if reduce:
                torch.mul(sine, x, out=scratch[2])
                at_once = products.sum(1)
                sums += at_once.tolist() if x.ndim == 1 else at_once.unbind()
        return sums

    def parameter_gradients(self, sums: list) -> list:
        cosines, sines, moments = (sums[1 + i :: 3] for i in range(3))
        return [
            sums[:1],
            [v / f for v, f in zip(cosines, self.factorials, strict=True)],
            [-a * v for a, v in zip(self.amplitudes, moments, strict=True)],
            [a * v for a, v in zip(self.amplitudes, sines, strict=True)],
        ]


def make_cosine_series(parameters, domain, dtype: torch.dtype, device: torch.device, large: bool) -> FourierSeries:
    """S(x) = a_0 + sum_k a_k cos(w_k x - p_k)/k!."""
    return FourierSeries(parameters, dtype, device)
