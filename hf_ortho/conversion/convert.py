"""The one entry: replace the activations of a loaded model, in memory, by fitted learnable ones."""

from __future__ import annotations

import time
from collections.abc import Iterable
from importlib.metadata import version

import torch
from transformers import PreTrainedModel

from .. import activations
from ..activations import FitReport, LearnableActivation
from ..errors import SiteError
from .calibrate import Histogram, collect, has_labels, mean_loss
from .report import ConversionReport, LayerReport
from .sites import Site, find_sites, rebuild, set_field


def convert(
    model: PreTrainedModel,
    activation: str = "hermite_8",
    *,
    calibration: Iterable | None = None,
    fields: list[str] | None = None,
    derivative_weight: float = 0.0,
    domain: tuple[float, float] | None = None,
) -> ConversionReport:
    """Convert ``model`` in place; it then saves and reloads with plain ``from_pretrained``.

    Args:
        model: any transformers model whose config names its activation.
        activation: ``FAMILY_DEGREE``, for example ``hermite_8``, ``fourier_6``, ``tropical_rational_6``.
        calibration: batches of model inputs (mappings, or tensors of the main input). Each layer's fit is weighted by
            the histogram of its pre-activations over them; without it by the density of N(-0.5, 1.5^2). Batches with
            ``labels`` also give the loss before and, if the iterable can be read twice, after; the others are
            cheaper, since no logits are needed.
        fields: the config fields to convert, for example ``["text_config.hidden_act"]``; all by default.
        derivative_weight: lambda of the Sobolev least squares, see ``LearnableActivation.fit``.
        domain: one interval [lo, hi] for all layers; searched for per layer by default.

    Returns:
        The report; its dictionary also goes into ``model.config.hf_ortho``.

    Raises:
        ActivationNameError: no such family or degree.
        SiteError: the config drives no activation.
        CalibrationError: the calibration data is empty, of the wrong kind, or not finite.
        FitError: an activation of the model cannot be followed.
        In every case the model is as before.
    """
    start = time.perf_counter()
    family, degree = activations.parse(activation)
    sites, left_alone = find_sites(model, fields)
    histograms: dict[str, Histogram] = {}
    loss_before = loss_after = None
    if calibration is not None:
        histograms, loss_before = collect(model, [name for site in sites for name in site.modules], calibration)

    fitted: dict[str, LearnableActivation] = {}
    layers: list[LayerReport] = []
    data_free: dict[str, tuple[LearnableActivation, FitReport]] = {}
    for site in sites:
        for name in site.modules:
            source = model.get_submodule(name)
            histogram = histograms.get(name)
            has_data = histogram is not None and histogram.counts.any()
            new = family(degree)
            if not has_data and site.source in data_free and not any(True for _ in source.parameters()):
                twin, fit = data_free[site.source]
                new.load_state_dict(twin.state_dict())
            else:
                fit = new.fit(
                    source,
                    histogram=histogram if has_data else None,
                    derivative_weight=derivative_weight,
                    domain=domain,
                    name=site.source,
                )
                if not has_data:
                    data_free[site.source] = new, fit
            fitted[name] = new.to(_device_of(model, name)).train(source.training)
            layers.append(LayerReport(name, site.field, fit))

    _replace(model, sites, fitted, activations.build(activation).name)
    if calibration is not None and loss_before is not None and iter(calibration) is not calibration:
        loss_after = mean_loss(model, (batch for batch in calibration if has_labels(model, batch)))
    report = ConversionReport(
        activation=f"{family.family}_{degree}",
        model=model.name_or_path or type(model).__name__,
        layers=layers,
        left_alone=left_alone,
        calibrated=bool(histograms),
        loss_before=loss_before,
        loss_after=loss_after,
        seconds=time.perf_counter() - start,
    )
    model.config.hf_ortho = _provenance(model, sites, report)
    return report


def _replace(model: PreTrainedModel, sites: list[Site], fitted: dict[str, LearnableActivation], name: str) -> None:
    """Put the modules in place and rewrite the config, then check that a rebuilt model has the same tensors."""
    old = {path: model.get_submodule(path) for path in fitted}
    before = {site.field: site.prefix + site.source for site in sites}
    for path, module in fitted.items():
        model.set_submodule(path, module)
    for site in sites:
        set_field(model.config, site.field, site.prefix + name)
    expected = {k: v.shape for k, v in rebuild(model, model.config).state_dict().items()}
    found = {k: v.shape for k, v in model.state_dict().items()}
    if expected != found:
        differing = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        for path, previous in old.items():
            model.set_submodule(path, previous)
        for field, value in before.items():
            set_field(model.config, field, value)
        raise SiteError(f"the converted model would not reload: its config builds other tensors ({differing[0]} ...)")


def _device_of(model: PreTrainedModel, path: str) -> torch.device:
    """The device of the parameters nearest to a module that may have none itself."""
    while True:
        tensor = next(model.get_submodule(path).parameters(), None)
        if tensor is not None or not path:
            return tensor.device if tensor is not None else torch.device("cpu")
        path = path.rpartition(".")[0]


def _provenance(model: PreTrainedModel, sites: list[Site], report: ConversionReport) -> dict:
    earlier = getattr(model.config, "hf_ortho", None) or {}
    sources = {site.field: site.prefix + site.source for site in sites}
    return {
        "activation": report.activation,
        # A second conversion keeps what the first one found.
        "source_model": earlier.get("source_model", model.config._name_or_path or None),
        "source_revision": earlier.get("source_revision", getattr(model.config, "_commit_hash", None)),
        "source_activations": sources | earlier.get("source_activations", {}),
        "calibrated": report.calibrated,
        "layers": [
            {
                "module": layer.module,
                "sup_error": layer.fit.sup_error,
                "rms_error": layer.fit.rms_error,
                "mass_outside": layer.fit.mass_outside,
            }
            for layer in report.layers
        ],
        "versions": {package: version(package) for package in ("hf_ortho", "torch", "transformers")},
    }
