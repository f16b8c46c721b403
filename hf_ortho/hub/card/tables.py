"""The activations of a model as Markdown tables: one row per layer, equal rows grouped, long tables folded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...activations import FAMILIES, parse
from ...checkpoints.provenance import LayerProvenance, families_in
from ...conversion import ConversionReport
from ...conversion.report_text import cells, columns, divergence_legend, divergence_name, groups_legend
from ...fitting.density import DATA_FREE
from ...path_patterns import by_kind
from ...text import Markdown, code, markdown_table, number

VISIBLE = 16  # rows


def layer_table(report: ConversionReport) -> Markdown:
    """Table of the fits of a conversion."""
    fisher = bool(divergence_legend(report))
    rows = []
    for layer in report.layers:
        fit = layer.fit
        effect = [f"{fit.divergence:.1e}" if fit.divergence is not None else ""] if fisher else []
        slopes = ", ".join(number(slope, ".3g") for slope in fit.tail_slopes)
        rows.append((layer.module, [fit.source, slopes, *effect, *cells(layer)]))
    header = ["activation", "source", "tail slopes", *([divergence_name(report)] if fisher else []), *columns(report)]
    return folded(header, _grouped(rows), "activations")


def stored_table(layers: Sequence[LayerProvenance]) -> Markdown:
    """Table of the fits recorded in ``config.hf_ortho``, for a folder without ``conversion.json``."""
    rows = []
    for layer in layers:
        domain = "..".join(number(end, ".2f") if math.isfinite(end) else "" for end in layer.domain or ())
        errors = ["" if error is None else f"{error:.1e}" for error in (layer.sup_error, layer.rms_error)]
        source = layer.source or layer.fitted_to or ""  # an adapter records only the fitted function
        outside = "" if layer.mass_outside is None else f"{layer.mass_outside:.2%}"
        rows.append((layer.module, [source, domain, *errors, outside]))
    return folded(["activation", "source", "domain", "sup f", "rms f", "outside"], _grouped(rows), "activations")


def formulas(activation: str) -> Markdown:
    """The formula of each family in a string such as ``hermite_8, hermite_9``, as indented code, and the groups of
    channels."""
    parts = [f"    {FAMILIES[family].equation}" for family in families_in(activation)]
    for name in map(parse, activation.split(", ") if activation else ()):
        if name.groups > 1:
            count = sum(map(len, name.cls.initial_parameters(name.degree, "paper").values()))
            parts.append(
                f"({code(name.name)}: {count} parameters for each of {name.groups} groups of consecutive channels)"
            )
    return Markdown("\n\n".join(parts))


def legend(calibrated: bool | None, report: ConversionReport | None = None) -> str:
    """What the columns of a table of fits are."""
    weight = "the calibration data" if calibrated else f"the density of {DATA_FREE}, without data"
    parts = [
        divergence_legend(report) if report else "",
        groups_legend(report) if report else "",
        "sup: largest error on the real line",
        f"rms and outside (share of values beyond the domain): weighted by {weight}",
        "seen: range of the pre-activations" if report and calibrated else "",
    ]
    return "; ".join(filter(None, parts))


def paths_list(paths: Sequence[str]) -> list[Markdown]:
    """Paths as Markdown, with paths that differ only in numbers merged: ``h.*.act`` (12)."""
    return [_place(pattern, [path for _, path in members]) for pattern, members in by_kind(paths).items()]


def folded(header: list[str], rows: list[list[str]], subject: str) -> Markdown:
    """A Markdown table. A long table is folded: only the first and last rows are shown until it is opened."""
    if len(rows) <= VISIBLE:
        return markdown_table(header, rows)
    # GitHub and the Hub render Markdown inside HTML only after an empty line.
    return Markdown(
        f"{markdown_table(header, [rows[0], rows[-1]])}\n\n<details>\n<summary>All {len(rows)} rows of the {subject} "
        f"(the first and last are shown above)</summary>\n\n{markdown_table(header, rows)}\n\n</details>"
    )


def _grouped(rows: list[tuple[str, list[str]]]) -> list[list[str]]:
    """Merge rows with equal cells whose paths differ only in numbers."""
    cells = dict(rows)
    grouped = []
    for pattern, members in by_kind(list(cells)).items():
        paths = [path for _, path in members]
        if all(cells[path] == cells[paths[0]] for path in paths):
            grouped.append([_place(pattern, paths), *cells[paths[0]]])
        else:
            grouped += [[code(path), *cells[path]] for path in paths]
    return grouped


def _place(pattern: str, paths: list[str]) -> Markdown:
    return code(paths[0]) if len(paths) == 1 else Markdown(f"{code(pattern)} ({len(paths)})")
