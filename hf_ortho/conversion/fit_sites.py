"""Fit one learnable activation per module of a site."""

from __future__ import annotations

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
        fits |= {
            layer.module: (module, layer)
            for module, layer in _fits(model, site.modules, site, family, degrees[site.field], histograms, options)
        }
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
    fields = {site.field: _Smallest(model, site, family, histograms, options, tolerance) for site in sites}
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

    def __init__(self, model, site: Site, family, histograms, options, tolerance: float):
        self.site, self.tolerance, self.family = site, tolerance, family
        self.arguments = model, family, histograms, options
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
            f"tolerance {self.tolerance:g}: {self.family.family} up to degree {MAX_DEGREE} has an error of at least "
            f"{self.least:.1e} against {self.site.source}, most of it at {self.worst}; raise the tolerance or choose "
            "another family"
        )

    def _reaches(self, degree: int) -> bool:
        model, family, histograms, options = self.arguments
        # The module with the largest error at the previous degree comes first: it will most likely miss again.
        paths = sorted(self.site.modules, key=lambda path: path != self.worst)
        fits: Fitted = {}
        total, most = 0.0, -math.inf
        counted: set[int] = set()  # tied modules share a histogram
        for module, layer in _fits(model, paths, self.site, family, degree, histograms, options):
            fits[layer.module] = module, layer
            divergence, rms = layer.fit.divergence, layer.fit.rms_error
            error = rms if divergence is None else divergence
            if error > most:
                self.worst, most = layer.module, error
            if id(histograms.get(layer.module)) not in counted:
                total += divergence or 0.0
                counted.add(id(histograms.get(layer.module)))
            if not (rms if divergence is None else total) <= self.tolerance:
                self.least = min(self.least, rms if divergence is None else total)
                return False
        self.fits, self.divergence = {path: fits[path] for path in self.site.modules}, total
        return True


def _fits(
    model: PreTrainedModel,
    paths: Iterable[str],
    site: Site,
    family: ParsedName,
    degree: int,
    histograms: Mapping[str, Histogram],
    options: FitOptions,
) -> Iterator[tuple[LearnableActivation, LayerReport]]:
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
        yield new.to(device_of(model, path)).train(source.training), LayerReport(path, site.field, fit)


def check_refit(source: nn.Module, groups: int) -> None:
    """Raise SiteError if ``source`` has a number of groups that does not divide ``groups``."""
    if isinstance(source, LearnableActivation) and groups % source.groups:
        raise SiteError(
            f"{source.name} has {source.groups} groups of channels, and can only be refitted with a multiple of these, "
            f"not with {groups}: revert the model first, or use groups={source.groups}"
        )


def sources_of_groups(source: nn.Module, groups: int) -> list[nn.Module]:
    """The function that each of ``groups`` is fitted to; each function of ``source`` is that of an equal number of
    consecutive groups. Raises as ``check_refit``."""
    check_refit(source, groups)
    members = source.members() if isinstance(source, LearnableActivation) else [source]
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
