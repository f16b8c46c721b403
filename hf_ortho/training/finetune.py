"""Train a checkpoint, or a model from scratch, from a recipe. The commands are thin layers over this."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import deepspeed_config

from ..activations.registry import check_name
from ..checkpoints.load import Checkpoint, save_checkpoint
from ..conversion import ConversionReport
from ..errors import ConfigError, DataError
from ..files import explain, json_object
from ..folders import OutputFolder
from ..tasks.stream import Stream, check_stream
from .adapters import check_adapter, merge_lora
from .arguments import Recipe
from .assemble import assemble, build_trainer
from .checkpoints import check_intact, checkpoints, intact_checkpoints, resume_point, whole_checkpoints
from .distributed import autocast_under_deepspeed, check_fsdp, full_state_dict, loading_whole, main_decides
from .manifest import MANIFEST, is_whole
from .metrics import metrics_at_start, metrics_of
from .policies import POLICIES
from .record import check_resumed, record_of

logger = logging.getLogger("hf_ortho")


@dataclasses.dataclass
class Result:
    """The result of a training: the checkpoint in memory, the metrics, and the conversion or fit, if any.

    ``before`` is None for a model from scratch. Both metrics are None without evaluation data (``held_back``).
    ``history`` is the log history of Trainer.
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
    """Load a model, or create one from scratch; convert it if requested, train, evaluate, and save to ``output_dir``.

    ``resume_from_checkpoint`` is a checkpoint folder, ``"true"`` for the last complete checkpoint in the output folder,
    or ``"auto"`` for the same if there is one, else a fresh start. ``callbacks`` are passed to Trainer. ``finish`` adds
    files to the draft of the output folder. Its errors are raised after the model is saved.

    Raises:
        HfOrthoError: an argument is invalid; nothing is written.

    Example:
        >>> from pathlib import Path
        >>> from transformers import TrainingArguments
        >>> from hf_ortho.training import DataArguments, ModelArguments, Recipe, finetune
        >>> model.save_pretrained("model")
        >>> _ = Path("text.txt").write_text("Hello, world. " * 99)
        >>> arguments = TrainingArguments("out", max_steps=1, disable_tqdm=True, dataloader_pin_memory=False)
        >>> source = ModelArguments("scratch", "model", tokenizer="bytes", activation="hermite_3")
        >>> result = finetune(Recipe(source, DataArguments("text.txt", block_size=8), arguments))
        >>> sorted(result.after)
        ['loss', 'perplexity']
    """
    model_arguments, arguments = recipe.model, recipe.training
    if model_arguments.init not in ("pretrained", "scratch"):
        raise ConfigError(f"init {model_arguments.init!r}: must be pretrained or scratch")
    scratch = model_arguments.init == "scratch"
    if not scratch and not model_arguments.model:
        raise ConfigError("model is missing; give --model, or model in the config")
    recipe.data.needed_dataset()
    if model_arguments.train not in POLICIES:
        raise ConfigError(f"train {model_arguments.train!r}: must be one of {', '.join(POLICIES)}")
    if model_arguments.adapter:
        check_adapter(model_arguments)
    if model_arguments.activation:
        check_name(model_arguments.activation)
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, key) < 1:
            raise ConfigError(f"{key} {getattr(arguments, key)}: must be at least 1")
    if recipe.data.streaming:
        check_stream(recipe.data, arguments)
    check_fsdp(arguments)
    autocast_under_deepspeed(deepspeed_config(), arguments)  # with which transformers partitions a model that it loads
    output = main_decides(arguments, lambda: output_folder(recipe))
    folder = Path(str(arguments.output_dir))
    whole = whole_checkpoints(folder)
    asked = str(arguments.resume_from_checkpoint or "").lower()
    intact = intact_checkpoints(whole) if asked in ("true", "auto") else whole
    resume = main_decides(arguments, lambda: _resume_from(arguments, folder, whole, intact))
    if resume is not None:
        logger.info(f"Resuming from {Path(resume).name}")
    with loading_whole(recipe):
        checkpoint, train, held_back, report = assemble(recipe)
    record = record_of(recipe, checkpoint.model, train)
    if resume is not None:
        adapter = model_arguments.activation if model_arguments.adapter else None
        main_decides(arguments, lambda: check_resumed(Path(resume), checkpoint.model, record, adapter))
    # Accelerate treats a model that was evaluated before training as prepared, and does not wrap it.
    arguments.eval_on_start = held_back is not None and resume is None and not scratch
    trainer, trainable = build_trainer(recipe, checkpoint, train, held_back, resume)
    trainer.recipe, trainer.checked = record, resume or ""
    if isinstance(checkpoint.model, PeftModel):
        report = report or getattr(checkpoint.model.peft_config["default"], "report", None)
    for callback in callbacks:
        trainer.add_callback(callback)
    if arguments.eval_on_start:
        logger.info(f"First evaluating on {len(held_back or ())} samples")
    try:
        trainer.train(resume_from_checkpoint=resume)
    except DataError as error:  # includes a traceback if raised in a dataloader worker
        raise DataError(str(error.args[0]).splitlines()[-1].removeprefix("hf_ortho.errors.DataError: ")) from error
    except ImportError as error:  # of an optimizer or kernels
        raise ConfigError(f"training arguments: {explain(error)}") from error
    except (RuntimeError, ValueError) as error:
        if resume is None or not re.search("size mismatch|parameter group", str(error)):
            raise
        raise ConfigError(
            f"resume_from_checkpoint {resume}: made with another model, activation or train; use another output_dir"
        ) from error
    before = metrics_at_start(trainer) if held_back is not None else None
    if held_back is not None:
        logger.info(f"Evaluating on {len(held_back)} samples")
    after = metrics_of(trainer) if held_back is not None else None
    logger.info(f"Saving {folder}")
    state_dict = full_state_dict(trainer)
    result = Result(checkpoint, before, after, report, trainable, trainer.state.log_history, train, held_back)
    if trainer.is_world_process_zero():
        if isinstance(checkpoint.model, PeftModel) and not model_arguments.adapter:
            checkpoint.model, state_dict = merge_lora(checkpoint.model, state_dict), None
        copies = (
            arguments.push_to_hub and arguments.hub_strategy != "end"
        )  # Trainer copies the files that it pushes at each save
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
    """``output_dir``, checked against the inputs of the recipe. Other files in it are kept.

    Raises:
        OutputError: the folder cannot be written, or contains an input.
    """
    inputs = (recipe.model.model, recipe.model.tokenizer, recipe.data.dataset, recipe.data.eval_dataset)
    return OutputFolder(str(recipe.training.output_dir), keep=inputs, beside=True)


def _resume_from(arguments: TrainingArguments, folder: Path, whole: list[Path], intact: list[Path]) -> str | None:
    requested = arguments.resume_from_checkpoint
    if requested and str(requested).lower() not in ("true", "auto", "false"):
        if not Path(requested).is_dir():
            raise ConfigError(f"resume_from_checkpoint {requested}: the folder does not exist")
        if not (Path(requested) / "trainer_state.json").is_file():
            raise ConfigError(
                f"resume_from_checkpoint {requested}: not a training checkpoint, it has no trainer_state.json"
            )
        if (Path(requested) / MANIFEST).is_file() and not is_whole(Path(requested)):
            raise ConfigError(
                f"resume_from_checkpoint {requested}: incomplete, or different from its {MANIFEST}; use another, or "
                "true for the last complete checkpoint in output_dir"
            )
        json_object(Path(requested) / "trainer_state.json")
        check_intact(Path(requested))
        return str(requested)
    if requested and str(requested).lower() in ("true", "auto"):
        latest = resume_point(folder, whole, intact, required=str(requested).lower() == "true")
        return None if latest is None else str(latest)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"output_dir {folder} exists and is not empty; use another or resume with --resume_from_checkpoint true"
        )
    return None
