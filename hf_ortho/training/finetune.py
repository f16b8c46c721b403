"""Fine-tune a checkpoint as a recipe says; the command is a thin layer over this."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.distributed.fsdp import is_fsdp_enabled
from transformers.trainer_utils import get_last_checkpoint

from ..activations import parse
from ..conversion import ConversionReport, convert
from ..conversion.checkpoint import Checkpoint, load_checkpoint, replacing, save_checkpoint
from ..errors import ConfigError
from ..recompute import fuse_mlp
from .arguments import ModelArguments, Recipe
from .distributed import full_state_dict, main_decides
from .evaluation import make_trainer, metrics_at_start, metrics_of
from .lora import add_lora, merge_lora
from .samples import batches, load_splits
from .tensor_parallel import reduce_activation_gradients, sharding
from .trainer import POLICIES, set_trainable


@dataclasses.dataclass
class Result:
    """What a fine-tuning gave: the checkpoint in memory, metrics before and after, the conversion if there was one."""

    checkpoint: Checkpoint
    before: dict[str, float] | None
    after: dict[str, float] | None
    conversion: ConversionReport | None
    trainable: int


def finetune(recipe: Recipe) -> Result:
    """Load, convert if asked, train, evaluate, and save into ``output_dir``.

    Resumes where ``resume_from_checkpoint`` says so (``"true"`` for the latest in the output folder).

    Raises:
        HfOrthoError: an argument does not fit; nothing is written.
    """
    model_arguments, data_arguments, arguments = recipe.model, recipe.data, recipe.training
    if not model_arguments.model:
        raise ConfigError("model is missing: give --model, or model in the config")
    if model_arguments.train not in POLICIES:
        raise ConfigError(f"train {model_arguments.train!r}: must be one of {', '.join(POLICIES)}")
    if model_arguments.activation:
        parse(model_arguments.activation)
    for key in ("max_train_samples", "max_eval_samples"):
        if (value := getattr(data_arguments, key)) is not None and value < 1:
            raise ConfigError(f"{key} {value}: must be at least 1")
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, key) < 1:
            raise ConfigError(f"{key} {getattr(arguments, key)}: must be at least 1")
    resume = main_decides(arguments, lambda: _resume_from(arguments))
    checkpoint = load_checkpoint(
        model_arguments.model, revision=model_arguments.model_revision, dtype=model_arguments.dtype, **sharding()
    )
    with arguments.main_process_first(desc="preparing the data"):  # the others read what it caches
        train, held_back = load_splits(checkpoint, data_arguments)
    report = _convert_first(checkpoint, model_arguments, train)
    if model_arguments.train == "lora+activations":
        if sharding():
            raise ConfigError(
                "train 'lora+activations' and tensor parallelism do not go together; take multi_gpu or fsdp2"
            )
        checkpoint.model = cast(PreTrainedModel, add_lora(checkpoint.model, recipe.lora, arguments.seed))
    trainable = set_trainable(checkpoint.model, model_arguments.train)
    reduce_activation_gradients(checkpoint.model)
    if model_arguments.fuse_mlp:
        fuse_mlp(checkpoint.model)
    if getattr(arguments, "activation_checkpointing", None) or arguments.gradient_checkpointing:
        if not checkpoint.model.supports_gradient_checkpointing:
            raise ConfigError(f"activation checkpointing: {type(checkpoint.model).__name__} does not support it")
        if model_arguments.train != "all":
            checkpoint.model.enable_input_require_grads()
    # Accelerate takes a model that was evaluated before the training for one that is prepared, and does not wrap it.
    arguments.eval_on_start = held_back is not None and resume is None
    try:
        trainer = make_trainer(checkpoint, arguments, train, held_back)
    except ValueError as error:
        raise ConfigError(f"training arguments: {str(error).splitlines()[0]}") from error
    trainer.train(resume_from_checkpoint=resume)
    before = metrics_at_start(trainer) if held_back is not None else None
    after = metrics_of(trainer) if held_back is not None else None
    state_dict = full_state_dict(trainer)
    if trainer.is_world_process_zero():
        if isinstance(checkpoint.model, PeftModel):
            checkpoint.model, state_dict = merge_lora(checkpoint.model, state_dict), None
        save_beside_checkpoints(checkpoint, Path(str(arguments.output_dir)), state_dict)
    return Result(checkpoint, before, after, report, trainable)


def _resume_from(arguments: TrainingArguments) -> str | None:
    folder = Path(arguments.output_dir or "trainer_output")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; name a folder")
    asked = arguments.resume_from_checkpoint
    if asked and str(asked).lower() not in ("true", "false"):
        if not Path(asked).is_dir():
            raise ConfigError(f"resume_from_checkpoint {asked}: no such folder")
        if not (Path(asked) / "trainer_state.json").is_file():
            raise ConfigError(
                f"resume_from_checkpoint {asked}: no checkpoint of a training, it has no trainer_state.json"
            )
        return str(asked)
    if asked and str(asked).lower() == "true":
        latest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if latest is None:
            raise ConfigError(f"resume_from_checkpoint true: {folder} holds no checkpoint-N folder")
        return latest
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"output_dir {folder} exists and is not empty; name another, or resume with --resume_from_checkpoint true"
        )
    return None


def _convert_first(checkpoint: Checkpoint, arguments: ModelArguments, train: Dataset) -> ConversionReport | None:
    if not arguments.activation:
        return None
    done = getattr(checkpoint.model.config, "hf_ortho", None)
    family, degree = parse(arguments.activation)
    if done and done.get("activation") == f"{family.family}_{degree}":
        return None
    if is_fsdp_enabled():  # and transformers has read the weights in the main process alone
        raise ConfigError(
            f"activation {arguments.activation}: the fit needs the weights in all processes; set "
            "fsdp_cpu_ram_efficient_loading to false, or convert the model before"
        )
    samples = batches(train, arguments.calibration_samples) if arguments.calibration_samples else None
    return convert(checkpoint.model, arguments.activation, calibration=samples)


def save_beside_checkpoints(checkpoint: Checkpoint, folder: Path, state_dict: dict | None = None) -> None:
    """Put the final model into a folder that may hold training checkpoints, each file complete or absent.

    ``state_dict`` stands for a model whose tensors are sharded over processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "final.draft") as draft:
        save_checkpoint(checkpoint, draft, state_dict)
    for file in sorted((folder / "final.draft").iterdir()):
        file.replace(folder / file.name)
    (folder / "final.draft").rmdir()
