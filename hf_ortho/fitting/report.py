"""How well a fitted activation matches its source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    def members(self) -> Sequence[FittedActivation]: ...


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
        groups: number of groups of channels.
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
    groups: int = 1
    worst_group: tuple[int, float] | None = None
    median_group: tuple[int, float] | None = None

    @classmethod
    def measure(cls, module: FittedActivation, targets: Sequence[Target], notes: Iterable[str] = ()) -> FitReport:
        """Compare the module as stored (float32 parameters, float64 arithmetic) with the source; one target per group
        of the module."""
        groups, source = len(targets), targets[0].source
        ends = module.domain.detach().cpu().double().numpy().reshape(groups, 2)
        if math.isinf(ends[0, 0]) and targets[0].domain is not None:  # no tails
            ends = np.array([target.domain for target in targets])
            grids = [np.linspace(ends[0, 0], ends[0, 1], 17601 if groups == 1 else 4401)] * groups
        else:
            grids = [_line(t, e, m.breaks(), groups) for t, e, m in zip(targets, ends, module.members(), strict=True)]
        error, slope_error = _errors(module, targets, grids)
        for target, grid, column in zip(targets, grids, slope_error, strict=True):
            for kink in target.source.kinks:
                column[np.abs(grid - kink) <= 1e-3] = 0.0

        if targets[0].nodes.minimum is None and targets[0].domain is None:  # not the nodes of the fit
            targets = [t.at(DATA_FREE.nodes(t.source, step=0.2)) for t in targets]
        nodes = [target.nodes for target in targets]
        en, den = _errors(module, targets, [v.x for v in nodes])
        outside = [(v.x < lo) | (v.x > hi) for v, (lo, hi) in zip(nodes, ends, strict=True)]
        # each group has as many data as any other
        squares = [v.mean(e**2) for v, e in zip(nodes, en, strict=True)]
        mass = float(np.mean([v.mean(o) for v, o in zip(nodes, outside, strict=True)]))
        beyond = float(np.mean([v.mean(o * e**2) for v, o, e in zip(nodes, outside, en, strict=True)]))
        effects = [effect for v, e in zip(nodes, en, strict=True) if (effect := v.divergence(e)) is not None]
        fisher = len(effects) == groups
        sizes = effects if fisher else [math.sqrt(square) for square in squares]
        ranked = sorted(enumerate(sizes), key=lambda pair: (float(f"{pair[1]:.6g}"), -pair[0]))  # equal up to rounding
        lines = [note for note in notes if note]
        for end in filter(math.isfinite, source.reach):
            lines.append(
                f"{source.name} bends again at {end:g}; the tail continues its straight line from before that point"
            )
        return cls(
            module.name,
            source.name,
            (float(ends[:, 0].min()), float(ends[:, 1].max())),
            tuple(module.tail_slopes.tolist()),
            max(float(np.abs(column).max()) for column in error),
            max(float(np.abs(column).max()) for column in slope_error),
            math.sqrt(float(np.mean(squares))),
            math.sqrt(float(np.mean([v.mean(e**2) for v, e in zip(nodes, den, strict=True)]))),
            mass,
            math.sqrt(beyond / mass) if mass else 0.0,
            min((v.minimum for v in nodes if v.minimum is not None), default=None),
            max((v.maximum for v in nodes if v.maximum is not None), default=None),
            "; ".join(dict.fromkeys(lines)),
            sum(effects) if fisher else None,
            groups,
            ranked[-1] if groups > 1 else None,
            ranked[(groups - 1) // 2] if groups > 1 else None,
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
        values: dict[str, Any] = {"groups": int(plain.get("groups", 1))}
        for key in ("worst_group", "median_group"):
            values[key] = None if plain.get(key) is None else (int(plain[key][0]), float(plain[key][1]))
        for field in dataclasses.fields(cls):
            if field.name in values:
                continue
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


def errors_at_nodes(module: FittedActivation, targets: Sequence[Target]) -> list[Array]:
    """f - g at the nodes of each group."""
    return _errors(module, targets, [target.nodes.x for target in targets])[0]


def _line(target: Target, domain: Array, breaks: tuple[float, ...], groups: int) -> Array:
    """Points of the real line: errors peak at the breaks. With many groups fewer, for less time and memory."""
    nodes, (near, far) = target.nodes, (9601, 8001) if groups == 1 else (2401, 2001)
    ends = [abs(v) for v in (nodes.minimum, nodes.maximum, *domain.tolist()) if v is not None and math.isfinite(v)]
    most = max([20.0, *ends])
    grid = np.concatenate([np.linspace(-most, most, far), np.linspace(-12, 12, near), breaks])
    lo, hi = target.source.reach
    return grid[(grid > lo) & (grid < hi)]


def _errors(
    module: FittedActivation, targets: Sequence[Target], points: Sequence[Array]
) -> tuple[list[Array], list[Array]]:
    """f - g and f' - g' at ``points`` of each group, all groups at once."""
    most = max(map(len, points))
    x = np.stack([np.pad(row, (0, most - len(row)), mode="edge") for row in points], 1)
    found = []
    for of_module, of_source in ((module.forward, "value"), (module.derivative, "derivative")):
        y = module.evaluate(of_module, x)
        for source in {id(t.source): t.source for t in targets}.values():
            own = [i for i, t in enumerate(targets) if t.source is source]
            y[:, own] -= getattr(source, of_source)(x[:, own].ravel()).reshape(most, len(own))
        found.append([column[: len(row)] for row, column in zip(points, y.T, strict=True)])
    return found[0], found[1]
