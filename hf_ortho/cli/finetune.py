"""``hf-ortho finetune``: fine-tune a checkpoint with Trainer, from a YAML file and flags that override it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import TrainingArguments

from ..hub import Results, write_card
from ..hub.card import hardware
from ..hub.push import find_or_create, push
from ..training.arguments import Recipe
from ..training.evaluation import change
from ..training.finetune import Result, finetune
from .console import console, show, table, trainer_log
from .launch import launch
from .recipe import parse_recipe

HELP = str(__doc__)


def results_of(result: Result, command: str, recipe: Recipe) -> Results | None:
    """The metrics for the screen and the card, also those before the training if there was a model before."""
    if result.after is None:
        return None
    dataset = recipe.data.eval_dataset or recipe.data.dataset
    caption = f"Evaluation split of {dataset}, by `hf-ortho {command}`, seed {recipe.training.seed}, on {hardware()}."
    after = {key: f"{value:.5f}" for key, value in result.after.items()}
    if result.before is None:
        return Results(["after training"], [[key, value] for key, value in after.items()], caption)
    rows = [
        [key, f"{before:.5f}", after[key], change(before, result.after[key])] for key, before in result.before.items()
    ]
    return Results(["before training", "after", "change"], rows, caption)


def _others(recipe: Recipe) -> dict[str, object]:
    """The hyperparameters of the card beside those of ``TrainingArguments``."""
    rate = recipe.optimizer_arguments().activation_learning_rate
    found: dict[str, object] = {"train": recipe.model.train, "dataset": recipe.data.dataset}
    found["activation_learning_rate"] = recipe.training.learning_rate if rate is None else rate
    changed = {**dataclasses.asdict(recipe.augmentation), "domain_penalty": recipe.optimizer.domain_penalty}
    return found | {key: value for key, value in changed.items() if value}


def _repository(arguments: TrainingArguments) -> str:
    """Where ``push_to_hub`` pushes to, as in Trainer."""
    return arguments.hub_model_id or Path(str(arguments.output_dir)).absolute().name


def run(argv: list[str], command: str = "finetune", description: str = HELP) -> int | None:
    if (code := launch(command, argv)) is not None:
        return code
    recipe = parse_recipe(Recipe, command, description, argv)
    arguments = recipe.training
    if arguments.push_to_hub and arguments.process_index == 0:  # rather than find out after the training
        find_or_create(_repository(arguments), private=arguments.hub_private_repo, token=arguments.hub_token)
    result = finetune(recipe, [trainer_log("Training")])
    if arguments.process_index != 0:
        return None
    if result.conversion is not None and recipe.model.init != "scratch":
        for part in result.conversion.tables():
            show(part)
        for line in result.conversion.summary():
            console.print(line)
    results = results_of(result, command, recipe)
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
        others=_others(recipe),
    )
    console.print(f"Wrote {folder} ({result.trainable:,} parameters were trained)")
    if arguments.push_to_hub:
        url = push(folder, _repository(arguments), revision=arguments.hub_revision, token=arguments.hub_token)
        console.print(f"Pushed {folder} to {url}")
    return None
