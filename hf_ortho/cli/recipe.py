"""Read a recipe: a YAML file, and flags of the same names that override it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TypeVar, cast, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, get_scheduler

from ..errors import ConfigError
from ..training.arguments import Recipe
from .launch import add_arguments

R = TypeVar("R", bound=Recipe)


class _Parser(HfArgumentParser):
    def error(self, message):
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parse_recipe(kind: type[R], command: str, description: str, argv: list[str]) -> R:
    """A recipe of ``kind`` from the YAML file named by ``--config`` and from flags, which win.

    Raises:
        ConfigError: an unknown key or flag (the closest valid one is named), or a value that does not fit.
    """
    groups = get_type_hints(kind)
    p = _Parser(tuple(groups.values()), prog=f"hf-ortho {command}", description=description, allow_abbrev=False)
    p.add_argument("--config", help="YAML file with any of these options as keys")
    p.set_defaults(hub_strategy="end")  # what Trainer pushes at each save contains a pickle
    known = {action.dest for action in p._actions} - {"help", "config"}
    add_arguments(p)  # for --help: ``launch`` has taken them
    config = p.parse_known_args(argv)[0].config
    from_file = _read(config, known) if config else []
    namespace, rest = p.parse_known_args([*from_file, *argv])
    for flag in rest:
        if flag.startswith("--"):
            raise _unknown(flag.split("=")[0].lstrip("-").replace("-", "_"), "on the command line", known)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}")
    values = {key: value for key, value in vars(namespace).items() if key in known}
    if values["output_dir"] is None:
        raise ConfigError("output_dir is missing: give --output_dir, or output_dir in the config")
    if values["report_to"] is None:
        values["report_to"] = "none"
    try:
        recipe = kind(*p.parse_dict(values))
        # Its own arguments are otherwise first read when the training starts, with the output folder made.
        get_scheduler(
            recipe.training.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.training.learning_rate),
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=cast(dict, recipe.training.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError, ImportError, OSError, KeyError) as error:
        raise ConfigError(f"training arguments: {str(error).splitlines()[0]}") from error
    return recipe


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
