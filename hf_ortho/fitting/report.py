"""How well a fitted activation matches its source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..text import interval, json_values
from .density import DATA_FREE, PRE_ACTIVATIONS
from .least_squares import Target
from .nodes import Array


class FittedActivation(Protocol):
    """A fitted activation: f and its derivative, the points where f' jumps, the domain and the slopes outside."""

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
        divergence: expected effect of this layer's error on the output of the model, in units of
            ``conversion.Fidelity.divergence``; None without Fisher weights.
        mass_outside: share of the data outside [lo, hi].
        rms_error_outside: root mean square of f - g over that share.
        minimum, maximum: exact extremes of the data, or None.
        note: a caveat, for example that a convex family cannot follow the source; may be empty.

    Example:
        >>> report = hf_ortho.activations.build("hermite_8").fit("gelu")
        >>> report.activation, report.source, report.sup_error < 0.01
        ('hermite_8', 'gelu', True)
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
    divergence: float | None = None

    @classmethod
    def measure(cls, module: FittedActivation, target: Target, note: str = "") -> FitReport:
        """Compare the module as stored (float32 parameters, float64 arithmetic) with the source."""
        nodes, source = target.nodes, target.source
        lo, hi = (float(v) for v in module.domain.tolist())
        if math.isinf(lo) and target.domain is not None:  # no tails
            lo, hi = target.domain
            grid = np.linspace(lo, hi, 17601)
        else:
            ends = [abs(v) for v in (nodes.minimum, nodes.maximum, lo, hi) if v is not None and math.isfinite(v)]
            most = max([20.0, *ends])
            grid = np.union1d(np.linspace(-most, most, 8001), np.linspace(-12, 12, 9601))
            grid = np.union1d(grid, module.breaks())  # errors peak there
            grid = grid[(grid > source.reach[0]) & (grid < source.reach[1])]
        smooth = np.ones(len(grid), dtype=bool)
        for kink in source.kinks:
            smooth &= np.abs(grid - kink) > 1e-3

        def errors(x: Array):
            value, slope = module.evaluate(module.forward, x), module.evaluate(module.derivative, x)
            return value - source.value(x), slope - source.derivative(x)

        e, de = errors(grid)
        if nodes.minimum is None and target.domain is None:  # not the nodes of the fit
            nodes = DATA_FREE.nodes(source, step=0.2)
        en, den = errors(nodes.x)
        outside = (nodes.x < lo) | (nodes.x > hi)
        mass, square = nodes.mean(outside), nodes.mean(en**2)
        notes = [note] if note else []
        for end in filter(math.isfinite, source.reach):
            notes.append(
                f"{source.name} bends again at {end:g}; the tail continues its straight line from before that point"
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
            nodes.divergence(en),
        )

    @property
    def density(self) -> str:
        """Name of the weight of the rms errors and ``mass_outside``."""
        return str(DATA_FREE) if self.minimum is None else PRE_ACTIVATIONS

    def to_dict(self) -> dict:
        """As JSON values; infinity becomes None."""
        return json_values(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> FitReport:
        """The inverse of ``to_dict``; ignores other keys."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value: Any = plain.get(field.name) if field.name == "divergence" else plain[field.name]
            if field.name in ("domain", "tail_slopes"):
                lo, hi = interval(value)
                values[field.name] = float(lo), float(hi)
            elif field.name in ("activation", "source", "note"):
                values[field.name] = str(value)
            elif value is None:
                values[field.name] = None if field.name in ("minimum", "maximum", "divergence") else math.inf
            else:
                values[field.name] = float(value)
        if (values["minimum"] is None) != (values["maximum"] is None):
            raise ValueError("one of minimum and maximum is missing")
        return cls(**values)
