"""How well a fitted activation matches its source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from .density import DATA_FREE, PRE_ACTIVATIONS
from .least_squares import Target
from .nodes import Array


class Fitted(Protocol):
    """What is measured: f with its derivative, the points where f' jumps, the domain and the slopes outside."""

    @property
    def name(self) -> str: ...
    @property
    def domain(self) -> Tensor: ...
    @property
    def tail_slopes(self) -> Tensor: ...
    def forward(self, x: Tensor) -> Tensor: ...
    def derivative(self, x: Tensor) -> Tensor: ...
    def evaluate(self, fn: Callable[[Tensor], Tensor], x: Array) -> Array: ...
    def breaks(self) -> tuple[float, ...]: ...


@dataclasses.dataclass(frozen=True)
class FitReport:
    """How well f matches g: ``sup`` over the real line, ``rms`` under the weight of the nodes.

    Attributes:
        domain, tail_slopes: the interval [lo, hi] and the slopes outside, as stored in the module.
        sup_error, sup_derivative_error: max |f - g| and max |f' - g'| (away from kinks) on the real line.
        rms_error, rms_derivative_error: root mean squares over the data, or under ``DATA_FREE`` without data.
        mass_outside: share of the data outside [lo, hi].
        rms_error_outside: root mean square of f - g over that share.
        minimum, maximum: exact extremes of the data, None without data.
        note: what a reader must know, for example that a convex family cannot follow the source; else empty.
    """

    activation: str
    source: str
    domain: tuple[float, float]
    tail_slopes: tuple[float, float]
    sup_error: float
    sup_derivative_error: float
    rms_error: float
    rms_derivative_error: float
    mass_outside: float
    rms_error_outside: float
    minimum: float | None
    maximum: float | None
    note: str = ""

    @classmethod
    def measure(cls, module: Fitted, target: Target, note: str = "") -> FitReport:
        """Compare the module as stored (float32 parameters, float64 arithmetic) with the source."""
        nodes, source = target.nodes, target.source
        lo, hi = (float(v) for v in module.domain.tolist())
        if math.isinf(lo) and target.domain is not None:  # without tails
            lo, hi = target.domain
            grid = np.linspace(lo, hi, 17601)
        else:
            ends = [abs(v) for v in (nodes.minimum, nodes.maximum, lo, hi) if v is not None and math.isfinite(v)]
            most = max([20.0, *ends])
            grid = np.union1d(np.linspace(-most, most, 8001), np.linspace(-12, 12, 9601))
            grid = np.union1d(grid, module.breaks())  # where errors peak
            grid = grid[(grid > source.reach[0]) & (grid < source.reach[1])]
        smooth = np.ones(len(grid), dtype=bool)
        for kink in source.kinks:
            smooth &= np.abs(grid - kink) > 1e-3

        def errors(x: Array):
            value, slope = module.evaluate(module.forward, x), module.evaluate(module.derivative, x)
            return value - source.value(x), slope - source.derivative(x)

        e, de = errors(grid)
        if nodes.minimum is None and target.domain is None:  # other nodes than the fit has seen
            nodes = DATA_FREE.nodes(source, step=0.2)
        en, den = errors(nodes.x)
        outside = (nodes.x < lo) | (nodes.x > hi)
        mass, square = nodes.mean(outside), nodes.mean(en**2)
        notes = [note] if note else []
        for end in filter(math.isfinite, source.reach):
            notes.append(
                f"{source.name} bends again at {end:g}; the tail goes on straight, as {source.name} does before"
            )
        return cls(
            module.name,
            source.name,
            (lo, hi),
            tuple(module.tail_slopes.tolist()),
            float(np.abs(e).max()),
            float(np.abs(de[smooth]).max()),
            math.sqrt(square),
            math.sqrt(nodes.mean(den**2)),
            mass,
            math.sqrt(nodes.mean(outside * en**2) / mass) if mass else 0.0,
            nodes.minimum,
            nodes.maximum,
            "; ".join(notes),
        )

    @property
    def density(self) -> str:
        """What the rms errors and ``mass_outside`` are weighted by, in words."""
        return str(DATA_FREE) if self.minimum is None else PRE_ACTIVATIONS

    def to_dict(self) -> dict:
        """Plain JSON values; infinity becomes None."""

        def plain(value):
            if isinstance(value, tuple):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {k: plain(v) for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> FitReport:
        """What ``to_dict`` gave; further keys are left out."""
        known = {f.name: plain[f.name] for f in dataclasses.fields(cls)}
        lo, hi = known["domain"]
        known["domain"] = (-math.inf if lo is None else lo, math.inf if hi is None else hi)
        known["tail_slopes"] = tuple(known["tail_slopes"])
        return cls(**known)
