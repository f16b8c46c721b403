"""Fit an activation to a function, or the function of each group of channels to its own data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
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
from ..fitting.report import FitReport
from ..fitting.source import Source

if TYPE_CHECKING:
    from .base import LearnableActivation

Function = str | Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """One fitted function, a note for the report, and the start of a fit to similar data."""

    member: LearnableActivation
    note: str
    start: Balanced


def targets_of(
    module: LearnableActivation,
    fn: Function | Sequence[Function],
    histogram: Density | None,
    options: FitOptions,
    name: str | None,
    within: tuple[float, float] | None = None,
) -> tuple[Target, list[Target]]:
    """The target of the whole layer, and one per group: the same object where all is equal."""
    module.check_present()
    functions = list(fn) if isinstance(fn, (list, tuple)) else [cast(Function, fn)] * module.groups
    if len(functions) != module.groups:
        raise FitError(f"{module.name} needs one function, or one for each group; got {len(functions)}")
    analyzed = {key: Source.of(one, name) for key, one in {id(one): one for one in functions}.items()}
    sources = [analyzed[id(one)] for one in functions]
    source, density = sources[0], DATA_FREE if histogram is None else histogram
    if len(analyzed) > 1:
        source = Source.of(lambda x: torch.stack([one.function(x) for one in sources]).mean(0), source.name)
    densities: Sequence[Density] = [density] * module.groups
    if module.groups > 1 and isinstance(histogram, Histogram) and histogram.groups > 1:
        if histogram.groups != module.groups:
            raise FitError(f"{module.name} has {module.groups} groups, but the histogram has {histogram.groups}")
        densities = histogram.by_group()
    if not options.tails:
        within = _domain_of_data(module.name, density.nodes(source), options.domain)
        options = dataclasses.replace(options, domain=within)
    pairs = [(source, density), *zip(sources, densities, strict=True)]
    distinct = {(id(s), id(d)): (s, d) for s, d in pairs}
    made = {key: Target.of(s, d.nodes(s, within), options) for key, (s, d) in distinct.items()}
    whole, *targets = (made[id(s), id(d)] for s, d in pairs)
    return whole, targets


def fit(module: LearnableActivation, whole: Target, targets: Sequence[Target]) -> FitReport:
    """Fit ``module`` to ``targets_of`` it."""
    # The layer's fit searches from scratch. Each group only refines it: with its own data, a group's best function is
    # close, and a search from scratch would take ten times as long.
    members = cast("list[LearnableActivation]", [target.source.function for target in targets])
    notes = [""] * len(targets)
    same = all(type(member) is type(module) and member.degree == module.degree for member in members)
    if module.groups == 1 or whole.domain is not None or not same:  # otherwise a copy is exact
        # For matrices this small, a threaded BLAS can be 50 times slower on a busy machine.
        with threadpool_limits(limits=1, user_api="blas"):
            layer = _solution(module, whole, None)
            found = {whole: layer}
            for target in targets:
                if target not in found:
                    found[target] = _refined(module, target, layer)
        members, notes = [found[target].member for target in targets], [found[target].note for target in targets]
    slopes = [member.tail_slopes.tolist() for member in members]
    tails = any(member.domain.isfinite().any() for member in members)
    if tails and not np.allclose(slopes, slopes[0], rtol=0, atol=1e-6):
        raise FitError(f"{module.name}: the functions of the groups differ in their slopes far out; revert them first")
    module.set_members(members)
    return report_of(module, targets, notes)


def report_of(module: LearnableActivation, targets: Sequence[Target], notes: Sequence[str] = ()) -> FitReport:
    """The errors of ``module`` as stored."""
    notes = notes or [""] * module.groups
    if module.groups == 1:
        return FitReport.measure(module, targets[0], notes[0])
    members = module.whole().members()
    parts = [FitReport.measure(*part, fewer=4) for part in zip(members, targets, notes, strict=True)]
    return FitReport.of_groups(module.name, parts)


@torch.no_grad()
def _solution(module: LearnableActivation, target: Target, near: Balanced | None) -> Solution:
    source, member = target.source, type(module)(module.degree).to(module.domain.dtype)
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
    for key, value in values.items():
        getattr(member, key).copy_(torch.as_tensor(value))
    return Solution(member, note, start)


def _refined(module: LearnableActivation, target: Target, layer: Solution) -> Solution:
    """The function of one group, from that of the layer. A fit also lowers the largest error anywhere, and may end with
    a larger error on the data; then the group keeps the layer's function."""
    try:
        new = _solution(module, target, layer.start)
    except FitError:
        return layer

    def square(solution: Solution) -> float:
        member, nodes = solution.member, target.nodes
        return nodes.mean_square(member.evaluate(member.forward, nodes.x) - target.g)

    return new if clearly_less(square(new), square(layer)) else layer


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
