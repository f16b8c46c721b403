"""``hf-ortho compare``: run one recipe with several activations and seeds, and compare results, time and memory."""

from __future__ import annotations

import json
import logging
import os
import shlex
from glob import has_magic
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, NonFiniteError
from ..folders import OutputFolder
from ..tasks import LOSS, METRICS, NAMES, TASKS, Metric
from ..tasks.text_classification import OF_NUMBERS
from ..text import digits, markdown_table
from ..training.arguments import Comparison
from .console import console, table
from .launch import launch
from .main import LAUNCHED
from .progress import stage, telling_what_is_kept, trainer_log, training_size
from .recipe import parse_recipe

if TYPE_CHECKING:
    from ..profiling.timing import Times
    from ..training.compare import Run

logger = logging.getLogger("hf_ortho")

DESCRIPTION = "Run one recipe with several activations and seeds, and compare results, time per step and memory."


def run(argv: list[str]) -> int | None:
    if (code := launch("compare", argv)) is not None:
        return code
    comparison = parse_recipe(Comparison, "compare", DESCRIPTION, argv)
    grid, folder = comparison.compare, str(comparison.training.output_dir)
    if grid.timing_rounds < 0:
        raise ConfigError(f"timing_rounds {grid.timing_rounds}: must be at least 1, or 0 to skip timing")

    from ..hub import command_line
    from ..training.compare import kept

    line = os.environ.get(LAUNCHED) or command_line("compare", argv)
    with telling_what_is_kept(lambda: f"interrupted; {folder} keeps {kept(comparison)}; to continue: {line}"):
        _compare(comparison)
    return None


def _compare(comparison: Comparison) -> None:
    from ..training.compare import run_grid
    from ..training.step_times import measure_steps

    grid, folder = comparison.compare, str(comparison.training.output_dir)
    total = len(grid.activations) * len(grid.seeds)
    runs: list[Run] = []
    output: OutputFolder | None = None
    for done in run_grid(comparison, lambda name, seed: [training_size(), trainer_log(f"{name}, seed {seed}")]):
        runs.append(done)
        if comparison.training.process_index != 0 or not any(run.metrics for run in runs):
            continue
        output = output or OutputFolder(folder, beside=True)
        write(output, comparison, runs, {}, {})
    if not any(run.metrics for run in runs):
        raise NonFiniteError(f"all {total} runs diverged, the first at {runs[0].diverged}")
    times: dict[str, Times] = {}
    saved: dict[str, float] = {}
    if grid.timing_rounds:
        with stage(f"Timing {grid.timing_rounds} steps with each activation"):
            times, saved = measure_steps(comparison, grid.timing_rounds)
    if output is None:  # in all processes except the first
        return
    _, columns, rows = write(output, comparison, runs, times, saved)
    finished = [run for run in runs if run.metrics]
    metric = metric_of(finished)
    show(metric, _name(comparison.data.eval_dataset or comparison.data.dataset), columns, rows)
    console.print(f"Wrote {folder}: results.json, table.md, comparison.png, and a folder per run")
    best = (max if metric.greater_is_better else min)(finished, key=lambda run: run.metrics[metric.key])
    place = shlex.quote(str(Path(folder, best.activation, f"seed-{best.seed}")))
    console.print(f"Next, with the best run: hf-ortho push {place} YOU/NAME")


def show(metric: Metric, name: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print the rows of ``write`` as two tables of 80 columns: the results on the dataset ``name``, and the costs."""
    reference, end = rows[0][0], 4 + sum("perplexity" in column for column in columns)
    better = "higher" if metric.greater_is_better else "lower"
    title = f"{metric.name[0].upper()}{metric.name[1:]} on {name}, {better} is better"
    title += "; ±: standard deviation over seeds" if any("±" in cell for row in rows for cell in row) else ""
    title += f"\nminus {reference}: the difference from {reference} with the same seed"
    short = ["", "seeds", metric.name, f"minus {reference}", "perplexity"]
    table(title, short[:end], [row[:end] for row in rows])
    if columns[end:]:
        title = "Time of a step on one micro-batch, and memory kept from forward to backward"
        table(title, ["", f"time over {reference}", *columns[end + 1 :]], [[row[0], *row[end:]] for row in rows])


def metric_of(runs: list[Run]) -> Metric:
    """The metric of the table, which all runs have: the compared metric of their task, else its next one, or the loss.

    A regression, for example, has no accuracy.
    """
    finished = [run for run in runs if run.metrics]
    name = next((run.task for run in finished if run.task), "")
    keys = set.intersection(*(set(run.metrics) for run in finished))
    tasks = [NAMES[name]] if name in NAMES else [task for task in TASKS if {m.key for m in task.metrics} == keys]
    candidates = [metric for task in tasks for metric in (task.compared, *task.metrics) if metric.key in keys]
    return next((metric for metric in candidates if metric == tasks[0].compared or metric != LOSS), LOSS)


def _figure(mean: str, spread: float, seeds: int) -> str:
    return f"{mean} ± {spread:.4f}" if seeds > 1 else mean


def _name(dataset: str | None) -> str:
    """The name of a dataset, without local folders."""
    return Path(str(dataset)).name if Path(str(dataset)).exists() or has_magic(str(dataset)) else str(dataset)


def write(
    output: OutputFolder, comparison: Comparison, runs: list[Run], times: dict[str, Times], kept: dict[str, float]
) -> tuple[str, list[str], list[list[str]]]:
    """Write the results so far; returns the table: caption, columns, rows."""
    from ..hub import hardware
    from ..plotting.comparison import plot_comparison
    from ..training.compare import summarize

    diverged = [f"{run.activation}, seed {run.seed}" for run in runs if run.diverged]
    runs = [run for run in runs if not run.diverged]
    metric = metric_of(runs)
    title = f"evaluation {metric}"
    summaries = summarize(runs, metric.key)
    reference = summaries[0].activation
    columns = ["", "seeds", title, f"minus {reference}, same seed"]
    # of a language model, beside its loss
    perplexity = [METRICS[key] for key in runs[0].metrics if key.endswith("perplexity") and metric == LOSS]
    columns += [m.name for m in perplexity]
    columns += [f"time of a micro-batch, over {reference}", "ms"] if times else []
    columns += ["kept, MB"] if kept else []
    rows = []
    for s, *others in zip(summaries, *(summarize(runs, m.key) for m in perplexity), strict=True):
        row = [s.activation, str(s.seeds), _figure(f"{s.mean:.4f}", s.spread, s.seeds)]
        row.append(_figure(f"{s.difference:+.4f}", s.difference_spread, s.seeds))
        row += [f"{other.mean:.5g}" for other in others]
        if times:
            row += [f"{times[s.activation].ratio:.2f}", digits(1e3 * times[s.activation].median)]
        if kept:
            row.append(digits(kept[s.activation] / 1e6) if s.activation in kept else "-")
        rows.append(row)
    data = comparison.data
    seeds = " ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    steps = max(max([run.steps, *(step for step, _ in run.history)]) for run in runs)
    caption = (
        f"Trained on {_name(data.dataset)}{f' for {steps} steps' if steps else ''}, "
        f"evaluated on {_name(data.eval_dataset or data.dataset)}, seeds {seeds}, `hf-ortho compare`, {hardware()}"
    )
    if any(s.seeds > 1 for s in summaries):
        caption += "; ± is the standard deviation over seeds"
    if kept:
        caption += "; kept: memory that the forward pass of a micro-batch keeps for its backward pass"
    if diverged:
        caption += f"; diverged: {'; '.join(diverged)}"
    results = {
        "caption": caption,
        "metric": metric.key,
        "runs": [{"activation": run.activation, "seed": run.seed, **run.metrics} for run in runs],
        "seconds_per_step": {
            name: {"median": t.median, "ratio": t.ratio, "spread": t.spread} for name, t in times.items()
        },
        "kept_bytes": kept,
        "hardware": hardware(),
        "versions": {package: version(package) for package in ("hf_ortho", "torch", "transformers", "accelerate")},
    }
    by_name = {s.activation: [run for run in runs if run.activation == s.activation] for s in summaries}
    with output.writing() as draft:
        (draft / "table.md").write_text(f"{markdown_table(columns, rows)}\n\n{caption}\n")
        (draft / "results.json").write_text(json.dumps(results, indent=1))
        plot_comparison(
            {name: {run.seed: run.history for run in runs if run.history} for name, runs in by_name.items()},
            {name: {run.seed: run.metrics[metric.key] for run in runs} for name, runs in by_name.items()},
            title,
            caption,
            draft / "comparison.png",
            "mean squared error" if OF_NUMBERS[0].key in runs[0].metrics else LOSS.unit,
        )
    return caption, columns, rows
