"""Train a checkpoint, or a model from scratch, as a recipe says; the commands are thin layers over this."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.activations import ACT2FN
from transformers.distributed.fsdp import is_fsdp_enabled

from ..activations import LearnableActivation, parse
from ..conversion import ConversionReport, convert
from ..conversion.checkpoint import Checkpoint, load_checkpoint, replacing, save_checkpoint
from ..conversion.sites import find_sites
from ..errors import ConfigError, DataError
from ..recompute import fuse_mlp
from .arguments import ModelArguments, Recipe
from .augment import augment, check_augmentation
from .checkpoints import FINAL_DRAFT, MANIFEST, is_whole, resume_point, whole_checkpoints
from .distributed import full_state_dict, main_decides
from .evaluation import make_trainer, metrics_at_start, metrics_of
from .logger import ActivationLogger
from .lora import add_lora, merge_lora
from .penalty import DomainPenalty
from .policies import POLICIES, set_trainable
from .samples import batches, load_splits
from .scratch import scratch_checkpoint
from .streaming import Stream, check_stream
from .tensor_parallel import reduce_activation_gradients, sharding


@dataclasses.dataclass
class Result:
    """What a training gave: the checkpoint in memory, the metrics, and the conversion or fit if there was one.

    ``before`` is None for a model from scratch, both metrics are None without evaluation data;
    ``history`` is what Trainer logged.
    """

    checkpoint: Checkpoint
    before: dict[str, float] | None
    after: dict[str, float] | None
    conversion: ConversionReport | None
    trainable: int
    history: list[dict]


def finetune(recipe: Recipe) -> Result:
    """Load and convert if asked, or start from scratch; train, evaluate, and save into ``output_dir``.

    Resumes where ``resume_from_checkpoint`` says so: a folder, ``"true"`` for the last whole checkpoint in the output
    folder, or ``"auto"`` for that one if there is one, else the start.

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
    if model_arguments.activation and model_arguments.activation not in ACT2FN:
        parse(model_arguments.activation)  # names the closest one
    for key in ("max_train_samples", "max_eval_samples"):
        if (value := getattr(recipe.data, key)) is not None and value < 1:
            raise ConfigError(f"{key} {value}: must be at least 1")
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, key) < 1:
            raise ConfigError(f"{key} {getattr(arguments, key)}: must be at least 1")
    if recipe.data.streaming:
        check_stream(recipe.data, arguments)
    whole = whole_checkpoints(_output(arguments))
    resume = main_decides(arguments, lambda: _resume_from(arguments, whole))
    checkpoint, train, held_back, report = assemble(recipe)
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
    options: dict[str, Any] = {"optimizer_arguments": recipe.optimizer_arguments()}
    if weight := recipe.optimizer.domain_penalty:
        options["penalty"] = DomainPenalty(checkpoint.model, weight, recipe.optimizer.domain_penalty_interval)
    if (every := recipe.logging.log_activations) is not None:
        options["callbacks"] = [ActivationLogger(every)]
    check_augmentation(recipe.augmentation, arguments, checkpoint, train)
    # Accelerate takes a model that was evaluated before the training for one that is prepared, and does not wrap it.
    arguments.eval_on_start = held_back is not None and resume is None and not scratch
    try:
        trainer = make_trainer(checkpoint, arguments, train, held_back, **options)
    except ValueError as error:
        raise ConfigError(f"training arguments: {str(error).splitlines()[0]}") from error
    augment(trainer, checkpoint, recipe.augmentation, recipe.data.dataset or "dataset")
    try:
        trainer.train(resume_from_checkpoint=resume)
    except DataError as error:  # with its traceback, if it comes from a dataloader worker
        raise DataError(str(error).splitlines()[-1].removeprefix("hf_ortho.errors.DataError: ")) from error
    before = metrics_at_start(trainer) if held_back is not None else None
    after = metrics_of(trainer) if held_back is not None else None
    state_dict = full_state_dict(trainer)
    if trainer.is_world_process_zero():
        if isinstance(checkpoint.model, PeftModel):
            checkpoint.model, state_dict = merge_lora(checkpoint.model, state_dict), None
        save_beside_checkpoints(checkpoint, Path(str(arguments.output_dir)), state_dict)
    return Result(checkpoint, before, after, report, trainable, trainer.state.log_history)


def assemble(recipe: Recipe) -> tuple[Checkpoint, Dataset | Stream, Dataset | None, ConversionReport | None]:
    """The checkpoint, converted or new, the samples for training and evaluation, and the report of the activations."""
    arguments, training = recipe.model, recipe.training
    if arguments.init == "scratch":
        checkpoint, report = scratch_checkpoint(arguments, recipe.data, training.seed)
    else:
        place, report = str(arguments.model), None
        checkpoint = load_checkpoint(place, revision=arguments.model_revision, dtype=arguments.dtype, **sharding())
    with training.main_process_first(desc="preparing the data"):  # the others read what it caches
        seed = training.seed if training.data_seed is None else training.data_seed
        train, held_back = load_splits(checkpoint, recipe.data, seed)
    if arguments.init != "scratch":
        report = _convert_first(checkpoint, arguments, train)
    return checkpoint, train, held_back, report


def _output(arguments: TrainingArguments) -> Path:
    return Path(arguments.output_dir or "trainer_output")


def _resume_from(arguments: TrainingArguments, whole: list[Path]) -> str | None:
    folder = _output(arguments)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; name a folder")
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


def _convert_first(
    checkpoint: Checkpoint, arguments: ModelArguments, train: Dataset | Stream
) -> ConversionReport | None:
    """Convert unless the model has the activation already, learnable or not."""
    name, model = arguments.activation, checkpoint.model
    if not name:
        return None
    present = {site.source for site in find_sites(model)[0]}
    learnable = isinstance(ACT2FN[name], LearnableActivation)
    if present == {name if not learnable else ACT2FN[name].name}:
        return None
    if not learnable:
        raise ConfigError(
            f"activation {name!r}: {model.name_or_path} has {', '.join(sorted(present))}; only learnable activations, "
            "such as hermite_8, can be converted to"
        )
    if is_fsdp_enabled():  # and transformers has read the weights in the main process alone
        raise ConfigError(
            f"activation {arguments.activation}: the fit needs the weights in all processes; set "
            "fsdp_cpu_ram_efficient_loading to false, or convert the model before"
        )
    samples = batches(train, arguments.calibration_samples) if arguments.calibration_samples else None
    return convert(model, name, calibration=samples)


def save_beside_checkpoints(checkpoint: Checkpoint, folder: Path, state_dict: dict | None = None) -> None:
    """Put the final model into a folder that may hold training checkpoints.

    Each file is complete or absent, and ``config.json``, without which nothing loads, is there only if all files of the
    model are from the same save. ``state_dict`` stands for a model whose tensors are sharded over processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / FINAL_DRAFT
    with replacing(draft) as place:
        save_checkpoint(checkpoint, place, state_dict)
    (folder / "config.json").unlink(missing_ok=True)
    for file in sorted(draft.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
        file.replace(folder / file.name)
    draft.rmdir()
