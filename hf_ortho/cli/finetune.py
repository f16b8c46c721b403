"""``hf-ortho finetune``: fine-tune a checkpoint with Trainer, from a YAML file and flags that override it."""

from __future__ import annotations

from pathlib import Path

from ..hub import Results, write_card
from ..hub.card import hardware
from ..training.arguments import Recipe
from ..training.evaluation import change
from ..training.finetune import Result, finetune
from .console import console, show, table
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


def run(argv: list[str], command: str = "finetune", description: str = HELP) -> int | None:
    if (code := launch(command, argv)) is not None:
        return code
    recipe = parse_recipe(Recipe, command, description, argv)
    result, arguments = finetune(recipe), recipe.training
    if arguments.process_index != 0:
        return None
    if result.conversion is not None:
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
    )
    console.print(f"Wrote {folder} ({result.trainable:,} parameters were trained)")
    return None
