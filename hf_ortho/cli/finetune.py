"""``hf-ortho finetune``: fine-tune a checkpoint with Trainer, from a YAML file and flags that override it."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from ..hub import Results, write_card
from ..hub.card import hardware
from ..training.arguments import Recipe
from ..training.evaluation import change
from ..training.finetune import Result, finetune
from .console import console, show, table
from .launch import launch
from .recipe import parse_recipe

HELP = __doc__


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


def run(argv: list[str]) -> int | None:
    if (code := launch("finetune", argv)) is not None:
        return code
    recipe = parse_recipe(Recipe, "finetune", HELP, argv)
    result, arguments = finetune(recipe), recipe.training
    if arguments.process_index != 0:
        return None
    if result.conversion is not None:
        for part in result.conversion.tables():
            show(part)
        for line in result.conversion.summary():
            console.print(line)
    results = results_of(result, arguments, recipe.data.eval_dataset or recipe.data.dataset)
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
