"""Check the stored values of an activation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check the tensors of one activation, by their names in it; ``where`` names the activation in the error.

    Raises:
        CheckpointError: a tensor is not real floating-point, a number is not finite, or the domain (of a group of channels)
            is not an interval [lo, hi] with lo <= hi (its ends may be infinite).
    """
    for key, value in tensors.items():
        if not value.dtype.is_floating_point:
            raise CheckpointError(f"{where}: {key} has dtype {str(value.dtype).removeprefix('torch.')}, not float32")
        numbers = value.detach().to(torch.float64)
        if key == "domain":
            for group, ends in _not_intervals(numbers):
                raise CheckpointError(
                    f"{where}: domain{group} is {ends!s:.80}; expected an interval [lo, hi], lo <= hi"
                )
        elif not numbers.isfinite().all():
            raise CheckpointError(f"{where}: {key} is {numbers.flatten().tolist()!s:.80}; expected finite numbers")


def _not_intervals(domain: Tensor) -> Iterator[tuple[str, list]]:
    """The group, as text, and the numbers of each domain that is not an interval."""
    if domain.shape[-1:] != (2,) or domain.ndim > 2:
        yield "", domain.tolist()
        return
    lo, hi = domain.reshape(-1, 2).T
    valid = (lo <= hi) & (lo < torch.inf) & (hi > -torch.inf)
    for i in valid.logical_not().nonzero().flatten().tolist():
        yield f" of group {i}" if domain.ndim == 2 else "", domain.reshape(-1, 2)[i].tolist()
