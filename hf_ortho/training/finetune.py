"""Train a checkpoint, or a model from scratch, as a recipe says; the commands are thin layers over this."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments

from ..activations.registry import check_name
from ..checkpoints.load import Checkpoint, save_checkpoint
from ..conversion import ConversionReport
from ..errors import ConfigError, DataError
from ..folders import OutputFolder
from ..tasks.stream import Stream, check_stream
from .adapters import check_adapter, merge_lora
from .arguments import Recipe
from .assemble import assemble, build_trainer
from .checkpoints import MANIFEST, checkpoints, is_whole, resume_point, whole_checkpoints
from .distributed import full_state_dict, main_decides
from .metrics import metrics_at_start, metrics_of
from .policies import POLICIES


@dataclasses.dataclass
class Result:
    """What a training gave: the checkpoint in memory, the metrics, and the conversion or fit if there was one.

    ``before`` is None for a model from scratch, both metrics are None without evaluation data, ``held_back``;
    ``history`` is what Trainer logged.
    """

    checkpoint: Checkpoint
    before: dict[str, float] | None
    after: dict[str, float] | None
    conversion: ConversionReport | None
    trainable: int
    history: list[dict]
    train: Dataset | Stream
    held_back: Dataset | None


def finetune(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    finish: Callable[[Path, Result], None] | None = None,
) -> Result:
    """Load and convert if asked, or start from scratch; train, evaluate, and save into ``output_dir``.

    Resumes where ``resume_from_checkpoint`` says so: a folder, ``"true"`` for the last whole checkpoint in the output
    folder, or ``"auto"`` for that one if there is one, else the start. ``callbacks`` go to the Trainer. ``finish`` adds
    files to the draft of the output folder; what it raises is raised once the model is in place.

    Raises:
        HfOrthoError: an argument does not fit; nothing is written.
    """
    model_arguments, arguments = recipe.model, recipe.training
    if model_arguments.init not in ("pretrained", "scratch"):
        raise ConfigError(f"init {model_arguments.init!r}: must be pretrained or scratch")
    scratch = model_arguments.init == "scratch"
    if not scratch and not model_arguments.model:
        raise ConfigError("model is missing: give --model, or model in the config")
    if model_arguments.train not in POLICIES:
        raise ConfigError(f"train {model_arguments.train!r}: must be one of {', '.join(POLICIES)}")
    if model_arguments.adapter:
        check_adapter(model_arguments)
    if model_arguments.activation:
        check_name(model_arguments.activation)
    for key in ("max_train_samples", "max_eval_samples"):
        if (value := getattr(recipe.data, key)) is not None and value < 1:
            raise ConfigError(f"{key} {value}: must be at least 1")
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, key) < 1:
            raise ConfigError(f"{key} {getattr(arguments, key)}: must be at least 1")
    if recipe.data.streaming:
        check_stream(recipe.data, arguments)
    output = main_decides(arguments, lambda: output_folder(recipe))
    folder = Path(str(arguments.output_dir))
    whole = whole_checkpoints(folder)
    resume = main_decides(arguments, lambda: _resume_from(arguments, folder, whole))
    checkpoint, train, held_back, report = assemble(recipe)
    # Accelerate takes a model that was evaluated before the training for one that is prepared, and does not wrap it.
    arguments.eval_on_start = held_back is not None and resume is None and not scratch
    trainer, trainable = build_trainer(recipe, checkpoint, train, held_back, resume)
    if isinstance(checkpoint.model, PeftModel):
        report = report or getattr(checkpoint.model.peft_config["default"], "report", None)
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except DataError as error:  # with its traceback, if it comes from a dataloader worker
        raise DataError(str(error).splitlines()[-1].removeprefix("hf_ortho.errors.DataError: ")) from error
    except (RuntimeError, ValueError) as error:
        if resume is None or not re.search("size mismatch|parameter group", str(error)):
            raise
        raise ConfigError(
            f"resume_from_checkpoint {resume}: made with another model, activation or train; name another output_dir"
        ) from error
    before = metrics_at_start(trainer) if held_back is not None else None
    after = metrics_of(trainer) if held_back is not None else None
    state_dict = full_state_dict(trainer)
    result = Result(checkpoint, before, after, report, trainable, trainer.state.log_history, train, held_back)
    if trainer.is_world_process_zero():
        if isinstance(checkpoint.model, PeftModel) and not model_arguments.adapter:
            checkpoint.model, state_dict = merge_lora(checkpoint.model, state_dict), None
        copies = arguments.push_to_hub and arguments.hub_strategy != "end"  # Trainer copies what it pushes at each save
        made = [file.name for place in checkpoints(folder) for file in place.iterdir()] if copies else ()
        with output.writing(made) as draft:
            save_checkpoint(checkpoint, draft, state_dict)
            failure = None
            try:
                if finish is not None:
                    finish(draft, result)
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure
    return result


def output_folder(recipe: Recipe) -> OutputFolder:
    """``output_dir``, checked against what the recipe reads; other files in it stay.

    Raises:
        OutputError: it cannot be written, or contains an input.
    """
    inputs = (recipe.model.model, recipe.model.tokenizer, recipe.data.dataset, recipe.data.eval_dataset)
    return OutputFolder(str(recipe.training.output_dir), keep=inputs, beside=True)


def _resume_from(arguments: TrainingArguments, folder: Path, whole: list[Path]) -> str | None:
    asked = arguments.resume_from_checkpoint
    if asked and str(asked).lower() not in ("true", "auto", "false"):
        if not Path(asked).is_dir():
            raise ConfigError(f"resume_from_checkpoint {asked}: no such folder")
        if not (Path(asked) / "trainer_state.json").is_file():
            raise ConfigError(
                f"resume_from_checkpoint {asked}: no checkpoint of a training, it has no trainer_state.json"
            )
        if (Path(asked) / MANIFEST).is_file() and not is_whole(Path(asked)):
            raise ConfigError(
                f"resume_from_checkpoint {asked}: incomplete, or not what its {MANIFEST} lists; name another, or true "
                "for the last whole one in output_dir"
            )
        return str(asked)
    if asked and str(asked).lower() in ("true", "auto"):
        latest = resume_point(folder, whole, required=str(asked).lower() == "true")
        return None if latest is None else str(latest)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"output_dir {folder} exists and is not empty; name another, or resume with --resume_from_checkpoint true"
        )
    return None
