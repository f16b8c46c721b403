"""Fit one learnable activation per module of a site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed
from transformers import PreTrainedModel

from ..activations import FitReport, LearnableActivation
from ..activations.base import MAX_DEGREE
from ..errors import FitError
from ..fitting.histogram import Histogram
from ..fitting.options import FitOptions
from ..processes import several_processes
from .report import LayerReport
from .sites import Site

Fitted = dict[str, tuple[LearnableActivation, LayerReport]]


def fit_site(
    model: PreTrainedModel,
    site: Site,
    family: type[LearnableActivation],
    degree: int,
    histograms: dict[str, Histogram],
    options: FitOptions,
) -> Fitted:
    """One module and its report for each path of ``site``.

    Raises:
        FitError: an activation of the model cannot be fitted.
    """
    fits = _fits(model, site.modules, site, family, degree, histograms, options)
    return {layer.module: (module, layer) for module, layer in fits}


def fit_smallest(
    model: PreTrainedModel,
    site: Site,
    family: type[LearnableActivation],
    histograms: dict[str, Histogram],
    options: FitOptions,
    tolerance: float,
) -> tuple[int, Fitted]:
    """The smallest degree at which every module of ``site`` reaches ``tolerance``, and its fits.

    Raises:
        FitError: no degree reaches it, or an activation of the model cannot be fitted.
    """
    worst, least = "", float("inf")
    for degree in range(1, MAX_DEGREE + 1):
        fitted: Fitted = {}
        # Try the module that missed the tolerance at the previous degree first: it will most likely miss it again.
        for module, layer in _fits(
            model, sorted(site.modules, key=lambda p: p != worst), site, family, degree, histograms, options
        ):
            if not layer.fit.rms_error <= tolerance:
                worst, least = layer.module, min(least, layer.fit.rms_error)
                break
            fitted[layer.module] = module, layer
        else:
            return degree, {path: fitted[path] for path in site.modules}
    raise FitError(
        f"tolerance {tolerance:g}: {family.family} up to degree {MAX_DEGREE} has a root mean square error of at least "
        f"{least:.1e} against {site.source} at {worst}; raise the tolerance or choose another family"
    )


def _fits(
    model: PreTrainedModel,
    paths: Iterable[str],
    site: Site,
    family: type[LearnableActivation],
    degree: int,
    histograms: dict[str, Histogram],
    options: FitOptions,
) -> Iterator[tuple[LearnableActivation, LayerReport]]:
    """Fit the modules of ``site`` at ``paths`` one after the other; equal fits are computed once."""
    done: dict[int, tuple[LearnableActivation, FitReport]] = {}  # by the histogram, which tied modules share
    for path in paths:
        source, histogram = model.get_submodule(path), histograms.get(path)
        plain = next(source.parameters(), None) is None
        new = family(degree)
        if plain and id(histogram) in done:
            equal, fit = done[id(histogram)]
            new.load_state_dict(equal.state_dict())
        else:
            try:
                fit = new.fit(source, histogram=histogram, name=site.source, **vars(options))
            except FitError as error:
                raise FitError(f"{path}: {error}") from error
            if plain:
                done[id(histogram)] = new, fit
        _agree(new)
        yield new.to(device_of(model, path)).train(source.training), LayerReport(path, site.field, fit)


def _agree(module: LearnableActivation) -> None:
    """Use the fit of the first process in all processes: LAPACK may round differently on another machine."""
    if several_processes():
        state = [module.state_dict()]
        torch.distributed.broadcast_object_list(state, src=0)
        module.load_state_dict(state[0])


def device_of(model: PreTrainedModel, path: str) -> torch.device:
    """The device of a module, or of the closest parent with parameters if it has none."""
    while True:
        tensor = next(model.get_submodule(path).parameters(), None)
        if tensor is not None or not path:
            return tensor.device if tensor is not None else torch.device("cpu")
        path = path.rpartition(".")[0]
