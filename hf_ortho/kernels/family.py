"""The interface between the kernels and a family of activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .cpu import Series


class Family(Protocol):
    """A family (the class itself, not an instance): S(x) for given parameters, and optional kernels.

    ``cpu_series``, ``compiled`` and ``triton`` are None if the family has no such kernel. The formula is used instead:
    it is slower, with the same values.
    """

    @property
    def family(self) -> str:
        """The name of the family."""

    @property
    def series(self) -> Callable[..., Tensor]:
        """(x, *parameters) to S(x) in differentiable operations, all of one dtype."""

    @property
    def series_derivative(self) -> Callable[..., Tensor]:
        """(x, *parameters) to S'(x), likewise."""

    def formula(self, x: Tensor, domain: Tensor, tail_slopes: Tensor, *parameters: Tensor) -> Tensor:
        """f(x), in the dtype of x."""

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which f(x) is computed."""

    @property
    def cpu_series(self) -> Callable[..., Series] | None:
        """CPU kernel: (parameters, domain, dtype, device, large) to a ``Series``."""

    @property
    def cpu_rows(self) -> Callable[..., Series] | None:
        """The same for groups of channels."""

    @property
    def compiled(self) -> type | None:
        """Explicit gradients for ``torch.compile``, see ``dispatch._Compiled``."""

    @property
    def triton(self) -> str | None:
        """CUDA kernel: ``module:NAME`` of the ``triton_common.DeviceFunctions``, imported lazily."""
