"""The sums over all elements of x that are the gradients of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def totals(summands: Sequence[Tensor], entry: Tensor) -> Tensor:
    """The sum of each tensor in the shape of one entry of a parameter, which broadcasts against it: of all elements, or
    for ``entry`` of shape (N, 1) of each group of channels. All tensors have one shape, dtype and device.

    Example:
        >>> totals([torch.ones(2, 3), torch.zeros(2, 3)], torch.tensor(1.0))
        tensor([6., 0.])
    """
    # Inductor writes the summand of a complete reduction to the memory of a GPU first, in float32: one more pass over
    # memory for every coefficient. Row sums are part of the loop that computes the summand. On the CPU it fuses
    # complete sums, and row sums only add work.
    if entry.ndim:
        rows = torch.stack([s.sum(-1) for s in summands])
        return rows.reshape(len(summands), -1, len(entry)).sum(1).unsqueeze(-1)
    if summands[0].device.type == "cpu" or summands[0].ndim < 2:
        return torch.stack([s.sum() for s in summands])
    return torch.stack([s.sum(-1) for s in summands]).flatten(1).sum(1)


def split(
    gx: Tensor, sums: Tensor, parameters: Sequence[Tensor], domain: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, list[Tensor] | None, Tensor | None]:
    """The gradients of x, of each parameter and of the domain, from those of x and one vector with all others; with
    groups, a matrix with one row per group."""
    of_x, of_parameters, of_domain = needs
    sizes = [p.shape[-1] if of_parameters else 0 for p in parameters] + [2 if of_domain else 0]
    *of_each, at_domain = sums.split(sizes, -1)
    return gx if of_x else None, of_each if of_parameters else None, at_domain.to(domain.dtype) if of_domain else None
