"""The activations of a model as Markdown: one row per layer, equal rows grouped, long tables folded."""

from __future__ import annotations

from collections.abc import Sequence

from ..activations import FAMILIES
from ..conversion import ConversionReport
from ..conversion.convert import families_in
from ..fitting.density import DATA_FREE
from ..path_patterns import by_kind

HEADER = [
    "activation",
    "source",
    "domain",
    "tail slopes",
    "sup f",
    "rms f",
    "sup f'",
    "rms f'",
    "outside",
    "pre-activations seen",
]
VISIBLE = 16  # rows


def layer_table(report: ConversionReport) -> str:
    """The fits of a conversion."""
    return folded(HEADER, _grouped([(layer.module, layer.cells()) for layer in report.layers]), "activations")


def stored_table(layers: Sequence[dict]) -> str:
    """What ``config.hf_ortho`` keeps of them, for a folder without ``conversion.json``."""
    rows = []
    for layer in layers:
        domain = ["" if end is None else f"{end:.2f}" for end in layer["domain"]]
        errors = [f"{layer[key]:.1e}" for key in ("sup_error", "rms_error")]
        source = layer.get("source", layer["fitted_to"])  # an adapter's are fitted to nothing else
        rows.append((layer["module"], [source, "..".join(domain), *errors, f"{layer['mass_outside']:.2%}"]))
    return folded(["activation", "source", "domain", "sup f", "rms f", "outside"], _grouped(rows), "activations")


def formulas(activation: str) -> str:
    """The formula of each family in a text such as ``hermite_8, hermite_9``, as indented code."""
    return "\n\n".join(f"    {FAMILIES[name].equation}" for name in families_in(activation))


def weight_of(calibrated: bool | None) -> str:
    """What the errors of a fit are weighted by."""
    return "the calibration data" if calibrated else f"the density of {DATA_FREE}, without data"


def paths_list(paths: Sequence[str]) -> list[str]:
    """Paths that differ in numbers only as one: ``h.*.act`` (12)."""
    return [_place(pattern, [path for _, path in members]) for pattern, members in by_kind(paths).items()]


def folded(header: list[str], rows: list[list[str]], what: str) -> str:
    """A Markdown table; of a long one the first and the last row are seen, and all of them when it is opened."""
    if len(rows) <= VISIBLE:
        return table(header, rows)
    # GitHub and the Hub render Markdown inside HTML only after an empty line.
    return (
        f"{table(header, [rows[0], rows[-1]])}\n\n<details>\n<summary>All {len(rows)} rows of the {what}, of which the "
        f"first and the last are above</summary>\n\n{table(header, rows)}\n\n</details>"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _grouped(rows: list[tuple[str, list[str]]]) -> list[list[str]]:
    """One row for paths that differ in numbers only, if all of them have the same cells."""
    cells = dict(rows)
    found = []
    for pattern, members in by_kind(list(cells)).items():
        paths = [path for _, path in members]
        if all(cells[path] == cells[paths[0]] for path in paths):
            found.append([_place(pattern, paths), *cells[paths[0]]])
        else:
            found += [[f"`{path}`", *cells[path]] for path in paths]
    return found


def _place(pattern: str, paths: list[str]) -> str:
    return f"`{paths[0]}`" if len(paths) == 1 else f"`{pattern}` ({len(paths)})"
