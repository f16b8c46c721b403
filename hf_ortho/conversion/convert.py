"""Replace the activations of a loaded model by fitted learnable ones, in memory; and revert it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .. import activations
from ..checkpoints.provenance import LayerProvenance, Provenance
from ..errors import FitError, SiteError
from ..fitting.options import FitOptions
from .calibrate import Calibration, check_batches
from .distill import check_steps
from .distill import distill as distill_activations
from .fit_sites import Fitted, fit_site, fit_smallest
from .replace import replace_modules
from .report import ConversionReport, LayerReport
from .sites import Site, find_sites
from .states import plain_model


@torch.inference_mode(False)  # inference tensors could not be trained
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
    """Convert ``model`` in place. It can then be saved, and reloaded with plain ``from_pretrained``.

    Each activation is replaced by a learnable one, fitted to it by weighted least squares. Converting an already
    converted model refits its current activations. Without tails these grow like a polynomial: call ``revert`` on such
    a model first.

    Args:
        model: any transformers model whose config names its activation; also quantized, or wrapped by
            ``torch.compile``, but not offloaded, sharded, or with peft adapters attached.
        activation: ``FAMILY_DEGREE``, for example ``hermite_8``, ``fourier_6``, ``tropical_rational_6``; or a family,
            with ``degree`` or its default degree.
        degree: 1 to 32, or ``"auto"``: for each config field, the smallest degree with a root mean square error of at
            most ``tolerance`` in every layer, over the layer's pre-activations.
        tolerance: the largest root mean square error with ``degree="auto"``.
        calibration: batches of model inputs (mappings, or tensors of the main input). Each layer's fit is weighted by
            the histogram of its pre-activations on them, except positions hidden by an ``attention_mask``. Without
            calibration, the weight is the density of N(-0.5, 1.5^2). Batches with ``labels`` also give the loss before
            and, if the iterable can be read twice, after the conversion. Batches without ``labels`` are cheaper, since
            no logits are needed. Under ``torch.distributed`` each process passes its own batches, and all processes
            get the same activations, fitted to all batches.
        fields: the config fields to convert, for example ``["text_config.hidden_act"]``; all by default.
        derivative_weight: lambda of the Sobolev least squares, see ``LearnableActivation.fit``.
        domain: one interval [lo, hi] for all layers; by default, each layer searches for its own.
        tails: False for the pure series, fitted on ``domain`` or, by default, on the range of each layer's data.
        distill: number of Adam steps on the activation parameters only, toward the outputs of the source model on
            ``calibration``.

    Returns:
        The report. The origin of the activations is also recorded in ``model.config.hf_ortho``.

    Raises:
        ActivationNameError: the family or degree does not exist.
        SiteError: the config drives no activation, or ``model`` is in another state; the error names what to convert.
        CalibrationError: the calibration data is empty, of the wrong kind, or not finite, or ``distill`` has none.
        FitError: an activation of the model cannot be fitted, or no degree reaches ``tolerance``.
        CheckpointError: the entry ``hf_ortho`` in the config of the model is invalid.
        In every case the model is unchanged.

    Example:
        >>> report = hf_ortho.convert(model, "hermite_8")
        >>> report.activation, len(report.layers)
        ('hermite_8', 2)
        >>> model.config.activation_function
        'hermite_8'
    """
    start = time.perf_counter()
    family, n = activations.parse(activations.named(activation, 1 if degree == "auto" else degree))
    options = FitOptions(derivative_weight, domain, tails)
    if not tolerance > 0:
        raise FitError(f"tolerance {tolerance!r}: must be positive")
    if calibration is not None:
        check_batches(calibration)
    check_steps(distill, calibration)
    model = plain_model(model)
    sites, left_alone = find_sites(model, fields)
    Provenance.of(model.config)  # raises on an invalid entry before any work is done
    source = Calibration.of(model, sites, calibration)
    fitting = time.perf_counter()
    fitted: Fitted = {}
    names: dict[str, str] = {}
    for site in sites:
        if degree == "auto":
            n, fits = fit_smallest(model, site, family, source.histograms, options, tolerance)
        else:
            fits = fit_site(model, site, family, n, source.histograms, options)
        names[site.field] = f"{family.family}_{n}"
        fitted |= fits
    report = ConversionReport.of(
        model,
        fitted,
        source.histograms,
        time.perf_counter() - fitting,
        left_alone=left_alone,
        loss_before=source.loss,
        noise_floor=source.noise_floor,
    )
    restore = replace_modules(model, sites, {path: module for path, (module, _) in fitted.items()}, names)
    try:
        if distill and calibration is not None:
            replaced = {path: module for path, (_, module, _) in report.modules.items()}
            report.distillation = distill_activations(model, replaced, calibration, distill)
            report.layers = _measured_again(report, tails)
        report.output_error, report.loss_after = source.output_error(model), source.loss_of(model)
    except BaseException:
        restore()
        raise
    report.seconds = time.perf_counter() - start
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


def _measured_again(report: ConversionReport, tails: bool) -> list[LayerReport]:
    """The layers of ``report`` with the current errors of their modules."""
    layers = []
    for layer in report.layers:
        module, source, histogram = report.modules[layer.module]
        domain = None if tails else layer.fit.domain
        fit = module.measure(source, histogram=histogram, domain=domain, name=layer.fit.source)
        layers.append(dataclasses.replace(layer, fit=dataclasses.replace(fit, note=layer.fit.note)))
    return layers


def revert(model: PreTrainedModel) -> list[str]:
    """Restore the source activations named in ``config.hf_ortho``; returns the paths of the modules.

    Raises:
        SiteError: the config does not name them, or they had parameters, which a conversion discards; the model is
            unchanged.

    Example:
        >>> report = hf_ortho.convert(model, "hermite_8")
        >>> hf_ortho.revert(model)
        ['transformer.h.0.mlp.act', 'transformer.h.1.mlp.act']
        >>> model.config.activation_function
        'gelu_new'
    """
    model = plain_model(model)
    provenance = Provenance.of(model.config)
    sources = provenance.source_activations
    if not sources:
        raise SiteError(
            f"the config of {type(model).__name__} names no source activations (hf_ortho.source_activations): "
            "it was not converted by hf_ortho.convert"
        )
    sites, _ = find_sites(model, list(sources))
    new: dict[str, nn.Module] = {}
    names: dict[str, str] = {}
    for site in sites:
        names[site.field] = sources[site.field].removeprefix(site.prefix)
        for path in site.modules:
            new[path] = ACT2FN[names[site.field]].train(model.get_submodule(path).training)
            if next(new[path].parameters(), None) is not None:
                raise SiteError(f"{path} was {names[site.field]} with trained parameters, which were not saved")
    replace_modules(model, sites, new, names)
    del model.config.hf_ortho
    model.model_tags = [tag for tag in model.model_tags or [] if tag not in provenance.tags]
    return list(new)


def driving_values(sites: list[Site]) -> dict[str, str]:
    """The value of each driving field in the config."""
    return {site.field: site.prefix + site.source for site in sites}
