"""Fit an activation to a function, or the function of each group of channels to its own data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from ..errors import FitError
from ..fitting.density import DATA_FREE, Density
from ..fitting.histogram import Histogram
from ..fitting.least_squares import Balanced, Target, clearly_less
from ..fitting.nodes import Nodes
from ..fitting.options import FitOptions
from ..fitting.report import FitReport, errors_at_nodes
from ..fitting.source import Source

if TYPE_CHECKING:
    from .base import LearnableActivation

Function = str | Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """Values of all tensors of one function, a note for the report, and the start of a fit to similar data."""

    values: Mapping[str, np.ndarray]
    note: str
    start: Balanced


def fit(
    module: LearnableActivation,
    fn: Function | Sequence[Function],
    histogram: Density | None,
    options: FitOptions,
    name: str | None,
) -> FitReport:
    """See ``LearnableActivation.fit``."""
    # The layer's fit searches from scratch. Each group only refines it: with its own data, a group's best function is
    # close, and a search from scratch would take ten times as long. A search for the largest error anywhere may end
    # with a larger error on the data; such a group keeps the layer's function.
    module.check_present()
    if options.derivative_weight is None:
        options = dataclasses.replace(options, derivative_weight=module.default_derivative_weight)
    whole, targets = _targets(module, fn, histogram, options, name)
    if module.groups > 1 and options.tails and options.domain is None and (same := _same_kind(module, fn)):
        module.set_members(same)
        return FitReport.measure(module, targets)
    # For matrices this small, a threaded BLAS can be 50 times slower on a busy machine.
    with threadpool_limits(limits=1, user_api="blas"):
        layer = _solution(module, whole, None)
        found = {id(whole): layer}
        for target in targets:
            if id(target) not in found:
                try:
                    found[id(target)] = _solution(module, target, layer.start)
                except FitError:
                    found[id(target)] = layer
    solutions = [found[id(target)] for target in targets]
    slopes = [solution.values["tail_slopes"] for solution in solutions]
    tails = any(np.isfinite(solution.values["domain"]).any() for solution in solutions)
    if tails and not np.allclose(slopes, slopes[0], rtol=0, atol=1e-6):
        raise FitError(f"{module.name}: the functions of the groups differ in their slopes far out; revert them first")
    if len(found) > 1:
        squares = []
        for tried in ([layer] * len(targets), solutions):
            _store(module, tried)
            errors = zip(targets, errors_at_nodes(module, targets), strict=True)
            squares.append([target.nodes.mean_square(error) for target, error in errors])
        solutions = [new if clearly_less(b, a) else layer for new, a, b in zip(solutions, *squares, strict=True)]
    _store(module, solutions)
    module._initialized = True
    return FitReport.measure(module, targets, (solution.note for solution in solutions))


def measure(
    module: LearnableActivation,
    fn: Function | Sequence[Function],
    histogram: Density | None,
    domain: tuple[float, float] | None,
    name: str | None,
) -> FitReport:
    """See ``LearnableActivation.measure``."""
    module.check_present()
    return FitReport.measure(module, _targets(module, fn, histogram, FitOptions(domain=domain), name, domain)[1])


def _same_kind(module: LearnableActivation, fn: Function | Sequence[Function]) -> list:
    """The functions, if all are activations without groups of the family and degree of ``module``, so that copies of
    them fit exactly; otherwise empty."""
    found = list(fn) if isinstance(fn, (list, tuple)) else [fn]
    kind = type(module), module.degree, 1
    same = all(type(one) is kind[0] and (one.degree, one.groups) == kind[1:] for one in found)  # type: ignore[union-attr]
    return found if same else []


def _targets(
    module: LearnableActivation,
    fn: Function | Sequence[Function],
    histogram: Density | None,
    options: FitOptions,
    name: str | None,
    within: tuple[float, float] | None = None,
) -> tuple[Target, list[Target]]:
    """The target of the whole layer, and one per group: the same object where all is equal."""
    groups = module.groups
    functions: list[Function] = list(fn) if isinstance(fn, (list, tuple)) else [cast(Function, fn)] * groups
    if len(functions) != groups:
        raise FitError(f"{module.name} needs one function, or one for each group; got {len(functions)}")
    analyzed = {one: Source.of(one, name) for one in dict.fromkeys(functions)}
    sources = [analyzed[one] for one in functions]
    source, density = sources[0], DATA_FREE if histogram is None else histogram
    if len(analyzed) > 1:
        source = Source.of(lambda x: torch.stack([one.function(x) for one in sources]).mean(0), source.name)
    densities = [density] * groups
    if groups > 1 and isinstance(histogram, Histogram) and histogram.groups > 1:
        if histogram.groups != groups:
            raise FitError(f"{module.name} has {groups} groups, but the histogram has {histogram.groups}")
        densities = [histogram.group(i) for i in range(groups)]
    if not options.tails:
        within = _domain_of_data(module.name, density.nodes(source), options.domain)
        options = dataclasses.replace(options, domain=within)
    made = {
        key: Target.of(key[0], key[1].nodes(key[0], within), options)
        for key in dict.fromkeys([(source, density), *zip(sources, densities, strict=True)])
    }
    return made[source, density], [made[key] for key in zip(sources, densities, strict=True)]


def _solution(module: LearnableActivation, target: Target, near: Balanced | None) -> Solution:
    source = target.source
    try:
        values, note, start = module.fit_parameters(target, near)
    except np.linalg.LinAlgError as error:
        raise FitError(f"{module.name} could not be fitted to {source.name}: {error}") from error
    values = {"tail_slopes": np.array(source.slopes)} | values
    if not target.options.tails:
        values |= {"domain": np.array([-math.inf, math.inf]), "tail_slopes": np.zeros(2)}
    with np.errstate(over="ignore"):
        finite = all(np.isfinite(v.astype(np.float32)).all() for k, v in values.items() if k != "domain")
    if not finite:
        raise FitError(f"{module.name} could not be fitted to {source.name}: the solution is not finite in float32")
    return Solution(values, note, start)


@torch.no_grad()
def _store(module: LearnableActivation, solutions: Sequence[Solution]) -> None:
    """Copy one solution per group to the module."""
    for key in solutions[0].values:
        stored = getattr(module, key)
        value = np.stack([solution.values[key] for solution in solutions])
        stored.copy_(torch.as_tensor(value if value.shape == stored.shape else value[0], dtype=stored.dtype))


def _domain_of_data(name: str, nodes: Nodes, domain: tuple[float, float] | None) -> tuple[float, float]:
    """The interval of a fit without tails: all data must lie in it."""
    if nodes.minimum is None or nodes.maximum is None:
        if domain is None:
            raise FitError(f"{name} without tails needs calibration data or a domain: it is valid only on an interval")
        return domain
    if domain is None:
        domain = nodes.minimum, nodes.maximum
    if not domain[0] < domain[1]:
        raise FitError(f"{name} without tails: all data equal {domain[0]:g}; give a domain")
    if nodes.minimum < domain[0] or nodes.maximum > domain[1]:
        raise FitError(
            f"{name} without tails on {domain}: the data range from {nodes.minimum:.4g} to {nodes.maximum:.4g}"
        )
    return domain
