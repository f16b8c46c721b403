"""The one entry: replace the activations of a loaded model, in memory, by fitted learnable ones."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .. import activations
from ..checkpoints.provenance import LayerProvenance, Provenance
from ..errors import CalibrationError, FitError, SiteError
from ..fitting.histogram import Histogram
from .calibrate import check_batches, collect, has_labels, main_output, mean_loss
from .distill import distill as distill_activations
from .fit_sites import Fitted, fit_site, fit_smallest
from .report import ConversionReport
from .sites import Site, find_sites, rebuild, set_field


def convert(
    model: PreTrainedModel,
    activation: str = "hermite",
    *,
    degree: int | str | None = None,
    tolerance: float = 1e-3,
    calibration: Iterable | None = None,
    fields: list[str] | None = None,
    derivative_weight: float = 0.0,
    domain: tuple[float, float] | None = None,
    tails: bool = True,
    distill: int = 0,
) -> ConversionReport:
    """Convert ``model`` in place; it then saves and reloads with plain ``from_pretrained``.

    A model that is converted already is fitted anew to its present activations; without tails these grow like a
    polynomial, so ``revert`` such a model first.

    Args:
        model: any transformers model whose config names its activation.
        activation: ``FAMILY_DEGREE``, for example ``hermite_8``, ``fourier_6``, ``tropical_rational_6``; or a family,
            with ``degree`` or its default degree.
        degree: 1 to 32, or ``"auto"``: for each config field the smallest degree at which the root mean square error
            of every layer, over its own pre-activations, is at most ``tolerance``.
        calibration: batches of model inputs (mappings, or tensors of the main input). Each layer's fit is weighted by
            the histogram of its pre-activations over them; without it by the density of N(-0.5, 1.5^2). Batches with
            ``labels`` also give the loss before and, if the iterable can be read twice, after; the others are
            cheaper, since no logits are needed. Under ``torch.distributed`` each process gives its own batches, all
            count, and all processes get the same activations. Positions that an ``attention_mask`` hides do not
            count.
        fields: the config fields to convert, for example ``["text_config.hidden_act"]``; all by default.
        derivative_weight: lambda of the Sobolev least squares, see ``LearnableActivation.fit``.
        domain: one interval [lo, hi] for all layers; searched for per layer by default.
        tails: False for the pure series, fitted on ``domain`` or, by default, on the range of each layer's data.
        distill: steps of Adam on the activations alone, towards the outputs of the source model on ``calibration``.

    Returns:
        The report; its dictionary also goes into ``model.config.hf_ortho``.

    Raises:
        ActivationNameError: no such family or degree.
        SiteError: the config drives no activation.
        CalibrationError: the calibration data is empty, of the wrong kind, or not finite, or ``distill`` has none.
        FitError: an activation of the model cannot be followed, or no degree keeps to ``tolerance``.
        CheckpointError: ``hf_ortho`` in the config of the model is not what a conversion writes.
        In every case the model is as before.
    """
    start = time.perf_counter()
    if degree is None:
        family, n = activations.parse(activation)
    else:
        family, n = activations.parse(activations.named(activation, 1 if degree == "auto" else degree))
    if not tolerance > 0:
        raise FitError(f"tolerance {tolerance!r}: must be positive")
    if distill < 0:
        raise CalibrationError(f"distill {distill!r}: must be a number of steps, at least 0")
    if distill and calibration is None:
        raise CalibrationError("distill needs calibration batches: the outputs of the source model on them are the aim")
    if calibration is not None:
        check_batches(calibration)
    again = calibration is not None and iter(calibration) is not calibration
    if distill and not again:
        raise CalibrationError("distill reads the calibration batches many times: give a list of them")
    sites, left_alone = find_sites(model, fields)
    Provenance.of(model.config)  # refuses what cannot be kept, before any work is done
    histograms: dict[str, Histogram] = {}
    loss_before = loss_after = output_error = noise_floor = distillation = None
    if calibration is not None:
        batches = iter(calibration)
        first = list(itertools.islice(batches, 1))
        histograms, loss_before = collect(
            model, [name for site in sites for name in site.modules], itertools.chain(first, batches)
        )
        histograms = {path: histogram for path, histogram in histograms.items() if histogram.counts.any()}
        reference, noise_floor = _reference(model, first[0]) if first else (None, None)

    options: dict[str, Any] = {"derivative_weight": derivative_weight, "domain": domain, "tails": tails}
    fitting = time.perf_counter()
    fitted: Fitted = {}
    names: dict[str, str] = {}
    for site in sites:
        if degree == "auto":
            n, found = fit_smallest(model, site, family, histograms, tolerance, **options)
        else:
            found = fit_site(model, site, family, n, histograms, **options)
        names[site.field] = f"{family.family}_{n}"
        fitted |= found
    fitting = time.perf_counter() - fitting
    sources = {path: model.get_submodule(path) for path in fitted}
    restore = _replace(model, sites, {path: module for path, (module, _) in fitted.items()}, names)
    try:
        if calibration is not None:
            if distill:
                distillation = distill_activations(model, sources, calibration, distill)
                for path, (module, layer) in fitted.items():
                    fit = layer.fit
                    moved = module.measure(
                        sources[path],
                        histogram=histograms.get(path),
                        domain=None if tails else fit.domain,
                        name=fit.source,
                    )
                    fitted[path] = module, dataclasses.replace(layer, fit=dataclasses.replace(moved, note=fit.note))
            if reference is not None:
                with torch.no_grad():
                    output_error = _relative(main_output(model, first[0], sample=True), reference)
            if loss_before is not None and again:
                loss_after = mean_loss(model, (batch for batch in calibration if has_labels(model, batch)))
    except BaseException:
        restore()
        raise
    report = ConversionReport(
        activation=", ".join(dict.fromkeys(names.values())),
        model=model.name_or_path or type(model).__name__,
        layers=[layer for _, layer in fitted.values()],
        left_alone=left_alone,
        calibrated=bool(histograms),
        loss_before=loss_before,
        loss_after=loss_after,
        output_error=output_error,
        noise_floor=noise_floor,
        distillation=distillation,
        fit_seconds=fitting,
        seconds=time.perf_counter() - start,
        modules={path: (module, sources[path], histograms.get(path)) for path, (module, _) in fitted.items()},
    )
    provenance = Provenance.of_conversion(
        model.config,
        report.activation,
        driving_values(sites),
        [LayerProvenance.of_fit(layer.module, layer.field, layer.fit) for layer in report.layers],
        calibrated=report.calibrated,
        tails=tails,
    )
    model.config.hf_ortho = provenance.to_dict()
    model.add_model_tags(provenance.tags)  # for model.push_to_hub
    return report


def revert(model: PreTrainedModel) -> list[str]:
    """Put the source activations back that ``config.hf_ortho`` names; returns the paths of the modules.

    Raises:
        SiteError: the config does not name them, or they had parameters of their own, which a conversion drops; the
            model is as before.
    """
    provenance = Provenance.of(model.config)
    known = provenance.source_activations
    if not known:
        raise SiteError(
            f"the config of {type(model).__name__} names no source activations (hf_ortho.source_activations): "
            "it was not converted by hf_ortho.convert"
        )
    sites, _ = find_sites(model, list(known))
    new: dict[str, nn.Module] = {}
    names: dict[str, str] = {}
    for site in sites:
        names[site.field] = known[site.field].removeprefix(site.prefix)
        for path in site.modules:
            new[path] = ACT2FN[names[site.field]].train(model.get_submodule(path).training)
            if next(new[path].parameters(), None) is not None:
                raise SiteError(f"{path} was {names[site.field]} with trained parameters, which were not kept")
    _replace(model, sites, new, names)
    del model.config.hf_ortho
    model.model_tags = [tag for tag in model.model_tags or [] if tag not in provenance.tags]
    return list(new)


def _replace(model: PreTrainedModel, sites: list[Site], modules: dict[str, nn.Module], names: dict[str, str]):
    """Put the modules in place and rewrite the config, then check that a rebuilt model has the same tensors.

    Returns a function that undoes it.
    """
    old = {path: model.get_submodule(path) for path in modules}

    def restore() -> None:
        for path, module in old.items():
            model.set_submodule(path, module)
        for site in sites:
            set_field(model.config, site.field, site.prefix + site.source)

    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        for site in sites:
            set_field(model.config, site.field, site.prefix + names[site.field])
        expected = {k: v.shape for k, v in rebuild(model, model.config).state_dict().items()}
        found = {k: v.shape for k, v in model.state_dict().items()}
        if expected != found:
            odd = min(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
            raise SiteError(f"the converted model would not reload: its config builds other tensors ({odd} ...)")
    except BaseException:
        restore()
        raise
    return restore


def _reference(model: PreTrainedModel, batch) -> tuple[Tensor, float | None]:
    """The output of the source model in float32; and, below float32, how far the model itself is from that."""
    with torch.no_grad():
        own = main_output(model, batch, sample=True)
    if torch.finfo(model.dtype).bits >= 32:
        return own, None
    try:
        with torch.no_grad():
            exact = main_output(copy.deepcopy(model).float(), batch, sample=True)
    except torch.OutOfMemoryError:
        return own, None
    return exact, _relative(own, exact)


def _relative(found: Tensor, expected: Tensor) -> float | None:
    """|found - expected| / |expected|, in the Euclidean norm over all elements; None if that is no finite number."""
    ratio = torch.linalg.vector_norm((found - expected).double()) / torch.linalg.vector_norm(expected.double())
    return float(ratio) if torch.isfinite(ratio) else None


def driving_values(sites: list[Site]) -> dict[str, str]:
    """The value of each driving field in the config."""
    return {site.field: site.prefix + site.source for site in sites}
