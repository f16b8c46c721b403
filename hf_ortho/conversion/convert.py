"""The one entry: replace the activations of a loaded model, in memory, by fitted learnable ones."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from importlib.metadata import version

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .. import activations
from ..checkpoints.activations import provenance_of
from ..errors import FitError, SiteError
from ..fitting.options import FitOptions
from .calibrate import Calibration, check_batches
from .distill import check_steps
from .distill import distill as distill_activations
from .fit_sites import Fitted, fit_site, fit_smallest
from .replace import replace_modules
from .report import ConversionReport, LayerReport
from .sites import Site, find_sites


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

    Each activation is a weighted least-squares fit to the one that it replaces; ``derivative_weight`` adds the
    derivative. Converting a converted model refits its present activations; without tails these grow like a polynomial,
    so ``revert`` such a model first.

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
        In every case the model is as before.
    """
    start = time.perf_counter()
    family, n = activations.parse(activations.named(activation, 1 if degree == "auto" else degree))
    options = FitOptions(derivative_weight, domain, tails)
    if not tolerance > 0:
        raise FitError(f"tolerance {tolerance!r}: must be positive")
    if calibration is not None:
        check_batches(calibration)
    check_steps(distill, calibration)
    sites, left_alone = find_sites(model, fields)
    source = Calibration.of(model, [name for site in sites for name in site.modules], calibration)
    fitting = time.perf_counter()
    fitted: Fitted = {}
    names: dict[str, str] = {}
    for site in sites:
        if degree == "auto":
            n, found = fit_smallest(model, site, family, source.histograms, options, tolerance)
        else:
            found = fit_site(model, site, family, n, source.histograms, options)
        names[site.field] = f"{family.family}_{n}"
        fitted |= found
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
    model.config.hf_ortho = provenance(
        model,
        report.activation,
        driving_values(sites),
        [describe_layer(layer) for layer in report.layers],
        report.calibrated,
        tails,
    )
    model.add_model_tags(tags_of(report.activation))  # for model.push_to_hub
    return report


def _measured_again(report: ConversionReport, tails: bool) -> list[LayerReport]:
    """The layers of ``report`` with the errors that their modules have by now."""
    layers = []
    for layer in report.layers:
        module, source, histogram = report.modules[layer.module]
        domain = None if tails else layer.fit.domain
        fit = module.measure(source, histogram=histogram, domain=domain, name=layer.fit.source)
        layers.append(dataclasses.replace(layer, fit=dataclasses.replace(fit, note=layer.fit.note)))
    return layers


def revert(model: PreTrainedModel) -> list[str]:
    """Put the source activations back that ``config.hf_ortho`` names; returns the paths of the modules.

    Raises:
        SiteError: the config does not name them, or they had parameters of their own, which a conversion drops; the
            model is as before.
    """
    provenance = provenance_of(model.config)
    known = provenance.get("source_activations")
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
    replace_modules(model, sites, new, names)
    del model.config.hf_ortho
    model.model_tags = [tag for tag in model.model_tags or [] if tag not in tags_of(provenance["activation"])]
    return list(new)


def families_in(activation: str) -> list[str]:
    """The families in a text such as ``hermite_8, hermite_9``, each once."""
    return list(dict.fromkeys(activations.parse(name)[0].family for name in activation.split(", ")))


def tags_of(activation: str | None) -> list[str]:
    """The tags on the Hub of a model with these activations."""
    return ["hf_ortho", "learnable-activations", *(families_in(activation) if activation else [])]


def driving_values(sites: list[Site]) -> dict[str, str]:
    """The value of each driving field in the config."""
    return {site.field: site.prefix + site.source for site in sites}


def describe_layer(layer: LayerReport) -> dict:
    """What is kept of one activation, beside its parameters."""
    return {
        "module": layer.module,
        "field": layer.field,
        "domain": layer.fit.to_dict()["domain"],
        "fitted_to": layer.fit.source,
        "sup_error": layer.fit.sup_error,
        "rms_error": layer.fit.rms_error,
        "mass_outside": layer.fit.mass_outside,
    }


def provenance(
    model: PreTrainedModel, activation: str, sources: dict[str, str], layers: list[dict], calibrated: bool, tails: bool
) -> dict:
    """The dictionary ``hf_ortho`` of a config; ``sources`` are the values of the driving fields, prefix included."""
    earlier = provenance_of(model.config)
    sources = sources | earlier.get("source_activations", {})  # a second conversion keeps what the first one found
    modules = {layer["module"] for layer in layers}
    return {
        "activation": activation,
        "source_model": earlier.get("source_model", model.config._name_or_path or None),
        "source_revision": earlier.get("source_revision", getattr(model.config, "_commit_hash", None)),
        "source_activations": sources,
        "calibrated": calibrated,
        "tails": tails,
        "layers": [
            {key: layer[key] for key in ("module", "field")}
            | {"source": sources[layer["field"]].rpartition("-")[2]}
            | layer
            for layer in layers
        ]
        + [layer for layer in earlier.get("layers", []) if layer["module"] not in modules],
        "versions": {package: version(package) for package in ("hf_ortho", "torch", "transformers")},
    }
