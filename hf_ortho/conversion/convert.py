"""Replace the activations of a loaded model by fitted learnable ones, in memory; and revert it."""

from __future__ import annotations

import dataclasses
import logging
import math
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
from ..processes import together
from .calibrate import Calibration, check_weights, is_held_out
from .distill import check_steps
from .distill import distill as distill_activations
from .fidelity import Fidelity, measure
from .fit_sites import Fitted, fit_sites, fit_smallest, sources_of_groups
from .inputs import check_batches
from .replace import replace_modules
from .report import ConversionReport, LayerReport
from .sites import Site, find_sites
from .states import plain_model
from .widths import check_groups

logger = logging.getLogger("hf_ortho")
ROUNDING = 1e-10  # differences of divergences below it are noise in float32


@torch.inference_mode(False)  # inference tensors could not be trained
def convert(
    model: PreTrainedModel,
    activation: str = "hermite",
    *,
    degree: int | str | None = None,
    groups: int | None = None,
    tolerance: float = 1e-3,
    calibration: Iterable | None = None,
    weights: str = "fisher",
    fields: list[str] | None = None,
    derivative_weight: float | None = None,
    domain: tuple[float, float] | None = None,
    tails: bool = True,
    distill: int = 0,
    distributed: bool = True,
) -> ConversionReport:
    """Convert ``model`` in place. It can then be saved, and reloaded with plain ``from_pretrained``.

    Each activation is replaced by a learnable one, fitted to it by weighted least squares. Converting an already
    converted model refits its current activations. Without tails these grow like a polynomial: call ``revert`` on such
    a model first.

    Args:
        model: any transformers model whose config names its activation; also quantized, or wrapped by
            ``torch.compile``, but not offloaded, sharded, or with peft adapters attached.
        activation: ``FAMILY_DEGREE``, for example ``hermite_8``, ``fourier_6``, ``tropical_rational_6``;
            ``FAMILY_DEGREE_gN`` with one function for each of N groups of channels; or a family, with ``degree`` or its
            default degree.
        degree: 1 to 32, or ``"auto"``: the smallest degree with an error of at most ``tolerance``.
        groups: the number of groups N, which must divide the width of the inputs of all activations; by default the N
            in ``activation``, or 1.
        tolerance: for ``degree="auto"``. With Fisher weights: the largest divergence of the model, as predicted by the
            weights and the errors of all layers (see ``ConversionReport.fidelity`` for the measured one): the KL
            divergence per prediction in nats, or for a model without classes the relative squared error of its output.
            Otherwise: the largest root mean square error of any layer over its pre-activations.
        calibration: batches of model inputs (mappings, or tensors of the main input), for fits that are accurate where
            the model needs it. The second of every four batches, up to four in all, is held out of the fits: on these,
            the converted model is compared with its source, and if a conversion without data is closer to it, that one
            is kept. A single batch serves both. Positions hidden by an ``attention_mask`` do not count. ``labels`` are
            optional. Without calibration, the fits are weighted by the density of N(-0.5, 1.5^2).
        weights: what the calibration data determine. ``"fisher"``: each pre-activation is weighted by how much an error
            there changes the predictions of the model (one forward and one backward pass; the diagonal of the Fisher
            information). ``"density"``: each counts the same (one forward pass).
        fields: the config fields to convert, for example ``["text_config.hidden_act"]``; all by default.
        derivative_weight: lambda of the Sobolev least squares, see ``LearnableActivation.fit``.
        domain: one interval [lo, hi] for all layers; by default, each layer searches for its own.
        tails: False for the pure series, fitted on ``domain`` or, by default, on the range of each layer's data.
        distill: number of Adam steps on the activation parameters only, toward the outputs of the source model on
            ``calibration``.
        distributed: with calibration under ``torch.distributed``, all processes convert together: each passes its own
            batches, and all get the same activations, fitted to all batches. False converts in this process alone, as
            without calibration: for example on rank 0 only.

    Returns:
        The report. The origin of the activations is also recorded in ``model.config.hf_ortho``.

    Raises:
        ActivationNameError: the family or degree does not exist.
        SiteError: the config drives no activation, or ``model`` is in another state; the error names what to convert.
        WidthError: the channels of an activation cannot be divided into the groups.
        CalibrationError: the calibration data is empty, of the wrong kind, or not finite, or ``distill`` has none.
        FitError: an activation of the model cannot be fitted, or no degree reaches ``tolerance``.
        CheckpointError: the entry ``hf_ortho`` in the config of the model is invalid.
        ProcessError: another process does not call this too.
        In every case the model is unchanged.

    Example:
        >>> report = hf_ortho.convert(model, "hermite_8")
        >>> report.activation, len(report.layers)
        ('hermite_8', 2)
        >>> model.config.activation_function
        'hermite_8'
    """
    start = time.perf_counter()
    family = activations.parse(activations.named(activation, 1 if degree == "auto" else degree, groups))
    options = FitOptions(derivative_weight, domain, tails)
    if not tolerance > 0:
        raise FitError(f"tolerance {tolerance!r}: must be positive")
    if calibration is not None:
        check_batches(calibration)
    check_steps(distill, calibration)
    check_weights(weights)
    model = plain_model(model)
    sites, left_alone = find_sites(model, fields)
    Provenance.of(model.config)  # raises on an invalid entry before any work is done
    check_groups(model, [path for site in sites for path in site.modules], family.groups)
    with together(distributed and calibration is not None, "hf_ortho.convert with calibration"):
        if calibration is not None:
            logger.info(f"Running {model.name_or_path or type(model).__name__} on the calibration data")
        source = Calibration.of(model, sites, calibration, weights, family.groups)
        count = sum(len(site.modules) for site in sites)
        logger.info(f"Fitting {family.family if degree == 'auto' else family.name} to {count} activations")
        fitting = time.perf_counter()
        if degree == "auto":
            degrees, fitted = fit_smallest(model, sites, family, source.histograms, options, tolerance)
        else:
            degrees = {site.field: family.degree for site in sites}
            fitted = fit_sites(model, sites, family, degrees, source.histograms, options)
        compared = sites if calibration is not None and tails else []
        without_data = fit_sites(model, compared, family, degrees, {}, options)
        report = ConversionReport.of(
            model,
            fitted,
            source.histograms,
            time.perf_counter() - fitting,
            left_alone=left_alone,
            weights=source.weights,
            notes=[source.note] if source.note else [],
        )
        names = {field: family._replace(degree=n).name for field, n in degrees.items()}
        sources = {path: module for path, (_, module, _) in report.modules.items()}
        replaced = False  # by the fit without data
        restore = replace_modules(model, sites, {path: module for path, (module, _) in fitted.items()}, names)
        try:
            if distill and calibration is not None:
                seen = (batch for i, batch in enumerate(calibration) if not is_held_out(i))
                report.distillation = distill_activations(model, sources, seen, distill)
                report.layers = _measured_again(report, tails)
            if calibration is not None:
                logger.info("Comparing the converted model with its source")
                report.fidelity, replaced = _closer(model, report, sources, source, without_data)
        except BaseException:
            restore()
            raise
    report.seconds = time.perf_counter() - start
    provenance = Provenance.of_conversion(
        model.config,
        report.activation,
        driving_values(sites),
        [LayerProvenance.of_fit(layer.module, layer.field, layer.fit) for layer in report.layers],
        calibrated=report.weights is not None and not replaced,
        tails=tails,
    )
    model.config.hf_ortho = provenance.to_dict()
    model.add_model_tags(provenance.tags)  # for model.push_to_hub
    return report


def _closer(
    model: PreTrainedModel,
    report: ConversionReport,
    sources: dict[str, nn.Module],
    calibration: Calibration,
    without_data: Fitted,
) -> tuple[Fidelity, bool]:
    """The fidelity of ``model``, and whether it got the parameters of ``without_data``, since these bring it closer to
    its source."""
    others = [{path: module for path, (module, _) in without_data.items()}] if without_data else []
    found, *rest = measure(model, sources, calibration.batches, others, held_out=calibration.held_out)
    with_data = math.inf if found.divergence is None else found.divergence
    free = rest[0].divergence if rest else None
    if free is None or with_data <= free + ROUNDING:
        return found, False
    for path, (module, _, _) in report.modules.items():
        module.load_state_dict(without_data[path][0].state_dict())
    report.layers, report.distillation = _measured_again(report, tails=True), None
    report.notes = [note for note in report.notes if note == calibration.note]
    report.notes += dict.fromkeys(layer.fit.note for _, layer in without_data.values() if layer.fit.note)
    where = " for all groups" if any(module.groups > 1 for module, _ in without_data.values()) else ""
    report.notes.append(
        f"a fit without the calibration data is closer to the source model, and is used{where}: divergence "
        f"{free:.1e} instead of {with_data:.1e}"
    )
    return measure(model, sources, calibration.batches, held_out=calibration.held_out)[0], True


def _measured_again(report: ConversionReport, tails: bool) -> list[LayerReport]:
    """The layers of ``report`` with the current errors of their modules."""
    layers = []
    for layer in report.layers:
        module, source, histogram = report.modules[layer.module]
        domain = None if tails else layer.fit.domain
        sources = sources_of_groups(source, module.groups)
        fit = module.measure(sources, histogram=histogram, domain=domain, name=layer.fit.source)
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
