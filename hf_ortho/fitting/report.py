"""How well a fitted activation matches its source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
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
    """How well f matches g: ``sup`` over the real line, ``rms`` under the weight of the nodes. With groups, over all of
    them: the largest ``sup``, ``rms`` over the data of all, and the sum of the divergences.

    Attributes:
        domain, tail_slopes: the interval [lo, hi] and the slopes outside, as stored in the module; with groups, the
            smallest interval that contains the domains of all.
        sup_error, sup_derivative_error: max |f - g| and max |f' - g'| (away from kinks) on the real line.
        rms_error, rms_derivative_error: root mean squares over the data, or under ``DATA_FREE`` without data.
        divergence: expected effect of this layer's error on the output of the model, in units of
            ``conversion.Fidelity.divergence``; None without Fisher weights.
        mass_outside: share of the data outside [lo, hi]; with groups, of each outside its own.
        rms_error_outside: root mean square of f - g over that share.
        minimum, maximum: exact extremes of the data, or None.
        note: a caveat, for example that a convex family cannot follow the source; may be empty.
        worst_group, median_group: index and error of the group with the largest error, and of the one in the middle:
            its part of the divergence, or its root mean square error without Fisher weights. None without groups.

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
    worst_group: tuple[int, float] | None = None
    median_group: tuple[int, float] | None = None

    @classmethod
    def measure(cls, module: FittedActivation, target: Target, note: str = "", fewer: int = 1) -> FitReport:
        """Compare the module as stored (float32 parameters, float64 arithmetic) with the source; the largest errors on
        ``fewer`` times fewer points."""
        nodes, source = target.nodes, target.source
        lo, hi = (float(v) for v in module.domain.tolist())
        if math.isinf(lo) and target.domain is not None:  # no tails
            lo, hi = target.domain
            grid = np.linspace(lo, hi, 17600 // fewer + 1)
        else:
            ends = [abs(v) for v in (nodes.minimum, nodes.maximum, lo, hi) if v is not None and math.isfinite(v)]
            most = max([20.0, *ends])
            grid = np.union1d(np.linspace(-most, most, 8000 // fewer + 1), np.linspace(-12, 12, 9600 // fewer + 1))
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
        bends = "{} bends again at {:g}; the tail continues its straight line from before that point"
        notes = [note, *(bends.format(source.name, end) for end in source.reach if math.isfinite(end))]
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
            "; ".join(filter(None, notes)),
            nodes.divergence(en),
        )

    @classmethod
    def of_groups(cls, activation: str, parts: Sequence[FitReport]) -> FitReport:
        """The report of an activation with groups, from those of its ``members()``."""
        of: dict[str, Any] = {
            field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(cls)
        }
        mass, beyond = np.array(of["mass_outside"]), np.array(of["rms_error_outside"])
        fisher = None not in of["divergence"]
        ranked = sorted(
            enumerate(part.error for part in parts), key=lambda pair: (float(f"{pair[1]:.6g}"), -pair[0])
        )  # equal up to rounding
        # each group has as many data as any other
        changes: dict[str, Any] = {
            **{key: max(of[key]) for key in ("sup_error", "sup_derivative_error")},
            **{key: math.sqrt(np.mean(np.square(of[key]))) for key in ("rms_error", "rms_derivative_error")},
            "domain": (min(lo for lo, _ in of["domain"]), max(hi for _, hi in of["domain"])),
            "mass_outside": float(mass.mean()),
            "rms_error_outside": math.sqrt(mass @ beyond**2 / mass.sum()) if mass.any() else 0.0,
            "minimum": min((v for v in of["minimum"] if v is not None), default=None),
            "maximum": max((v for v in of["maximum"] if v is not None), default=None),
            "note": "; ".join(dict.fromkeys(filter(None, of["note"]))),
            "divergence": sum(of["divergence"]) if fisher else None,
        }
        worst, median = ranked[-1], ranked[(len(parts) - 1) // 2]
        return dataclasses.replace(parts[0], activation=activation, worst_group=worst, median_group=median, **changes)

    @property
    def error(self) -> float:
        """The divergence, or without Fisher weights the root mean square error."""
        return self.rms_error if self.divergence is None else self.divergence

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
            value: Any = plain.get(field.name) if field.default is None else plain[field.name]
            if field.name in ("worst_group", "median_group"):
                values[field.name] = None if value is None else (int(value[0]), float(value[1]))
            elif field.name in ("domain", "tail_slopes"):
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
