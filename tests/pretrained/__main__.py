"""``python -m tests.pretrained FOLDER... --text FILE``: how closely conversions of pretrained models follow them.

Prints one table per model: each activation, fitted without data, to the density of the pre-activations, and by the
Fisher information. A causal language model without a tokenizer writes its own texts. ``recipes/figures.py`` draws the
picture and makes the tables of ``recipes/fidelity.md`` from what ``--json`` writes.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_ortho.activations import parse
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.cli.console import Parser, console, quiet, table
from hf_ortho.cli.env import environment
from hf_ortho.conversion.fidelity import Fidelity
from hf_ortho.errors import CheckpointError, ConfigError, HfOrthoError
from hf_ortho.files import check_file, written
from hf_ortho.hub import hardware
from hf_ortho.text import change, json_values

from .inputs import Inputs
from .measure import WAYS, Result, results, torchortho_installed

ACTIVATIONS = ["hermite_3", "hermite_8", "hermite_12", "hermite_16", "fourier_6", "tropical_rational_6"]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    quiet()
    try:
        _run(argv)
    except HfOrthoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m tests.pretrained", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="Causal language models or text encoders.")
    parser.add_argument("--text", required=True, help="Plain text: one half calibrates, the other tests.")
    parser.add_argument("--test", metavar="FILE", help="Plain text that tests. Default: the second half of --text.")
    parser.add_argument(
        "--other", action="append", default=[], metavar="FILE", help="Plain text of another domain; may be repeated."
    )
    parser.add_argument("--activations", nargs="+", default=ACTIVATIONS, metavar="NAME")
    parser.add_argument("--fits", nargs="+", choices=WAYS, default=list(WAYS), help="What the fits are weighted by.")
    parser.add_argument("--calibration-blocks", type=int, default=4, help="Blocks in the fits.")
    parser.add_argument("--test-blocks", type=int, default=6)
    parser.add_argument("--other-blocks", type=int, default=2, help="Blocks of each other domain.")
    parser.add_argument("--block-size", type=int, default=256, help="Tokens per block.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of random tokens and of sampled texts.")
    parser.add_argument("--json", metavar="FILE", help="Write all results to this file.")
    return parser


def _run(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    for folder in args.folders:
        if not Path(folder).is_dir():
            raise CheckpointError(f"{folder} does not exist: expected the folder of a model")
    for name in args.activations:
        parse(name)
    for flag in ("calibration_blocks", "test_blocks", "other_blocks"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    if args.json:
        check_file(args.json, "--json")

    command = shlex.join(["python", "-m", "tests.pretrained", *argv])
    where = environment()
    plain: dict[str, Any] = {"command": command, "hardware": hardware(), "seed": args.seed, "environment": where}
    console.print(command)
    versions = ", ".join(f"{name} {where['packages'][name]}" for name in ("hf_ortho", "torch", "transformers"))
    console.print(f"{hardware()}, {where['threads']} torch threads; {versions}; seed {args.seed}")
    baseline = torchortho_installed()
    if not baseline:
        console.print("torchortho is not installed, so no row shows it")
    plain["models"] = []

    def save() -> None:
        if args.json:
            with written(args.json) as draft:
                draft.write_text(json.dumps(json_values(plain), indent=1) + "\n", encoding="utf-8")

    for folder in args.folders:
        plain["models"].append({})
        _model(folder, args, baseline, plain["models"][-1], save)


def _model(
    folder: str, args: argparse.Namespace, baseline: bool, plain: dict[str, Any], save: Callable[[], None]
) -> None:
    """Measure and print one model. Its results so far are in ``plain``, which is saved after each activation."""
    start = time.perf_counter()
    checkpoint = load_checkpoint(folder, dtype="float32")
    model = checkpoint.model
    inputs = Inputs.of(checkpoint, args)
    plain |= {"folder": folder, "class": type(model).__name__, "inputs": inputs.origin, "tokens": inputs.tokens}
    found: list[Result] = []
    try:
        for name in args.activations:
            print(f"{folder}: {name} after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            found += results(model, inputs, name, args.fits, baseline=baseline, seed=args.seed)
            plain |= {"seconds": time.perf_counter() - start, "results": [result.to_dict() for result in found]}
            save()
    finally:  # also what an interrupted run has measured
        if found:
            _show(plain, found)


def _show(plain: dict[str, Any], found: list[Result]) -> None:
    tokens = ", ".join(f"{name} {count}" for name, count in plain["tokens"].items())
    console.print(f"\n{plain['folder']}: {plain['class']}, {len(found[0].conversion.modules)} activations, float32")
    console.print(f"{plain['inputs']}; tokens: {tokens}; convert holds the second of four calibration blocks out")
    before = found[0].test
    if before.perplexity and before.loss_before is not None:
        console.print(f"perplexity of the source model: {math.exp(before.loss_before):.3f}")
    columns, rows = _table(found)
    table(f"{plain['seconds']:.0f} s in all", columns, rows)
    for note, names in _notes(found).items():
        console.print(f"{', '.join(names)}: {note}")


def _table(found: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: KL divergences, or for a model without classes the error of its output and its embeddings."""
    domains = list(found[0].others)
    if found[0].moved is None:
        quality = ["KL", "perplexity", "top-1", "gradient error"]
        others = [f"KL {name}" for name in domains]
    else:
        quality = ["output error", "1-cos", "worst", "gradient error"]
        others = [f"1-cos {name}" for name in domains]
    rows = []
    for result in found:
        one, test = result.conversion, result.test
        if result.moved is None:
            cells = [_small(test.kl), _perplexity(test), "-" if test.top1 is None else f"{test.top1:.2%}"]
            cells += [_small(test.gradient_error)]
            away = [_small(result.others[name].kl) for name in domains]
        else:
            cells = [test.output_error, result.moved.mean, result.moved.worst, test.gradient_error]
            cells = [_small(value) for value in cells]
            away = [_small(result.others_moved[name].mean) for name in domains]
        rows.append([one.activation, one.way, *cells, *away, _small(one.sup_error), f"{one.seconds:.1f}"])
    return ["activation", "fit", *quality, *others, "sup error", "s"], rows


def _notes(found: list[Result]) -> dict[str, list[str]]:
    """The conversions that each note is about."""
    notes: dict[str, list[str]] = {}
    for result in found:
        for note in result.conversion.notes:
            notes.setdefault(note, []).append(f"{result.conversion.activation} {result.conversion.way}")
    return notes


def _perplexity(test: Fidelity) -> str:
    if test.loss_before is None or test.loss_after is None:
        return "-"
    return change(1.0, math.exp(min(test.loss_after - test.loss_before, 700.0)))


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


if __name__ == "__main__":
    sys.exit(main())
