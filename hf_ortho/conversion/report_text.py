"""The report of a conversion, as text: how closely the model follows its source, the worst layers, and remarks."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..fitting.density import DATA_FREE
from ..path_patterns import by_kind
from ..text import number, visible

if TYPE_CHECKING:
    from .report import ConversionReport, LayerReport

WIDTH = 80
WORST = 5  # rows of a folded table
MOST_OUTSIDE = 0.3  # share of the pre-activations outside the fitted domain
NOT_CALIBRATED = (
    "not calibrated: for fits to the inputs of each layer, pass calibration=[inputs, ...] to hf_ortho.convert, or "
    "--calibration-data to hf-ortho convert"
)
COLUMNS = ("domain", "sup f", "rms f", "sup f'", "rms f'", "outside", "seen")
COLUMNS_OF_GROUPS = ("domains", "sup f", "rms f", "worst group", "median group", "outside", "seen")
# those that do not fit in the width
CARD_ONLY: dict[tuple[str, ...], tuple[str, ...]] = {COLUMNS: ("sup f'",), COLUMNS_OF_GROUPS: ("sup f", "seen")}
WEIGHTS = {"fisher": "calibrated, Fisher weights", "density": "calibrated, density weights"}


def columns(report: ConversionReport) -> tuple[str, ...]:
    """The columns of a table of fits, besides the divergence."""
    return COLUMNS if all(layer.fit.worst_group is None for layer in report.layers) else COLUMNS_OF_GROUPS


def cells(layer: LayerReport) -> list[str]:
    """The cells of ``columns`` for one layer."""
    fit = layer.fit
    errors = [f"{e:.1e}" for e in (fit.sup_error, fit.rms_error, fit.sup_derivative_error, fit.rms_derivative_error)]
    if fit.worst_group is not None and fit.median_group is not None:
        errors[2:] = [f"{index}: {error:.1e}" for index, error in (fit.worst_group, fit.median_group)]
    return [
        "..".join(number(end, ".2f") for end in fit.domain),
        *errors,
        f"{fit.mass_outside:.2%}",
        "-"
        if fit.minimum is None or fit.maximum is None
        else f"{number(fit.minimum, '.1f')}..{number(fit.maximum, '.1f')}",
    ]


def groups_legend(report: ConversionReport) -> str:
    """What the columns about groups are; empty without groups."""
    if columns(report) == COLUMNS:
        return ""
    return (
        "domains: from the least lo to the largest hi of all groups of channels; worst and median group: its number, "
        f"counted from 0, and its {group_error(report)}"
    )


def group_error(report: ConversionReport) -> str:
    """The error of which the worst and the median group are shown."""
    return f"part of the {divergence_name(report)}" if divergence_meaning(report) else "rms f"


def divergence_name(report: ConversionReport) -> str:
    """The name of ``Fidelity.divergence``; without a fidelity, it may be of either kind."""
    if report.fidelity is None:
        return "divergence"
    return "KL" if report.fidelity.kl is not None else "error^2"


def divergence_meaning(report: ConversionReport) -> str:
    """What the divergence of a layer is; empty without Fisher weights."""
    if all(layer.fit.divergence is None for layer in report.layers):
        return ""
    what = "squared relative error of the output, " if divergence_name(report) == "error^2" else ""
    return f"{what}expected from the errors of this layer alone"


def divergence_legend(report: ConversionReport) -> str:
    """``divergence_meaning`` after the name; empty without Fisher weights."""
    meaning = divergence_meaning(report)
    return f"{divergence_name(report)}: {meaning}" if meaning else ""


def report_text(report: ConversionReport, verbose: bool = False) -> str:
    """See ``ConversionReport.text``."""
    layers = {layer.module: layer for layer in report.layers}
    kinds = by_kind(list(layers)).items()  # one table per group of paths that differ only in numbers
    shown = [line for place, rows in kinds for line in _table(report, place, rows, layers, verbose)]
    below = [part for line in summary(report) for part in wrapped(line)]
    return "\n".join([*headline(report), *fidelity_lines(report), *shown, *below])


def wrapped(line: str, indent: str = "  ") -> list[str]:
    """``line`` in lines of ``WIDTH``; paths stay whole."""
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def headline(report: ConversionReport) -> list[str]:
    """The effect on the model in one sentence; then what was converted, and how long it took."""
    how = WEIGHTS.get(report.weights or "", "not calibrated")
    took = f"{report.seconds:.1f} s (fits: {report.fit_seconds:.1f} s; {how})"
    converted = f"{len(report.layers)} activations of {report.model} converted to {report.activation} in {took}"
    return [*wrapped(_effect(report)), *wrapped(converted)]


def _effect(report: ConversionReport) -> str:
    f, rows = report.fidelity, dict(fidelity_rows(report))
    if f is not None:
        on = f"{f.predictions:,} {'held-out ' if f.held_out else ''}prediction{'s' if f.predictions != 1 else ''}"
        if "perplexity" in rows:
            return f"{report.activation}: perplexity {rows['perplexity']} on {on}"
        if f.top1 is not None:
            return f"{report.activation}: most likely class as before in {f.top1:.2%} of {on}"
        if f.output_error is not None:
            return f"{report.activation}: output within {f.output_error:.2%} of the source model on {on}"
    sources = ", ".join(dict.fromkeys(layer.fit.source for layer in report.layers))
    worst = max((layer.fit for layer in report.layers), key=lambda fit: fit.rms_error)
    return f"{report.activation} follows {sources} with an rms error of {worst.rms_error:.1e}"


def fidelity_rows(report: ConversionReport) -> list[tuple[str, str]]:
    """The comparison with the source model, as names and values."""
    f = report.fidelity
    if f is None:
        return []
    rows = []
    if f.kl is not None:
        rows.append(("KL(source || converted)", f"{f.kl:.1e} nats per prediction"))
    if f.loss_before is not None and f.loss_after is not None:
        change = f.loss_after - f.loss_before
        if f.perplexity and max(abs(v) for v in (f.loss_before, f.loss_after, change)) < 700:  # exp() is finite
            before, after, relative = math.exp(f.loss_before), math.exp(f.loss_after), math.expm1(change)
            rows.append(("perplexity", f"{before:.5g} -> {after:.5g} ({number(relative, '+.3%')})"))
        else:
            rows.append(("loss", f"{f.loss_before:.5f} -> {f.loss_after:.5f} ({number(change, '+.1e')})"))
    if f.top1 is not None:
        rows.append(("same most likely class", f"{f.top1:.2%}"))
    if f.output_error is not None:
        rows.append(("relative error of the output", f"{f.output_error:.1e}"))
    if f.gradient_error is not None and f.gradient_cosine is not None:
        angle = 1 - min(f.gradient_cosine, 1.0)  # a larger cosine is rounding
        rows.append(("relative error of the gradient", f"{f.gradient_error:.1e} (1 - cosine: {angle:.1e})"))
    if f.rounding is not None:
        value = f.rounding if f.kl is not None else math.sqrt(f.rounding)
        rows.append(("from rounding alone", f"{'KL' if f.kl is not None else 'error of the output'} {value:.1e}"))
    return rows


def fidelity_data(report: ConversionReport) -> str:
    """What ``fidelity_rows`` is measured on; empty if nothing was."""
    f = report.fidelity
    if f is None:
        return ""
    data = "held-out calibration data" if f.held_out else "the only calibration batch"
    return f"{f.predictions:,} prediction{'s' if f.predictions != 1 else ''} ({data})"


def fidelity_lines(report: ConversionReport) -> list[str]:
    """``fidelity_rows`` with a heading, as lines."""
    rows = fidelity_rows(report)
    if not rows:
        return []
    width = max(len(name) for name, _ in rows)
    heading = f"Compared with the source model on {fidelity_data(report)}:"
    return [*wrapped(heading), *(f"  {name.ljust(width)}  {value}" for name, value in rows)]


def _shown(report: ConversionReport) -> list[str]:
    """The columns of the tables, besides the divergence."""
    unknown = () if report.weights is not None else ("seen",)
    return [name for name in columns(report) if name not in (*CARD_ONLY[columns(report)], *unknown)]


def _table(
    report: ConversionReport,
    place: str,
    rows: Sequence[tuple[str, str]],
    layers: dict[str, LayerReport],
    verbose: bool,
) -> list[str]:
    """One row per activation, or one if all are equal; wider than ``WIDTH`` if need be: numbers are never truncated."""
    fits = [layers[path].fit for _, path in rows]
    names = ", ".join(dict.fromkeys(fit.activation for fit in fits))
    sources = ", ".join(dict.fromkeys(fit.source for fit in fits))
    slopes = "; ".join(dict.fromkeys(", ".join(number(s, ".3g") for s in fit.tail_slopes) for fit in fits))
    title = wrapped(visible(f"{names} for {sources} (tail slopes {slopes}) at {place}"))
    fisher = any(fit.divergence is not None for fit in fits)
    chosen = _shown(report)
    shown = {}
    for row, path in rows:
        named = dict(zip(columns(report), cells(layers[path]), strict=True))
        effect = layers[path].fit.divergence
        leading = [] if not fisher else ["-" if effect is None else f"{effect:.1e}"]
        shown[row] = [*leading, *(named[name] for name in chosen)]
    first = rows[0][0]
    if len(rows) > 1 and all(shown[row] == shown[first] for row, _ in rows):
        title += [f"All {len(rows)} layers are alike"]
        shown = {f"{first}..{rows[-1][0]}": shown[first]}
    elif not verbose and len(rows) > WORST:
        title += [f"The {WORST} layers of {len(rows)} with the largest errors (--verbose for all)"]
        worst = sorted(rows, key=lambda row: -layers[row[1]].fit.error)[:WORST]
        shown = {row: shown[row] for row, _ in worst}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for column in ([divergence_name(report)] if fisher else []) + chosen:
        table.add_column(column, justify="right", no_wrap=True)
    for row, values in shown.items():
        table.add_row(row.replace("*", "-"), *values)
    out = io.StringIO()
    Console(file=out, width=1000, color_system=None, markup=False, emoji=False).print(table)
    return ["", *title, *(line.rstrip() for line in out.getvalue().splitlines() if line.strip()), ""]


def summary(report: ConversionReport) -> list[str]:
    """The lines below the tables."""
    return [
        *legend_lines(_legend(report)),
        *([NOT_CALIBRATED] if report.weights is None else []),
        *remarks(report),
    ]


def legend_lines(legend: Mapping[str, str]) -> list[str]:
    """The names of columns, and what they are, in lines of ``WIDTH``."""
    width = max(map(len, legend))
    return [line for name, text in legend.items() for line in wrapped(f"  {name:{width}}  {text}", " " * (width + 4))]


def _legend(report: ConversionReport) -> dict[str, str]:
    """What the columns of the tables are."""
    weight = f"weighted by {DATA_FREE}" if report.weights is None else "weighted by the data"
    meaning, shown = divergence_meaning(report), _shown(report)
    return ({divergence_name(report): meaning} if meaning else {}) | {
        name: text
        for name, text in {
            "domain": "where f is fitted; beyond it, f is straight, with the tail slopes",
            "domains": "smallest interval that contains the domains of all groups of channels",
            "sup f": "largest difference of f from the source activation",
            "rms f": f"root mean square difference, {weight}",
            "rms f'": "the same of the derivatives",
            "worst group": f"its number, counted from 0, and its {group_error(report)}",
            "median group": "the same for the median group",
            "outside": f"share of the inputs beyond the domain, {weight}",
            "seen": "smallest and largest input in the data",
        }.items()
        if name in shown
    }


def remarks(report: ConversionReport) -> list[str]:
    """The distillation, what was left alone, notes, and warnings about the fits."""
    lines = []
    if (d := report.distillation) is not None:
        gain = f"({number(d.error_after / d.error_before - 1, '+.0%')})" if d.error_before else "(nothing to gain)"
        lines.append(
            f"{d.steps} steps of distillation: squared error of the output {d.error_before:.2e} -> "
            f"{d.error_after:.2e} {gain} on {'a held-out' if d.held_out else 'the only'} batch"
        )
    lines += [f"left alone: {field}: {why}" for field, why in report.left_alone]
    lines += [f"note: {note}" for note in report.notes]
    if warnings := report.warnings:
        lines += [f"warning: {line}" for line in warnings[:3]]
        if more := warnings[3:]:
            lines.append(f"warning: and {len(more)} more layers")
    wide = [layer for layer in report.layers if layer.fit.mass_outside > MOST_OUTSIDE and layer.fit.rms_error > 1e-6]
    if report.weights is not None and wide:
        widest = max(wide, key=lambda layer: layer.fit.mass_outside)
        lines.append(
            f"warning: {widest.fit.mass_outside:.0%} of {widest.fit.density} of {widest.module} lie outside the "
            "fitted domain: the calibration data may be unlike what the model sees in use, such as random tokens"
        )
    return lines
