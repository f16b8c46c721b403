"""Fit one learnable activation per module of a site."""

from __future__ import annotations

import torch
import torch.distributed
from transformers import PreTrainedModel

from ..activations import FitReport, LearnableActivation
from ..activations.base import MAX_DEGREE
from ..errors import FitError
from ..fitting.histogram import Histogram
from .calibrate import several_processes
from .report import LayerReport
from .sites import Site

Fitted = dict[str, tuple[LearnableActivation, LayerReport]]


class TooFar(Exception):
    """The fit of the module ``path`` misses the tolerance by its ``error``."""

    def __init__(self, path: str, error: float):
        super().__init__(path, error)
        self.path, self.error = path, error


def fit_site(
    model: PreTrainedModel,
    site: Site,
    family: type[LearnableActivation],
    degree: int,
    histograms: dict[str, Histogram],
    tolerance: float | None = None,
    first: str | None = None,
    **options,
) -> Fitted:
    """One module and its report for each path of ``site``; the module ``first`` is fitted before the others.

    Raises:
        TooFar: a root mean square error exceeds ``tolerance``.
        FitError: an activation of the model cannot be followed.
    """
    found: Fitted = {}
    data_free: tuple[LearnableActivation, FitReport] | None = None
    for path in sorted(site.modules, key=lambda p: p != first):
        source, histogram = model.get_submodule(path), histograms.get(path)
        plain = next(source.parameters(), None) is None
        new = family(degree)
        if histogram is None and data_free is not None and plain:
            new.load_state_dict(data_free[0].state_dict())
            fit = data_free[1]
        else:
            try:
                fit = new.fit(source, histogram=histogram, name=site.source, **options)
            except FitError as error:
                raise FitError(f"{path}: {error}") from error
            if histogram is None and plain:
                data_free = new, fit
        if tolerance is not None and not fit.rms_error <= tolerance:
            raise TooFar(path, fit.rms_error)
        _agree(new)
        found[path] = new.to(device_of(model, path)).train(source.training), LayerReport(path, site.field, fit)
    return {path: found[path] for path in site.modules}


def fit_smallest(
    model: PreTrainedModel,
    site: Site,
    family: type[LearnableActivation],
    histograms: dict[str, Histogram],
    tolerance: float,
    **options,
) -> tuple[int, Fitted]:
    """The smallest degree at which every module of ``site`` keeps to ``tolerance``, and its fits.

    Raises:
        FitError: no degree does.
    """
    worst, least = "", float("inf")
    for degree in range(1, MAX_DEGREE + 1):
        try:
            return degree, fit_site(model, site, family, degree, histograms, tolerance, worst, **options)
        except TooFar as miss:
            worst, least = miss.path, min(least, miss.error)
    raise FitError(
        f"tolerance {tolerance:g}: no {family.family} up to degree {MAX_DEGREE} comes closer to {site.source} at "
        f"{worst} than {least:.1e} (root mean square); allow more or choose another family"
    )


def _agree(module: LearnableActivation) -> None:
    """Give every process the fit of the first: LAPACK may round differently on another machine."""
    if several_processes():
        state = [module.state_dict()]
        torch.distributed.broadcast_object_list(state, src=0)
        module.load_state_dict(state[0])


def device_of(model: PreTrainedModel, path: str) -> torch.device:
    """The device of the parameters nearest to a module that may have none itself."""
    while True:
        tensor = next(model.get_submodule(path).parameters(), None)
        if tensor is not None or not path:
            return tensor.device if tensor is not None else torch.device("cpu")
        path = path.rpartition(".")[0]
