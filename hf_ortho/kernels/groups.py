"""Groups of channels: tensors with one row per group, as views that broadcast against x."""

from __future__ import annotations

from torch import Tensor

from ..errors import WidthError


def is_grouped(domain: Tensor) -> bool:
    """Whether an activation has groups: ``domain`` is (N, 2) instead of (2,)."""
    return domain.ndim == 2


def check_width(x: Tensor, groups: int) -> None:
    """Raise WidthError unless the last dimension of ``x`` can be split into ``groups``."""
    if not x.ndim or not x.shape[-1] or x.shape[-1] % groups:
        raise WidthError(
            f"an input of shape {list(x.shape)} cannot be split into {groups} groups of channels: the last dimension "
            f"must be a positive multiple of {groups}"
        )


def broadcasting(x: Tensor, domain: Tensor, tail_slopes: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """``x`` as a view (..., N, C/N), and the tensors of an activation with shape (N, k) as (k, N, 1): ``domain[0]`` or
    ``coefficients[k]`` broadcasts against it. All as they are without groups; ``tail_slopes`` always are."""
    if not is_grouped(domain):
        return x, domain, tail_slopes, *parameters
    check_width(x, groups := len(domain))
    ends, *columns = (rows.movedim(-1, 0).unsqueeze(-1) for rows in (domain, *parameters))
    return x.unflatten(-1, (groups, x.shape[-1] // groups)), ends, tail_slopes, *columns


def by_group(columns: Tensor) -> Tensor:
    """The inverse for a parameter: (k, N, 1) as (N, k)."""
    return columns.squeeze(-1).movedim(0, -1)


def joined(y: Tensor, domain: Tensor) -> Tensor:
    """A result for ``broadcasting`` tensors in the shape of the input."""
    return y.flatten(-2) if is_grouped(domain) else y
