"""What the kernels ask of a family of activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .cpu import Series


class Family(Protocol):
    """A family, which is a class rather than an instance: S(x) for given parameters, and faster ways to it.

    ``cpu_series``, ``compiled`` and ``triton`` are None where the family has no such kernel: the formula takes its
    place, slower and with the same values.
    """

    @property
    def family(self) -> str:
        """Its name."""

    @property
    def series(self) -> Callable[..., Tensor]:
        """(x, *parameters) to S(x) in differentiable operations, all of one dtype."""

    @property
    def series_derivative(self) -> Callable[..., Tensor]:
        """Likewise, S'(x)."""

    def formula(self, x: Tensor, domain: Tensor, tail_slopes: Tensor, *parameters: Tensor) -> Tensor:
        """f(x), in the dtype of x."""

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the arithmetic for x."""

    @property
    def cpu_series(self) -> Callable[..., Series] | None:
        """On the CPU: (parameters, domain, dtype, device, large) to a ``Series``."""

    @property
    def compiled(self) -> type | None:
        """Under ``torch.compile``: explicit gradients, see ``dispatch._Compiled``."""

    @property
    def triton(self) -> str | None:
        """On CUDA: where the ``triton_common.DeviceFunctions`` are, as ``module:NAME``; imported when first used."""
