"""The options of a fit."""

from __future__ import annotations

import dataclasses
import math
from numbers import Real

from ..errors import FitError

WEIGHTS = "fisher", "density"  # of the data in a fit


def is_interval(domain) -> bool:
    """Whether ``domain`` is two finite numbers lo < hi."""
    numbers = isinstance(domain, (tuple, list)) and all(isinstance(v, (int, float)) for v in domain)
    return numbers and len(domain) == 2 and all(map(math.isfinite, domain)) and domain[0] < domain[1]


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """The options of ``LearnableActivation.fit`` shared by all activations of a model.

    Args:
        derivative_weight: lambda >= 0, the weight of (f' - g')^2 relative to (f - g)^2; None for the default of the
            family.
        domain: the interval [lo, hi]; None to search for it.
        tails: straight tails outside the domain; False for the pure series.

    Raises:
        FitError: an option is out of range.
    """

    derivative_weight: float | None = None
    domain: tuple[float, float] | None = None
    tails: bool = True

    def __post_init__(self):
        weight = self.derivative_weight
        if weight is not None and (not isinstance(weight, Real) or not 0.0 <= weight < math.inf):
            raise FitError(f"derivative_weight {weight!r}: must be finite and at least 0")
        if self.domain is not None:
            if not is_interval(self.domain):
                raise FitError(f"domain {self.domain!r}: must be two finite numbers lo < hi, or None to search")
            object.__setattr__(self, "domain", tuple(self.domain))
