"""Make the pictures and the tables of the documents from the measurements in ``recipes/figures``.

python recipes/figures.py                              # draw all pictures again, and print all tables
python recipes/figures.py --model FOLDER --text FILE   # first convert this model, for conversion.json
python recipes/figures.py --fidelity FILE...           # first read what python -m tests.pretrained --json wrote
python recipes/figures.py --comparison FOLDER          # first read what hf-ortho compare wrote, for training.json
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import hf_ortho
from hf_ortho.activations import parse
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.cli.console import Parser, quiet
from hf_ortho.cli.env import environment
from hf_ortho.errors import ConfigError, HfOrthoError
from hf_ortho.files import json_object, written
from hf_ortho.hub import hardware
from hf_ortho.plotting.comparison import draw_differences, styles
from hf_ortho.plotting.layout import BLACK, BLUE, SKY, VERMILION, literal, values
from hf_ortho.text import code, markdown_table, number
from hf_ortho.training.calibration import calibration_batches

FOLDER = Path(__file__).parent / "figures"
DOCUMENT = "fidelity.md"  # beside the folder: it has the tables
SHOWN = {"hermite_3": (BLUE, "-."), "hermite_8": (VERMILION, "--")}  # in conversion.png
FAMILIES = ("hermite", "fourier", "tropical", "tropical_rational")
WAYS = {"data-free": "data-free", "density": "density", "fisher": "Fisher"}
EVERY, TWO, BEST = [*WAYS, "torchortho"], ["data-free", "fisher"], ["fisher"]
COLUMNS = {  # the format of a column of a table, and the fits that it shows; (".1e", EVERY) by default
    **{"perplexity": ("+.3%", BEST), "top-1": (".2%", BEST), "worst": (".1e", BEST)},
    **{"gradient error": (".1e", TWO), "largest error": (".1e", TWO), "seconds": (".1f", TWO)},
}


def conversion(model: str, text: str) -> dict[str, Any]:
    """Source, fits and pre-activations of one layer: the one whose last fit has the median error."""
    checkpoint = load_checkpoint(model, dtype="float32")
    batches, _ = calibration_batches(checkpoint, text, samples=4, block_size=256)
    reports = {name: hf_ortho.convert(copy.deepcopy(checkpoint.model), name, calibration=batches) for name in SHOWN}
    *_, last = reports.values()
    index = sorted(range(len(last.layers)), key=lambda i: last.layers[i].fit.rms_error)[(len(last.layers) - 1) // 2]
    path, x = last.layers[index].module, np.linspace(-5.5, 4.0, 381)
    _, source, histogram = last.modules[path]
    density = histogram.counts / histogram.counts.sum() / np.diff(histogram.edges)
    arrays = {"x": x, "source": values(source, x)[0]}
    arrays["density"] = np.interp(x, (histogram.edges[1:] + histogram.edges[:-1]) / 2, density)
    arrays |= {name: values(report.modules[path][0], x)[0] for name, report in reports.items()}
    title = f"{Path(model).name}, layer {index + 1} of {len(last.layers)}"
    about = {"hardware": hardware(), "environment": environment(), "text": Path(text).name, "title": title}
    about["activation"] = last.layers[index].fit.source
    return about | {key: np.round(array, 5).tolist() for key, array in arrays.items()}


def fidelity(files: list[str]) -> dict[str, Any]:
    """The results of ``python -m tests.pretrained --json`` by model, activation, way of the fit and column."""
    runs, models = [], {}
    for plain in map(json_object, files):
        runs.append({key: plain[key] for key in ("command", "hardware", "seed", "environment")})
        for model in filter(None, plain["models"]):
            about = {key: model[key] for key in ("class", "inputs", "tokens")} | {"test": {}, "others": {}}
            found = models.setdefault(Path(model["folder"]).name, about)
            alike = {domain for domain, count in model["tokens"].items() if count == found["tokens"].get(domain)}
            for result in model["results"]:
                test, moved = result["test"], result["moved"]
                away, domains = ("mean", "others_moved") if moved else ("kl", "others")
                others = {domain: one[away] for domain, one in result[domains].items() if domain in alike}
                if moved:
                    row = {"1 - cos": moved["mean"], "worst": moved["worst"]}
                else:
                    ratio = math.exp(min(test["loss_after"] - test["loss_before"], 700.0))
                    row = {"KL": test["kl"], "perplexity": ratio - 1, "top-1": test["top1"]}
                row |= {"gradient error": test["gradient_error"], "largest error": result["sup_error"]}
                row["seconds"] = result["seconds"]
                found["quantity"] = "1 - cosine" if moved else "KL divergence (nats)"
                for kind, each in (("test", row), ("others", others)):
                    found[kind].setdefault(result["activation"], {}).setdefault(result["way"], each)
    return {"runs": runs, "models": models}


def training(folder: str) -> dict[str, Any]:
    """The losses of the runs of ``hf-ortho compare``, by activation and seed."""
    results, curves = json_object(Path(folder, "results.json")), {}
    for run in results["runs"]:
        name, seed = run["activation"], str(run["seed"])
        curves.setdefault(name, {})[seed] = json_object(Path(folder, name, f"seed-{seed}", "run.json"))["history"]
    return {"caption": results["caption"], "versions": results["versions"], "curves": curves}


def figure(height: float) -> Figure:
    drawn = Figure(figsize=(5.6, height), dpi=200, layout="constrained")  # 10 pt are 10 pixels at a width of 400
    FigureCanvasAgg(drawn)
    return drawn


def draw_conversion(plain: Mapping[str, Any]) -> Figure:
    """Source and fits over the density of the pre-activations, and the differences below."""
    drawn = figure(4.8)
    top, below = drawn.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    x, source, density = (np.array(plain[key]) for key in ("x", "source", "density"))
    drawn.suptitle(literal(plain["title"]), fontsize=12)
    top.plot(x, source, color=BLACK, lw=4.5, label=f"{plain['activation']} (source)")
    below.axhline(0, color=BLACK, lw=1)
    for name, (color, dashes) in SHOWN.items():
        top.plot(x, plain[name], color=color, ls=dashes, lw=2, label=name)
        below.plot(x, np.array(plain[name]) - source, color=color, ls=dashes, lw=2)
    low, high = source.min() - 0.4, 0.8 * source.max()
    behind = low + 0.75 * (high - low) * density / density.max()
    top.fill_between(x, behind, low, color=SKY, alpha=0.4, lw=0, label="inputs of the layer")
    top.set(xlim=(x[0], x[-1]), ylim=(low, high))
    top.legend(loc="upper left", fontsize=11, frameon=False)
    below.set_ylabel("difference", fontsize=11)
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=10)
        axes.locator_params(axis="y", nbins=4)
    return drawn


def draw_fidelity(plain: Mapping[str, Any]) -> Figure:
    """The first column of the results with Fisher weights over the degree: the first two models, a line per family."""
    drawn, looks, models = figure(3.3), styles(["source", *FAMILIES]), list(plain["models"].items())[:2]
    panels = drawn.subplots(1, len(models), squeeze=False)[0]
    for axes, (name, model) in zip(panels, models, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {family: [] for family in FAMILIES}
        for activation, made in model["test"].items():
            lines[parse(activation).family].append((parse(activation).degree, next(iter(made["fisher"].values()))))
        for family, points in lines.items():
            axes.plot(
                *zip(*sorted(points), strict=True), lw=1.8, label=family.replace("_", " ").capitalize(), **looks[family]
            )
        axes.set(yscale="log", xlabel="degree", ylabel=model["quantity"])
        axes.set_title(literal(name), fontsize=10)
        axes.locator_params(axis="x", integer=True, nbins=5)
        axes.grid(alpha=0.25, lw=0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9.5, frameon=False)
    return drawn


def draw_training(plain: Mapping[str, Any]) -> Figure:
    """The differences of the training losses."""
    drawn = figure(3.4)
    draw_differences(drawn.subplots(), plain["curves"])
    return drawn


def tables(plain: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: per model the conversions on the test data, and on other inputs."""
    for model, about in plain["models"].items():
        for title, by_name in ((model, about["test"]), (f"{model}, {about['quantity']}", about["others"])):
            shown = {activation: made for activation, made in by_name.items() if WAYS.keys() <= made.keys()}
            used = {way for made in shown.values() for way, row in made.items() if row}
            columns = [(c, *COLUMNS.get(c, (".1e", EVERY))) for c in next(iter(by_name.values()))["fisher"]]
            cells = [(c, spec, [way for way in ways if way in used]) for c, spec, ways in columns]
            heads = [WAYS.get(w, w) if i else f"{c}: {WAYS[w]}" for c, _, ways in cells for i, w in enumerate(ways)]
            rows = [
                [code(name), *(cell(made.get(way, {}).get(c), spec) for c, spec, ways in cells for way in ways)]
                for name, made in shown.items()
            ]
            if rows and len(columns) > 1:  # random tokens alone need no table
                yield str(markdown_table([title, *heads], rows))


def cell(value: float | None, spec: str) -> str:
    return "-" if value is None else number(value, spec)


def update(document: Path, text: str) -> None:
    """Replace what stands between the marks in the document, if it exists."""
    if document.exists():
        before, start, rest = document.read_text(encoding="utf-8").partition("<!-- tables of figures.py -->\n")
        _, end, after = rest.partition("<!-- end -->\n")
        if not end:
            raise ConfigError(f"{document} lacks the marks around its tables")
        with written(document) as draft:
            draft.write_text(f"{before}{start}\n{text}\n\n{end}{after}", encoding="utf-8")


def main(argv: list[str]) -> int:
    quiet()
    parser = Parser(prog="python recipes/figures.py", description="Make the pictures and the tables of the documents.")
    parser.add_argument("--model", help="Folder of a model to convert, for conversion.png.")
    parser.add_argument("--text", metavar="FILE", help="Plain text that calibrates the conversion of --model.")
    parser.add_argument("--fidelity", nargs="+", metavar="FILE", help="What python -m tests.pretrained --json wrote.")
    parser.add_argument("--comparison", metavar="FOLDER", help="What hf-ortho compare wrote.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="Where the measurements and the pictures are.")
    given: Any = None
    try:
        args = parser.parse_args(argv)
        if bool(args.model) != bool(args.text):
            raise ConfigError("--model and --text go together: the text calibrates the conversion of the model")
        todo = [("conversion", conversion, draw_conversion, args.model, args.text)]
        todo += [("fidelity", fidelity, draw_fidelity, args.fidelity)]
        todo += [("training", training, draw_training, args.comparison)]
        for name, measure, draw, *inputs in todo:
            file, picture = args.folder / f"{name}.json", args.folder / f"{name}.png"
            given = inputs[0] or file
            if inputs[0]:
                text = json.dumps(measure(*inputs), separators=(",", ":"))
                with written(file) as draft:
                    draft.write_text(text + "\n", encoding="utf-8")
            if not file.exists():
                continue
            plain = json_object(file)
            with written(picture) as draft:
                draw(plain).savefig(draft)
            print(f"Wrote {picture}")
            if name == "fidelity":
                text = "\n\n".join(tables(plain))
                print(f"\n{text}\n")
                update(args.folder.with_name(DOCUMENT), text)
    except (HfOrthoError, AttributeError, KeyError, StopIteration, TypeError) as error:
        where = ", ".join(given) if isinstance(given, list) else given
        wrong = f"{where}: not the results of a measurement"
        print(f"error: {error if isinstance(error, HfOrthoError) else wrong}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
