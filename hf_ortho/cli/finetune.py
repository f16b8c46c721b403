"""``hf-ortho finetune``: fine-tune a checkpoint with Trainer, configured by a YAML file and overriding flags."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..tasks import LOSS
from ..text import change
from ..training.arguments import Recipe
from .console import console, show_report, table
from .launch import launch
from .main import LAUNCHED
from .progress import telling_what_is_kept, trainer_log, training_size
from .recipe import parse_recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..hub import DataSource, Results
    from ..tasks import Task
    from ..training.finetune import Result

DESCRIPTION = (
    "Train a model on your data with Trainer. Options are flags or keys of a YAML file; flags take precedence."
)


def results_of(result: Result, command: str, recipe: Recipe) -> Results | None:
    """The metrics for the console and the card, including the metrics before training, if any."""
    from ..checkpoints.provenance import Provenance
    from ..hub import DataSource, Results, hardware
    from ..tasks.data import commit_of, resolved

    if result.after is None:
        return None
    after = {"fine-tuned" if result.before else "after training": result.after}
    before = "converted" if Provenance.of(result.checkpoint.model.config).activation else "before training"
    values = {before: result.before, **after} if result.before else after
    data, same = recipe.data, recipe.data.eval_dataset is None
    name = str(data.dataset if same else data.eval_dataset)
    revision = resolved(data.dataset_revision) if same else commit_of(name)
    config = data.dataset_config if same else None
    source = DataSource.of(result.held_back, name, config=config, revision=revision)
    note = "held out from training" if same and source.split == _train(result, recipe).split else ""
    return Results(values, source, command, hardware(), recipe.training.seed, note, "training")


def show_results(results: Results, task: Task) -> None:
    """Print the change of the metric that matters most, and the table of all metrics."""
    stages, data = list(results.values.items()), results.data
    metrics = [each for each in (task.compared, *task.metrics) if each != LOSS and each.key in stages[-1][1]]
    metric = metrics[0] if metrics else LOSS
    figures = [value for _, values in stages if (value := values.get(metric.key)) is not None]
    relative = change(figures[0], figures[-1]) if len(figures) > 1 else "-"
    more = "" if relative == "-" else f" ({relative})"
    console.print(f"{metric.name[0].upper()}{metric.name[1:]}: {' -> '.join(f'{v:.5g}' for v in figures)}{more}")
    where = f"{data.name}, split {data.split}" if data.split and not results.note else data.name
    when = "Before and after" if len(stages) > 1 else "After"
    title = f"{when} training, on {where}, {data.samples} samples {results.note}".rstrip()
    table(title, ["", *results.columns], results.rows)


def _train(result: Result, recipe: Recipe) -> DataSource:
    """The training data."""
    from ..hub import DataSource
    from ..tasks.data import resolved

    data = recipe.data
    options = {"config": data.dataset_config, "revision": resolved(data.dataset_revision)}
    return DataSource.of(result.train, str(data.dataset), **options, split=data.train_split)


def _others(recipe: Recipe) -> dict[str, object]:
    """The hyperparameters of the card that are not in ``TrainingArguments``."""
    rate = recipe.optimizer_arguments().activation_learning_rate
    others: dict[str, object] = {"train": recipe.model.train}
    others["activation_learning_rate"] = recipe.training.learning_rate if rate is None else rate
    changed = {**dataclasses.asdict(recipe.augmentation), "domain_penalty": recipe.optimizer.domain_penalty}
    changed["param_groups"] = json.dumps(recipe.optimizer.param_groups) if recipe.optimizer.param_groups else None
    return others | {key: value for key, value in changed.items() if value}


def _repository(arguments: TrainingArguments) -> str:
    """The repository that ``push_to_hub`` pushes to, as in Trainer."""
    return arguments.hub_model_id or Path(str(arguments.output_dir)).absolute().name


def _draw(folder: Path, name: str) -> None:
    """Plot the trained activations of the model ``name``, if any, as ``activations.png``."""
    from ..checkpoints.activations import load_activations
    from ..hub.card import PICTURE
    from ..plotting import plot_stored

    try:
        stored = load_activations(str(folder))
    except ConfigError:  # no learnable activations
        return
    plot_stored(stored, folder / PICTURE, name)


def run(
    argv: list[str], command: str = "finetune", description: str = DESCRIPTION, fixed: Sequence[str] = ()
) -> int | None:
    """Run a training with the flags ``argv``, and the flags ``fixed`` that the command adds."""
    if (code := launch(command, argv)) is not None:
        return code
    recipe = parse_recipe(Recipe, command, description, [*argv, *fixed])

    from ..hub import TrainingDetails, command_line, write_card
    from ..hub.push import find_or_create, push
    from ..hub.record import carry_over
    from ..tasks import of
    from ..training.checkpoints import checkpoints
    from ..training.finetune import finetune, output_folder
    from ..training.manifest import is_whole

    arguments = recipe.training
    if arguments.push_to_hub and arguments.process_index == 0:  # fail now rather than after training
        output_folder(recipe)
        find_or_create(_repository(arguments), private=arguments.hub_private_repo, token=arguments.hub_token)
    folder = Path(str(arguments.output_dir))
    line = os.environ.get(LAUNCHED) or command_line(command, argv)
    base = None if recipe.model.init == "scratch" else recipe.model.model

    def finish(draft: Path, result: Result) -> None:
        """Print the results, plot the activations, and write the card."""
        if result.conversion is not None and base:
            show_report(result.conversion)
        results = results_of(result, line, recipe)
        if results is not None:
            show_results(results, of(result.checkpoint.model))
        if result.conversion is None and base:
            carry_over(base, result.checkpoint.commit, draft)
        _draw(draft, folder.absolute().name)
        write_card(
            draft,
            place=str(folder),
            report=result.conversion,
            results=[results] if results else [],
            data=[_train(result, recipe)],
            command=line,
            training=TrainingDetails(arguments, _others(recipe), base, result.checkpoint.commit if base else None),
        )

    def kept() -> str:
        whole = [checkpoint.name for checkpoint in checkpoints(folder) if is_whole(checkpoint)]
        again = f"{line} --resume-from-checkpoint auto"
        if not whole:
            return f"interrupted before the first checkpoint; to start again: {again}"
        return f"interrupted; {folder} keeps {whole[-1]}; to continue: {again}"

    with telling_what_is_kept(kept):
        result = finetune(recipe, [training_size(), trainer_log("Training")], finish)
    if arguments.process_index != 0:
        return None
    console.print(f"Wrote {folder} ({result.trainable:,} trained parameters)")
    if arguments.push_to_hub:
        console.print(f"Pushing {folder}")
        url = push(folder, _repository(arguments), revision=arguments.hub_revision, token=arguments.hub_token)
        console.print(f"Pushed {folder} to {url}")
    else:
        place, name = shlex.quote(str(folder)), shlex.quote(folder.absolute().name)
        console.print(f"Evaluate: hf-ortho evaluate {place} --dataset DATA")
        console.print(f"Push:     hf-ortho push {place} YOU/{name}")
    return None
