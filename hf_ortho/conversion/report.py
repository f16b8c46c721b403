"""The report of a conversion, as data and as a table."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from ..activations import FitReport, LearnableActivation
from ..fitting.density import DATA_FREE
from ..fitting.histogram import Histogram
from ..path_patterns import by_kind
from ..text import json_values
from .distill import Distillation

WIDTH = 100
MOST_OUTSIDE = 0.3  # share of the pre-activations outside the fitted domain
NOT_CALIBRATED = (
    "not calibrated: for fits to the inputs of each layer, pass calibration=[inputs, ...] to hf_ortho.convert, or "
    "--calibration-data to hf-ortho convert"
)
REPORT_FILE = "conversion.json"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One converted activation: its path in the model, the config field that drives it, and its fit."""

    module: str
    field: str
    fit: FitReport

    def cells(self) -> list[str]:
        """The cells of a table row: source, domain, tail slopes, four errors, mass outside, extremes of the data."""
        fit = self.fit
        errors = (fit.sup_error, fit.rms_error, fit.sup_derivative_error, fit.rms_derivative_error)
        return [
            fit.source,
            f"{fit.domain[0]:.2f}..{fit.domain[1]:.2f}",
            "{:.3g}, {:.3g}".format(*fit.tail_slopes),
            *(f"{error:.1e}" for error in errors),
            f"{fit.mass_outside:.2%}",
            "-" if fit.minimum is None else f"{fit.minimum:.1f}..{fit.maximum:.1f}",
        ]


@dataclasses.dataclass
class ConversionReport:
    """The result of ``convert``. ``print`` shows it as a table; ``to_dict`` returns JSON values.

    Attributes:
        activation: the new activation, for example ``hermite_8``.
        model: name or class of the model.
        layers: one entry per converted module.
        left_alone: (config field, reason) of activation fields that were not converted.
        calibrated: whether the fits were weighted by data.
        loss_before, loss_after: mean loss over the calibration batches, None without labels.
        output_error: |y - z| / |z| (Euclidean norm) on the first samples of the calibration data, for the logits (or
            first output) y of the converted and z of the source model in float32. In this process only; None if not
            finite.
        noise_floor: the same with y the source model in its own dtype; None for float32.
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
    calibrated: bool
    fit_seconds: float
    seconds: float
    left_alone: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    loss_before: float | None = None
    loss_after: float | None = None
    output_error: float | None = None
    noise_floor: float | None = None
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
        **measured,
    ) -> ConversionReport:
        """The report of new activations by path, while ``model`` still has the source activations."""
        return cls(
            activation=", ".join(dict.fromkeys(module.name for module, _ in fitted.values())),
            model=model.name_or_path or type(model).__name__,
            layers=[layer for _, layer in fitted.values()],
            calibrated=bool(histograms),
            fit_seconds=fit_seconds,
            seconds=fit_seconds,
            modules={p: (module, model.get_submodule(p), histograms.get(p)) for p, (module, _) in fitted.items()},
            **measured,
        )

    def to_dict(self) -> dict:
        """As JSON values; an infinite end of a domain is None."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "modules"}
        plain["layers"] = [{"module": v.module, "field": v.field} | v.fit.to_dict() for v in self.layers]
        plain["left_alone"] = [list(pair) for pair in self.left_alone]
        plain["distillation"] = self.distillation and dataclasses.asdict(self.distillation)
        return json_values(plain | {"warnings": self.warnings})

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ConversionReport:
        """The inverse of ``to_dict``, without the modules; ignores other keys."""
        values: dict[str, Any] = {key: str(plain[key]) for key in ("activation", "model")}
        values |= {key: float(plain[key]) for key in ("fit_seconds", "seconds")}
        for key in ("loss_before", "loss_after", "output_error", "noise_floor"):
            values[key] = None if plain[key] is None else float(plain[key])
        values["calibrated"] = bool(plain["calibrated"])
        values["layers"] = [
            LayerReport(str(v["module"]), str(v["field"]), FitReport.from_dict(v)) for v in plain["layers"]
        ]
        values["left_alone"] = [(str(field), str(why)) for field, why in plain["left_alone"]]
        distillation = plain["distillation"]
        values["distillation"] = None if distillation is None else Distillation.from_dict(distillation)
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
                lines.append(
                    f"{layer.module}: {fit.mass_outside:.2%} of {fit.density} lie outside the domain "
                    f"[{lo:.2f}, {hi:.2f}], with an rms error there of {fit.rms_error_outside:.1e}"
                )
        return lines

    @property
    def notes(self) -> list[str]:
        """The distinct notes of the fits."""
        return list(dict.fromkeys(layer.fit.note for layer in self.layers if layer.fit.note))

    def tables(self) -> list[Table]:
        """One table per group of paths that differ only in numbers; one row per activation, or one if all are equal."""
        layers = {layer.module: layer for layer in self.layers}
        return [self._table(place, rows, layers) for place, rows in by_kind(list(layers)).items()]

    def _table(self, place: str, rows: list[tuple[str, str]], layers: dict[str, LayerReport]) -> Table:
        fits = [layers[path].fit for _, path in rows]
        names = ", ".join(dict.fromkeys(fit.activation for fit in fits))
        sources = ", ".join(dict.fromkeys(fit.source for fit in fits))
        slopes = "; ".join(dict.fromkeys("{:.3g}, {:.3g}".format(*fit.tail_slopes) for fit in fits))
        title = textwrap.fill(f"{names} for {sources} (tail slopes {slopes}) at {place}", WIDTH)
        table = Table(
            box=SIMPLE_HEAD,
            title=title,
            title_justify="left",
            pad_edge=False,
            collapse_padding=True,
            min_width=max(map(len, title.splitlines())),
        )
        table.add_column("*", overflow="fold")
        for column in ("domain", "sup f", "rms f", "sup f'", "rms f'", "outside", "seen"):
            table.add_column(column, justify="right", no_wrap=True)
        cells = {row: layers[path].cells() for row, path in rows}
        if len(rows) > 1 and all(cells[row] == cells[rows[0][0]] for row, _ in rows):
            cells = {f"{rows[0][0]}..{rows[-1][0]} ({len(rows)} layers)": cells[rows[0][0]]}
        for row, (_, domain, _, *rest) in cells.items():
            table.add_row(row, domain, *rest)
        return table

    def summary(self) -> list[str]:
        """The lines below the table."""
        weight = "the data" if self.calibrated else f"{DATA_FREE}, no calibration data"
        first = (
            f"{len(self.layers)} activations converted in {self.seconds:.1f} s (fits: {self.fit_seconds:.1f} s); "
            f"rms and outside are weighted by {weight}"
        )
        return [first, *([] if self.calibrated else [NOT_CALIBRATED]), *self.remarks()]

    def remarks(self) -> list[str]:
        """The effect on the outputs of the model, and notes and warnings about the fits."""
        lines = []
        if self.loss_before is not None and self.loss_after is not None:
            difference = self.loss_after - self.loss_before
            change = math.expm1(difference) if difference < 700 else math.inf
            lines.append(
                f"loss on the labeled calibration data {self.loss_before:.5f} -> {self.loss_after:.5f} "
                f"(exp(loss) {change:+.4%})"
            )
        if self.output_error is not None:
            floor = "" if self.noise_floor is None else f"; of the source in its own dtype {self.noise_floor:.1e}"
            lines.append(f"relative error of the output, on the first samples, {self.output_error:.1e}{floor}")
        if (d := self.distillation) is not None:
            gain = f"({d.error_after / d.error_before - 1:+.0%})" if d.error_before else "(nothing to gain)"
            lines.append(
                f"{d.steps} steps of distillation: squared error of the output {d.error_before:.2e} -> "
                f"{d.error_after:.2e} {gain} on {'a held-out' if d.held_out else 'the only'} batch"
            )
        lines += [f"left alone: {field}: {why}" for field, why in self.left_alone]
        lines += [f"note: {note}" for note in self.notes]
        if self.warnings:
            lines += [f"warning: {line}" for line in self.warnings[:3]]
            if more := self.warnings[3:]:
                lines.append(f"warning: and {len(more)} more layers")
        wide = [layer for layer in self.layers if layer.fit.mass_outside > MOST_OUTSIDE and layer.fit.rms_error > 1e-6]
        if self.calibrated and wide:
            widest = max(wide, key=lambda layer: layer.fit.mass_outside)
            lines.append(
                f"warning: {widest.fit.mass_outside:.0%} of {widest.fit.density} of {widest.module} lie outside the "
                "fitted domain: the calibration data may be unlike what the model sees in use, such as random tokens"
            )
        return lines

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=WIDTH, color_system=None, markup=False, emoji=False)
        for table in self.tables():
            console.print(table)
        lines = [line.rstrip() for line in out.getvalue().rstrip().splitlines()]
        return "\n".join(lines + [textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in self.summary()])
