"""``hf-ortho plot``: plot the activations of one or two converted checkpoints, or over a training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, ConfigError
from ..files import check_file
from ..text import one_line, some
from .console import Parser, add_calibration_flags, add_model_flags, calibration_options, console
from .network import check_hub, hub_tokenizer
from .progress import announce_libraries, stage

if TYPE_CHECKING:
    from ..activations import LearnableActivation
    from ..checkpoints.activations import StoredActivations
    from ..conversion import Histogram

MAX_MOMENTS = 32  # more curves of a history are indistinguishable


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho plot",
        description="Plot the activations of one or two converted models, or over a training. "
        "Example: hf-ortho plot gpt2-h8 -o gpt2.png",
    )
    p.add_argument("model", nargs="?", help="Folder or Hub model; optional with --history.")
    p.add_argument("-o", "--output", default="activations.png", help="Output file: PNG, or GIF with --history.")
    p.add_argument("--revision", help="Branch, tag or commit of the Hub model.")
    p.add_argument("--against", metavar="OTHER", help="Second converted model, drawn over the first.")
    p.add_argument("--against-revision", help="Branch, tag or commit of the second model.")
    p.add_argument(
        "--history",
        metavar="RUN_DIR",
        help="Plot a training: its recorded steps (or its checkpoints), followed by MODEL.",
    )
    add_calibration_flags(p, "Also plot the distribution of pre-activations on this data.")
    add_model_flags(p)
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.against_revision and not args.against:
        raise ConfigError(f"--against-revision {args.against_revision} requires --against")
    if args.tokenizer and not args.calibration_data:
        raise ConfigError(f"--tokenizer {args.tokenizer} requires --calibration-data")
    suffix = Path(args.output).suffix
    if suffix not in (".png", ".gif") or (suffix == ".gif" and not args.history):
        raise ConfigError(f"--output {args.output}: must end in .png, or in .gif with --history")
    calibration_options(args)
    check_file(args.output)
    models = (args.model, args.revision), (args.against, args.against_revision), hub_tokenizer(args.tokenizer)
    check_hub(models, [args.calibration_data])
    announce_libraries()
    if args.history:
        for flag, value in (("--against", args.against), ("--calibration-data", args.calibration_data)):
            if value:
                raise ConfigError(f"--history cannot be combined with {flag}")
        _history(args)
    elif args.model:
        _shapes(args)
    else:
        raise ConfigError("MODEL is missing; give a converted folder or Hub model, or a training with --history")
    console.print(f"Wrote {args.output}")


def _shapes(args) -> None:
    from ..checkpoints.activations import load_activations
    from ..plotting import plot_stored

    histograms: dict[str, Histogram] = {}
    if args.calibration_data:
        stored, histograms = _observed(args)
    else:
        stored = load_activations(args.model, revision=args.revision)
    modules = stored.modules
    others: dict[str, LearnableActivation] = {}
    if args.against:
        others = load_activations(args.against, revision=args.against_revision).modules
        modules = {path: module for path, module in modules.items() if path in others}
        if not modules:
            raise ConfigError(
                f"{args.model} and {args.against} have no activations in common: the first has "
                f"{next(iter(stored.modules))} ..., the second {next(iter(others))} ..."
            )
        _name_the_rest({args.model: stored.modules, args.against: others}, modules)
    stored = dataclasses.replace(stored, modules=modules)
    with console.status("Drawing"):
        plot_stored(
            stored, args.output, args.model, histograms=histograms, others=others, other=f"against {args.against}"
        )


def _observed(args) -> tuple[StoredActivations, dict[str, Histogram]]:
    """The activations of the whole model, and the histograms of their pre-activations."""
    from ..activations import LearnableActivation
    from ..checkpoints.activations import StoredActivations
    from ..checkpoints.load import load_checkpoint
    from ..checkpoints.provenance import Provenance
    from ..conversion import collect
    from ..tasks.tokenizer import use_tokenizer
    from ..training.calibration import calibration_batches

    console.print(f"Loading {args.model}")
    checkpoint = load_checkpoint(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    use_tokenizer(checkpoint, args.tokenizer, trust_remote_code=args.trust_remote_code)
    modules = {n: m for n, m in checkpoint.model.named_modules() if isinstance(m, LearnableActivation)}
    if not modules:
        raise ConfigError(f"{args.model} has no learnable activations; convert it first with hf-ortho convert")
    batches, _ = calibration_batches(checkpoint, args.calibration_data, **calibration_options(args))
    stored = StoredActivations(modules, Provenance.of(checkpoint.model.config), checkpoint.commit)
    with stage(f"Running the model on {args.calibration_data}"):
        return stored, collect(checkpoint.model, modules, batches, weights="density")


def _history(args) -> None:
    from ..checkpoints.activations import load_activations
    from ..path_patterns import thin
    from ..plotting import Snapshot, animate_history, plot_history
    from ..training.checkpoints import step_of
    from ..training.history import read_step, recorded_steps

    recorded = recorded_steps(args.history)
    if recorded:
        places = [recorded[i] for i in thin(len(recorded), MAX_MOMENTS)]
        snapshots = [Snapshot(read_step(file)[0], step) for step, file in places]
    else:
        places = [(step_of(folder), folder) for folder in _checkpoints(args.history)]
        snapshots = [Snapshot(load_activations(str(folder)).modules, step) for step, folder in places]
    if args.model:
        snapshots.append(Snapshot(load_activations(args.model, revision=args.revision).modules, name=args.model))
    if len(snapshots) < 2:
        raise ConfigError(
            f"--history {args.history} has only {places[0][1].name}, but two steps are needed; give the final MODEL "
            "as well, or train with smaller save_steps or log_activations"
        )
    if len(places) < len(recorded):
        console.print(f"note: {len(places)} of {len(recorded)} recorded steps are drawn, evenly spaced")
    common = {path: m for path, m in snapshots[0].modules.items() if all(path in s.modules for s in snapshots)}
    if not common:
        raise ConfigError(f"the checkpoints of {args.history} have no activations in common with each other and MODEL")
    _name_the_rest({snapshot.label: dict(snapshot.modules) for snapshot in snapshots}, common)
    snapshots = [Snapshot({path: s.modules[path] for path in common}, s.step, s.name) for s in snapshots]
    draw = animate_history if args.output.endswith(".gif") else plot_history
    with stage(f"Drawing {len(snapshots)} moments of {args.history}"):
        draw(snapshots, args.output, f"{args.history}: {', '.join(_activations(common))}")


def _checkpoints(folder: str) -> list[Path]:
    from ..training.checkpoints import checkpoints

    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"--history {folder}: the folder does not exist; give the output_dir of a training")
    folders = checkpoints(path)
    if not folders:
        raise CheckpointError(
            f"--history {folder}: no checkpoint-STEP folders and no recorded activations; give the output_dir of a "
            "training with save_strategy steps or epoch, or with log_activations"
        )
    return folders


def _activations(modules: dict[str, LearnableActivation]) -> list[str]:
    return sorted({module.name for module in modules.values()})


def _name_the_rest(all_of: dict[str, dict[str, LearnableActivation]], common: dict[str, LearnableActivation]) -> None:
    """Print the activations that are not drawn in one line."""
    rest = [
        f"{some([path for path in modules if path not in common])} only in {name}"
        for name, modules in all_of.items()
        if set(modules) - set(common)
    ]
    if rest:
        console.print(f"note: not drawn: {one_line('; '.join(rest))}")
