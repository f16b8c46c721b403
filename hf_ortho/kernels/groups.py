"""Groups of channels: tensors with one row per group, as views that broadcast against x."""

from __future__ import annotations

from torch import Tensor

from ..errors import WidthError


def is_grouped(domain: Tensor) -> bool:
    """Whether an activation has groups: ``domain`` is (N, 2) instead of (2,)."""
    return domain.ndim == 2


def check_width(x: Tensor, groups: int) -> None:
    """Raise WidthError unless the last dimension of ``x`` can be split into ``groups``."""
    if not x.ndim or x.shape[-1] % groups:
        raise WidthError(
            f"an input of shape {list(x.shape)} cannot be split into {groups} groups of channels: the last dimension "
            f"must be a multiple of {groups}"
        )


def split_channels(x: Tensor, groups: int) -> Tensor:
    """``x`` of shape (..., C) as (..., N, C/N), a view."""
    check_width(x, groups)
    return x.unflatten(-1, (groups, x.shape[-1] // groups))


def columns(rows: Tensor) -> Tensor:
    """Rows per group, shape (N, k), as (k, N, 1): entry i broadcasts against (..., N, C/N)."""
    return rows.movedim(-1, 0).unsqueeze(-1)


def by_group(columns: Tensor) -> Tensor:
    """The inverse of ``columns``."""
    return columns.squeeze(-1).movedim(0, -1)


def broadcasting(x: Tensor, domain: Tensor, tail_slopes: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """All tensors of an activation such that ``domain[0]`` or ``coefficients[k]`` broadcasts against x; as they are
    without groups. ``tail_slopes`` always has shape (2,)."""
    if not is_grouped(domain):
        return x, domain, tail_slopes, *parameters
    return split_channels(x, len(domain)), columns(domain), tail_slopes, *map(columns, parameters)


def with_ends(x: Tensor, domain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A view of ``x`` and the ends lo and hi of the domains, which broadcast against it."""
    if not is_grouped(domain):
        lo, hi = domain
        return x, lo, hi
    lo, hi = columns(domain)
    return split_channels(x, len(domain)), lo, hi


def joined(y: Tensor, domain: Tensor) -> Tensor:
    """A result for ``broadcasting`` tensors in the shape of the input."""
    return y.flatten(-2) if is_grouped(domain) else y
