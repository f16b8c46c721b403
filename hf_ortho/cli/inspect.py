"""``hf-ortho inspect``: print the activations of a converted checkpoint, without loading other weights."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING

from ..text import json_values, one_line
from .console import Parser, console, table
from .network import check_hub

if TYPE_CHECKING:
    from ..checkpoints.activations import StoredActivations
    from ..conversion.summary import Layer

PER_LINE = 5  # values of a parameter


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho inspect",
        description="Print the activations of a converted checkpoint, without loading other weights.",
    )
    p.add_argument("model", help="Folder or Hub model.")
    p.add_argument("--revision", help="Branch, tag or commit of the Hub model.")
    p.add_argument("--json", action="store_true", help="Print one JSON object in full precision (null: infinite).")
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    check_hub([(args.model, args.revision)])

    from ..checkpoints.activations import load_activations
    from ..conversion.report_text import legend_lines, wrapped
    from ..conversion.summary import OVER_GROUPS, examine
    from ..fitting.density import DATA_FREE
    from ..path_patterns import by_kind

    stored = load_activations(args.model, revision=args.revision)
    layers, notes = examine(stored)
    if args.json:
        summary = {"model": args.model, "revision": stored.commit, "provenance": stored.provenance.to_dict()}
        print(json.dumps(json_values(summary | {"layers": [layer.to_dict() for layer in layers]}), allow_nan=False))
        return
    for name, value in _provenance(args.model, stored).items():
        for line in wrapped(f"{name:20s}{value}", " " * 20):
            console.print(line)
    console.print()
    known = {layer.path: layer for layer in layers}
    columns = ["layer", "activation", "domain", "tail slopes", "E f^2", "E f'^2", "sup f", "rms f"]
    vectors: list[tuple[str, Layer]] = []
    for place, rows in by_kind(list(known)).items():
        sources = ", ".join(sorted({known[path].source or "unknown" for _, path in rows}))
        cells = []
        for _, equal in groupby(rows, key=lambda row: _content(known[row[1]])):
            (first, path), *others = equal
            shown = f"{first}..{others[-1][0]}" if others else first
            cells.append([shown.replace("*", "-"), *known[path].cells()])
            vectors.append((place.replace("*", shown) if others else path, known[path]))
        names = {row[1] for row in cells}
        title = f"{len(rows)} activations at {one_line(place)}, source {one_line(sources)}"
        kept = [i for i in range(len(columns)) if i != 1 or len(names) > 1]
        title = title if len(names) > 1 else f"{names.pop()}: {title}"
        table("\n".join(wrapped(title)), [columns[i] for i in kept], [[row[i] for i in kept] for row in cells])
    where = "over the real line" if stored.provenance.has_tails else "on the domain"
    legend = {
        "domain": "where f is a series; beyond it, f is straight, with the tail slopes",
        "E f^2, E f'^2": "mean squares of f and of its derivative for inputs from N(0, 1)",
        "sup f": f"largest difference from the source activation {where}",
        "rms f": f"root mean square difference for inputs from {DATA_FREE}",
    }
    lines = legend_lines(legend)
    if any(layer.module.groups > 1 for layer in layers):
        lines += wrapped(f"{OVER_GROUPS}; parameters: their extremes and medians; --json prints all")
    for line in lines + [f"no distance: {one_line(note)}" for note in notes]:
        console.print(line)
    for path, layer in vectors:
        console.print(f"\n{one_line(path)} {layer.module.name}", style="bold")
        for name, values in layer.parameters().items():
            if values.ndim == 1:
                console.print(_vector(name, values.tolist()))
                continue
            for kind, row in (("min", values.amin(0)), ("median", values.median(0).values), ("max", values.amax(0))):
                console.print(_vector(f"{name} {kind}", row.tolist()))


def _content(layer: Layer) -> str:
    """All that is printed about a layer, but for its path."""
    return str([layer.cells(), {name: value.tolist() for name, value in layer.parameters().items()}])


def _provenance(name: str, stored: StoredActivations) -> dict[str, str]:
    known = {"model": f"{name} at {stored.commit}" if stored.commit else name}
    for key, value in stored.provenance.to_dict().items():
        if key != "layers" and value is not None:
            known[key.replace("_", " ")] = _plain(value)
    if stored.provenance.activation is None:
        known["provenance"] = "none: the config has no hf_ortho entry, as after training from scratch"
    return known


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _vector(name: str, values: list[float]) -> str:
    """``name`` and its values in columns, with 4 significant digits."""
    heads = [f"  {name}", *[""] * len(values)]
    rows = [values[i : i + PER_LINE] for i in range(0, len(values), PER_LINE)]
    return "\n".join(
        f"{head:22s}" + "".join(f"{value:>11.4g}" for value in row) for head, row in zip(heads, rows, strict=False)
    )
