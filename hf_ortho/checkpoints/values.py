"""Check the stored values of an activation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check the tensors of one activation, by their names in it; ``where`` names the activation in the error.

    Raises:
        CheckpointError: a tensor is not real floating-point, a number is not finite, or the domain is not an interval
            [lo, hi] with lo <= hi (its ends may be infinite).
    """
    for key, value in tensors.items():
        if not value.dtype.is_floating_point:
            raise CheckpointError(f"{where}: {key} has dtype {str(value.dtype).removeprefix('torch.')}, not float32")
        numbers = value.detach().reshape(-1).to(torch.float64)
        if key == "domain":
            if len(numbers) != 2 or not (numbers[0] <= numbers[1] and numbers[0] < torch.inf > -numbers[1]):
                raise CheckpointError(f"{where}: domain is {numbers.tolist()}; expected an interval [lo, hi], lo <= hi")
        elif not numbers.isfinite().all():
            raise CheckpointError(f"{where}: {key} is {numbers.tolist()!s:.80}; expected finite numbers")
