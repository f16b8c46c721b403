"""Fit one learnable activation per module of a site."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed
from torch import nn
from transformers import PreTrainedModel

from ..activations import FitReport, LearnableActivation
from ..activations.registry import MAX_DEGREE, ParsedName
from ..errors import FitError, SiteError
from ..fitting.histogram import Histogram
from ..fitting.options import FitOptions
from ..processes import several_processes
from .report import LayerReport
from .sites import Site

Fitted = dict[str, tuple[LearnableActivation, LayerReport]]


def fit_sites(
    model: PreTrainedModel,
    sites: Iterable[Site],
    family: ParsedName,
    degrees: Mapping[str, int],
    histograms: Mapping[str, Histogram],
    options: FitOptions,
) -> Fitted:
    """One module and its report for each path of ``sites``, in the degree of the field.

    Raises:
        FitError: an activation of the model cannot be fitted.
    """
    fits: Fitted = {}
    for site in sites:
        fits |= _fits(model, family, histograms, options, site, site.modules, degrees[site.field])
    return fits


def fit_smallest(
    model: PreTrainedModel,
    sites: list[Site],
    family: ParsedName,
    histograms: Mapping[str, Histogram],
    options: FitOptions,
    tolerance: float,
) -> tuple[dict[str, int], Fitted]:
    """The smallest degrees, by field, that reach ``tolerance``, and their fits.

    With Fisher weights, the sum of the divergences of all layers must reach it: the degree of the field with the
    largest sum is raised until it does. Otherwise, each layer's root mean square error must.

    Raises:
        FitError: no degree reaches it, or an activation of the model cannot be fitted.
    """
    make = functools.partial(_fits, model, family, histograms, options)
    fields = {site.field: _Smallest(make, site, family.family, tolerance) for site in sites}
    while (total := sum(field.divergence for field in fields.values())) > tolerance:
        rising = [field for field in fields.values() if field.degree < MAX_DEGREE]
        if not rising:
            raise FitError(
                f"tolerance {tolerance:g}: {family.family} of degree {MAX_DEGREE} in {', '.join(fields)} has a "
                f"divergence of {total:.1e}; raise the tolerance or choose another family"
            )
        max(rising, key=lambda field: field.divergence).search()
    fits: Fitted = {}
    for field in fields.values():
        fits |= field.fits
    return {name: field.degree for name, field in fields.items()}, fits


class _Smallest:
    """The smallest degree of one field at which it reaches the tolerance alone."""

    def __init__(self, make, site: Site, family: str, tolerance: float):
        self.make, self.site, self.family, self.tolerance = make, site, family, tolerance
        self.degree, self.divergence = 0, math.inf
        self.fits: Fitted = {}
        self.worst, self.least = "", math.inf
        self.search()

    def search(self) -> None:
        """Go on to the next degree that reaches the tolerance."""
        for degree in range(self.degree + 1, MAX_DEGREE + 1):
            if self._reaches(degree):
                self.degree = degree
                return
        raise FitError(
            f"tolerance {self.tolerance:g}: {self.family} up to degree {MAX_DEGREE} has an error of at least "
            f"{self.least:.1e} against {self.site.source}, most of it at {self.worst}; raise the tolerance or choose "
            "another family"
        )

    def _reaches(self, degree: int) -> bool:
        # The module with the largest error at the previous degree comes first: it will most likely miss again.
        paths = sorted(self.site.modules, key=lambda path: path != self.worst)
        fits: Fitted = {}
        total, most = 0.0, -math.inf
        tied = dict(self.site.tied)  # they share a histogram with another module
        for path, (module, layer) in self.make(self.site, paths, degree):
            fits[path] = module, layer
            if layer.fit.error > most:
                self.worst, most = path, layer.fit.error
            total += 0.0 if path in tied else layer.fit.divergence or 0.0
            error = layer.fit.rms_error if layer.fit.divergence is None else total
            if not error <= self.tolerance:
                self.least = min(self.least, error)
                return False
        self.fits, self.divergence = {path: fits[path] for path in self.site.modules}, total
        return True


def _fits(
    model: PreTrainedModel,
    family: ParsedName,
    histograms: Mapping[str, Histogram],
    options: FitOptions,
    site: Site,
    paths: Iterable[str],
    degree: int,
) -> Iterator[tuple[str, tuple[LearnableActivation, LayerReport]]]:
    """Fit the modules of ``site`` at ``paths`` one after the other; equal fits are computed once."""
    done: dict[int, tuple[LearnableActivation, FitReport]] = {}  # by the histogram, which tied modules share
    for path in paths:
        source, histogram = model.get_submodule(path), histograms.get(path)
        plain = next(source.parameters(), None) is None
        new = family._replace(degree=degree).build()
        if plain and id(histogram) in done:
            equal, fit = done[id(histogram)]
            new.load_state_dict(equal.state_dict())
        else:
            try:
                sources = sources_of_groups(source, new.groups)
                fit = new.fit(sources, histogram=histogram, name=site.source, **vars(options))
            except FitError as error:
                raise FitError(f"{path}: {error}") from error
            if plain:
                done[id(histogram)] = new, fit
        agree(new)
        new = new.to(device_of(model, path)).train(source.training)
        yield path, (new, LayerReport(path, site.field, fit))


def sources_of_groups(source: nn.Module, groups: int) -> list[nn.Module]:
    """The function that each of ``groups`` is fitted to; each function of ``source`` is that of an equal number of
    consecutive groups.

    Raises:
        SiteError: ``source`` has a number of groups that does not divide ``groups``.
    """
    members = source.members() if isinstance(source, LearnableActivation) else [source]
    if groups % len(members):
        raise SiteError(
            f"{source.name} has {len(members)} groups of channels, and can only be refitted with a multiple of these, "
            f"not with {groups}: revert the model first, or use groups={len(members)}"
        )
    return [member for member in members for _ in range(groups // len(members))]


def agree(module: LearnableActivation) -> None:
    """Use the fit of the first process in all that fit together: LAPACK may round differently on another machine."""
    if several_processes():
        state = [module.state_dict()]
        torch.distributed.broadcast_object_list(state, src=0)
        module.load_state_dict(state[0])


def device_of(model: PreTrainedModel, path: str) -> torch.device:
    """The device of a module, or of the closest parent with parameters if it has none; of an offloaded one, where
    Accelerate runs it."""
    while True:
        for module in model.get_submodule(path).modules():
            if (tensor := next(module.parameters(recurse=False), None)) is not None:
                running = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
                return torch.device(running) if tensor.is_meta and running is not None else tensor.device
        if not path:
            return torch.device("cpu")
        path = path.rpartition(".")[0]
