"""Reductions over all processes of ``torch.distributed``; a single process gets its tensor back."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def several_processes() -> bool:
    """Whether ``torch.distributed`` is running."""
    return distributed.is_available() and distributed.is_initialized()


def collective_device(other: torch.device) -> torch.device:
    """The device for the tensors of a collective: the GPU for NCCL, which requires it, otherwise ``other``."""
    nccl = several_processes() and distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else other


def sum_over_processes(x: Tensor) -> Tensor:
    return _reduced(x, "SUM")


def mean_over_processes(x: Tensor) -> Tensor:
    return _reduced(x, "SUM") / distributed.get_world_size() if several_processes() else x


def min_over_processes(x: Tensor) -> Tensor:
    return _reduced(x, "MIN")


def max_over_processes(x: Tensor) -> Tensor:
    return _reduced(x, "MAX")


def any_process(flags: Tensor) -> Tensor:
    """For each flag, whether any process sets it."""
    return _reduced(flags.int(), "MAX").bool()


def _reduced(x: Tensor, operation: str) -> Tensor:
    if not several_processes():
        return x
    x = x.clone()
    distributed.all_reduce(x, getattr(distributed.ReduceOp, operation))
    return x
