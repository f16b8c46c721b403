"""``hf-ortho finetune``: fine-tune a checkpoint with Trainer, from a YAML file and flags that override it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, get_scheduler

from ..errors import ConfigError
from ..hub import Results, write_card
from ..hub.card import hardware
from ..training.arguments import DataArguments, ModelArguments
from ..training.finetune import Result, change, finetune
from .console import console, show, table

HELP = __doc__


class _Parser(HfArgumentParser):
    def error(self, message):
        raise ConfigError(f"{message} (see hf-ortho finetune --help)")


def parser() -> HfArgumentParser:
    groups: Any = (ModelArguments, DataArguments, TrainingArguments)
    p = _Parser(groups, prog="hf-ortho finetune", description=HELP, allow_abbrev=False)
    p.add_argument("--config", help="YAML file with any of these options as keys")
    return p


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Arguments from the YAML file named by ``--config`` and from flags, which win.

    Raises:
        ConfigError: an unknown key or flag (the closest valid one is named), or a value that does not fit.
    """
    p = parser()
    known = {action.dest for action in p._actions} - {"help", "config"}
    config = p.parse_known_args(argv)[0].config
    from_file = _read(config, known) if config else []
    namespace, rest = p.parse_known_args([*from_file, *argv])
    for flag in rest:
        if flag.startswith("--"):
            raise _unknown(flag.split("=")[0].lstrip("-").replace("-", "_"), "on the command line", known)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}")
    del namespace.config
    values = vars(namespace)
    if values["output_dir"] is None:
        raise ConfigError("output_dir is missing: give --output_dir, or output_dir in the config")
    if values["report_to"] is None:
        values["report_to"] = "none"
    try:
        model, dataset, training = cast(Any, p.parse_dict(values))
        # Its own arguments are otherwise first read when the training starts, with the output folder made.
        get_scheduler(
            training.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate),
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError, ImportError, OSError, KeyError) as error:
        raise ConfigError(f"training arguments: {str(error).splitlines()[0]}") from error
    return model, dataset, training


def _read(path: str, known: set[str]) -> list[str]:
    """The file's entries as flags, so that both are checked and converted alike."""
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"config {path} must hold `key: value` lines")
    argv = []
    for key, value in entries.items():
        if key not in known:
            raise _unknown(str(key), f"in {path}", known)
        if value is None:
            continue
        if isinstance(value, list):
            argv += [f"--{key}", *(str(v) for v in value)]
        else:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def _unknown(key: str, where: str, known: set[str]) -> ConfigError:
    closest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    return ConfigError(f"unknown key {key!r} {where}; the closest valid key is {closest!r}")


def results_of(result: Result, arguments: TrainingArguments, dataset: str | None) -> Results | None:
    """Metrics before and after the training, for the screen and the card."""
    if result.before is None or result.after is None:
        return None
    rows = [
        [key, f"{before:.5f}", f"{result.after[key]:.5f}", change(before, result.after[key])]
        for key, before in result.before.items()
    ]
    caption = f"Evaluation split of {dataset}, by `hf-ortho finetune`, seed {arguments.seed}, on {hardware()}."
    return Results(["before training", "after", "change"], rows, caption)


def run(argv: list[str]) -> None:
    model_arguments, data_arguments, arguments = parse_arguments(argv)
    result = finetune(model_arguments, data_arguments, arguments)
    if arguments.process_index != 0:
        return
    if result.conversion is not None:
        for part in result.conversion.tables():
            show(part)
        for line in result.conversion.summary():
            console.print(line)
    results = results_of(result, arguments, data_arguments.eval_dataset or data_arguments.dataset)
    if results is not None:
        table(results.caption, ["", *results.columns], results.rows)
    folder = Path(str(arguments.output_dir))
    if result.conversion is not None:
        result.conversion.save(folder)
    write_card(
        folder,
        result.checkpoint.model,
        result.checkpoint.task,
        place=str(folder),
        report=result.conversion,
        results=results,
        arguments=arguments,
    )
    console.print(f"Wrote {folder} ({result.trainable:,} parameters were trained)")
