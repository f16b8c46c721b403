"""Compare activations: a resumable grid of the same training over activations and seeds."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments

from ..activations.registry import check_name, is_learnable
from ..errors import ConfigError, HfOrthoError, NonFiniteError
from ..files import written
from ..folders import OutputFolder
from ..tasks import of
from ..text import duration
from .arguments import Comparison, LoggingArguments, Recipe
from .checkpoints import checkpoints, remove_leftovers, whole_checkpoints
from .distributed import main_decides
from .finetune import finetune, output_folder
from .manifest import is_whole
from .policies import LEARNABLE

logger = logging.getLogger("hf_ortho")

T = TypeVar("T")
RUN = "run.json"  # the results of a finished run, in its folder
SEED = TrainingArguments.seed  # its default
# Fields that may differ between runs of the grid, or that do not affect the results.
FREE = {"activation", "seed", "output_dir", "resume_from_checkpoint", "activations", "seeds", "timing_rounds"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished training.

    Attributes:
        metrics: metrics of the task after the training, by key.
        history: (step, mean training loss since the previous step) pairs.
        diverged: reason if the training diverged, in which case there are no metrics and no history; empty otherwise.
        task, steps: name of the task, and number of steps; empty and 0 if it diverged, or of an earlier version.
    """

    activation: str
    seed: int
    metrics: dict[str, float]
    history: list[tuple[int, float]]
    diverged: str = ""
    task: str = ""
    steps: int = 0

    def __str__(self) -> str:
        return (
            f"diverged: {self.diverged}"
            if self.diverged
            else ", ".join(f"{key} {value:.5f}" for key, value in self.metrics.items())
        )

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


@dataclasses.dataclass
class Member(Recipe):
    """The recipe of one run. ``param_groups`` may name parameters that only ``others`` of the comparison have."""

    others: tuple[str, ...] = ()


def run_grid(
    comparison: Comparison, callbacks: Callable[[str, int], Sequence[TrainerCallback]] = lambda name, seed: ()
) -> Iterator[Run]:
    """Run every activation with every seed, seed by seed. Finished runs are read and interrupted runs resume.

    The progress is logged at level INFO. ``callbacks`` creates callbacks of Trainer for an activation and a seed.

    Raises:
        HfOrthoError: an argument is invalid, or the folder contains runs of another recipe.
    """
    grid = comparison.compare
    for name in grid.activations:
        check_name(name)
    single = {"activations": (comparison.model.activation, None), "seeds": (comparison.training.seed, SEED)}
    for key, (value, default) in single.items():
        values = getattr(grid, key)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{key} {' '.join(map(str, values))}: give at least one, without duplicates")
        if value != default and comparison.training.process_index == 0:
            runs = ", ".join(map(str, values))
            logger.warning(f"note: {key.removesuffix('s')} {value} has no effect; a comparison runs {key} ({runs})")
    train, fixed = comparison.model.train, [name for name in grid.activations if not is_learnable(name)]
    if fixed and train in LEARNABLE:
        raise ConfigError(f"train {train!r}: {fixed[0]} has no parameters to train; remove it from activations")
    if comparison.training.push_to_hub:
        raise ConfigError("push_to_hub: a comparison pushes nothing; push the folder of a run with hf-ortho push")
    main_decides(comparison.training, lambda: output_folder(comparison))
    folder = Path(str(comparison.training.output_dir))
    with PartialState().main_process_first():
        _claim(comparison, folder)
    places = _places(comparison)
    waiting = [place for place in places if not (place[2] / RUN).is_file()]
    done = len(places) - len(waiting)
    logger.info(
        f"{_count(places, 'run')}: {_count(grid.activations, 'activation')} x {_count(grid.seeds, 'seed')}, in {folder}"
        + (f"; {done} finished earlier" if done else "")
    )
    seconds: list[float] = []
    for number, (name, seed, place) in enumerate(places, 1):
        title = f"Run {number} of {len(places)}, {name}, seed {seed}"
        if (place / RUN).is_file():
            run = Run.load(place / RUN)
            logger.info(f"{title}: finished earlier: {run}")
            yield run
            continue
        left = f" ({duration(statistics.fmean(seconds) * len(waiting))} left)" if seconds else ""
        logger.info(f"{title}{left}")
        start = time.monotonic()
        try:
            run = _run(comparison, name, seed, place, callbacks(name, seed))
        except HfOrthoError as error:
            if not any(folder.glob("*/*/*")):  # nothing has run yet, so another recipe may use the folder
                (folder / "recipe.json").unlink(missing_ok=True)
            error.args = (f"{name}, seed {seed}: {error}",)
            raise
        seconds.append(time.monotonic() - start)
        del waiting[0]
        logger.info(f"{title}: {run}")
        yield run


def kept(comparison: Comparison) -> str:
    """What an interrupted ``run_grid`` leaves in its folder, in words."""
    places = _places(comparison)
    finished = [place for _, _, place in places if (place / RUN).is_file()]
    words = [f"{len(finished)} of {len(places)} runs"]
    for name, seed, place in places:
        whole = [checkpoint.name for checkpoint in checkpoints(place) if is_whole(checkpoint)]
        if place not in finished and whole:
            words.append(f"{whole[-1]} of {name}, seed {seed}")
    return " and ".join(words)


def _places(comparison: Comparison) -> list[tuple[str, int, Path]]:
    """Activation, seed and folder of each run, in their order."""
    grid, folder = comparison.compare, Path(str(comparison.training.output_dir))
    return [(name, seed, folder / name / f"seed-{seed}") for seed in grid.seeds for name in grid.activations]


def _count(items: Sequence, what: str) -> str:
    return f"{len(items)} {what}{'s' * (len(items) != 1)}"


def _run(comparison: Comparison, activation: str, seed: int, folder: Path, callbacks: Sequence[TrainerCallback]) -> Run:
    recipe = member(comparison, activation, seed, folder)
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
        steps = max(entry["step"] for entry in result.history)  # the last is of the end of the training
        task = str(of(result.checkpoint.model).pipeline_tag)
        run = Run(activation, seed, result.after, history, task=task, steps=steps)
    _write(folder / RUN, json.dumps(dataclasses.asdict(run)))
    return run


def _empty(folder: Path) -> None:
    """Remove the files of an interrupted run, and no others."""
    if folder.is_dir():
        remove_leftovers(folder)
        with OutputFolder(folder, beside=True).writing():
            pass


def member(comparison: Comparison, activation: str, seed: int, folder: Path) -> Recipe:
    """The recipe of one run, which writes to ``folder``."""
    groups = {field.name: copy.copy(getattr(comparison, field.name)) for field in dataclasses.fields(Recipe)}
    recipe = Member(**groups, others=tuple(comparison.compare.activations))
    recipe.model.activation = activation
    recipe.training.seed = seed
    recipe.training.output_dir = str(folder)
    if not is_learnable(activation):  # these options need learnable activations
        recipe.optimizer = dataclasses.replace(recipe.optimizer, domain_penalty=0.0)
        recipe.logging = LoggingArguments()
    return recipe


def _claim(comparison: Comparison, folder: Path) -> None:
    """Save the recipe in the folder, or check that it equals the saved recipe."""
    groups = [getattr(comparison, field.name) for field in dataclasses.fields(Recipe)]
    values = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
    recipe = {key: _plain(value) for key, value in values.items() if key not in FREE}
    file = folder / "recipe.json"
    if file.is_file():
        saved = _read(file, lambda plain: {**plain})
        fields = [field for group in groups for field in dataclasses.fields(group)]
        defaults = {field.name: _default(field) for field in fields}  # of fields that an earlier version did not have
        for key in recipe.keys() | saved.keys():
            if recipe.get(key) != saved.get(key, defaults.get(key)):
                raise ConfigError(
                    f"output_dir {folder} contains runs with {key} {saved.get(key)!r}, but {key} is now "
                    f"{recipe.get(key)!r}; use another folder"
                )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"output_dir {folder} exists and does not contain a comparison; use another")
    _write(file, json.dumps(recipe, indent=1))


def _default(field: dataclasses.Field) -> Any:
    return _plain(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())


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
