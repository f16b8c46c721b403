"""Compare activations: a resumable grid of the same training over activations and seeds."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback
from transformers.activations import ACT2FN

from ..activations import LearnableActivation
from ..activations.registry import check_name
from ..errors import ConfigError, HfOrthoError, NonFiniteError
from ..files import written
from ..folders import OutputFolder
from ..profiling.memory import kept_bytes, measure_each
from ..profiling.timing import Times, interleave
from .arguments import Comparison, LoggingArguments, Recipe
from .assemble import assemble, build_trainer
from .checkpoints import remove_leftovers, whole_checkpoints
from .distributed import main_decides
from .finetune import finetune, output_folder
from .trainer import ActivationTrainer

T = TypeVar("T")
# Fields that may differ between runs of the grid, or that do not affect the results.
FREE = {"activation", "seed", "output_dir", "resume_from_checkpoint", "activations", "seeds", "timing_rounds"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished training.

    Attributes:
        metrics: metrics of the task after the training, by key.
        history: (step, mean training loss since the previous step) pairs.
        diverged: reason if the training diverged, in which case there are no metrics and no history; empty otherwise.
    """

    activation: str
    seed: int
    metrics: dict[str, float]
    history: list[tuple[int, float]]
    diverged: str = ""

    @classmethod
    def load(cls, file: Path) -> Run:
        def build(plain: dict) -> Run:
            run = cls(**plain)
            metrics = {key: float(value) for key, value in run.metrics.items()}
            if not run.diverged:
                metrics["loss"]  # every finished run has it
            history = [(step, float(loss)) for step, loss in run.history]
            return dataclasses.replace(run, metrics=metrics, history=history)

        return _read(file, build)


def run_grid(comparison: Comparison, callback: Callable[[str, int], TrainerCallback] | None = None) -> Iterator[Run]:
    """Run every activation with every seed, seed by seed. Finished runs are read and interrupted runs resume.

    ``callback`` creates a Trainer callback for an activation and a seed.

    Raises:
        HfOrthoError: an argument is invalid, or the folder contains runs of another recipe.
    """
    grid = comparison.compare
    for name in grid.activations:
        check_name(name)
    for key in ("activations", "seeds"):
        values = getattr(grid, key)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{key} {values}: give at least one, without duplicates")
    main_decides(comparison.training, lambda: output_folder(comparison))
    folder = Path(str(comparison.training.output_dir))
    with PartialState().main_process_first():
        _claim(comparison, folder)
    for seed in grid.seeds:
        for name in grid.activations:
            try:
                callbacks = [] if callback is None else [callback(name, seed)]
                run = _run(comparison, name, seed, folder / name / f"seed-{seed}", callbacks)
            except HfOrthoError:
                if not any(folder.glob("*/*/*")):  # nothing has run yet, so another recipe may use the folder
                    (folder / "recipe.json").unlink(missing_ok=True)
                raise
            yield run


def _run(comparison: Comparison, activation: str, seed: int, folder: Path, callbacks: Sequence[TrainerCallback]) -> Run:
    file = folder / "run.json"
    if file.is_file():
        return Run.load(file)
    recipe = _member(comparison, activation, seed, folder)
    if not whole_checkpoints(folder):
        main_decides(recipe.training, lambda: _empty(folder))
    recipe.training.resume_from_checkpoint = "auto"
    try:
        result = finetune(recipe, callbacks)
    except NonFiniteError as error:
        run = Run(activation, seed, {}, [], str(error))
    else:
        if result.after is None:
            raise ConfigError("a comparison needs evaluation data; give eval_dataset or eval_split")
        history = [(entry["step"], entry["loss"]) for entry in result.history if "loss" in entry]
        run = Run(activation, seed, result.after, history)
    _write(file, json.dumps(dataclasses.asdict(run)))
    return run


def _empty(folder: Path) -> None:
    """Remove the files of an interrupted run, and no others."""
    if folder.is_dir():
        remove_leftovers(folder)
        with OutputFolder(folder, beside=True).writing():
            pass


def _member(comparison: Comparison, activation: str, seed: int, folder: Path) -> Recipe:
    groups = {field.name: copy.copy(getattr(comparison, field.name)) for field in dataclasses.fields(Recipe)}
    recipe = Recipe(**groups)
    recipe.model.activation = activation
    recipe.training.seed = seed
    recipe.training.output_dir = str(folder)
    if not isinstance(ACT2FN[activation], LearnableActivation):  # these options need learnable activations
        recipe.optimizer = dataclasses.replace(recipe.optimizer, domain_penalty=0.0)
        recipe.logging = LoggingArguments()
    return recipe


def _claim(comparison: Comparison, folder: Path) -> None:
    """Save the recipe in the folder, or check that it equals the saved recipe."""
    groups = (dataclasses.asdict(getattr(comparison, field.name)) for field in dataclasses.fields(Recipe))
    recipe = {key: _plain(value) for group in groups for key, value in group.items() if key not in FREE}
    file = folder / "recipe.json"
    if file.is_file():
        saved = _read(file, lambda plain: {**plain})
        for key in recipe.keys() | saved.keys():
            if recipe.get(key) != saved.get(key):
                raise ConfigError(
                    f"output_dir {folder} contains runs with {key} {saved.get(key)!r}, but {key} is now "
                    f"{recipe.get(key)!r}; use another folder"
                )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"output_dir {folder} exists and does not contain a comparison; use another")
    _write(file, json.dumps(recipe, indent=1))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _read(file: Path, build: Callable[[Any], T]) -> T:
    try:
        return build(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} was not written by hf-ortho compare; move it away") from error


def _write(file: Path, text: str) -> None:
    if PartialState().is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written(file) as draft:
            draft.write_text(text)


# ---- summary -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of one activation over its finished seeds.

    Attributes:
        mean, spread: mean and standard deviation of the metric (0 for one seed).
        difference, difference_spread: mean and standard deviation of the metric minus the metric of the first
            activation with the same seed.
    """

    activation: str
    seeds: int
    mean: float
    spread: float
    difference: float
    difference_spread: float


def summarize(runs: list[Run], metric: str) -> list[Summary]:
    """One summary per activation, in the order of the runs. The first activation is the reference."""
    by_activation: dict[str, dict[int, float]] = {}
    for run in runs:
        if not run.diverged:
            by_activation.setdefault(run.activation, {})[run.seed] = run.metrics[metric]
    reference = next(iter(by_activation.values()))
    rows = []
    for name, values in by_activation.items():
        differences = [value - reference[seed] for seed, value in values.items() if seed in reference]
        rows.append(Summary(name, len(values), *_mean(list(values.values())), *_mean(differences or [math.nan])))
    return rows


def _mean(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# ---- time and memory -----------------------------------------------------------------------------------------------


def measure_steps(comparison: Comparison, rounds: int) -> tuple[dict[str, Times], dict[str, float]]:
    """Time an optimizer step on one micro-batch with each activation, and count the bytes saved by its forward pass.

    The steps are interleaved in one process, so other load on the machine slows all of them alike. The first
    activation is the reference of the ratios.
    """
    arguments, steps, forwards = comparison.training, {}, {}
    for name in comparison.compare.activations:
        recipe = _member(comparison, name, comparison.compare.seeds[0], Path(str(arguments.output_dir)))
        checkpoint, train, _, _ = assemble(recipe)
        trainer, _ = build_trainer(recipe, checkpoint, train, None)
        steps[name], forwards[name] = _step(trainer)
    device = arguments.device.type
    return interleave(steps, rounds=rounds, device=device), measure_each(kept_bytes, forwards, device)


def _step(trainer: ActivationTrainer) -> tuple[Callable[[], None], Callable[[], object]]:
    """An optimizer step on one micro-batch, and its forward pass."""
    batch = next(iter(trainer.get_train_dataloader()))
    model, optimizer = trainer.accelerator.prepare(cast(nn.Module, trainer.model).train(), trainer.create_optimizer())
    trainer.current_gradient_accumulation_steps = 1
    limit = trainer.args.max_grad_norm

    def step() -> None:
        trainer.training_step(model, dict(batch))
        if limit:
            trainer.accelerator.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> object:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))

    return step, forward
