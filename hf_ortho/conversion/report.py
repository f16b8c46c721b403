"""What a conversion reports, as data and as a table."""

from __future__ import annotations

import dataclasses
import io
import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..activations import FitReport


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One converted activation: its path in the model, the config field that drives it, and its fit."""

    module: str
    field: str
    fit: FitReport

    def cells(self) -> list[str]:
        """The figures for a table: source, domain, tail slopes, four errors, mass outside, extremes seen."""
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


def _split_shared(paths: list[str]) -> tuple[str, list[str]]:
    """``["h.0.mlp.act", "h.1.mlp.act"]`` to ``"h.*.mlp.act"`` and ``["0", "1"]``."""
    parts = [path.split(".") for path in paths]
    shortest = min(map(len, parts))
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    if head == shortest:
        return paths[0], paths if len(paths) > 1 else ["*"]
    tail = next(i for i in range(shortest) if len({p[-1 - i] for p in parts}) > 1)
    rows = [".".join(p[head : len(p) - tail]) for p in parts]
    return ".".join([*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]]), rows


@dataclasses.dataclass
class ConversionReport:
    """The result of ``convert``; ``print`` shows it as a table, ``to_dict`` gives plain JSON values.

    Attributes:
        activation: the new activation, for example ``hermite_8``.
        model: name or class of the model.
        layers: one entry per converted module.
        left_alone: (config field, why) of activation fields that were not converted.
        calibrated: whether the weights came from data.
        loss_before, loss_after: mean loss over the calibration batches, None where they carry no labels.
        seconds: wall-clock time of the conversion.
    """

    activation: str
    model: str
    layers: list[LayerReport]
    left_alone: list[tuple[str, str]]
    calibrated: bool
    loss_before: float | None
    loss_after: float | None
    seconds: float

    def to_dict(self) -> dict:
        layers = [{"module": v.module, "field": v.field} | v.fit.to_dict() for v in self.layers]
        return dataclasses.asdict(self) | {"layers": layers}

    @property
    def notes(self) -> list[str]:
        """What the fits have to say, each once."""
        return list(dict.fromkeys(layer.fit.note for layer in self.layers if layer.fit.note))

    def table(self) -> Table:
        """One row per activation; what all rows share stands in the title."""
        places, rows = _split_shared([layer.module for layer in self.layers])
        sources = ", ".join(sorted({layer.fit.source for layer in self.layers}))
        slopes = "; ".join(sorted({"{:.3g}, {:.3g}".format(*layer.fit.tail_slopes) for layer in self.layers}))
        title = f"{self.activation} for {sources} (tail slopes {slopes}) at {places}"
        table = Table(
            box=SIMPLE_HEAD,
            title=title,
            title_justify="left",
            pad_edge=False,
            collapse_padding=True,
            min_width=len(title),
        )
        table.add_column("*", overflow="fold")
        for column in ("domain", "sup f", "rms f", "sup f'", "rms f'", "outside", "seen"):
            table.add_column(column, justify="right", no_wrap=True)
        for row, layer in zip(rows, self.layers, strict=True):
            cells = layer.cells()
            table.add_row(row, cells[1], *cells[3:])
        return table

    def summary(self) -> list[str]:
        """The lines under the table."""
        weight = "the data" if self.calibrated else "N(-0.5, 1.5^2), no calibration data"
        lines = [f"{len(self.layers)} activations converted in {self.seconds:.1f} s; rms and outside under {weight}"]
        if self.loss_before is not None and self.loss_after is not None:
            change = math.expm1(self.loss_after - self.loss_before)
            lines.append(
                f"loss on the labelled calibration data {self.loss_before:.5f} -> {self.loss_after:.5f} "
                f"(exp(loss) {change:+.4%})"
            )
        lines += [f"left alone: {field}: {why}" for field, why in self.left_alone]
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=200, color_system=None)
        console.print(self.table())
        lines = [line.rstrip() for line in out.getvalue().rstrip().splitlines()]
        return "\n".join(lines + self.summary())
