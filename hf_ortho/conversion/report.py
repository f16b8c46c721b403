"""The report of a conversion, as data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..activations import FitReport, LearnableActivation
from ..fitting.histogram import Histogram
from ..fitting.options import WEIGHTS
from ..text import json_values
from .distill import Distillation
from .fidelity import Fidelity
from .report_text import report_text

REPORT_FILE = "conversion.json"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One converted activation: its path in the model, the config field that drives it, and its fit."""

    module: str
    field: str
    fit: FitReport


@dataclasses.dataclass
class ConversionReport:
    """The result of ``convert``. ``print`` shows it as a table; ``to_dict`` returns JSON values.

    Attributes:
        activation: the new activation, for example ``hermite_8``.
        model: name or class of the model.
        layers: one entry per converted module.
        left_alone: (config field, reason) of activation fields that were not converted.
        weights: the weights of the fits: ``fisher`` or ``density``, or None without data.
        notes: remarks about the conversion and the fits.
        fidelity: how closely the converted model follows its source; None without data.
        distillation: the result of the distillation, or None.
        fit_seconds, seconds: wall-clock time of all fits, and of the whole conversion.
        modules: learned module, source module and histogram by path, for ``plot``; not in ``to_dict``.

    Example:
        >>> report = hf_ortho.convert(model, "hermite_8")
        >>> [layer.module for layer in report.layers]
        ['transformer.h.0.mlp.act', 'transformer.h.1.mlp.act']
        >>> report.save(".")  # writes conversion.json
    """

    activation: str
    model: str
    layers: list[LayerReport]
    fit_seconds: float
    seconds: float
    left_alone: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    weights: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    fidelity: Fidelity | None = None
    distillation: Distillation | None = None
    modules: dict[str, tuple[LearnableActivation, nn.Module, Histogram | None]] = dataclasses.field(
        default_factory=dict, repr=False
    )

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        fitted: Mapping[str, tuple[LearnableActivation, LayerReport]],
        histograms: Mapping[str, Histogram],
        fit_seconds: float,
        *,
        left_alone: Sequence[tuple[str, str]] = (),
        weights: str | None = None,
        notes: Sequence[str] = (),
    ) -> ConversionReport:
        """The report of new activations by path, while ``model`` still has the source activations."""
        return cls(
            activation=", ".join(dict.fromkeys(module.name for module, _ in fitted.values())),
            model=model.name_or_path or type(model).__name__,
            layers=[layer for _, layer in fitted.values()],
            fit_seconds=fit_seconds,
            seconds=fit_seconds,
            left_alone=list(left_alone),
            weights=weights,
            notes=list(dict.fromkeys([*notes, *(layer.fit.note for _, layer in fitted.values() if layer.fit.note)])),
            modules={p: (module, model.get_submodule(p), histograms.get(p)) for p, (module, _) in fitted.items()},
        )

    def to_dict(self) -> dict:
        """As JSON values; an infinite end of a domain is None."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "modules"}
        plain["layers"] = [{"module": v.module, "field": v.field} | v.fit.to_dict() for v in self.layers]
        plain["left_alone"] = [list(pair) for pair in self.left_alone]
        for key in ("fidelity", "distillation"):
            value = getattr(self, key)
            plain[key] = None if value is None else dataclasses.asdict(value)
        return json_values(plain | {"warnings": self.warnings})

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ConversionReport:
        """The inverse of ``to_dict``, without the modules; ignores other keys. Also reads the files of version 0.1,
        which have ``calibrated`` instead of ``weights``, and no fidelity."""
        values: dict[str, Any] = {key: str(plain[key]) for key in ("activation", "model")}
        values |= {key: float(plain[key]) for key in ("fit_seconds", "seconds")}
        values["layers"] = layers = [
            LayerReport(str(v["module"]), str(v["field"]), FitReport.from_dict(v)) for v in plain["layers"]
        ]
        values["left_alone"] = [(str(field), str(why)) for field, why in plain["left_alone"]]
        if "weights" not in plain:  # version 0.1
            notes = dict.fromkeys(layer.fit.note for layer in layers if layer.fit.note)
            weights = "density" if plain["calibrated"] else None
            plain = {**plain, "weights": weights, "notes": notes, "fidelity": None}
        if plain["weights"] not in (None, *WEIGHTS):
            raise ValueError(f"weights {plain['weights']!r}: must be {', '.join(WEIGHTS)} or null")
        values["weights"] = plain["weights"]
        values["notes"] = [str(note) for note in plain["notes"]]
        for key, cls_of in (("fidelity", Fidelity), ("distillation", Distillation)):
            values[key] = None if plain[key] is None else cls_of.from_dict(plain[key])
        return cls(**values)

    def to_json(self) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write ``conversion.json`` to ``folder``, beside the weights."""
        Path(folder, REPORT_FILE).write_text(self.to_json(), encoding="utf-8")

    def plot(self, path: str | Path, title: str = "") -> None:
        """Write a PNG that shows, per layer, source, fit, difference, pre-activations and domain."""
        from ..plotting import Panel, plot_activations  # imported lazily: it pulls in matplotlib

        panels = [Panel(name, *parts) for name, parts in self.modules.items()]
        plot_activations(panels, path, title or f"{self.model}: {self.activation}")

    @property
    def warnings(self) -> list[str]:
        """One line per layer with more than 0.1 % of its pre-activations and most of its squared error outside the
        domain, if the rms error there is above 1e-3."""
        lines = []
        for layer in self.layers:
            fit = layer.fit
            lo, hi = fit.domain
            relative = fit.rms_error_outside / fit.rms_error if fit.rms_error else math.inf
            mostly_outside = fit.mass_outside * relative * relative > 0.5
            if fit.mass_outside > 1e-3 and mostly_outside and fit.rms_error_outside > 1e-3:
                where = f"the domain [{lo:.2f}, {hi:.2f}]" if fit.worst_group is None else "the domains of their groups"
                lines.append(
                    f"{layer.module}: {fit.mass_outside:.2%} of {fit.density} lie outside {where}, with an rms error "
                    f"there of {fit.rms_error_outside:.1e}"
                )
        return lines

    def text(self, *, verbose: bool = False) -> str:
        """The report as text of 80 columns: the fidelity, the five layers with the largest errors (with ``verbose``
        all), and remarks."""
        return report_text(self, verbose)

    def __str__(self) -> str:
        return self.text()
