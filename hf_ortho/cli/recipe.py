"""Read a recipe from a YAML file and flags of the same names that override it."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from ..errors import ConfigError, HfOrthoError
from ..files import explain, why
from ..tasks import METRICS
from ..text import suggestion
from ..training.arguments import Recipe
from .console import Parser, dashed
from .launch import add_arguments
from .network import check_hub, hub_tokenizer
from .progress import announce_libraries

logger = logging.getLogger("hf_ortho")

R = TypeVar("R", bound=Recipe)
LAUNCH = ("accelerate_config", "num_processes")
# The fields of TrainingArguments that --help describes, without importing transformers.
TRAINING = {
    "output_dir": "Output folder.",
    "max_steps": "Number of optimizer steps. Default: that of num_train_epochs.",
    "num_train_epochs": "Number of passes over the training data. Default: 3.",
    "per_device_train_batch_size": "Training samples per step and device. Default: 8.",
    "learning_rate": "Peak learning rate. Default: 5e-05.",
    "resume_from_checkpoint": "auto: continue an interrupted training, if there is one.",
}
# The first options in the help of a command, followed by those of TRAINING.
FIRST = {
    "finetune": ("model", "dataset", "eval_dataset", "activation", "train"),
    "pretrain": ("model_type", "config_overrides", "tokenizer", "dataset", "eval_dataset", "activation"),
    "compare": ("model", "dataset", "eval_dataset", "activations", "seeds", "init"),
}
READ_FROM_HUB = ("--model", "--model-revision", "--tokenizer", "--dataset", "--eval-dataset")


def _parser(groups: dict[str, Any], command: str, description: str) -> Any:
    from transformers import HfArgumentParser

    class Fields(Parser, HfArgumentParser):  # type: ignore[misc]
        """The fields of dataclasses as flags."""

    epilog = None
    if "training" not in groups:
        epilog = f"All fields of TrainingArguments are also options; list them with hf-ortho {command} --help-all."
    first = f"{dashed('--' + FIRST[command][0])} {'TYPE' if command == 'pretrain' else 'MODEL'}"
    usage = f"hf-ortho {command} {first} --dataset DATA --output-dir DIR [...]"
    usage += f"\n       hf-ortho {command} --config YAML [--OPTION VALUE ...]"
    p = Fields(groups.values(), prog=f"hf-ortho {command}", usage=usage, description=description, epilog=epilog)
    p.add_argument("--help-all", action="help", help="Also list the fields of TrainingArguments.")
    p.add_argument("--config", metavar="YAML", help="YAML file with any of these options as keys, with underscores.")
    if "training" not in groups:
        for name, text in TRAINING.items():
            p.add_argument(f"--{name}", help=text)
    _list_first(p, (*FIRST[command], *TRAINING))
    for action in p._actions:  # underscores are still accepted
        action.option_strings = list(dict.fromkeys(map(dashed, action.option_strings)))
    return p


def _list_first(p: Any, names: Sequence[str]) -> None:
    """Move some options to a group of their own, the first one in the help. Long lists of choices become text."""
    actions = {action.dest: action for action in p._actions}
    for action in actions.values():
        if action.choices and len(action.choices) > 8:
            action.metavar, action.help = "NAME", f"{action.help} One of {', '.join(action.choices)}."
    first = [actions[name] for name in names]
    for group in p._action_groups:
        group._group_actions = [action for action in group._group_actions if action not in first]
    p.add_argument_group("most used")._group_actions = first
    p._action_groups.insert(0, p._action_groups.pop())


def parse_recipe(kind: type[R], command: str, description: str, argv: list[str]) -> R:
    """Parse a recipe of ``kind`` from the YAML file ``--config`` and from flags, which take precedence.

    Raises:
        ConfigError: unknown key or flag (the error suggests the closest one), or an invalid value.
    """
    if {"-h", "--help"} & set(argv):  # without importing the training code
        p = _parser(_groups(kind), command, description)
        add_arguments(p)
        p.parse_args(["--help"])

    config, entries, given = _first_look(argv)
    fields = [field.name for group in _groups(kind).values() for field in dataclasses.fields(group) if field.init]
    _check_keys(entries, argv, config, {*fields, *_training_fields()}, command)
    if "--help-all" not in argv:
        if entries.get("output_dir") is None and "output_dir" not in given:
            raise ConfigError("output_dir is missing; give --output-dir, or output_dir in the config")
        _check_places(entries | given)

    announce_libraries()
    import torch
    from transformers import TrainingArguments, get_scheduler
    from transformers.utils import is_torch_tf32_available

    groups = get_type_hints(kind, localns={"TrainingArguments": TrainingArguments})
    p = _parser(groups, command, description)
    p.set_defaults(hub_strategy="end")  # the files that Trainer pushes at each save include a pickle
    p.set_defaults(log_level_replica="error")  # in other processes than the first, transformers would print warnings
    known = {action.dest for action in p._actions} - {"help", "help_all", "config"}
    add_arguments(p)  # for --help-all: ``launch`` has already consumed them
    strategies = {action.dest for action in p._actions if action.choices and "no" in action.choices}
    from_file = []
    for key, value in entries.items():
        from_file += _flags(key, "no" if key in strategies and value is False else value)  # YAML reads ``no`` as false
    namespace, rest = p.parse_known_args([*from_file, *argv])
    _check_keys({}, rest, config, known, command)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}")
    values = {key: value for key, value in vars(namespace).items() if key in known}
    if values["report_to"] is None:
        values["report_to"] = "none"
    if values["tf32"] and not is_torch_tf32_available():  # otherwise TrainingArguments refuses it
        logger.warning("note: tf32: no GPU here supports it (Ampere and newer do), so float32 stays float32")
        values["tf32"] = None
    if not values["dataloader_num_workers"]:  # a flag may turn off the workers of a recipe, but not what needs them
        values["dataloader_prefetch_factor"], values["dataloader_persistent_workers"] = None, False
    metric = METRICS.get(str(values["metric_for_best_model"]).removeprefix("eval_"))
    # Trainer takes all but the loss as greater is better.
    if metric is not None and values["greater_is_better"] is None:
        values["greater_is_better"] = metric.greater_is_better
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            recipe = kind(*p.parse_dict(values))
        for warning in caught if recipe.training.process_index == 0 else ():  # such as a deprecated option
            logger.warning(f"note: {' '.join(str(warning.message).split())}")
        # Check the scheduler arguments now: Trainer only reads them after creating the output folder.
        get_scheduler(
            recipe.training.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.training.learning_rate),
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=cast(dict, recipe.training.lr_scheduler_kwargs or {}),
        )
    except HfOrthoError:
        raise
    except (ValueError, TypeError, ImportError, OSError, KeyError) as error:
        raise ConfigError(f"training arguments: {explain(error)}") from error
    return recipe


def _check_places(values: dict[str, Any]) -> None:
    """``check_hub`` for the model, tokenizer and datasets of a recipe."""
    place = {key: str(value) for key, value in values.items() if value}
    models = (place.get("model"), place.get("model_revision")), hub_tokenizer(place.get("tokenizer"))
    check_hub(models, [place.get("dataset"), place.get("eval_dataset")])


def _first_look(argv: list[str]) -> tuple[str, dict[str, Any], dict[str, str]]:
    """The YAML file, its entries, and the flags that are checked first."""
    flags = Parser(add_help=False)
    for name in ("--config", "--output-dir", *READ_FROM_HUB):
        flags.add_argument(name, nargs="?")
    given = {key: value for key, value in vars(flags.parse_known_args(argv)[0]).items() if value}
    config = given.pop("config", "")
    return config, _read(config) if config else {}, given


def _groups(kind: type[Recipe]) -> dict[str, Any]:
    """The dataclasses of a recipe except ``TrainingArguments``."""
    groups = get_type_hints(kind, localns={"TrainingArguments": None})
    del groups["training"]
    return groups


def _training_fields() -> set[str]:
    """The field names of ``TrainingArguments``, parsed from its source: importing it takes longer than torch."""
    package = importlib.util.find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    tree = ast.parse(Path(package.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    (definition,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return {
        node.target.id
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _check_keys(entries: dict[str, Any], argv: list[str], config: str, known: set[str], command: str) -> None:
    """Raise ConfigError for the first key or flag that is not in ``known``, with the closest one."""
    for key in entries:
        if key in LAUNCH:
            raise ConfigError(
                f"{key} in {config} is only available as a flag; give --{key.replace('_', '-')} on the command line"
            )
        if key not in known:
            raise ConfigError(f"unknown key {str(key)!r} in {config}{suggestion(str(key), known)}")
    flags = known | {"config", "help", "help_all", *LAUNCH}
    for flag in (arg.split("=")[0] for arg in argv if arg.startswith("--")):
        if flag != "--" and flag[2:].replace("-", "_").removeprefix("no_") not in flags:
            hint = suggestion(dashed(flag), [f"--{name.replace('_', '-')}" for name in flags])
            raise ConfigError(f"unknown flag {dashed(flag)}{hint} (see hf-ortho {command} --help)")


def _read(path: str) -> dict[str, Any]:
    """The entries of a YAML file."""
    import yaml

    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {why(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an invalid date is a ValueError
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"config {path} must contain `key: value` lines")
    return entries


def _flags(key: str, value: Any) -> list[str]:
    """Convert an entry to flags, which are then parsed like the command line."""
    if value is None:
        return []
    if isinstance(value, dict) or key == "param_groups":  # YAML text on the command line
        return [f"--{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"]
    if isinstance(value, list):
        return [f"--{key}", *(str(v) for v in value)]
    return [f"--{key}={value}"]
