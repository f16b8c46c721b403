"""Check the stored values of an activation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check the tensors of one activation, by their names in it; ``where`` names the activation in the error.

    Raises:
        CheckpointError: a tensor is not real floating-point, a number is not finite, or the domain (of a group) is not
            an interval [lo, hi] with lo <= hi (its ends may be infinite).
    """
    for key, value in tensors.items():
        if not value.dtype.is_floating_point:
            raise CheckpointError(f"{where}: {key} has dtype {str(value.dtype).removeprefix('torch.')}, not float32")
        numbers = value.detach().to(torch.float64)
        if key == "domain":
            if paired := numbers.shape[-1:] == (2,) and numbers.ndim <= 2:
                lo, hi = numbers.unbind(-1)
                numbers = numbers[~((lo <= hi) & (lo < torch.inf) & (hi > -torch.inf))]
            if not paired or len(numbers):
                ends = (numbers[0] if paired else numbers).tolist()
                raise CheckpointError(f"{where}: domain is {ends!s:.80}; expected an interval [lo, hi], lo <= hi")
        elif not numbers.isfinite().all():
            raise CheckpointError(f"{where}: {key} is {numbers.flatten().tolist()!s:.80}; expected finite numbers")
