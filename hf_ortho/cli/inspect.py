"""``hf-ortho inspect``: print the activations of a converted checkpoint, without loading other weights."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

from ..text import json_values, one_line
from .console import Parser, console, table
from .network import check_hub

if TYPE_CHECKING:
    from ..checkpoints.activations import StoredActivations

WIDTH = 100


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
    from ..conversion.summary import OVER_GROUPS, examine
    from ..fitting.density import DATA_FREE
    from ..path_patterns import by_kind

    stored = load_activations(args.model, revision=args.revision)
    layers, notes = examine(stored)
    if args.json:
        summary = {"model": args.model, "revision": stored.commit, "provenance": stored.provenance.to_dict()}
        print(json.dumps(json_values(summary | {"layers": [layer.to_dict() for layer in layers]}), allow_nan=False))
        return
    for line in _provenance(args.model, stored):
        console.print(line)
    known = {layer.path: layer for layer in layers}
    columns = ["*", "activation", "domain", "tail slopes", "E f^2", "E f'^2", "sup f", "rms f"]
    for place, rows in by_kind(list(known)).items():
        sources = ", ".join(sorted({known[path].source or "unknown" for _, path in rows}))
        cells = [[row, *known[path].cells()] for row, path in rows]
        table(f"{len(rows)} activations at {one_line(place)}, source {one_line(sources)}", columns, cells)
    where = "over the real line" if stored.provenance.has_tails else "on the domain"
    console.print(f"E under N(0, 1); sup {where} and rms under {DATA_FREE}, from the source activation")
    if any(layer.module.groups > 1 for layer in layers):
        console.print(textwrap.fill(f"{OVER_GROUPS}; parameters: their extremes and medians; --json prints all", WIDTH))
    for note in notes:
        console.print(f"no distance: {one_line(note)}")
    for layer in layers:
        console.print(f"\n{one_line(layer.path)} {layer.module.name}", style="bold")
        for name, values in layer.parameters().items():
            if values.ndim == 1:
                console.print(_vector(name, values.tolist()))
                continue
            for kind, row in (("min", values.amin(0)), ("median", values.median(0).values), ("max", values.amax(0))):
                console.print(_vector(f"{name} {kind}", row.tolist()))


def _provenance(name: str, stored: StoredActivations) -> list[str]:
    known = {"model": f"{name} at {stored.commit}" if stored.commit else name}
    for key, value in stored.provenance.to_dict().items():
        if key != "layers" and value is not None:
            known[key.replace("_", " ")] = _plain(value)
    if stored.provenance.activation is None:
        known["provenance"] = "none: the config has no hf_ortho entry, as after training from scratch"
    return [
        textwrap.fill(f"{key:20s}{value}", WIDTH, subsequent_indent=" " * 20, break_on_hyphens=False)
        for key, value in known.items()
    ]


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _vector(name: str, values: list[float]) -> str:
    """``name`` and its values in columns, with 4 significant digits."""
    head = f"  {name:24s}"
    return textwrap.fill(
        "".join(f"{value:>11.4g}" for value in values), WIDTH, initial_indent=head, subsequent_indent=" " * len(head)
    )
